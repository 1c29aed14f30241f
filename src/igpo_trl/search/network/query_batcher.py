"""Looks up the queries of concurrent requests in batches."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import anyio.to_thread

from ..passages import Passage
from ..searchable import Searchable

logger = logging.getLogger(__name__)


class _Query(NamedTuple):
    text: str
    k: int
    result: "asyncio.Future[list[Passage]]"


class Overloaded(Exception):
    """Too many queries are waiting."""


class QueryBatcher:
    """
    Collects the queries of concurrent requests and looks them up together.

    The first query waits up to `max_wait` seconds for others; while the index is being searched, the next batch
    accumulates. Must be used on the event loop that runs `run`. The index is searched in a thread, one batch at a
    time.
    """

    def __init__(self, index: Searchable, max_batch: int, max_wait: float, max_waiting: int) -> None:
        self._index = index
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._max_waiting = max_waiting
        self._waiting: deque[_Query] = deque()
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()

    async def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """
        The results of `index.search_batch(queries, k)`, whose errors do not affect other requests. Raises
        [`Overloaded`] if too many queries are waiting.
        """
        if not queries:
            return []
        if self._waiting and len(self._waiting) + len(queries) > self._max_waiting:
            raise Overloaded
        loop = asyncio.get_running_loop()
        own = [_Query(text, k, loop.create_future()) for text in queries]
        self._waiting.extend(own)
        self._arrived.set()
        if len(self._waiting) >= self._max_batch:
            self._full.set()
        # Wait for all, so that asyncio does not complain about exceptions that were never retrieved.
        results = await asyncio.gather(*(query.result for query in own), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results  # type: ignore[return-value]

    async def run(self) -> None:
        """Answers queries until cancelled."""
        while True:
            await self._arrived.wait()
            if len(self._waiting) < self._max_batch:
                self._full.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._full.wait(), self._max_wait)
            batch = self._take()
            for query, result in zip(batch, await self._look_up(batch), strict=True):
                if query.result.done():  # cancelled: the client has disconnected
                    continue
                if isinstance(result, BaseException):
                    query.result.set_exception(result)
                else:
                    query.result.set_result(result)
            if not self._waiting:
                self._arrived.clear()

    def _take(self) -> list[_Query]:
        """Removes and returns the next batch: queries with the same `k`, in order."""
        # The first k of a longer list would not do: an approximate or hybrid index may rank those differently.
        k = self._waiting[0].k
        batch: list[_Query] = []
        others: list[_Query] = []
        while self._waiting and len(batch) < self._max_batch:
            query = self._waiting.popleft()
            (batch if query.k == k else others).append(query)
        self._waiting.extendleft(reversed(others))
        return batch

    async def _look_up(self, batch: list[_Query]) -> list[list[Passage] | Exception]:
        texts, k = [query.text for query in batch], batch[0].k
        try:
            results = await anyio.to_thread.run_sync(self._index.search_batch, texts, k)
            if len(results) != len(batch):
                raise RuntimeError(f"the index returned {len(results)} results for {len(batch)} queries.")
            return list(results)
        except Exception as error:
            if len(batch) == 1:
                logger.exception("The index failed on the query %r", texts[0])
                return [error]
        # One by one: a bad query must not fail the others.
        return [result for query in batch for result in await self._look_up([query])]
