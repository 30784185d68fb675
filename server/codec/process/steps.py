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


async def by_turns(steps: Steps[_T]) -> _T:
    """The result; the event loop takes a turn after each step. Work of a single step never gives up the loop."""
    try:
        while True:
            next(steps)
            await asyncio.sleep(0)
    except StopIteration as end:
        result: _T = end.value
        return result
