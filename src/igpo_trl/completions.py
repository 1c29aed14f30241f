"""TRL's table of completions, for the console, parquet, W&B and Trackio: what a policy wrote never ends a run."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .files import encodable
from .records import TURN_COLUMNS, completion_columns
from .rollout.tool_results import MAX_NESTING, nesting, show
from .step import Step


def log_turns(step: Step, logs: Mapping[str, Any]) -> None:
    """
    Add what is known of a batch's turns to TRL's table.

    Beliefs, gains and advantages of each rollout's turns become columns of text, empty where there are none. The
    column of scalar advantages, which TRL has already filled, gets the means of those that are used.
    """
    columns = completion_columns(step)
    for name, column in columns.items():
        logs["extra"][name].extend(column)
    if step.global_advantages is not None:
        means = (step.global_advantages.sum(dim=1) / step.global_num_turns).tolist()
        _replace(logs["advantages"], [*list(logs["advantages"])[: -len(means)], *means])


def fill_columns(logs: Mapping[str, Any], pending: dict[str, list[Any]], num_rollouts: int) -> None:
    """
    Give every rollout a value in every column that reward functions log (`log_extra`), `None` where they logged none.

    Args:
        logs (`dict`): TRL's table so far.
        pending (`dict`): columns of the batch, by name, of any length.
        num_rollouts (`int`): rollouts of the batch on this process.
    """
    for name in {*logs["extra"], *pending} - {*TURN_COLUMNS}:
        values = [*pending.get(name, []), *[None] * num_rollouts]
        pending[name] = values[:num_rollouts]


def make_loggable(logs: Mapping[str, Any]) -> None:
    """
    Give every column of TRL's table one type, which Arrow and W&B would infer from values that a policy wrote.

    All messages get the same keys, with text as values; the arguments of a tool call are the text of a JSON object.
    All text can be encoded as UTF-8. A column of a reward function becomes text, unless it holds only numbers or only
    booleans.
    """
    for column in (logs["prompt"], logs["completion"]):
        chats = [value if _is_chat(value) else [{"role": "", "content": value}] for value in column]
        keys = dict.fromkeys(key for messages in chats for message in messages for key in message)
        chatting = any(map(_is_chat, column))  # the evaluation set may chat and the training set may not
        _replace(column, [_chat(messages, keys) for messages in chats] if chatting else list(map(_text, column)))
    for column in logs["extra"].values():
        # A column that appears in the middle of training has no values for the rollouts before.
        _replace(column, _of_one_type([*[None] * (len(logs["prompt"]) - len(column)), *column]))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console that is not UTF-8


def _replace(column: Any, values: Sequence[Any]) -> None:
    column.clear()
    column.extend(values)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def _chat(messages: Iterable[Mapping[str, Any]], keys: Iterable[str]) -> list[dict[str, Any]]:
    return [
        {key: _calls(message.get(key)) if key == "tool_calls" else _text(message.get(key)) for key in keys}
        for message in messages
    ]


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls, well-formed or not, in the usual form."""
    entries = calls if isinstance(calls, list) else [] if calls is None else [calls]
    functions = [entry.get("function", entry) if isinstance(entry, Mapping) else entry for entry in entries]
    pairs = [
        (function.get("name"), function.get("arguments")) if isinstance(function, Mapping) else (None, function)
        for function in functions
    ]
    return [
        {"type": "function", "function": {"name": _text(name), "arguments": _json_object(arguments)}}
        for name, arguments in pairs
    ]


def _json_object(arguments: Any) -> str:
    """The text of a JSON object that any reader of JSON can read."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            pass
    if not isinstance(arguments, Mapping):
        arguments = {} if arguments is None else {"arguments": arguments}
    if nesting(arguments) > MAX_NESTING:
        arguments = {"arguments": _text(arguments)}
    try:
        return encodable(json.dumps(arguments, ensure_ascii=False))
    except Exception:  # keys or values that JSON cannot express, integers of thousands of digits
        return json.dumps({"arguments": encodable(show(arguments))}, ensure_ascii=False)


def _text(value: Any) -> str:
    """Any value as text that UTF-8 can encode; nothing for `None`, and the text parts of a content that has parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list) and value and all(isinstance(part, Mapping) and "type" in part for part in value):
        return "\n".join(_text(part.get("text", f"[{_text(part['type'])}]")) for part in value)
    try:
        return encodable(json.dumps(value, ensure_ascii=False))
    except Exception:  # what JSON cannot express, or nests too deeply
        return encodable(show(value))


def _of_one_type(values: Sequence[Any]) -> list[Any]:
    plain = [value.item() if hasattr(value, "item") and not getattr(value, "ndim", 0) else value for value in values]
    kinds = {type(value) for value in plain if value is not None}
    numbers = kinds <= {int, float} and all(abs(value or 0) < 2**63 for value in plain if isinstance(value, int))
    return plain if kinds == {bool} or numbers else [_text(value) for value in plain]
