"""server.demo.loop.replay: calls that nobody answers. Against a live server it is run by the loop itself."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from server.demo.data import Flights
from server.demo.loop.claims import LoopFailed, until
from server.demo.loop.replay import Replay

NOBODY = "127.0.0.1:1"
SOME = Flights(np.zeros((10, 5), "f4"), np.full((10, 2), b"AA"), np.zeros(10, "i8"), np.ones(10, "i8"))


def test_calls_that_nobody_answers_are_counted_as_errors_over_both_protocols() -> None:

    async def replayed() -> Replay:
        async with Replay(NOBODY, NOBODY) as replay:
            await replay.send(SOME, rows=1)
        return replay

    book = asyncio.run(replayed()).book
    assert book.calls.total() == len(book.errors) == 10
    assert set(book.calls) == {"HTTP", "gRPC"}
    assert (book.rows, book.told) == (0, 0)
    assert any("ConnectError" in error for error in book.errors)
    assert any("UNAVAILABLE" in error for error in book.errors)


def test_what_goes_on_ends_with_its_block_and_its_failure_is_the_blocks_own() -> None:
    async def replayed() -> None:
        async with Replay(NOBODY, NOBODY) as replay:
            with pytest.raises(LoopFailed, match="enough"):
                await _broken_off(replay)
            calls = replay.book.calls.total()
            assert calls == len(replay.book.errors) >= 20
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(replayed())


async def _broken_off(replay: Replay) -> None:
    async with replay.going_on(SOME, rows=1):
        await until(lambda: _calls(replay, 20), "nobody called", 20)
        raise LoopFailed("enough")


async def _calls(replay: Replay, wanted: int) -> bool | None:
    return True if replay.book.calls.total() >= wanted else None
