"""`igpo index`, `igpo search` and `igpo serve` from the command line."""

import json
import re
import signal
import subprocess
import sys

import pytest
from test_search import PASSAGES, write
from test_search_dense import make_model
from typer.testing import CliRunner

from igpo_trl.cli.app import app
from igpo_trl.search import BM25Index, DenseIndex, HybridIndex, load_index


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "corpus.jsonl.gz")


@pytest.fixture
def built(run, corpus, tmp_path):
    assert run("index", "--corpus", corpus, "--out", tmp_path / "bm25").exit_code == 0
    return tmp_path / "bm25"


def test_index_has_the_defaults_of_the_classes(run, corpus, tmp_path):
    model = make_model(tmp_path / "model")
    for kind, expected in (
        ("bm25", lambda out: BM25Index.build(corpus, directory=out, show_progress=False)),
        ("dense", lambda out: DenseIndex.build(corpus, out, model=model, show_progress=False)),
        ("hybrid", lambda out: HybridIndex.build(corpus, out, model=model, show_progress=False)),
    ):
        options = [] if kind == "bm25" else ["--model", model]
        result = run("index", "--corpus", corpus, "--kind", kind, "--out", tmp_path / kind, *options)
        assert result.exit_code == 0, result.output
        assert re.search(rf"Indexed 4 passages in [\d.]+ s: .*{kind} \({kind}, [\d.]+ MB\)", result.output)
        expected(tmp_path / "expected")
        for path in (tmp_path / "expected").rglob("*.json"):
            assert (tmp_path / kind / path.relative_to(tmp_path / "expected")).read_text() == path.read_text()


def test_index_passes_its_options_on(run, corpus, tmp_path):
    model, out = make_model(tmp_path / "model"), tmp_path / "index"
    options = [
        "--structure",
        "hnsw",
        "--dtype",
        "float32",
        "--query-prompt",
        "snow ",
        "--k1",
        1.5,
        "--stemmer",
        "none",
        "--stopwords",
        "none",
    ]
    result = run("index", "--corpus", corpus, "--kind", "hybrid", "--model", model, "--out", out, *options)
    assert result.exit_code == 0, result.output
    dense, bm25 = (json.loads((out / part / "manifest.json").read_text()) for part in ("dense", "bm25"))
    assert (dense["structure"], dense["dtype"], dense["query_prompt"]) == ("hnsw", "float32", "snow ")
    assert (bm25["k1"], bm25["b"], bm25["stopwords"], bm25["stemmer"]) == (1.5, 0.4, None, None)


def test_index_takes_several_files(run, tmp_path):
    first, second = write(tmp_path / "1.jsonl", PASSAGES[:2]), write(tmp_path / "2.jsonl", PASSAGES[2:])
    assert run("index", "--corpus", first, "--corpus", second, "--out", tmp_path / "x").exit_code == 0
    assert len(load_index(tmp_path / "x")) == 4


def test_search_prints_what_a_policy_would_read(run, built):
    result = run("search", "--index", built, "Herbert", "-k", 2, "--max-words", 3)
    assert result.exit_code == 0
    assert "Frank Herbert" in result.output and "An American writer, …" in result.output
    assert re.search(r"b · score [\d.]+", result.output) and "2 passages in" in result.output
    result = run("search", "--index", built, "port city", "[red]xyzzy[/red]")
    assert "Tacoma" in result.output and "No passage matches '[red]xyzzy[/red]'" in result.output


def test_search_prints_json(run, built):
    result = run("search", "--index", built, "--json", "Puget", "xyzzy")
    first, second = map(json.loads, result.output.splitlines())
    (passage,) = first["passages"]
    assert (first["query"], passage["id"], passage["text"]) == ("Puget", "c", PASSAGES[2]["text"])
    assert passage["score"] > 0 and second == {"query": "xyzzy", "passages": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "--corpus", "absent.jsonl", "--out", "DIR/x"], "Error: no such file: absent.jsonl"),
        (["index", "--corpus", "DIR/bad.jsonl", "--out", "DIR/x"], r"bad\.jsonl:1: no field `text`"),
        (["index", "--corpus", "DIR/corpus.jsonl.gz", "--out", "DIR/thesis"], "thesis exists and is not an index"),
        (["index", "--corpus", "DIR/corpus.jsonl.gz", "--out", "DIR/x", "--b", "2"], "expected k1 of at least 0"),
        (
            ["index", "--corpus", "DIR/corpus.jsonl.gz", "--out", "DIR/x", "--kind", "dense", "--model", "/absent"],
            "no such model: /absent",
        ),
        (["search", "--index", "absent", "x"], "Error: no index in absent"),
        (["search", "--index", "ftp://x", "x"], "Error: got 'ftp://x'"),
        (["serve", "--index", "absent"], "Error: no index in absent"),
    ],
)
def test_errors_of_the_user_end_in_one_line(run, tmp_path, corpus, arguments, message):
    write(tmp_path / "bad.jsonl", [{"id": 1, "title": ""}])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/text").write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    result = run(*(argument.replace("DIR", str(tmp_path)) for argument in arguments))
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    assert re.search(message, line)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--kind", "dense"], "needs a model"), (["--model", "m"], "has no model"), (["--kind", "x"], "is not one of")],
)
def test_contradictory_options_are_refused(run, corpus, tmp_path, options, message):
    result = run("index", "--corpus", corpus, "--out", tmp_path / "x", *options)
    assert result.exit_code == 2 and message in result.output


def test_serve_answers_what_search_asks(run, built):
    command = [sys.executable, "-m", "igpo_trl", "serve", "--index", str(built), "--port", "0", "--max-queries", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://[\d.:]+", process.stdout.readline())[0]
        result = run("search", "--index", address, "Puget", "xyzzy", "--json")
        assert result.exit_code == 0, result.output
        found = [json.loads(line)["passages"] for line in result.output.splitlines()]
        assert [[p["title"] for p in passages] for passages in found] == [["Tacoma"], []]
        result = run("search", "--index", address, "Puget", "xyzzy", "Dune")
        assert result.exit_code == 1 and "got 3 queries, expected at most 2" in result.stderr
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    result = run("search", "--index", address, "Puget")
    assert result.exit_code == 1 and "cannot connect" in result.stderr
    assert len(result.stderr.splitlines()) == 1
