"""When batches run on the loop: what the move from the threads may go by, and what it may not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

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


class Sized:
    """A model whose runs take as long as their rows say, by a clock of its own, and where each of them ran."""

    def __init__(self, takes_ns: Callable[[int], int], run_ns: int) -> None:
        self._takes_ns = takes_ns
        self._now = 1
        self._on_loop: list[bool] = []
        loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self.batcher = Batcher(
            DoublingEngine(run_ns=run_ns, hook=self._run),
            BatchingOptions(),
            clock=lambda: self._now,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=loop.call_later,
        )

    def _run(self, batch: Batch) -> None:
        self._now += self._takes_ns(batch.rows)
        self._on_loop.append(threading.get_ident() == self._loop_thread)

    async def ran_on_loop(self, rows: int, value: float = 1.0) -> bool:
        """Run one request of so many rows by itself."""
        answered: asyncio.Future[Work] = asyncio.get_running_loop().create_future()
        self.batcher.submit(work_of(value, answered.set_result, rows))
        await answered
        return self._on_loop[-1]


def run_sized(takes_ns: Callable[[int], int], run_ns: int, body: Callable[[Sized], Awaitable[None]]) -> None:
    async def whole() -> None:
        model = Sized(takes_ns, run_ns)
        await body(model)
        assert model.batcher.inline()
        await asyncio.to_thread(model.batcher.close)

    asyncio.run(asyncio.wait_for(whole(), 30))


@pytest.mark.parametrize("first", [1, 8])
def test_a_large_batch_of_a_model_that_is_short_for_few_rows_does_not_hold_the_loop(first: int) -> None:
    async def body(model: Sized) -> None:
        for _ in range(3):
            assert await model.ran_on_loop(first)
            assert not await model.ran_on_loop(64)  # nor does it take the short ones along to the threads

    run_sized(lambda rows: 20_000 if rows <= 8 else 80_000_000, 20_000, body)


def test_a_large_batch_that_proved_short_runs_on_the_loop() -> None:
    async def body(model: Sized) -> None:
        assert not await model.ran_on_loop(64)
        assert await model.ran_on_loop(64)
        assert await model.ran_on_loop(2)

    run_sized(lambda _: 100_000, 100_000, body)


def test_a_batch_that_was_tried_on_the_loop_and_found_long_is_not_tried_again() -> None:
    async def body(model: Sized) -> None:
        assert await model.ran_on_loop(8)  # two rows more than would be short if each took what one takes
        assert not await model.ran_on_loop(8)
        assert not await model.ran_on_loop(9)
        assert await model.ran_on_loop(2)
        assert not await model.ran_on_loop(8), "what two rows show is no news of eight"
        assert await model.ran_on_loop(7)

    run_sized(lambda rows: 2_000_000 if rows >= 8 else 200_000, 35_000, body)


def test_a_size_that_a_pause_made_long_comes_back() -> None:
    async def body(model: Sized) -> None:
        assert await model.ran_on_loop(8)
        assert not await model.ran_on_loop(8)
        assert await model.ran_on_loop(8)

    pauses = [3_000_000]
    run_sized(lambda _: pauses.pop() if pauses else 30_000, 30_000, body)


def test_a_large_batch_that_fails_at_once_is_not_taken_for_short() -> None:
    async def body(model: Sized) -> None:
        assert not await model.ran_on_loop(64, REJECTED)
        assert not await model.ran_on_loop(64)

    run_sized(lambda rows: 100_000 if rows < 64 else 290_000, 100_000, body)


def test_batches_beside_a_large_one_wait_for_the_instance() -> None:
    """The engine asserts that its one instance runs one batch at a time, wherever that is."""

    async def body(model: Sized) -> None:
        loop = asyncio.get_running_loop()
        for sizes in ([64, 1, 64, 8, 64, 64, 2], [64] * 6 + [1] * 6):
            answered: list[asyncio.Future[Work]] = [loop.create_future() for _ in sizes]
            for rows, future in zip(sizes, answered, strict=True):
                model.batcher.submit(work_of(1.0, future.set_result, rows))
            for work in await asyncio.gather(*answered):
                assert work.error is None

    run_sized(lambda rows: 20_000 * rows, 20_000, body)


def test_two_batches_that_are_handed_out_at_once_find_a_thread() -> None:
    """So they are after a run that turned out long, with which no thread has been started yet."""

    async def body(model: Sized) -> None:
        assert await model.ran_on_loop(8)
        loop = asyncio.get_running_loop()
        answered: list[asyncio.Future[Work]] = [loop.create_future() for _ in range(4)]
        for future in answered:
            model.batcher.submit(work_of(1.0, future.set_result, 8))
        for work in await asyncio.gather(*answered):
            assert work.error is None

    run_sized(lambda rows: 2_000_000 if rows >= 8 else 200_000, 35_000, body)
