"""Runs the tool calls of all rollouts together."""

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from .tool_calls import ToolCall
from .tool_results import ToolResult
from .tool_rounds import Round


class ToolRunner:
    """
    Runs the tool calls of all rollouts of one round together.

    Plain functions run in threads, asynchronous ones on an event loop in a daemon thread. An asynchronous tool must
    not block: while it computes, everything on the loop waits, its own timeout included. A plain function that times
    out cannot be stopped. Its thread is abandoned, and does not keep the interpreter from exiting.

    Args:
        max_concurrent (`int`, *optional*, defaults to `64`): Calls that run at the same time; a batch counts as one.
            Use 1 for tools that are not thread-safe.
        timeout (`float`, *optional*, defaults to `60.0`): Seconds that a call may take unless its [`ToolOptions`] set
            another limit; `None` for no limit.
        loop (`asyncio.AbstractEventLoop`, *optional*): An event loop that runs in another thread. Without it, the
            runner starts one at the first call.

    Raises:
        ValueError: `max_concurrent` or `timeout` is not positive.
    """

    def __init__(
        self,
        *,
        max_concurrent: int = 64,
        timeout: float | None = 60.0,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if max_concurrent < 1:
            raise ValueError(f"got max_concurrent={max_concurrent}, expected at least 1.")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"got timeout={timeout}, expected seconds above 0, or None for no limit.")
        self.max_concurrent = max_concurrent
        self.timeout = timeout
        self._loop = loop
        self._thread: threading.Thread | None = None
        self._finalizer: Callable[[], Any] | None = None
        self._running: set[Hashable] = set()  # the `serial` of every call that has not ended
        self._warned: set[int] = set()

    def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """
        Run all calls of a round.

        A returned string is the result. A list of text blocks is joined. Any other value is converted to text,
        containers to JSON; one without a text, such as bytes, is an error for the policy to read.

        Args:
            calls (`Sequence[ToolCall]`): Calls of any number of rollouts. Those with a `problem` do not run.

        Returns:
            `list[ToolResult]`: One result per call, in order.

        Raises:
            ValueError: A tool returned an image, audio or video.
            KeyboardInterrupt: Raised here or in a tool. The runner can be used again.
            RuntimeError: The method was called on the event loop itself, or the loop has stopped.
        """
        round_ = Round(calls, self.max_concurrent, self.timeout, self._running, self._warned)
        if round_.units:
            loop = self._start()
            try:
                future = asyncio.run_coroutine_threadsafe(round_.run(), loop)
                while not future.done():
                    concurrent.futures.wait([future], timeout=1.0)
                    if not future.done() and not (self._thread.is_alive() if self._thread else loop.is_running()):
                        raise RuntimeError("the event loop that runs the tools has stopped.")
                failure = future.result()
            except BaseException:
                # Not through the future, because an interrupt may come before it is assigned.
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(round_.cancel)
                raise
            if failure is not None:
                raise failure
        for i, first in round_.copies.items():
            round_.results[i] = round_.results[first]
        return round_.results

    def close(self) -> None:
        """Stop the runner's own event loop, if it has one; a later call starts a new one."""
        if self._finalizer is not None:
            self._finalizer()
            self._loop = self._thread = self._finalizer = None

    def _start(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_serve, args=(self._loop,), name="igpo-tools", daemon=True)
            self._thread.start()
            # Also runs when the runner is garbage-collected and when the interpreter exits.
            self._finalizer = weakref.finalize(self, _stop, self._loop, self._thread)
        try:
            inside = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            inside = False
        if inside:
            raise RuntimeError("`ToolRunner.run` blocks and cannot be called on the event loop that runs the tools.")
        return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, then cancel its tasks and close it."""
    asyncio.set_event_loop(loop)
    while True:
        try:
            loop.run_forever()
            break
        except (KeyboardInterrupt, SystemExit):
            continue  # raised in a task that a tool started; the tool that awaits the task sees it
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():  # garbage collection may run on any thread
        thread.join(timeout=2.0)
