"""Tool calls of a round: real threads, a real event loop, and tools that do everything a tool should not."""

import asyncio
import datetime
import enum
import functools
import gc
import inspect
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from fractions import Fraction
from typing import Annotated, Any, TypedDict

import numpy as np
import pytest
from tools import LONG, async_echo, calls_of, defined, echo, entry, texts
from transformers.utils import get_json_schema

from igpo_trl.rollout import ToolCall, ToolErrorKind, ToolResult, ToolRunner, read_calls
from igpo_trl.rollout import tool_rounds as rounds
from igpo_trl.tools import ToolOptions, retry_pause, tool


@pytest.fixture
def runner():
    runner = ToolRunner(timeout=LONG)
    yield runner
    runner.close()


# Order and concurrency


def test_results_come_in_the_order_of_the_calls_whatever_runs_them(runner):
    class Environment:
        def step(self, query: str) -> str:
            return f"step {query}"

    @tool(batch=lambda query: [f"batch {one}" for one in query])
    def batched(query: str) -> str: ...

    problem = ToolResult("Error: no.", ToolErrorKind.MALFORMED)
    environment = Environment()
    calls = [
        *calls_of(async_echo, ["0"]),
        *calls_of(batched, ["1"]),
        *calls_of(echo, ["2"]),
        *calls_of(environment.step, ["3"], [7]),
        ToolCall("gone", {}, None, problem=problem),
        *calls_of(batched, ["5"]),
        *calls_of(environment.step, ["6"], [7]),
        *calls_of(echo, ["7"]),
        *calls_of(async_echo, ["8"]),
    ]
    results = runner.run(calls)
    assert texts(results) == [
        "async 0", "batch 1", "plain 2", "step 3", "Error: no.", "batch 5", "step 6", "plain 7", "async 8",
    ]  # fmt: skip
    assert results[4] is problem  # what is wrong is not run, and has no latency
    assert all(r.error is None and 0 <= r.seconds < LONG for r in results if r is not problem)
    assert runner.run([]) == []
    assert runner.run([calls[4]]) == [problem]


def test_plain_functions_run_at_the_same_time(runner):
    barrier = threading.Barrier(24)  # passed only by 24 at once

    def meet(query: int) -> str:
        barrier.wait(LONG)
        return str(query)

    assert texts(runner.run(calls_of(meet, range(24)))) == [str(i) for i in range(24)]


def test_asynchronous_and_plain_tools_run_at_the_same_time(runner):
    barrier = threading.Barrier(2)

    def plain(query: int) -> str:
        barrier.wait(LONG)
        return "met"

    async def asynchronous(query: int) -> str:
        await asyncio.to_thread(barrier.wait, LONG)
        return "met"

    assert texts(runner.run(calls_of(plain, [1]) + calls_of(asynchronous, [2]))) == ["met", "met"]


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_calls_run_at_a_time_than_allowed(limit):
    running, most, lock = 0, 0, threading.Lock()

    def enter(change):
        nonlocal running, most
        with lock:
            running += change
            most = max(most, running)

    def plain(query: int) -> str:
        enter(1)
        time.sleep(0.002 * (query % 2))  # some instant, some not
        enter(-1)
        return "done"

    async def asynchronous(query: int) -> str:
        enter(1)
        await asyncio.sleep(0.002)
        enter(-1)
        return "done"

    def many(query):
        return [plain(query[0])] * len(query)

    batched = tool(batch=many)(lambda query: "")
    methods = calls_of(tool(timeout=LONG)(lambda query: plain(query)), range(6), [0, 1, 2] * 2)
    calls = [*calls_of(plain, range(20)), *calls_of(asynchronous, range(10)), *calls_of(batched, [1, 2]), *methods]
    random.shuffle(calls)
    runner = ToolRunner(max_concurrent=limit, timeout=LONG)
    assert texts(runner.run(calls)) == ["done"] * len(calls)
    assert most == limit
    runner.close()


def test_calls_of_one_environment_run_in_order_and_those_of_several_at_the_same_time(runner):
    barrier = threading.Barrier(3)

    class Environment:
        def __init__(self):
            self.seen = []

        def plain(self, query: int) -> str:
            if query == 0:
                barrier.wait(LONG)
            self.seen.append(query)
            return "done"

        async def asynchronous(self, query: int) -> str:
            await asyncio.sleep(0.001 * (5 - query))
            self.seen.append(query)
            return "done"

    environments = [Environment() for _ in range(3)]
    calls = []
    for step in range(5):
        for i, environment in enumerate(environments):
            calls += calls_of(environment.asynchronous if step % 2 else environment.plain, [step], [i])
    assert {result.text for result in runner.run(calls)} == {"done"}
    assert [environment.seen for environment in environments] == [[0, 1, 2, 3, 4]] * 3


def test_instant_calls_share_a_few_threads(runner):
    numbers = []
    for _ in range(5):
        threads = set()

        def instant(query: int, threads=threads) -> str:
            threads.add(threading.get_ident())
            return "done"

        assert texts(runner.run(calls_of(instant, range(128)))) == ["done"] * 128
        numbers.append(len(threads))
    assert min(numbers) < 32  # about 10; a new thread for each call makes 64


# Batches


def test_a_batch_is_one_call_with_defaults_filled_in(runner):
    seen = []

    def many(query, k, note):
        seen.append((query, k, note))
        return tuple(f"{q}:{n}" for q, n in zip(query, k, strict=True))

    @tool(batch=many)
    def search(query: str, k: int = 3, *, note: str = "x") -> str: ...

    calls = [ToolCall("search", a, search) for a in ({"query": "a"}, {"query": "b", "k": 5}, {"query": "a"})]
    results = runner.run(calls)
    assert texts(results) == ["a:3", "b:5", "a:3"]
    assert seen == [(["a", "b", "a"], [3, 5, 3], ["x", "x", "x"])]
    assert len({result.seconds for result in results}) == 1  # the latency of the batch


def test_a_batch_may_be_asynchronous_and_its_results_are_judged_one_by_one(runner):
    async def many(query):
        await asyncio.sleep(0)
        return ["fine", b"", {"a": 1}]

    results = runner.run(calls_of(tool(batch=many)(async_echo), ["1", "2", "3"]))
    assert [result.error for result in results] == [None, ToolErrorKind.NOT_TEXT, None]
    del async_echo.tool_options


def test_each_tool_has_a_batch_of_its_own(runner):
    sizes = Counter()

    def make(name):
        def many(query):
            sizes[name] += len(query)
            return [name] * len(query)

        return tool(batch=many)(lambda query: "")

    one, two = make("one"), make("two")
    calls = calls_of(one, "ab") + calls_of(two, "abc") + calls_of(one, "c")
    assert texts(runner.run(calls)) == ["one", "one", "two", "two", "two", "one"]
    assert sizes == {"one": 3, "two": 3}


@pytest.mark.parametrize("wrong", [ValueError("bad query"), ["only one"], "abc", None, {"a": 1, "b": 2, "c": 3}, 7])
def test_a_failed_batch_runs_its_calls_one_by_one(runner, wrong, caplog):
    def many(query):
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    @tool(batch=many)
    def search(query: str) -> str:
        if query == "bad":
            raise ValueError("bad query")
        return f"found {query}"

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            results = runner.run(calls_of(search, ["a", "bad", "c"]))
            assert texts(results) == ["found a", "Error: search failed: ValueError: bad query", "found c"]
            assert [r.error for r in results] == [None, ToolErrorKind.RAISED, None]
    (record,) = caplog.records  # once per tool
    assert "batch of tool 'search'" in record.message and "expected a list of 3 results" in record.message


def test_the_calls_of_a_failed_batch_run_at_the_same_time(runner):
    barrier = threading.Barrier(8)

    @tool(batch=lambda query: [])
    def meet(query: int) -> str:
        barrier.wait(LONG)
        return "met"

    assert texts(runner.run(calls_of(meet, range(8)))) == ["met"] * 8


def test_methods_of_environments_are_not_batched(runner):
    class Environment:
        @tool(batch=lambda query: ["batch"] * len(query))
        def step(self, query: str) -> str:
            return "alone"

    assert texts(runner.run(calls_of(Environment().step, "ab", [0, 0]))) == ["alone", "alone"]


# Pure tools


def counted(**options):
    seen = Counter()

    def look(query) -> str:
        seen[repr(query)] += 1
        return f"{query!r} at {sum(seen.values())}"

    return tool(**options)(look), seen


def test_equal_calls_of_a_pure_tool_run_once(runner):
    look, seen = counted(pure=True)
    values = ["a", "b", "a", {"x": [1], "y": 2}, {"y": 2, "x": [1]}, "a"]
    results = runner.run(calls_of(look, values))
    assert results[0] == results[2] == results[5]  # the latency too
    assert results[3] == results[4]
    assert sum(seen.values()) == 3
    runner.run(calls_of(look, ["a"]))
    assert seen["'a'"] == 2  # once a round, not once for ever


def test_equal_is_equal_in_type_as_well(runner):
    look, seen = counted(pure=True)
    runner.run(calls_of(look, [1, 1.0, True, "1", [1], (1,), [True]]))
    assert set(seen.values()) == {1} and len(seen) == 7


def test_a_tool_not_declared_pure_runs_every_time(runner):
    look, seen = counted()
    runner.run(calls_of(look, ["a", "a"]))
    assert seen == {"'a'": 2}


def test_arguments_that_cannot_be_compared_are_run_each(runner):
    look, seen = counted(pure=True)
    nested = []
    for _ in range(5000):
        nested = [nested]
    cyclic = []
    cyclic.append(cyclic)
    for value in (bytearray(b"x"), cyclic):
        seen.clear()
        runner.run(calls_of(look, [value, value]))
        assert sum(seen.values()) == 2
    assert [r.error for r in runner.run(calls_of(look, [nested]))] == [ToolErrorKind.RAISED]  # its `repr` recurses


def test_equal_calls_are_left_out_of_a_batch_and_shared_with_no_other_object(runner):
    batches = []

    def many(query):
        batches.append(query)
        return [f"found {one}" for one in query]

    search = tool(pure=True, batch=many)(lambda query: "")
    assert texts(runner.run(calls_of(search, "abab"))) == ["found a", "found b"] * 2
    assert batches == [["a", "b"]]

    class Environment:
        def __init__(self, name):
            self.name = name

        @tool(pure=True)
        def look(self, query: str) -> str:
            return self.name

    one, two = Environment("one"), Environment("two")
    calls = calls_of(one.look, "a", [1]) + calls_of(two.look, "a", [2]) + calls_of(one.look, "a", [1])
    assert texts(runner.run(calls)) == ["one", "two", "one"]


# Time


def hang_plain(release):
    def hang(query: Any) -> str:
        release.wait(LONG)
        return "late"

    return hang


def hang_async(release):
    async def hang(query: Any) -> str:
        await asyncio.sleep(LONG)
        return "late"

    return hang


def hang_stubborn(release):
    async def hang(query: Any) -> str:
        while not release.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                pass
        return "late"

    return hang


def hang_handed_on(release):
    return functools.partial(hang_async(release))


@pytest.fixture
def release():
    """Lets hung calls go at the end of a test."""
    event = threading.Event()
    yield event
    event.set()


HANGING = [hang_plain, hang_async, hang_stubborn, hang_handed_on]


@pytest.mark.parametrize("make", HANGING)
@pytest.mark.parametrize("own", [False, True])
def test_a_call_that_runs_out_of_time_is_an_error_and_frees_its_place(make, own, release):
    hang = make(release)
    runner = ToolRunner(max_concurrent=1, timeout=LONG if own else 0.2)
    if own:
        hang = tool(timeout=0.2)(hang)
    start = time.perf_counter()
    late, after = runner.run(calls_of(hang, ["x"]) + calls_of(echo, ["y"]))
    assert time.perf_counter() - start < LONG / 2
    assert late.error is ToolErrorKind.TIMEOUT
    assert late.text == f"Error: {getattr(hang, '__name__', 'tool')} gave no result within 0.2 s."
    assert 0.19 < late.seconds < LONG / 2
    assert after[:2] == ("plain y", None)
    release.set()
    runner.close()


@pytest.mark.parametrize("make", [hang_plain, hang_async])
def test_a_batch_that_runs_out_of_time_is_an_error_of_each_of_its_calls(runner, make, release):
    search = tool(batch=make(release), timeout=0.2)(echo)
    results = runner.run(calls_of(search, "ab"))
    del echo.tool_options
    assert [r.error for r in results] == [ToolErrorKind.TIMEOUT] * 2


@pytest.mark.parametrize("sleep", [time.sleep, asyncio.sleep])
def test_waiting_for_a_place_is_not_counted(sleep):
    def plain(query: int) -> str:
        time.sleep(0.1)
        return "done"

    async def asynchronous(query: int) -> str:
        await asyncio.sleep(0.1)
        return "done"

    runner = ToolRunner(max_concurrent=1, timeout=1.0)
    function = plain if sleep is time.sleep else asynchronous
    results = runner.run(calls_of(function, range(14)))  # the last one begins after 1.3 s
    assert texts(results) == ["done"] * 14
    assert all(0.09 < result.seconds < 1.0 for result in results)
    runner.close()


def test_no_timeout(release):
    runner = ToolRunner(timeout=None)
    assert texts(runner.run(calls_of(echo, "a") + calls_of(async_echo, "b"))) == ["plain a", "async b"]
    runner.close()


def test_an_environment_whose_call_has_not_ended_runs_no_other(release):
    log = []

    class Environment:
        def step(self, query: str) -> str:
            log.append(query)
            if query == "hang":
                release.wait(LONG)
            log.append(f"end of {query}")
            return "done"

    one, two = Environment(), Environment()
    runner = ToolRunner(timeout=0.3)
    results = runner.run(calls_of(one.step, ["hang", "next"], [1, 1]) + calls_of(two.step, ["other"], [2]))
    assert [r.error for r in results] == [ToolErrorKind.TIMEOUT, ToolErrorKind.TIMEOUT, None]
    assert results[1].text == "Error: step cannot run before an earlier call has ended."
    assert results[1].seconds is None
    assert runner.run(calls_of(one.step, ["again"], [1]))[0].error is ToolErrorKind.TIMEOUT
    assert "next" not in log and "again" not in log
    release.set()
    for _ in range(200):
        if (result := runner.run(calls_of(one.step, ["free"], [1]))[0]).error is None:
            break
        time.sleep(0.05)
    assert result.text == "done"
    assert log.index("end of hang") < log.index("free")
    runner.close()


@pytest.mark.parametrize("close", ["", "runner.close()", "del runner"])
def test_a_hung_thread_does_not_keep_the_interpreter(close):
    code = f"""
import asyncio, time
from igpo_trl.rollout import ToolCall, ToolRunner
async def stubborn():
    while True:
        try: await asyncio.sleep(60)
        except asyncio.CancelledError: pass
runner = ToolRunner(timeout=0.2)
calls = [ToolCall("hang", {{}}, lambda: time.sleep(600)) for _ in range(8)]
print(*{{r.error for r in runner.run(calls + [ToolCall("stubborn", {{}}, stubborn)])}})
{close}
"""
    process = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout) == (0, "timeout\n"), process.stderr
    assert "Traceback" not in process.stderr


# Retries


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(rounds, "FIRST_PAUSE", 0.001)


def flaky(failures, error, asynchronous=False):
    attempts = []

    def plain(query: str) -> str:
        attempts.append(query)
        if len(attempts) <= failures:
            raise error
        return "done"

    async def wrapped(query: str) -> str:
        return plain(query)

    return (wrapped if asynchronous else plain), attempts


@pytest.mark.parametrize("asynchronous", [False, True])
def test_transient_errors_are_tried_again(runner, no_pause, asynchronous):
    function, attempts = flaky(2, ConnectionResetError("reset"), asynchronous)
    state = random.getstate()
    (result,) = runner.run(calls_of(tool(retry_on=ConnectionError)(function), "a"))
    assert (result.text, result.error, len(attempts)) == ("done", None, 3)
    assert random.getstate() == state  # the pauses are random, and change nobody's random numbers


@pytest.mark.parametrize("asynchronous", [False, True])
def test_attempts_end(runner, no_pause, asynchronous):
    function, attempts = flaky(9, ConnectionError("down"), asynchronous)
    (result,) = runner.run(calls_of(tool(retry_on=(ConnectionError,), max_attempts=4)(function), "a"))
    assert result.error is ToolErrorKind.RAISED
    assert result.text.endswith("failed: ConnectionError: down")
    assert len(attempts) == 4


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(1), asyncio.CancelledError()])
def test_other_errors_are_not_tried_again(runner, no_pause, error):
    function, attempts = flaky(9, error)
    (result,) = runner.run(calls_of(tool(retry_on=(ConnectionError, OSError))(function), "a"))
    assert (result.error, len(attempts)) == (ToolErrorKind.RAISED, 1)


def test_a_batch_is_tried_again(runner, no_pause):
    attempts = []

    def many(query):
        attempts.append(query)
        if len(attempts) < 3:
            raise TimeoutError("slow")
        return query

    assert texts(runner.run(calls_of(tool(batch=many, retry_on=TimeoutError)(lambda query: ""), "ab"))) == ["a", "b"]
    assert len(attempts) == 3


def test_the_timeout_holds_for_all_attempts_together(runner, monkeypatch):
    monkeypatch.setattr(rounds, "FIRST_PAUSE", 2 * LONG)
    monkeypatch.setattr(rounds, "LONGEST_PAUSE", 2 * LONG)
    function, attempts = flaky(9, ConnectionError("down"))
    (result,) = runner.run(calls_of(tool(retry_on=ConnectionError, timeout=0.2)(function), "a"))
    assert (result.error, len(attempts)) == (ToolErrorKind.TIMEOUT, 1)


def test_pauses_grow_and_have_jitter_and_a_limit():
    def pauses(attempt):
        return [retry_pause(attempt, rounds.FIRST_PAUSE, rounds.LONGEST_PAUSE) for _ in range(200)]

    for attempt, expected in ((1, 0.5), (2, 1.0), (3, 2.0), (9, 10.0)):
        seconds = pauses(attempt)
        assert 0.5 * expected <= min(seconds) < 0.8 * expected
        assert 1.2 * expected < max(seconds) <= 1.5 * expected


# Failures


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


ERRORS = [
    (ValueError("x is not y"), "Error: fail failed: ValueError: x is not y"),
    (KeyError(), "Error: fail failed: KeyError"),
    (SystemExit(3), "Error: fail failed: SystemExit: 3"),
    (asyncio.CancelledError(), "Error: fail failed: CancelledError"),
    (RecursionError("too deep"), "Error: fail failed: RecursionError: too deep"),
    (StopIteration("end"), "Error: fail failed: StopIteration: end"),
    (GeneratorExit(), "Error: fail failed: GeneratorExit"),
    (TimeoutError("its own"), "Error: fail failed: TimeoutError: its own"),
    (BaseException("base"), "Error: fail failed: BaseException: base"),
    (Mute(), "Error: fail failed: Mute"),
    (ValueError("\ud800 and \x00"), "Error: fail failed: ValueError: \ufffd and \x00"),
    (ValueError("x" * 10_000), "Error: fail failed: ValueError: " + "x" * 467 + "…"),
]


@pytest.mark.parametrize("kind", ["plain", "async", "handed on", "batch", "method", "with a timeout"])
def test_whatever_a_tool_raises_is_an_observation(runner, kind):
    for error, expected in ERRORS:
        if isinstance(error, StopIteration) and kind in ("async", "handed on"):
            expected = "Error: fail failed: RuntimeError: coroutine raised StopIteration"

        def fail(query: str, error=error) -> str:
            raise error

        async def fail_later(query: str, error=error) -> str:
            raise error

        fail_later.__name__ = "fail"
        function, serial = fail, None
        if kind == "async":
            function = fail_later
        elif kind == "handed on":
            function = lambda query, later=fail_later: later(query)  # noqa: E731
            function.__name__ = "fail"
        elif kind == "batch":
            function = tool(batch=lambda query, fail=fail: fail(query))(fail)
        elif kind == "method":
            serial = 1
        elif kind == "with a timeout":
            function = tool(timeout=LONG)(fail)
        result, after = runner.run(calls_of(function, "q", [serial]) + calls_of(echo, "e"))
        assert result[:2] == (expected, ToolErrorKind.RAISED)
        assert len(result.text) <= 500 and result.text.encode()
        assert after.text == "plain e"


def test_a_tool_that_recurses_for_ever(runner):
    def fail(query: str) -> str:
        return fail(query)

    async def fail_later(query: str) -> str:
        return await fail_later(query)

    for result in runner.run(calls_of(fail, "a") + calls_of(fail_later, "b")):
        assert result.error is ToolErrorKind.RAISED and "RecursionError: maximum recursion" in result.text


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_task_of_a_tool_cannot_end_the_loop(runner, error):
    async def child():
        raise error

    async def parent(query: str) -> str:
        return await asyncio.create_task(child())

    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            runner.run(calls_of(parent, "a"))
    else:
        assert runner.run(calls_of(parent, "a"))[0].text == "Error: parent failed: SystemExit"
    assert texts(runner.run(calls_of(async_echo, "b"))) == ["async b"]


def test_a_tool_that_cancels_itself(runner):
    async def cancel(query: str) -> str:
        asyncio.current_task().cancel()
        await asyncio.sleep(0)
        return "not reached"

    result, after = runner.run(calls_of(cancel, "a") + calls_of(async_echo, "b"))
    assert result.text == "Error: cancel failed: CancelledError"
    assert after.text == "async b"


@pytest.mark.parametrize("kind", ["plain", "async", "batch", "method"])
def test_keyboard_interrupt_in_a_tool_is_raised_and_the_runner_lives(runner, kind, release):
    def interrupt(query: str) -> str:
        raise KeyboardInterrupt

    async def interrupt_later(query: str) -> str:
        raise KeyboardInterrupt

    function = interrupt_later if kind == "async" else interrupt
    if kind == "batch":
        function = tool(batch=interrupt)(function)
    hanging = calls_of(hang_plain(release), range(3)) + calls_of(hang_async(release), range(3))
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        runner.run(hanging + calls_of(function, "a", [1 if kind == "method" else None]))
    assert time.perf_counter() - start < LONG / 2  # it does not wait for the others
    assert texts(runner.run(calls_of(echo, "b") + calls_of(async_echo, "c"))) == ["plain b", "async c"]


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C, which is switched off in what a shell has started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_keyboard_interrupt_while_waiting_is_raised_and_the_runner_lives(runner, release, ctrl_c):
    cancelled = threading.Event()

    def press(query: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        release.wait(LONG)
        return "late"

    async def wait(query: str) -> str:
        try:
            await asyncio.sleep(LONG)
        finally:
            cancelled.set()
        return "late"

    with pytest.raises(KeyboardInterrupt):
        runner.run(calls_of(wait, "a") + calls_of(press, "a"))
    assert cancelled.wait(LONG / 2)  # what can be stopped is
    assert texts(runner.run(calls_of(echo, "b") + calls_of(async_echo, "c"))) == ["plain b", "async c"]


def test_an_error_of_the_program_is_raised(runner):
    with pytest.raises(ValueError, match="needs a `function`"):
        runner.run([ToolCall("x", {}, None)])
    assert texts(runner.run(calls_of(echo, "b"))) == ["plain b"]


# Results


class Text(str):
    def __str__(self):
        return "something else"


class Colour(enum.StrEnum):
    RED = "red"


class Record(TypedDict):
    a: int


def returning(value, annotation=inspect.Parameter.empty):
    def give(query: str):
        return value

    if annotation is not inspect.Parameter.empty:
        give.__annotations__["return"] = annotation
    return give


def cycle():
    value = {}
    value["self"] = value
    return value


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("", str, ""),
        ("a\x00b", str, "a\x00b"),
        (Text("abc"), str, "abc"),
        (Colour.RED, str, "red"),
        ("\ud83d\ude00 \ud800 \U0001f600", str, "\U0001f600 \ufffd \U0001f600"),
        ("text", dict, "text"),
        (42, int, "42"),
        (42, "int", "42"),
        (42, int | None, "42"),
        (True, bool, "True"),
        (42, float, "42"),
        (0.5, Annotated[float, "a share"], "0.5"),
        ({"é": [1, None]}, dict, '{"é": [1, null]}'),
        ({"a": 1}, dict[str, int], '{"a": 1}'),
        ({"a": 1}, Record, '{"a": 1}'),
        ({"a": "\ud800"}, dict, '{"a": "\ufffd"}'),
        (["a", "b"], list[str] | str, '["a", "b"]'),
        ([], list, "[]"),
        ((1, 2), tuple[int, int], "[1, 2]"),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], str, "one\ntwo"),
        ([{"type": "text", "text": "one"}], inspect.Parameter.empty, "one"),
        ([{"type": "text", "text": 1}], list, '[{"type": "text", "text": 1}]'),
        # Whatever the annotation says
        (None, str, "None"),
        (None, inspect.Parameter.empty, "None"),
        (42, str, "42"),
        (42, "NoSuchType", "42"),
        (0.5, int, "0.5"),
        (Fraction(1, 3), str, "1/3"),
        (datetime.date(2024, 2, 1), str, "2024-02-01"),
        (np.float32(0.5), str, "0.5"),
        (np.array([1, 2]), str, "[1 2]"),
        ({"a": 1}, inspect.Parameter.empty, '{"a": 1}'),
        ({"a": datetime.date(2024, 2, 1)}, str, '{"a": "2024-02-01"}'),
        ({(1, 2): 3}, dict, "{(1, 2): 3}"),
        ([1], dict, "[1]"),
        ([], str, "[]"),
        ([{"type": ["image"]}], str, '[{"type": ["image"]}]'),
        (cycle(), dict, "{'self': {...}}"),
    ],
)
def test_results_that_are_text(runner, value, annotation, expected):
    (result,) = runner.run(calls_of(returning(value, annotation), "q"))
    assert result[:2] == (expected, None)
    assert type(result.text) is str and result.text.encode() is not None


def print_nothing():
    pass


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (b"bytes", bytes),
        (bytearray(b"bytes"), str),
        pytest.param(10**5000, int, id="huge"),
        (object(), object),
        ((one for one in "ab"), str),
        (print_nothing, str),
    ],
)
def test_results_that_are_not(runner, value, annotation, caplog):
    with caplog.at_level(logging.WARNING):
        (result,) = runner.run(calls_of(returning(value, annotation), "q"))
    assert result.error is ToolErrorKind.NOT_TEXT
    assert result.text == f"Error: give returned a value of type {type(value).__name__}, which is not text."
    (record,) = caplog.records
    assert "Return a string, a number, a list or a dictionary" in record.message


@pytest.mark.parametrize("kind", ["image", "image_url", "audio", "input_audio", "video"])
def test_multi_modal_results_are_refused(runner, kind):
    value = [{"type": "text", "text": "see"}, {"type": kind, kind: b"..."}]
    for function in (returning(value), returning(value, list), tool(batch=lambda query: [value])(returning(value))):
        with pytest.raises(ValueError, match=rf"'give' returned content of type '{kind}'.*Return a string"):
            runner.run(calls_of(function, "q") + calls_of(async_echo, "a"))
    assert texts(runner.run(calls_of(echo, "b"))) == ["plain b"]


def test_what_is_awaitable_is_awaited(runner):
    class Caller:
        async def __call__(self, query: str) -> str:
            return f"object {query}"

    def hand_on(query: str) -> str:
        return async_echo(query)

    def runs_a_loop_of_its_own(query: str) -> str:
        return asyncio.run(async_echo(query))

    calls = [
        *calls_of(functools.partial(async_echo), "a"),
        *calls_of(hand_on, "b"),
        *calls_of(tool(timeout=LONG)(lambda query: async_echo(query)), "c"),
        *calls_of(Caller(), "d"),
        *calls_of(runs_a_loop_of_its_own, "e"),
        *calls_of(hand_on, "f", [1]),
    ]
    assert texts(runner.run(calls)) == ["async a", "async b", "async c", "object d", "async e", "async f"]


# The loop


def test_a_given_loop_is_used_and_left_running():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def where(query: str) -> str:
        return str(asyncio.get_running_loop() is loop)

    runner = ToolRunner(loop=loop, timeout=LONG)
    assert texts(runner.run(calls_of(where, "a") + calls_of(echo, "b"))) == ["True", "plain b"]

    async def inside():
        return runner.run(calls_of(echo, "c"))

    with pytest.raises(RuntimeError, match="cannot be called on the event loop"):
        asyncio.run_coroutine_threadsafe(inside(), loop).result(LONG)
    runner.close()
    assert texts(runner.run(calls_of(where, "a"))) == ["True"]
    loop.call_soon_threadsafe(loop.stop)
    thread.join(LONG)
    with pytest.raises(RuntimeError, match="has stopped"):
        runner.run(calls_of(echo, "d"))
    loop.run_until_complete(asyncio.sleep(0.05))  # what was still waiting on it
    loop.close()


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name == "igpo-tools"]


def test_close_ends_the_loop_and_a_later_call_starts_another():
    gc.collect()  # runners that other tests have left
    before = len(own_threads())
    runner = ToolRunner()
    assert len(own_threads()) == before  # none until there is something to run
    for _ in range(2):
        assert texts(runner.run(calls_of(echo, "a"))) == ["plain a"]
        assert len(own_threads()) == before + 1
        runner.close()
        runner.close()
        assert len(own_threads()) == before
    runner.run(calls_of(echo, "a"))
    del runner
    gc.collect()
    assert len(own_threads()) == before


def test_threads_of_a_round_end_with_it(runner):
    runner.run(calls_of(lambda query: time.sleep(0.01) or "done", range(16)))
    for _ in range(200):
        left = [thread for thread in threading.enumerate() if thread.name == "AnyIO worker thread"]
        if not left:
            break
        time.sleep(0.05)
    assert left == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_concurrent": 0}, "max_concurrent=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": float("nan")}, "timeout=nan"),
    ],
)
def test_bad_limits(arguments, message):
    with pytest.raises(ValueError, match=message):
        ToolRunner(**arguments)


# The decorator


def test_the_decorator_returns_the_function_itself():
    def search(query: str) -> str:
        """
        Searches.

        Args:
            query: What for.
        """
        return query

    before = get_json_schema(search)
    for decorate in (tool, tool(pure=True, timeout=3)):
        assert decorate(search) is search
        assert get_json_schema(search) == before
    assert search.tool_options == ToolOptions(pure=True, timeout=3)
    assert tool(retry_on=OSError)(search).tool_options.retry_on == (OSError,)

    class Environment:
        @tool(pure=True)
        def look(self): ...

    assert Environment().look.tool_options.pure


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_attempts": 0}, ValueError, "max_attempts=0"),
        ({"timeout": -1}, ValueError, "timeout=-1"),
        ({"batch": "search"}, TypeError, "batch='search'"),
        ({"retry_on": ("OSError",)}, TypeError, "'OSError' in retry_on"),
        ({"retry_on": KeyboardInterrupt}, TypeError, "KeyboardInterrupt"),
    ],
)
def test_the_decorator_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        tool(**arguments)


# Soak


def test_soak_a_tool_that_fails_in_ten_ways(release, caplog):
    """200 rollouts of three rounds, each call with one of ten ways to fail, or none."""
    caplog.set_level(logging.ERROR)
    generator = random.Random(5)
    attempts: Counter[int] = Counter()

    def behave(i, way):
        if way == 0:
            raise ValueError("x" * generator.randrange(2000))
        if way == 1:
            raise SystemExit
        if way == 2:
            raise asyncio.CancelledError
        if way == 3:
            return behave(i, way)  # for ever
        if way == 4:
            return None
        if way == 5:
            return object()
        if way == 6:
            return "\ud800" * 100
        if way == 7:
            raise Mute
        if way == 8:
            attempts[i] += 1
            if attempts[i] % 2:
                raise ConnectionError("again")
        return f"fine {i}"

    @tool(retry_on=ConnectionError)
    def plain(i: int, way: int) -> str:
        if way == 9:
            release.wait(LONG)
        return behave(i, way)

    @tool(retry_on=ConnectionError)
    async def asynchronous(i: int, way: int) -> str:
        if way == 9:
            await asyncio.sleep(LONG)
        return behave(i, way)

    def many(i, way):
        return [behave(*one) for one in zip(i, way, strict=True)]

    @tool(batch=many)
    def batched(i: int, way: int) -> str:
        return plain(i, way)

    tools = {"plain": plain, "asynchronous": asynchronous, "batched": batched, "step": plain}
    runner = ToolRunner(timeout=0.3)
    kinds: Counter[Any] = Counter()
    for round_number in range(3):
        calls = []
        for rollout in range(200):
            # A call that hangs holds its place for 0.3 s: only some do.
            way = generator.choice([*range(9), *range(9), 9, 10, 10])
            name = generator.choice([*tools])
            serial = rollout % 50 if name == "step" else None
            raw = [entry({"i": 1000 * round_number + rollout, "way": way}, name)]
            calls += read_calls(raw, tools, lambda function, serial=serial: serial)
        results = runner.run(calls)
        defined(calls, results, 200)
        for call, result in zip(calls, results, strict=True):
            way = call.arguments["way"]
            if result.error is ToolErrorKind.TIMEOUT:
                pass  # any call, on a busy machine
            elif way in (0, 1, 2, 3, 7):
                assert result.error is ToolErrorKind.RAISED
            elif way in (4, 5):
                assert result.error is (ToolErrorKind.NOT_TEXT if way == 5 else None)
            elif way in (6, 10):
                assert result.error is None
            kinds[result.error] += 1
    assert min(kinds[None], kinds[ToolErrorKind.RAISED], kinds[ToolErrorKind.NOT_TEXT]) > 50
    assert kinds[ToolErrorKind.TIMEOUT] > 3
    release.set()
    assert texts(runner.run(calls_of(async_echo, "a"))) == ["async a"]
    runner.close()
