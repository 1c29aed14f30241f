"""Answer probes: the right answer inside its template, as tokens, and the span of the answer among them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

logger = logging.getLogger(__name__)

#: Template of the paper, after which the answer is scored.
DEFAULT_TEMPLATE = "<think>\nNow there's enough information to answer\n</think>\n<answer>\n{answer}\n</answer>"
#: The same for models that do not think aloud.
NO_THINK_TEMPLATE = "<answer>\n{answer}\n</answer>"


@dataclass(frozen=True)
class AnswerProbe:
    """
    An answer in its template, as tokens.

    Attributes:
        token_ids (`list[int]`): Tokens of the rendered template. Those after the answer are never run.
        answer_start (`int`): Index of the answer's first token.
        answer_end (`int`): Index after its last token.

    Raises:
        ValueError: The span is empty or not inside `token_ids`.
    """

    token_ids: list[int]
    answer_start: int
    answer_end: int

    def __post_init__(self) -> None:
        if not 0 <= self.answer_start < self.answer_end <= len(self.token_ids):
            raise ValueError(
                f"The answer must be a non-empty span of the probe's {len(self.token_ids)} tokens, got "
                f"[{self.answer_start}, {self.answer_end})."
            )

    @cached_property
    def key(self) -> tuple[int, ...]:
        """What its score depends on beside the context: the tokens up to the answer's end, and where it starts."""
        return (self.answer_start, *self.token_ids[: self.answer_end])


def build_probes(
    tokenizer: Any, answers: Sequence[str], template: str = DEFAULT_TEMPLATE, max_answer_tokens: int | None = None
) -> list[AnswerProbe]:
    """
    Tokenise each answer inside its template.

    The answer's span is found by character offsets on the whole rendered template, because a tokenizer may merge
    characters across the edges of the slot. A token that overlaps the answer counts as part of the answer.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): A tokenizer that returns character offsets.
        answers (`Sequence[str]`): The aliases of the answer, none of them empty.
        template (`str`, *optional*, defaults to `DEFAULT_TEMPLATE`): Text with one `{answer}` slot.
        max_answer_tokens (`int`, *optional*): Score only this many tokens of a longer answer, with a warning the first
            time.

    Returns:
        `list[AnswerProbe]`: One probe per answer, in order.

    Raises:
        ValueError: The template does not have exactly one slot, an answer is empty, or the tokenizer gives no offsets.
    """
    prefix, suffix = split_template(template)
    probes = []
    for answer in answers:
        text = prefix + answer + suffix
        try:
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError as error:
            raise ValueError(
                f"Beliefs need the character offsets of a fast tokenizer, got {type(tokenizer).__name__}. Load it "
                "with `AutoTokenizer.from_pretrained(..., use_fast=True)`."
            ) from error
        first, last = len(prefix), len(prefix) + len(answer)
        inside = [i for i, (start, end) in enumerate(encoded["offset_mapping"]) if start < last and end > first]
        if not inside:
            raise ValueError(f"The answer {answer!r} has no token in the template {template!r}. Remove empty answers.")
        end = inside[-1] + 1
        if max_answer_tokens is not None and end - inside[0] > max_answer_tokens:
            _warn_of_cut(max_answer_tokens)
            end = inside[0] + max_answer_tokens
        probes.append(AnswerProbe(list(encoded["input_ids"]), inside[0], end))
    return probes


@lru_cache(maxsize=8)
def _warn_of_cut(max_answer_tokens: int) -> None:
    logger.warning(
        "Some answers have more than %d tokens: beliefs score only the first %d.",
        max_answer_tokens,
        max_answer_tokens,
    )


def split_template(template: str) -> tuple[str, str]:
    """The text before and after the template's `{answer}` slot; a `ValueError` unless there is exactly one."""
    parts = template.split("{answer}")
    if len(parts) != 2:
        raise ValueError(f"The answer template must contain `{{answer}}` exactly once, got {template!r}.")
    return parts[0], parts[1]


def fit_template(template: str, generation_prompt: str) -> str:
    """
    Drop from `template` what the chat template's generation prompt already contains.

    After a generation prompt that ends in `<think>`, the template's own `<think>` is dropped. After one that ends in a
    closed, empty thought, the template's whole thought is dropped.
    """
    opened = generation_prompt.rstrip()
    if opened.endswith("<think>") and template.lstrip().startswith("<think>"):
        return template.lstrip().removeprefix("<think>").lstrip("\n")
    if opened.endswith("</think>") and "</think>" in template:
        return template.split("</think>", 1)[1].lstrip("\n")
    return template
