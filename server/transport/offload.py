"""Threads for work that would hold up the loop, few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


class Offload:
    """At most ``threads`` pieces of work at once; more wait for their turn, first come, first served."""

    def __init__(self, threads: int) -> None:
        self._places = asyncio.Semaphore(threads)

    async def run(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns or raises. Cancelled before its turn it is never begun; later it ends for nobody.

        A thread cannot be stopped: it has its place until it ends, so that callers who leave make no more of them.
        """
        await self._places.acquire()
        working = asyncio.ensure_future(asyncio.to_thread(work))
        working.add_done_callback(self._ended)
        try:
            # Not shielded: a shield tells the loop of an exception that nobody waits for any more.
            await asyncio.wait([working])
            return working.result()
        finally:
            del working  # an exception would be held by its own traceback, and with it all that its callers hold

    def _ended(self, working: asyncio.Task[Any]) -> None:
        self._places.release()
        if not working.cancelled():
            working.exception()  # has been told, or nobody is there to be told
