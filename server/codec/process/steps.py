"""Long work cut into short steps, so that one code serves the process, which does it at once, and the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TypeAlias, TypeVar

_T = TypeVar("_T")

#: Yields wherever something else may run for a while; returns the result.
Steps: TypeAlias = Generator[None, None, _T]


def at_once(steps: Steps[_T]) -> _T:
    """The result, without a pause."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: _T = end.value
        return result


class Turns:
    """Long works by turns with the event loop, one after the other: however many come, one step at a time holds it."""

    __slots__ = ("_one",)

    def __init__(self) -> None:
        self._one = asyncio.Lock()

    async def take(self, steps: Steps[_T]) -> _T:
        """The result of ``steps``, which begin when those that came before are over."""
        async with self._one:
            return await by_turns(steps)


async def by_turns(steps: Steps[_T]) -> _T:
    """The result; the event loop takes a turn after each step. Work of a single step never gives up the loop."""
    try:
        while True:
            next(steps)
            await asyncio.sleep(0)
    except StopIteration as end:
        result: _T = end.value
        return result
