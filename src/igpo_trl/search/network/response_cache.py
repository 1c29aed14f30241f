"""Responses of web services on disk, so that a run can be repeated without requesting, or paying for, them again."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

FILE = "answers.sqlite"

CacheMode = Literal["live", "record", "replay"]
"""
How cached responses are used:

- `"live"`: they are used, and what is missing is fetched and stored.
- `"record"`: everything is fetched and stored.
- `"replay"`: nothing is fetched.
"""
Missing = Literal["error", "empty"]
"""What `"replay"` returns for a request that was not recorded: a [`CacheMiss`] or an empty result."""


class CacheMiss(LookupError):
    """A replayed request was not recorded."""


class ResponseCache:
    """
    JSON values by key in an SQLite file, or nowhere.

    Several threads, processes and machines (on a shared file system with locks) may use it at once: each operation
    opens the file anew. It contains only text, so opening somebody else's file runs no code. Without a `directory`,
    nothing is stored or found.
    """

    def __init__(self, directory: str | Path | None, mode: CacheMode = "live", missing: Missing = "error") -> None:
        for name, value, known in (("mode", mode, get_args(CacheMode)), ("missing", missing, get_args(Missing))):
            if value not in known:
                raise ValueError(f"got {name}={value!r}, expected one of {', '.join(map(repr, known))}.")
        if directory is None and mode != "live":
            raise ValueError(f"mode {mode!r} needs a directory for the responses; pass it as `cache`.")
        self.mode = mode
        self.missing = missing
        self.file = None if directory is None else Path(directory) / FILE
        if self.file is not None and mode == "replay" and not self.file.is_file():
            raise FileNotFoundError(f"nothing was recorded in {directory} (no {FILE} there). Record a run first.")
        if self.file is not None and mode != "replay":
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self._open(self.file) as database:
                database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL)")

    def get(self, key: Any) -> Any:
        """The value stored for a key (any JSON), or `None`; always `None` in the mode `"record"`."""
        if self.file is None or self.mode == "record":
            return None
        with self._open(self.file) as database:
            row = database.execute("SELECT value FROM answers WHERE key = ?", (_dump(key),)).fetchone()
            return None if row is None else json.loads(row[0])

    def put(self, key: Any, value: Any) -> None:
        """Stores a value (any JSON) for a key, replacing an earlier one."""
        if self.file is not None:
            with self._open(self.file) as database:
                database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (_dump(key), _dump(value)))

    def check_miss(self, details: str) -> None:
        """Raises a [`CacheMiss`], whose message `details` ends, unless `missing` is `"empty"`."""
        if self.missing == "error":
            raise CacheMiss(f"not recorded in {self.file}{details}")

    @contextlib.contextmanager
    def _open(self, file: Path) -> Iterator[sqlite3.Connection]:
        address = f"{file.absolute().as_uri()}?mode={'ro' if self.mode == 'replay' else 'rwc'}"
        try:
            database = sqlite3.connect(address, timeout=60.0, isolation_level=None, uri=True)
            with contextlib.closing(database):
                yield database
        except sqlite3.OperationalError:  # locked, disk full, no permission
            raise
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged or not a file of recorded responses ({error}).") from error


def _dump(value: Any) -> str:
    # ASCII: lone surrogates, which a policy may write, cannot be encoded in UTF-8.
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
