"""Search for tools: passages, indexes over them, and the tool that a policy calls."""

from .bm25 import BM25Index
from .passages import Passage
from .tool import SearchTool

__all__ = ["BM25Index", "Passage", "SearchTool"]
