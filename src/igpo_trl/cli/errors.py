"""Errors of commands: one line on stderr instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def one_line_errors(*kinds: type[Exception], param_hint: str | None = None) -> Iterator[None]:
    """
    Ends the command with one line if the block raises an error that the user can fix: one of `kinds`, or by default
    an `OSError`, `ValueError`, `ImportError` or `SearchError`. Other errors are bugs and keep their traceback.

    With a `param_hint`, the argument or option to blame, the usage of the command is shown too, and the exit status is
    2 instead of 1.
    """
    try:
        yield
    except Exception as error:
        # `SearchError` is recognised by its name, because importing the class would load an HTTP client.
        search_failed = not kinds and any(kind.__name__ == "SearchError" for kind in type(error).__mro__)
        if not search_failed and not isinstance(error, kinds or (OSError, ValueError, ImportError)):
            raise
        message = " ".join(str(error).split())
        if param_hint is not None:
            raise typer.BadParameter(message, param_hint=param_hint) from error
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(1) from error
