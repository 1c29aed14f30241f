"""Several retrievers as one, by reciprocal rank fusion; and loading an index of any kind."""

import contextlib
import os
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import replace_when_complete
from .. import open_search
from ..passages import Corpus, Passage, read_passages
from ..searchable import Searchable
from .bm25 import KIND as BM25_KIND
from .bm25 import BM25Index
from .dense import KIND as DENSE_KIND
from .dense import DenseIndex
from .directory import Index, new_index, read_manifest, write_manifest
from .passage_file import OFFSETS_FILE, PASSAGES_FILE, StoredPassages, fingerprint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

KIND, VERSION = "igpo_trl.hybrid", 1


class HybridIndex(Index):
    """
    Fuses the rankings of two or more retrievers over the same passages.

    A passage scores `sum over retrievers of 1 / (constant + rank)`, with ranks from 1, over the retrievers that
    return it among their first `depth` (Cormack, Clarke & Büttcher, SIGIR 2009). Only ranks count, so the scores of
    the retrievers need not be comparable. With a single retriever the order is its own.

    Args:
        parts (sequence of `Searchable`, `str` or `Path`): What to fuse: indexes, or what [`open_search`] opens.
            Passages are the same if their ids are.
        constant (`int`, *optional*, defaults to `60`): The larger, the less the first ranks outweigh later ones.
        depth (`int`, *optional*, defaults to `50`): Results requested from each part, or `k` if that is more.

    Raises:
        ValueError: There are no parts, or a number is not positive.

    Example:

    ```python
    >>> index = HybridIndex([BM25Index.load("bm25/"), DenseIndex.load("dense/")])
    >>> index.save("hybrid/")
    ```
    """

    def __init__(self, parts: Sequence[Searchable | str | Path], *, constant: int = 60, depth: int = 50) -> None:
        if not parts:
            raise ValueError("got no parts, expected at least one index.")
        if constant < 1 or depth < 1:
            raise ValueError(f"got constant={constant}, depth={depth}; expected both to be at least 1.")
        if isinstance(parts, (str, Path)):
            raise TypeError(f"got parts={parts!r}, expected a list. Load an index with `HybridIndex.load` instead.")
        self.parts = [open_search(part) for part in parts]
        self.constant = constant
        self.depth = depth

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        directory: str | Path,
        *,
        model: "str | Path | SentenceTransformer",
        k1: float = 0.9,
        b: float = 0.4,
        title_weight: int = 4,
        stopwords: str | None = "english",
        stemmer: str | None = "english",
        restart: bool = False,
        show_progress: bool = True,
        **dense: Any,
    ) -> "HybridIndex":
        """
        Indexes a corpus with BM25 and with a dense model, on disk.

        Like its parts, the index appears complete or not at all, and an interrupted build resumes.

        Args:
            corpus, directory, model, k1, b, title_weight, stopwords, stemmer, restart, show_progress:
                As for [`BM25Index.build`] and [`DenseIndex.build`].
            dense:
                Further arguments of [`DenseIndex.build`].
        """
        with new_index(directory, restart=restart) as (target, work):
            first, second = work / "bm25", work / "dense"
            settings: dict[str, Any] = {"k1": k1, "b": b, "title_weight": title_weight}
            settings |= {"stopwords": stopwords, "stemmer": stemmer}
            if not _is_built(first, corpus, settings):
                BM25Index.build(corpus, directory=first, show_progress=show_progress, **settings)
            passages = StoredPassages(first)
            DenseIndex.build(passages, second, model=model, show_progress=show_progress, **dense)
            _share_passages(first, second)
            for part in (first, second):
                os.replace(part, target / part.name)
            write_manifest(
                target, KIND, VERSION, passages=len(passages), parts=["bm25", "dense"], constant=60, depth=50
            )
        return cls.load(directory, model=model)

    def __len__(self) -> int:
        """Number of passages, from the first part that knows it."""
        for part in self.parts:
            if isinstance(part, Sized):
                return len(part)
        raise TypeError("no part knows how many passages it has.")

    @property
    def passages(self) -> Sequence[Passage] | None:
        """The passages in their order, from the first part that has them; `None` if all parts are elsewhere."""
        return next(filter(None, (getattr(part, "passages", None) for part in self.parts)), None)

    def _search_batch(self, queries: list[str], k: int) -> list[list[Passage]]:
        rankings = [part.search_batch(queries, max(k, self.depth)) for part in self.parts]
        return [self._fuse(query_rankings)[:k] for query_rankings in zip(*rankings, strict=True)]

    def _fuse(self, rankings: Sequence[list[Passage]]) -> list[Passage]:
        passages: dict[str, Passage] = {}
        scores: dict[str, float] = {}
        for ranking in rankings:
            for rank, passage in enumerate(ranking, start=1):
                passages.setdefault(passage.id, passage)
                scores[passage.id] = scores.get(passage.id, 0.0) + 1 / (self.constant + rank)
        best = sorted(scores, key=lambda key: -scores[key])  # stable: equal scores stay in the order of the first part
        return [Passage(key, passages[key].title, passages[key].text, scores[key]) for key in best]

    def _write(self, directory: Path) -> None:
        names = [f"part{i}" for i in range(len(self.parts))]
        for name, part in zip(names, self.parts, strict=True):
            if not isinstance(part, Index):
                raise TypeError(f"a {type(part).__name__} cannot be saved; only indexes can.")
            part.save(directory / name)
        write_manifest(
            directory, KIND, VERSION, passages=len(self), parts=names, constant=self.constant, depth=self.depth
        )

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        model: "str | Path | SentenceTransformer | None" = None,
        device: str | None = None,
    ) -> "HybridIndex":
        """
        Loads an index and its parts, memory-mapped.

        Args:
            directory (`str` or `Path`): Where it was built or saved.
            model, device:
                For the dense parts, as for [`DenseIndex.load`].

        Raises:
            FileNotFoundError: There is no index in the directory, or a part is missing.
            ValueError: The index is of another kind or version, or a part is damaged or has a different number of
                passages.
        """
        directory = Path(directory)
        manifest = read_manifest(directory, KIND, VERSION)
        parts: list[Any] = [load_index(directory / name, model=model, device=device) for name in manifest["parts"]]
        for name, part in zip(manifest["parts"], parts, strict=True):
            if len(part) != manifest["passages"]:
                raise ValueError(
                    f"{directory / name} has {len(part)} passages, expected {manifest['passages']}. Build it again."
                )
        return cls(parts, constant=manifest["constant"], depth=manifest["depth"])


def load_index(
    directory: str | Path, *, model: "str | Path | SentenceTransformer | None" = None, device: str | None = None
) -> BM25Index | DenseIndex | HybridIndex:
    """
    Loads an index of any kind, memory-mapped.

    Args:
        directory (`str` or `Path`): Where `igpo index`, or the `build` or `save` of an index, has put it.
        model (`str`, `Path` or `SentenceTransformer`, *optional*): Dense and hybrid indexes: the model, if it has
            moved since the build.
        device (`str`, *optional*): Dense and hybrid indexes: device of the model; by default a GPU if there is one.

    Raises:
        FileNotFoundError: There is no index in the directory.
        ValueError: The index is of an unknown kind or of another version, one of its files is missing or damaged, or
            the model is not the one that it was built with.
    """
    kind = read_manifest(directory)["kind"]
    if kind == BM25_KIND:
        return BM25Index.load(directory)
    if kind == DENSE_KIND:
        return DenseIndex.load(directory, model=model, device=device)
    if kind == KIND:
        return HybridIndex.load(directory, model=model, device=device)
    raise ValueError(f"{directory} contains an index of kind {kind!r}, which this release does not know.")


def _is_built(directory: Path, corpus: Corpus, settings: dict[str, Any]) -> bool:
    """Whether an earlier attempt has built this part, from the same corpus with the same settings."""
    try:
        manifest = read_manifest(directory)
    except (FileNotFoundError, ValueError):
        return False
    if isinstance(corpus, Iterator) or any(manifest.get(name) != value for name, value in settings.items()):
        return False  # an iterator can be read only once
    return manifest["corpus"] == fingerprint(read_passages(corpus))


def _share_passages(first: Path, second: Path) -> None:
    """Stores the passages of two parts only once, by hard links, where the file system can do that."""
    with contextlib.suppress(OSError):
        for name in (PASSAGES_FILE, OFFSETS_FILE):
            with replace_when_complete(second / name) as link:
                os.link(first / name, link)
