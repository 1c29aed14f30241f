"""
What the search layer costs over the libraries below it: bm25s alone, sentence-transformers and faiss alone.

    python benchmarks/retrieval.py                      # 100,000 passages
    python benchmarks/retrieval.py --passages 1000000 --skip-dense --repeats 3

Both sides read the same JSON Lines file with the same settings and end with an index and the texts of its passages on
disk. Every build and every load runs in its own process, the two sides in turns; their queries run in turns in one
process. Figures are medians; ratios are medians of the ratios of neighboring runs. The passages are those of
../shared/data, if it exists, repeated with their words shuffled, else synthetic with Zipf-distributed words. The dense
model is a static embedding with random weights, as fast as any other of its kind; the slower the model, the smaller
the share of the search layer. On a busy machine, compare the figures in CPU seconds (of all threads).
"""

import argparse
import gzip
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "corpus"
DIMENSION = 256
K = 5
BACKEND = os.environ.get("RETRIEVAL_BACKEND", "numpy")


def make_passages(path: Path, number: int) -> str:
    """Writes a corpus and returns a description of it."""
    rng = random.Random(0)
    real = []
    for file in sorted(DATA.glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            real += [json.loads(line) for line in lines]
    if not real:
        vocabulary = [f"w{i:x}" for i in range(200_000)]
        weights = np.cumsum(1 / np.arange(1, len(vocabulary) + 1)).tolist()
    with open(path, "w", encoding="utf-8") as file:
        for i in range(number):
            if real:
                title, words = real[i % len(real)]["title"], real[i % len(real)]["text"].split()
                if i >= len(real):
                    rng.shuffle(words)
            else:
                title, *words = rng.choices(vocabulary, cum_weights=weights, k=81)
            file.write(json.dumps({"id": str(i), "title": title, "text": " ".join(words)}, ensure_ascii=False) + "\n")
    return f"{len(real):,} real passages, repeated with shuffled words" if real else "synthetic"


def make_model(folder: Path, corpus: Path) -> None:
    """A static embedding over the 30,000 most frequent words of a corpus."""
    import collections

    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    counts: collections.Counter[str] = collections.Counter()
    for i, line in enumerate(open(corpus, encoding="utf-8")):
        counts.update(json.loads(line)["text"].lower().split())
        if i == 50_000:
            break
    words = [word for word, _ in counts.most_common(30_000)]
    vocabulary = {"[UNK]": 0, **{word: i for i, word in enumerate(words, start=1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=DIMENSION)], device="cpu").save(str(folder))


# The libraries alone


def plain_bm25_build(corpus: Path, out: Path, _: str) -> None:
    import bm25s
    import Stemmer

    with open(corpus, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    texts = [f"{r['title']}\n" * 4 + r["text"] for r in records]
    tokens = bm25s.tokenize(texts, stopwords="english", stemmer=Stemmer.Stemmer("english"), show_progress=False)
    scorer = bm25s.BM25(k1=0.9, b=0.4, csc_backend="scipy")
    scorer.index(tokens, show_progress=False)
    scorer.save(out, corpus=records, show_progress=False)


def plain_bm25_load(out: Path, _: str) -> Any:
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")

    scorer = bm25s.BM25.load(out, mmap=True, load_corpus=True, show_progress=False, backend=BACKEND)

    def search(queries: list[str]) -> Any:
        words = bm25s.tokenize(queries, stopwords="english", stemmer=stemmer, return_ids=False, show_progress=False)
        return scorer.retrieve(words, k=K, show_progress=False)

    return search


def plain_dense_build(corpus: Path, out: Path, model: str) -> None:
    import faiss
    from sentence_transformers import SentenceTransformer

    out.mkdir()
    with open(corpus, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    with open(out / "texts.jsonl", "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    encoder = SentenceTransformer(model, device="cpu")
    texts = [f"{r['title']}\n{r['text']}" for r in records]
    vectors = encoder.encode(texts, batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    index = faiss.index_factory(vectors.shape[1], "SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    faiss.write_index(index, str(out / "vectors.faiss"))


def plain_dense_load(out: Path, model: str) -> Any:
    import faiss
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu")
    index = faiss.read_index(str(out / "vectors.faiss"), faiss.IO_FLAG_MMAP_IFC)
    with open(out / "texts.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]

    def search(queries: list[str]) -> Any:
        _, rows = index.search(encoder.encode(queries, normalize_embeddings=True, show_progress_bar=False), K)
        return [[records[i] for i in row] for row in rows]

    return search


# This package


def our_bm25_build(corpus: Path, out: Path, _: str) -> None:
    from igpo_trl.search import BM25Index

    BM25Index.build(corpus, directory=out, show_progress=False)


def our_dense_build(corpus: Path, out: Path, model: str) -> None:
    from igpo_trl.search import DenseIndex

    DenseIndex.build(corpus, out, model=model, show_progress=False)


def our_bm25_load(out: Path, _: str) -> Any:
    from igpo_trl.search import BM25Index

    index = BM25Index.load(out, backend=BACKEND, threads=1)
    return lambda queries: index.search_batch(queries, K)


def our_dense_load(out: Path, _: str) -> Any:
    from igpo_trl.search import DenseIndex

    index = DenseIndex.load(out)
    return lambda queries: index.search_batch(queries, K)


BUILD = {
    ("bm25", "alone"): plain_bm25_build,
    ("bm25", "ours"): our_bm25_build,
    ("dense", "alone"): plain_dense_build,
    ("dense", "ours"): our_dense_build,
}
LOAD = {
    ("bm25", "alone"): plain_bm25_load,
    ("bm25", "ours"): our_bm25_load,
    ("dense", "alone"): plain_dense_load,
    ("dense", "ours"): our_dense_load,
}


def import_libraries(kind: str, side: str) -> None:
    """Imports before the clock starts: their time does not count."""
    if kind == "bm25":
        import bm25s  # noqa: F401
    else:
        import faiss  # noqa: F401
        import sentence_transformers  # noqa: F401
    if side == "ours":
        from igpo_trl.search import BM25Index, DenseIndex, HybridIndex, SearchTool  # noqa: F401


def child(arguments: argparse.Namespace) -> None:
    """Runs one build, one load, or the queries of both sides in this process."""
    kind, side = arguments.kind, arguments.side
    if arguments.child == "search":
        print(json.dumps(search_in_turns(kind, arguments)))
        return
    import_libraries(kind, side)
    memory = psutil.Process().memory_info
    result: dict[str, float] = {}
    if arguments.child == "build":
        started, worked = time.perf_counter(), time.process_time()
        BUILD[kind, side](arguments.corpus, arguments.out, arguments.model)
        result["build (s)"], result["build (CPU s)"] = time.perf_counter() - started, time.process_time() - worked
        import resource

        result["peak memory (MB)"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        result["on disk (MB)"] = sum(p.stat().st_size for p in arguments.out.rglob("*") if p.is_file()) / 1e6
    else:
        queries = json.loads(Path(arguments.queries).read_text())
        before = memory().rss
        search = LOAD[kind, side](arguments.out, arguments.model)
        result["memory after load (MB)"] = (memory().rss - before) / 1e6
        for start in range(0, len(queries), 64):
            search(queries[start : start + 64])
        result["memory after queries (MB)"] = (memory().rss - before) / 1e6
        seconds = []
        for _ in range(7):
            started = time.perf_counter()
            LOAD[kind, side](arguments.out, arguments.model)
            seconds.append(time.perf_counter() - started)
        result["load (s)"] = statistics.median(seconds)
    print(json.dumps(result))


def search_in_turns(kind: str, arguments: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """
    Queries per second of both sides, one entry per block of 64 queries, with both indexes in this process.

    In separate processes the same side differs by 15 % from one to the next, depending on its memory layout; in one
    process, and in turns, both sides have the same conditions.
    """
    for side in ("alone", "ours"):
        import_libraries(kind, side)
    queries = json.loads(Path(arguments.queries).read_text())
    search = {side: LOAD[kind, side](arguments.out / f"{kind}-{side}", arguments.model) for side in ("alone", "ours")}
    for function in search.values():
        function(queries[:64])
    blocks = []
    for start in range(0, len(queries), 64):
        block, order = queries[start : start + 64], ("alone", "ours") if start % 128 else ("ours", "alone")
        figures: dict[str, dict[str, float]] = {}
        for name, size in (("64 queries at once", 64), ("single queries", 1)):
            for side in order:
                started, worked = time.perf_counter(), time.process_time()
                for i in range(0, len(block), size):
                    search[side](block[i : i + size])
                row = figures.setdefault(side, {})
                row[f"{name} (queries/s)"] = len(block) / (time.perf_counter() - started)
                row[f"{name} (queries/CPU s)"] = len(block) / (time.process_time() - worked)
        blocks.append(figures)
    return blocks


def run(task: str, kind: str, side: str, **options: Any) -> Any:
    """Runs a child process and returns its figures."""
    command = [sys.executable, __file__, "--child", task, "--kind", kind, "--side", side]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    if child.returncode:
        raise RuntimeError(f"{task} {kind} {side} failed:\n{child.stderr}")
    return json.loads(child.stdout.splitlines()[-1])


def compare(kind: str, corpus: Path, folder: Path, model: str, repeats: int) -> dict[str, dict[str, float]]:
    """Runs both sides in turns and returns their figures."""
    with open(corpus, encoding="utf-8") as file:
        lines = [line for _, line in zip(range(20_000), file, strict=False)]
    rng = random.Random(1)
    queries = [
        " ".join(rng.sample(words, min(9, len(words))))
        for words in (json.loads(line)["text"].split() for line in rng.sample(lines, min(512, len(lines))))
    ]
    (folder / "queries.json").write_text(json.dumps(queries))
    options = {"model": model, "queries": folder / "queries.json"}
    rows: dict[str, list[dict[str, float]]] = {"alone": [], "ours": []}
    searches: dict[str, list[dict[str, float]]] = {"alone": [], "ours": []}
    for repeat in range(repeats):
        for side in ("alone", "ours") if repeat % 2 == 0 else ("ours", "alone"):
            out = folder / f"{kind}-{side}"
            shutil.rmtree(out, ignore_errors=True)
            figures = run("build", kind, side, corpus=corpus, out=out, model=model)
            rows[side].append(figures | run("load", kind, side, out=out, **options))
        for block in run("search", kind, "both", out=folder, **options):
            for side, figures in block.items():
                searches[side].append(figures)
    return summary(rows) | summary(searches)


def summary(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians of both sides, and of the ratios of neighboring runs."""
    table = {}
    for name in rows["alone"][0]:
        alone, ours = ([row[name] for row in rows[side]] for side in ("alone", "ours"))
        ratio = statistics.median(a / b if b else float("nan") for a, b in zip(ours, alone, strict=True))
        table[name] = {"alone": statistics.median(alone), "ours": statistics.median(ours), "ratio": ratio}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5, help="builds and loads per side")
    parser.add_argument("--backend", choices=["numpy", "numba"], default="numpy", help="of BM25, on both sides")
    parser.add_argument("--skip-dense", action="store_true")
    parser.add_argument("--skip-bm25", action="store_true")
    for name in ("child", "kind", "side", "queries", "model"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("corpus", "out"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    os.environ["RETRIEVAL_BACKEND"] = arguments.backend
    packages = ("bm25s", "scipy", "numpy", "faiss-cpu", "sentence-transformers", "torch")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages))
    with tempfile.TemporaryDirectory(prefix="igpo-retrieval-") as name:
        folder = Path(name)
        corpus, model = folder / "corpus.jsonl", folder / "model"
        origin = make_passages(corpus, arguments.passages)
        print(f"{arguments.passages:,} passages ({origin}), {corpus.stat().st_size / 1e6:.0f} MB, ", end="")
        print(f"{len(os.sched_getaffinity(0))} cores, {arguments.repeats} runs per side, medians\n", flush=True)
        kinds = [kind for kind in ("bm25", "dense") if not getattr(arguments, f"skip_{kind}")]
        for kind in kinds:
            if kind == "dense":
                make_model(model, corpus)
            library = (
                f"bm25s ({arguments.backend})"
                if kind == "bm25"
                else f"sentence-transformers and faiss, {DIMENSION} numbers"
            )
            print(f"| {kind} | {library} alone | igpo_trl | ratio |\n|---|---|---|---|")
            for what, row in compare(kind, corpus, folder, str(model), arguments.repeats).items():
                print(f"| {what} | {row['alone']:.4g} | {row['ours']:.4g} | {row['ratio']:.2f} |")
            print(flush=True)


if __name__ == "__main__":
    main()
