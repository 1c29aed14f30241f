"""Client of a search server."""

import hashlib
from typing import Any

import httpx2

from ...files import encodable
from ..passages import Passage, unquote
from ..searchable import Retriever
from .http_requests import ProcessClient, SearchError, check_numbers, check_url, excerpt, post_json

PATH = "/retrieve"
HINT = 'Expected a search server (`igpo serve`, or another that takes POST {"queries": […], "topk": k}).'


class HTTPSearch(Retriever):
    """
    Searches on a server: `igpo serve`, or any other with the `/retrieve` protocol of Search-R1.

    Several threads may use it at once. Connections are reused; a forked process, or one that gets the object pickled,
    opens its own. Requests that fail for a temporary reason are sent again. Where the server gives no scores, the
    score of a passage is one over its rank.

    Args:
        url (`str`): Address of the server, such as `http://127.0.0.1:8000`. Without a path, `/retrieve` is added.
        timeout (`float`, *optional*, defaults to `30.0`): Seconds that the server may take to accept a connection or
            to respond.
        max_attempts (`int`, *optional*, defaults to `5`): Maximum number of attempts if the server cannot be reached
            or responds with status 429 or 5xx. The pauses between them grow, unless the server says how long to wait.
        max_batch (`int`, *optional*, defaults to `256`): Maximum number of queries per request; longer batches are
            split into several requests.
        max_connections (`int`, *optional*, defaults to `64`): Maximum number of concurrent requests.
        trust_env (`bool`, *optional*, defaults to `False`): Whether to use the proxies of the environment, which
            seldom reach a search server.

    Raises:
        ValueError: An argument is out of range, or `url` is not a URL.

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
        parsed = check_url(url)
        auth = (parsed.username, parsed.password) if parsed.userinfo else None
        parsed = parsed.copy_with(userinfo=b"")  # logs and errors show the address
        self._url = parsed.copy_with(path=PATH) if parsed.path in ("", "/") else parsed
        self._max_attempts = max_attempts
        self._max_batch = max_batch
        self._client = ProcessClient(
            auth=auth,
            limits=httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            timeout=httpx2.Timeout(timeout, pool=None),  # waiting for a free connection is not limited
            trust_env=trust_env,
        )

    def __repr__(self) -> str:
        return f"HTTPSearch({str(self._url)!r})"

    def _search_batch(self, queries: list[str], k: int) -> list[list[Passage]]:
        results: list[list[Passage]] = []
        for start in range(0, len(queries), self._max_batch):
            results += self._request([encodable(query) for query in queries[start : start + self._max_batch]], k)
        return results

    def close(self) -> None:
        """Closes the connections of this process; a later search opens new ones."""
        self._client.close()

    def _request(self, queries: list[str], k: int) -> list[list[Passage]]:
        body = {"queries": queries, "topk": k, "return_scores": True}
        response = post_json(self._client.get(), self._url, body, max_attempts=self._max_attempts, hint=HINT)
        try:
            results = response["result"]
            if not isinstance(results, list) or len(results) != len(queries):
                count = len(results) if isinstance(results, list) else type(results).__name__
                raise ValueError(f"`result` has {count} lists of documents, expected {len(queries)}")
            return [[_passage(item, rank) for rank, item in enumerate(items[:k], start=1)] for items in results]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"no {error}" if isinstance(error, KeyError) else str(error)
            text = f"POST {self._url} gave a response of another form ({problem}): {excerpt(str(response))} {HINT}"
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
        title, text = (unquote(first) if title is None else title, rest) if newline else (title or "", first)
    if not isinstance(text, str) or not (isinstance(contents, str) or "text" in document):
        raise ValueError("a document has neither `contents` nor `text`")
    title = title if isinstance(title, str) else ""
    key = document.get("id")
    if key is None:
        key = hashlib.blake2b(f"{title}\n{text}".encode(errors="replace"), digest_size=8).hexdigest()
    return Passage(str(key), title, text, score)
