"""Errors of commands: one line on stderr instead of a traceback, which `--debug` shows."""

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

#: Errors that a user can fix, and the names of others, whose packages are slow to import.
_MISTAKES = (OSError, ValueError, ImportError)
_MISTAKES_BY_NAME = {"SearchError", "YAMLError", "SafetensorError", "DatasetsError"}
_FIXES = {
    errno.EACCES: "Choose another path, or change its permissions.",
    errno.EPERM: "Choose another path, or change its permissions.",
    errno.EROFS: "Choose a path on a disk that can be written.",
    errno.ENOSPC: "Make room, or choose a path on another disk.",
    errno.EEXIST: "A file is in the way: choose another path, or remove it.",
    errno.ENOTDIR: "A part of this path is a file: choose another path.",
    errno.EISDIR: "Expected a file.",
    errno.ENOENT: "Check the path.",
    errno.EADDRINUSE: "Choose another port, or stop the program that uses this one.",
}

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer exports no name for it

_debug = False


def is_mistake(error: BaseException, *more: type[Exception]) -> bool:
    """Whether an error says what the user has to change; others are bugs."""
    by_name = any(kind.__name__ in _MISTAKES_BY_NAME for kind in type(error).__mro__)
    return not getattr(error, "keeps_trace", False) and (by_name or isinstance(error, (*_MISTAKES, *more)))


def describe(error: BaseException) -> str:
    """The message of an error on one line; of an error of the operating system, with its path and what to do."""
    if isinstance(error, OSError) and error.strerror:
        path = f"{error.filename}: " if error.filename is not None else ""
        return f"{path}{error.strerror.lower()}. {_FIXES.get(error.errno or 0, '')}".strip()
    text = " ".join(str(error).split()) or type(error).__name__
    unclear = isinstance(error, (RuntimeError, TypeError)) and not is_mistake(error)
    return f"{text} (--debug shows where this happened.)" if unclear else text


def fail(error: BaseException, status: int = 1) -> NoReturn:
    """Ends the process with one line on stderr."""
    rank = os.environ.get("RANK", "0")
    message = describe(error)
    print(f"Error{'' if rank == '0' else f' (rank {rank})'}: {message}", file=sys.stderr, flush=True)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun and `accelerate launch` show at the end
        details = {"py_callstack": f"Error: {message}", "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}), encoding="utf-8")
    raise SystemExit(status) from error


@contextmanager
def one_line_errors(
    *kinds: type[Exception], param_hint: str | None = None, also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """
    Ends the command with one line if the block raises an error that the user can fix: one of `kinds`, or by default
    an `OSError`, `ValueError`, `ImportError` or `SearchError`, and those of `also`. Other errors are bugs and keep
    their traceback, and so do all with `--debug`.

    With a `param_hint`, the argument or option to blame, the line names it, and the exit status is 2 instead of 1.
    """
    try:
        yield
    except Exception as error:
        if _debug:
            error.keeps_trace = True  # type: ignore[attr-defined]
        if _debug or not (isinstance(error, kinds) if kinds else is_mistake(error, *also)):
            raise
        if param_hint is not None:
            raise typer.BadParameter(describe(error), param_hint=param_hint) from error
        fail(error)


@contextmanager
def keep_trace(when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """
    Lets errors of the block keep their traceback, if they occur `when` nobody expects a mistake of the user.

    The failure of a service, and a disk that is full, are one line all the same.
    """
    try:
        yield
    except Exception as error:
        if when():
            kinds = {kind.__name__ for kind in type(error).__mro__}
            outside = {"SearchError", "ToolUnavailable", "ServerGone", "CheckpointNotSaved"} & kinds
            full = getattr(error, "errno", None) == errno.ENOSPC
            error.in_training, error.keeps_trace = True, not (outside or full)  # type: ignore[attr-defined]
        raise


@contextmanager
def debugging(wanted: bool) -> Iterator[None]:
    """Whether errors within the block keep their traceback."""
    global _debug
    before, _debug = _debug, wanted or _debug
    try:
        yield
    finally:
        _debug = before


class Commands(TyperGroup):
    """Commands whose errors are one line, and that take `--debug` at any place."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        words = list(args)
        command = next((word for word in words if not word.startswith("-")), None)
        if "--debug" in words and command != "train":  # whose `--debug` may have a value
            words.remove("--debug")
            words.insert(0, "--debug")
        return super().parse_args(context, words)

    def invoke(self, context: Any) -> Any:
        with debugging(bool(context.params.get("debug"))), one_line_errors():
            try:
                return super().invoke(context)
            except _UsageError as error:
                if type(error).__name__ == "NoArgsIsHelpError":
                    raise
                path = error.ctx.command_path.split() if error.ctx is not None else []
                command = " ".join(["igpo", *path[1:]])
                message = error.format_message().rstrip(".")
                fail(ValueError(f"{message}. `{command} --help` shows the options."), status=error.exit_code)
