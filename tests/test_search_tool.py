"""The search tool that a policy calls."""

import inspect

import pytest
import tiny
from test_search import PASSAGES
from transformers.utils import get_json_schema
from trl import GRPOConfig, GRPOTrainer

from igpo_trl.rollout import ToolCall, ToolRunner
from igpo_trl.rollout.tool_calls import read_calls
from igpo_trl.search import BM25Index, SearchTool


@pytest.fixture
def index() -> BM25Index:
    return BM25Index.build(PASSAGES, show_progress=False)


def test_tool_shows_titles_and_cut_texts(index):
    assert SearchTool(index, k=2, max_words=3)(query="Herbert") == (
        "[1] Frank Herbert\nAn American writer, …\n\n[2] Dune (novel)\nA 1965 epic …"
    )
    text = "A port city on Puget Sound – 51 km from Seattle. \U0001f30a"
    assert SearchTool(index, k=1, max_words=None)(query="Puget") == f"[1] Tacoma\n{text}"
    assert SearchTool(index, k=1)(query="particular") == "[1] Nothing in particular happens here."


@pytest.mark.parametrize("query", ["", "  \n", 3, None, ["a"], {"q": 1}, "xyzzy", "the of", "\ud800", "?" * 10_000])
def test_tool_answers_every_query_with_text(index, query):
    answer = SearchTool(index)(query=query)
    assert isinstance(answer, str) and answer
    assert answer.startswith(("Error: the query", "No passage matches"))


def test_tool_is_what_chat_templates_and_trl_take(index):
    tool = SearchTool(index, description="Search Wikipedia.")
    assert tool.__name__ == "search"
    assert inspect.isfunction(tool) and not inspect.iscoroutinefunction(tool)
    function = get_json_schema(tool)["function"]
    assert function["name"] == "search"
    assert function["description"] == "Search Wikipedia."
    assert function["parameters"]["required"] == ["query"]
    assert function["parameters"]["properties"]["query"]["type"] == "string"
    assert SearchTool(index).__doc__ != tool.__doc__  # one tool's description is not another's


@pytest.mark.parametrize("arguments", [{"k": 0}, {"max_words": 0}])
def test_tool_refuses_bad_limits(index, arguments):
    with pytest.raises(ValueError, match="expected at least 1"):
        SearchTool(index, **arguments)


def test_tool_with_many_queries_says_so_and_understands_one(index):
    tool, single = SearchTool(index, k=1, many_queries=True), SearchTool(index, k=1)
    function = get_json_schema(tool)["function"]
    assert (function["name"], function["description"]) == (
        "search",
        get_json_schema(single)["function"]["description"],
    )
    assert function["parameters"]["properties"]["query"] | {"description": ""} == {
        "type": "array",
        "items": {"type": "string"},
        "description": "",
    }
    assert inspect.isfunction(tool) and tool.tool_options.pure
    assert tool("Herbert") == tool(["Herbert"]) == single("Herbert")
    assert tool(["Tacoma", "xyzzy", "Tacoma"]) == (
        f"Results for 'Tacoma':\n{single('Tacoma')}\n\nResults for 'xyzzy':\n{single('xyzzy')}\n\n"
        f"Results for 'Tacoma':\n{single('Tacoma')}"
    )
    assert tool(["", "x", 3]).count("Error: the query") == 2
    assert tool([]) == "Error: there is no query. Say what to look for."
    assert tool(["x"] * 9) == "Error: got 9 queries, at most 8 are answered at once. Ask for less."
    for odd in (None, 3, {"a": 1}, [[1]], [None]):
        assert tool(odd).startswith("Error: the query must be a string")


def test_all_lists_of_queries_of_a_round_are_one_call_of_the_index(index):
    counting = CountingIndex(index)
    tool = SearchTool(counting, k=1, many_queries=True)
    queries = ["port city", ["Frank Herbert", "port city"], ["xyzzy"], [], ["a"] * 9, ["Frank Herbert", "port city"]]
    raw = [{"name": "search", "arguments": {"query": query}} for query in queries]
    raw += [{"name": "search", "arguments": {"query": [1]}}]
    calls = read_calls(raw, {"search": tool}, lambda _: None)
    assert [call.problem is None for call in calls] == [True] * 6 + [False]
    runner = ToolRunner()
    results = runner.run(calls)
    runner.close()
    assert counting.batches == [["port city", "Frank Herbert", "xyzzy"]]
    assert [result.text for result in results[:6]] == [SearchTool(index, k=1, many_queries=True)(q) for q in queries]


class CountingIndex:
    def __init__(self, index):
        self.index = index
        self.batches = []

    def search_batch(self, queries, k=3):
        self.batches.append(list(queries))
        if "break" in queries:
            raise RuntimeError("broken")
        return self.index.search_batch(queries, k)


def test_all_queries_of_a_round_are_one_call_of_the_index(index):
    counting = CountingIndex(index)
    tool = SearchTool(counting, k=1)
    queries = ["port city", "", "Frank Herbert", "port city", "xyzzy", "\ud800"]
    calls = [ToolCall("search", {"query": query}, tool) for query in queries]
    runner = ToolRunner()
    results = runner.run(calls)
    assert counting.batches == [["port city", "Frank Herbert", "xyzzy", "\ud800"]]  # equal queries once, no bad ones
    assert [result.text for result in results] == [tool(query) for query in queries]
    assert {result.error for result in results} == {None}
    assert tool.tool_options.batch(query=[3, " "]) == [tool(3), tool(" ")]
    assert tool.tool_options.batch(query=[]) == []

    # A query that breaks the index spoils no other.
    results = runner.run([*calls[:3], ToolCall("search", {"query": "break"}, tool)])
    assert [result.text for result in results[:3]] == [tool(query) for query in queries[:3]]
    assert results[3].text == "Error: search failed: RuntimeError: broken"
    runner.close()


class ScriptedGRPO(tiny.Scripted, GRPOTrainer):
    scripts = [
        [tiny.call("port city"), tiny.call("Frank Herbert"), tiny.answer("Seattle")],
        [tiny.call(""), tiny.answer("none")],
        ['<tool_call>\n{"name": "search", "arguments": {"query": [1, 2]}}\n</tool_call>', tiny.answer("none")],
        [tiny.call("xyzzy"), tiny.answer("none")],
    ]


def test_tool_in_a_rollout_of_trl(index, tmp_path):
    rollouts = []

    def keep(completions, **columns):
        rollouts.extend(completions)
        return [float(len(completion)) for completion in completions]

    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=512,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = ScriptedGRPO(
        tiny.make_model("qwen3"),
        keep,
        config,
        tiny.make_dataset(),
        processing_class=tiny.make_tokenizer(),
        tools=[SearchTool(index, k=1, max_words=5)],
    )
    trainer.train()

    results = [[m["content"] for m in rollout if m["role"] == "tool"] for rollout in rollouts]
    assert results == [
        ["[1] Tacoma\nA port city on Puget …", "[1] Frank Herbert\nAn American writer, born in …"],
        ["Error: the query is empty. Say what to look for."],
        ["Error: the query must be a string, got list."],
        ["No passage matches this query. Try other words."],
    ]
    (log,) = [row for row in trainer.state.log_history if "tools/call_frequency" in row]
    assert log["tools/call_frequency"] == 5 / 4
    assert log["tools/failure_frequency"] == 0  # each of them an observation to learn from, none a failure of the tool
