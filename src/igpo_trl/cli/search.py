"""`igpo` commands: search."""

import enum
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..search import Searchable


class Kind(enum.StrEnum):
    BM25 = "bm25"
    DENSE = "dense"
    HYBRID = "hybrid"


class Structure(enum.StrEnum):
    FLAT = "flat"
    HNSW = "hnsw"
    IVFPQ = "ivfpq"


class DType(enum.StrEnum):
    FLOAT16 = "float16"
    FLOAT32 = "float32"


_Index = Annotated[str, typer.Option("--index", help="Directory of an index, or http:// address of a search server.")]
_Model = Annotated[
    str | None, typer.Option(help="Model of a dense or hybrid index, if it is not where it was at the build.")
]
_Device = Annotated[str | None, typer.Option(help="Where the model runs, such as cuda:1; a GPU if there is one.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(index)
    app.command()(search)
    app.command()(serve)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What the user can mend ends in one line and a status of 1; other errors are ours and keep their traceback."""
    from ..search import SearchError

    try:
        yield
    except (ValueError, OSError, ImportError, SearchError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error


def index(
    corpus: Annotated[
        list[Path],
        typer.Option(help="Passages: .jsonl, .jsonl.gz, .parquet, .tsv or .tsv.gz; may be given several times."),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the index; an index that is there is replaced.")],
    kind: Annotated[Kind, typer.Option(help="By words, by meaning, or both with their ranks fused.")] = Kind.BM25,
    model: Annotated[
        str | None, typer.Option(help="sentence-transformers model of a dense or hybrid index: a name or a folder.")
    ] = None,
    structure: Annotated[
        Structure, typer.Option(help="Of the vectors: exact; a graph, fast; compressed cells, small.")
    ] = Structure.FLAT,
    dtype: Annotated[DType, typer.Option(help="Of the stored vectors.")] = DType.FLOAT16,
    query_prompt: Annotated[
        str | None, typer.Option(help="Put before every query; by default what the model asks for.")
    ] = None,
    passage_prompt: Annotated[
        str | None, typer.Option(help="Put before every passage; by default what the model asks for.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Passages that go through the model together.", min=1)] = 64,
    device: _Device = None,
    half: Annotated[bool, typer.Option("--half", help="Run the model in half precision.")] = False,
    k1: Annotated[float, typer.Option(help="BM25: how fast repeated words saturate.")] = 0.9,
    b: Annotated[float, typer.Option(help="BM25: how much long passages are discounted, 0 to 1.")] = 0.4,
    title_weight: Annotated[
        int, typer.Option(help="BM25: how often a word of the title counts, where one of the text counts once.", min=0)
    ] = 4,
    stopwords: Annotated[
        str, typer.Option(help="BM25: language whose stop words are left out, or none to keep every word.")
    ] = "english",
    stemmer: Annotated[
        str, typer.Option(help="BM25: language whose endings are cut off, or none to keep words as they are.")
    ] = "english",
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted build has left, instead of going on.")
    ] = False,
) -> None:
    """Index a corpus of passages. An interrupted build leaves no index; the same command goes on with it."""
    if kind != Kind.BM25 and model is None:
        raise typer.BadParameter(f"a {kind} index needs a model, such as intfloat/e5-base-v2.", param_hint="--model")
    if kind == Kind.BM25 and model is not None:
        raise typer.BadParameter("a bm25 index has no model; give --kind dense or hybrid.", param_hint="--model")
    progress = sys.stderr.isatty()  # bars fill log files
    words: dict[str, Any] = {"k1": k1, "b": b, "title_weight": title_weight}
    words["stopwords"] = None if stopwords == "none" else stopwords
    words["stemmer"] = None if stemmer == "none" else stemmer
    dense: dict[str, Any] = {
        "model": model,
        "structure": structure.value,
        "dtype": dtype.value,
        "query_prompt": query_prompt,
        "passage_prompt": passage_prompt,
        "batch_size": batch_size,
        "device": device,
        "half": half,
    }
    started = time.perf_counter()
    with _one_line_errors():
        built: Searchable
        if kind == Kind.BM25:
            from ..search import BM25Index

            built = BM25Index.build(corpus, directory=out, restart=restart, show_progress=progress, **words)
        elif kind == Kind.DENSE:
            from ..search import DenseIndex

            built = DenseIndex.build(corpus, out, restart=restart, show_progress=progress, **dense)
        else:
            from ..search import HybridIndex

            built = HybridIndex.build(corpus, out, restart=restart, show_progress=progress, **words, **dense)
    seconds, size = time.perf_counter() - started, sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    typer.echo(f"Indexed {len(built):,} passages in {seconds:.1f} s: {out} ({kind}, {size / 1e6:,.1f} MB).")
    typer.echo(f'Search it with: igpo search --index {out} "…"')


def search(
    query: Annotated[list[str], typer.Argument(help="What to look for; several queries are searched together.")],
    index: _Index,
    k: Annotated[int, typer.Option("-k", "--k", help="Passages per query.", min=1)] = 3,
    max_words: Annotated[int, typer.Option(help="Longest passage shown, in words.", min=1)] = 100,
    model: _Model = None,
    device: _Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON Lines, one query per line.")] = False,
) -> None:
    """Search an index or a search server, and print what a policy would read."""
    from ..search import open_search

    with _one_line_errors():
        searchable = open_search(index, model=model, device=device)
        started = time.perf_counter()
        results = searchable.search_batch(query, k)
        seconds = time.perf_counter() - started
    if as_json:
        for one, found in zip(query, results, strict=True):
            passages = [{"id": p.id, "title": p.title, "text": p.text, "score": p.score} for p in found]
            typer.echo(json.dumps({"query": one, "passages": passages}, ensure_ascii=False))
        return
    _print_results(query, results, max_words)
    typer.echo(f"{sum(map(len, results))} passages in {seconds * 1000:.0f} ms")


def _print_results(queries: list[str], results: list[Any], max_words: int) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    for query, found in zip(queries, results, strict=True):
        if len(queries) > 1:
            console.rule(Text(query, style="bold"), align="left")
        if not found:
            console.print(Text(f"No passage matches {query!r}.", style="yellow"))
        for rank, passage in enumerate(found, start=1):
            words = passage.text.split()
            text = passage.text if len(words) <= max_words else " ".join(words[:max_words]) + " …"
            title = Text.assemble((f" {rank} ", "bold cyan"), (passage.title or "(no title)", "bold"), " ")
            about = Text(f" {passage.id} · score {passage.score:.4g} ", style="dim")
            console.print(Panel(Text(text), title=title, subtitle=about, title_align="left", subtitle_align="right"))


def serve(
    index: _Index,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one of this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for a free one.", min=0, max=65535)] = 8000,
    model: _Model = None,
    device: _Device = None,
) -> None:
    """Serve an index over HTTP, with the `/retrieve` protocol of Search-R1."""
    from ..search import open_search
    from ..search import serve as run_server

    with _one_line_errors():
        run_server(open_search(index, model=model, device=device), host=host, port=port)
