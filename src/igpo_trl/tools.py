"""Options of a tool, attached to its function by the decorator [`tool`]."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

F = TypeVar("F", bound=Callable[..., Any])

#: The jitter of retries. tenacity's draws from the global generator, and a retry must not change the random numbers of
#: a run; from the system, so that forked processes do not wait in step.
JITTER = random.SystemRandom()


@dataclass(frozen=True)
class ToolOptions:
    """
    How to run a tool. [`tool`] attaches the options to a function and describes the fields.

    Raises:
        ValueError: `max_attempts` or `timeout` is not positive.
        TypeError: `batch` cannot be called, or `retry_on` contains something that is not an exception class.
    """

    pure: bool = False
    batch: Callable[..., Sequence[Any]] | None = None
    retry_on: tuple[type[Exception], ...] = ()
    max_attempts: int = 3
    timeout: float | None = None
    max_words: int | None = None

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"got max_attempts={self.max_attempts}, expected at least 1 (1: no retry).")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"got timeout={self.timeout}, expected seconds above 0, or None for the runner's limit.")
        if self.batch is not None and not callable(self.batch):
            raise TypeError(f"got batch={self.batch!r}, expected a function that takes lists.")
        for kind in self.retry_on:
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise TypeError(f"got {kind!r} in retry_on, expected exception classes such as `ConnectionError`.")


@overload
def tool(function: F) -> F: ...
@overload
def tool(
    *,
    pure: bool = False,
    batch: Callable[..., Any] | None = None,
    retry_on: type[Exception] | tuple[type[Exception], ...] = (),
    max_attempts: int = 3,
    timeout: float | None = None,
    max_words: int | None = None,
) -> Callable[[F], F]: ...
def tool(
    function: F | None = None,
    *,
    pure: bool = False,
    batch: Callable[..., Any] | None = None,
    retry_on: type[Exception] | tuple[type[Exception], ...] = (),
    max_attempts: int = 3,
    timeout: float | None = None,
    max_words: int | None = None,
) -> F | Callable[[F], F]:
    """
    Declare how to run a tool. Works with and without arguments.

    Returns the same function with an attribute `tool_options`, so that chat templates and callers can use it as
    before. Works for synchronous and asynchronous functions and for methods of environments.

    Args:
        pure (`bool`, *optional*, defaults to `False`): The result depends only on the arguments, and there are no side
            effects. Equal calls of a round run once.
        batch (`Callable`, *optional*): A function that answers all calls of a round at once. It takes each of the
            tool's parameters as a list with one value per call, defaults filled in, and returns one result per call,
            in order. It may be asynchronous. Not used for methods of environments, whose calls run in order.
        retry_on (exception class or `tuple` of them, *optional*):
            Transient errors. The call is tried again after each, with growing pauses.
        max_attempts (`int`, *optional*, defaults to `3`): Total number of attempts. Only used with `retry_on`.
        timeout (`float`, *optional*): Seconds that one call may take, retries included; `None` for the runner's limit.
        max_words (`int`, *optional*): Words of its longest usual result. The trainer warns before training if rollouts
            with such results do not fit into their limits.

    Example:

    ```python
    >>> @tool(pure=True, retry_on=ConnectionError, timeout=10)
    ... def search(query: str) -> str: ...
    ```
    """
    kinds = (retry_on,) if isinstance(retry_on, type) else tuple(retry_on)
    options = ToolOptions(pure, batch, kinds, max_attempts, timeout, max_words)

    def attach(function: F) -> F:
        function.tool_options = options  # type: ignore[attr-defined]
        return function

    return attach if function is None else attach(function)


def final_answer(answer: str) -> str:
    """
    Gives the final answer and ends the search.

    Args:
        answer: A name, a number or a few words, without an explanation.
    """
    return answer


def make_stop_tools(names: Sequence[str] | None) -> list[Callable[..., Any]]:
    """
    The tools that a run with a search tool needs besides, if these are its `stop_tools`.

    Raises:
        ValueError: One is neither `search` nor [`final_answer`].
    """
    if unknown := set(names or ()) - {"search", final_answer.__name__}:
        raise ValueError(
            f"`stop_tools` names {', '.join(sorted(unknown))}, expected final_answer. To end rollouts with a tool of "
            "your own, pass it to `IGPOTrainer(tools=[...])` in Python."
        )
    return [final_answer] if final_answer.__name__ in (names or ()) else []


def options_of(function: Callable[..., Any]) -> ToolOptions:
    """The options attached to a tool (for a method, to its function), or else the defaults."""
    options = getattr(function, "tool_options", None)
    return options if isinstance(options, ToolOptions) else ToolOptions()


def retry_pause(attempt: int, first: float, longest: float) -> float:
    """Seconds to wait after a failed attempt (1, 2, …): doubled each time up to `longest`, with a jitter of ±50 %."""
    return min(first * 2 ** (attempt - 1), longest) * JITTER.uniform(0.5, 1.5)
