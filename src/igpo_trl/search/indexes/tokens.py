"""The corpus as token ids for BM25, saved in shards so that an interrupted build can resume."""

import json
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ...files import replace_when_complete
from ..extras import require

SHARD = 8192
"""Texts per shard: what an interruption may cost, about a second of work."""

Shard = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Token ids of several texts in one array, and the number of tokens of each text."""


class TokenIds:
    """Token ids of many texts at four bytes each; iterates over lists of ids, one per text."""

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return sum(len(lengths) for _, lengths in self._shards)

    def __iter__(self) -> Iterator[list[int]]:
        for ids, lengths in self._shards:
            start = 0
            for length in lengths.tolist():
                yield ids[start : start + length].tolist()
                start += length


class CorpusTokenizer:
    """
    Tokenizes many texts. Ids count up in the order in which words (or stems) first appear.

    Shards are saved in `folder`, if given. Those of an earlier attempt are used where `key`, which identifies all
    texts so far, returns the same.
    """

    def __init__(
        self,
        stopwords: str | None,
        stemmer: str | None,
        folder: Path | None = None,
        key: Callable[[], str] = lambda: "",
    ) -> None:
        bm25s = require("bm25s", "BM25 search", "search")
        self._tokenizer = bm25s.tokenization.Tokenizer(stopwords=stopwords, stemmer=make_stemmer(stemmer))
        self._settings = f"{bm25s.__version__} {stopwords} {stemmer}"
        self._folder = folder
        self._key = key
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab_dict()

    def read(self, texts: Iterator[str]) -> TokenIds:
        """Tokenizes texts, reading up to one shard ahead."""
        shards: list[Shard] = []
        while batch := list(islice(texts, SHARD)):
            if self._folder is None or len(batch) < SHARD:  # the short last shard is not worth saving
                shards.append(self.tokenize(batch))
            else:
                file, key = self._folder / f"{len(shards):06}.npz", f"{self._settings} {self._key()}"
                shards.append(self._load(file, key) or self._tokenize_and_save(batch, file, key))
        return TokenIds(shards)

    def tokenize(self, texts: list[str]) -> Shard:
        """The ids of texts. New words join the vocabulary."""
        rows = list(self._tokenizer.streaming_tokenize(texts, allow_empty=False))
        ids = np.fromiter(chain.from_iterable(rows), dtype=np.int32)
        return ids, np.fromiter(map(len, rows), dtype=np.int64)

    def _tokenize_and_save(self, texts: list[str], file: Path, key: str) -> Shard:
        words = self._tokenizer.word_to_id
        known = len(words)
        ids, lengths = self.tokenize(texts)
        new = list(islice(reversed(words), len(words) - known))[::-1]
        arrays = {"ids": ids, "lengths": lengths, "words": _as_bytes(json.dumps(new)), "key": _as_bytes(key)}
        with replace_when_complete(file) as temporary, open(temporary, "wb") as out:
            np.savez(out, **arrays)  # type: ignore[arg-type]
        return ids, lengths

    def _load(self, file: Path, key: str) -> Shard | None:
        """The shard in a file, or `None` if it is missing, damaged or has another key."""
        try:
            with open(file, "rb") as content, np.load(content) as shard:
                if shard["key"].tobytes() != key.encode():
                    return None
                new = json.loads(shard["words"].tobytes())
                ids, lengths = shard["ids"], shard["lengths"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # possible after a power cut
            return None
        list(self._tokenizer.streaming_tokenize([" ".join(new)], allow_empty=False))  # they get the same ids
        return ids, lengths


def make_stemmer(language: str | None) -> Any:
    """A Snowball stemmer, or `None` for none. It is cheap to make and must not be shared between threads."""
    if language is None:
        return None
    stemmers = require("Stemmer", "BM25 search", "search")
    try:
        return stemmers.Stemmer(language)
    except KeyError:
        known = ", ".join(stemmers.algorithms())
        raise ValueError(f"got stemmer={language!r}, expected None or one of {known}.") from None


def _as_bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)
