"""`igpo eval`: roll out a model and score it, compare runs, score an index alone, ask a judge."""

import json
import os
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..rewards import Variant
from . import rollout_options
from .errors import one_line_errors
from .rollout_options import option

if TYPE_CHECKING:
    from ..evaluation.tables import Table
    from ..trajectory import Trajectory

commands = typer.Typer(
    help="Roll out a model on questions and score it; compare runs; score an index alone.",
    invoke_without_command=True,
)

_judge_option = partial(typer.Option, rich_help_panel="Judge")
_URL_HELP = "Endpoint of the chat-completions protocol, up to /v1."
_MODEL_HELP = "Name of the judge's model."
_Variant = Annotated[Variant, typer.Option(help="Scorer of F1 and EM; reference is that of the IGPO authors.")]
_KeyName = Annotated[str, _judge_option(help="Environment variable with the judge's key.")]
_Workers = Annotated[int, _judge_option(help="Requests to the judge at a time.", min=1)]
_KEY_NAME = "IGPO_JUDGE_KEY"


@commands.callback()
def evaluate(
    context: typer.Context,
    data: Annotated[list[str] | None, typer.Option(help="Questions: file, or name of a set; repeatable.")] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(help="What to search: directory of an index, or http://…; one for all data, or one for each."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the run. An existing run is resumed.")] = None,
    model: Annotated[str | None, typer.Option(help="Model: a directory, or a name on the hub.")] = None,
    adapter: rollout_options.Adapter = None,
    limit: Annotated[int | None, typer.Option(help="Questions per data set, chosen by a hash of their ids.")] = None,
    variant: _Variant = "squad",
    k: Annotated[
        str | None,
        typer.Option(
            help="Passages per search; several with --retrieval-only, as in 5,10.", show_default="3, or 5,10"
        ),
    ] = None,
    config: Annotated[
        Path | None,
        option(
            help="Configuration of a training run (YAML): its limits, template and search options are the defaults.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    temperature: rollout_options.Temperature = 0.0,
    num_samples: Annotated[int, option(help="Rollouts per question.", min=1)] = 1,
    seed: rollout_options.Seed = 0,
    batch_size: Annotated[int | None, option(help="Rollouts at a time; 16, or 256 with vLLM.", min=1)] = None,
    max_turns: rollout_options.MaxTurns = None,
    max_turn_length: rollout_options.MaxTurnLength = None,
    max_completion_length: rollout_options.MaxCompletionLength = None,
    forced_answer: rollout_options.ForcedAnswer = None,
    stop_tools: rollout_options.StopTools = None,
    max_words: rollout_options.MaxWords = None,
    many_queries: rollout_options.ManyQueries = None,
    system_prompt: rollout_options.SystemPrompt = None,
    beliefs: Annotated[bool, option(help="Score the belief in the right answer before every turn.")] = True,
    calibration: Annotated[
        int | None,
        option(
            help="Answers to sample before every turn, to compare the belief with the share of right ones.",
            min=1,
        ),
    ] = None,
    vllm: Annotated[bool, option("--vllm", help="Sample with vLLM.")] = False,
    dtype: rollout_options.DType = None,
    retrieval_only: Annotated[
        bool,
        option("--retrieval-only", help="Search with the questions alone.", rich_help_panel="Index alone"),
    ] = False,
    judge_url: Annotated[str | None, _judge_option(help=_URL_HELP)] = None,
    judge_model: Annotated[str | None, _judge_option(help=_MODEL_HELP)] = None,
    judge_key: _KeyName = _KEY_NAME,
    judge_workers: _Workers = 8,
) -> None:
    """
    Roll out a model on questions and score it; compare runs; score an index alone.

    `igpo eval --model M --data nq.jsonl --index INDEX --out RUN` rolls out, prints a table and saves it to
    RUN/results.json and RUN/results.md. If it is killed, the same command resumes where it stopped.

    `igpo eval --retrieval-only --data nq.jsonl --index INDEX` measures how often the index finds what is needed.
    """
    _check_usage(context)
    if context.invoked_subcommand is not None:
        return
    if not data or not index:
        raise typer.BadParameter("give the questions with --data and what to search with --index.")
    if retrieval_only:
        with one_line_errors():
            return _score_index(data, index, _numbers(k or "5,10", several=True), limit, out)
    if model is None or out is None:
        raise typer.BadParameter("give --model and --out (or --retrieval-only).")
    if (judge_url is None) != (judge_model is None):
        raise typer.BadParameter("a judge needs both --judge-url and --judge-model.")
    with one_line_errors():
        from ..evaluation.rollouts import roll_out
        from ..evaluation.settings import make_settings

        # Options are named after fields of `EvaluationSettings` and `IGPOConfig`.
        options = context.params | {"sources": data, "indexes": index, "k": _numbers(k)[0] if k else None}
        settings = make_settings(options, config)
        roll_out(settings, out, batch_size)
        if os.environ.get("RANK", "0") != "0":
            return
        if judge_url is not None and judge_model is not None:
            _ask_judge(out, judge_url, judge_model, judge_key, judge_workers)
        _score(out, variant)


@commands.command()
def table(
    runs: Annotated[list[Path], typer.Argument(help="Runs of `igpo eval`, or files of trajectories.", exists=True)],
    variant: _Variant = "squad",
) -> None:
    """Print the table of a run, which may be unfinished."""
    with one_line_errors():
        for run in runs:
            _score(run, variant)


@commands.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A run of `igpo eval`, or a file of trajectories.", exists=True)],
    second: Annotated[Path, typer.Argument(help="Another one, on the same questions.", exists=True)],
    variant: _Variant = "squad",
    out: Annotated[Path | None, typer.Option(help="Directory for compare.json and compare.md.")] = None,
) -> None:
    """Compare two runs question by question: differences, intervals, and tests of whether they could be chance."""
    from ..evaluation import compare_runs, load_run
    from ..evaluation.run import differing_settings
    from ..trajectory import RUN_FILE

    with one_line_errors():
        comparison = compare_runs(load_run(first), load_run(second), variant)
        comparison_table = comparison.table((f"A: {first.name}", f"B: {second.name}"))
        _print(comparison_table)
        files = [run / RUN_FILE for run in (first, second)]
        if all(file.is_file() for file in files):
            settings = [json.loads(file.read_text(encoding="utf-8"))["settings"] for file in files]
            for name, (a, b) in sorted(differing_settings(*settings).items()):
                typer.echo(f"  {name}: {a} (A), {b} (B)")
        if out is not None:
            record = {"first": str(first), "second": str(second), **comparison.to_dict()}
            _save(out / "compare", record, comparison_table)


@commands.command()
def judge(
    run: Annotated[Path, typer.Argument(help="A run of `igpo eval`.", exists=True, file_okay=False)],
    judge_url: Annotated[str, typer.Option("--url", help=_URL_HELP)],
    judge_model: Annotated[str, typer.Option("--model", help=_MODEL_HELP)],
    judge_key: _KeyName = _KEY_NAME,
    judge_workers: _Workers = 8,
    variant: _Variant = "squad",
) -> None:
    """Ask a language model whether the answers of a run are right, and save its verdicts and reasons with the run."""
    with one_line_errors():
        _ask_judge(run, judge_url, judge_model, judge_key, judge_workers)
        _score(run, variant)


def _check_usage(context: typer.Context) -> None:
    """Prints the help if there are no arguments, and refuses options before a command."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    options = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if options and context.invoked_subcommand is not None:
        raise typer.BadParameter(
            f"--{options[0].replace('_', '-')} belongs to `igpo eval` without a command, not to "
            f"`igpo eval {context.invoked_subcommand}`; for several sources repeat --data."
        )
    if not options and context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def _score(run: Path, variant: Variant) -> None:
    """Prints the tables of a run, and saves them in its directory."""
    from ..evaluation import load_run, score_run
    from ..evaluation.calibration import calibrate, calibration_table, reduction_table
    from ..evaluation.tables import to_plain
    from ..training.card.scores import add_evaluation
    from ..trajectory import RUN_FILE

    rollouts = load_run(run)
    scores, calibration = score_run(rollouts, variant), calibrate(rollouts)
    of_beliefs = [calibration_table(calibration), reduction_table(rollouts)] if calibration else []
    tables = [*scores.tables(), *(each for each in of_beliefs if each is not None)]
    for each in tables:
        _print(each)
    if (run / RUN_FILE).is_file():  # nothing is written into the directory of a training run
        results = scores.to_dict() | ({"calibration": to_plain(calibration)} if calibration else {})
        _save(run / "results", results, *tables)
        if calibration:
            _plot_calibration(run, rollouts)
        typer.echo(f"Saved {run / 'results.json'} and {run / 'results.md'}")
        if add_evaluation(run / "results.md"):
            typer.echo(f"The table is in the model card too: {run.absolute().parent / 'README.md'}")


def _plot_calibration(run: Path, rollouts: "list[Trajectory]") -> None:
    """Saves the reliability plot with a run, if matplotlib is installed."""
    from ..evaluation.calibration import reliabilities
    from ..evaluation.figures import plot_calibration

    try:
        plot_calibration(reliabilities(rollouts), run / "calibration")
    except ImportError as error:
        typer.echo(f"No reliability plot: {error}", err=True)
    else:
        typer.echo(f"Saved {run / 'calibration'}.svg and .png")


def _score_index(sources: list[str], indexes: list[str], ks: list[int], limit: int | None, out: Path | None) -> None:
    """Searches with the questions themselves, and prints and saves how often the results hold the answers."""
    from tqdm.auto import tqdm

    from ..data import load_questions
    from ..evaluation.retrieval import retrieval_table, score_retrieval
    from ..evaluation.settings import by_dataset, choose_questions, pair_sources
    from ..search import open_search

    scores = []
    for source, location in pair_sources(sources, indexes):
        index = open_search(location)
        questions = choose_questions(load_questions(source, None).to_list(), limit)
        for dataset, rows in sorted(by_dataset(questions).items()):
            with tqdm(total=len(rows), desc=dataset, unit="", leave=False) as bar:
                name = location.rstrip("/")
                scores.append(score_retrieval(index, rows, ks, dataset=dataset, name=name, progress=bar.update))
    retrieval = retrieval_table(scores)
    _print(retrieval)
    if out is not None:
        _save(out / "retrieval", [each.to_dict() for each in scores], retrieval)
        typer.echo(f"Saved {out / 'retrieval.json'} and {out / 'retrieval.md'}")


def _ask_judge(run: Path, url: str, model: str, key_name: str, workers: int) -> None:
    """Judges the rollouts of a run that have no verdict of this judge yet."""
    from tqdm.auto import tqdm

    from ..evaluation import load_run
    from ..evaluation.judge import Judge, judge_run
    from ..trajectory import VERDICTS_FILE

    trajectories = load_run(run)
    total = len(trajectories)
    with (
        closing(Judge(url, model, os.environ.get(key_name, ""))) as judge,
        tqdm(total=total, desc="judge", unit="") as bar,
    ):
        unreadable = judge_run(judge, trajectories, run / VERDICTS_FILE, workers=workers, progress=bar.update)
    if unreadable:
        typer.echo(f"{unreadable} of {total} rollouts have no verdict: no reply could be read.", err=True)


def _print(table: "Table") -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # do not fold a table in a log file to 80 columns
        console = Console(width=200)
    console.print(table.render(console.width))


def _save(path: Path, record: object, *tables: "Table") -> None:
    """Writes `record` to `path` with the suffix `.json`, and tables to `path` with the suffix `.md`."""
    from ..evaluation.run import write_json

    write_json(path.with_suffix(".json"), record)
    path.with_suffix(".md").write_text("\n".join(each.to_markdown() for each in tables), encoding="utf-8")


def _numbers(text: str, several: bool = False) -> list[int]:
    """The value of `--k`."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"got {text!r}, expected numbers as in 5 or 5,10.", param_hint="--k") from None
    if len(numbers) > 1 and not several:
        raise typer.BadParameter(f"got {text!r}, expected one number without --retrieval-only.", param_hint="--k")
    return numbers
