"""One round of tool calls: what is run together, and the running of it on an event loop."""

import asyncio
import functools
import inspect
import logging
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import tenacity

from ..tools import ToolOptions, options_of
from .tool_calls import ToolCall, signature_of
from .tool_results import ToolErrorKind, ToolResult, as_text, describe, error_result, show

logger = logging.getLogger(__name__)

FIRST_PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
LONGEST_PAUSE = 10.0
# Calls that take microseconds would spend most of their time on the way to a thread and back: they share the way.
SHARED_TRIP = 1e-3  # seconds after which a thread takes no further call before it returns


class _Outcome(NamedTuple):
    """What a tool returned or raised."""

    value: Any = None
    error: BaseException | None = None


class _Unit(NamedTuple):
    """Calls, by index, that one worker runs: a batch, or a chain in order."""

    indices: list[int]
    batch: bool = False


class Round:
    """One round: the plan, made at once, and its execution on the event loop."""

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
        self.copies: dict[int, int] = {}  # calls that take the result of another
        self.plain: deque[int] = deque()  # calls of plain functions about which nothing is special
        self.units: deque[_Unit] = deque()
        self.workers = 0
        self.group: Any = None  # of tasks; exists while the round runs
        self.cancelled = False
        self.failure: BaseException | None = None

        first_of: dict[Hashable, int] = {}
        groups: dict[Hashable, _Unit] = {}
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
                self._queue(i)
                continue
            key = (call.serial is None, _identity(call.function) if call.serial is None else call.serial)
            if key not in groups:
                groups[key] = _Unit([], batch=call.serial is None)
                self.units.append(groups[key])
            groups[key].indices.append(i)

    def _queue(self, i: int) -> None:
        function = _function(self.calls[i])
        options = options_of(function)
        if options.retry_on or options.timeout is not None or inspect.iscoroutinefunction(function):
            self.units.append(_Unit([i]))
        else:
            self.plain.append(i)

    async def run(self) -> BaseException | None:
        """Fill in the results. What `ToolRunner.run` has to raise is returned: raised here, it would end the loop."""
        self.threads = anyio.CapacityLimiter(math.inf)  # the number of workers is the limit
        self.group = anyio.create_task_group()
        try:
            async with self.group:
                if self.cancelled:
                    return None
                self._hire(len(self.units))
                number = 2
                while self.plain and self.workers < self.max_concurrent:
                    self._hire(number)
                    await anyio.sleep(SHARED_TRIP)  # instant calls are done by now, and a thread each saved
                    number *= 4
        finally:
            self.plain.clear()  # for the threads
        return self.failure

    def cancel(self) -> None:
        """On the loop: stop what can be stopped, leave the rest behind."""
        self.cancelled = True
        if self.group is not None:
            self.group.cancel_scope.cancel()

    def _hire(self, number: int) -> None:
        for _ in range(min(number, self.max_concurrent - self.workers)):
            self.workers += 1
            self.group.start_soon(self._work)

    async def _work(self) -> None:
        try:
            while self.units or self.plain:
                if not self.units:
                    await self._run_plain()
                    continue
                indices, batch = self.units.popleft()
                if batch:
                    await self._run_batch(indices)
                else:
                    for i in indices:
                        await self._run_one(i)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.failure = self.failure or error
            self.cancel()
        finally:
            self.workers -= 1

    # Ways to run a call

    async def _run_plain(self) -> None:
        """One trip to a thread with one plain call, or with several if they are instant."""
        begun: list[int] = []
        done: list[tuple[int, _Outcome, float]] = []
        with anyio.move_on_after(self.timeout):
            await self._in_thread(self._run_some, begun, done, min(SHARED_TRIP, (self.timeout or 1.0) / 10))
        for i in begun[len(done) :]:
            self._settle(i, None, self.timeout or 0.0)
        for i, outcome, seconds in done:
            if inspect.isawaitable(outcome.value):  # a plain function may hand on what an asynchronous one gave it
                finish = functools.partial(self._finish, outcome.value, None)
                self._settle(i, *await self._in_time(self.timeout, finish))
            else:
                self._settle(i, outcome, seconds)

    def _run_some(self, begun: list[int], done: list[tuple[int, _Outcome, float]], trip: float) -> None:
        # In a thread that may be left behind. It takes no further call then, for a trip is shorter than the limit.
        start = now = time.perf_counter()
        while now - start < trip:
            try:
                i = self.plain.popleft()
            except IndexError:
                return
            begun.append(i)
            outcome = self._call(_function(self.calls[i]), self.calls[i].arguments, None)
            done.append((i, outcome, time.perf_counter() - now))
            now = time.perf_counter()

    async def _run_one(self, i: int) -> None:
        call = self.calls[i]
        if call.serial is not None and call.serial in self.running:
            # It ran out of time and could not be stopped; two at once is what `serial` forbids.
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
        for i in indices:
            self._queue(i)
        self._hire(len(indices))

    async def _invoke(
        self, function: Callable[..., Any], arguments: dict[str, Any], options: ToolOptions, serial: Hashable = None
    ) -> tuple[_Outcome | None, float]:
        """Run a call with its retries; the outcome is `None` if it ran out of time. Also the seconds it took."""

        async def attempt() -> _Outcome:
            if inspect.iscoroutinefunction(function):
                outcome = self._call(function, arguments, None)
            else:
                outcome = await self._in_thread(self._call, function, arguments, serial)
            return await self._finish(outcome.value, serial) if inspect.isawaitable(outcome.value) else outcome

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_result(lambda outcome: isinstance(outcome.error, options.retry_on)),
            stop=tenacity.stop_after_attempt(options.max_attempts),
            wait=_pause,
            sleep=anyio.sleep,
            retry_error_callback=lambda state: state.outcome.result(),  # type: ignore[union-attr]
        )
        return await self._in_time(self._limit(options), (lambda: retrying(attempt)) if options.retry_on else attempt)

    def _limit(self, options: ToolOptions) -> float | None:
        return self.timeout if options.timeout is None else options.timeout

    async def _in_time(
        self, limit: float | None, attempt: Callable[[], Awaitable[_Outcome]]
    ) -> tuple[_Outcome | None, float]:
        start = time.perf_counter()
        outcome: _Outcome | None = None
        with anyio.move_on_after(limit):
            outcome = await attempt()
        return outcome, time.perf_counter() - start

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await anyio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True, limiter=self.threads)

    def _call(self, function: Callable[..., Any], arguments: dict[str, Any], serial: Hashable) -> _Outcome:
        """Call a tool; what it raises comes back as a value, lest it be taken for something of ours."""
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

        # In a task of its own: one that ignores its cancellation can be left behind.
        task = asyncio.ensure_future(finish())
        try:
            await asyncio.wait({task})
            return task.result()
        finally:
            task.cancel()

    def _settle(self, i: int, outcome: _Outcome | None, seconds: float) -> None:
        """Write down what became of a call."""
        call = self.calls[i]
        function = _function(call)
        if outcome is not None and isinstance(outcome.error, KeyboardInterrupt):
            raise outcome.error
        if outcome is None:
            kind, problem = ToolErrorKind.TIMEOUT, f"gave no result within {self._limit(options_of(function)):g} s."
        elif outcome.error is not None:
            kind, problem = ToolErrorKind.RAISED, f"failed: {describe(outcome.error)}"
        elif (text := as_text(call.name, outcome.value, signature_of(function).returns)) is not None:
            self.results[i] = ToolResult(text, None, seconds)
            return
        else:
            kind = ToolErrorKind.NOT_TEXT
            problem = f"returned a value of type {type(outcome.value).__name__}, which is not text."
            advice = "Return a string, or declare what it returns (`-> dict`)."
            self._warn(function, f"the tool {call.name!r} {problem} {advice}")
        self.results[i] = error_result(kind, f"{call.name} {problem}", seconds)

    def _warn(self, function: Any, text: str) -> None:
        """Once per tool: only the policy reads the observation, and the tool is at fault."""
        key = id(getattr(function, "__func__", function))
        if key not in self.warned:
            self.warned.add(key)
            logger.warning(text)


def _function(call: ToolCall) -> Callable[..., Any]:
    if call.function is None:
        raise ValueError(f"got {call}: a call without `problem` needs a `function`.")
    return call.function


def _identity(function: Any) -> tuple[int, int]:
    """The same for the same function, and for the same method of the same object."""
    return id(getattr(function, "__self__", None)), id(getattr(function, "__func__", function))


def _freeze(value: Any) -> Hashable:
    """Equal for arguments that are equal in value and type (`1`, `1.0` and `True` are not)."""
    if isinstance(value, dict):
        return dict, frozenset((_freeze(key), _freeze(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_freeze, value))
    hash(value)
    return type(value), value


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt: exponential, with jitter."""
    return min(FIRST_PAUSE * 2 ** (state.attempt_number - 1), LONGEST_PAUSE) * _random.uniform(0.5, 1.5)


_random = random.Random()  # of its own: a retry must not change the random numbers of a training run
