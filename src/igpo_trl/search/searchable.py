"""The two methods that all retrievers have, and the checks of their arguments."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from .passages import Passage


@runtime_checkable
class Searchable(Protocol):
    """
    Anything that finds passages: [`BM25Index`], [`DenseIndex`], [`HybridIndex`], [`HTTPSearch`], [`WebSearch`], or
    your own class with these two methods.
    """

    def search(self, query: str, k: int = 3) -> list[Passage]:
        """The up to `k` best passages for a query, best first."""
        ...

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Passage]]:
        """
        The results of `search` for each query, in order.

        Raises:
            ValueError: `k` is not positive.
            TypeError: `queries` is a single string.
            SearchError: A search service failed ([`HTTPSearch`] and [`WebSearch`] only).
        """
        ...


class Retriever(Searchable):
    """Base of the retrievers in this package. A subclass implements `_search_batch`."""

    def search(self, query: str, k: int = 3) -> list[Passage]:
        return self.search_batch([query], k)[0]

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Passage]]:
        if k < 1:
            raise ValueError(f"got k={k}, expected at least 1.")
        if isinstance(queries, str):
            raise TypeError("`queries` is a string, expected a list of strings. For a single query, use `search`.")
        return self._search_batch(list(queries), k) if queries else []

    def _search_batch(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The results for at least one query, with `k` of at least 1."""
        raise NotImplementedError
