"""
The directory of one evaluation.

    run.json                   settings, and digests of the questions, weights and indexes
    trajectories/rank0.jsonl   rollouts, one per line; one file per process
    verdicts.jsonl             verdicts of a judge, one per line

Lines are only ever appended. A last line without a line end was being written when its process was killed.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import replace_when_complete
from ..trajectory import RUN_FILE, TRAJECTORIES, Trajectory, load_run, record_files

VERSION = 1

_WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
_SMALL_FILE = 1 << 20  # bytes; hashing the contents of larger files would take minutes


class RunDirectory:
    """The directory of an evaluation, while it is being made."""

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self, settings: dict[str, Any], questions: str) -> None:
        """
        Starts a run, or resumes one and cuts off incomplete last lines. `questions` is their [`questions_digest`].

        Raises `FileExistsError` if the directory has other files, or a run with other settings, questions or weights.
        """
        record = {
            "version": VERSION,
            "settings": json.loads(json.dumps(settings)),
            "questions": questions,
            "weights": {path: _digest(path, _WEIGHTS) for path in (settings["model"], settings["adapter"]) if path},
            "indexes": {path: _digest(path, ("manifest.json",)) for path in settings["indexes"]},
        }
        file, rollouts = self.folder / RUN_FILE, record_files(self.folder)
        for path in rollouts:
            drop_torn_line(path)
        if file.is_file() and any(path.stat().st_size for path in rollouts):
            self._check_unchanged(json.loads(file.read_text(encoding="utf-8")), record)
            return
        if not file.is_file() and any(path.name != ".lock" for path in self.folder.glob("*")):
            raise FileExistsError(f"{self.folder} is not empty and is not an evaluation. Choose another directory.")
        write_json(file, record)  # replaces that of a run that failed before its first rollout

    def _check_unchanged(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        changes = [
            f"{name} was {old!r}, is {new!r}"
            for name, (old, new) in differing_settings(before.get("settings", {}), now["settings"]).items()
            if name != "sources"  # the questions count, not the file that they come from
        ]
        changes += [
            f"the {name} have changed" for name in ("questions", "weights", "indexes") if before.get(name) != now[name]
        ]
        if before.get("version") != VERSION:
            changes = [f"its format has version {before.get('version')!r}, this release writes version {VERSION}"]
        if changes:
            raise FileExistsError(
                f"{self.folder} holds a run with other settings ({'; '.join(changes)}). Resume it with the same "
                "settings, or choose another directory."
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the run for this process; the lock of a killed process is free. Raises `BlockingIOError`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise BlockingIOError(
                f"another process is working on {self.folder}. Wait for it, or choose another directory."
            ) from error

    def rollout_file(self, rank: int) -> Path:
        """The file of a process's rollouts."""
        return self.folder / TRAJECTORIES / f"rank{rank}.jsonl"

    def trajectories(self) -> list[Trajectory]:
        """All rollouts with their verdicts; an empty list if there are none yet."""
        return load_run(self.folder) if any(map(os.path.getsize, record_files(self.folder))) else []


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Appends lines, and returns once they are on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # lone surrogates, as JSON escapes them
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def drop_torn_line(path: Path) -> bool:
    """Cuts off a last line without a line end. Returns whether there was one."""
    if not path.is_file():
        return False
    with path.open("r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        file.truncate(end)
    return end < len(data)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file."""
    with replace_when_complete(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def differing_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two runs differ, with both values; `None` where a run lacks the setting."""
    pairs = {name: (first.get(name), second.get(name)) for name in {**first, **second}}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def _digest(path: str, patterns: Sequence[str]) -> str | None:
    """Digest of the files that match in a directory; `None` if the path is not a directory."""
    if not Path(path).is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in Path(path).glob(pattern)}):
        stat = file.stat()
        large = stat.st_size >= _SMALL_FILE
        digest.update(file.name.encode())
        digest.update(repr((stat.st_size, stat.st_mtime_ns)).encode() if large else file.read_bytes())
    return digest.hexdigest()[:16]
