"""How a tool wants to be run: options that its author attaches to the function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class ToolOptions:
    """
    How a tool wants to be run; attached to a function by [`tool`], which describes the fields.

    Raises:
        ValueError: `max_attempts` or `timeout` is not positive.
        TypeError: `batch` cannot be called, or `retry_on` holds something that is not an exception class.
    """

    pure: bool = False
    batch: Callable[..., Sequence[Any]] | None = None
    retry_on: tuple[type[Exception], ...] = ()
    max_attempts: int = 3
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"got max_attempts={self.max_attempts}, expected at least 1 (1: no retry).")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"got timeout={self.timeout}, expected seconds above 0, or None for the runner's own.")
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
) -> Callable[[F], F]: ...
def tool(
    function: F | None = None,
    *,
    pure: bool = False,
    batch: Callable[..., Any] | None = None,
    retry_on: type[Exception] | tuple[type[Exception], ...] = (),
    max_attempts: int = 3,
    timeout: float | None = None,
) -> F | Callable[[F], F]:
    """
    Say how a tool is to be run; with or without arguments.

    The function itself is returned, with an attribute `tool_options`: chat templates take plain functions only, and
    anyone may call it as before. Synchronous and asynchronous functions and methods of environments all work.

    Args:
        pure (`bool`, *optional*, defaults to `False`): Equal arguments give equal results and nothing else happens:
            equal calls of one round are run once.
        batch (`Callable`, *optional*): Answers all calls of a round at once. It takes the tool's parameters, each a
            list with one value per call (defaults filled in), and returns one result per call, in order. May be
            asynchronous. Not used for methods of environments, whose calls run in order.
        retry_on (exception class or `tuple` of them, *optional*):
            Transient errors, after which the call is tried again, each time after a longer pause.
        max_attempts (`int`, *optional*, defaults to `3`): Attempts in all, the first included. Only with `retry_on`.
        timeout (`float`, *optional*): Seconds that one call may take, its retries included; `None` for the runner's
            own limit.

    Example:

    ```python
    >>> @tool(pure=True, retry_on=ConnectionError, timeout=10)
    ... def search(query: str) -> str: ...
    ```
    """
    kinds = (retry_on,) if isinstance(retry_on, type) else tuple(retry_on)
    options = ToolOptions(pure=pure, batch=batch, retry_on=kinds, max_attempts=max_attempts, timeout=timeout)

    def attach(function: F) -> F:
        function.tool_options = options  # type: ignore[attr-defined]
        return function

    return attach if function is None else attach(function)


def options_of(function: Callable[..., Any]) -> ToolOptions:
    """The options attached to a tool (for a method, to its function), or those that mean nothing special."""
    options = getattr(function, "tool_options", None)
    return options if isinstance(options, ToolOptions) else ToolOptions()
