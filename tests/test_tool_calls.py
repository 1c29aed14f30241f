"""Tool calls as policies write them: each has a defined outcome."""

import functools
import inspect
import json
import random
import string
from collections import Counter
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator
from tools import LONG, async_echo, calls_of, defined, entry, texts

from igpo_trl.rollout import ToolCall, ToolErrorKind, ToolRunner, read_calls


@pytest.fixture
def runner():
    runner = ToolRunner(timeout=LONG)
    yield runner
    runner.close()


def search(query: str, k: int = 3, mode: Literal["fast", "good"] = "fast", tags: list[str] = None) -> str:  # noqa: RUF013
    return f"{query} {k} {mode} {tags}"


def anything(**options) -> str:
    return str(sorted(options))


def untyped(a, b="x"):
    return f"{a} {b}"


def nothing() -> str:
    return "nothing"


TOOLS = {"search": search, "anything": anything, "untyped": untyped, "nothing": nothing}


def read(raw, tools=TOOLS):
    return read_calls(raw, tools, lambda function: None)


def read_one(raw, tools=TOOLS):
    (call,) = read(raw, tools)
    return call


@pytest.mark.parametrize(
    ("raw", "name", "arguments"),
    [
        ([entry({"query": "a"})], "search", {"query": "a"}),
        ([entry('{"query": "a", "k": 5}')], "search", {"query": "a", "k": 5}),
        (({"function": {"name": "search", "arguments": {"query": "a"}}},), "search", {"query": "a"}),
        ({"name": "search", "arguments": {"query": "a"}}, "search", {"query": "a"}),
        ([{"type": None, "id": "x", **entry({"query": ""})}], "search", {"query": ""}),
        ([entry({"query": "a", "k": "7"})], "search", {"query": "a", "k": 7}),
        ([entry({"query": "a", "k": 7.0})], "search", {"query": "a", "k": 7}),
        ([entry({"query": "a", "tags": None})], "search", {"query": "a", "tags": None}),
        ([entry({"query": "a", "mode": "good"})], "search", {"query": "a", "mode": "good"}),
        ([entry({"query": "a", "tags": ["x"]})], "search", {"query": "a", "tags": ["x"]}),
        ([entry({"x": 1, "y": [2]}, "anything")], "anything", {"x": 1, "y": [2]}),
        ([entry({"a": None}, "untyped")], "untyped", {"a": None}),
        ([entry(None, "nothing")], "nothing", {}),
        ([entry(" ", "nothing")], "nothing", {}),
        ([entry({}, "nothing")], "nothing", {}),
        ([{"name": "nothing"}], "nothing", {}),
    ],
)  # fmt: skip
def test_calls_that_are_right(raw, name, arguments, runner):
    call = read_one(raw)
    assert call == ToolCall(name, arguments, TOOLS[name])
    assert all(type(value) is type(call.arguments[key]) for key, value in arguments.items())
    assert runner.run([call])[0].text == TOOLS[name](**arguments)


M, U, B = ToolErrorKind.MALFORMED, ToolErrorKind.UNKNOWN_TOOL, ToolErrorKind.BAD_ARGUMENTS


@pytest.mark.parametrize(
    ("raw", "kind", "parts"),
    [
        ("search", M, ["must be an object", "'search' (str)"]),
        (7, M, ["must be an object", "7 (int)"]),
        ([None], M, ["must be an object"]),
        ([[]], M, ["must be an object"]),
        ([{}], M, ["'name'"]),
        ([{"function": None}], M, ["'name'"]),
        ([{"function": {"name": 3}}], M, ["'name'", "3"]),
        ([{"function": {"name": ["search"]}}], M, ["'name'"]),
        ([{"type": "web", "name": "search"}], M, ["'web'", "'function'"]),
        ([entry('{"query": "a"')], M, ["arguments of search", "not valid JSON", "delimiter"]),
        ([entry("[" * 100_000)], M, ["not valid JSON"]),
        ([entry('{"k": ' + "9" * 5000 + "}")], M, ["not valid JSON"]),
        ([entry("3")], M, ["arguments of search", "must be an object", "3 (int)"]),
        ([entry([1])], M, ["[1] (list)"]),
        ([entry(False)], M, ["False (bool)"]),
        ([entry({}, "serch")], U, ["there is no tool 'serch'. Available: search, anything, untyped, nothing."]),
        ([entry({}, "\ud800")], U, ["no tool '\ufffd'"]),
        ([entry({}, "x" * 100_000)], U, ["no tool 'xxx", "…'. Available: search"]),
        ([entry({})], B, ["argument 'query' is missing. It takes: query, k, mode, tags."]),
        ([entry({"query": 7})], B, ["argument 'query' should be a valid string, got 7 (int)"]),
        ([entry({"query": None})], B, ["'query' should be a valid string, got None"]),
        ([entry({"query": "a", "k": "x"})], B, ["'k' should be a valid integer", "got 'x' (str)"]),
        ([entry({"query": "a", "k": 7.5})], B, ["'k' should be a valid integer", "7.5"]),
        ([entry({"query": "a", "k": None})], B, ["'k' should be a valid integer, got None"]),
        ([entry({"query": "a", "mode": "best"})], B, ["'mode' should be 'fast' or 'good', got 'best' (str)"]),
        ([entry({"query": "a", "tags": [1, 2]})], B, ["'tags' should be a valid string, got 1 (int)"]),
        ([entry({"query": "a", "q": 1})], B, ["there is no argument 'q'"]),
        ([entry({"query": "a", 3: 1})], B, ["there is no argument 3"]),
        ([entry({"query": "a", "\ud800": 1})], B, ["an argument's name should be a valid string"]),
        ([entry({"query": "a", "x" * 9999: 1})], B, ["there is no argument 'xxx"]),
        ([entry({"q": 1, "k": []})], B, ["'query' is missing", "'k' should be", "no argument 'q'"]),
        ([entry({"query": ["x" * 100_000] * 1000})], B, ["should be a valid string", "(list)"]),
        ([entry({"query": 10**5000})], B, ["'query' should be a valid string, got a value of type int"]),
        ([entry({"a": 1}, "nothing")], B, ["there is no argument 'a'. It takes: no arguments."]),
    ],
)  # fmt: skip
def test_calls_that_are_wrong(raw, kind, parts, runner):
    call = read_one(raw)
    assert call.problem.error is kind
    assert call.problem.text.startswith("Error: ") and len(call.problem.text) <= 500
    assert call.problem.seconds is None and call.arguments == {} and call.serial is None
    for part in parts:
        assert part in call.problem.text
    assert len(call.name) <= 64 and call.name.encode() and call.problem.text.encode()
    assert runner.run([call]) == [call.problem]


def test_every_entry_is_a_call_and_none_is_none():
    calls = read([entry({"query": "a"}), 3, entry({}, "gone"), entry({"query": "b"})])
    assert [call.problem.error if call.problem else None for call in calls] == [None, M, U, None]
    assert read(None) == read([]) == []


def test_without_tools():
    assert read_one([entry({})], {}).problem.text == "Error: there is no tool 'search'. Available: none."


def test_serial_is_asked_for_calls_that_can_run():
    class Environment:
        def step(self, query: str) -> str:
            return query

    environment = Environment()
    tools = {"step": environment.step, "search": search}
    asked = []

    def serial(function):
        asked.append(function)
        return id(function.__self__) if hasattr(function, "__self__") else None

    raw = [entry({"query": "a"}, "step"), entry({"query": "a"}), entry({"query": 1}, "step")]
    calls = read_calls(raw, tools, serial)
    assert [call.serial for call in calls] == [id(environment), None, None]
    assert asked == [environment.step, search]
    assert calls[2].problem.error is B  # without `self` among the arguments
    assert "It takes: query." in calls[2].problem.text


def test_signatures_are_read_once_for_all_environments(monkeypatch):
    class Environment:
        def step(self, query: str) -> str:
            return query

    count = 0
    signature = inspect.signature

    def counting(*args, **kwargs):
        nonlocal count
        count += 1
        return signature(*args, **kwargs)

    monkeypatch.setattr(inspect, "signature", counting)
    for _ in range(50):
        assert read_one([entry({"query": "a"}, "step")], {"step": Environment().step}).problem is None
    assert count == 1


def test_tools_whose_types_cannot_be_checked(runner):
    def unknown_type(query: "NoSuchType", k: int = 1) -> str:  # noqa: F821
        return str(query)

    class Opaque:
        pass

    def opaque(query: Opaque) -> str:
        return "not reached"

    def raising(query: Annotated[str, AfterValidator(lambda text: {}[text])]) -> str:
        return "not reached"

    class NoHash:
        __hash__ = None

        def __call__(self, query: str) -> str:
            return query

    tools = {"u": unknown_type, "o": opaque, "r": raising, "n": NoHash(), "b": max}
    tools["p"] = functools.partial(search, k=1)
    assert runner.run([read_one([entry({"query": [1]}, "u")], tools)])[0].text == "[1]"
    assert read_one([entry({"q": 1}, "u")], tools).problem.error is B  # names are checked all the same
    assert "Opaque" in read_one([entry({"query": 1}, "o")], tools).problem.text
    assert read_one([entry({"query": "a"}, "r")], tools).problem.text == "Error: r: KeyError: 'a'"
    assert read_one([entry({"query": 1}, "n")], tools).problem.error is B
    assert read_one([entry({"query": "a"}, "n")], tools).problem is None
    assert runner.run([read_one([entry({"x": 1}, "b")], tools)])[0].error is ToolErrorKind.RAISED
    assert runner.run([read_one([entry({"query": "a"}, "p")], tools)])[0].text == "a 1 fast None"


@pytest.mark.parametrize("name", ["copy", "json", "schema", "model_config", "_private", "class_", "self_", "keys"])
def test_any_name_of_a_parameter(name, runner):
    space: dict[str, Any] = {}
    exec(f"def f({name}: int) -> str: return str({name})", space)
    call = read_one([entry({name: "3"}, "f")], {"f": space["f"]})
    assert runner.run([call])[0].text == "3"
    assert read_one([entry({name: "x"}, "f")], {"f": space["f"]}).problem.error is B


# Soak


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.builds(lambda: 10**5000)  # too long to be shown
    | st.sampled_from([*TOOLS, "query", "\ud800", "\x00", b"bytes", '{"query": "a"}', '{"query": '])
)
keys = st.sampled_from(["type", "function", "name", "arguments", "query", "k", "tags"]) | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys | st.integers() | st.none(), inner, max_size=4),
    max_leaves=12,
)
shapes = values | st.lists(
    st.builds(entry, values, st.sampled_from([*TOOLS])),
    max_size=3,
)


@settings(deadline=None, max_examples=300)
@given(shapes)
def test_soak_any_value_is_read(raw):
    calls = read(raw)
    number = len(raw) if isinstance(raw, (list, tuple)) else int(raw is not None)
    assert len(calls) == number
    problems = [call.problem for call in calls if call.problem is not None]
    defined(problems, problems, len(problems))
    assert all(call.problem is not None or call.function is not None for call in calls)


class Writer:
    """Writes tool calls as a policy might: right ones, and right ones with something done to them."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def text(self):
        alphabet = self.random.choice([string.printable, "αβ漢字🙂🧪", "\ud800\udfff\x00\x1b", '{}[]":,\\<>|/'])
        return "".join(self.random.choices(alphabet, k=self.random.choice([0, 1, 5, 30])))

    def value(self, depth=0):
        kind = self.random.randrange(11 if depth < 4 else 8)
        if kind < 8:
            numbers = [0, -1, 2**70, 0.1, float("nan"), float("-inf"), True, None]
            return self.text() if kind < 3 else self.random.choice(numbers)
        if kind == 8:
            return [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        return {self.text(): self.value(depth + 1) for _ in range(self.random.randrange(4))}

    def nested(self, depth):
        value: Any = self.text()
        for _ in range(depth):
            value = [value] if self.random.random() < 0.5 else {"query": value}
        return value

    def call(self):
        arguments: Any = {"query": self.text()}
        if self.random.random() < 0.3:
            arguments["k"] = self.random.choice([1, "2", 3.0, "many", None, [4]])
        call: dict[Any, Any] = entry(arguments, self.random.choice([*TOOLS, "search", "search", self.text()]))
        change = self.random.randrange(12)
        if change == 0:
            call["function"]["arguments"] = self.value()
        elif change == 1:
            call["function"]["name"] = self.value()
        elif change == 2:
            del call["function"][self.random.choice(["name", "arguments"])]
        elif change == 3:
            call = self.value()
        elif change == 4:
            arguments["query"] = self.nested(self.random.choice([3, 50, 2000]))
        elif change == 5:
            arguments[self.random.choice([self.text(), 3, None, "q"])] = self.value()
        elif change == 6:
            arguments["query"] = self.text() * 2000
        elif change in (7, 8):
            text = json.dumps(arguments)
            call["function"]["arguments"] = text[: self.random.randrange(len(text) + 1)] if change == 7 else text
        return call


def test_soak_twenty_thousand_calls(runner):
    writer = Writer(seed=3)
    kinds: Counter[Any] = Counter()
    for _ in range(200):
        raw = [[writer.call() for _ in range(writer.random.choice([1, 1, 2, 16]))] for _ in range(20)]
        while sum(map(len, raw)) < 100:
            raw.append([writer.call()])
        raw = [one for message in raw for one in message][:100]
        calls = read(raw)
        results = runner.run(calls)
        defined(calls, results, 100)
        kinds.update(result.error for result in results)
    assert kinds.total() == 20_000
    assert kinds[None] > 4000
    assert min(kinds[M], kinds[U], kinds[B]) > 500
    assert texts(runner.run(calls_of(async_echo, "a"))) == ["async a"]
