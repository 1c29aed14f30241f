"""`igpo data`: look at questions and check them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from datasets import Dataset

_SOURCE_HELP = (
    "A file, a set by name (nq, triviaqa, popqa, hotpotqa, 2wiki, musique, bamboogle; name:split), or owner/name."
)
_Split = Annotated[str | None, typer.Option(help="Split of data sets that name none; files have none.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="Read at most so many questions of each source.")]

commands = typer.Typer(help="Look at questions and check them.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(commands, name="data")


@commands.command()
def show(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help=_SOURCE_HELP)],
    split: _Split = None,
    samples: Annotated[int, typer.Option(min=0, help="How many questions of each set to print.")] = 3,
    limit: _Limit = None,
) -> None:
    """Print what is in sources of questions: counts per set, and a few samples."""
    from rich.console import Console
    from rich.table import Table

    from ..data import describe

    questions = _load(sources, split, limit)
    console = Console()
    counts = describe(questions)
    table = Table("set", "questions", "hops", "answers each", "words", "longest", "with titles")
    for row in counts:
        hops = ", ".join(f"{number or '?'}: {count:,}" for number, count in row["hops"].items())
        words = (f"{row['aliases']:.1f}", f"{row['answer_words']:g}", f"{row['longest_answer']:,}")
        table.add_row(row["dataset"], f"{row['questions']:,}", hops, *words, f"{row['with_titles']:,}")
    console.print(table)
    console.print("words, longest: of the first answer; hops ?: not known", style="dim")
    if samples:
        names = questions["dataset"][:]
        for row in counts:
            first = [i for i, name in enumerate(names) if name == row["dataset"]][:samples]
            for question in questions.select(first):
                console.print(_sample(question))


@commands.command()
def check(
    train: Annotated[str, typer.Argument(help=_SOURCE_HELP)],
    evaluation: Annotated[
        list[str] | None, typer.Argument(metavar="[EVAL]...", help="Sources to evaluate on, each a split of its own.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of TRAIN, if it is no file and names none.")] = "train",
    tokenizer: Annotated[
        str | None, typer.Option(help="Measure answers in tokens of this model (a name or a folder), not in words.")
    ] = None,
    max_answer_length: Annotated[
        int | None, typer.Option(min=1, help="Longest answer that is no finding. [default: 64 tokens or 32 words]")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Questions to print for each finding.")] = 3,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if there is any finding.")] = False,
) -> None:
    """Check questions before training on them: answers, repetitions, and what is also in the evaluation sets."""
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
        console.print("[green]Nothing to complain of.[/green]")
    elif strict:
        raise typer.Exit(1)


def _load(sources: list[str], split: str | None, limit: int | None) -> "Dataset":
    from ..data import load_questions

    try:
        return load_questions(sources if len(sources) > 1 else sources[0], None, split=split, limit=limit)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="SOURCE") from error


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        what = "folder" if Path(name).exists() else "folder, and no tokenizer on the hub that can be read"
        raise typer.BadParameter(f"no tokenizer in this {what}: {name}", param_hint="--tokenizer") from error


def _sample(question: dict[str, Any]) -> Any:
    from rich.text import Text

    from ..data import question_of

    gold, *aliases = question["answers"]
    shown = Text.assemble(
        "\n", (question["id"], "dim"), "\n  ", question_of(question["prompt"]), "\n  ", (gold, "bold green")
    )
    if aliases:
        shown.append(f"  also: {'; '.join(aliases[:5])}{f' and {len(aliases) - 5} more' if len(aliases) > 5 else ''}")
    if question["supporting_titles"]:
        shown.append(f"\n  found in: {'; '.join(question['supporting_titles'])}", "dim")
    return shown
