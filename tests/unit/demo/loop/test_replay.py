"""server.demo.loop.replay: calls that nobody answers. Against a live server it is run by the loop itself."""

from __future__ import annotations

import asyncio

import numpy as np

from server.demo.data import Flights
from server.demo.loop.replay import Replay

NOBODY = "127.0.0.1:1"


def test_calls_that_nobody_answers_are_counted_as_errors_over_both_protocols() -> None:
    some = Flights(np.zeros((10, 5), "f4"), np.full((10, 2), b"AA"), np.zeros(10, "i8"), np.ones(10, "i8"))

    async def replayed() -> Replay:
        async with Replay(NOBODY, NOBODY) as replay:
            await replay.send(some, rows=1)
        return replay

    book = asyncio.run(replayed()).book
    assert book.calls.total() == len(book.errors) == 10
    assert set(book.calls) == {"HTTP", "gRPC"}
    assert (book.rows, book.told) == (0, 0)
    assert any("ConnectError" in error for error in book.errors)
    assert any("UNAVAILABLE" in error for error in book.errors)
