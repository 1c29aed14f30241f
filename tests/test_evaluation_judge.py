"""The judge, with a real server of the chat-completions protocol on the loopback interface."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_evaluation import rollout
from typer.testing import CliRunner

from igpo_trl.cli.app import app
from igpo_trl.evaluation import load_run
from igpo_trl.evaluation.judge import Judge, Verdict, judge_run, read_verdict
from igpo_trl.evaluation.run import append_lines

KEY = "sk-secret-0123456789"


class Server(ThreadingHTTPServer):
    """Answers each request with `reply(number, request)`: a text, or a status."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.headers_seen, self.lock = [], [], threading.Lock()
        self.reply = lambda number, request: '{"reason": "same city", "correct": true}'

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.headers_seen.append(self.headers)
            number = len(self.server.requests)
        status, body = 200, self.server.reply(number, request)
        if isinstance(body, int):
            status, body = body, f"refused {self.headers['Authorization']}"
        else:
            message = {"role": "assistant", "content": body}
            body = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
        if self.path != "/v1/chat/completions":
            status, body = 404, "no such path"
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("igpo_trl.search.network.http_requests.FIRST_PAUSE", 0.01)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def run_of(folder, *said):
    """A run on disk, one rollout for each answer."""
    records = [
        rollout("nq", str(i), text, prediction=text, question=f"Where is tower {i}?") for i, text in enumerate(said)
    ]
    append_lines(folder / "trajectories/rank0.jsonl", [record.to_json() for record in records])
    (folder / "run.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"reason": "same", "correct": true}', Verdict(True, "same")),
        ('```json\n{"correct": false, "reason": "other"}\n```', Verdict(False, "other")),
        ('<think>{"correct": true}?</think> {"correct": "No", "reason": "x"}', Verdict(False, "x")),
        ('{"correct": true}', Verdict(True, "")),
        ("Reason: the same. Correct: yes", Verdict(True, "Reason: the same. Correct: yes")),
        ("**correct**: no", Verdict(False, "**correct**: no")),
        ('{"correct": 1, "reason": "?"}', None),
        ('{"reason": "cut o', None),
        ("It is incorrect", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_from_typical_replies(reply, expected):
    assert read_verdict(reply) == expected


def test_asks_at_temperature_0_with_question_answers_and_prediction(server):
    judge = Judge(server.url + "/", "grader", KEY)
    assert judge("Where?", ["Paris", "City of Light"], 'Paris, "France"') == Verdict(True, "same city")
    judge.close()
    (request,) = server.requests
    assert (request["model"], request["temperature"]) == ("grader", 0)
    content = json.loads(request["messages"][1]["content"])
    assert list(content.values()) == ["Where?", ["Paris", "City of Light"], 'Paris, "France"']
    assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"
    keyless = Judge(server.url, "grader")
    keyless("Where?", ["Paris"], "Paris")
    keyless.close()
    assert server.headers_seen[1]["Authorization"] is None


def test_retries_if_the_server_is_busy_or_the_reply_is_unreadable(server):
    replies = [429, 500, "hmm", '{"reason": "another", "correct": false}']
    server.reply = lambda number, request: replies[number - 1]
    judge = Judge(server.url, "grader")
    assert judge("Where?", ["Paris"], "Rome") == Verdict(False, "another")
    assert [len(request["messages"]) for request in server.requests] == [2, 2, 2, 4]
    server.reply = lambda number, request: "I would rather not say."
    assert judge("Where?", ["Paris"], "Rome") == Verdict(None, "unreadable: I would rather not say.")
    judge.close()


def test_every_verdict_is_saved_and_none_is_requested_twice(server, tmp_path):
    run = run_of(tmp_path, "Paris", "Rome", None, "Oslo")
    file = run / "verdicts.jsonl"

    def reply(number, request):
        said = json.loads(request["messages"][1]["content"])["candidate's answer"]
        if said == "Oslo" and number < 4:
            return 400
        return json.dumps({"reason": f"read {said}", "correct": said == "Paris"})

    server.reply = reply
    judge = Judge(server.url, "grader", KEY)
    from igpo_trl.search.network.http_requests import SearchError

    with pytest.raises(SearchError, match="400") as caught:
        judge_run(judge, load_run(run), file, workers=1)
    assert KEY not in str(caught.value) and "[secret]" in str(caught.value)
    assert len(server.requests) == 3  # a missing answer is wrong without a request
    with file.open("a") as torn:
        torn.write('{"dataset": "nq", "id"')
    assert judge_run(judge, load_run(run), file) == 0
    assert len(server.requests) == 4
    assert judge_run(judge, load_run(run), file) == 0
    assert len(server.requests) == 4
    judge.close()
    verdicts = {t.info["id"]: t.info["judge"] for t in load_run(run)}
    assert {name: (v["correct"], v["reason"], v["model"]) for name, v in verdicts.items()} == {
        "0": (True, "read Paris", "grader"),
        "1": (False, "read Rome", "grader"),
        "2": (False, "no answer", "grader"),
        "3": (False, "read Oslo", "grader"),
    }
    # Another model gets its own requests, and its verdicts replace the first ones.
    server.reply = lambda number, request: '{"correct": true, "reason": "generous"}'
    other = Judge(server.url, "other")
    judge_run(other, load_run(run), file)
    other.close()
    assert len(server.requests) == 7
    assert [t.info["judge"]["correct"] for t in load_run(run)] == [True, True, False, True]
    assert KEY not in "".join(path.read_text() for path in tmp_path.rglob("*.json*"))


def test_unreadable_verdicts_are_counted_and_requested_again(server, tmp_path):
    run = run_of(tmp_path, "Paris", "Paris")
    server.reply = lambda number, request: "no idea"
    judge = Judge(server.url, "grader")
    assert judge_run(judge, load_run(run), run / "verdicts.jsonl") == 2
    assert [t.info["judge"]["correct"] for t in load_run(run)] == [None, None]
    server.reply = lambda number, request: '{"correct": true}'
    assert judge_run(judge, load_run(run), run / "verdicts.jsonl") == 0
    judge.close()


def test_command_line(server, tmp_path, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    run = run_of(tmp_path, "Paris", "Rome")
    monkeypatch.setenv("IGPO_JUDGE_KEY", KEY)
    result = CliRunner().invoke(app, ["eval", "judge", str(run), "--url", server.url, "--model", "grader"])
    assert result.exit_code == 0, result.output
    assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"
    assert json.loads((run / "results.json").read_text())["sets"]["nq"]["metrics"]["judge"]["mean"] == 1
    assert KEY not in result.output + caplog.text
    assert KEY not in "".join(path.read_text() for path in run.rglob("*") if path.is_file())
    result = CliRunner().invoke(app, ["eval", "judge", str(run), "--url", "nowhere", "--model", "grader"])
    assert result.exit_code == 1 and "expected an address" in result.output
    result = CliRunner().invoke(app, ["eval", "judge", str(run), "--url", server.url[:-3], "--model", "another"])
    assert result.exit_code == 1 and "404" in result.output and "usually ends in /v1" in result.output
    assert isinstance(result.exception, SystemExit)
