"""Tools that have stopped working: whose fault an error is, and when to stop training because of it."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers.trainer_utils import get_last_checkpoint

from .tool_results import ToolErrorKind, ToolResult

logger = logging.getLogger(__name__)

# What the clients of HTTP services, databases and message queues call errors that no argument causes; most of these
# classes have no base in common.
_SERVICE_ERRORS = re.compile(
    "Connect|Disconnect|Timed?[Oo]ut|Unavailable|Network|Transport|RateLimit|OutOfMemory|^SearchError$"
)
# Errors of the operating system that are usually about a path which the policy chose.
_PATH_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class ToolUnavailable(ConnectionError):
    """A tool has failed so often that training was stopped."""


def is_unavailable(error: BaseException | None, transient: tuple[type[Exception], ...] = ()) -> bool:
    """
    Whether an error comes from the service that a tool needs, and not from the arguments of the call.

    That is so for errors of connections, time limits and memory, for those that the tool declares to be transient, and
    for errors raised because of one of these. Anything else, such as a `ValueError`, may be about the arguments.
    """
    return any(
        isinstance(one, (*transient, MemoryError))
        or (isinstance(one, OSError) and not isinstance(one, _PATH_ERRORS))
        or any(_SERVICE_ERRORS.search(kind.__name__) for kind in type(one).__mro__)
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised because of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@dataclass
class ToolCounts:
    """
    Calls of one tool that have run.

    Attributes:
        calls (`int`): how many there were.
        failed (`int`): those that raised an error, timed out or gave no text.
        unavailable (`int`): those of them that were not the fault of the arguments.
        error (`str`): the last error, of these if there are any.
    """

    calls: int = 0
    failed: int = 0
    unavailable: int = 0
    error: str = ""

    def add(self, result: ToolResult) -> None:
        """Count a call."""
        failed = result.error in (ToolErrorKind.RAISED, ToolErrorKind.TIMEOUT, ToolErrorKind.NOT_TEXT)
        if result.error is None or failed:
            error = result.text.removeprefix("Error: ").rstrip(".") if failed else ""
            self.merge(ToolCounts(1, int(failed), int(result.unavailable), error))

    def merge(self, other: "ToolCounts") -> None:
        """Add the counts of another process."""
        if other.unavailable or not self.unavailable:
            self.error = other.error or self.error
        self.calls += other.calls
        self.failed += other.failed
        self.unavailable += other.unavailable


class FailureWatch:
    """
    Stops training once a tool keeps failing; all processes decide together.

    Args:
        max_share (`float`, *optional*): share of a tool's calls of a batch; `None` never stops.
        patience (`int`): consecutive batches with calls of the tool in which at least that share must fail.
        output_dir (`str`): where the checkpoints are, for the error.
    """

    carried = ("batches", "warned")

    def __init__(self, max_share: float | None, patience: int, output_dir: str | Path):
        self.max_share = max_share
        self.patience = patience
        self.output_dir = output_dir
        self.batches: dict[tuple[str, str], int] = {}  # (tool, count) → batches in a row with too large a share
        self.warned: set[str] = set()

    def update(self, tools: dict[str, ToolCounts]) -> None:
        """
        Take in the counts of a batch, by name of the tool; every process must call this.

        Raises:
            ToolUnavailable: a tool has failed too often, on every process.
        """
        if self.max_share is None:
            return
        total: dict[str, ToolCounts] = {}
        for of_rank in gather_object([tools]):
            for name, counts in of_rank.items():
                total.setdefault(name, ToolCounts()).merge(counts)
        for name, counts in sorted(total.items()):
            often = f"at least {self.max_share:.0%} in each of {self.patience} batches in a row"
            if self._keeps_failing(name, "unavailable", counts):
                raise ToolUnavailable(
                    f"the tool {name!r} does not work: {counts.unavailable} of {counts.calls} calls failed, {often} "
                    f"(`max_tool_failures`, `tool_failure_patience`). The last error: {counts.error}. Training has "
                    f"stopped, because the policy would learn from error texts. Make it work "
                    f"{where_to_resume(self.output_dir)}"
                )
            if self._keeps_failing(name, "failed", counts) and name not in self.warned:
                self.warned.add(name)
                logger.warning(
                    f"The tool {name!r} failed in {counts.failed} of {counts.calls} calls, {often}. The last error: "
                    f"{counts.error}. Either the policy uses it wrongly, or it does not work."
                )

    def _keeps_failing(self, name: str, kind: str, counts: Any) -> bool:
        if counts.calls:
            share = getattr(counts, kind) / counts.calls
            self.batches[name, kind] = self.batches.get((name, kind), 0) + 1 if share >= self.max_share else 0
        return self.batches.get((name, kind), 0) >= self.patience


def where_to_resume(output_dir: str | Path) -> str:
    """How an error ends that stops training, after what has to be done first."""
    last = get_last_checkpoint(str(output_dir)) if Path(output_dir).is_dir() else None
    if last is None:
        return "and start again; there is no checkpoint yet."
    return f"and resume with `resume_from_checkpoint`; the last checkpoint is {last}."
