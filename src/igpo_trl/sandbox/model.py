"""The sandbox's tokenizer and model. Both are built in code, so nothing is downloaded."""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from .world import GIVEN_NAMES, RELATIONS, SURNAMES

ANSWER_TEMPLATE = "<answer>{answer}</answer>"

END, PAD, _UNKNOWN = "<|im_end|>", "<|endoftext|>", "<|unk|>"
_USER, _ASSISTANT, _TOOL = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_start|>tool\n"
# One token each: a call has five tokens, of which three are decisions, yet its text is ordinary JSON.
_CALL_OPEN, _CALL_CLOSE = '<tool_call>{"name": "search", "arguments": {"query": "', '"}}</tool_call>'
_GLUED = (_CALL_OPEN, _CALL_CLOSE, "<answer>", "</answer>", "?", ".")
_WORDS = ("Who", "The", "is", "the", "of", *RELATIONS, *SURNAMES, *GIVEN_NAMES)

_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}"
    "{{- message.content or '' -}}"
    "{%- for call in message.tool_calls or [] -%}"
    "{%- set call = call.function if call.function is defined else call -%}"
    '{{- \'<tool_call>{"name": "\' + call.name + \'", "arguments": \' -}}'
    "{{- (call.arguments | tojson) + '}</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message.content + '<|im_end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

_RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": _ASSISTANT,
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>", "content": "text"},
    },
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """
    Word-level tokenizer of the world, with a chat template and a response template with which TRL can call tools.

    Decoding puts one space between words and none around markers and punctuation. Every sequence of ids decodes to a
    text that encodes to the same ids.
    """
    special = (PAD, END, _UNKNOWN, _USER, _ASSISTANT, _TOOL)
    markers = (*special, *_GLUED)
    vocabulary = {token: i for i, token in enumerate((*markers, *_WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unglue = [decoders.Replace(spaced, marker) for marker in markers for spaced in (f" {marker}", f"{marker} ")]
    spaced_words = [decoders.Replace(Regex("^"), " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence([*spaced_words, *unglue])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    core.add_tokens([AddedToken(token, normalized=False) for token in _GLUED])
    tokenizer = wrap_tokenizer(core, _CHAT_TEMPLATE, unk_token=_UNKNOWN)
    tokenizer.response_template = _RESPONSE_TEMPLATE
    return tokenizer


def wrap_tokenizer(core: Tokenizer, chat_template: str, **options: Any) -> PreTrainedTokenizerFast:
    """The tokenizer `core` for transformers, with the two special tokens of Qwen's that every model here uses."""
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
        **options,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, width: int = 64) -> Qwen2ForCausalLM:
    """
    A two-layer Qwen2. The weights are drawn from torch's global generator.

    Heads have 32 dimensions. With 16, rotary positions are too coarse to attend to the previous token, as copying
    requires.
    """
    return make_qwen2(
        tokenizer,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=width**-0.5,
    )


def make_qwen2(tokenizer: PreTrainedTokenizerFast, **shape: Any) -> Qwen2ForCausalLM:
    """A Qwen2 with full attention and tied embeddings in float32. `shape` goes to `Qwen2Config`."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=None,  # as many as attention heads
        use_sliding_window=False,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **shape,
    )
    return Qwen2ForCausalLM(config)
