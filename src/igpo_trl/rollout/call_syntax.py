"""Finds tool calls that a policy meant and the response template cannot read."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase


class CallSyntax:
    """
    How calls begin in the tokenizer's response template.

    A turn whose call cannot be read (broken JSON, no closing tag) is plain text to the parser. What tells it from an
    answer is the opening of a call outside of the reasoning.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a `response_template`; without one no call is ever malformed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        fields = (getattr(tokenizer, "response_template", None) or {}).get("fields", {})
        self._opens = _pattern(fields.get("tool_calls", {}), "open")
        thinking = fields.get("reasoning_content") or fields.get("thinking") or {}
        self._thinks, self._thought = _pattern(thinking, "open"), _pattern(thinking, "close")

    def problem(self, ids: list[int], prefix: list[int]) -> str | None:
        """
        What is wrong with the call of a turn in which the parser found none; `None` if the turn has no call.

        Args:
            ids (list of `int`): the sampled turn.
            prefix (list of `int`): what stood before it, the generation prompt at least.
        """
        if self._opens is None:
            return None
        text = self.tokenizer.decode(ids)
        if self._thought is not None and (ends := list(self._thought.finditer(text))):
            text = text[ends[-1].end() :]
        elif self._thinks is not None and (begins := self._thinks.search(text)) and begins.end() > begins.start():
            text = text[: begins.start()]
        if not self._opens.search(text):
            return None
        try:
            self.tokenizer.parse_response(ids, prefix=prefix)
        except Exception as error:  # whatever the parser says of text that a policy wrote
            reason = " ".join(str(error).split())[:200]
        else:
            reason = "a name or the arguments are missing"
        return f"the tool call could not be read ({reason}). Repeat it in the right form."


def _pattern(field: dict[str, Any], name: str) -> re.Pattern[str] | None:
    if f"{name}_pattern" in field:
        return re.compile(field[f"{name}_pattern"])
    return re.compile(re.escape(field[name])) if name in field else None
