"""Collects the queries of concurrent requests, and looks them up together."""

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
    found: "asyncio.Future[list[Passage]]"


class Overloaded(Exception):
    """More queries wait than the server accepts."""


class Batcher:
    """
    Collects the queries of concurrent requests and looks them up together.

    A first query waits `max_wait` seconds for others; while the index is searched, the next batch collects itself.
    Lives on the event loop on which `run` runs; the index is searched in a thread, one batch at a time.

    Args:
        index (`Searchable`): What to search.
        max_batch (`int`): Most queries in one call of the index.
        max_wait (`float`): Seconds.
        max_waiting (`int`): Most queries that may wait.
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
        The results of `index.search_batch(queries, k)`.

        Raises:
            Overloaded: Too many queries are waiting.
            Exception: Whatever the index raises for one of these queries; other requests are not affected.
        """
        if not queries:
            return []
        if self._waiting and len(self._waiting) + len(queries) > self._max_waiting:
            raise Overloaded
        loop = asyncio.get_running_loop()
        mine = [_Query(text, k, loop.create_future()) for text in queries]
        self._waiting.extend(mine)
        self._arrived.set()
        if len(self._waiting) >= self._max_batch:
            self._full.set()
        found = await asyncio.gather(*(query.found for query in mine), return_exceptions=True)
        for result in found:
            if isinstance(result, BaseException):
                raise result
        return found  # type: ignore[return-value]

    async def run(self) -> None:
        """Answer queries until cancelled."""
        while True:
            await self._arrived.wait()
            if len(self._waiting) < self._max_batch:
                self._full.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._full.wait(), self._max_wait)
            batch = self._take()
            for query, result in zip(batch, await self._look_up(batch), strict=True):
                if query.found.done():  # nobody waits for it any more
                    continue
                if isinstance(result, BaseException):
                    query.found.set_exception(result)
                else:
                    query.found.set_result(result)
            if not self._waiting:
                self._arrived.clear()

    def _take(self) -> list[_Query]:
        """The next batch: queries that ask for the same number of passages, in order."""
        # Not the first k of a longer list: an approximate or hybrid index may rank those differently.
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
            found = await anyio.to_thread.run_sync(self._index.search_batch, texts, k)
            if len(found) != len(batch):
                raise RuntimeError(f"the index gave {len(found)} results for {len(batch)} queries.")
            return list(found)
        except Exception as error:
            if len(batch) == 1:
                logger.exception("The index failed on the query %r", texts[0])
                return [error]
        # One bad query must not fail those of others.
        return [result for query in batch for result in await self._look_up([query])]
