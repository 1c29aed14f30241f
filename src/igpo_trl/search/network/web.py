"""Search of the web through a service."""

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx2

from ..passages import Passage
from ..searchable import check_request
from .remote import ProcessClient, RateLimit, SearchError, Secret, check_numbers, check_url, clean, excerpt, post_json
from .responses import CacheMiss, CacheMode, Missing, open_answers

SERPER = "https://google.serper.dev/search"
HINT = 'Expected a service that takes POST {"q": …, "num": k} as serper.dev does.'


class WebSearch:
    """
    Searches the web, through serper.dev or a service with the same protocol.

    The key comes from the environment at each request, and goes nowhere but into that request's header: not into
    files, logs, errors, or pickles. With a cache, equal queries are paid for once, by however many processes.
    A passage is one result: its address as `id`, its title, and its snippet as text; the score is one over its rank.

    Args:
        cache (`str` or `Path`, *optional*):
            Directory for the answers of the service.
        mode (`str`, *optional*, defaults to `"live"`):
            `"live"` takes from the cache what is there and fetches the rest, `"record"` fetches everything and stores
            it, `"replay"` fetches nothing (and needs no key).
        missing (`str`, *optional*, defaults to `"error"`):
            What `"replay"` makes of a query that was not recorded: a [`CacheMiss`], or no passages (`"empty"`).
        endpoint (`str`, *optional*):
            Address of the service.
        key_variable (`str`, *optional*, defaults to `"SERPER_API_KEY"`):
            Environment variable that holds the key.
        parameters (`Mapping`, *optional*):
            Further fields of each request, such as `{"gl": "us", "hl": "en"}`. They are part of the cache: nothing
            secret goes in here.
        requests_per_second (`float`, *optional*, defaults to `5.0`):
            Most requests per second of all threads of a process; `None` for no limit.
        max_concurrent (`int`, *optional*, defaults to `16`):
            Most requests of one `search_batch` under way at a time.
        timeout (`float`, *optional*, defaults to `20.0`):
            Seconds that the service may take to accept a connection or to answer.
        max_attempts (`int`, *optional*, defaults to `5`):
            Attempts in all, when the service cannot be reached or answers with status 429 or 5xx.
        trust_env (`bool`, *optional*, defaults to `True`):
            Whether to use the proxies that the environment names.

    Raises:
        ValueError: An argument is out of range, or the mode needs a cache.
        FileNotFoundError: There is nothing to replay.
        SearchError: Everything is to be fetched, and there is no key.

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
            raise ValueError("the endpoint holds a user or password, which logs would show. Use a key instead.")
        self._answers = open_answers(cache, mode, missing)
        self._mode = mode
        self._missing = missing
        self._key_variable = key_variable
        self._parameters = dict(parameters or {})
        self._requests_per_second = requests_per_second
        self._max_concurrent = max_concurrent
        self._timeout = timeout
        self._max_attempts = max_attempts
        self._trust_env = trust_env
        self._connect()
        if mode == "record":
            self._key()

    def __repr__(self) -> str:
        cache = str(self._answers.file.parent) if self._answers else None
        return f"WebSearch({cache!r}, mode={self._mode!r}, endpoint={str(self._endpoint)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_clients", "_rate")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    def search(self, query: str, k: int = 3) -> list[Passage]:
        """The up to `k` first results for a query."""
        return self.search_batch([query], k)[0]

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Passage]]:
        """
        The results of `search` for each of several queries, in order; equal queries are looked up once.

        Raises:
            ValueError: `k` is not positive.
            TypeError: `queries` is a single string.
            SearchError: The service cannot be reached or refuses, or there is no key. What has been fetched is in the
                cache.
            CacheMiss: A query is replayed that was not recorded with at least `k` results asked for.
        """
        check_request(queries, k)
        texts = [" ".join(clean(query).split()) for query in queries]
        found: dict[str, list[dict[str, str]]] = {"": []}
        if self._answers is not None and self._mode != "record":
            for text in dict.fromkeys(texts):
                stored = self._answers.get(self._name(text)) if text else None
                # What was asked for with more results serves for fewer.
                if stored is not None and stored["num"] >= k:
                    found[text] = stored["organic"]
        wanted = [text for text in dict.fromkeys(texts) if text not in found]
        if wanted and self._mode == "replay":
            if self._missing == "error":
                assert self._answers is not None
                more = f" and {len(wanted) - 1} more" if len(wanted) > 1 else ""
                raise CacheMiss(f"not recorded in {self._answers.file} with k={k}: {wanted[0][:200]!r}{more}.")
            found.update(dict.fromkeys(wanted, []))
        elif wanted:
            found.update(self._fetch_all(wanted, k))
        return [
            [Passage(hit["link"], hit["title"], hit["snippet"], 1.0 / rank) for rank, hit in enumerate(hits, start=1)]
            for hits in (found[text][:k] for text in texts)
        ]

    def close(self) -> None:
        """Close the connections of this process; a later search opens new ones."""
        self._clients.close()

    def _connect(self) -> None:
        self._clients = ProcessClient(self._make_client)
        self._rate = RateLimit(self._requests_per_second)

    def _make_client(self) -> httpx2.Client:
        return httpx2.Client(timeout=httpx2.Timeout(self._timeout, pool=None), trust_env=self._trust_env)

    def _name(self, text: str) -> dict[str, Any]:
        return {"endpoint": str(self._endpoint), "q": text, **self._parameters}

    def _key(self) -> Secret:
        key = Secret(os.environ.get(self._key_variable, "").strip())
        if not key:
            raise SearchError(f"{self._endpoint} needs a key: set the environment variable {self._key_variable}.")
        return key

    def _fetch_all(self, texts: list[str], k: int) -> dict[str, list[dict[str, str]]]:
        if len(texts) == 1:
            return {texts[0]: self._fetch(texts[0], k)}
        stop = threading.Event()

        def work(text: str) -> list[dict[str, str]]:
            if stop.is_set():
                return []
            try:
                return self._fetch(text, k)
            except BaseException:
                stop.set()  # the rest would fail as well; those under way are paid for, and stored
                raise

        with ThreadPoolExecutor(min(self._max_concurrent, len(texts))) as pool:
            futures = [pool.submit(work, text) for text in texts]
            try:
                wait(futures)
            except BaseException:  # an interrupt
                stop.set()
                raise
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        if errors:
            raise errors[0]
        return {text: future.result() for text, future in zip(texts, futures, strict=True)}

    def _fetch(self, text: str, k: int) -> list[dict[str, str]]:
        key = self._key()
        answer = post_json(
            self._clients.get(),
            self._endpoint,
            {"q": text, "num": k, **self._parameters},
            max_attempts=self._max_attempts,
            headers={"X-API-KEY": key},
            secret=key,
            turn=self._rate.wait,
            hint=HINT,
        )
        hits = self._read(answer)
        if self._answers is not None:
            self._answers.put(self._name(text), {"num": k, "organic": hits})
        return hits

    def _read(self, answer: Any) -> list[dict[str, str]]:
        """The results in an answer; a search that finds nothing may leave them out."""
        hits = answer.get("organic", []) if isinstance(answer, dict) else None
        if not isinstance(hits, list) or not ("organic" in answer or "searchParameters" in answer):
            raise SearchError(f"{self._endpoint} gave an answer without `organic`: {excerpt(str(answer))} {HINT}")
        return [
            {field: str(hit.get(field) or "") for field in ("link", "title", "snippet")}
            for hit in hits
            if isinstance(hit, dict) and hit.get("link")
        ]
