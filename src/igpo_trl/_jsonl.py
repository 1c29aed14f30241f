"""Reading JSONL and JSONL.gz with errors that name the file and the line. Standard library only."""

import gzip
import json
import zlib
from collections.abc import Iterator
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
