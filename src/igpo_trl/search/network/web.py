"""Web search through a service."""

import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx2

from ...files import encodable
from ..passages import Passage
from ..searchable import Retriever
from .http_requests import ProcessClient, RateLimit, SearchError, Secret, check_numbers, check_url, excerpt, post_json
from .response_cache import CacheMode, Missing, ResponseCache

SERPER = "https://google.serper.dev/search"
HINT = 'Expected a service that takes POST {"q": …, "num": k} as serper.dev does.'

Hits = list[dict[str, str]]
"""Search results, each with `link`, `title` and `snippet`."""


class WebSearch(Retriever):
    """
    Searches the web through serper.dev or a service with the same protocol.

    A passage is one result: its address as `id`, its title, and its snippet as text. The score is one over its rank.
    The key is read from the environment for each request and appears only in that request's header: not in files,
    logs, errors or pickles. With a cache, equal queries are paid for once, across all processes. If a batch fails,
    what has been fetched is in the cache.

    Args:
        cache (`str` or `Path`, *optional*): Directory for the responses of the service.
        mode (`str`, *optional*, defaults to `"live"`): `"live"` uses cached responses and fetches the rest, `"record"`
            fetches and stores everything, `"replay"` fetches nothing (and needs no key).
        missing (`str`, *optional*, defaults to `"error"`): What `"replay"` returns for a query that was not recorded
            with at least `k` results: a [`CacheMiss`], or no passages (`"empty"`).
        endpoint (`str`, *optional*): Address of the service.
        key_variable (`str`, *optional*, defaults to `"SERPER_API_KEY"`): Environment variable of the key.
        parameters (`Mapping`, *optional*): Additional fields of each request, such as `{"gl": "us", "hl": "en"}`. They
            are stored in the cache: pass no secrets here.
        requests_per_second (`float`, *optional*, defaults to `5.0`): Maximum rate of all threads of a process; `None`
            for no limit.
        max_concurrent (`int`, *optional*, defaults to `16`): Maximum number of concurrent requests of one
            `search_batch`.
        timeout, max_attempts:
            As for [`HTTPSearch`].
        trust_env (`bool`, *optional*, defaults to `True`): Whether to use the proxies of the environment.

    Raises:
        ValueError: An argument is out of range, or the mode needs a cache.
        FileNotFoundError: There is nothing to replay.
        SearchError: The mode is `"record"` and there is no key.

    Example:

    ```python
    >>> index = WebSearch("answers/")
    >>> index.search("Who wrote Dune?", k=3)
    [Passage(id='https://en.wikipedia.org/wiki/Dune_(novel)', title='Dune (novel)', text='…', score=1.0), …]
    ```
    """

    def __init__(
        self,
        cache: str | Path | None = None,
        *,
        mode: CacheMode = "live",
        missing: Missing = "error",
        endpoint: str = SERPER,
        key_variable: str = "SERPER_API_KEY",
        parameters: Mapping[str, Any] | None = None,
        requests_per_second: float | None = 5.0,
        max_concurrent: int = 16,
        timeout: float = 20.0,
        max_attempts: int = 5,
        trust_env: bool = True,
    ) -> None:
        check_numbers(requests_per_second=requests_per_second, max_concurrent=max_concurrent)
        check_numbers(timeout=timeout, max_attempts=max_attempts)
        self._endpoint = check_url(endpoint, "endpoint")
        if self._endpoint.userinfo:
            raise ValueError("the endpoint has a user or password, which logs would show. Use a key instead.")
        self._cache = ResponseCache(cache, mode, missing)
        self._key_variable = key_variable
        self._parameters = dict(parameters or {})
        self._max_concurrent = max_concurrent
        self._max_attempts = max_attempts
        self._client = ProcessClient(timeout=httpx2.Timeout(timeout, pool=None), trust_env=trust_env)
        self._rate = RateLimit(requests_per_second)
        if mode == "record":
            self._key()

    def __repr__(self) -> str:
        directory = str(self._cache.file.parent) if self._cache.file else None
        return f"WebSearch({directory!r}, mode={self._cache.mode!r}, endpoint={str(self._endpoint)!r})"

    def _search_batch(self, queries: list[str], k: int) -> list[list[Passage]]:
        texts = [" ".join(encodable(query).split()) for query in queries]
        hits: dict[str, Hits] = {"": []}
        for text in set(texts) - {""}:
            cached = self._cache.get(self._cache_key(text))
            if cached is not None and cached["num"] >= k:  # more results than needed serve as well
                hits[text] = cached["organic"]
        misses = [text for text in dict.fromkeys(texts) if text not in hits]
        if misses and self._cache.mode == "replay":
            more = f" and {len(misses) - 1} more" if len(misses) > 1 else ""
            self._cache.check_miss(f" with k={k}: {misses[0][:200]!r}{more}.")
            hits.update(dict.fromkeys(misses, []))
        elif misses:
            hits.update(self._fetch_all(misses, k))
        return [
            [Passage(hit["link"], hit["title"], hit["snippet"], 1.0 / (i + 1)) for i, hit in enumerate(hits[text][:k])]
            for text in texts
        ]

    def close(self) -> None:
        """Closes the connections of this process; a later search opens new ones."""
        self._client.close()

    def _cache_key(self, text: str) -> dict[str, Any]:
        return {"endpoint": str(self._endpoint), "q": text, **self._parameters}

    def _key(self) -> Secret:
        key = Secret(os.environ.get(self._key_variable, "").strip())
        if not key:
            raise SearchError(f"{self._endpoint} needs a key: set the environment variable {self._key_variable}.")
        return key

    def _fetch_all(self, texts: list[str], k: int) -> dict[str, Hits]:
        stop = threading.Event()

        def fetch(text: str) -> Hits:
            if stop.is_set():
                return []
            try:
                return self._fetch(text, k)
            except BaseException:
                stop.set()  # the rest would fail too; requests in progress are paid for and will be stored
                raise

        with ThreadPoolExecutor(min(self._max_concurrent, len(texts))) as pool:
            futures = [pool.submit(fetch, text) for text in texts]
            try:
                wait(futures)
            except BaseException:  # an interrupt
                stop.set()
                raise
        return {text: future.result() for text, future in zip(texts, futures, strict=True)}

    def _fetch(self, text: str, k: int) -> Hits:
        key = self._key()
        response = post_json(
            self._client.get(),
            self._endpoint,
            {"q": text, "num": k, **self._parameters},
            max_attempts=self._max_attempts,
            headers={"X-API-KEY": key},
            secret=key,
            before_attempt=self._rate.wait,
            hint=HINT,
        )
        hits = self._read(response)
        self._cache.put(self._cache_key(text), {"num": k, "organic": hits})
        return hits

    def _read(self, response: Any) -> Hits:
        """The results in a response; `organic` may be missing if nothing was found."""
        hits = response.get("organic", []) if isinstance(response, dict) else None
        if not isinstance(hits, list) or not ("organic" in response or "searchParameters" in response):
            raise SearchError(f"{self._endpoint} gave a response without `organic`: {excerpt(str(response))} {HINT}")
        return [
            {field: str(hit.get(field) or "") for field in ("link", "title", "snippet")}
            for hit in hits
            if isinstance(hit, dict) and hit.get("link")
        ]
