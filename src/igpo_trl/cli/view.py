"""`igpo view`: rollouts in the terminal, as a page, or as a page that follows a run."""

import contextlib
import re
from pathlib import Path
from typing import Annotated

import typer

from ..report.page import MAX_ROLLOUTS
from .errors import one_line_errors

# Parts of a path that say nothing about a run.
_COMMON = {"trajectories", "evaluation"}
_LONGEST = 16  # letters of a name that fits on the page


def view(
    run: Annotated[Path, typer.Argument(help="A run, or a file of its rollouts.")],
    run2: Annotated[Path | None, typer.Argument(help="Another run, to compare with the first on the page.")] = None,
    index: Annotated[
        int | None,
        typer.Option(
            help="Number of the rollout to print, from 0; negative numbers count from the end.",
            show_default="the best, the worst and an odd one",
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Also save a picture of it, or of the first (.png, .svg, .pdf).")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write all rollouts as a page instead, one file.")] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page, and follow runs that are being made.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve at; 0 for a free one.", min=0, max=65535)] = 8050,
    max_rollouts: Annotated[
        int, typer.Option(help="Most rollouts that can be read on the page.", min=2)
    ] = MAX_ROLLOUTS,
) -> None:
    """Show what the policy believed: print rollouts, or write or serve a page of one or two runs."""
    paths = [run] if run2 is None else [run, run2]
    for path in paths:
        if not path.exists() and not serve:
            raise typer.BadParameter(f"'{path}' does not exist.", param_hint="RUN")
    if serve and html is not None:
        raise typer.BadParameter("--serve writes no file. Leave one of the two out.", param_hint="--html")
    names = run_names(paths)
    if serve:
        with one_line_errors():
            _serve(dict(zip(names, paths, strict=True)), host, port, max_rollouts)
    elif html is not None:
        _write(dict(zip(names, paths, strict=True)), html, max_rollouts)
    elif run2 is not None:
        raise typer.BadParameter("two runs are shown on a page: add --html FILE or --serve.", param_hint="RUN2")
    else:
        _print(run, index, save)


def run_names(paths: list[Path]) -> list[str]:
    """Short names of runs: the parts of their paths that differ, without those that say nothing."""
    parts = [[part for part in path.resolve().parts if part not in _COMMON] for path in paths]
    parts = [
        each[:-1] if path.suffix == ".jsonl" and len(each) > 1 and each[-1].startswith("rank") else each
        for path, each in zip(paths, parts, strict=True)
    ]
    if len(paths) == 1:
        return [parts[0][-1]]
    first, second = parts
    if first == second:
        return [f"{first[-1]} (1)", f"{second[-1]} (2)"]
    while first and second and first[-1] == second[-1]:
        first, second = first[:-1], second[:-1]
    while len(first) > 1 and len(second) > 1 and first[0] == second[0]:
        first, second = first[1:], second[1:]
    names = ["/".join(each) or "run" for each in (first, second)]
    if max(map(len, names)) <= _LONGEST:
        return names
    # Runs of a sweep differ in a part of their names: "igpo-lr0.0003-60-seed0" and "grpo-lr0.0003-60-seed0".
    words = [re.split(r"(?<=[-_])", name) for name in names]
    for end, rest in ((-1, slice(-1)), (0, slice(1, None))):
        while min(map(len, words)) > 1 and words[0][end] == words[1][end]:
            words = [each[rest] for each in words]
    return ["".join(each).strip("-_") for each in words]


def _print(run: Path, index: int | None, save: Path | None) -> None:
    from rich.console import Console

    from ..report import plot_rollout, render_trajectory, worth_reading
    from ..trajectory import load_run

    with one_line_errors(ValueError, FileNotFoundError, param_hint="RUN"):
        rollouts = load_run(run)
    if index is not None and not -len(rollouts) <= index < len(rollouts):
        raise typer.BadParameter(f"{run} has {len(rollouts)} rollouts, got {index}.", param_hint="--index")
    chosen = (worth_reading(rollouts) or {"": 0}) if index is None else {"": index % len(rollouts)}
    console = Console()
    for label, i in chosen.items():
        place = f"Rollout {i} of {len(rollouts)}, step {rollouts[i].step}, group {rollouts[i].group}"
        if label:
            console.print(f"[bold]{label}[/bold]")
        console.print(f"[dim]{place}[/dim]")
        console.print(render_trajectory(rollouts[i]))
        console.print()
    if save is not None:
        plot_rollout(rollouts[next(iter(chosen.values()))], save)
        console.print(f"Saved {save}")


def _write(runs: dict[str, Path], html: Path, max_rollouts: int) -> None:
    from ..evaluation.doctor import diagnose
    from ..report.page import write_page
    from ..trajectory import load_run

    with one_line_errors(ValueError, FileNotFoundError, param_hint="RUN"):
        rollouts = {name: load_run(path) for name, path in runs.items()}
    with one_line_errors():
        diagnoses = {name: diagnose(path).to_dict() for name, path in runs.items()}
        headline = write_page(html, rollouts, max_rollouts, diagnoses)
    typer.echo(headline)
    typer.echo(f"Wrote {html}: open it in a browser.")


def _serve(runs: dict[str, Path], host: str, port: int, max_rollouts: int) -> None:
    from ..evaluation.doctor import diagnose
    from ..report.page.live import LOOPBACK, Follower, create_app
    from ..search.network.server import listen

    follower = Follower(runs, max_rollouts, lambda path: diagnose(path).to_dict())
    app = create_app(follower, " and ".join(runs), LOOPBACK if host in LOOPBACK else ("*",))
    import uvicorn

    listener = listen(host, port)
    typer.echo(f"The page is at http://{host}:{listener.getsockname()[1]}; Ctrl-C ends it.")
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    with listener, contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after a graceful end
        uvicorn.Server(config).run(sockets=[listener])
