"""The words of a corpus as numbers, kept in shards that an interrupted build finds again."""

import json
import os
from array import array
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

SHARD = 8192
"""Texts per shard: what an interruption may cost, a second's work."""


class Words:
    """
    The words of many texts, with ids that count up in the order in which words first appear.

    Args:
        stopwords (`str`, *optional*):
            Language whose stop words are left out (a name bm25s knows).
        stemmer (`str`, *optional*):
            Language whose endings are cut off (a name Snowball knows).
        work (`Path`, *optional*):
            Folder to keep shards in, and to take them from where they are there. By default none are kept.
        key (`Callable[[], str]`, *optional*):
            Says of all texts so far whether they are the same as those of a kept shard.

    Attributes:
        ids (`Sequence[list[int]]`): For every text, the ids of its words in order.
        vocabulary (`dict[str, int]`): The id of every word, or of every stem.
    """

    def __init__(
        self,
        stopwords: str | None,
        stemmer: str | None,
        work: Path | None = None,
        key: Callable[[], str] = lambda: "",
    ) -> None:
        import bm25s

        self._tokenizer = bm25s.tokenization.Tokenizer(stopwords=stopwords, stemmer=make_stemmer(stemmer))
        self._settings = f"{bm25s.__version__} {stopwords} {stemmer}"
        self._work = work
        self._key = key
        self.ids = _Ids()
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab_dict()

    def read(self, texts: Iterator[str]) -> None:
        """Adds texts, reading a shard of them ahead."""
        for number in count():
            shard = list(islice(texts, SHARD))
            # A short shard is the last one, and as quickly done again as read.
            if self._work is None or len(shard) < SHARD:
                self._tokenize(shard)
            else:
                file, key = self._work / f"{number:06}.npz", f"{self._settings} {self._key()}"
                if not self._take(file, key):
                    known = len(self._tokenizer.word_to_id)
                    self._tokenize(shard)
                    self._keep(file, key, len(shard), known)
            if len(shard) < SHARD:
                return

    def _tokenize(self, texts: list[str]) -> None:
        for ids in self._tokenizer.streaming_tokenize(texts, allow_empty=False):
            self.ids.append(ids)

    def _keep(self, file: Path, key: str, number: int, known: int) -> None:
        """Writes a shard: the ids of the last texts, and the words beyond those known before."""
        words = self._tokenizer.word_to_id
        new = list(islice(reversed(words), len(words) - known))[::-1]
        ids, lengths = self.ids.last(number)
        temporary = file.with_suffix(".tmp")
        with open(temporary, "wb") as out:
            np.savez(out, ids=ids, lengths=lengths, words=_as_bytes(json.dumps(new)), key=_as_bytes(key))
        os.replace(temporary, file)

    def _take(self, file: Path, key: str) -> bool:
        """Adds what a shard holds, if it is there, whole and of this key; says whether it is."""
        try:
            with open(file, "rb") as content, np.load(content) as shard:
                if shard["key"].tobytes() != key.encode():
                    return False
                new = json.loads(shard["words"].tobytes())
                ids, lengths = shard["ids"], shard["lengths"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # after a power cut it may lack some
            return False
        list(self._tokenizer.streaming_tokenize([" ".join(new)], allow_empty=False))  # they get the ids that they had
        self.ids.extend(ids, lengths)
        return True


def make_stemmer(language: str | None) -> Any:
    """
    A Snowball stemmer, or `None` for none. It is cheap to make, and not for several threads.

    Raises:
        ValueError: There is none for this language.
        ImportError: PyStemmer is not installed.
    """
    if language is None:
        return None
    try:
        import Stemmer
    except ImportError as error:
        raise ImportError('BM25 search needs PyStemmer. Install it with: pip install "igpo-trl[search]"') from error
    try:
        return Stemmer.Stemmer(language)
    except KeyError:
        known = ", ".join(Stemmer.algorithms())
        raise ValueError(f"got stemmer={language!r}, expected None or one of {known}.") from None


class _Ids:
    """Ids of many texts at four bytes each, where lists of lists would take four times that; lists on the way."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._ends = array("q", [0])

    def append(self, ids: list[int]) -> None:
        self._ids.extend(ids)
        self._ends.append(len(self._ids))

    def extend(self, ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        """Appends several texts: their ids in one array, and how many belong to each."""
        self._ends.frombytes((self._ends[-1] + np.cumsum(lengths)).tobytes())
        self._ids.frombytes(ids.tobytes())

    def last(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The last texts, in the form that `extend` takes."""
        ends = np.array(self._ends[-number - 1 :], dtype=np.int64)
        return np.array(self._ids[ends[0] :], dtype=np.int32), np.diff(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(len(self)):
            yield self._ids[self._ends[i] : self._ends[i + 1]].tolist()


def _as_bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)
