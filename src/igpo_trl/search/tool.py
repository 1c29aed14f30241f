"""The search tool that a policy calls."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from ..tools import tool
from . import open_search
from .passages import Passage, first_words
from .searchable import Searchable

DESCRIPTION = "Search a collection of documents and read the passages that fit best."

MAX_QUERIES = 8
"""Maximum number of queries per call; each one adds `k` passages to the context."""


def SearchTool(
    index: Searchable | str | Path,
    k: int = 3,
    max_words: int | None = 200,
    *,
    many_queries: bool = False,
    description: str = DESCRIPTION,
) -> Callable[..., str]:
    """
    Makes a search function for `tools=[…]` of a TRL trainer.

    The function is called `search` and takes one `query`. (Chat templates accept plain functions, not callable
    objects.) It never raises for a bad query: it returns a text that tells the policy what is wrong. Through the
    function's `tool_options`, a trainer can look up all queries of a round in one call of the index and equal queries
    once.

    Args:
        index (`Searchable`, `str` or `Path`): What to search: an index, or what [`open_search`] opens.
        k (`int`, *optional*, defaults to `3`): Number of passages per query.
        max_words (`int`, *optional*, defaults to `200`): Longest passage shown, in words; the rest is cut off. `None`
            for no limit.
        many_queries (`bool`, *optional*, defaults to `False`): Whether a call may contain up to eight queries. The
            policy is told that `query` is a list of strings; a single string works too.
        description (`str`, *optional*): Tool description for the policy.

    Returns:
        `Callable[..., str]`: The tool.

    Raises:
        ValueError: `k` or `max_words` is not positive.
        FileNotFoundError, TypeError, ValueError: See [`open_search`].

    Example:

    ```python
    >>> tool = SearchTool(BM25Index.load("index/"), k=2)
    >>> print(tool(query="Who wrote Dune?"))
    [1] Dune (novel)
    Dune is a 1965 epic science fiction novel …
    ```
    """
    if k < 1:
        raise ValueError(f"got k={k}, expected at least 1.")
    if max_words is not None and max_words < 1:
        raise ValueError(f"got max_words={max_words}, expected at least 1, or None for no limit.")
    searchable = open_search(index)

    def search_all(query: Sequence[str]) -> list[str]:
        answers = [_problem(one) for one in query]
        valid = [i for i, problem in enumerate(answers) if not problem]
        results = searchable.search_batch([query[i] for i in valid], k) if valid else []
        for i, passages in zip(valid, results, strict=True):
            shown = [f"[{rank}] {_render(passage, max_words)}" for rank, passage in enumerate(passages, start=1)]
            answers[i] = "\n\n".join(shown) or "No passage matches this query. Try other words."
        return answers

    def search_lists(query: Sequence[Any]) -> list[str]:
        lists = [_as_list(one) for one in query]
        short = [queries for queries in lists if len(queries) <= MAX_QUERIES]
        flat = list(dict.fromkeys(one for queries in short for one in queries if isinstance(one, str)))
        answers = dict(zip(flat, search_all(flat), strict=True))

        def answer(one: Any) -> str:
            return answers[one] if isinstance(one, str) and one in answers else _problem(one)

        return [_render_list(queries, list(map(answer, queries))) for queries in lists]

    # Ten words for a passage's title.
    longest = None if max_words is None else k * (max_words + 10)

    @tool(pure=True, batch=search_all, max_words=longest)
    def search(query: str) -> str:
        return search_all([query])[0]

    @tool(pure=True, batch=search_lists, max_words=longest)
    def search_many(query: Annotated[list[str], BeforeValidator(_as_list)]) -> str:
        return search_lists([query])[0]

    # The policy sees this docstring through the chat template, and the qualified name in errors about arguments.
    chosen, what = (search_many, "one or several things to look for") if many_queries else (search, "what to look for")
    chosen.__name__ = chosen.__qualname__ = "search"
    chosen.__doc__ = f"{description}\n\nArgs:\n    query: {what.capitalize()}, in a few words."
    return chosen


def _as_list(query: Any) -> Any:
    return list(query) if isinstance(query, (list, tuple)) else [query]


def _render_list(queries: Sequence[Any], answers: Sequence[str]) -> str:
    """The answers to the queries of one call."""
    if not queries:
        return "Error: there is no query. Say what to look for."
    if len(queries) > MAX_QUERIES:
        return f"Error: got {len(queries)} queries, at most {MAX_QUERIES} are answered at once. Ask for less."
    if len(queries) == 1:
        return answers[0]
    return "\n\n".join(f"Results for {query!r}:\n{answer}" for query, answer in zip(queries, answers, strict=True))


def _problem(query: object) -> str:
    if not isinstance(query, str):  # policies send anything
        return f"Error: the query must be a string, got {type(query).__name__}."
    return "" if query.strip() else "Error: the query is empty. Say what to look for."


def _render(passage: Passage, max_words: int | None) -> str:
    text = first_words(passage.text, max_words)
    return f"{passage.title}\n{text}" if passage.title else text
