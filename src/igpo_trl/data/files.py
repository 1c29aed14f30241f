"""Records of question files: JSON Lines, JSON, CSV and TSV, each also as .gz, and parquet."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import read_json_lines
from .layouts import UNUSED_COLUMNS

# Cells of a CSV file that hold several texts: as a JSON list, or separated by `|`.
_LIST_COLUMNS = ("answers", "golden_answers", "supporting_titles")


def read_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yields `(where, record)` for every row of a file; `where` names the file, and the line where there are lines.

    Raises:
        ValueError: The file is damaged, or not of the kind that its name says (on reading the row in question).
    """
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "jsonl":
        return read_json_lines(path)
    if kind == "parquet":
        return _read_parquet(path)
    return _read_json(path) if kind == "json" else _read_csv(path, "\t" if kind == "tsv" else ",")


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A JSON array of objects, as HotpotQA and 2WikiMultihopQA are published, or one in `Data`, as TriviaQA is."""
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Expected an array of objects.") from error
    if isinstance(value, dict):
        value = value.get("Data", value.get("data"))
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise ValueError(f"{path}: expected a JSON array of objects. One object per line belongs in a .jsonl file.")
    return ((str(path), record) for record in value)


def _read_csv(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for record in reader:
            where = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                raise ValueError(
                    f"{where}: got another number of cells than the {len(reader.fieldnames or [])} columns."
                )
            yield where, {column: _cell(where, column, text) for column, text in record.items()}
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not a readable table ({error}).") from error


def _cell(where: str, column: str, text: str) -> Any:
    if column == "hops":
        if text and not text.strip().isdigit():
            raise ValueError(f"{where}: `hops` is {text!r}, expected an integer.")
        return int(text) if text else None
    if column not in _LIST_COLUMNS:
        return text or None
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split("|")] if text else []
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: `{column}` begins with [ but is no JSON list ({error}): {text!r}.") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name not in UNUSED_COLUMNS]
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                yield from ((str(path), record) for record in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}).") from error


def _text(path: Path) -> str:
    """The whole file as text; a mark of the byte order is dropped."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or cut off ({error}). Copy the file again.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}).") from error
