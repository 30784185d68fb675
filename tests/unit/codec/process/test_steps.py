"""The same steps at once and by turns."""

from __future__ import annotations

import asyncio

import pytest

from server.codec.process.steps import Steps, Turns, at_once, by_turns


def counted(steps: int, seen: list[str]) -> Steps[int]:
    for _ in range(steps):
        seen.append("step")
        yield
    return steps


def test_at_once() -> None:
    seen: list[str] = []
    assert at_once(counted(3, seen)) == 3
    assert seen == ["step"] * 3


def test_the_loop_takes_a_turn_after_each_step() -> None:
    seen: list[str] = []

    async def other() -> None:
        for _ in range(3):
            seen.append("other")
            await asyncio.sleep(0)

    async def both() -> int:
        result, _ = await asyncio.gather(by_turns(counted(3, seen)), other())
        return result

    assert asyncio.run(both()) == 3
    assert seen == ["step", "other"] * 3


def test_work_without_a_pause_keeps_the_loop() -> None:
    async def main() -> list[str]:
        seen: list[str] = []
        asyncio.get_running_loop().call_soon(seen.append, "other")
        assert await by_turns(counted(0, seen)) == 0
        return list(seen)

    assert asyncio.run(main()) == []


def test_long_works_are_done_one_after_the_other() -> None:
    seen: list[str] = []

    def named(name: str) -> Steps[str]:
        for _ in range(2):
            seen.append(name)
            yield
        return name

    async def main() -> list[str]:
        turns = Turns()
        return await asyncio.gather(*(turns.take(named(name)) for name in "abc"))

    assert asyncio.run(main()) == ["a", "b", "c"]
    assert seen == ["a", "a", "b", "b", "c", "c"]


def test_work_that_is_given_up_lets_others_go_on() -> None:
    seen: list[str] = []

    def endless() -> Steps[None]:
        while True:
            yield

    async def main() -> int:
        turns = Turns()
        first, waiting = (asyncio.ensure_future(turns.take(endless())) for _ in range(2))
        last = asyncio.ensure_future(turns.take(counted(2, seen)))
        await asyncio.sleep(0)
        for task in (waiting, first):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return await last

    assert asyncio.run(main()) == 2
