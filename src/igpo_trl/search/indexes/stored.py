"""Passages on disk, read through a memory map."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

import numpy as np

from ..passages import Passage

PASSAGES_FILE, OFFSETS_FILE = "passages.jsonl", "passages.offsets.npy"


def _line(passage: Passage) -> bytes:
    record = {"id": passage.id, "title": passage.title, "text": passage.text}
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 has no bytes for
        return json.dumps(record).encode() + b"\n"


class Fingerprint:
    """Says of passages, in their order, whether they are the same as others."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, line: bytes) -> None:
        self._hash.update(line)

    def __str__(self) -> str:
        return self._hash.hexdigest()


def fingerprint(passages: Iterable[Passage]) -> str:
    """The fingerprint of passages, equal to that of a [`PassageWriter`] that has written them."""
    result = Fingerprint()
    for passage in passages:
        result.add(_line(passage))
    return str(result)


class PassageWriter:
    """
    Writes passages as JSON Lines, with the byte offset of every line beside it when it is closed.

    Example:

    ```python
    >>> with PassageWriter(directory) as writer:
    ...     for passage in passages:
    ...         writer.write(passage)
    >>> len(writer), writer.fingerprint
    ```
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = open(directory / PASSAGES_FILE, "wb")
        self._offsets = array("q", [0])
        self._fingerprint = Fingerprint()

    def write(self, passage: Passage) -> None:
        line = _line(passage)
        self._file.write(line)
        self._fingerprint.add(line)
        self._offsets.append(self._offsets[-1] + len(line))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def fingerprint(self) -> str:
        """Of what has been written so far."""
        return str(self._fingerprint)

    def __enter__(self) -> "PassageWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            np.save(self._directory / OFFSETS_FILE, np.asarray(self._offsets, dtype=np.int64))


class StoredPassages(Sequence[Passage]):
    """
    Passages written by a [`PassageWriter`], read from a memory map one at a time.

    Pickled, they go as the name of their directory.

    Raises:
        ValueError: The offsets do not fit the file.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        # Views of the maps: to index a `memmap` itself takes several times as long.
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
        """The passage in a row, from 0, with a score."""
        start, end = self._ends[row], self._ends[row + 1]
        record = json.loads(str(self._bytes[start:end], "utf-8"))
        return Passage(record["id"], record["title"], record["text"], score)


def with_scores(passages: Sequence[Passage], rows: list[int], scores: list[float]) -> list[Passage]:
    """The passages in some rows, each with its score."""
    found = zip(rows, scores, strict=True)
    if isinstance(passages, StoredPassages):
        return [passages.read(row, score) for row, score in found]
    return [Passage(p.id, p.title, p.text, score) for p, score in ((passages[row], score) for row, score in found)]
