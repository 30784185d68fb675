"""Short queue delays on the loop that serves: waiting is waiting, not asking again and again."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

import pytest
import uvloop

from server.batching.batcher import Batcher, TimerHandle, Work
from server.batching.timers import fine_timers
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


@pytest.mark.skipif(sys.platform != "linux", reason="timers of Linux")
@pytest.mark.parametrize("delay_us", [200, 400, 1_300])
def test_a_queue_delay_is_kept_to_a_part_of_a_millisecond(delay_us: int) -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        timers = fine_timers(loop)
        assert timers is not None
        batcher = Batcher(
            DoublingEngine(),
            BatchingOptions(max_queue_delay_us=delay_us),
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=loop.call_later,
            call_later_ns=timers.call_later,
        )
        in_time = 0
        for _ in range(2_000):  # what else the machine does makes some late
            answered: asyncio.Future[Work] = loop.create_future()
            batcher.submit(work_of(1.0, answered.set_result))
            work = await answered
            assert work.error is None
            waited_us = (work.started_ns - work.enqueued_ns) // 1_000
            assert waited_us >= delay_us
            in_time += waited_us < delay_us + 400
            if in_time == 10:
                break
        else:
            raise AssertionError("rounded up to the next millisecond")
        batcher.close()
        timers.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(body(), 30))


def test_long_waits_are_left_to_the_loop() -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        fine: list[int] = []

        def call_later_ns(delay_ns: int, callback: Callable[[], None]) -> TimerHandle:
            fine.append(delay_ns)
            return loop.call_later(delay_ns / 1e9, callback)

        batcher = Batcher(
            DoublingEngine(),
            BatchingOptions(max_queue_delay_us=20_000),
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=loop.call_later,
            call_later_ns=call_later_ns,
        )
        answered: asyncio.Future[Work] = loop.create_future()
        batcher.submit(work_of(1.0, answered.set_result))
        assert (await answered).error is None
        assert all(delay_ns < 1_000_000 for delay_ns in fine), "only what a turn of the loop came too early by"
        batcher.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(body(), 30))
