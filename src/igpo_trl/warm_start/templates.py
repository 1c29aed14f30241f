"""A chat template that calls tools, for models whose own does not."""

from typing import Any

from ..rollout.chat_templates import prepare_for_tools

_CHATML = ("<|im_start|>", "<|im_end|>")


def prepare_tokenizer(tokenizer: Any) -> bool:
    """
    Make a tokenizer call tools: with its own chat template, or with Qwen2.5's if its own cannot.

    The token that ends a turn in the template becomes the end-of-sequence token, which in base models is another one.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Changed in place. For Qwen2.5's template it must have ChatML's markers.

    Returns:
        `bool`: Whether the template was replaced.

    Raises:
        ValueError: The tokenizer has neither a template that can call tools nor ChatML's markers.
    """
    from trl.chat_template_utils import add_response_schema, qwen2_5_chat_template

    own, replaced = tokenizer.chat_template, False
    try:
        prepare_for_tools(tokenizer)
    except ValueError as error:
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in _CHATML if token not in vocabulary]:
            tokenizer.chat_template = own
            raise ValueError(
                "The tokenizer has no chat template that can call tools, and Qwen2.5's does not fit it: the marker "
                f"{missing[0]} is not in the vocabulary. Set a `chat_template` that can, and save the tokenizer."
            ) from error
        tokenizer.chat_template, replaced = qwen2_5_chat_template, True
        add_response_schema(tokenizer)
    end = _turn_end(tokenizer)
    if end is not None and end != tokenizer.eos_token_id:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return replaced


def _turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an answer, if there is one."""
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(rendered.rpartition("an answer")[2].strip(), add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return ids[0] if ids and ids[0] in special else None
