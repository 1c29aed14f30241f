"""
The command line: `igpo`, or `python -m igpo_trl`.

Each command imports what it needs and calls one function, so that `igpo --help` loads neither torch nor TRL.
"""

from pathlib import Path
from typing import Annotated

import typer

from ..data.english import DEFAULT_HOPS, DEFAULT_SIZE, DEFAULT_TEST, DEFAULT_TRAIN, write_world
from . import ask, data, doctor, evaluate, search, view, warm_start
from .errors import Commands, one_line_errors
from .plot import plot

app = typer.Typer(
    help="IGPO for TRL: turn-level information gain for agents that search before they answer.",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"igpo-trl {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller run, which takes a minute or two.")] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for curves and rollouts.", show_default="outputs/demo, or outputs/demo-quick with --quick"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of model, training and questions.")] = 0,
) -> None:
    """Train GRPO and IGPO on a synthetic search task, on a CPU, and compare them on held-out questions."""
    from ..sandbox.demo import run_demo

    run_demo(output_dir=output_dir or Path("outputs", "demo-quick" if quick else "demo"), quick=quick, seed=seed)


@app.command(
    "train", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def train_command(context: typer.Context) -> None:
    """Train a search agent. `igpo train --help` lists the options, `--help-all` those of TRL and transformers too. On
    several GPUs: accelerate launch -m igpo_trl train --config FILE."""
    from .train import main

    main(context.args)


@app.command()
def tiny_model(
    directory: Annotated[Path, typer.Argument(help="Folder to save the model in; must be new or empty.")],
    corpus: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Passages, .jsonl or .jsonl.gz.")],
    questions: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Questions, a file (docs/data.md).")],
    minutes: Annotated[float, typer.Option(help="Training time.")] = 5.0,
    max_steps: Annotated[int | None, typer.Option(help="Largest number of training steps.")] = None,
    k: Annotated[int, typer.Option(help="Passages per search.")] = 2,
    max_words: Annotated[int, typer.Option(help="Longest passage shown, in words.")] = 40,
    eval_questions: Annotated[int, typer.Option(help="Questions held out from training.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of weights and conversations.")] = 0,
) -> None:
    """Make a small model that searches and answers, from passages and questions, for runs without a GPU or a hub."""
    from ..sandbox.tiny_model import make_tiny_model

    with one_line_errors(FileExistsError, param_hint="DIRECTORY"):
        result = make_tiny_model(
            directory,
            corpus,
            questions,
            minutes=minutes,
            max_steps=max_steps,
            k=k,
            max_words=max_words,
            eval_questions=eval_questions,
            seed=seed,
        )
    typer.echo(
        f"Saved {directory}: {result['parameters'] / 1e6:.1f} M parameters, {result['steps']:.0f} steps, "
        f"loss {result['loss']:.2f}; {result['valid_search_share']:.0%} of sampled rollouts begin with a valid search."
    )


@app.command()
def world(
    out: Annotated[Path, typer.Option(help="Folder for corpus.jsonl.gz, train.jsonl.gz and test.jsonl.gz.")],
    seed: Annotated[int, typer.Option(help="Seed of names, facts, texts and questions.")] = 0,
    size: Annotated[int, typer.Option(help="Passages, a quarter of them for the test questions.")] = DEFAULT_SIZE,
    train: Annotated[int, typer.Option(help="Training questions.")] = DEFAULT_TRAIN,
    test: Annotated[int, typer.Option(help="Test questions, about other people and places.")] = DEFAULT_TEST,
    hops: Annotated[
        tuple[float, float, float, float], typer.Option(help="Shares of questions of 1, 2, 3 and 4 hops.")
    ] = DEFAULT_HOPS,
) -> None:
    """Write a world in English: passages about people and places that do not exist, and questions of 1 to 4 hops."""
    options = {"seed": seed, "size": size, "train": train, "test": test, "hops": list(hops)}
    words = f"--hops {' '.join(f'{share:g}' for share in hops)}"
    command = f"igpo world --out {out} --seed {seed} --size {size} --train {train} --test {test} {words}"
    with one_line_errors():
        write_world(out, command, **options)
    typer.echo(f"Wrote {out}: {size:,} passages, {train:,} training and {test:,} test questions.")
    typer.echo(f"Index it with: igpo index --corpus {out / 'corpus.jsonl.gz'} --out {out / 'index'}")


for command in (
    *(search.index, search.search, search.serve, ask.ask, view.view, doctor.doctor),
    *(warm_start.get, warm_start.warm_start),
):
    app.command()(command)
app.command()(plot)
app.add_typer(data.commands, name="data")
app.add_typer(evaluate.commands, name="eval")
