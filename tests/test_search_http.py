"""The client of search servers: forms of answers, retries, timeouts, threads, processes, errors."""

import json
import logging
import multiprocessing
import os
import pickle
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from igpo_trl.rollout import ToolCall, ToolErrorKind, ToolRunner
from igpo_trl.search import HTTPSearch, Passage, SearchError, SearchTool, open_search
from igpo_trl.search.network.http_requests import retry_after


class Service:
    """A search server whose answers a test controls."""

    def __init__(self, answer=None, port=0) -> None:
        self.requests: list[dict] = []
        self.connections: set[tuple[str, int]] = set()
        self.times: list[float] = []
        self.answer = answer or (lambda body, number: (200, {"result": [self.found(q) for q in body["queries"]]}, {}))
        self.hang_up = False
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.times.append(time.monotonic())
                service.requests.append({**body, "path": self.path})
                service.headers = dict(self.headers.items())
                service.connections.add(self.client_address)
                status, answer, headers = service.answer(body, len(service.requests))
                if status is None:
                    self.close_connection = True  # hangs up
                    return
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(data), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)
                self.close_connection |= service.hang_up  # unannounced

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # a client that has stopped waiting
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})

    @staticmethod
    def found(query):
        return [{"document": {"id": query, "contents": f'"{query}"\ntext of {query}'}, "score": 2.5}]

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def service():
    with Service() as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("igpo_trl.search.network.http_requests.FIRST_PAUSE", 0.02)


def test_sends_requests_and_reads_responses_of_the_protocol(service):
    with_path = HTTPSearch(f"{service.url}/elsewhere/search")
    assert HTTPSearch(f"{service.url}/").search("Dune", k=4) == [Passage("Dune", "Dune", "text of Dune", 2.5)]
    assert with_path.search_batch(["a", "b"]) == [[Passage(q, q, f"text of {q}", 2.5)] for q in "ab"]
    assert service.requests == [
        {"queries": ["Dune"], "topk": 4, "return_scores": True, "path": "/retrieve"},
        {"queries": ["a", "b"], "topk": 3, "return_scores": True, "path": "/elsewhere/search"},
    ]
    assert with_path.search_batch([]) == []
    assert len(service.requests) == 2


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"document": {"id": 7, "contents": '"T"\nx\ny'}, "score": 0.5}, Passage("7", "T", "x\ny", 0.5)),
        ({"document": {"id": "7", "contents": "T\nx"}}, Passage("7", "T", "x", 1.0)),
        ({"id": "7", "contents": '"The "T""\nx'}, Passage("7", 'The "T"', "x", 1.0)),
        ({"id": "7", "contents": '""\nx'}, Passage("7", "", "x", 1.0)),
        ({"id": "7", "contents": "only text"}, Passage("7", "", "only text", 1.0)),
        ({"id": "7", "title": "T", "text": "x"}, Passage("7", "T", "x", 1.0)),
        ({"id": "7", "title": "T", "text": "x", "contents": '"T"\nx'}, Passage("7", "T", "x", 1.0)),
        ({"id": "7", "title": "T\nU", "contents": '"T U"\nx'}, Passage("7", "T\nU", "x", 1.0)),
        ({"id": "7", "content": '"T"\nx', "title": None}, Passage("7", "T", "x", 1.0)),
        ({"document": {"contents": '"T"\nx'}, "score": None}, Passage("1a1a2b6bc9bfa25d", "T", "x", 1.0)),
        ('"T"\nx', Passage("1a1a2b6bc9bfa25d", "T", "x", 1.0)),
    ],
)
def test_documents_come_in_several_forms(item, expected):
    with Service(lambda body, number: (200, {"result": [[item]]}, {})) as service:
        (found,) = HTTPSearch(service.url).search("x")
    if expected.id == "1a1a2b6bc9bfa25d":  # made from title and text
        assert len(found.id) == 16
        expected = Passage(found.id, expected.title, expected.text, expected.score)
    assert found == expected


def test_passages_without_an_id_get_one_that_depends_on_what_they_say():
    results = {"result": [["A\nx", "A\nx", "A\ny", "B\nx"]]}
    with Service(lambda body, number: (200, results, {})) as service:
        ids = [p.id for p in HTTPSearch(service.url).search("x", k=4)]
    assert ids[0] == ids[1] and len(set(ids)) == 3


def test_surplus_documents_are_dropped_and_ranks_replace_missing_scores():
    with Service(lambda body, number: (200, {"result": [["a\nx"] * 10]}, {})) as service:
        assert [p.score for p in HTTPSearch(service.url).search("x", k=3)] == [1, 1 / 2, 1 / 3]


def test_a_long_batch_is_split(service):
    queries = [str(i) for i in range(10)]
    found = HTTPSearch(service.url, max_batch=4).search_batch(queries)
    assert [[p.id for p in passages] for passages in found] == [[query] for query in queries]
    assert [len(request["queries"]) for request in service.requests] == [4, 4, 2]


def test_what_a_policy_sends_arrives_encodable(service):
    assert HTTPSearch(service.url).search("a\ud83d\x00\U0001f30a")[0].id == "a\ufffd\x00\U0001f30a"


@pytest.mark.parametrize("trouble", [503, 429, 500, None, "garbled"])
def test_tries_again_after_temporary_trouble(trouble):
    def answer(body, number):
        if number >= 3:
            return 200, {"result": [Service.found(q) for q in body["queries"]]}, {}
        if trouble == "garbled":  # claims to be gzip
            return 200, b"xxxx", {"Content-Encoding": "gzip"}
        return trouble, b"busy", {}

    with Service(answer) as service:
        assert HTTPSearch(service.url).search("a")[0].id == "a"
    assert len(service.requests) == 3


def test_a_service_that_is_started_a_little_later_is_found():
    with Service() as service:
        port = service.server.server_port
    later = threading.Timer(0.2, lambda: started.append(Service(port=port).__enter__()))
    started: list[Service] = []
    later.start()
    assert HTTPSearch(f"http://127.0.0.1:{port}", max_attempts=10).search("a")[0].id == "a"
    later.join()
    started[0].__exit__()


def test_connections_that_the_service_closes_between_requests_are_replaced(service):
    client = HTTPSearch(service.url, max_attempts=2)
    service.hang_up = True
    for i in range(4):
        assert client.search(str(i))[0].id == str(i)
        time.sleep(0.02)
    assert len(service.connections) == 4


def test_waits_as_long_as_the_service_asks():
    def answer(body, number):
        if number == 1:
            return 429, b"", {"Retry-After": "1"}
        return 200, {"result": [[]]}, {}

    with Service(answer) as service:
        assert HTTPSearch(service.url).search("a") == []
        first, second = service.times
    assert 1.0 <= second - first < 2.0


def test_gives_up_at_once_if_the_service_asks_for_a_very_long_wait():
    with Service(lambda body, number: (503, b"closed", {"Retry-After": "3600"})) as service:
        with pytest.raises(SearchError, match=r"503 .*'closed' \(asked to wait 3600 s\)"):
            HTTPSearch(service.url).search("a")
    assert len(service.requests) == 1


def test_a_pause_is_given_in_seconds_or_as_a_date():
    assert retry_after("2.5") == 2.5
    assert retry_after("-1") == 0.0
    assert retry_after(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert retry_after(formatdate(time.time() - 30, usegmt=True)) == 0.0
    assert retry_after("soon") is None
    assert retry_after(None) is None


def test_gives_up_after_max_attempts_and_says_what_happened():
    with Service(lambda body, number: (500, b"<h1>out of\n memory</h1>" + b"x" * 1000, {})) as service:
        with pytest.raises(SearchError) as error:
            HTTPSearch(service.url, max_attempts=3).search("a")
    assert len(service.requests) == 3
    text = str(error.value)
    assert f"POST {service.url}/retrieve answered 500" in text
    assert "'<h1>out of memory</h1>xxx" in text and text.endswith("…' (3 attempts)")
    assert len(text) < 500


def test_no_second_attempt_after_permanent_errors():
    with Service(lambda body, number: (404, b'{"detail": "Not Found"}', {})) as service:
        with pytest.raises(SearchError, match=r"answered 404 .*Not Found.*Expected a search server \(`igpo serve`"):
            HTTPSearch(service.url).search("a")
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>Welcome to nginx!</html>", "not JSON: '<html>Welcome to nginx!</html>' Expected a search server"),
        ({"results": []}, r"no 'result'\): .* Expected a search server"),
        ([], "another form"),
        ({"result": []}, "0 lists of documents, expected 1"),
        ({"result": "none"}, "str lists of documents, expected 1"),
        ({"result": [[{"id": 1}]]}, "neither `contents` nor `text`"),
        ({"result": [[{"document": {"contents": 3}}]]}, "neither `contents` nor `text`"),
        ({"result": [[3]]}, "another form"),
        ({"result": [3]}, "another form"),
        ({"result": [[{"document": {"contents": "a"}, "score": "high"}]]}, "could not convert"),
    ],
)
def test_an_answer_of_another_form_is_shown(answer, message):
    with Service(lambda body, number: (200, answer, {})) as service:
        with pytest.raises(SearchError, match=message) as error:
            HTTPSearch(service.url).search("a")
    assert service.url in str(error.value)


def test_no_server():
    with pytest.raises(
        SearchError, match=r"POST http://127.0.0.1:9/retrieve: cannot connect .*running.*\(2 attempts\)"
    ):
        HTTPSearch("http://127.0.0.1:9", max_attempts=2).search("a")


def test_a_service_that_does_not_respond_in_time():
    release = threading.Event()

    def answer(body, number):
        release.wait(5)
        return 200, {"result": [[]]}, {}

    with Service(answer) as service:
        start = time.monotonic()
        with pytest.raises(SearchError, match=r"no answer within 0.2 s \(ReadTimeout\)\. \(2 attempts\)"):
            HTTPSearch(service.url, timeout=0.2, max_attempts=2).search("a")
        assert time.monotonic() - start < 4.5
        release.set()


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host/retrieve", "http://", "localhost", "http://host:port", 5]
)
def test_invalid_addresses(url):
    with pytest.raises(ValueError, match="got url="):
        HTTPSearch(url)


@pytest.mark.parametrize("name", ["timeout", "max_attempts", "max_batch", "max_connections"])
def test_impossible_options(name):
    with pytest.raises(ValueError, match=f"got {name}=0"):
        HTTPSearch("http://127.0.0.1:1", **{name: 0})


def test_impossible_requests(service):
    with pytest.raises(ValueError, match="k=0"):
        HTTPSearch(service.url).search("a", k=0)
    with pytest.raises(TypeError, match="a string"):
        HTTPSearch(service.url).search_batch("a")


def test_connections_are_reused_by_one_thread_and_not_shared_at_a_time_by_many(service):
    client = HTTPSearch(service.url)
    for i in range(5):
        client.search(str(i))
    assert len(service.connections) == 1
    found: dict[int, list[str]] = {}

    def work(i):
        found[i] = [client.search(f"{i}-{j}")[0].id for j in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [f"{i}-{j}" for j in range(10)] for i in range(8)}
    assert len(service.connections) <= 9
    client.close()
    assert client.search("again")


def _search_in_a_child(client, queue):
    queue.put((os.getpid(), [client.search(str(i))[0].id for i in range(20)]))


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_every_process_has_its_own_connections(service, how):
    client = HTTPSearch(service.url)
    client.search("before")
    (mine,) = service.connections
    context = multiprocessing.get_context(how)
    queue = context.Queue()
    children = [context.Process(target=_search_in_a_child, args=(client, queue)) for _ in range(2)]
    for child in children:
        child.start()
    mixed = [client.search(f"parent {i}")[0].id for i in range(20)]
    results = [queue.get(timeout=300) for _ in children]
    for child in children:
        child.join()
    assert mixed == [f"parent {i}" for i in range(20)]
    assert [ids for _, ids in results] == [[str(i) for i in range(20)]] * 2
    assert len(service.connections) == 3 and mine in service.connections


def test_pickled_it_is_the_same_and_shows_no_password(service, caplog):
    caplog.set_level(logging.DEBUG)
    url = service.url.replace("http://", "http://user:hunter2@")
    client = HTTPSearch(url, max_batch=3)
    client.search("a")
    copy = pickle.loads(pickle.dumps(client))
    assert copy.search_batch(list("abcd")) == client.search_batch(list("abcd"))
    assert service.headers["Authorization"] == "Basic dXNlcjpodW50ZXIy"
    assert repr(client) == repr(copy) == f"HTTPSearch('{service.url}/retrieve')"
    with Service(lambda body, number: (403, b"no", {})) as other:
        with pytest.raises(SearchError) as error:
            HTTPSearch(other.url.replace("http://", "http://user:hunter2@")).search("a")
    assert "hunter2" not in f"{error.value!r} {client!r} {caplog.text}"


def test_proxies_of_the_environment_are_not_used_unless_wanted(service, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert HTTPSearch(service.url).search("a")
    with pytest.raises(SearchError, match="cannot connect"):
        HTTPSearch(service.url, trust_env=True, max_attempts=1).search("a")


def test_open_search_takes_an_address(service):
    index = open_search(service.url)
    assert isinstance(index, HTTPSearch)
    assert index.search("a")[0].id == "a"


def test_the_search_tool_sends_one_request_per_round_and_failures_become_observations(service):
    runner = ToolRunner()
    tool = SearchTool(HTTPSearch(service.url, max_attempts=1), k=1)
    results = runner.run([ToolCall("search", {"query": q}, tool) for q in ("Dune", "Tacoma", "Dune")])
    assert [r.text for r in results] == [f"[1] {q}\ntext of {q}" for q in ("Dune", "Tacoma", "Dune")]
    assert len(service.requests) == 1
    service.answer = lambda body, number: (500, b"broken", {})
    (failed,) = runner.run([ToolCall("search", {"query": "Dune"}, tool)])
    assert failed.error == ToolErrorKind.RAISED and "answered 500" in failed.text
    runner.close()
