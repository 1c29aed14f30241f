"""BM25 over passages, on [bm25s](https://github.com/xhluca/bm25s): build, save, load memory-mapped, search."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .passages import Corpus, Passage, StoredPassages, read_passages, write_passages

if TYPE_CHECKING:
    import bm25s

KIND, VERSION = "igpo_trl.bm25", 1
MANIFEST_FILE = "manifest.json"


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ImportError('BM25 search needs bm25s. Install it with: pip install "igpo-trl[search]"') from error
    return bm25s


class BM25Index:
    """
    Keyword search over passages; a passage's title is indexed with its text, and counts twice.

    Build it once, save it, and load it memory-mapped: loading takes well under a second and processes on one machine
    share its memory.

    ```python
    >>> index = BM25Index.build("corpus.jsonl.gz")
    >>> index.save("index/")
    >>> index = BM25Index.load("index/")
    >>> index.search("Who wrote Dune?", k=3)
    [Passage(id='17', title='Dune (novel)', text='Dune is a 1965 epic …', score=9.1), …]
    ```
    """

    def __init__(self, scorer: "bm25s.BM25", passages: Sequence[Passage], stopwords: str | None) -> None:
        self._scorer = scorer
        self._passages = passages
        self._stopwords = stopwords

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        *,
        k1: float = 0.9,
        b: float = 0.4,
        stopwords: str | None = "english",
        show_progress: bool = True,
    ) -> "BM25Index":
        """
        Indexes a corpus.

        Args:
            corpus (`str`, `Path`, or iterable of these or of `dict`):
                JSONL or JSONL.gz file(s), or records, each with `id`, `title` and `text`.
            k1 (`float`, *optional*, defaults to `0.9`):
                How fast repeated words saturate.
            b (`float`, *optional*, defaults to `0.4`):
                How much long passages are discounted, from 0 to 1.
            stopwords (`str`, *optional*, defaults to `"english"`):
                Language whose stop words are left out (a name bm25s knows), or `None` to keep every word.
            show_progress (`bool`, *optional*, defaults to `True`):
                Whether to show progress bars.

        Raises:
            FileNotFoundError: A file does not exist.
            ValueError: A record is malformed, lacks a field or repeats an id (the message names file and line), or
                the corpus has no passages or no words.
        """
        bm25s = _bm25s()
        passages = list(read_passages(corpus))
        texts = [f"{passage.title}\n{passage.title}\n{passage.text}" for passage in passages]
        tokens = bm25s.tokenize(texts, stopwords=stopwords, show_progress=show_progress)
        if not tokens.vocab:
            raise ValueError("the corpus has no words to index (single letters and stop words do not count).")
        scorer = bm25s.BM25(k1=k1, b=b)
        scorer.index(tokens, show_progress=show_progress)
        return cls(scorer, passages, stopwords)

    def __len__(self) -> int:
        """Number of passages."""
        return len(self._passages)

    def search(self, query: str, k: int = 3) -> list[Passage]:
        """The up to `k` best passages for a query, best first; passages without any of its words are left out."""
        return self.search_batch([query], k)[0]

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Passage]]:
        """
        The results of `search` for each of several queries, in order.

        Raises:
            ValueError: `k` is not positive.
            TypeError: `queries` is a single string.
        """
        if k < 1:
            raise ValueError(f"got k={k}, expected at least 1.")
        if isinstance(queries, str):
            raise TypeError("`queries` is a string, expected a list of strings. For a single query, use `search`.")
        if not queries:
            return []
        words = _bm25s().tokenize(list(queries), stopwords=self._stopwords, return_ids=False, show_progress=False)
        rows, scores = self._scorer.retrieve(words, k=min(k, len(self)), show_progress=False)
        return [
            [
                dataclasses.replace(self._passages[int(row)], score=float(score))
                for row, score in zip(found, values, strict=True)
                if score > 0
            ]
            for found, values in zip(rows, scores, strict=True)
        ]

    def save(self, directory: str | Path) -> None:
        """
        Writes the index to a directory, atomically: it appears complete or not at all.

        An index that is already there is replaced.

        Raises:
            FileExistsError: The directory holds something else.
        """
        directory = Path(directory)
        if directory.exists() and not (directory / MANIFEST_FILE).is_file() and _has_entries(directory):
            raise FileExistsError(f"{directory} exists and is no BM25 index. Choose another directory.")
        directory.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            target = building / "index"
            target.mkdir()
            self._scorer.save(target, show_progress=False)
            write_passages(self._passages, target)
            manifest = {
                "kind": KIND,
                "version": VERSION,
                "passages": len(self),
                "stopwords": self._stopwords,
                "bm25s": _bm25s().__version__,
                "bytes": {path.name: path.stat().st_size for path in sorted(target.iterdir())},
            }
            (target / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            if directory.exists():
                os.replace(directory, building / "previous")
            os.replace(target, directory)
        finally:
            shutil.rmtree(building, ignore_errors=True)

    @classmethod
    def load(cls, directory: str | Path, mmap: bool = True) -> "BM25Index":
        """
        Loads an index written by `save`.

        Args:
            directory (`str` or `Path`):
                Where it was saved.
            mmap (`bool`, *optional*, defaults to `True`):
                Whether to leave scores and passages on disk and map them into memory.

        Raises:
            FileNotFoundError: There is no index in the directory.
            ValueError: The index is of another kind or version, or a file of it is missing, cut off or damaged.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        bm25s = _bm25s()
        try:
            scorer = bm25s.BM25.load(directory, mmap=mmap, show_progress=False)
            passages: Sequence[Passage] = StoredPassages(directory)
            if not mmap:
                passages = list(passages)
        except (ValueError, KeyError, TypeError, EOFError) as error:
            raise ValueError(f"the index in {directory} is damaged ({error}). Build it again.") from error
        if not len(passages) == scorer.scores["num_docs"] == manifest["passages"]:
            raise ValueError(
                f"the index in {directory} is damaged: its manifest says {manifest['passages']} passages, its scores "
                f"have {scorer.scores['num_docs']}, its text {len(passages)}. Build it again."
            )
        return cls(scorer, passages, manifest["stopwords"])


def _has_entries(path: Path) -> bool:
    return not path.is_dir() or any(path.iterdir())


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Reads the manifest and checks kind, version and the size of every file."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no BM25 index in {directory} (no {MANIFEST_FILE} there). Make one with "
            "BM25Index.build(corpus).save(directory)."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        kind, version, sizes = manifest["kind"], manifest["version"], dict(manifest["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Build the index again.") from error
    if kind != KIND or version != VERSION:
        raise ValueError(
            f"{directory} holds an index of kind {kind!r}, version {version!r}; this release reads kind {KIND!r}, "
            f"version {VERSION}. Build the index again."
        )
    for name, size in sizes.items():
        file = directory / name
        got = file.stat().st_size if file.is_file() else None
        if got != size:
            state = "is missing" if got is None else f"has {got} bytes, expected {size}"
            raise ValueError(f"{file} {state}. The index is incomplete; build it again.")
    return manifest
