"""server.transport.offload: few threads, even when the callers leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from server.transport.offload import Offload


class Held:
    """Work that begins, and ends when it is told to."""

    def __init__(self, then: Callable[[], str] = lambda: "done") -> None:
        self.begun, self.go, self._then = threading.Event(), threading.Event(), then

    def __call__(self) -> str:
        self.begun.set()
        assert self.go.wait(20)
        return self._then()


def fail() -> str:
    raise ValueError("no")


def test_work_whose_caller_left_has_its_place_until_it_ends() -> None:
    async def body() -> None:
        offload, left, never, last = Offload(1), Held(fail), Held(), Held()
        first = asyncio.create_task(offload.run(left))
        assert await asyncio.to_thread(left.begun.wait, 20)
        waiting = asyncio.create_task(offload.run(never))
        second = asyncio.create_task(offload.run(last))
        first.cancel()
        await asyncio.wait([first])
        waiting.cancel()
        await asyncio.wait([waiting])
        assert not await asyncio.to_thread(last.begun.wait, 0.2)
        left.go.set()
        last.go.set()
        assert await second == "done"
        assert not never.begun.is_set()
        with pytest.raises(ValueError, match="no"):
            await offload.run(fail)
        assert await offload.run(lambda: "still here") == "still here"

    told: list[str] = []
    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
        runner.run(asyncio.wait_for(body(), 30))
    assert told == []
