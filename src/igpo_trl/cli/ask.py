"""`igpo ask`: ask a model, and watch it search."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from . import rollout_options
from .errors import describe, one_line_errors
from .rollout_options import option

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation import EvaluationSettings


def ask(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="Model: a directory, which may be that of an adapter, or a name on the hub.")
    ],
    index: Annotated[str, typer.Option(help="What to search: directory of an index, or http://….")],
    question: Annotated[
        list[str] | None, typer.Argument(help="The question; without one you are asked, and Ctrl-D ends.")
    ] = None,
    adapter: rollout_options.Adapter = None,
    answer: Annotated[
        list[str] | None, typer.Option(help="Right answer, to show the belief in it; repeatable for its aliases.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Show passages whole.")] = False,
    config: Annotated[
        Path | None,
        option(
            help="Configuration of a training run (YAML): its limits, prompt and search options are the defaults.",
            exists=True,
            dir_okay=False,
            show_default="igpo.yaml beside the model",
        ),
    ] = None,
    k: Annotated[int | None, option(help="Passages per search.", show_default="3")] = None,
    max_words: rollout_options.MaxWords = None,
    system_prompt: rollout_options.SystemPrompt = None,
    max_turns: rollout_options.MaxTurns = None,
    max_turn_length: rollout_options.MaxTurnLength = None,
    max_completion_length: rollout_options.MaxCompletionLength = None,
    forced_answer: rollout_options.ForcedAnswer = None,
    stop_tools: rollout_options.StopTools = None,
    many_queries: rollout_options.ManyQueries = None,
    temperature: rollout_options.Temperature = 0.0,
    seed: rollout_options.Seed = 0,
    dtype: rollout_options.DType = None,
) -> None:
    """
    Ask a model a question, and watch it search: each search, what it finds, the answer.

    The rollout is made as in training. `igpo train` and `igpo warm-start` save the options that define it as igpo.yaml
    with the model, and they are the defaults here.
    """
    if answer and not question:
        raise typer.BadParameter(
            "give the question too: a right answer is that of one question.", param_hint="--answer"
        )
    with one_line_errors():
        from rich.console import Console
        from transformers.utils import logging

        from ..evaluation.asking import Asker
        from ..evaluation.settings import make_settings, saved_options

        config = config or saved_options(model, adapter)
        settings = make_settings(context.params | {"sources": ["asked"], "indexes": [index]}, config)
        console = Console(width=None if sys.stdout.isatty() else 200)
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        with TemporaryDirectory() as folder:
            asker = Asker(settings, console, folder, full)
            _show_settings(console, settings, config)
            for each in [" ".join(question)] if question else _typed_questions():
                try:
                    asker.ask(each, answer or ())
                except ConnectionError as error:
                    if question:
                        raise
                    console.print(f"Error: {describe(error)}", style="red", markup=False)
                except KeyboardInterrupt:
                    if question:
                        raise
                    console.print("\nStopped. Ctrl-D ends.", style="dim")


def _typed_questions() -> Iterator[str]:
    """The questions that a user types, or the lines of a pipe."""
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401  # arrow keys and earlier questions
    while True:
        try:
            line = input("\nQuestion: " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _show_settings(console: "Console", settings: "EvaluationSettings", config: Path | None) -> None:
    words = "whole" if settings.max_words is None else f"of at most {settings.max_words} words"
    limits = ", ".join(f"{name} {value!r}" for name, value in settings.rollout.items() if value is not None)
    adapter = f" with {settings.adapter}" if settings.adapter else ""
    prompt = settings.system_prompt if len(settings.system_prompt) < 40 else f"{settings.system_prompt[:60]}…"
    for line in (
        f"{settings.model}{adapter} searches {settings.indexes[0]}: {settings.k} passages {words}, prompt {prompt!r}",
        f"{limits}, temperature {settings.temperature:g}",
        f"options of {config}" if config else "default options: there is no igpo.yaml beside the model",
    ):
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
