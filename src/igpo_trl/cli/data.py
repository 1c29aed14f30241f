"""`igpo data`: look at questions and check them, alone and against a corpus."""

import enum
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import one_line_errors
from .search import index_of_corpus

if TYPE_CHECKING:
    from datasets import Dataset

_SOURCE_HELP = (
    "A file, a set by name (nq, triviaqa, popqa, hotpotqa, 2wiki, musique, bamboogle, world; name:split), or "
    "owner/name."
)
_Split = Annotated[str | None, typer.Option(help="Split of data sets that name none; files have none.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="Number of questions to read from each source.")]

Kept = enum.StrEnum("Kept", ["ANSWERABLE", "UNANSWERABLE"])

commands = typer.Typer(help="Look at questions and check them, alone and against a corpus.", no_args_is_help=True)


@commands.command()
def show(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help=_SOURCE_HELP)],
    split: _Split = None,
    samples: Annotated[int, typer.Option(min=0, help="How many questions of each set to print.")] = 3,
    limit: _Limit = None,
) -> None:
    """Print the contents of sources of questions: counts per set, and a few samples."""
    from rich.console import Console
    from rich.table import Table

    rows_of: dict[str, list[dict[str, Any]]] = {}
    for row in _load(sources, split, limit):
        rows_of.setdefault(row["dataset"], []).append(row)
    console = Console()
    table = Table("set", "questions", "hops", "answers each", "words", "longest", "with titles")
    for name, rows in rows_of.items():
        table.add_row(name, *_counts(rows))
    console.print(table)
    console.print("words: median of the first answers; longest: of the first answers; hops ?: unknown", style="dim")
    for rows in rows_of.values():
        for row in rows[:samples]:
            console.print(_sample(row))


@commands.command()
def check(
    train: Annotated[str, typer.Argument(help=_SOURCE_HELP)],
    evaluation: Annotated[
        list[str] | None, typer.Argument(metavar="[EVAL]...", help="Evaluation questions, each source a split.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of TRAIN, if it is not a file and names none.")] = "train",
    tokenizer: Annotated[
        str | None, typer.Option(help="Measure answers in tokens of this model (a name or a folder), not in words.")
    ] = None,
    max_answer_length: Annotated[
        int | None, typer.Option(min=1, help="Longest answer that is not a finding; by default 64 tokens or 32 words.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Questions to print for each finding.")] = 3,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if there are findings.")] = False,
) -> None:
    """Check questions before training on them: answers, repeated questions, and overlap with the evaluation sets."""
    from rich.console import Console

    from ..data import check_questions

    eval_sets = {source: _load([source], None, None) for source in evaluation or []}
    report = check_questions(
        _load([train], split, None),
        eval_sets,
        tokenizer=_tokenizer(tokenizer),
        max_answer_length=max_answer_length,
        examples=examples,
        warn=False,
    )
    console = Console()
    console.print(", ".join(f"{name}: {size:,} questions" for name, size in report.sizes.items()), markup=False)
    for finding in report.findings:
        console.print(f"[yellow]{finding.count:,}[/yellow]", end=" ")
        console.print(f"{finding.message} in {finding.split}", markup=False)
        for example in finding.examples:
            console.print(f"    {example}", markup=False, highlight=False)
    if not report:
        console.print("[green]No findings.[/green]")
    elif strict:
        raise typer.Exit(1)


@commands.command()
def corpus(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="hotpotqa, 2wiki, musique, or a file or data set whose questions have contexts."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The corpus, .jsonl or .jsonl.gz; an existing file is replaced.")],
    questions: Annotated[
        Path | None, typer.Option(help="Also write the questions, with the ids of their supporting passages.")
    ] = None,
    split: _Split = None,
    limit: _Limit = None,
) -> None:
    """Build a corpus from the paragraphs that come with questions, each distinct paragraph once."""
    from tqdm.auto import tqdm

    from ..data import build_corpus

    _check_ending("--out", out)
    _check_ending("--questions", questions)
    with one_line_errors():
        track = partial(tqdm, unit=" questions", leave=False, disable=not sys.stderr.isatty())
        counts = build_corpus(_one_or_all(sources), out, questions, split=split, limit=limit, track=track)
    for count in counts:
        typer.echo(
            f"{count.source}: {count.questions:,} questions with {count.paragraphs:,} paragraphs, "
            f"{count.passages:,} of them new."
        )
    typer.echo(f"Wrote {sum(count.passages for count in counts):,} passages to {out}.")
    if questions is not None:
        typer.echo(f"Wrote {sum(count.questions for count in counts):,} questions to {questions}.")
    typer.echo(f"Index them with: igpo index --corpus {out} --out DIR")


@commands.command()
def audit(
    questions: Annotated[list[str], typer.Argument(metavar="QUESTIONS...", help=_SOURCE_HELP)],
    index: Annotated[
        str | None, typer.Option(help="Directory of an index, or http:// address of a search server.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Passages, instead of an index: they are indexed in the cache.")
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="Passages per search.", min=1)] = 10,
    keep: Annotated[
        tuple[Kept, Path] | None,
        typer.Option(metavar="answerable|unanswerable OUT", help="Write these questions to OUT, with all columns."),
    ] = None,
    split: _Split = None,
    limit: _Limit = None,
    examples: Annotated[int, typer.Option(min=0, help="Unanswerable questions to print.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all unanswerable questions.")] = False,
) -> None:
    """Find out which questions a corpus can answer: whether it has their titles and answers, and search finds them."""
    from rich.console import Console
    from tqdm.auto import tqdm

    from ..data.questions import write_questions
    from ..evaluation.audit import audit_questions, share_of

    if (index is None) == (corpus is None):
        raise typer.BadParameter("give the passages: either --index (an index of them) or --corpus (a file of them).")
    if keep is not None and "://" in str(index):
        raise typer.BadParameter("a search server does not show its corpus. Give an index or --corpus.")
    _check_ending("--keep", keep and keep[1])
    rows = _load(questions, split, limit)
    with one_line_errors():
        searchable = index if index is not None else index_of_corpus(str(corpus))
        track = partial(tqdm, unit="", leave=False, disable=not sys.stderr.isatty())
        result = audit_questions(searchable, rows, k, track=track)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        console = Console() if sys.stdout.isatty() else Console(width=200)
        console.print(result.table().render(console.width))
        for question in result.unanswerable[:examples]:
            about = f"{question.question}  {question.answers[0]}\n    {question.reason}"
            console.print(f"{question.id}: {about}", markup=False, highlight=False)
        judged = share_of(result.questions, "answerable")["of"]
        if result.passages is not None and judged < len(rows):
            typer.echo(f"{len(rows) - judged} yes-no questions without titles cannot be judged.")
    if keep is not None:
        ids = {question.id for question in result.unanswerable}
        if keep[0] == Kept.ANSWERABLE:
            ids = {question.id for question in result.questions} - ids
        with one_line_errors():
            if not ids:
                raise ValueError(f"none of the {len(rows)} questions is {keep[0]}, so {keep[1]} was not written.")
            write_questions(keep[1], _one_or_all(questions), ids, split=split, limit=limit)
        typer.echo(f"Wrote {len(ids):,} of {len(rows):,} questions to {keep[1]}.", err=as_json)


@commands.command()
def paraphrase(
    questions: Annotated[list[str], typer.Argument(metavar="QUESTIONS...", help=_SOURCE_HELP)],
    out: Annotated[Path, typer.Option(help="File to write: .jsonl or .jsonl.gz.")],
    known: Annotated[
        Path | None,
        typer.Option("--file", help='JSON file with paraphrases of your own: {"New York City": ["NYC"]}.'),
    ] = None,
    rules: Annotated[bool, typer.Option(help="Whether to rewrite dates, numbers and names by rules.")] = True,
    split: _Split = None,
    limit: _Limit = None,
) -> None:
    """Add other ways of writing the answers to questions, so that beliefs and scores count them too."""
    from ..data.paraphrases import add_paraphrases, read_paraphrases
    from ..data.questions import read_questions, to_record
    from ..data.sets import find_sources
    from ..files import write_json_lines

    _check_ending("--out", out)
    number = added = changed = 0
    with one_line_errors():
        own = read_paraphrases(known) if known is not None else None
        sources = find_sources(_one_or_all(questions), split)
        with write_json_lines(out) as write:
            for row, record in read_questions(sources, limit=limit, all_columns=True):
                answers = add_paraphrases(row["answers"], own, rules=rules)
                number, added = number + 1, added + len(answers) - len(row["answers"])
                changed += len(answers) > len(row["answers"])
                write(to_record(row | {"answers": answers}, record))
    typer.echo(f"Wrote {number:,} questions to {out}, {changed:,} of them with {added:,} more answers.")


def _load(sources: list[str], split: str | None, limit: int | None) -> "Dataset":
    from ..data import load_questions

    with one_line_errors(OSError, ValueError, param_hint="SOURCE"):
        return load_questions(_one_or_all(sources), None, split=split, limit=limit)


def _check_ending(option: str, path: Path | None) -> None:
    if path is not None and not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise typer.BadParameter(f"got {path}, expected a file that ends in .jsonl or .jsonl.gz.", param_hint=option)


def _one_or_all(sources: list[str]) -> str | list[str]:
    """One source may be several with commas between them."""
    return sources if len(sources) > 1 else sources[0]


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        problem = f"no tokenizer in this folder, or on the hub under this name: {name}"
        raise typer.BadParameter(problem, param_hint="--tokenizer") from error


def _counts(rows: list[dict[str, Any]]) -> list[str]:
    """Cells of the table for the questions of one set."""
    hops = sorted(Counter(row["hops"] or 0 for row in rows).items())
    words = [len(row["answers"][0].split()) for row in rows]
    return [
        f"{len(rows):,}",
        ", ".join(f"{number or '?'}: {count:,}" for number, count in hops),
        f"{sum(len(row['answers']) for row in rows) / len(rows):.1f}",
        f"{median(words):g}",
        f"{max(words):,}",
        f"{sum(bool(row['supporting_titles']) for row in rows):,}",
    ]


def _sample(question: dict[str, Any]) -> Any:
    from rich.text import Text

    gold, *aliases = question["answers"]
    text = Text.assemble(
        "\n", (question["id"], "dim"), "\n  ", question["prompt"][-1]["content"], "\n  ", (gold, "bold green")
    )
    if aliases:
        text.append(f"  also: {'; '.join(aliases[:5])}{f' and {len(aliases) - 5} more' if len(aliases) > 5 else ''}")
    if question["supporting_titles"]:
        text.append(f"\n  found in: {'; '.join(question['supporting_titles'])}", "dim")
    return text
