"""`igpo eval`: roll out and score, compare runs, look at an index alone, ask a judge."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import one_line_errors

if TYPE_CHECKING:
    from ..rewards import Variant

ROLLOUT, INDEX, JUDGE = "Rollouts", "Retrieval alone", "Judge"

eval_app = typer.Typer(
    help="Roll out a model on questions and score it; compare runs; look at an index alone.",
    invoke_without_command=True,
)

_Variant = Annotated[str, typer.Option(help="Scorer of F1 and EM: squad, or reference for the IGPO authors'.")]
_JudgeModel = Annotated[str | None, typer.Option(help="Name of the judge's model.", rich_help_panel=JUDGE)]
_KeyName = Annotated[str, typer.Option(help="Environment variable that holds the judge's key.", rich_help_panel=JUDGE)]
_Workers = Annotated[int, typer.Option(help="Requests to the judge at a time.", min=1, rich_help_panel=JUDGE)]
_KEY = "IGPO_JUDGE_KEY"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(eval_app, name="eval")


@eval_app.callback()
def evaluate(
    context: typer.Context,
    data: Annotated[
        list[str] | None, typer.Option(help="Questions: a file or the name of a set. Repeat for several.")
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(help="What to search: the directory of an index or http://…; one for all data, or one for each."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the run. A run that is there goes on.")] = None,
    model: Annotated[str | None, typer.Option(help="Model: a directory, or a name on the hub.")] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter on top of it.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per data set, chosen by a hash of their ids.")] = None,
    variant: _Variant = "squad",
    config: Annotated[
        Path | None,
        typer.Option(
            help="Configuration of a training run (YAML): its limits, template and search options are the defaults.",
            exists=True,
            dir_okay=False,
            rich_help_panel=ROLLOUT,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token.", min=0.0, rich_help_panel=ROLLOUT)
    ] = 0.0,
    num_samples: Annotated[int, typer.Option(help="Rollouts per question.", min=1, rich_help_panel=ROLLOUT)] = 1,
    seed: Annotated[int, typer.Option(help="Of the sampling.", rich_help_panel=ROLLOUT)] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Rollouts at a time; 16, or 256 with vLLM.", min=1, rich_help_panel=ROLLOUT),
    ] = None,
    max_turns: Annotated[
        int | None, typer.Option(help="Turns, the answer included.", show_default="8", rich_help_panel=ROLLOUT)
    ] = None,
    max_turn_length: Annotated[
        int | None, typer.Option(help="Sampled tokens of one turn.", rich_help_panel=ROLLOUT)
    ] = None,
    max_completion_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a rollout, passages included.", show_default="4096", rich_help_panel=ROLLOUT),
    ] = None,
    forced_answer: Annotated[
        bool | None,
        typer.Option(
            "--forced-answer/--no-forced-answer", help="Ask for an answer at a limit.", rich_help_panel=ROLLOUT
        ),
    ] = None,
    k: Annotated[
        str | None,
        typer.Option(
            help="Passages per search; with --retrieval-only several, as in 5,10.", show_default="3, or 5,10"
        ),
    ] = None,
    max_words: Annotated[
        int | None, typer.Option(help="Longest passage shown, in words.", show_default="200", rich_help_panel=ROLLOUT)
    ] = None,
    many_queries: Annotated[
        bool | None,
        typer.Option("--many-queries", help="One search may have several queries.", rich_help_panel=ROLLOUT),
    ] = None,
    system_prompt: Annotated[
        str | None,
        typer.Option(
            help="think, no_think, none, a text, or a file with one.", show_default="think", rich_help_panel=ROLLOUT
        ),
    ] = None,
    beliefs: Annotated[
        bool, typer.Option(help="Score the belief in the right answer before every turn.", rich_help_panel=ROLLOUT)
    ] = True,
    vllm: Annotated[bool, typer.Option("--vllm", help="Sample with vLLM.", rich_help_panel=ROLLOUT)] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the weights; bfloat16 on a GPU, else float32.", rich_help_panel=ROLLOUT),
    ] = None,
    retrieval_only: Annotated[
        bool,
        typer.Option(
            "--retrieval-only", help="No model: search with the questions as they stand.", rich_help_panel=INDEX
        ),
    ] = False,
    judge_url: Annotated[
        str | None,
        typer.Option(help="Endpoint of the chat-completions protocol, up to /v1.", rich_help_panel=JUDGE),
    ] = None,
    judge_model: _JudgeModel = None,
    judge_key: _KeyName = _KEY,
    judge_workers: _Workers = 8,
) -> None:
    """
    Roll out a model on questions and score it; compare runs; look at an index alone.

    `igpo eval --model M --data nq.jsonl --index INDEX --out RUN` rolls out, prints a table and saves it to
    RUN/results.json and RUN/results.md. Killed and started again, it goes on where it was.

    `igpo eval --retrieval-only --data nq.jsonl --index INDEX` asks how often the index finds what is needed.
    """
    given = [name for name in context.params if _on_the_command_line(context, name)]
    if context.invoked_subcommand is not None:
        if given:
            name = given[0].replace("_", "-")
            raise typer.BadParameter(
                f"--{name} belongs to `igpo eval` without a command, not to `igpo eval {context.invoked_subcommand}`; "
                "for several sources repeat --data."
            )
        return
    if not given:
        typer.echo(context.get_help())
        raise typer.Exit(2)
    if not data or not index:
        raise typer.BadParameter("give the questions with --data and what to search with --index.")
    with one_line_errors():
        if retrieval_only:
            ks = _numbers(k or "5,10")
            _score_retrieval(data, index, ks, limit, out)
            return
        if model is None or out is None:
            raise typer.BadParameter("give --model and --out (or --retrieval-only).")
        if (judge_url is None) != (judge_model is None):
            raise typer.BadParameter("a judge needs both --judge-url and --judge-model.")
        rollout = {
            "max_turns": max_turns,
            "max_turn_length": max_turn_length,
            "max_completion_length": max_completion_length,
            "forced_answer": forced_answer,
        }
        settings = _settings(
            config,
            rollout={name: value for name, value in rollout.items() if value is not None},
            model=model,
            sources=data,
            indexes=index,
            adapter=adapter,
            limit=limit,
            num_samples=num_samples,
            temperature=temperature,
            seed=seed,
            k=_one_number(k) if k else None,
            max_words=max_words,
            many_queries=many_queries,
            system_prompt=system_prompt,
            beliefs=beliefs,
            variant=_checked_variant(variant),
            vllm=vllm,
            dtype=dtype,
        )
        _evaluate(settings, out, batch_size)
        if judge_url is not None and judge_model is not None and _is_main_process():
            _ask_judge(out, judge_url, judge_model, judge_key, judge_workers)
        if _is_main_process():
            _show_run(out, variant)


@eval_app.command()
def table(
    runs: Annotated[list[Path], typer.Argument(help="Runs of `igpo eval`, or files of trajectories.", exists=True)],
    variant: _Variant = "squad",
) -> None:
    """Print the table of a run, also of one that is not finished."""
    with one_line_errors():
        for run in runs:
            _show_run(run, variant)


@eval_app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A run of `igpo eval`, or a file of trajectories.", exists=True)],
    second: Annotated[Path, typer.Argument(help="Another one, on the same questions.", exists=True)],
    variant: _Variant = "squad",
    out: Annotated[Path | None, typer.Option(help="Also save it: compare.json and compare.md go here.")] = None,
) -> None:
    """Compare two runs question by question: differences, intervals, and tests of whether they could be chance."""
    from ..evaluation import compare_runs, load_trajectories
    from ..evaluation.store import write_json

    with one_line_errors():
        found = compare_runs(load_trajectories(first), load_trajectories(second), _checked_variant(variant))
        shown = found.table((f"A: {first.name}", f"B: {second.name}"))
        _print(shown)
        for line in _other_settings(first, second):
            typer.echo(line)
        if out is not None:
            write_json(out / "compare.json", {"first": str(first), "second": str(second), **found.to_dict()})
            (out / "compare.md").write_text(shown.to_markdown(), encoding="utf-8")


@eval_app.command()
def judge(
    run: Annotated[Path, typer.Argument(help="A run of `igpo eval`.", exists=True, file_okay=False)],
    judge_url: Annotated[str, typer.Option("--url", help="Endpoint of the chat-completions protocol, up to /v1.")],
    judge_model: Annotated[str, typer.Option("--model", help="Name of the judge's model.")],
    judge_key: _KeyName = _KEY,
    judge_workers: _Workers = 8,
    variant: _Variant = "squad",
) -> None:
    """Ask a language model whether the answers of a run are right; verdicts and reasons are kept beside it."""
    with one_line_errors():
        _ask_judge(run, judge_url, judge_model, judge_key, judge_workers)
        _show_run(run, variant)


def _evaluate(settings: Any, out: Path, batch_size: int | None) -> None:
    from ..evaluation.rollouts import evaluate as roll_out

    roll_out(settings, out, batch_size)


def _settings(config: Path | None, rollout: dict[str, Any], **given: Any) -> Any:
    """Settings from the command line, then from a training configuration, then the defaults."""
    from ..evaluation.settings import EvaluationSettings, settings_of_training

    from_file = settings_of_training(config) if config is not None else {}
    defaults = {"max_turns": 8, "max_completion_length": 4096}
    wanted = {name: value for name, value in given.items() if value is not None}
    limits = {**defaults, **from_file.pop("rollout", {}), **rollout}
    return EvaluationSettings(**{**from_file, **wanted}, rollout=limits)


def _show_run(run: Path, variant: str) -> None:
    from ..evaluation import load_trajectories, score_run
    from ..evaluation.store import RUN_FILE, write_json

    scores = score_run(load_trajectories(run), _checked_variant(variant))
    tables = scores.tables()
    for one in tables:
        _print(one)
    if (run / RUN_FILE).is_file():  # the directory of a training run is not ours to write to
        write_json(run / "results.json", scores.to_dict())
        text = "\n".join(one.to_markdown() for one in tables)
        (run / "results.md").write_text(text, encoding="utf-8")
        typer.echo(f"Saved {run / 'results.json'} and {run / 'results.md'}")


def _score_retrieval(data: list[str], index: list[str], ks: list[int], limit: int | None, out: Path | None) -> None:
    from tqdm.auto import tqdm

    from ..data import load_questions
    from ..evaluation.questions import pair, select
    from ..evaluation.retrieval import retrieval_table, score_retrieval
    from ..evaluation.store import write_json
    from ..search import open_search

    found = []
    for source, where in pair(data, index):
        searched = open_search(where)
        rows = select(load_questions(source, None).to_list(), limit)
        for dataset in sorted({row["dataset"] for row in rows}):
            of_set = [row for row in rows if row["dataset"] == dataset]
            with tqdm(total=len(of_set), desc=dataset, unit="", leave=False) as bar:
                found.append(
                    score_retrieval(searched, of_set, ks, dataset=dataset, name=where.rstrip("/"), progress=bar.update)
                )
    shown = retrieval_table(found)
    _print(shown)
    if out is not None:
        write_json(out / "retrieval.json", [one.to_dict() for one in found])
        (out / "retrieval.md").write_text(shown.to_markdown(), encoding="utf-8")
        typer.echo(f"Saved {out / 'retrieval.json'} and {out / 'retrieval.md'}")


def _ask_judge(run: Path, url: str, model: str, key_name: str, workers: int) -> None:
    import os

    from tqdm.auto import tqdm

    from ..evaluation import load_trajectories
    from ..evaluation.judge import Judge, judge_run
    from ..evaluation.store import VERDICTS_FILE

    trajectories = load_trajectories(run)
    asked = Judge(url, model, os.environ.get(key_name, ""))
    with tqdm(total=len(trajectories), desc="judge", unit="") as bar:
        unreadable = judge_run(asked, trajectories, run / VERDICTS_FILE, workers=workers, progress=bar.update)
    asked.close()
    if unreadable:
        typer.echo(f"{unreadable} of {len(trajectories)} rollouts have no verdict: no reply could be read.", err=True)


def _other_settings(first: Path, second: Path) -> Iterator[str]:
    """The settings that two runs do not share."""
    import json

    from ..evaluation.store import RUN_FILE

    if not all((run / RUN_FILE).is_file() for run in (first, second)):
        return
    a, b = (json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["settings"] for run in (first, second))
    for name in sorted({*a, *b}):
        if a.get(name) != b.get(name):
            yield f"  {name}: {a.get(name)} (A), {b.get(name)} (B)"


def _print(shown: Any) -> None:
    from rich.console import Console

    console = Console()
    # Where there is no terminal, a table must not be folded to 80 columns.
    console = console if console.is_terminal else Console(width=200)
    console.print(shown.render(console.width))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"got {text!r}, expected numbers as in 5 or 5,10.", param_hint="--k") from None


def _one_number(text: str) -> int:
    numbers = _numbers(text)
    if len(numbers) > 1:
        raise typer.BadParameter(f"got {text!r}, expected one number without --retrieval-only.", param_hint="--k")
    return numbers[0]


def _checked_variant(variant: str) -> "Variant":
    if variant == "squad":
        return "squad"
    if variant == "reference":
        return "reference"
    raise typer.BadParameter(f"got {variant!r}, expected squad or reference.", param_hint="--variant")


def _on_the_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _is_main_process() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"
