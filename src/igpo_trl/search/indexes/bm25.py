"""BM25 over passages, on [bm25s](https://github.com/xhluca/bm25s): build, save, load memory-mapped, search."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..passages import Corpus, Passage, read_passages
from ..searchable import check_request
from .store import check_kind, new_index, read_manifest, write_manifest
from .stored import PassageWriter, StoredPassages, with_scores
from .words import Words, make_stemmer

if TYPE_CHECKING:
    import bm25s

KIND, VERSION = "igpo_trl.bm25", 4

MIN_NUMBA = 50_000
"""Passages from which on numba is worth the seconds that it takes to compile, where it is installed."""


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ImportError('BM25 search needs bm25s. Install it with: pip install "igpo-trl[search]"') from error
    return bm25s


class BM25Index:
    """
    Keyword search over passages; a passage's title is indexed with its text, and counts four times.

    Build it once, on disk, and load it memory-mapped: loading takes well under a second and processes on one machine
    share its memory.

    ```python
    >>> index = BM25Index.build("corpus.jsonl.gz", directory="index/")
    >>> index = BM25Index.load("index/")
    >>> index.search("Who wrote Dune?", k=3)
    [Passage(id='17', title='Dune (novel)', text='Dune is a 1965 epic …', score=9.1), …]
    ```
    """

    def __init__(
        self,
        scorer: "bm25s.BM25",
        passages: Sequence[Passage],
        stopwords: str | None,
        stemmer: str | None,
        title_weight: int,
        *,
        backend: str = "auto",
        threads: int | None = None,
    ) -> None:
        if backend not in ("auto", "numba", "numpy"):
            raise ValueError(f"got backend={backend!r}, expected auto, numba or numpy.")
        if threads is not None and threads < 1:
            raise ValueError(f"got threads={threads}, expected at least 1.")
        if backend == "auto":
            backend = "numba" if len(passages) >= MIN_NUMBA and importlib.util.find_spec("numba") else "numpy"
        elif backend == "numba" and not importlib.util.find_spec("numba"):
            raise ImportError('numba is not installed. Install it with: pip install "igpo-trl[numba]"')
        scorer.backend = backend
        self._scorer = scorer
        self._passages = passages
        self._stopwords = stopwords
        self._stemmer = stemmer
        self._title_weight = title_weight
        self._threads = min(8, os.cpu_count() or 1) if threads is None else threads

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        *,
        directory: str | Path | None = None,
        k1: float = 0.9,
        b: float = 0.4,
        title_weight: int = 4,
        stopwords: str | None = "english",
        stemmer: str | None = "english",
        restart: bool = False,
        show_progress: bool = True,
    ) -> "BM25Index":
        """
        Indexes a corpus, reading it once.

        An interrupted build on disk, called again, reads the corpus again but goes on with the words of all passages
        that are still the same, in steps of 8,192.

        Args:
            corpus (`str`, `Path`, or iterable of these, of `dict` or of `Passage`):
                JSONL(.gz), parquet or TSV file(s), a `datasets.Dataset`, or other records; each with `id`, `title`
                and `text`, or in one of the other layouts that [`read_passages`] knows.
            directory (`str` or `Path`, *optional*):
                Where to put the index; it appears there complete or not at all. The passages are then never all in
                memory, and the index is memory-mapped. Without it the index is in memory, for `save`.
            k1 (`float`, *optional*, defaults to `0.9`):
                How fast repeated words saturate.
            b (`float`, *optional*, defaults to `0.4`):
                How much long passages are discounted, from 0 to 1.
            title_weight (`int`, *optional*, defaults to `4`):
                How often a word of the title counts, where one of the text counts once; 0 leaves titles out.
            stopwords (`str`, *optional*, defaults to `"english"`):
                Language whose stop words are left out (a name bm25s knows), or `None` to keep every word.
            stemmer (`str`, *optional*, defaults to `"english"`):
                Language whose endings are cut off, a Snowball stemmer by its name, so that "directs" finds
                "directed"; or `None` to keep words as they are.
            restart (`bool`, *optional*, defaults to `False`):
                Whether to throw away what an interrupted build has left.
            show_progress (`bool`, *optional*, defaults to `True`):
                Whether to show progress bars.

        Raises:
            FileNotFoundError: A file does not exist.
            FileExistsError: The directory holds something that is no index.
            BlockingIOError: Another process builds this index.
            ValueError: A record is malformed, lacks a field or repeats an id (the message names file and line), or
                the corpus has no passages or no words, or a setting is out of range.
        """
        _check_settings(k1, b, title_weight, stopwords, stemmer)

        if directory is None:
            passages: list[Passage] = []
            words = Words(stopwords, stemmer)
            words.read(_texts(corpus, passages.append, title_weight, show_progress))
            return cls(_index(words, k1, b, show_progress), passages, stopwords, stemmer, title_weight)
        with new_index(directory, restart=restart) as (target, work):
            with PassageWriter(target) as writer:
                words = Words(stopwords, stemmer, work, lambda: f"{VERSION} {title_weight} {writer.fingerprint}")
                words.read(_texts(corpus, writer.write, title_weight, show_progress))
            scorer = _index(words, k1, b, show_progress)
            scorer.save(target, show_progress=False)
            _write_manifest(target, scorer, writer, stopwords, stemmer, title_weight)
        return cls.load(directory)

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
        check_request(queries, k)
        results: list[list[Passage]] = [[] for _ in queries]
        words = _bm25s().tokenize(
            list(queries),
            stopwords=self._stopwords,
            stemmer=make_stemmer(self._stemmer),  # not to be shared by threads
            return_ids=False,
            show_progress=False,
        )
        ids = [self._scorer.get_tokens_ids(query) for query in words]
        known = [i for i, query in enumerate(ids) if query]
        parts = [part for thread in range(self._threads) if (part := known[thread :: self._threads])]

        def look_up(part: list[int]) -> None:
            found, scores = self._scorer.retrieve([ids[i] for i in part], k=min(k, len(self)), show_progress=False)
            for i, rows, values in zip(part, found.tolist(), scores.tolist(), strict=True):
                number = sum(value > 0 for value in values)  # sorted: those without a word of the query come last
                results[i] = with_scores(self._passages, rows[:number], values[:number])

        if len(parts) > 1:  # both backends release the interpreter lock
            with ThreadPoolExecutor(len(parts)) as pool:
                list(pool.map(look_up, parts))
        elif parts:
            look_up(parts[0])
        return results

    def save(self, directory: str | Path) -> None:
        """
        Writes the index to a directory, atomically: it appears complete or not at all.

        An index that is already there is replaced.

        Raises:
            FileExistsError: The directory holds something else.
        """
        with new_index(directory, resumable=False) as (target, _):
            self._scorer.save(target, show_progress=False)
            with PassageWriter(target) as writer:
                for passage in self._passages:
                    writer.write(passage)
            _write_manifest(target, self._scorer, writer, self._stopwords, self._stemmer, self._title_weight)

    @classmethod
    def load(
        cls, directory: str | Path, mmap: bool = True, *, backend: str = "auto", threads: int | None = None
    ) -> "BM25Index":
        """
        Loads an index written by `save`, or by `build` with a directory.

        Args:
            directory (`str` or `Path`):
                Where it was saved.
            mmap (`bool`, *optional*, defaults to `True`):
                Whether to leave scores and passages on disk and map them into memory.
            backend (`str`, *optional*, defaults to `"auto"`):
                `"numba"` is many times as fast as `"numpy"`, with the same scores, but takes some seconds to compile
                at the first search of a process. `"auto"` is numba where it is installed and there are 50,000 passages
                or more.
            threads (`int`, *optional*):
                Threads that the queries of a batch are shared out to; by default one per core, 8 at most.

        Raises:
            FileNotFoundError: There is no index in the directory.
            ImportError: numba is asked for and not installed.
            ValueError: The index is of another kind or version, or a file of it is missing, cut off or damaged.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        check_kind(directory, manifest, KIND, VERSION)
        bm25s = _bm25s()
        try:
            scorer = bm25s.BM25.load(directory, mmap=mmap, show_progress=False, backend="numpy")
            for name in ("data", "indices", "indptr"):  # views of the maps, which are faster to slice
                scorer.scores[name] = np.asarray(scorer.scores[name])
            passages: Sequence[Passage] = StoredPassages(directory)
            if not mmap:
                passages = list(passages)
        except (ValueError, KeyError, TypeError, EOFError) as error:
            raise ValueError(f"the index in {directory} is damaged ({error}). Build it again.") from error
        if not len(passages) == scorer.scores["num_docs"] == manifest.get("passages"):
            raise ValueError(
                f"the index in {directory} is damaged: its manifest says {manifest.get('passages')} passages, its "
                f"scores have {scorer.scores['num_docs']}, its text {len(passages)}. Build it again."
            )
        settings = [manifest[name] for name in ("stopwords", "stemmer", "title_weight")]
        return cls(scorer, passages, *settings, backend=backend, threads=threads)


def _check_settings(k1: float, b: float, title_weight: int, stopwords: str | None, stemmer: str | None) -> None:
    if not k1 >= 0 or not 0 <= b <= 1:
        raise ValueError(f"got k1={k1}, b={b}; expected k1 of at least 0 and b from 0 to 1.")
    if title_weight < 0:
        raise ValueError(f"got title_weight={title_weight}, expected at least 0.")
    _bm25s().tokenize(["x"], stopwords=stopwords, show_progress=False)  # an unknown language raises a ValueError
    make_stemmer(stemmer)


def _texts(corpus: Corpus, keep: Callable[[Passage], None], title_weight: int, show_progress: bool) -> Iterator[str]:
    """What is indexed of each passage, after handing it on to be kept."""
    from tqdm.auto import tqdm

    passages = read_passages(corpus)
    for passage in tqdm(passages, desc="Reading", unit=" passages", leave=False, disable=not show_progress):
        keep(passage)
        yield f"{passage.title}\n" * title_weight + passage.text


def _index(words: Words, k1: float, b: float, show_progress: bool) -> Any:
    bm25s = _bm25s()
    if not words.vocabulary:
        raise ValueError("the corpus has no words to index (single letters and stop words do not count).")
    # scipy sorts the scores by word in linear time and with half the memory of the way without it.
    scorer = bm25s.BM25(k1=k1, b=b, csc_backend="auto")
    scorer.index(bm25s.tokenization.Tokenized(ids=words.ids, vocab=words.vocabulary), show_progress=show_progress)
    return scorer


def _write_manifest(
    target: Path,
    scorer: Any,
    writer: PassageWriter,
    stopwords: str | None,
    stemmer: str | None,
    title_weight: int,
) -> None:
    write_manifest(
        target,
        KIND,
        VERSION,
        passages=len(writer),
        corpus=writer.fingerprint,
        k1=scorer.k1,
        b=scorer.b,
        title_weight=title_weight,
        stopwords=stopwords,
        stemmer=stemmer,
        bm25s=_bm25s().__version__,
    )
