"""Answers of web services on disk, so that a run can be repeated without asking, or paying, again."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

FILE = "answers.sqlite"

CacheMode = Literal["live", "record", "replay"]
"""
What is done with the answers of a service that are on disk:

- `"live"`: they are used, and what is missing is fetched and stored.
- `"record"`: everything is fetched and stored.
- `"replay"`: nothing is fetched.
"""
Missing = Literal["error", "empty"]
"""What `"replay"` makes of a request that was not recorded: a [`CacheMiss`], or nothing found."""


class CacheMiss(LookupError):
    """A request is replayed that was not recorded."""


class Answers:
    """
    JSON values by name in an SQLite file.

    Several threads, processes and machines with a common file system that knows locks may use it at once: each
    operation opens the file for itself. It holds text only, so that reading somebody else's file runs no code.

    Args:
        directory (`str` or `Path`): Where the file is; made if need be.
        writable (`bool`, *optional*, defaults to `True`): Whether anything will be stored.

    Raises:
        FileNotFoundError: There is nothing to read, and nothing will be stored.
        ValueError: There is another file of that name.
    """

    def __init__(self, directory: str | Path, writable: bool = True) -> None:
        self.file = Path(directory) / FILE
        self._writable = writable
        if writable:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        elif not self.file.is_file():
            raise FileNotFoundError(f"nothing was recorded in {directory} (no {FILE} there). Record a run first.")

    def get(self, key: Any) -> Any:
        """The value stored for a key (any JSON), or `None`."""
        with self._open() as database:
            row = database.execute("SELECT value FROM answers WHERE key = ?", (_dump(key),)).fetchone()
            return None if row is None else json.loads(row[0])

    def put(self, key: Any, value: Any) -> None:
        """Store a value (any JSON) for a key, in place of what was there."""
        with self._open() as database:
            database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (_dump(key), _dump(value)))

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        mode = "rwc" if self._writable else "ro"
        try:
            address = f"{self.file.absolute().as_uri()}?mode={mode}"
            with contextlib.closing(
                sqlite3.connect(address, timeout=60.0, isolation_level=None, uri=True)
            ) as database:
                yield database
        except sqlite3.OperationalError:  # locked, a full disk, no permission
            raise
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            raise ValueError(f"{self.file} is damaged or no file of recorded answers ({error}).") from error


def open_answers(directory: str | Path | None, mode: CacheMode, missing: Missing) -> Answers | None:
    """
    Opens the answers on disk as a mode needs them; `None` for `"live"` without a directory.

    Raises:
        ValueError: `mode` or `missing` is unknown, or the mode needs a directory.
        FileNotFoundError: There is nothing to replay.
    """
    for name, value, known in (("mode", mode, get_args(CacheMode)), ("missing", missing, get_args(Missing))):
        if value not in known:
            raise ValueError(f"got {name}={value!r}, expected one of {', '.join(map(repr, known))}.")
    if directory is None:
        if mode != "live":
            raise ValueError(f"mode {mode!r} needs a directory for the answers; give it as `cache`.")
        return None
    return Answers(directory, writable=mode != "replay")


def _dump(value: Any) -> str:
    # ASCII: lone surrogates, which a policy may write, are no UTF-8.
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
