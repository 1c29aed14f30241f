"""The passage record, reading a corpus of passages, and passages on disk behind a memory map."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from .._jsonl import read_json_lines

Corpus = str | Path | Iterable[str | Path] | Iterable[dict[str, Any]]
"""A JSONL(.gz) file, several of them, or an iterable of records with `id`, `title` and `text`."""

PASSAGES_FILE, OFFSETS_FILE = "passages.jsonl", "passages.offsets.npy"


@dataclass(frozen=True, slots=True)
class Passage:
    """
    One passage of a corpus, or one search result.

    Attributes:
        id (`str`): Unique in its corpus.
        title (`str`): Title of the page it comes from; may be empty.
        text (`str`): The passage itself.
        score (`float`): How well it fits the query, in the unit of the retriever; higher is better. 0 in a corpus.
    """

    id: str
    title: str
    text: str
    score: float = 0.0


def read_passages(corpus: Corpus) -> Iterator[Passage]:
    """
    Reads and checks a corpus, one passage at a time.

    A record needs `id` (text or integer), `title` (may be empty) and `text` (must not be); other fields are ignored.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A record is malformed, lacks a field or repeats an id, or there is no record at all. The message
            names the file and line (or the position in an iterable).
    """
    seen: dict[str, int] = {}
    for number, (where, record) in enumerate(_records(corpus), start=1):
        for field in ("id", "title", "text"):
            if field not in record:
                raise ValueError(f"{where}: no field `{field}`; got {sorted(record)}, expected `id`, `title`, `text`.")
        key, title, text = record["id"], record["title"], record["text"]
        if isinstance(key, bool) or not isinstance(key, str | int) or key == "":
            raise ValueError(f"{where}: `id` is {key!r}, expected a non-empty string or an integer.")
        if not isinstance(title, str):
            raise ValueError(f"{where}: `title` is {title!r}, expected a string (it may be empty).")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: `text` is {text!r}, expected a non-empty string.")
        key = str(key)
        if key in seen:
            raise ValueError(f"{where}: the id {key!r} is already that of passage {seen[key]}. Ids must be unique.")
        seen[key] = number
        yield Passage(key, title, text)
    if not seen:
        name = f"{corpus} " if isinstance(corpus, str | Path) else ""
        raise ValueError(f"the corpus {name}is empty. Expected at least one passage.")


def _records(corpus: Corpus) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(corpus, str | Path):
        corpus = [corpus]
    for position, item in enumerate(corpus, start=1):
        if isinstance(item, str | Path):
            yield from read_json_lines(item)
        elif isinstance(item, dict):
            yield f"passage {position}", item
        else:
            raise ValueError(f"passage {position}: got {type(item).__name__}, expected a dict or the path of a file.")


def write_passages(passages: Iterable[Passage], directory: Path) -> None:
    """Writes passages as JSONL, with the byte offset of every line beside it."""
    offsets = [0]
    with open(directory / PASSAGES_FILE, "wb") as file:
        for passage in passages:
            record = {"id": passage.id, "title": passage.title, "text": passage.text}
            offsets.append(offsets[-1] + file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n"))
    np.save(directory / OFFSETS_FILE, np.asarray(offsets, dtype=np.int64))


class StoredPassages(Sequence[Passage]):
    """
    Passages written by `write_passages`, read from a memory map one at a time.

    Raises:
        ValueError: The offsets do not fit the file.
    """

    def __init__(self, directory: Path) -> None:
        self._offsets = np.load(directory / OFFSETS_FILE, mmap_mode="r")
        self._bytes = np.memmap(directory / PASSAGES_FILE, dtype=np.uint8, mode="r")
        if self._offsets[-1] != len(self._bytes):
            raise ValueError(
                f"{directory / PASSAGES_FILE} has {len(self._bytes)} bytes, expected {self._offsets[-1]}."
            )

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, position: int) -> Passage: ...
    @overload
    def __getitem__(self, position: slice) -> list[Passage]: ...
    def __getitem__(self, position: int | slice) -> Passage | list[Passage]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(f"passage {position} of {len(self)}")
        position %= len(self)
        start, end = int(self._offsets[position]), int(self._offsets[position + 1])
        return Passage(**json.loads(self._bytes[start:end].tobytes()))
