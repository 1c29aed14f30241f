"""`igpo doctor`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .errors import one_line_errors


def doctor(
    run: Annotated[
        Path, typer.Argument(help="A run of training, evaluation or the sandbox, or a file of rollouts.", exists=True)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the diagnosis as JSON.")] = False,
) -> None:
    """Name what goes wrong in a run, with the evidence and what to change. Exits with 1 if there is something."""
    from ..evaluation.doctor import diagnose

    with one_line_errors(ValueError, FileNotFoundError, param_hint="RUN"):
        diagnosis = diagnose(run)
    if as_json:
        typer.echo(json.dumps(diagnosis.to_dict(), indent=2, ensure_ascii=False))
    else:
        first, last = diagnosis.steps
        typer.echo(f"{diagnosis.rollouts} rollouts of steps {first} to {last} in {run}")
        for finding in diagnosis.findings:
            first, last = finding.steps
            typer.echo(f"\n{finding.name} (steps {first} to {last})")
            typer.echo(f"  seen:   {finding.evidence}.")
            typer.echo(f"  change: {finding.change}")
        typer.echo(f"\nfound {len(diagnosis.findings)}; not found: {', '.join(diagnosis.healthy) or 'none'}")
        for name, missing in diagnosis.not_checked.items():
            typer.echo(f"not checked: {name} ({missing})")
    raise typer.Exit(1 if diagnosis.findings else 0)
