"""What a call came to: a text for the policy to read, and a kind of error to count."""

import json
import reprlib
from enum import StrEnum
from typing import Any, NamedTuple

from ..files import encodable

MAX_ERROR_CHARACTERS = 500
MEDIA_TYPES = frozenset(
    f"{prefix}{kind}{suffix}"
    for kind in ("image", "audio", "video")
    for prefix in ("", "input_")
    for suffix in ("", "_url")
)


class ToolErrorKind(StrEnum):
    """Why a call gave no result."""

    MALFORMED = "malformed"
    UNKNOWN_TOOL = "unknown_tool"
    BAD_ARGUMENTS = "bad_arguments"
    RAISED = "raised"
    TIMEOUT = "timeout"
    NOT_TEXT = "not_text"


class ToolResult(NamedTuple):
    """
    What the policy reads as the answer to a call.

    Attributes:
        text (`str`): The observation. Can be encoded as UTF-8; an error begins with "Error: ".
        error (`ToolErrorKind`, *optional*): The kind of error, `None` for a result of the tool.
        seconds (`float`, *optional*): How long it took from the moment it began to run, `None` if nothing was run.
    """

    text: str
    error: ToolErrorKind | None = None
    seconds: float | None = None


def cut(text: str, limit: int = MAX_ERROR_CHARACTERS) -> str:
    """At most `limit` characters, the last an ellipsis if some are left out."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def show(value: Any) -> str:
    """A short form of any value, and its type."""
    try:
        return f"{reprlib.repr(value)} ({type(value).__name__})"
    except Exception:  # an integer of thousands of digits, an object that cannot show itself
        return f"a value of type {type(value).__name__}"


def error_result(kind: ToolErrorKind, text: str, seconds: float | None = None) -> ToolResult:
    """An error for the policy to read, of bounded length."""
    return ToolResult(cut(encodable(f"Error: {text}")), kind, seconds)


def describe(error: BaseException) -> str:
    """Type and message, which an exception may fail to give."""
    try:
        message = str(error)
    except Exception:
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def as_text(name: str, value: Any, returns: tuple[type, ...]) -> str | None:
    """
    What a tool returned, as text.

    Args:
        name (`str`): The tool, for the error.
        value (`Any`): What it returned.
        returns (`tuple` of `type`): Kinds of values other than text that it declares to return.

    Returns:
        `str`, *optional*: `None` if the value is neither text nor of a kind that is declared and can be written out.

    Raises:
        ValueError: The value holds an image, sound or video.
    """
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list) and value:
        kinds = [block.get("type") if isinstance(block, dict) else None for block in value]
        media = [kind for kind in kinds if isinstance(kind, str) and kind in MEDIA_TYPES]
        if media:
            raise ValueError(
                f"the tool {name!r} returned content of type {media[0]!r}; multi-modal tool results are not "
                "supported. Return a string that says what the policy needs to know of it."
            )
        texts = [block.get("text") for block, kind in zip(value, kinds, strict=True) if kind == "text"]
        if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
            return encodable("\n".join(texts))
    if not isinstance(value, returns):
        return None
    try:
        return encodable(
            str(value) if isinstance(value, (bool, int, float)) else json.dumps(value, ensure_ascii=False)
        )
    except Exception:  # values that are no JSON, cycles, integers of thousands of digits
        return None
