"""`igpo index`, `igpo search`, `igpo serve`."""

import enum
import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import one_line_errors

# Their values are the names in lower case.
Kind = enum.StrEnum("Kind", ["BM25", "DENSE", "HYBRID"])
Structure = enum.StrEnum("Structure", ["FLAT", "HNSW", "IVFPQ"])
DType = enum.StrEnum("DType", ["FLOAT16", "FLOAT32"])

_Index = Annotated[str, typer.Option("--index", help="Directory of an index, or http:// address of a search server.")]
_Model = Annotated[str | None, typer.Option(help="Model of a dense or hybrid index, if it has moved since the build.")]
_Device = Annotated[
    str | None, typer.Option(help="Device of the model, such as cuda:1. By default a GPU if there is one.")
]


def index(
    corpus: Annotated[
        list[Path],
        typer.Option(
            help="Passages: .jsonl, .json, .tsv, .csv (or .gz of these), .parquet, or world for the made-up world of "
            "igpo world. Repeat for several files."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the index; an existing index is replaced.")],
    kind: Annotated[Kind, typer.Option(help="Search by words, by meaning, or by both.")] = Kind.BM25,
    model: Annotated[
        str | None, typer.Option(help="Dense and hybrid: sentence-transformers model, a name or a folder.")
    ] = None,
    structure: Annotated[
        Structure, typer.Option(help="Structure of the vectors: exact (flat), fast (hnsw) or small (ivfpq).")
    ] = Structure.FLAT,
    dtype: Annotated[DType, typer.Option(help="Type of the stored vectors.")] = DType.FLOAT16,
    query_prompt: Annotated[
        str | None, typer.Option(help="Prefix of every query; by default the model's own.")
    ] = None,
    passage_prompt: Annotated[
        str | None, typer.Option(help="Prefix of every passage; by default the model's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Passages per forward pass of the model.", min=1)] = 64,
    device: _Device = None,
    half: Annotated[bool, typer.Option("--half", help="Run the model in half precision.")] = False,
    k1: Annotated[float, typer.Option(help="BM25: how fast repeated words saturate.")] = 0.9,
    b: Annotated[float, typer.Option(help="BM25: how much long passages are discounted, 0 to 1.")] = 0.4,
    title_weight: Annotated[int, typer.Option(help="BM25: how many times a word of the title counts.", min=0)] = 4,
    stopwords: Annotated[
        str, typer.Option(help="BM25: language of the stop words, or none to keep every word.")
    ] = "english",
    stemmer: Annotated[str, typer.Option(help="BM25: language of the stemmer, or none for no stemming.")] = "english",
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard the work of an interrupted build instead of resuming it.")
    ] = False,
) -> None:
    """Index a corpus of passages. Repeat the same command to resume an interrupted build."""
    if kind != Kind.BM25 and model is None:
        raise typer.BadParameter(f"a {kind} index needs a model, such as intfloat/e5-base-v2.", param_hint="--model")
    if kind == Kind.BM25 and model is not None:
        raise typer.BadParameter("a bm25 index has no model; pass --kind dense or hybrid.", param_hint="--model")
    options: dict[str, Any] = {"directory": out, "restart": restart}
    options["show_progress"] = sys.stderr.isatty()  # progress bars fill log files
    if kind != Kind.DENSE:
        options |= {"k1": k1, "b": b, "title_weight": title_weight}
        options |= {"stopwords": None if stopwords == "none" else stopwords}
        options |= {"stemmer": None if stemmer == "none" else stemmer}
    if kind != Kind.BM25:
        options |= {"model": model, "structure": structure.value, "dtype": dtype.value}
        options |= {"query_prompt": query_prompt, "passage_prompt": passage_prompt}
        options |= {"batch_size": batch_size, "device": device, "half": half}
    started = time.perf_counter()
    with one_line_errors():
        from .. import search as library
        from ..data.english import find_corpus

        corpus = list(map(find_corpus, corpus))
        classes = {Kind.BM25: "BM25Index", Kind.DENSE: "DenseIndex", Kind.HYBRID: "HybridIndex"}
        built = getattr(library, classes[kind]).build(corpus, **options)
    seconds, size = time.perf_counter() - started, sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    typer.echo(f"Indexed {len(built):,} passages in {seconds:.1f} s: {out} ({kind}, {size / 1e6:,.1f} MB).")
    typer.echo(f'Search it with: igpo search --index {out} "…"')


def index_of_corpus(corpus: str | Path) -> Any:
    """The BM25 index of a corpus in the cache, built if need be."""
    from ..files import cache_dir
    from ..search import BM25Index, open_search

    path = Path(corpus).resolve()
    stamp = f"{path}|{path.stat().st_size}|{path.stat().st_mtime_ns}"
    directory = cache_dir("bm25", hashlib.sha256(stamp.encode()).hexdigest()[:16])
    while True:
        try:
            return open_search(directory)
        except (FileNotFoundError, ValueError):  # not built yet, or damaged
            pass
        try:
            return BM25Index.build(str(corpus), directory=directory, show_progress=sys.stderr.isatty())
        except BlockingIOError:  # another run, or this run on another machine, is building it
            time.sleep(1)


def search(
    query: Annotated[list[str], typer.Argument(help="One or several queries.")],
    index: _Index,
    k: Annotated[int, typer.Option("-k", "--k", help="Passages per query.", min=1)] = 3,
    max_words: Annotated[int, typer.Option(help="Longest passage shown, in words.", min=1)] = 100,
    model: _Model = None,
    device: _Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON Lines, one query per line.")] = False,
) -> None:
    """Search an index or a search server and print what a policy would read."""
    from ..search import open_search

    with one_line_errors():
        searchable = open_search(index, model=model, device=device)
        started = time.perf_counter()
        results = searchable.search_batch(query, k)
        seconds = time.perf_counter() - started
    if as_json:
        for text, passages in zip(query, results, strict=True):
            typer.echo(json.dumps({"query": text, "passages": list(map(asdict, passages))}, ensure_ascii=False))
        return
    _print_results(query, results, max_words)
    typer.echo(f"{sum(map(len, results))} passages in {seconds * 1000:.0f} ms")


def _print_results(queries: list[str], results: list[Any], max_words: int) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    from ..search.passages import first_words

    console = Console()
    for query, passages in zip(queries, results, strict=True):
        if len(queries) > 1:
            console.rule(Text(query, style="bold"), align="left")
        if not passages:
            console.print(Text(f"No passage matches {query!r}.", style="yellow"))
        for rank, passage in enumerate(passages, start=1):
            text = first_words(passage.text, max_words)
            title = Text.assemble((f" {rank} ", "bold cyan"), (passage.title or "(no title)", "bold"), " ")
            about = Text(f" {passage.id} · score {passage.score:.4g} ", style="dim")
            console.print(Panel(Text(text), title=title, subtitle=about, title_align="left", subtitle_align="right"))


def serve(
    index: _Index,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for a free one.", min=0, max=65535)] = 8000,
    model: _Model = None,
    device: _Device = None,
    topk: Annotated[int, typer.Option(help="Passages per query if a request names no number.", min=1)] = 3,
    max_queries: Annotated[int, typer.Option(help="Most queries per request.", min=1)] = 8192,
    max_topk: Annotated[int, typer.Option(help="Most passages per query.", min=1)] = 100,
    max_body: Annotated[int, typer.Option(help="Most bytes per request.", min=1)] = 64 * 1024 * 1024,
    max_waiting: Annotated[
        int, typer.Option(help="Most waiting queries; beyond it clients are told to try again.", min=1)
    ] = 16384,
    max_batch: Annotated[int, typer.Option(help="Most queries per call of the index.", min=1)] = 256,
) -> None:
    """Serve an index over HTTP, with the `/retrieve` protocol of Search-R1."""
    from .. import search as library

    limits = {"topk": topk, "max_queries": max_queries, "max_topk": max_topk, "max_body": max_body}
    with one_line_errors():
        searchable = library.open_search(index, model=model, device=device)
        library.serve(searchable, host=host, port=port, max_waiting=max_waiting, max_batch=max_batch, **limits)
