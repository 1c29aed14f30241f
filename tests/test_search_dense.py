"""Dense and hybrid indexes, on a static embedding built in code: vectors, prompts, resuming, kills, damage."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from igpo_trl.search import BM25Index, DenseIndex, HybridIndex, Passage, load_index, open_search
from igpo_trl.search.indexes.encoder import Encoder

WORDS = (
    "query passage dune novel frank herbert writer tacoma port city sound sea whale ship harbour lisbon fox dog river "
    "mountain snow king queen castle war peace treaty film actor album song guitar opera"
).split()


def make_model(folder: Path, dimension: int = 16, seed: int = 0, prompts=None) -> Path:
    vocabulary = {"[UNK]": 0, **{word: i for i, word in enumerate(WORDS, start=1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(seed)
    embedding = StaticEmbedding(tokenizer, embedding_dim=dimension)
    SentenceTransformer(modules=[embedding], device="cpu", prompts=prompts).save(str(folder))
    return folder


def make_corpus(number: int, seed: int = 1) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {"id": f"p{i}", "title": rng.choice(WORDS) if i % 3 else "", "text": " ".join(rng.choices(WORDS, k=6))}
        for i in range(number)
    ]


CORPUS = make_corpus(60)
QUERIES = ["frank herbert the writer of dune", "whale ship", "king and queen at war", "snow"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "static")


def build(corpus, directory, model, **options) -> DenseIndex:
    return DenseIndex.build(corpus, directory, model=model, show_progress=False, **options)


def brute_force(corpus, queries, model, prompts=("", ""), k=5):
    """Ids and cosines of the nearest passages, from the model alone."""
    encode = SentenceTransformer(str(model), device="cpu").encode
    texts = [prompts[1] + (f"{r['title']}\n{r['text']}" if r["title"] else r["text"]) for r in corpus]
    vectors, wanted = (encode(t, normalize_embeddings=True) for t in (texts, [prompts[0] + q for q in queries]))
    cosines = wanted @ vectors.T
    order = np.argsort(-cosines, axis=1)[:, :k]
    return [[(corpus[j]["id"], cosines[i, j]) for j in row] for i, row in enumerate(order)]


@pytest.mark.parametrize(
    ("structure", "dtype", "tolerance"),
    [("flat", "float32", 1e-6), ("flat", "float16", 1e-3), ("hnsw", "float16", 1e-3)],
)
def test_finds_the_nearest_passages_before_and_after_loading(tmp_path, model, structure, dtype, tolerance):
    built = build(CORPUS, tmp_path / "index", model, structure=structure, dtype=dtype, shard_size=25)
    expected = brute_force(CORPUS, QUERIES, model)
    for index in (built, load_index(tmp_path / "index"), DenseIndex.load(tmp_path / "index", mmap=False)):
        assert len(index) == 60
        for found, best in zip(index.search_batch(QUERIES, 5), expected, strict=True):
            assert [p.score for p in found] == pytest.approx([score for _, score in best], abs=tolerance)
            if dtype == "float32":
                assert [p.id for p in found] == [key for key, _ in best]
        assert index.search(QUERIES[1], 2) == index.search_batch(QUERIES, 2)[1]
    assert built.search("whale", k=1000)[-1].score <= built.search("whale", k=1)[0].score
    assert len(built.search("whale", k=1000)) == 60
    assert built.search_batch([]) == []
    assert built.search("\ud800") and built.search("")
    with pytest.raises(ValueError, match="k=0"):
        built.search("x", k=0)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_compressed_cells_find_most_of_what_is_near(tmp_path, model):
    corpus = make_corpus(400)
    exact = build(corpus, tmp_path / "flat", model).search_batch(QUERIES, 10)
    index = build(corpus, tmp_path / "cells", model, structure="ivfpq")
    for tried in (index, load_index(tmp_path / "cells")):
        found = tried.search_batch(QUERIES, 40)
        recall = [len({p.id for p in a} & {p.id for p in b}) / 10 for a, b in zip(exact, found, strict=True)]
        assert np.mean(recall) > 0.7
    # One cell of ten contains fewer vectors than all cells.
    assert len(DenseIndex.load(tmp_path / "cells", effort=1).search("whale", 400)) < 400
    assert len(index.search("whale", 400)) == 400
    with pytest.raises(ValueError, match="at least 256 passages, got 60"):
        build(CORPUS, tmp_path / "few", model, structure="ivfpq")
    assert not (tmp_path / ".few.partial").exists()


@pytest.mark.parametrize(
    ("name", "config", "options", "expected"),
    [
        ("e5-tiny", None, {}, ("query: ", "passage: ")),
        ("multilingual-E5.small", None, {}, ("query: ", "passage: ")),
        ("e5-tiny-instruct", None, {}, ("", "")),
        ("cafe5-model", None, {}, ("", "")),
        ("other", {"query": "king ", "document": "queen "}, {}, ("king ", "queen ")),
        ("e5-own", {"query": "king ", "passage": "queen "}, {}, ("king ", "queen ")),
        ("e5-off", None, {"query_prompt": "", "passage_prompt": "snow "}, ("", "snow ")),
    ],
)
def test_prompts_are_those_of_the_model_its_name_or_the_user(tmp_path, name, config, options, expected):
    folder = make_model(tmp_path / name, prompts=config)
    build(CORPUS, tmp_path / "index", folder, dtype="float32", **options)
    manifest = json.loads((tmp_path / "index/manifest.json").read_text())
    assert (manifest["query_prompt"], manifest["passage_prompt"]) == expected
    found = load_index(tmp_path / "index").search(QUERIES[0], 5)  # prompts come from the index
    (best,) = brute_force(CORPUS, QUERIES[:1], folder, expected)
    assert [(p.id, pytest.approx(p.score, abs=1e-6)) for p in found] == best


def test_an_interrupted_build_resumes_with_its_shards(tmp_path, model, monkeypatch):
    whole = build(CORPUS, tmp_path / "whole", model, shard_size=10)
    real, embedded = Encoder.passages, []

    def fail_at_the_fourth_shard(self, texts):
        if len(embedded) == 1 + 3:  # the probe, three shards
            raise KeyboardInterrupt
        embedded.append(len(texts))
        return real(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "passages", fail_at_the_fourth_shard)
        with pytest.raises(KeyboardInterrupt):
            build(CORPUS, tmp_path / "index", model, shard_size=10)
    work = tmp_path / ".index.partial" / "work"
    assert sorted(p.name for p in work.glob("0*")) == ["000000.npy", "000001.npy", "000002.npy"]
    with pytest.raises(FileNotFoundError, match="interrupted"):
        load_index(tmp_path / "index")

    # With another corpus, setting or model, the shards are useless, but they are not deleted without --restart.
    other = make_model(tmp_path / "other", seed=5)
    for change, message in [
        ({"corpus": make_corpus(60, seed=2)}, "another corpus"),
        ({"shard_size": 20}, "another shard_size"),
        ({"passage_prompt": "snow "}, "another passage_prompt"),
        ({"dtype": "float32"}, "another dtype"),
        ({"model": other}, "another model"),
    ]:
        arguments = {"corpus": CORPUS, "model": model, "shard_size": 10} | change
        with pytest.raises(ValueError, match=message + r".*--restart"):
            build(directory=tmp_path / "index", **arguments)
    assert len(list(work.glob("0*"))) == 3

    # A shard that a power cut left incomplete is embedded again.
    (work / "000001.npy").write_bytes((work / "000001.npy").read_bytes()[:-100])
    embedded.clear()
    monkeypatch.setattr(Encoder, "passages", lambda self, texts: embedded.append(len(texts)) or real(self, texts))
    index = build(CORPUS, tmp_path / "index", model, shard_size=10)
    assert embedded == [1, 10, 10, 10, 10]  # the probe, the damaged shard, the last three
    assert index.search_batch(QUERIES, 5) == whole.search_batch(QUERIES, 5)
    assert not (tmp_path / ".index.partial").exists()


def test_restart_discards_an_interrupted_build(tmp_path, model):
    work = tmp_path / ".index.partial/work"
    work.mkdir(parents=True)
    (work / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="another"):
        build(CORPUS, tmp_path / "index", model)
    assert len(build(CORPUS, tmp_path / "index", model, restart=True)) == 60


def start(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.DEVNULL)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the build ended before the kill"
        assert time.monotonic() < deadline
        time.sleep(0.01)


BUILD_SLOWLY = """
import sys, time
from igpo_trl.search import DenseIndex
from igpo_trl.search.indexes.encoder import Encoder
real = Encoder.passages
Encoder.passages = lambda self, texts: (time.sleep(.1), real(self, texts))[1]
DenseIndex.build(sys.argv[1], sys.argv[2], model=sys.argv[3], shard_size=10, show_progress=False)
"""


def test_a_killed_build_leaves_no_index_and_the_next_one_resumes_it(tmp_path, model, monkeypatch):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(record) + "\n" for record in make_corpus(300)))
    old = build(CORPUS, tmp_path / "index", model).search(QUERIES[0])
    work = tmp_path / ".index.partial/work"
    process = start(BUILD_SLOWLY, corpus, tmp_path / "index", model)
    try:
        wait_for(lambda: len(list(work.glob("0*.npy"))) >= 3, process)
        with pytest.raises(BlockingIOError, match="another process is building"):
            build(corpus, tmp_path / "index", model, shard_size=10)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = len(list(work.glob("0*.npy")))
    assert 3 <= done < 30
    assert load_index(tmp_path / "index").search(QUERIES[0]) == old  # the one before is untouched

    real, embedded = Encoder.passages, []
    monkeypatch.setattr(Encoder, "passages", lambda self, texts: embedded.append(len(texts)) or real(self, texts))
    index = build(corpus, tmp_path / "index", model, shard_size=10)
    assert sum(embedded) == 1 + 300 - 10 * done
    assert len(load_index(tmp_path / "index")) == 300
    assert index.search_batch(QUERIES) == build(corpus, tmp_path / "whole", model).search_batch(QUERIES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "index", "whole"]


def test_a_model_that_is_not_the_one_of_the_index_is_refused(tmp_path, model):
    moved = make_model(tmp_path / "model")
    build(CORPUS, tmp_path / "index", moved)
    moved.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"no such model: .*model"):
        load_index(tmp_path / "index")
    assert load_index(tmp_path / "index", model=tmp_path / "moved").search("whale")
    assert open_search(str(tmp_path / "index"), model=str(model)).search("whale")  # the same weights
    with pytest.raises(ValueError, match="vectors of 8 numbers, the index in .* has vectors of 16"):
        load_index(tmp_path / "index", model=make_model(tmp_path / "small", dimension=8))
    with pytest.raises(ValueError, match="gives other vectors"):
        load_index(tmp_path / "index", model=make_model(tmp_path / "other", seed=9))
    loaded = SentenceTransformer(str(model), device="cpu")
    build(CORPUS, tmp_path / "nameless", loaded)
    with pytest.raises(ValueError, match="does not know the name of its model"):
        load_index(tmp_path / "nameless")
    assert load_index(tmp_path / "nameless", model=loaded).search("whale")


def test_damage_is_named(tmp_path, model):
    build(CORPUS, tmp_path / "index", model)
    for file in ("vectors.faiss", "passages.jsonl", "probe.npy"):
        path = tmp_path / "index" / file
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=rf"{file} has {len(content) - 1} bytes, expected {len(content)}"):
            load_index(tmp_path / "index")
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=rf"{file} is damaged: its checksum"):
            load_index(tmp_path / "index")
        path.write_bytes(content)
    manifest = tmp_path / "index/manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(ValueError, match="version 7"):
        load_index(tmp_path / "index")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"structure": "tree"}, ValueError, "'tree', expected one of flat, hnsw, ivfpq"),
        ({"dtype": "int8"}, ValueError, "'int8', expected one of float16, float32"),
        ({"shard_size": 0}, ValueError, "shard_size=0"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"corpus": "absent.jsonl"}, FileNotFoundError, "absent.jsonl"),
        ({"corpus": [{"id": 1, "title": ""}]}, ValueError, "passage 1: no field `text`"),
        ({"corpus": []}, ValueError, "empty"),
        ({"model": "/absent/model"}, FileNotFoundError, "no such model: /absent/model"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, model, options, error, message):
    arguments = {"corpus": CORPUS, "model": model} | options
    with pytest.raises(error, match=message):
        build(directory=tmp_path / "index", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_vector_that_is_not_finite_names_its_passage(tmp_path):
    model = SentenceTransformer(str(make_model(tmp_path / "model")), device="cpu")
    with torch.no_grad():
        model[0].embedding.weight[1 + WORDS.index("opera")] = torch.nan
    corpus = [{"id": "good", "title": "", "text": "snow"}, {"id": "bad", "title": "", "text": "opera"}]
    with pytest.raises(ValueError, match="passage 'bad' a vector that is not finite"):
        build(corpus, tmp_path / "index", model)


def test_a_missing_package_names_the_extra():
    for package in ("faiss", "sentence_transformers"):
        code = (
            f"import sys; sys.modules[{package!r}] = None\n"
            "from igpo_trl.search import DenseIndex\n"
            "try: DenseIndex.build([{'id': 1, 'title': '', 'text': 'words'}], 'x', model='y')\n"
            "except ImportError as e: print(e)"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert 'pip install "igpo-trl[dense]"' in out


# Hybrid


class Fixed:
    """A retriever with a fixed ranking."""

    def __init__(self, *keys: str) -> None:
        self.keys, self.requests = keys, []

    def search(self, query, k=3):
        return self.search_batch([query], k)[0]

    def search_batch(self, queries, k=3):
        self.requests.append((list(queries), k))
        return [[Passage(key, key.upper(), "text", 9.0) for key in self.keys[:k]] for _ in queries]


def test_reciprocal_rank_fusion_by_hand():
    first, second = Fixed("a", "b", "c"), Fixed("c", "d")
    index = HybridIndex([first, second])
    found = index.search("x", k=10)
    # c: 1/63 + 1/61; a: 1/61; b and d: 1/62, the first part's before the second's.
    assert [p.id for p in found] == ["c", "a", "b", "d"]
    assert [p.score for p in found] == pytest.approx([1 / 63 + 1 / 61, 1 / 61, 1 / 62, 1 / 62])
    assert found[0].title == "C"
    assert index.search("x", k=1) == found[:1]
    index.search_batch(["x", "y"], k=70)
    assert first.requests == second.requests == [(["x"], 50), (["x"], 50), (["x", "y"], 70)]
    assert index.search_batch([]) == []
    # The larger the constant, the less the first rank counts.
    assert HybridIndex([Fixed("a", "c"), Fixed("b", "c")], constant=1).search("x", 1)[0].id == "c"
    assert [p.id for p in HybridIndex([Fixed("b", "a")]).search("x")] == ["b", "a"]
    with pytest.raises(ValueError, match="no parts"):
        HybridIndex([])
    with pytest.raises(ValueError, match="constant=0"):
        HybridIndex([first], constant=0)
    with pytest.raises(TypeError, match="a Fixed cannot be saved"):
        index.save("x")
    with pytest.raises(TypeError, match="no part knows"):
        len(index)


def test_hybrid_index_is_the_fusion_of_its_parts(tmp_path, model):
    index = HybridIndex.build(CORPUS, tmp_path / "index", model=model, show_progress=False)
    parts = BM25Index.build(CORPUS, show_progress=False), build(CORPUS, tmp_path / "dense", model)
    expected = HybridIndex(parts).search_batch(QUERIES, 7)
    assert index.search_batch(QUERIES, 7) == expected
    index.save(tmp_path / "copy")
    for name in ("index", "copy"):
        loaded = load_index(tmp_path / name)
        assert isinstance(loaded, HybridIndex) and len(loaded) == 60
        assert loaded.search_batch(QUERIES, 7) == expected
    # The text is on disk once.
    texts = [tmp_path / "index" / part / "passages.jsonl" for part in ("bm25", "dense")]
    assert os.path.samefile(*texts)

    (tmp_path / "index/dense/vectors.faiss").write_bytes(b"")
    with pytest.raises(ValueError, match=r"vectors\.faiss has 0 bytes"):
        load_index(tmp_path / "index")
    (tmp_path / "copy/part1/manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no index in .*part1"):
        load_index(tmp_path / "copy")


def test_an_interrupted_hybrid_build_keeps_its_complete_part(tmp_path, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(DenseIndex, "build", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            HybridIndex.build(CORPUS, tmp_path / "index", model=model, show_progress=False)
    with pytest.raises(FileNotFoundError, match="interrupted"):
        load_index(tmp_path / "index")
    built, real = [], BM25Index.build
    monkeypatch.setattr(BM25Index, "build", lambda *a, **o: built.append(o) or real(*a, **o))
    index = HybridIndex.build(CORPUS, tmp_path / "index", model=model, show_progress=False)
    assert not built and len(index) == 60
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_interrupted_hybrid_build_of_another_corpus_is_not_resumed(tmp_path, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(DenseIndex, "build", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            HybridIndex.build(make_corpus(60, seed=3), tmp_path / "index", model=model, show_progress=False)
    index = HybridIndex.build(CORPUS, tmp_path / "index", model=model, show_progress=False)
    assert index.search("snow", 5) == HybridIndex.build(
        CORPUS, tmp_path / "other", model=model, show_progress=False
    ).search("snow", 5)
