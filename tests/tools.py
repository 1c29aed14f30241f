"""What the tests of tools share: ways to make calls, and what every result must be."""

import asyncio

from igpo_trl.rollout import ToolCall, ToolErrorKind

LONG = 30.0  # seconds that no call of a test reaches unless something is stuck


def calls_of(function, values, serials=None, parameter="query"):
    name = getattr(function, "__name__", "tool")
    serials = serials or [None] * len(values)
    return [ToolCall(name, {parameter: v}, function, serial) for v, serial in zip(values, serials, strict=True)]


def entry(arguments, name="search"):
    """A call as a parser leaves it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def texts(results):
    return [result.text for result in results]


def echo(query: str) -> str:
    return f"plain {query}"


async def async_echo(query: str) -> str:
    await asyncio.sleep(0)
    return f"async {query}"


def defined(calls, results, number):
    """Every call has an outcome that can be shown to a policy and counted."""
    assert len(calls) == len(results) == number
    for result in results:
        assert type(result.text) is str
        result.text.encode()
        assert result.error is None or isinstance(result.error, ToolErrorKind)
        assert (result.error is None) or (result.text.startswith("Error: ") and len(result.text) <= 500)
