"""Files: records in several formats, safe replacement, the cache directory, and text that UTF-8 can encode."""

import csv
import gzip
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

FILE_ENDINGS = tuple(f".{kind}{packed}" for kind in ("jsonl", "json", "csv", "tsv") for packed in ("", ".gz")) + (
    ".parquet",
)
"""Endings of the files that [`read_records`] can read."""

_QUOTED_CELL = re.compile(r'"[^"]*(?:""[^"]*)*"')
_OPEN_CELL = re.compile(r'"[^"]*+(?:""[^"]*+)*+')  # without the quote that closes it

_AS_TEXT = {"mode": "rt", "encoding": "utf-8-sig", "newline": ""}  # with or without a byte order mark


def read_records(
    path: str | Path, *, select_columns: Callable[[list[str]], list[str]] = list
) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Reads the records of a file: JSON Lines, JSON, CSV or TSV, each also as `.gz`, or parquet.

    A JSON file is an array of objects, an object with such an array under `Data` (TriviaQA's files) or `data`, or JSON
    Lines. The cells of CSV and TSV files are strings. All formats but JSON are read as a stream.

    In a TSV file, a quote is CSV's if its cell begins and ends with one and the quotes inside are doubled; any other
    quote is text. A line with a cell for every column is always a row of its own, whatever its quotes. In a CSV file,
    a quote that is text must be doubled in a quoted cell; one that would take whole rows with it is an error.

    A `.csv` file with a tab in its first line is tab-separated. A table whose first line already holds a list has the
    columns `question` and `answers`, as DPR's files of questions.

    Args:
        path (`str` or `Path`): The file. Its name tells the format.
        select_columns (`Callable`, *optional*, defaults to `list`): Chooses which of a parquet file's columns to read.

    Returns:
        `Iterator`: pairs `(where, record)`. `where` names the file, and the line if the format has lines.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or its format is not the one that its name says. Raised by the iterator.
    """
    path = Path(path)
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        return _read_parquet(path, select_columns)
    if kind in ("csv", "tsv"):
        return _read_table(path, is_tsv=kind == "tsv")
    return _read_json(path) if kind == "json" else read_json_lines(path)


def read_json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yields `("file:line", record)` for every line that is not blank. Files that end in `.gz` are decompressed.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line is not a JSON object or not UTF-8, or a compressed file is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}. Expected a .jsonl or .jsonl.gz file.")
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
            raise ValueError(f"{where}: not valid JSON ({error}). Expected one object per line.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: got {type(record).__name__}, expected a JSON object.")
        yield where, record


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = _read_lines(path, **_AS_TEXT)
    first, second = next(lines, ""), next(lines, "")
    if (
        second.strip() and first.startswith("{") and first.rstrip().endswith("}")
    ):  # many tools write JSON Lines to such files
        yield from read_json_lines(path)
        return
    try:
        value = json.loads("".join([first, second, *lines]))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Expected an array of objects.") from error
    if isinstance(value, dict):
        value = value.get("Data", value.get("data"))
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise ValueError(f"{path}: expected a JSON array of objects. One object per line belongs in a .jsonl file.")
    yield from ((str(path), record) for record in value)


def _read_table(path: Path, is_tsv: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    lines = _read_lines(path, **_AS_TEXT)
    first = next(lines, "")
    rows = (_tab_separated if is_tsv or "\t" in first else _comma_separated)(path, itertools.chain([first], lines))
    header: list[str] | None = None
    for number, cells in rows:
        if header is None:
            if len(cells) != 2 or not cells[1].startswith("["):
                header = cells
                continue
            header = ["question", "answers"]
        if len(cells) != len(header):
            raise ValueError(f"{path}:{number}: got {len(cells)} columns, expected {header}.")
        yield f"{path}:{number}", dict(zip(header, cells, strict=True))


def _comma_separated(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    of_row = list[str]()  # the lines of the current row
    rows = csv.reader(_recorded(lines, of_row), strict=True)
    width = 0
    try:
        for cells in rows:
            width = width or len(cells)
            if len(of_row) > 1 and all(line.count(",") + 1 == width for line in of_row):
                first = rows.line_num - len(of_row) + 1
                raise ValueError(
                    f"{path}:{first}: a quote opens a cell that ends in line {rows.line_num}, but every line in "
                    "between is a whole row. Quote the cell and double the quotes in it, or save as JSON Lines."
                )
            of_row.clear()
            if cells:  # blank lines are skipped
                yield rows.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: not a readable table ({error}).") from error


def _recorded(lines: Iterable[str], record: list[str]) -> Iterator[str]:
    for line in lines:
        record.append(line)
        yield line


def _tab_separated(_: Path, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    width, start, block = 0, 0, list[str]()  # the block: lines from a quote that opens a cell to the next whole row
    for number, line in enumerate(lines, start=1):
        cells = line.rstrip("\r\n").split("\t")
        if not block and cells == [""]:  # blank lines are skipped
            continue
        width = width or len(cells)
        if block and len(cells) == width:
            yield from _rows_of_block(start, block, width)
            block = []
        if block:
            block.append(line)
        elif '"' in line and any(map(_OPEN_CELL.fullmatch, cells)):
            start, block = number, [line]
        else:
            yield number, list(map(_unquoted, cells))
    yield from _rows_of_block(start, block, width)


def _rows_of_block(start: int, block: list[str], width: int) -> list[tuple[int, list[str]]]:
    """The rows of lines that may hold quoted cells with tabs and line ends, or else one row for each line."""
    reader = csv.reader(block, delimiter="\t", strict=True)
    try:
        rows = [(start + reader.line_num - 1, cells) for cells in reader if cells]
        if all(len(cells) == width for _, cells in rows):
            return rows
    except csv.Error:
        pass
    split = ((number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(block, start=start))
    return [(number, list(map(_unquoted, cells))) for number, cells in split if cells != [""]]


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if cell.startswith('"') and _QUOTED_CELL.fullmatch(cell) else cell


def _read_parquet(
    path: Path, select_columns: Callable[[list[str]], list[str]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = select_columns(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield str(path), record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged after row {row}, or not a parquet file ({error}).") from error


def _read_lines(path: Path, mode: str = "rb", **options: Any) -> Iterator[Any]:
    """Yields the lines of a file, compressed or not: bytes, or text with the options `_AS_TEXT`."""
    open_file: Any = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with open_file(path, mode, **options) as file:
            for line in file:
                number += 1
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or cut off after line {number} ({error}). Copy the file again.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text after line {number} ({error}).") from error


@contextmanager
def replace_when_complete(path: str | Path) -> Iterator[Path]:
    """
    Yields a temporary path in the same folder. It replaces `path` when the block ends, unless the block raises.

    Readers see either the old file or the complete new one, and a process that is killed leaves the old one. The block
    may create a directory instead of a file; `path` must then be missing or an empty directory.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def move_aside(path: Path) -> Path | None:
    """Renames a file or directory, `name` to `name-1`, or the first number that is free. Returns its new path."""
    if not path.exists():
        return None
    number = 1
    while (earlier := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return path.rename(earlier)


@contextmanager
def write_json_lines(path: str | Path) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """
    Yields a function that writes a record as one line of JSON.

    The file is compressed if its name ends in `.gz`; equal records give equal bytes. It replaces `path` when the block
    ends, as with [`replace_when_complete`].
    """
    with (
        replace_when_complete(path) as temporary,
        open(temporary, "wb") as file,
        gzip.GzipFile("", "wb", 6, file, 0) if str(path).endswith(".gz") else nullcontext(file) as stream,
        # A lone surrogate, which UTF-8 cannot encode, becomes its escape, which JSON can read.
        io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", newline="\n") as lines,
    ):
        yield lambda record: lines.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def check_writable(folder: str | Path, name: str) -> None:
    """
    Makes a folder, and raises an error that says so if files cannot be written into it.

    Args:
        folder (`str` or `Path`): The folder.
        name (`str`): What it is called in the error, such as an option's name.

    Raises:
        OSError: Of the kind that the operating system gives.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise type(error)(f"{name}: cannot write to {folder} ({reason}). Choose another directory.") from error


def cache_dir(*parts: str) -> Path:
    """A path in the cache: below `$IGPO_CACHE` if set, else below `~/.cache/igpo_trl`. It may not exist yet."""
    return Path(os.environ.get("IGPO_CACHE") or Path.home() / ".cache" / "igpo_trl", *parts)


def looks_like_path(name: str) -> bool:
    """Whether the name of a model is a local directory rather than `owner/name` on the hub."""
    return name.startswith((".", "/", "~", "outputs/")) or name.count("/") > 1


def encodable(text: str) -> str:
    """The same text as a plain `str` that UTF-8 can encode: lone surrogates become U+FFFD."""
    text = str.__str__(text)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
