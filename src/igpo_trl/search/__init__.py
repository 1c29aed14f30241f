"""
Search for tools: passages, indexes over them, clients of search services, and the tools that a policy calls.

Every name is imported on first use, because the HTTP client and the optional packages take long to load.
"""

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .searchable import Searchable as Searchable

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from .indexes.bm25 import BM25Index as BM25Index
    from .indexes.dense import DenseIndex as DenseIndex
    from .indexes.hybrid import HybridIndex as HybridIndex
    from .indexes.hybrid import load_index as load_index
    from .network.client import HTTPSearch as HTTPSearch
    from .network.fetching import PageError as PageError
    from .network.http_requests import SearchError as SearchError
    from .network.pages import PageReader as PageReader
    from .network.pages import ReadPageTool as ReadPageTool
    from .network.response_cache import CacheMiss as CacheMiss
    from .network.server import create_app as create_app
    from .network.server import serve as serve
    from .network.web import WebSearch as WebSearch
    from .passages import Passage as Passage
    from .tool import SearchTool as SearchTool

_MODULES = {
    "BM25Index": "indexes.bm25",
    "DenseIndex": "indexes.dense",
    "HybridIndex": "indexes.hybrid",
    "load_index": "indexes.hybrid",
    "HTTPSearch": "network.client",
    "PageError": "network.fetching",
    "SearchError": "network.http_requests",
    "PageReader": "network.pages",
    "ReadPageTool": "network.pages",
    "CacheMiss": "network.response_cache",
    "create_app": "network.server",
    "serve": "network.server",
    "WebSearch": "network.web",
    "Passage": "passages",
    "SearchTool": "tool",
}

__all__ = ["Searchable", "open_search", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def open_search(
    source: Searchable | str | Path,
    *,
    model: "str | Path | SentenceTransformer | None" = None,
    device: str | None = None,
) -> Searchable:
    """
    Opens an index or connects to a search server.

    Args:
        source (`str`, `Path` or `Searchable`): A directory for [`load_index`], or an `http://` or `https://` address
            for [`HTTPSearch`]. What is open already is returned as it is.
        model, device:
            As for [`load_index`]; a server has its own.

    Raises:
        FileNotFoundError: There is no index in the directory.
        ValueError: The index cannot be read, or the address is of another kind.
        TypeError: The source is nothing that can be searched.
    """
    if not isinstance(source, (str, Path)):
        if isinstance(source, type) or not callable(getattr(source, "search_batch", None)):
            raise TypeError(
                f"got {source!r} ({type(source).__name__}), expected an index, the directory of one, or the address "
                "of a search server."
            )
        return source
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        from .network.client import HTTPSearch

        return HTTPSearch(source)
    if "://" in str(source):
        raise ValueError(f"got {source!r}, expected the directory of an index, or an http:// or https:// address.")
    if not Path(source).exists() and re.fullmatch(r"[\w.-]+:\d+(/.*)?", str(source)):
        raise ValueError(
            f"got {str(source)!r}: the address of a search server begins with http://, as http://{source}."
        )
    if Path(source).is_file():
        raise ValueError(
            f"{source} is a file, expected the directory of an index. Make one with: igpo index --corpus {source} "
            "--out index/"
        )
    from .indexes.hybrid import load_index

    return load_index(source, model=model, device=device)
