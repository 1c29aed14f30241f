"""
Search for tools: passages, indexes over them, clients of search services, and the tool that a policy calls.

`load_index` and `open_search` give whatever can be searched; its class, and the packages that it needs, are imported
only then.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .searchable import Searchable

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from .indexes.bm25 import BM25Index as BM25Index
    from .indexes.dense import DenseIndex as DenseIndex
    from .indexes.hybrid import HybridIndex as HybridIndex
    from .network.client import HTTPSearch as HTTPSearch
    from .network.pages import PageReader as PageReader
    from .network.pages import ReadPageTool as ReadPageTool
    from .network.remote import SearchError as SearchError
    from .network.responses import CacheMiss as CacheMiss
    from .network.web import WebSearch as WebSearch
    from .passages import Passage as Passage
    from .tool import SearchTool as SearchTool

_MODULES = {
    "BM25Index": "indexes.bm25",
    "DenseIndex": "indexes.dense",
    "HybridIndex": "indexes.hybrid",
    "HTTPSearch": "network.client",
    "WebSearch": "network.web",
    "Passage": "passages",
    "SearchTool": "tool",
    "PageReader": "network.pages",
    "ReadPageTool": "network.pages",
    "SearchError": "network.remote",
    "CacheMiss": "network.responses",
}

__all__ = ["Searchable", "load_index", "open_search", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def load_index(
    directory: str | Path, *, model: "str | Path | SentenceTransformer | None" = None, device: str | None = None
) -> Searchable:
    """
    Loads an index of any kind, memory-mapped.

    Args:
        directory (`str` or `Path`):
            Where `igpo index`, or the `save` of an index, has put it.
        model (`str`, `Path` or `SentenceTransformer`, *optional*):
            For dense and hybrid indexes: where the model is, if not where it was when the index was built.
        device (`str`, *optional*):
            For the model; by default a GPU when there is one.

    Raises:
        FileNotFoundError: There is no index in the directory.
        ValueError: The index is of an unknown kind or of another version, a file of it is missing or damaged, or the
            model is not the one that it was built with.
    """
    from .indexes.store import read_manifest

    kind = read_manifest(directory)["kind"]
    if kind == "igpo_trl.bm25":
        from .indexes.bm25 import BM25Index

        return BM25Index.load(directory)
    if kind == "igpo_trl.dense":
        from .indexes.dense import DenseIndex

        return DenseIndex.load(directory, model=model, device=device)
    if kind == "igpo_trl.hybrid":
        from .indexes.hybrid import HybridIndex

        return HybridIndex.load(directory, model=model, device=device)
    raise ValueError(f"{directory} holds an index of kind {kind!r}, which this release does not know.")


def open_search(
    source: str | Path, *, model: "str | Path | SentenceTransformer | None" = None, device: str | None = None
) -> Searchable:
    """
    Opens what can be searched: the directory of an index, or the address of a search server.

    Args:
        source (`str` or `Path`):
            A directory for [`load_index`], or an `http://` or `https://` address for [`HTTPSearch`].
        model, device:
            As for [`load_index`]; a server has its own.

    Raises:
        FileNotFoundError: There is no index in the directory.
        ValueError: The index cannot be read, or the address is of another kind.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        from .network.client import HTTPSearch

        return HTTPSearch(source)
    if "://" in str(source):
        raise ValueError(f"got {source!r}, expected the directory of an index, or an http:// or https:// address.")
    return load_index(source, model=model, device=device)
