"""Cells of question files: numbers, lists, JSON and Python notation → texts."""

import ast
import io
import json
import math
import tokenize
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

ANSWER_SEPARATOR = "<|answer_split|>"
"""Joins the aliases of an answer in the data files of the IGPO authors."""


def is_missing(value: Any) -> bool:
    """Whether a cell is empty. pandas writes NaN into empty cells."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def as_text(value: Any) -> str:
    """
    The value as a person would write it: `yes` for true, `7` for 7.0.

    Raises:
        ValueError: The value is neither a text nor such a number.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        text = f"{value:.9f}".rstrip("0").rstrip(".")
        if type(value)(text) == value and -(2**53) < value < 2**53:
            return text.removeprefix("-") if value == 0 else text
    raise ValueError(f"got {value!r}, expected a text. Write it as one.")


def as_texts(value: Any, *, parse: bool = True) -> list[str]:
    """
    The texts in a cell of answers: one, a list, or a SQuAD answer (`{"text": [...], "answer_start": [...]}`). With
    `parse`, a text in the notation of a list or of an object is read as one.

    Raises:
        ValueError: A part is no text, or the notation cannot be read.
    """
    if is_missing(value):
        return []
    if isinstance(value, str):
        parsed = parse_nested(value) if parse else None
        return value.split(ANSWER_SEPARATOR) if parsed is None else as_texts(parsed, parse=False)
    if isinstance(value, Mapping):
        key = next((key for key in ("text", "target", "answer") if key in value), None)
        if key is None:
            raise ValueError(f"got {value!r}, expected a text or a list of texts.")
        return as_texts(value[key])
    if not isinstance(value, list | tuple):
        return [as_text(value)]
    texts: list[str] = []
    for part in value:
        texts += as_texts(part, parse=False) if isinstance(part, str | Mapping) and part else [as_text(part)]
    return texts


def parse_nested(text: str) -> Any:
    """
    The list or object that a text denotes, in JSON, in Python, or as NumPy prints it (`['a' 'b']`); `None` for any
    other text.

    Raises:
        ValueError: The text looks like one, but cannot be read.
    """
    ends = text.strip()[:1] + text.strip()[-1:]
    if ends in ("[]", "{}"):
        value = _json(text) or _printed_texts(text) or decode(text)
        if isinstance(value, list | tuple | dict):
            return value
        if "'" in text or '"' in text or not any(map(str.isalpha, text)):
            raise ValueError(
                f"is not a JSON list, though it looks like one: {text!r}. Save it as JSON Lines or parquet."
            )
    if text.lstrip().startswith("array(["):
        raise ValueError(f"is a printed array: {text!r}. Save it as JSON Lines or parquet.")
    return None


def decode(value: Any) -> Any:
    """Decodes a cell that was written as text, in JSON or Python notation. Other cells are returned as they are."""
    if not isinstance(value, str):
        return value
    if (read := _json(value)) is not None:
        return read
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _printed_texts(text: str) -> list[str] | None:
    """The texts in a list that Python or NumPy has printed; `decode` would join those without a comma between them."""
    texts, brackets = [], 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
            brackets += token.string in ("[", "]")
            if token.type == tokenize.STRING:
                texts.append(ast.literal_eval(token.string))
            elif token.string.strip() not in ("", "[", "]", ","):
                return None
    except (tokenize.TokenError, SyntaxError, ValueError):
        return None
    return texts if brackets == 2 and all(isinstance(part, str) for part in texts) else None
