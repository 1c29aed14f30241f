"""Results of tool calls: a text for the policy to read, and a kind of error to count."""

import contextlib
import json
import re
import reprlib
from enum import StrEnum
from typing import Any, NamedTuple

from ..files import encodable

MAX_ERROR_CHARACTERS = 500
_ADDRESS = re.compile(r"^<.* at 0x[0-9a-fA-F]+>$", re.DOTALL)  # what Python shows of an object without a text
MAX_NESTING = 50  # levels of lists and objects in a message; a stack holds some hundreds
MEDIA_TYPES = frozenset(
    f"{prefix}{kind}{suffix}"
    for kind in ("image", "audio", "video")
    for prefix in ("", "input_")
    for suffix in ("", "_url")
)


class ToolErrorKind(StrEnum):
    """The reason why a call has no result."""

    MALFORMED = "malformed"
    UNKNOWN_TOOL = "unknown_tool"
    BAD_ARGUMENTS = "bad_arguments"
    RAISED = "raised"
    TIMEOUT = "timeout"
    NOT_TEXT = "not_text"


class ToolResult(NamedTuple):
    """
    What the policy reads in response to a call.

    Attributes:
        text (`str`): The observation, always valid UTF-8. An error begins with "Error: ".
        error (`ToolErrorKind`, *optional*): The kind of error, `None` for a result of the tool.
        seconds (`float`, *optional*): Duration from the moment the call started, `None` if it did not run.
        unavailable (`bool`): Whether the error is not the fault of the arguments, see [`is_unavailable`].
    """

    text: str
    error: ToolErrorKind | None = None
    seconds: float | None = None
    unavailable: bool = False


def cut(text: str, limit: int = MAX_ERROR_CHARACTERS) -> str:
    """The text shortened to `limit` characters, with an ellipsis as the last one."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def show(value: Any) -> str:
    """A short representation of any value, with its type."""
    try:
        return f"{reprlib.repr(value)} ({type(value).__name__})"
    except Exception:  # an integer of thousands of digits, or a broken `__repr__`
        return f"a value of type {type(value).__name__}"


def nesting(value: Any) -> int:
    """Number of levels of lists and dicts inside each other; more than `MAX_NESTING` are not told apart."""
    depth, level = 0, [value]
    while level and depth <= MAX_NESTING:
        containers = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list | tuple)]
        level = [inner for container in containers for inner in container]
        depth += bool(containers)
    return depth


def error_result(kind: ToolErrorKind, text: str, seconds: float | None = None) -> ToolResult:
    """An error for the policy to read, at most `MAX_ERROR_CHARACTERS` long."""
    return ToolResult(cut(encodable(f"Error: {text}")), kind, seconds)


def describe(error: BaseException) -> str:
    """Type and message of an exception, whose `__str__` may fail."""
    try:
        message = str(error)
    except Exception:
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def as_text(name: str, value: Any) -> str | None:
    """
    Convert the return value of a tool to text: containers to JSON, anything else as `str` does, like TRL.

    Args:
        name (`str`): Name of the tool, for the error.
        value (`Any`): The value.

    Returns:
        `str` or `None`: The text; `None` if the value has none that says anything, such as bytes or a generator.

    Raises:
        ValueError: The value contains an image, audio or video.
    """
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list) and value:
        kinds = [block.get("type") if isinstance(block, dict) else None for block in value]
        media = [kind for kind in kinds if isinstance(kind, str) and kind in MEDIA_TYPES]
        if media:
            raise ValueError(
                f"the tool {name!r} returned content of type {media[0]!r}; multi-modal tool results are not "
                "supported. Return a string that describes the content."
            )
        texts = [block.get("text") for block, kind in zip(value, kinds, strict=True) if kind == "text"]
        if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
            return encodable("\n".join(texts))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return None
    if isinstance(value, (dict, list, tuple)):
        with contextlib.suppress(Exception):  # keys that JSON has no form for, cycles, deep nesting
            return encodable(json.dumps(value, ensure_ascii=False, default=str))
    try:
        text = str(value)
    except Exception:  # an integer of thousands of digits, or a broken `__str__`
        return None
    return None if _ADDRESS.search(text) else encodable(text)
