"""A chat template that calls tools, for models whose own does not."""

import logging
from typing import Any

from ..rollout.chat_templates import prepare_for_tools

logger = logging.getLogger(__name__)

_CHATML = ("<|im_start|>", "<|im_end|>")


def add_tool_template(tokenizer: Any) -> bool:
    """
    Give a tokenizer Qwen2.5's chat template if its own cannot call tools.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Changed in place. If it has to change, it must have ChatML's markers.

    Returns:
        `bool`: Whether the template was changed.

    Raises:
        ValueError: The tokenizer has neither a template that can call tools nor ChatML's markers.
    """
    from trl.chat_template_utils import add_response_schema, qwen2_5_chat_template

    own = tokenizer.chat_template
    try:
        prepare_for_tools(tokenizer)
        return False
    except ValueError as error:
        tokenizer.chat_template = own
        vocabulary = tokenizer.get_vocab()
        if any(token not in vocabulary for token in _CHATML):
            raise ValueError(
                f"{error} It cannot get Qwen2.5's template either, because its vocabulary lacks "
                f"{' and '.join(token for token in _CHATML if token not in vocabulary)}."
            ) from error
    tokenizer.chat_template = qwen2_5_chat_template
    add_response_schema(tokenizer)
    tokenizer.eos_token = _CHATML[1]  # which ends a turn in this template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return True
