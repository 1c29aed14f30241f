"""Indexes on disk: builds, kills, damage; and opening any index or server."""

import filecmp
import importlib
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_search import PASSAGES

import igpo_trl.search
from igpo_trl.evaluation import score_retrieval
from igpo_trl.search import (
    BM25Index,
    HTTPSearch,
    HybridIndex,
    Searchable,
    SearchTool,
    create_app,
    load_index,
    open_search,
)
from igpo_trl.search.indexes.directory import file_checksum, new_index
from igpo_trl.search.indexes.passage_file import PassageWriter, StoredPassages, fingerprint
from igpo_trl.search.indexes.tokens import SHARD, CorpusTokenizer
from igpo_trl.search.passages import read_passages


@pytest.fixture
def index() -> BM25Index:
    return BM25Index.build(PASSAGES, show_progress=False)


@pytest.fixture
def saved(index, tmp_path) -> Path:
    index.save(tmp_path / "index")
    return tmp_path / "index"


def test_an_index_built_on_disk_is_the_one_built_in_memory(tmp_path, index):
    built = BM25Index.build(iter(PASSAGES), directory=tmp_path / "index", show_progress=False)
    index.save(tmp_path / "saved")
    files = sorted(path.name for path in (tmp_path / "index").iterdir())
    for name in files:
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name
    for tried in (built, load_index(tmp_path / "index"), load_index(str(tmp_path / "saved"))):
        assert tried.search_batch(["Herbert", "city"]) == index.search_batch(["Herbert", "city"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "saved"]


def test_a_build_that_fails_leaves_nothing_and_the_old_index_as_it_was(tmp_path, saved, index):
    broken = [*PASSAGES, {"id": "x"}]
    for directory in (saved, saved.parent / "new"):
        with pytest.raises(ValueError, match="passage 5"):
            BM25Index.build(broken, directory=directory, show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert load_index(saved).search("Herbert") == index.search("Herbert")


KILLED_BUILD = """
import sys, time
from igpo_trl.search import BM25Index
def corpus():
    for i in range(10**9):
        if i == 20_000:
            print("reading", flush=True)
            time.sleep(600)
            break
        yield {"id": i, "title": "", "text": f"some words {i}"}
BM25Index.build(corpus(), directory=sys.argv[1], show_progress=False)
"""


def count_tokenized(monkeypatch) -> list[str]:
    """A list to which all texts are added that are tokenized after this call."""
    real, texts = CorpusTokenizer.tokenize, []
    monkeypatch.setattr(CorpusTokenizer, "tokenize", lambda self, batch: texts.extend(batch) or real(self, batch))
    return texts


def same_files(first: Path, second: Path) -> None:
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert filecmp.cmp(first / name, second / name, shallow=False), name


def test_a_killed_build_leaves_no_index_and_the_next_one_resumes_it(tmp_path, monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_BUILD, str(tmp_path / "index")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "reading\n"
        for restart in (False, True):  # which must not disturb a running build
            with pytest.raises(BlockingIOError, match="another process is building"):
                BM25Index.build(PASSAGES, directory=tmp_path / "index", restart=restart, show_progress=False)
    finally:
        process.kill()
        process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [".index.partial"]
    with pytest.raises(FileNotFoundError, match="its build was interrupted"):
        load_index(tmp_path / "index")
    with pytest.raises(FileNotFoundError):
        load_index(tmp_path / ".index.partial/index")
    corpus = [{"id": i, "title": "", "text": f"some words {i}"} for i in range(30_000)]
    texts = count_tokenized(monkeypatch)
    BM25Index.build(corpus, directory=tmp_path / "index", show_progress=False)
    assert [text.strip() for text in texts] == [record["text"] for record in corpus[2 * SHARD :]]  # two were complete
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    BM25Index.build(corpus, show_progress=False).save(tmp_path / "whole")
    same_files(tmp_path / "index", tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, 10),  # the last shard, which was not complete
        ({"k1": 1.5, "b": 0.1}, 10),
        ({"title_weight": 1}, 410),
        ({"stopwords": None}, 410),
        ({"stemmer": None}, 410),
        ({"restart": True}, 410),
        ("corrected", 210),
        ("cut off", 110),
        ("damaged", 110),
    ],
)
def test_an_interrupted_build_resumes_with_unchanged_passages(tmp_path, monkeypatch, change, again):
    monkeypatch.setattr("igpo_trl.search.indexes.tokens.SHARD", 100)
    rng = random.Random(0)
    words = ["the", "Éa", "ΑΣ", "İstanbul", "naïve", "東京都", *(f"w{i}ing" for i in range(300)), "w9", "w99"]
    corpus = [{"id": i, "title": rng.choice(words), "text": " ".join(rng.choices(words, k=9))} for i in range(410)]

    with monkeypatch.context() as patch:
        patch.setattr("bm25s.BM25.index", lambda *_, **__: 1 / 0)  # after the tokenization
        with pytest.raises(ZeroDivisionError):
            BM25Index.build(corpus, directory=tmp_path / "index", show_progress=False)
    work = tmp_path / ".index.partial/work"
    assert sorted(path.name for path in work.iterdir()) == [f"{i:06}.npz" for i in range(4)]

    options = {}
    if isinstance(change, dict):
        options = change
    elif change == "corrected":
        corpus[222]["text"] = "other words"  # in the third shard: later words get other ids
    else:
        content = bytearray((work / "000001.npz").read_bytes())
        content[len(content) // 2] ^= 1
        (work / "000001.npz").write_bytes(content[:-50] if change == "cut off" else content)
    texts = count_tokenized(monkeypatch)
    BM25Index.build(corpus, directory=tmp_path / "index", show_progress=False, **options)
    assert len(texts) == again
    assert not (tmp_path / ".index.partial").exists()
    options.pop("restart", None)
    BM25Index.build(corpus, show_progress=False, **options).save(tmp_path / "whole")
    same_files(tmp_path / "index", tmp_path / "whole")


def test_an_index_appears_only_when_its_block_ends(tmp_path):
    with new_index(tmp_path / "index") as (target, work):
        (target / "file").write_text("x")
        (work / "shard").write_text("y")
        assert not (tmp_path / "index").exists()
        number = target.stat().st_ino
    assert (tmp_path / "index/file").read_text() == "x"
    assert (tmp_path / "index").stat().st_ino == number  # renamed, in one step
    with pytest.raises(KeyboardInterrupt), new_index(tmp_path / "other") as (target, work):
        (work / "shard").write_text("y")
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / ".other.partial").iterdir()] in (
        ["work"],
        ["lock", "work"],
        ["work", "lock"],
    )
    with new_index(tmp_path / "other") as (target, work):
        assert (work / "shard").read_text() == "y" and not list(target.iterdir())


def test_checksums_of_large_files_detect_zeros_and_changes(tmp_path):
    path = tmp_path / "large"
    content = np.random.default_rng(0).bytes(5 << 20)
    path.write_bytes(content)
    whole = file_checksum(path)
    assert whole["bytes"] == 5 << 20 and file_checksum(path) == whole
    for start, end in [(0, 10), (5 << 20, 0), (2 << 20, (2 << 20) + (200 << 10))]:
        changed = bytearray(content)
        changed[start:end] = bytes(max(0, end - start))
        path.write_bytes(changed if end else content[:-1] + bytes([content[-1] ^ 1]))
        assert file_checksum(path) != whole


def test_fingerprints_of_different_corpora_differ(tmp_path):
    passages = list(read_passages(PASSAGES))
    with PassageWriter(tmp_path) as writer:
        for passage in passages:
            writer.write(passage)
    assert writer.fingerprint == fingerprint(passages)
    assert len({fingerprint(p) for p in (passages, passages[:-1], passages[::-1])}) == 3
    stored = StoredPassages(tmp_path)
    assert list(stored) == passages
    for part in (slice(None), slice(1, 3), slice(-1, None), slice(None, None, -2), slice(2, 2), slice(9, 12)):
        assert stored[part] == passages[part]
    assert pickle.loads(pickle.dumps(stored))[1] == passages[1]


# What can be searched


def test_open_search_takes_a_directory_or_an_address(saved, index):
    for source in (saved, str(saved)):
        assert open_search(source).search("Herbert") == index.search("Herbert")
    assert isinstance(open_search("http://127.0.0.1:1"), HTTPSearch)
    assert isinstance(open_search(saved), Searchable) and isinstance(open_search("https://host/x"), Searchable)
    with pytest.raises(ValueError, match="ftp://x"):
        open_search("ftp://x")
    with pytest.raises(FileNotFoundError, match="no index in absent"):
        open_search("absent")
    for address in ("localhost:8000", "127.0.0.1:8000/retrieve", "my-host.example:80"):
        with pytest.raises(ValueError, match=f"begins with http://, as http://{address}"):
            open_search(address)
    assert open_search(index) is index
    manifest = saved / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"kind": "other"}))
    with pytest.raises(ValueError, match="kind 'other', which this release does not know"):
        load_index(saved)


def test_public_names(index):
    assert set(dir(igpo_trl.search)) == set(igpo_trl.search.__all__)
    for name in igpo_trl.search.__all__:
        assert getattr(igpo_trl.search, name).__name__ == name
    with pytest.raises(AttributeError, match="NoIndex"):
        igpo_trl.search.NoIndex  # noqa: B018
    assert isinstance(index, Searchable) and not isinstance(object(), Searchable)


def test_earlier_paths_still_work():
    for module, names in (("reader", ["PageReader", "ReadPageTool"]), ("server", ["create_app", "serve"])):
        earlier = importlib.import_module(f"igpo_trl.search.{module}")
        for name in names:
            assert getattr(earlier, name) is getattr(igpo_trl.search, name)


@pytest.mark.parametrize(
    "settings", [{"k1": -1}, {"b": 1.5}, {"b": float("nan")}, {"stopwords": "klingon"}, {"stemmer": "klingon"}]
)
def test_bad_settings_are_refused_before_the_corpus_is_read(settings):
    with pytest.raises(ValueError, match="klingon" if "klingon" in settings.values() else "expected k1 of at least 0"):
        BM25Index.build("absent.jsonl", **settings)


@pytest.mark.parametrize(
    "use",
    [
        lambda source: SearchTool(source, k=1)(query="Herbert"),
        lambda source: create_app(source),
        lambda source: HybridIndex([source, source]).search("Herbert"),
        lambda source: score_retrieval(source, [{"prompt": [{"content": "Herbert"}], "answers": ["x"]} | TITLES]),
    ],
    ids=["SearchTool", "create_app", "HybridIndex", "score_retrieval"],
)
def test_whatever_searches_opens_a_path_or_refuses_it(saved, tmp_path, use):
    """Without a check, every call of the policy would fail."""
    use(saved), use(str(saved))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("{}")
    for wrong, error, message in (
        (tmp_path / "absent", FileNotFoundError, "no index in"),
        (str(corpus), ValueError, "is a file, expected the directory of an index.*igpo index --corpus"),
        (None, TypeError, "got None .NoneType., expected an index"),
        (BM25Index, TypeError, "expected an index"),
        ([saved], TypeError, "expected an index"),
    ):
        with pytest.raises(error, match=message):
            use(wrong)


TITLES = {"supporting_titles": []}
