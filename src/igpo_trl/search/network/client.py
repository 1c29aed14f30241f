"""Client of a search server."""

import hashlib
from collections.abc import Sequence
from typing import Any

import httpx2

from ..passages import Passage
from ..searchable import check_request
from .remote import ProcessClient, SearchError, check_numbers, check_url, clean, excerpt, post_json, split_userinfo

PATH = "/retrieve"
HINT = 'Expected a search server (`igpo serve`, or another that takes POST {"queries": […], "topk": k}).'


class HTTPSearch:
    """
    Searches on a server: `igpo serve`, or any other with the `/retrieve` protocol that Search-R1 introduced.

    Several threads may use it at once. Connections are kept open and reused; a process that is forked, or gets the
    object pickled, opens its own. Every request that fails for a reason that may pass is tried again.

    Args:
        url (`str`):
            Address of the server, such as `http://127.0.0.1:8000`. A path may be given; `/retrieve` if not.
        timeout (`float`, *optional*, defaults to `30.0`):
            Seconds that the server may take to accept a connection or to answer.
        max_attempts (`int`, *optional*, defaults to `5`):
            Attempts in all, when the server cannot be reached or answers with status 429 or 5xx. The pauses between
            them grow, unless the server says how long to wait.
        max_batch (`int`, *optional*, defaults to `256`):
            Most queries in one request; more are sent one request after the other.
        max_connections (`int`, *optional*, defaults to `64`):
            Most requests under way at a time.
        trust_env (`bool`, *optional*, defaults to `False`):
            Whether to use the proxies that the environment names. They seldom know the way to a search server.

    Raises:
        ValueError: An argument is out of range, or the URL is none.

    Example:

    ```python
    >>> index = HTTPSearch("http://127.0.0.1:8000")
    >>> index.search("Who wrote Dune?", k=3)
    [Passage(id='17', title='Dune (novel)', text='Dune is a 1965 epic …', score=9.1), …]
    ```
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        max_attempts: int = 5,
        max_batch: int = 256,
        max_connections: int = 64,
        trust_env: bool = False,
    ) -> None:
        check_numbers(timeout=timeout, max_attempts=max_attempts, max_batch=max_batch, max_connections=max_connections)
        parsed, self._auth = split_userinfo(check_url(url))
        self._url = parsed.copy_with(path=PATH) if parsed.path in ("", "/") else parsed
        self._timeout = timeout
        self._max_attempts = max_attempts
        self._max_batch = max_batch
        self._max_connections = max_connections
        self._trust_env = trust_env
        self._clients = ProcessClient(self._make_client)

    def __repr__(self) -> str:
        return f"HTTPSearch({str(self._url)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_clients"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clients = ProcessClient(self._make_client)

    def search(self, query: str, k: int = 3) -> list[Passage]:
        """The up to `k` best passages for a query, best first."""
        return self.search_batch([query], k)[0]

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Passage]]:
        """
        The results of `search` for each of several queries, in order.

        Where the server gives no scores, the score of a passage is one over its rank.

        Raises:
            ValueError: `k` is not positive.
            TypeError: `queries` is a single string.
            SearchError: The server cannot be reached or refuses, or its answer does not fit the protocol.
        """
        check_request(queries, k)
        found: list[list[Passage]] = []
        for start in range(0, len(queries), self._max_batch):
            found += self._request([clean(query) for query in queries[start : start + self._max_batch]], k)
        return found

    def close(self) -> None:
        """Close the connections of this process; a later search opens new ones."""
        self._clients.close()

    def _make_client(self) -> httpx2.Client:
        limits = httpx2.Limits(max_connections=self._max_connections, max_keepalive_connections=self._max_connections)
        # A request that waits for a free connection of our own does not wait for the server.
        timeout = httpx2.Timeout(self._timeout, pool=None)
        return httpx2.Client(auth=self._auth, limits=limits, timeout=timeout, trust_env=self._trust_env)

    def _request(self, queries: list[str], k: int) -> list[list[Passage]]:
        body = {"queries": queries, "topk": k, "return_scores": True}
        answer = post_json(self._clients.get(), self._url, body, max_attempts=self._max_attempts, hint=HINT)
        try:
            results = answer["result"]
            if not isinstance(results, list) or len(results) != len(queries):
                count = len(results) if isinstance(results, list) else type(results).__name__
                raise ValueError(f"`result` has {count} lists of documents, expected {len(queries)}")
            return [[_passage(item, rank) for rank, item in enumerate(found[:k], start=1)] for found in results]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"no {error}" if isinstance(error, KeyError) else str(error)
            text = f"POST {self._url} gave an answer of another form ({problem}): {excerpt(str(answer))} {HINT}"
            raise SearchError(text) from None


def _passage(item: Any, rank: int) -> Passage:
    """A passage from `{"document": …, "score": …}`, from a document alone, or from its text."""
    score = 1.0 / rank
    document = item
    if isinstance(item, dict) and "document" in item:
        document = item["document"]
        score = float(item["score"]) if item.get("score") is not None else score
    if isinstance(document, str):
        document = {"contents": document}
    contents = document.get("contents", document.get("content"))
    title, text = document.get("title"), document.get("text")
    if text is None:
        # The first line of `contents` is the title, usually in quotes.
        first, newline, rest = (contents if isinstance(contents, str) else "").partition("\n")
        title, text = (_unquote(first) if title is None else title, rest) if newline else (title or "", first)
    if not isinstance(text, str) or not (isinstance(contents, str) or "text" in document):
        raise ValueError("a document has neither `contents` nor `text`")
    title = title if isinstance(title, str) else ""
    key = document.get("id")
    if key is None:
        key = hashlib.blake2b(f"{title}\n{text}".encode(errors="replace"), digest_size=8).hexdigest()
    return Passage(str(key), title, text, score)


def _unquote(title: str) -> str:
    title = title.strip()
    return title[1:-1] if len(title) >= 2 and title[0] == title[-1] == '"' else title
