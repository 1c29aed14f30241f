"""One round of tool calls: which calls run together, and how they run on an event loop."""

import asyncio
import inspect
import logging
import math
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
import anyio.to_thread
import tenacity

from ..tools import ToolOptions, options_of, retry_pause
from .tool_calls import ToolCall, signature_of
from .tool_failures import is_unavailable
from .tool_results import ToolErrorKind, ToolResult, as_text, describe, error_result, show

logger = logging.getLogger(__name__)

FIRST_PAUSE = 0.5  # seconds before the second attempt; doubled before each further attempt
LONGEST_PAUSE = 10.0


class _Outcome(NamedTuple):
    """What a tool returned or raised."""

    value: Any = None
    error: BaseException | None = None


class _Unit(NamedTuple):
    """Indices of calls that take one of the `max_concurrent` places: one batch, or a chain of calls in order."""

    indices: list[int]
    is_batch: bool = False


class Round:
    """
    One round of tool calls. The constructor plans it; [`Round.run`] executes the plan on the event loop.

    Args:
        calls (`Sequence[ToolCall]`): Calls of all rollouts.
        max_concurrent (`int`): Units that run at the same time.
        timeout (`float`, *optional*): Seconds for a call of a tool without a timeout; `None` for no limit.
        running (`set`): The `serial` of every call that has not ended, shared by all rounds of a runner.
        warned (`set`): Tools that a warning was logged for, shared likewise.
    """

    def __init__(
        self,
        calls: Sequence[ToolCall],
        max_concurrent: int,
        timeout: float | None,
        running: set[Hashable],
        warned: set[int],
    ) -> None:
        self.calls = calls
        self.max_concurrent = max_concurrent
        self.timeout = timeout
        self.running = running
        self.warned = warned
        self.results: list[Any] = [call.problem for call in calls]
        self.copies: dict[int, int] = {}  # duplicate call → the call whose result it gets
        self.units: list[_Unit] = []
        self.group: Any = None  # task group; exists while the round runs
        self.cancelled = False
        self.failure: BaseException | None = None

        first_of: dict[Hashable, int] = {}
        shared: dict[Hashable, _Unit] = {}
        for i, call in enumerate(calls):
            if call.problem is not None:
                continue
            options = options_of(_function(call))
            if options.pure:
                try:
                    first = first_of.setdefault((_identity(call.function), _freeze(call.arguments)), i)
                except (TypeError, RecursionError):  # arguments without a hash, or nested too deep to compare
                    first = i
                if first != i:
                    self.copies[i] = first
                    continue
            if call.serial is None and options.batch is None:
                self.units.append(_Unit([i]))
                continue
            key = (call.serial is None, _identity(call.function) if call.serial is None else call.serial)
            if key not in shared:
                shared[key] = _Unit([], is_batch=call.serial is None)
                self.units.append(shared[key])
            shared[key].indices.append(i)

    async def run(self) -> BaseException | None:
        """Fill in `results`. Returns what `ToolRunner.run` must raise: raised here, it would end the event loop."""
        self.places = anyio.Semaphore(self.max_concurrent)
        self.threads = anyio.CapacityLimiter(math.inf)  # `places` is the limit
        self.group = anyio.create_task_group()
        async with self.group:
            if not self.cancelled:
                await self._start(self.units)
        return self.failure

    def cancel(self) -> None:
        """Called on the event loop: cancel the tasks and abandon the threads."""
        self.cancelled = True
        if self.group is not None:
            self.group.cancel_scope.cancel()

    async def _start(self, units: Sequence[_Unit]) -> None:
        for unit in units:
            self.group.start_soon(self._run_unit, unit)
            # An instant call ends here and leaves its thread to the next one: no new thread for each of them.
            await anyio.lowlevel.checkpoint()

    async def _run_unit(self, unit: _Unit) -> None:
        try:
            async with self.places:
                if unit.is_batch:
                    await self._run_batch(unit.indices)
                else:
                    for i in unit.indices:
                        await self._run_one(i)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.failure = self.failure or error
            self.cancel()

    async def _run_one(self, i: int) -> None:
        call = self.calls[i]
        if call.serial is not None and call.serial in self.running:
            # The earlier call timed out and cannot be stopped. `serial` forbids to run two at once.
            text = f"{call.name} cannot run before an earlier call has ended."
            self.results[i] = error_result(ToolErrorKind.TIMEOUT, text)
        else:
            function = _function(call)
            self._settle(i, *await self._invoke(function, call.arguments, options_of(function), call.serial))

    async def _run_batch(self, indices: list[int]) -> None:
        function = _function(self.calls[indices[0]])
        options = options_of(function)
        rows = [{**signature_of(function).defaults, **self.calls[i].arguments} for i in indices]
        if options.batch is not None and rows[0] and all(row.keys() == rows[0].keys() for row in rows):
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            outcome, seconds = await self._invoke(options.batch, columns, options)
            values = outcome.value if outcome is not None else None
            if outcome is None or isinstance(outcome.error, KeyboardInterrupt):
                values = [outcome] * len(indices)
            elif isinstance(values, Sequence) and not isinstance(values, (str, bytes)) and len(values) == len(indices):
                values = [_Outcome(value) for value in values]
            else:
                got = describe(outcome.error) if outcome.error else f"gave {show(values)}"
                expected = f"expected a list of {len(indices)} results. Its calls are run one by one."
                self._warn(function, f"the batch of tool {self.calls[indices[0]].name!r}: {got}, {expected}")
                values = None
            if values is not None:
                for i, value in zip(indices, values, strict=True):
                    self._settle(i, value, seconds)
                return
        await self._start([_Unit([i]) for i in indices])

    async def _invoke(
        self, function: Callable[..., Any], arguments: dict[str, Any], options: ToolOptions, serial: Hashable = None
    ) -> tuple[_Outcome | None, float]:
        """Run a call with its retries. Returns the outcome, `None` after a timeout, and the seconds it took."""

        async def attempt() -> _Outcome:
            if inspect.iscoroutinefunction(function):
                outcome = self._call(function, arguments, None)
            else:
                outcome = await anyio.to_thread.run_sync(
                    self._call, function, arguments, serial, abandon_on_cancel=True, limiter=self.threads
                )
            return await self._finish(outcome.value, serial) if inspect.isawaitable(outcome.value) else outcome

        run: Callable[[], Awaitable[_Outcome]] = attempt
        if options.retry_on:
            retrying = tenacity.AsyncRetrying(
                retry=tenacity.retry_if_result(lambda outcome: isinstance(outcome.error, options.retry_on)),
                stop=tenacity.stop_after_attempt(options.max_attempts),
                wait=lambda state: retry_pause(state.attempt_number, FIRST_PAUSE, LONGEST_PAUSE),
                sleep=anyio.sleep,
                retry_error_callback=lambda state: state.outcome.result(),  # type: ignore[union-attr]
            )
            run = lambda: retrying(attempt)  # noqa: E731
        start = time.perf_counter()
        outcome: _Outcome | None = None
        with anyio.move_on_after(self._limit(options)):
            outcome = await run()
        return outcome, time.perf_counter() - start

    def _limit(self, options: ToolOptions) -> float | None:
        return self.timeout if options.timeout is None else options.timeout

    def _call(self, function: Callable[..., Any], arguments: dict[str, Any], serial: Hashable) -> _Outcome:
        """Call a tool. Its exception is returned as a value, so that it is not mistaken for one of this module."""
        self.running.add(serial)
        try:
            return _Outcome(function(**arguments))
        except BaseException as error:
            return _Outcome(error=error)
        finally:
            self.running.discard(serial)

    async def _finish(self, awaitable: Awaitable[Any], serial: Hashable) -> _Outcome:
        async def finish() -> _Outcome:
            self.running.add(serial)
            try:
                return _Outcome(await awaitable)
            except BaseException as error:
                return _Outcome(error=error)
            finally:
                self.running.discard(serial)

        # A separate task, because one that ignores its cancellation can be abandoned.
        task = asyncio.ensure_future(finish())
        try:
            await asyncio.wait({task})
            return task.result()
        finally:
            task.cancel()

    def _settle(self, i: int, outcome: _Outcome | None, seconds: float) -> None:
        """Store the result of a call."""
        call = self.calls[i]
        function = _function(call)
        if outcome is not None and isinstance(outcome.error, KeyboardInterrupt):
            raise outcome.error
        if outcome is None:
            kind, problem = ToolErrorKind.TIMEOUT, f"gave no result within {self._limit(options_of(function)):g} s."
        elif outcome.error is not None:
            kind, problem = ToolErrorKind.RAISED, f"failed: {describe(outcome.error)}"
        elif (text := as_text(call.name, outcome.value)) is not None:
            self.results[i] = ToolResult(text, None, seconds)
            return
        else:
            kind = ToolErrorKind.NOT_TEXT
            problem = f"returned a value of type {type(outcome.value).__name__}, which is not text."
            advice = "Return a string, a number, a list or a dictionary."
            self._warn(function, f"the tool {call.name!r} {problem} {advice}")
        unavailable = outcome is None or is_unavailable(outcome.error, options_of(function).retry_on)
        self.results[i] = error_result(kind, f"{call.name} {problem}", seconds)._replace(unavailable=unavailable)

    def _warn(self, function: Any, text: str) -> None:
        """Log a warning, once per tool: the tool is at fault, and only the policy reads the observation."""
        key = id(getattr(function, "__func__", function))
        if key not in self.warned:
            self.warned.add(key)
            logger.warning(text)


def _function(call: ToolCall) -> Callable[..., Any]:
    if call.function is None:
        raise ValueError(f"got {call}: a call without `problem` needs a `function`.")
    return call.function


def _identity(function: Any) -> tuple[int, int]:
    """Equal for the same function, and for the same method of the same object."""
    return id(getattr(function, "__self__", None)), id(getattr(function, "__func__", function))


def _freeze(value: Any) -> Hashable:
    """Equal for arguments that are equal in value and type (`1`, `1.0` and `True` are not)."""
    if isinstance(value, dict):
        return dict, frozenset((_freeze(key), _freeze(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_freeze, value))
    hash(value)
    return type(value), value
