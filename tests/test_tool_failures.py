"""A tool that has stopped working stops training; a policy that uses it wrongly does not."""

import logging
import socket
import sqlite3
import subprocess
import urllib.error
from types import SimpleNamespace

import httpx2
import pytest
import requests
import tiny
import torch
from test_serve import PASSAGES, Running
from tools import calls_of
from transformers import AutoModelForCausalLM, TrainerCallback

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.cli.errors import keep_trace, one_line_errors
from igpo_trl.components import server_watched
from igpo_trl.rollout import ToolRunner
from igpo_trl.rollout.tool_failures import FailureWatch, ToolCounts, ToolUnavailable, is_unavailable
from igpo_trl.search import HTTPSearch, SearchError, SearchTool
from igpo_trl.tools import tool


def raised_from(error, cause):
    try:
        try:
            raise cause
        except type(cause):
            raise error  # noqa: B904
    except type(error) as caught:
        return caught


class Overrun(Exception):
    pass


class ServerDisconnectedError(Exception):
    """As clients define them, without a base of Python's own."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError("no"), True),
        (TimeoutError(), True),
        (socket.gaierror(-2, "unknown host"), True),
        (BrokenPipeError(), True),
        (urllib.error.URLError("refused"), True),
        (httpx2.ConnectError("refused"), True),
        (httpx2.ReadTimeout("slow"), True),
        (httpx2.RemoteProtocolError("closed"), True),
        (requests.ConnectionError("refused"), True),
        (ServerDisconnectedError(), True),
        (SearchError("answered 503"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (raised_from(RuntimeError("the search failed"), ConnectionResetError()), True),
        (Overrun(), True),  # declared with `retry_on`
        (ValueError("not a number"), False),
        (KeyError("x"), False),
        (ZeroDivisionError(), False),
        (FileNotFoundError("notes.txt"), False),
        (RuntimeError("exit status 1"), False),
        (sqlite3.OperationalError("near SELECT: syntax error"), False),
        (subprocess.CalledProcessError(1, "ls"), False),
        (raised_from(ValueError("no such page"), KeyError("x")), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_whose_fault_an_error_is(error, expected):
    assert is_unavailable(error, (Overrun,)) is expected

    @tool(retry_on=Overrun, max_attempts=1)
    def search(query: str) -> str:
        raise error

    (result,) = ToolRunner().run(calls_of(search, ["a"]))
    assert (result.error, result.unavailable) == ("raised", expected)


def test_a_timeout_is_the_fault_of_the_tool():
    @tool(timeout=0.01)
    async def search(query: str) -> str:
        import asyncio

        await asyncio.sleep(10)

    (result,) = ToolRunner().run(calls_of(search, ["a"]))
    assert (result.error, result.unavailable) == ("timeout", True)


class CutOff(TrainerCallback):
    """Shuts the server down after some steps."""

    def __init__(self, server, after):
        self.server, self.after = server, after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            self.server.__exit__()


class Scripted(tiny.Scripted, IGPOTrainer):
    scripts = [[tiny.call("Tacoma"), tiny.answer("Paris")], [tiny.call("Herbert"), tiny.answer("Rome")]]


@pytest.fixture
def index():
    from igpo_trl.search import BM25Index

    return BM25Index.build(PASSAGES, show_progress=False)


def test_training_stops_when_the_search_server_dies_and_resumes_when_it_is_back(index, tmp_path):
    def make(server, **options):
        return tiny.make_trainer(
            Scripted,
            IGPOConfig,
            tmp_path,
            max_steps=7,
            save_strategy="steps",
            save_steps=1,
            tools=[SearchTool(HTTPSearch(server.url, max_attempts=1), k=1, max_words=20)],
            **options,
        )

    server = Running(index).__enter__()
    trainer = make(server, callbacks=[CutOff(server, after=2)])
    with pytest.raises(ToolUnavailable) as stopped:
        trainer.train()
    assert trainer.state.global_step == 4  # the third bad batch in a row was not trained on
    last = tmp_path / "checkpoint-4"
    message = str(stopped.value)
    assert "the tool 'search' does not work: 4 of 4 calls failed" in message
    assert "cannot connect" in message and str(last) in message
    AutoModelForCausalLM.from_pretrained(last)
    with Running(index) as server:
        trainer = make(server)
        trainer.train(resume_from_checkpoint=str(last))
    assert trainer.state.global_step == 7


def test_the_command_line_says_so_in_one_line(capsys):
    with pytest.raises(SystemExit), one_line_errors(), keep_trace():
        raise ToolUnavailable("the tool 'search' does not work: 4 of 4 calls failed")
    assert capsys.readouterr().err == "Error: the tool 'search' does not work: 4 of 4 calls failed\n"


def test_a_vllm_server_that_is_gone_is_one_line_whatever_the_clients_error_was(index, tmp_path, capsys):
    def sample(error, url=None):
        # Only the main process has a client.
        generation = SimpleNamespace() if url is None else SimpleNamespace(vllm_client=SimpleNamespace(base_url=url))
        trainer = SimpleNamespace(vllm_generation=generation, args=SimpleNamespace(output_dir=tmp_path))
        with one_line_errors(), keep_trace(), server_watched(trainer):
            raise error

    with Running(index) as server:  # it answers GET /health, as vLLM's server does
        for error in (ValueError("a bug"), requests.ConnectionError("one request was lost")):
            with pytest.raises(type(error), match=str(error)):
                sample(error, server.url)
    with pytest.raises(RuntimeError, match="connection closed by peer"):
        sample(RuntimeError("connection closed by peer"))
    assert capsys.readouterr().err == ""
    (tmp_path / "checkpoint-2").mkdir()
    for error in (requests.ConnectionError("refused"), RuntimeError("closed"), Exception("Request failed: 500")):
        with pytest.raises(SystemExit):
            sample(error, server.url)
        assert capsys.readouterr().err == (
            f"Error: the vLLM server at {server.url} does not answer any more. Start it again and resume with "
            f"`resume_from_checkpoint`; the last checkpoint is {tmp_path / 'checkpoint-2'}.\n"
        )


def test_training_goes_on_if_the_policy_uses_a_tool_wrongly_and_says_so_once(tmp_path, caplog):
    def search(query: str) -> str:
        """
        Searches.

        Args:
            query: What to look for.
        """
        raise ValueError("Ask for something else.")

    caplog.set_level(logging.WARNING)
    trainer = tiny.make_trainer(Scripted, IGPOConfig, tmp_path, max_steps=4, tools=[search])
    trainer.train()
    assert trainer.state.global_step == 4
    (warning,) = [record.getMessage() for record in caplog.records if "failed in" in record.getMessage()]
    assert "'search' failed in 4 of 4 calls, at least 50% in each of 3 batches" in warning
    assert "ValueError: Ask for something else. Either" in warning


BAD, GOOD = ToolCounts(4, 2, 2, "gone"), ToolCounts(4, 1, 1, "gone")


@pytest.mark.parametrize(
    ("batches", "stops"),
    [
        ([BAD, BAD, BAD], True),
        ([BAD, BAD, GOOD, BAD, BAD], False),
        ([BAD, BAD, ToolCounts(), BAD], True),  # nobody called it
        ([BAD, BAD], False),
        ([ToolCounts(4, 4, 1, "wrong")] * 4, False),
    ],
)
def test_a_tool_stops_training_after_three_bad_batches_in_a_row(tmp_path, batches, stops):
    def run(max_share):
        watch = FailureWatch(max_share, 3, tmp_path)
        for counts in batches:
            watch.update({"search": counts, "other": ToolCounts(9)})

    if stops:
        with pytest.raises(ToolUnavailable, match="2 of 4 calls failed.*The last error: gone.*no checkpoint yet"):
            run(0.5)
    else:
        run(0.5)
    run(None)


def test_calls_that_never_reach_the_tool_are_not_counted(tmp_path):
    scripts = [[tiny.call("a", name="find"), tiny.answer("b")], ['<tool_call>\n{"name"\n</tool_call>', "x"]]
    scripts.append(['<tool_call>\n{"name": "search", "arguments": {"k": 1}}\n</tool_call>', "x"])
    trainer = tiny.make_trainer(Scripted, IGPOConfig, tmp_path, max_tool_failures=0.01, tool_failure_patience=1)
    trainer.scripts = [*scripts, [tiny.call("a"), "x"]]
    trainer.train()
    assert {name: counts.calls for name, counts in trainer.current_step.round_log.tools.items() if counts.calls} == {
        "search": 1
    }


@pytest.mark.parametrize(
    "options", [{"max_tool_failures": 0}, {"max_tool_failures": 50}, {"tool_failure_patience": 0}], ids=str
)
def test_limits_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        IGPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
