"""Passages in a file, read one at a time through a memory map."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..passages import Passage

PASSAGES_FILE, OFFSETS_FILE = "passages.jsonl", "passages.offsets.npy"


def _line(passage: Passage) -> bytes:
    record = {"id": passage.id, "title": passage.title, "text": passage.text}
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which UTF-8 cannot encode
        return json.dumps(record).encode() + b"\n"


def fingerprint(passages: Iterable[Passage]) -> str:
    """A hash of passages in their order, equal to that of a [`PassageWriter`] that has written them."""
    digest = hashlib.blake2b(digest_size=16)
    for passage in passages:
        digest.update(_line(passage))
    return digest.hexdigest()


class PassageWriter:
    """Writes passages as JSON Lines. On leaving the `with` block it also writes the byte offset of every line."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = open(directory / PASSAGES_FILE, "wb")
        self._offsets = array("q", [0])
        self._digest = hashlib.blake2b(digest_size=16)

    def write(self, passage: Passage) -> None:
        """Appends a passage."""
        line = _line(passage)
        self._file.write(line)
        self._digest.update(line)
        self._offsets.append(self._offsets[-1] + len(line))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def fingerprint(self) -> str:
        """Hash of the passages written so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> "PassageWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._file.close()
        if error is None:
            np.save(self._directory / OFFSETS_FILE, np.asarray(self._offsets, dtype=np.int64))


class StoredPassages(Sequence[Passage]):
    """Passages written by a [`PassageWriter`]. Its pickle contains only the name of their directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        # Views of the maps, because indexing a `memmap` takes several times as long.
        offsets = np.load(directory / OFFSETS_FILE, mmap_mode="r")
        self._ends = memoryview(offsets)
        content = np.memmap(directory / PASSAGES_FILE, dtype=np.uint8, mode="r")
        self._bytes = memoryview(content)  # type: ignore[arg-type]
        if self._ends[-1] != len(self._bytes):
            raise ValueError(f"{directory / PASSAGES_FILE} has {len(self._bytes)} bytes, expected {self._ends[-1]}.")

    def __reduce__(self) -> tuple[type["StoredPassages"], tuple[Path]]:
        return StoredPassages, (self._directory,)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, position: int) -> Passage: ...
    @overload
    def __getitem__(self, position: slice) -> list[Passage]: ...
    def __getitem__(self, position: int | slice) -> Passage | list[Passage]:
        if isinstance(position, slice):
            return [self.read(row) for row in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(f"passage {position} of {len(self)}")
        return self.read(position % len(self))

    def read(self, row: int, score: float = 0.0) -> Passage:
        """The passage in a row, counted from 0, with a score."""
        start, end = self._ends[row], self._ends[row + 1]
        record = json.loads(str(self._bytes[start:end], "utf-8"))
        return Passage(record["id"], record["title"], record["text"], score)


def with_scores(passages: Sequence[Passage], rows: list[int], scores: list[float]) -> list[Passage]:
    """The passages in the given rows, each with its score."""
    if isinstance(passages, StoredPassages):
        return [passages.read(row, score) for row, score in zip(rows, scores, strict=True)]
    return [replace(passages[row], score=score) for row, score in zip(rows, scores, strict=True)]
