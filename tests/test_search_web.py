"""Search of the web: the protocol, the cache and its modes, the rate, and that the key reaches nothing."""

import logging
import multiprocessing
import pickle
import sqlite3
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_search_http import Service

from igpo_trl.rollout import ToolCall, ToolRunner
from igpo_trl.search import CacheMiss, Passage, Searchable, SearchError, SearchTool, WebSearch
from igpo_trl.search.network.response_cache import FILE, ResponseCache
from igpo_trl.trajectory import Trajectory, Turn, write_jsonl

KEY = "5ecret0123456789abcdef"


def organic(query, number):
    return [
        {
            "title": f"{query} {i}",
            "link": f"https://example.org/{query}/{i}",
            "snippet": f"about {query}",
            "position": i,
        }
        for i in range(1, number + 1)
    ]


def web(body, number):
    if "fail" in body["q"]:
        return 403, {"message": "Unauthorized."}, {}
    return 200, {"searchParameters": {"q": body["q"]}, "organic": organic(body["q"], body["num"])}, {}


@pytest.fixture
def service():
    with Service(web) as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", KEY)
    monkeypatch.setattr("igpo_trl.search.network.http_requests.FIRST_PAUSE", 0.02)


def make(service, cache=None, **options):
    return WebSearch(cache, **{"endpoint": f"{service.url}/search", "requests_per_second": None, **options})


def test_asks_as_the_service_expects_and_reads_its_results(service):
    found = make(service, parameters={"gl": "us"}).search("who  wrote\nDune", k=2)
    assert found == [
        Passage(f"https://example.org/who wrote Dune/{i}", f"who wrote Dune {i}", "about who wrote Dune", 1 / i)
        for i in (1, 2)
    ]
    assert service.requests == [{"q": "who wrote Dune", "num": 2, "gl": "us", "path": "/search"}]
    assert service.headers["X-API-KEY"] == KEY
    assert isinstance(make(service), Searchable)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"searchParameters": {}}, []),
        ({"organic": [{"title": "no link"}, 3, {"link": "l"}]}, [Passage("l", "", "", 1.0)]),
        ({"organic": [{"link": "l", "title": None, "snippet": "\ud83d"}]}, [Passage("l", "", "\ud83d", 1.0)]),
    ],
)
def test_results_may_lack_something(tmp_path, answer, expected):
    with Service(lambda body, number: (200, answer, {})) as service:
        assert make(service, tmp_path).search("a") == expected
        assert make(service, tmp_path, mode="replay").search("a") == expected


@pytest.mark.parametrize("answer", [{"message": "hello"}, [], {"organic": {}}, b"<html>"])
def test_an_answer_of_another_form_is_shown_and_not_stored(tmp_path, answer):
    with Service(lambda body, number: (200, answer, {})) as service:
        with pytest.raises(SearchError, match="(?s)search.*Expected a service that takes POST"):
            make(service, tmp_path).search("a")
        with pytest.raises(CacheMiss):
            make(service, tmp_path, mode="replay").search("a")


def test_a_batch_asks_once_for_equal_queries_and_at_the_same_time_for_others(service):
    busy, most = [], []

    def slow(body, number):
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.1)
        busy.pop()
        return web(body, number)

    service.answer = slow
    found = make(service, max_concurrent=4).search_batch(["a", "b", " a ", "", "c", "d", "e", "f", "g", "h"], k=1)
    assert [[p.title for p in one] for one in found] == [
        ["a 1"], ["b 1"], ["a 1"], [], *([f"{x} 1"] for x in "cdefgh"),
    ]  # fmt: skip
    assert sorted(request["q"] for request in service.requests) == list("abcdefgh")
    assert 2 <= max(most) <= 4


# The cache


def test_live_pays_once(service, tmp_path):
    first = make(service, tmp_path).search_batch(["a", "b"])
    assert make(service, tmp_path).search_batch(["b", "a", "c"])[:2] == first[::-1]
    assert [request["q"] for request in service.requests[2:]] == ["c"]


def test_results_for_more_serve_for_fewer_and_not_the_other_way_round(service, tmp_path):
    index = make(service, tmp_path)
    index.search("a", k=5)
    assert [p.title for p in index.search("a", k=2)] == ["a 1", "a 2"]
    assert len(service.requests) == 1
    assert len(index.search("a", k=6)) == 6
    assert len(service.requests) == 2


def test_other_parameters_and_services_have_other_answers(service, tmp_path):
    make(service, tmp_path).search("a")
    make(service, tmp_path, parameters={"gl": "de"}).search("a")
    make(service, tmp_path, endpoint=f"{service.url}/other").search("a")
    assert len(service.requests) == 3


def test_record_fetches_everything_and_replay_fetches_nothing(service, tmp_path, monkeypatch):
    make(service, tmp_path).search("a")
    service.answer = lambda body, number: (200, {"organic": organic("new", 3)}, {})
    recorded = make(service, tmp_path, mode="record").search_batch(["a", "b"])
    assert recorded[0][0].title == "new 1"
    assert len(service.requests) == 3
    monkeypatch.delenv("SERPER_API_KEY")
    replay = make(service, tmp_path, mode="replay")
    assert replay.search_batch(["b", "a"]) == recorded[::-1]
    with pytest.raises(CacheMiss, match=r"not recorded in .*answers.sqlite with k=3: 'c' and 1 more"):
        replay.search_batch(["a", "c", "d"])
    with pytest.raises(CacheMiss, match="k=4"):
        replay.search("a", k=4)
    empty = make(service, tmp_path, mode="replay", missing="empty")
    assert empty.search_batch(["a", "c"]) == [recorded[0], []]
    assert len(service.requests) == 3


def test_what_was_fetched_before_a_failure_is_kept_and_the_rest_is_not_tried(service, tmp_path):
    index = make(service, tmp_path, max_concurrent=1)
    with pytest.raises(SearchError, match="403 .*Unauthorized"):
        index.search_batch(["a", "fail", "b", "c"])
    assert [request["q"] for request in service.requests] == ["a", "fail"]
    assert make(service, tmp_path, mode="replay").search("a")


def _record(endpoint, directory, queries, queue):
    index = WebSearch(directory, mode="record", endpoint=endpoint, requests_per_second=None)
    queue.put([[p.title for p in found] for query in queries for found in index.search_batch([query, query + "!"])])


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_two_processes_record_into_one_cache_and_a_third_replays(service, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    queries = [f"{i}" for i in range(20)]
    args = (f"{service.url}/search", tmp_path, queries, queue)
    children = [context.Process(target=_record, args=args) for _ in range(2)]
    for child in children:
        child.start()
    recorded = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert recorded[0] == recorded[1]
    assert len(service.requests) == 80
    replay = make(service, tmp_path, mode="replay").search_batch([q + end for q in queries for end in ("", "!")])
    assert [[p.title for p in found] for found in replay] == recorded[0]
    assert len(service.requests) == 80


def test_many_threads_write_and_read_one_cache(tmp_path):
    answers = ResponseCache(tmp_path)

    def work(i):
        for j in range(10):
            answers.put([i, j], {"text": f"{i} {j} ä\ud83d"})
            assert answers.get([i, j]) == {"text": f"{i} {j} ä\ud83d"}

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert all(ResponseCache(tmp_path, "replay").get([i, j]) for i in range(8) for j in range(10))


def test_a_damaged_file_or_another_file_is_reported(service, tmp_path):
    (tmp_path / FILE).write_bytes(b"years of work " * 100)
    with pytest.raises(ValueError, match=f"{FILE} is damaged or not a file of recorded responses"):
        make(service, tmp_path)
    answers = ResponseCache(tmp_path / "other")
    answers.put("a", 1)
    with sqlite3.connect(answers.file) as database:
        database.execute("UPDATE answers SET value = '{cut off'")
    database.close()
    with pytest.raises(ValueError, match="damaged"):
        answers.get("a")


def test_a_cache_can_be_replayed_where_nothing_can_be_written(service, tmp_path):
    make(service, tmp_path / "run").search("a")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE]
    before = (tmp_path / "run" / FILE).read_bytes()
    assert make(service, tmp_path / "run", mode="replay").search("a")
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        ResponseCache(tmp_path / "run", "replay").put("a", 1)
    assert (tmp_path / "run" / FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "reply"}, ValueError, "mode='reply', expected one of 'live', 'record', 'replay'"),
        ({"missing": "ignore"}, ValueError, "missing='ignore', expected one of 'error', 'empty'"),
        ({"mode": "record"}, ValueError, "mode 'record' needs a directory"),
        ({"mode": "replay", "cache": "/nonexistent"}, FileNotFoundError, "nothing was recorded in /nonexistent"),
        ({"requests_per_second": 0}, ValueError, "requests_per_second=0"),
        ({"endpoint": "serper.dev"}, ValueError, "got endpoint='serper.dev'"),
        ({"endpoint": f"https://user:{KEY}@serper.dev"}, ValueError, "user or password"),
    ],
)
def test_impossible_options(options, error, message):
    with pytest.raises(error, match=message) as raised:
        WebSearch(**options)
    assert KEY not in str(raised.value)


# Rate and retries


def test_the_rate_limit_covers_all_threads(service):
    index = make(service, requests_per_second=20, max_concurrent=8)
    started = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(index.search_batch, [list("abcd"), list("efgh")]))
    assert len(service.times) == 8
    # Eight requests have seven gaps of 50 ms. Any of them may be slow to arrive, but none can be early.
    assert 0.34 <= max(service.times) - started < 3


def test_a_busy_service_gets_another_request(service):
    service.answer = lambda body, number: web(body, number) if number > 2 else (429, {"message": "slow down"}, {})
    assert make(service).search("a")
    assert len(service.requests) == 3


# The key


def test_without_a_key_the_error_names_the_variable(service, tmp_path, monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY")
    with pytest.raises(SearchError, match="set the environment variable SERPER_API_KEY"):
        make(service).search("a")
    with pytest.raises(SearchError, match="set the environment variable MY_KEY"):
        make(service, tmp_path, mode="record", key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    assert make(service, key_variable="MY_KEY").search("a")
    assert service.headers["X-API-KEY"] == KEY
    assert len(service.requests) == 1


@pytest.mark.parametrize("bad", [f"{KEY}\r\nX: 1", f"{KEY}ä"])
def test_a_key_that_cannot_be_sent_is_not_shown(service, monkeypatch, bad):
    monkeypatch.setenv("SERPER_API_KEY", bad)
    with pytest.raises(SearchError, match="characters that cannot be sent") as error:
        make(service).search("a")
    assert KEY not in everything(error.value)
    assert not service.requests


def everything(error: BaseException) -> str:
    """Everything that a thorough logger would print of an exception: variables, causes, contexts."""
    shown = []
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        own = [
            frame for frame in traceback.walk_tb(error.__traceback__) if "/tests/" not in frame[0].f_code.co_filename
        ]
        lines = [f"{name} = {value!r}" for frame, _ in own for name, value in frame.f_locals.items()]
        shown += [repr(error), str(error), str(vars(error)), *lines]
        error = error.__cause__ or error.__context__
    return "\n".join(shown)


def test_the_key_reaches_no_log_cache_error_repr_pickle_or_trajectory(service, tmp_path, caplog, capfd):
    logging.getLogger().setLevel(logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    seen = []

    def echo(body, number):
        """A service that sends the key back in every response."""
        if "deny" in body["q"]:
            return 403, {"message": f"the key {KEY} is not valid"}, {}
        if "page" in body["q"]:
            return 200, f"<html>{KEY}</html>".encode(), {}
        if "odd" in body["q"]:
            return 200, {"key": KEY}, {}
        if "away" in body["q"]:
            return 302, f"<a href=/other?key={KEY}>".encode(), {"Location": "/other"}
        if "busy" in body["q"]:
            return 503, KEY.encode(), {}
        return 200, {"organic": [{"link": f"https://x/{KEY}", "title": KEY, "snippet": f"key={KEY}"}]}, {}

    service.answer = echo
    index = make(service, tmp_path / "cache", mode="record", max_attempts=2)
    tool = SearchTool(index, k=1)
    runner = ToolRunner()
    queries = ["deny", "page", "odd", "away", "busy", "fine"]
    for query in queries:
        try:
            seen += [repr(index.search(query))]
        except SearchError as error:
            seen += [everything(error), pickle.dumps(error).decode("latin-1")]
            logging.getLogger("test").exception("failed", exc_info=error)
    assert len(service.requests) == 7 and service.headers["X-API-KEY"] == KEY  # it was sent
    (result,) = runner.run([ToolCall("search", {"query": "fine"}, tool)])
    assert "[secret]" in result.text
    failed = runner.run([ToolCall("search", {"query": query}, tool) for query in queries[:-1]])
    turns = [Turn(text="", observation=one.text) for one in [result, *failed]]
    write_jsonl(tmp_path / "rollouts.jsonl", [Trajectory("q", turns, info={"search": repr(index)})])
    seen += [repr(index), str(vars(index)), pickle.dumps(index).decode("latin-1")]
    copy = pickle.loads(pickle.dumps(index))
    assert copy.search("fine")
    seen += [caplog.text, *capfd.readouterr()]
    assert "503" in caplog.text and "HTTP Request" in caplog.text  # the libraries did log
    for place in seen:
        assert KEY not in place
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {FILE, "rollouts.jsonl"}
    for path in files:
        assert KEY.encode() not in path.read_bytes()
        assert b"[secret]" in path.read_bytes()  # stored uncompressed: the key would be found
    runner.close()
