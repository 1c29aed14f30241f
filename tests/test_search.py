"""The BM25 index."""

import dataclasses
import gzip
import json
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from igpo_trl.search import BM25Index, Passage

PASSAGES = [
    {"id": "a", "title": "Dune (novel)", "text": "A 1965 epic science fiction novel by American Frank Herbert."},
    {"id": "b", "title": "Frank Herbert", "text": "An American writer, born in Tacoma, Washington."},
    {"id": "c", "title": "Tacoma", "text": "A port city on Puget Sound – 51 km from Seattle. \U0001f30a"},
    {"id": 4, "title": "", "text": "Nothing in particular happens here."},
]


def write(path: Path, records=PASSAGES) -> Path:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def index() -> BM25Index:
    return BM25Index.build(PASSAGES, show_progress=False)


@pytest.fixture
def saved(index, tmp_path) -> Path:
    index.save(tmp_path / "index")
    return tmp_path / "index"


def test_finds_the_passage_with_the_words(index):
    (first, *_) = index.search("port city on the sound")
    assert (first.id, first.title) == ("c", "Tacoma")
    assert first.text == PASSAGES[2]["text"]
    assert first.score > 0


def test_results_are_sorted_and_have_no_passage_without_a_word_of_the_query(index):
    found = index.search("Herbert Tacoma", k=4)
    assert [p.id for p in found][0] == "b"  # both words
    assert {p.id for p in found} == {"a", "b", "c"}
    assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)
    assert index.search("xyzzy") == []
    assert index.search("") == []


def test_a_word_that_is_only_in_the_title_is_found_and_weighs_more_than_in_the_text(index):
    assert index.search("dune", k=1)[0].id == "a"
    assert index.search("tacoma", k=1)[0].id == "c"  # b has it in the text


def test_scores_are_okapi_bm25_by_hand():
    # Two passages of two words each; "red" is in one. idf = ln(1 + (2 - 1 + .5)/(1 + .5)) = ln 2. Lengths are equal,
    # so the length term is 1: tf/(tf + k1) with tf = 1, k1 = .9.
    index = BM25Index.build(
        [{"id": 1, "title": "", "text": "red apple"}, {"id": 2, "title": "", "text": "green apple"}],
        show_progress=False,
    )
    (found,) = index.search("red")
    assert found.score == pytest.approx(np.log(2) / 1.9, rel=1e-5)


def test_batch_equals_single_queries(index):
    queries = ["Frank Herbert", "", "port city", "xyzzy"]
    assert index.search_batch(queries, k=2) == [index.search(query, k=2) for query in queries]
    assert index.search_batch([]) == []


def test_k_larger_than_the_corpus_returns_all_matches(index):
    assert len(index.search("american author writer city happens", k=100)) == 4


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
def test_reads_files(tmp_path, name, index):
    path = write(tmp_path / name)
    other = BM25Index.build(path, show_progress=False)
    assert len(other) == 4
    assert other.search("Herbert") == index.search("Herbert")


def test_reads_several_files(tmp_path, index):
    paths = [write(tmp_path / "1.jsonl", PASSAGES[:2]), write(tmp_path / "2.jsonl.gz", PASSAGES[2:])]
    assert BM25Index.build(paths, show_progress=False).search("Tacoma") == index.search("Tacoma")


@pytest.mark.parametrize("mmap", [True, False])
def test_saved_and_loaded_gives_the_same_results(index, saved, mmap):
    loaded = BM25Index.load(saved, mmap=mmap)
    assert len(loaded) == len(index)
    for query in ("Herbert", "city", "1965 epic", "xyzzy", "particular"):
        assert loaded.search(query, k=4) == index.search(query, k=4)


def test_mapped_index_leaves_arrays_and_text_on_disk(saved):
    loaded = BM25Index.load(saved)
    assert all(isinstance(loaded._scorer.scores[name].base, np.memmap) for name in ("data", "indices", "indptr"))
    assert [p.id for p in loaded.passages[-2:]] == ["c", "4"]
    with pytest.raises(IndexError):
        loaded.passages[4]


def test_index_goes_to_another_process(saved, index):
    assert pickle.loads(pickle.dumps(BM25Index.load(saved))).search("Herbert") == index.search("Herbert")


@pytest.mark.parametrize(("backend", "threads"), [("numpy", 3), ("numba", 1), ("numba", 3)])
def test_backends_and_threads_give_the_same_results(index, saved, backend, threads):
    pytest.importorskip(backend)
    loaded = BM25Index.load(saved, backend=backend, threads=threads)
    queries = ["Frank Herbert", "", "port city", "xyzzy", "1965 epic", "Tacoma", "American"]
    expected = [index.search(query, k=4) for query in queries]
    assert loaded.search_batch(queries, k=4) == expected
    loaded.save(saved)
    assert BM25Index.load(saved, backend="numpy").search_batch(queries, k=4) == expected


def test_numba_is_used_for_large_indexes(saved, monkeypatch):
    pytest.importorskip("numba")
    assert BM25Index.load(saved)._scorer.backend == "numpy"
    monkeypatch.setattr("igpo_trl.search.indexes.bm25.MIN_NUMBA", 4)
    assert BM25Index.load(saved)._scorer.backend == "numba"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert BM25Index.load(saved)._scorer.backend == "numpy"
    with pytest.raises(ImportError, match=r"igpo-trl\[numba\]"):
        BM25Index.load(saved, backend="numba")
    with pytest.raises(ValueError, match="backend='jax'"):
        BM25Index.load(saved, backend="jax")
    with pytest.raises(ValueError, match="threads=0"):
        BM25Index.load(saved, threads=0)


def test_words_of_a_title_count_title_weight_times(tmp_path):
    corpus = [{"id": "a", "title": "sea", "text": "x y z"}, {"id": "b", "title": "y", "text": "sea sea z z"}]
    for weight, expected in ((0, ["b"]), (1, ["b", "a"]), (3, ["a", "b"])):
        index = BM25Index.build(corpus, title_weight=weight, b=0, show_progress=False)
        assert [p.id for p in index.search("sea")] == expected
    index.save(tmp_path / "index")
    assert json.loads((tmp_path / "index/manifest.json").read_text())["title_weight"] == 3
    with pytest.raises(ValueError, match="title_weight=-1"):
        BM25Index.build(corpus, title_weight=-1)


def test_the_stop_words_are_stored_with_the_index(tmp_path):
    index = BM25Index.build(PASSAGES, stopwords=None, show_progress=False)
    index.save(tmp_path / "index")
    assert BM25Index.load(tmp_path / "index").search("by", k=1)[0].id == "a"
    assert BM25Index.build(PASSAGES, show_progress=False).search("by") == []


def test_the_stemmer_is_stored_with_the_index(tmp_path):
    corpus = [{"id": 1, "title": "", "text": "She directed films."}, {"id": 2, "title": "", "text": "A direct train."}]
    for stemmer, query, found in [
        ("english", "a film with songs", ["1"]),
        ("english", "directs", ["1", "2"]),
        (None, "a film with songs", []),
        (None, "directed", ["1"]),
        ("finnish", "directed", ["1"]),
    ]:
        index = BM25Index.build(corpus, stemmer=stemmer, show_progress=False)
        index.save(tmp_path / "index")
        for tried in (index, BM25Index.load(tmp_path / "index")):
            assert sorted(passage.id for passage in tried.search(query)) == found, (stemmer, query)


def test_threads_may_search_one_index(index):
    queries = ["Who wrote Dune?", "the city of Tacoma", "Frank Herbert"] * 40
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(index.search, queries)) == index.search_batch(queries)


def test_save_replaces_an_index_even_the_one_it_is_mapped_from(saved):
    BM25Index.build(PASSAGES[:1], show_progress=False).save(saved)
    loaded = BM25Index.load(saved)
    loaded.save(saved)
    assert BM25Index.load(saved).search("Dune") == loaded.search("Dune")
    assert [path.name for path in saved.parent.iterdir()] == ["index"]  # nothing temporary is left


def test_save_does_not_overwrite_something_else(index, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for manifest in (None, "{", "[]", "{}", '{"kind": "thesis"}'):
        if manifest is not None:
            (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(FileExistsError, match="is not an index"):
            index.save(tmp_path)
    with pytest.raises(FileExistsError, match="is not an index"):
        index.save(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_save_that_fails_leaves_the_old_index_and_nothing_else(saved, monkeypatch):
    other = BM25Index.build(PASSAGES[:2], show_progress=False)

    def no_space(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("igpo_trl.search.indexes.bm25.PassageWriter", no_space)
    with pytest.raises(OSError, match="No space"):
        other.save(saved)
    assert len(BM25Index.load(saved)) == 4
    assert [path.name for path in saved.parent.iterdir()] == ["index"]


def test_load_without_an_index_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="igpo index --corpus"):
        BM25Index.load(tmp_path)


def test_every_file_of_an_index_is_needed_whole(saved):
    files = [path for path in saved.iterdir() if path.name != "manifest.json"]
    assert len(files) >= 6
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=rf"{re.escape(path.name)} has {len(content) - 1} bytes, expected"):
            BM25Index.load(saved)
        path.unlink()
        with pytest.raises(ValueError, match=rf"{re.escape(path.name)} is missing"):
            BM25Index.load(saved)
        path.write_bytes(content)
    BM25Index.load(saved)


def test_damage_that_keeps_the_size_is_found_where_headers_show_it(saved):
    path = saved / "vocab.index.json"
    path.write_bytes(b"\x00" * path.stat().st_size)
    with pytest.raises(ValueError, match="damaged"):
        BM25Index.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"kind": "dense"}, "kind 'dense'"),
        ({"passages": 5}, "says 5 passages"),
        (None, "damaged"),
    ],
)
def test_other_manifests_are_refused(saved, change, message):
    path = saved / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) if change else "{")
    with pytest.raises(ValueError, match=message):
        BM25Index.load(saved)


def test_bad_arguments(index):
    with pytest.raises(ValueError, match="k=0"):
        index.search("x", k=0)
    with pytest.raises(TypeError, match="single query"):
        index.search_batch("x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Passage("a", "b", "c").score = 1.0


@pytest.mark.parametrize("package", ["bm25s", "Stemmer"])
def test_importing_search_does_not_import_what_it_needs_and_its_absence_names_the_extra(package):
    code = (
        "import sys; import igpo_trl.search as s\n"
        f"assert {package!r} not in sys.modules; sys.modules[{package!r}] = None\n"
        "try: s.BM25Index.build([{'id': 1, 'title': '', 'text': 'words'}])\n"
        "except ImportError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'pip install "igpo-trl[search]"' in out


# Real passages


def normalized(text: str) -> str:
    return " ".join(re.findall(r"\w+", re.sub(r"\b(a|an|the)\b", " ", text.lower())))


@pytest.mark.parametrize(("name", "at_least"), [("hotpotqa", 0.75), ("nq", 0.94)])
def test_an_answer_is_in_the_top_five_of_real_questions(shared_dir, name, at_least):
    index = BM25Index.build(shared_dir / f"data/corpus/{name}.jsonl.gz", show_progress=False)
    with gzip.open(shared_dir / f"data/questions/{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        questions = [json.loads(line) for line in file]
    questions = [q for q in questions if q["answers"][0].lower() not in ("yes", "no")]  # these are spans of no passage
    results = index.search_batch([q["question"] for q in questions], k=5)
    hits = [
        any(normalized(answer) in normalized(f"{p.title} {p.text}") for answer in q["answers"] for p in found)
        for q, found in zip(questions, results, strict=True)
    ]
    assert np.mean(hits) >= at_least
