"""BM25 over passages, on [bm25s](https://github.com/xhluca/bm25s): build, save, load memory-mapped, search."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require
from ..passages import Corpus, Passage, read_passages
from .directory import Index, new_index, read_manifest, write_manifest
from .passage_file import PassageWriter, StoredPassages, with_scores
from .tokens import CorpusTokenizer, TokenIds, make_stemmer

KIND, VERSION = "igpo_trl.bm25", 4

MIN_NUMBA = 50_000
"""Number of passages from which on numba, if installed, is worth the seconds that it takes to compile."""


def _bm25s() -> Any:
    return require("bm25s", "BM25 search", "search")


class BM25Index(Index):
    """
    Keyword search. A passage's title is indexed with its text, and its words count four times.

    Build it once on disk and load it memory-mapped: loading takes well under a second, and the processes on one
    machine share its memory. Passages without any word of the query are never returned.

    Example:

    ```python
    >>> index = BM25Index.build("corpus.jsonl.gz", directory="index/")
    >>> index = BM25Index.load("index/")
    >>> index.search("Who wrote Dune?", k=3)
    [Passage(id='17', title='Dune (novel)', text='Dune is a 1965 epic …', score=9.1), …]
    ```
    """

    def __init__(
        self,
        scorer: Any,
        passages: Sequence[Passage],
        settings: dict[str, Any],
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
        self.passages = passages
        self._settings = settings
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

        If a build on disk is interrupted, calling it again reads the corpus again but skips the tokenization of all
        passages that are unchanged, in steps of 8,192.

        Args:
            corpus (`str`, `Path`, or iterable of these, of `dict` or of `Passage`): JSONL(.gz), parquet or TSV
                file(s), a `datasets.Dataset`, or other records, each with `id`, `title` and `text` or in another
                layout of [`read_passages`].
            directory (`str` or `Path`, *optional*): Directory for the index, which appears there complete or not at
                all. The passages are then never all in memory, and the index is memory-mapped. By default the index is
                in memory only.
            k1 (`float`, *optional*, defaults to `0.9`): How fast repeated words saturate.
            b (`float`, *optional*, defaults to `0.4`): How much long passages are discounted, from 0 to 1.
            title_weight (`int`, *optional*, defaults to `4`): How many times a word in the title counts, compared to
                one in the text; 0 leaves titles out.
            stopwords (`str`, *optional*, defaults to `"english"`): Language whose stop words are left out (a name that
                bm25s knows), or `None` to keep every word.
            stemmer (`str`, *optional*, defaults to `"english"`): Language of the Snowball stemmer, so that "directs"
                matches "directed"; or `None` for no stemming.
            restart (`bool`, *optional*, defaults to `False`): Whether to discard the work of an interrupted build.
            show_progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

        Raises:
            FileNotFoundError: A file does not exist.
            FileExistsError: The directory contains something other than an index.
            BlockingIOError: Another process is building this index.
            ValueError: A record is malformed, lacks a field or repeats an id (the message names file and line), the
                corpus has no passages or no words, or a setting is out of range.
        """
        _check_settings(k1, b, title_weight, stopwords, stemmer)
        settings: dict[str, Any] = {"title_weight": title_weight, "stopwords": stopwords, "stemmer": stemmer}

        if directory is None:
            passages: list[Passage] = []
            tokenizer = CorpusTokenizer(stopwords, stemmer)
            ids = tokenizer.read(_texts(corpus, passages.append, title_weight, show_progress))
            return cls(_index(ids, tokenizer.vocabulary, k1, b, show_progress), passages, settings)
        with new_index(directory, restart=restart) as (target, work):
            with PassageWriter(target) as writer:

                def key() -> str:
                    return f"{VERSION} {title_weight} {writer.fingerprint}"

                tokenizer = CorpusTokenizer(stopwords, stemmer, work, key)
                ids = tokenizer.read(_texts(corpus, writer.write, title_weight, show_progress))
            scorer = _index(ids, tokenizer.vocabulary, k1, b, show_progress)
            _finish(target, scorer, writer, settings)
        return cls.load(directory)

    def __len__(self) -> int:
        """Number of passages."""
        return len(self.passages)

    def _search_batch(self, queries: list[str], k: int) -> list[list[Passage]]:
        results: list[list[Passage]] = [[] for _ in queries]
        words = _bm25s().tokenize(
            queries,
            stopwords=self._settings["stopwords"],
            stemmer=make_stemmer(self._settings["stemmer"]),
            return_ids=False,
            show_progress=False,
        )
        ids = [self._scorer.get_tokens_ids(query) for query in words]
        known = [i for i, query in enumerate(ids) if query]
        parts = [part for thread in range(self._threads) if (part := known[thread :: self._threads])]

        def look_up(part: list[int]) -> None:
            rows, scores = self._scorer.retrieve([ids[i] for i in part], k=min(k, len(self)), show_progress=False)
            for i, best, values in zip(part, rows.tolist(), scores.tolist(), strict=True):
                matches = sum(value > 0 for value in values)  # sorted: passages without a word of the query are last
                results[i] = with_scores(self.passages, best[:matches], values[:matches])

        if len(parts) > 1:  # both backends release the interpreter lock
            with ThreadPoolExecutor(len(parts)) as pool:
                list(pool.map(look_up, parts))
        elif parts:
            look_up(parts[0])
        return results

    def _write(self, directory: Path) -> None:
        with PassageWriter(directory) as writer:
            for passage in self.passages:
                writer.write(passage)
        _finish(directory, self._scorer, writer, self._settings)

    @classmethod
    def load(
        cls, directory: str | Path, mmap: bool = True, *, backend: str = "auto", threads: int | None = None
    ) -> "BM25Index":
        """
        Loads an index from its directory.

        Args:
            directory (`str` or `Path`): Where it was built or saved.
            mmap (`bool`, *optional*, defaults to `True`): Whether to leave scores and passages on disk and map them
                into memory.
            backend (`str`, *optional*, defaults to `"auto"`): `"numba"` is many times as fast as `"numpy"`, with the
                same scores, but takes some seconds to compile at the first search of a process. `"auto"` uses numba if
                it is installed and the index has 50,000 passages or more.
            threads (`int`, *optional*): Number of threads among which the queries of a batch are divided. By default
                one per core, up to 8.

        Raises:
            FileNotFoundError: There is no index in the directory.
            ImportError: numba is requested and not installed.
            ValueError: The index is of another kind or version, or one of its files is missing, cut off or damaged.
        """
        directory = Path(directory)
        manifest = read_manifest(directory, KIND, VERSION)
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
        settings = {name: manifest[name] for name in ("title_weight", "stopwords", "stemmer")}
        return cls(scorer, passages, settings, backend, threads)


def _check_settings(k1: float, b: float, title_weight: int, stopwords: str | None, stemmer: str | None) -> None:
    if not k1 >= 0 or not 0 <= b <= 1:
        raise ValueError(f"got k1={k1}, b={b}; expected k1 of at least 0 and b from 0 to 1.")
    if title_weight < 0:
        raise ValueError(f"got title_weight={title_weight}, expected at least 0.")
    bm25s = _bm25s()
    bm25s.tokenize(["x"], stopwords=stopwords, show_progress=False)  # raises a ValueError for an unknown language
    make_stemmer(stemmer)


def _texts(corpus: Corpus, keep: Callable[[Passage], None], title_weight: int, show_progress: bool) -> Iterator[str]:
    """The text to index of each passage, after passing the passage to `keep`."""
    from tqdm.auto import tqdm

    passages = read_passages(corpus)
    for passage in tqdm(passages, desc="Reading", unit=" passages", leave=False, disable=not show_progress):
        keep(passage)
        yield f"{passage.title}\n" * title_weight + passage.text


def _index(ids: TokenIds, vocabulary: dict[str, int], k1: float, b: float, show_progress: bool) -> Any:
    """Scores all words in all passages."""
    if not vocabulary:
        raise ValueError("the corpus has no words to index (single letters and stop words do not count).")
    bm25s = _bm25s()
    # With scipy, if installed, scores are sorted by word in linear time and with half the memory.
    scorer = bm25s.BM25(k1=k1, b=b, csc_backend="auto")
    scorer.index(bm25s.tokenization.Tokenized(ids=ids, vocab=vocabulary), show_progress=show_progress)
    return scorer


def _finish(directory: Path, scorer: Any, writer: PassageWriter, settings: dict[str, Any]) -> None:
    """Writes scores and manifest beside the passages."""
    scorer.save(directory, show_progress=False)
    write_manifest(
        directory,
        KIND,
        VERSION,
        passages=len(writer),
        corpus=writer.fingerprint,
        k1=scorer.k1,
        b=scorer.b,
        **settings,
        bm25s=_bm25s().__version__,
    )
