"""The passage record, and a reader of corpora that takes several file formats and layouts and checks every record."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import FILE_ENDINGS, read_json_lines, read_records


@dataclass(frozen=True, slots=True)
class Passage:
    """
    One passage of a corpus, or one search result.

    Attributes:
        id (`str`): Unique in its corpus.
        title (`str`): Title of its page; may be empty.
        text (`str`): The passage itself.
        score (`float`): Relevance to the query, in the retriever's own unit; higher is better. 0 in a corpus.
    """

    id: str
    title: str
    text: str
    score: float = 0.0


Corpus = str | Path | Iterable[str | Path] | Iterable[dict[str, Any]] | Iterable[Passage]
"""
A file, several files, or any iterable of `dict` or `Passage`, such as a `datasets.Dataset`.

Files are JSON Lines, JSON, `.parquet`, or tables with a header (`.tsv`, `.csv`), see [`read_records`].
"""

_IDS = ("id", "_id", "docid", "doc_id")
_FIELDS = (*_IDS, "title", "text", "contents")


def read_passages(corpus: Corpus) -> Iterator[Passage]:
    """
    Reads and checks a corpus, one passage at a time.

    A record needs an id (`id`, `_id`, `docid` or `doc_id`; string or integer) and either `title` (may be empty) and
    `text` (may not), or `contents`, whose first line is the title, as in Search-R1's Wikipedia. Other fields are
    ignored. Every row becomes a passage, or is an error.

    Raises:
        FileNotFoundError: A file does not exist. Raised by the call itself, before anything is read.
        ValueError: A record is malformed, lacks a field or repeats an id, or there are no records. The message names
            the file and line (or the position in an iterable).
    """
    items: Iterable[Any] = corpus if isinstance(corpus, list | tuple) else [corpus]
    for path in items:
        if isinstance(path, str | Path) and not Path(path).is_file():
            problem = "a directory" if Path(path).is_dir() else "no such file"
            raise FileNotFoundError(f"{problem}: {path}. Expected a file that ends in {', '.join(FILE_ENDINGS)}.")
    return _checked(corpus)


def _checked(corpus: Corpus) -> Iterator[Passage]:
    seen = SeenIds()
    for where, record in _records(corpus):
        passage = record if isinstance(record, Passage) else _passage(where, record)
        earlier = seen.add(passage.id)
        if earlier is not None:
            raise ValueError(
                f"{where}: the id {passage.id!r} is already that of passage {earlier}. Ids must be unique."
            )
        yield passage
    if not len(seen):
        name = f"{corpus} " if isinstance(corpus, str | Path) else ""
        raise ValueError(f"the corpus {name}is empty. Expected at least one passage.")


def _passage(where: str, record: dict[str, Any]) -> Passage:
    field = next((name for name in _IDS if name in record), None)
    if field is None:
        raise ValueError(f"{where}: no field `id`; got {sorted(record)}, expected `id`, `title`, `text`.")
    key, text_field = record[field], "contents" if "contents" in record and "text" not in record else "text"
    for name in ("title", "text") if text_field == "text" else ():
        if name not in record:
            raise ValueError(
                f"{where}: no field `{name}`; got {sorted(record)}, expected `id`, `title`, `text` (or `id` and "
                "`contents`)."
            )
    title, text = record.get("title"), record[text_field]
    if text_field == "contents" and title is None and isinstance(text, str):
        title, text = split_contents(text)
    if isinstance(key, bool) or not isinstance(key, str | int) or key == "":
        raise ValueError(f"{where}: `{field}` is {key!r}, expected a non-empty string or an integer.")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: `{text_field}` is {text!r}, expected a non-empty string.")
    if not isinstance(title, str):
        raise ValueError(f"{where}: `title` is {title!r}, expected a string (it may be empty).")
    return Passage(str(key), title, text)


def split_contents(contents: str) -> tuple[str, str]:
    """
    Splits a passage into title and text. The first line is the title, with or without quotes.

    A single line is a text without a title.
    """
    title, newline, text = contents.partition("\n")
    if not newline or not text.strip():
        return "", contents
    return unquote(title), text


def unquote(title: str) -> str:
    """The title in the first line of `contents`, without its quotes."""
    title = title.strip()
    return title[1:-1] if len(title) >= 2 and title[0] == title[-1] == '"' else title


def first_words(text: str, limit: int | None) -> str:
    """The first `limit` words of a text and an ellipsis, or the text itself if it is not longer (`None`: no limit)."""
    words = text.split()
    return text if limit is None or len(words) <= limit else " ".join(words[:limit]) + " …"


class SeenIds:
    """
    The ids seen so far, each with the number of its passage, from 1.

    Ids that count up, as in most large corpora, take no memory: their run is stored as its two ends.
    """

    def __init__(self) -> None:
        self._number = 0
        self._others: dict[str, int] = {}
        self._run: tuple[int, int, int] | None = None  # first id, last id, number of the first

    def __len__(self) -> int:
        return self._number

    def add(self, key: str) -> int | None:
        """Adds an id. Returns the number of the earlier passage with the same id, if there is one."""
        self._number += 1
        value = int(key) if key.isascii() and key.isdigit() and (key[0] != "0" or key == "0") else None
        if value is not None:
            if self._run is None and not self._others:
                self._run = (value, value, self._number)
                return None
            if self._run is not None and self._run[0] <= value <= self._run[1]:
                return self._run[2] + value - self._run[0]
            # The run grows only while it has every id: then ids and passage numbers increase together.
            if self._run is not None and not self._others and value == self._run[1] + 1:
                self._run = (self._run[0], value, self._run[2])
                return None
        earlier = self._others.setdefault(key, self._number)
        return earlier if earlier != self._number else None


def _records(corpus: Corpus) -> Iterator[tuple[str, dict[str, Any] | Passage]]:
    if isinstance(corpus, str | Path):
        corpus = [corpus]
    for position, item in enumerate(corpus, start=1):
        if isinstance(item, str | Path):
            yield from _read_file(Path(item))
        elif isinstance(item, dict | Passage):
            yield f"passage {position}", item
        else:
            raise ValueError(f"passage {position}: got {type(item).__name__}, expected a dict or the path of a file.")


def _read_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        records = read_records(path, select_columns=lambda names: [n for n in names if n in _FIELDS] or names)
        return ((f"{where} (row {row})", record) for row, (where, record) in enumerate(records, start=1))
    return read_records(path) if name.endswith(FILE_ENDINGS) else read_json_lines(path)
