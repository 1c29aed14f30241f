"""The search server: its protocol, batches of concurrent requests, bad requests, shutdown."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn

from igpo_trl.search import BM25Index, HTTPSearch, Passage, create_app, serve
from igpo_trl.search.network.server import listen

PASSAGES = [
    {"id": "a", "title": "Dune (novel)", "text": "A 1965 epic science fiction novel by American Frank Herbert."},
    {"id": "b", "title": "Frank Herbert", "text": "An American writer,\nborn in Tacoma."},
    {"id": "c", "title": "Tacoma", "text": "A port city on Puget Sound – 51 km from Seattle. \U0001f30a"},
    {"id": 4, "title": "", "text": "Nothing in particular\n\nhappens here."},
    {"id": 5, "title": 'The "Odd"\ntitle', "text": "Peculiar."},
]


class Recorder:
    """A slow index that records its calls."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.calls: list[tuple[list[str], int]] = []

    def search(self, query, k=3):
        return self.search_batch([query], k)[0]

    def search_batch(self, queries, k=3):
        self.calls.append((list(queries), k))
        time.sleep(self.seconds)
        if "bad" in queries:
            raise ValueError("this index knows no bad queries")
        return [[Passage(f"{query}-{rank}", "", query, 1.0 / rank) for rank in range(1, k + 1)] for query in queries]


class Running:
    """A server in a thread."""

    def __init__(self, index, **limits) -> None:
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(create_app(index, **limits), log_level="critical"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join(60)
        self.listener.close()


def post(url, body, path="/retrieve"):
    """Status and decoded answer, without our client."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def index():
    return BM25Index.build(PASSAGES, show_progress=False)


@pytest.fixture(scope="module")
def server(index):
    with Running(index, max_queries=8, max_topk=5, max_body=2000, topk=2) as running:
        yield running


def test_answers_with_documents_and_scores(server, index):
    status, answer = post(server.url, {"queries": ["Tacoma", "xyzzy"], "topk": 1, "return_scores": True})
    (found,) = index.search("Tacoma", k=1)
    contents = '"Tacoma"\nA port city on Puget Sound – 51 km from Seattle. \U0001f30a'
    document = {"id": "c", "title": "Tacoma", "contents": contents}
    assert (status, answer) == (200, {"result": [[{"document": document, "score": found.score}], []]})


@pytest.mark.parametrize("options", [{}, {"topk": None}, {"topk": 0}, {"return_scores": False}])
def test_without_scores_a_result_is_the_document_and_without_topk_the_default_applies(server, options):
    status, answer = post(server.url, {"queries": ["American Tacoma writer novel"], **options})
    assert status == 200
    assert [document["id"] for document in answer["result"][0]] == ["b", "a"]
    assert set(answer["result"][0][0]) == {"id", "title", "contents"}


def test_a_client_that_does_what_that_of_search_r1_does(server):
    """One request for all queries with scores; title from the first line of `contents`, text from the others."""
    status, answer = post(server.url, {"queries": ["peculiar", "Tacoma Herbert"], "topk": 2, "return_scores": True})
    shown = []
    for documents in answer["result"]:
        lines = [hit["document"]["contents"].split("\n") for hit in documents]
        shown.append([(first, "\n".join(rest)) for first, *rest in lines])
    assert shown == [
        [('"The "Odd" title"', "Peculiar.")],
        [
            ('"Frank Herbert"', "An American writer,\nborn in Tacoma."),
            ('"Tacoma"', "A port city on Puget Sound – 51 km from Seattle. \U0001f30a"),
        ],
    ]


@pytest.mark.parametrize("queries", ["queries", "query"])
@pytest.mark.parametrize("topk", ["topk", "top_k", "k"])
@pytest.mark.parametrize("one", ["American Tacoma writer novel", ["American Tacoma writer novel"]])
def test_the_names_of_other_clients_are_read_and_so_is_a_single_string(server, queries, topk, one):
    status, answer = post(server.url, {queries: one, topk: 1})
    assert status == 200
    assert [[document["id"] for document in documents] for documents in answer["result"]] == [["b"]]


def test_one_request_for_all_rollouts_of_search_r1():
    """512 prompts with 5 rollouts each, and queries of 500 tokens that are all escaped."""
    queries = [f"{i} " + "\N{CJK UNIFIED IDEOGRAPH-5B57}" * 750 for i in range(2560)]
    index = Recorder()
    with Running(index) as running:
        status, answer = post(running.url, {"queries": queries, "topk": 1, "return_scores": True})
    assert status == 200
    assert [hits[0]["document"]["id"] for hits in answer["result"]] == [f"{query}-1" for query in queries]
    assert max(len(batch) for batch, _ in index.calls) == 256


def test_the_client_of_this_package_gets_what_the_index_gives(server, index):
    queries = ["Tacoma", "", "xyzzy", "Frank Herbert", "particular", "peculiar", "1965 \ud83d"]
    client = HTTPSearch(server.url)
    assert client.search_batch(queries, k=5) == index.search_batch([*queries[:-1], "1965 \ufffd"], k=5)
    assert client.search("Tacoma") == index.search("Tacoma")
    assert client.search_batch([]) == []
    client.close()


def test_health(server):
    with urllib.request.urlopen(server.url + "/health", timeout=60) as response:
        about = json.load(response)
    assert {**about, "version": ""} == {"status": "ok", "kind": "BM25Index", "passages": 5, "version": ""}
    with Running(Recorder()) as running, urllib.request.urlopen(running.url + "/health", timeout=60) as response:
        assert json.load(response)["passages"] is None  # an index that does not know


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"not json", 400, "Invalid JSON"),
        (b'{"queries": ["\xff"]}', 400, "Invalid JSON"),
        ({"queries": {"a": 1}}, 422, "`queries`: .*array"),
        ({"queries": None}, 422, "`queries`: .*array"),
        ({"queries": ["a", 1]}, 422, r"`queries.1`: .*string"),
        ({"query": ["a", 1]}, 422, r"`query.1`: .*string"),
        ({"topk": 1}, 422, "`queries`: Field required"),
        ({"queries": ["a"], "top_n": 1}, 422, "`top_n`: no such field.*did you mean `top_k`"),
        ({"queries": ["a"], "topk_retrieval": 9}, 422, "`topk_retrieval`: no such field.*Expected .*topk"),
        ({"queries": ["a"], "return_score": True}, 422, "`return_score`: no such field.*`return_scores`"),
        ({"Queries": ["a"]}, 422, "`Queries`: no such field.*did you mean `queries`"),
        ({"queries": ["a"], "query": "b"}, 422, "`query`: another name of a field that the request has"),
        ({"queries": ["a"], "topk": 2, "k": 3}, 422, "`k`: another name of a field"),
        (["a"], 422, "object"),
        ({"queries": ["a"] * 9}, 422, "`queries`: got 9 queries, expected at most 8.*--max-queries"),
        ({"queries": ["a"], "topk": 6}, 422, "`topk`: got 6, expected at most 5.*--max-topk"),
        ({"queries": ["a"], "k": 6}, 422, "`k`: got 6, expected at most 5"),
        ({"queries": ["a"], "top_k": 1.5}, 422, "`top_k`: .*integer"),
        ({"queries": ["a"], "topk": -1}, 422, "`topk`: .*greater than or equal to 0"),
        ({"queries": ["a" * 2000]}, 413, "longer than 2000 bytes.*max_body"),
    ],
)
def test_a_bad_request_gets_an_explanation(server, body, status, message):
    got, answer = post(server.url, body)
    assert got == status
    assert set(answer) == {"error"}
    assert re.search(message, answer["error"]), answer


def test_another_path_or_method_gets_an_explanation(server):
    for path, method, status in (("/search", "POST", 404), ("/retrieve", "GET", 405)):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request(method, path, b"{}" if method == "POST" else None)
        response = connection.getresponse()
        assert response.status == status
        assert "Expected POST /retrieve or GET /health" in json.load(response)["error"]
        connection.close()


def test_a_body_without_a_length_is_cut_off_too(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/retrieve", iter([b"[" * 1500] * 2), encode_chunked=True)
    response = connection.getresponse()
    assert (response.status, "longer" in response.read().decode()) == (413, True)
    connection.close()


def test_concurrent_requests_share_calls_of_the_index_and_each_gets_its_own_answer():
    index = Recorder(seconds=0.05)
    with Running(index, max_wait=0.05, max_batch=64) as running:
        client = HTTPSearch(running.url)
        with ThreadPoolExecutor(32) as threads:
            found = list(threads.map(lambda i: client.search(f"q{i}", k=2), range(64)))
        client.close()
    assert [[p.id for p in passages] for passages in found] == [[f"q{i}-1", f"q{i}-2"] for i in range(64)]
    assert sorted(query for queries, _ in index.calls for query in queries) == sorted(f"q{i}" for i in range(64))
    assert len(index.calls) <= 32  # one by one it would be 64; a few on an idle machine
    assert max(len(queries) for queries, _ in index.calls) >= 4


def test_an_idle_index_waits_for_further_queries_unless_the_batch_is_full():
    index = Recorder()
    with Running(index, max_wait=1.5, max_batch=2) as running, ThreadPoolExecutor(2) as threads:
        first = threads.submit(post, running.url, {"queries": ["a"]})
        time.sleep(0.1)
        start = time.monotonic()
        post(running.url, {"queries": ["b"]})
        first.result()
        assert time.monotonic() - start < 1.2  # not the rest of the 1.5 s
        assert [queries for queries, _ in index.calls] == [["a", "b"]]
        start = time.monotonic()
        post(running.url, {"queries": ["c"]})
        assert time.monotonic() - start >= 1.5


def test_an_answer_does_not_wait_for_an_acknowledgement():
    with Running(Recorder()) as running:
        client = HTTPSearch(running.url)
        times = []
        for _ in range(15):
            start = time.perf_counter()
            client.search("a")
            times.append(time.perf_counter() - start)
        client.close()
    assert min(times) < 0.03  # 0.04 or more for all of them if the system delays small packets


def test_a_call_of_the_index_has_one_k_and_at_most_max_batch_queries():
    index = Recorder(seconds=0.3)  # long enough for others to arrive meanwhile, on a busy machine too
    with Running(index, max_wait=0.1, max_batch=5) as running:
        client = HTTPSearch(running.url)
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda i: client.search_batch([f"{i}a", f"{i}b"], k=1 + i % 2), range(8)))
        client.close()
    assert [[[p.id for p in passages] for passages in one] for one in found] == [
        [[f"{i}{x}-{rank}" for rank in range(1, 2 + i % 2)] for x in "ab"] for i in range(8)
    ]
    assert 2 < max(len(queries) for queries, _ in index.calls) <= 5
    assert all((int(query[0]) % 2 == k - 1) for queries, k in index.calls for query in queries)


def test_a_query_on_which_the_index_fails_fails_alone(caplog):
    index = Recorder(seconds=0.05)
    with Running(index, max_wait=0.1) as running:
        with ThreadPoolExecutor(3) as threads:
            answers = list(threads.map(lambda q: post(running.url, {"queries": [q]}), ["good", "bad", "fine"]))
    assert [status for status, _ in answers] == [200, 500, 200]
    assert answers[1][1] == {"error": "the index failed: ValueError: this index knows no bad queries"}
    assert "failed on the query 'bad'" in caplog.text


def test_too_many_waiting_queries_get_status_503():
    index = Recorder(seconds=0.3)
    with Running(index, max_wait=0.0, max_batch=1, max_waiting=2) as running:
        client = HTTPSearch(running.url, max_attempts=10)
        with ThreadPoolExecutor(6) as threads:
            statuses = list(threads.map(lambda i: post(running.url, {"queries": [f"{i}"]})[0], range(6)))
            assert set(statuses) == {200, 503}
            found = list(threads.map(lambda i: client.search(f"{i}", k=1), range(4)))  # waits and tries again
        client.close()
    assert [passages[0].id for passages in found] == ["0-1", "1-1", "2-1", "3-1"]


SCRIPT = """
import sys, time
from igpo_trl.search import Passage, serve

class Slow:
    def __len__(self):
        return 1234
    def search_batch(self, queries, k=3):
        time.sleep(1.0)
        return [[Passage("1", "", query)] for query in queries]

serve(Slow(), port=0)
print("ended", flush=True)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_prints_its_address_and_finishes_requests_in_progress_before_it_ends(sent):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("Serving 1,234 passages (Slow) at http://127.0.0.1:")
        url = line.split()[-1].removesuffix("/retrieve")
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(post, url, {"queries": ["late"]})
            time.sleep(0.4)
            process.send_signal(sent)
            status, body = answer.result()
        assert (status, body["result"][0][0]["contents"]) == (200, '""\nlate')
        rest, _ = process.communicate(timeout=60)
        if sent == signal.SIGINT:
            assert (process.returncode, rest) == (0, "ended\n")
        else:  # ends with the signal
            assert process.returncode == -signal.SIGTERM
        with pytest.raises(urllib.error.URLError):
            post(url, {"queries": ["too late"]})
    finally:
        process.kill()
        process.communicate()


def test_a_port_in_use_and_impossible_limits_are_named_before_anything_starts(server, index):
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1, port {server.port}: .*in use.*0: a free one"):
        serve(index, port=server.port)
    with pytest.raises(OSError, match="cannot listen on no-such-host.invalid"):
        serve(index, host="no-such-host.invalid", port=0)
    with pytest.raises(ValueError, match="port=70000"):
        serve(index, port=70000)
    with pytest.raises(ValueError, match="max_batch=0"):
        create_app(index, max_batch=0)
    with pytest.raises(ValueError, match="topk=4, expected at most max_topk=3"):
        create_app(index, topk=4, max_topk=3)
    with pytest.raises(ValueError, match="max_wait=-1"):
        create_app(index, max_wait=-1)


def test_without_starlette_the_error_names_the_extra(index):
    code = "import sys; sys.modules['starlette'] = None\nfrom igpo_trl.search import create_app; create_app(None)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert 'pip install "igpo-trl[serve]"' in result.stderr
