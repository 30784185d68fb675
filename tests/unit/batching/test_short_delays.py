"""Short queue delays on the loop that serves: waiting is waiting, not asking again and again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
import uvloop

from server.batching.batcher import Batcher, TimerHandle, Work
from server.runtime.base import BatchingOptions
from tests.unit.batching.engines import DoublingEngine, work_of


@pytest.mark.parametrize("delay_us", [200, 1_400, 2_300])
def test_a_queue_delay_takes_few_timers(delay_us: int) -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        timers: list[float] = []

        def call_later(seconds: float, callback: Callable[[], None]) -> TimerHandle:
            timers.append(seconds)
            return loop.call_later(seconds, callback)

        batcher = Batcher(
            DoublingEngine(),
            BatchingOptions(max_queue_delay_us=delay_us),
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=call_later,
        )
        for _ in range(20):
            answered: asyncio.Future[Work] = loop.create_future()
            batcher.submit(work_of(1.0, answered.set_result))
            assert (await answered).error is None
        assert len(timers) <= 4 * 20
        batcher.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(body(), 30))
