"""Reading JSONL and JSONL.gz with errors that name the file and the line. Standard library only."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yields `("file:line", record)` for every line that is not blank; `.gz` files are decompressed on the way.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not a JSON object or not UTF-8, or a compressed file is damaged or cut off.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}. Expected a .jsonl or .jsonl.gz file.")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    record = json.loads(line)
                except ValueError as error:  # bad JSON, or bytes that are not UTF-8
                    raise ValueError(f"{where}: not valid JSON ({error}). Expected one object per line.") from error
                if not isinstance(record, dict):
                    raise ValueError(f"{where}: got {type(record).__name__}, expected a JSON object.")
                yield where, record
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or cut off after line {number} ({error}). Copy the file again.") from error


@contextmanager
def replace_when_complete(path: str | Path) -> Iterator[Path]:
    """
    A temporary path beside `path` that takes its place when the block ends, and is removed if the block raises.

    Readers see the old file or the complete new one, and a process that is killed leaves the old one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_dir(*parts: str) -> Path:
    """Where what is expensive to make is kept: `$IGPO_CACHE`, or else `~/.cache/igpo_trl`. It may not exist yet."""
    return Path(os.environ.get("IGPO_CACHE") or Path.home() / ".cache" / "igpo_trl", *parts)


def looks_like_path(name: str) -> bool:
    """Whether the name of a model means a directory on this machine rather than `owner/name` on the hub."""
    return name.startswith((".", "/", "~", "outputs/")) or name.count("/") > 1


def encodable(text: str) -> str:
    """The same text as a plain `str` that UTF-8 can encode: a lone surrogate becomes U+FFFD."""
    text = str.__str__(text)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
