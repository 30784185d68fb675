"""When batches run on the loop: what the move from the threads may go by, and what it may not."""

from __future__ import annotations

import asyncio
import threading
import time

from server.batching.batcher import Batcher, Work
from server.runtime.base import Batch, BatchingOptions
from tests.unit.batching.engines import REJECTED, DoublingEngine, work_of


def test_runs_that_fail_do_not_bring_a_long_model_onto_the_loop() -> None:
    """A graph that refuses an input does so at once: that says nothing of how long a good run takes."""

    async def body() -> None:
        loop = asyncio.get_running_loop()
        threads: list[int] = []

        def note(_: Batch) -> None:
            threads.append(threading.get_ident())

        batcher = Batcher(
            DoublingEngine(run_ns=200_000_000, hook=note),
            BatchingOptions(),
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=loop.call_later,
        )
        for _ in range(150):
            answered: asyncio.Future[Work] = loop.create_future()
            batcher.submit(work_of(REJECTED, answered.set_result))
            assert (await answered).error is not None
        assert not batcher.inline()
        assert threading.get_ident() not in threads
        await asyncio.to_thread(batcher.close)

    asyncio.run(asyncio.wait_for(body(), 30))


def test_runs_that_fail_late_leave_the_loop() -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        clock_ns = 1

        def late(_: Batch) -> None:
            nonlocal clock_ns
            clock_ns += 100_000_000

        batcher = Batcher(
            DoublingEngine(run_ns=1000, hook=late),
            BatchingOptions(),
            clock=lambda: clock_ns,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=loop.call_later,
        )
        assert batcher.inline()
        for _ in range(4):
            answered: asyncio.Future[Work] = loop.create_future()
            batcher.submit(work_of(REJECTED, answered.set_result))
            assert (await answered).error is not None
        assert not batcher.inline()
        await asyncio.to_thread(batcher.close)

    asyncio.run(asyncio.wait_for(body(), 30))
