"""`igpo plot`: figures of runs, ready for a paper."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import one_line_errors


def plot(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Folders of runs, or NAME=FOLDER,FOLDER for the seeds of one method. Without a name, runs whose "
            "names differ in a number at the end only are seeds of one method.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the figures, each as .svg and .png.")],
    smooth: Annotated[
        int | None,
        typer.Option(help="Logs that a point of a curve averages.", min=1, show_default="a twentieth of the run"),
    ] = None,
) -> None:
    """Draw learning curves over seeds, beliefs by turn, the reliability of beliefs, and collapse, for a paper."""
    from ..evaluation.curves import group_runs, read_run
    from ..evaluation.figures import plot_runs

    with one_line_errors():
        methods = {name: [read_run(path) for path in paths] for name, paths in group_runs(runs).items()}
        written = plot_runs(methods, out, smooth)
    for name, of_method in methods.items():
        typer.echo(f"{name}: {', '.join(str(run.path) for run in of_method)}")
    for name, text in written.items():
        typer.echo(f"Saved {out / name}.svg and .png: {text}.")
