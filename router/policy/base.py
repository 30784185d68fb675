"""The ground that a split divides: the 2^64 positions of a 64-bit hash, as half-open spans of integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from router.types import FULL_SHARE

#: Positions are 0 <= p < SPACE.
SPACE: Final = 1 << 64


class Span(NamedTuple):
    """Positions ``start <= p < end`` belong to ``arm``."""

    start: int
    end: int
    arm: str

    @property
    def width(self) -> int:
        return self.end - self.start


class Overlap(NamedTuple):
    """Positions that belong to one arm in one layout and to another arm in another."""

    start: int
    end: int
    old: str
    new: str


def positions(share: int) -> int:
    """How many positions a share of 1/10,000s is, rounded down."""
    return share * SPACE // FULL_SHARE


def overlay(old: Iterable[Span], new: Iterable[Span]) -> Iterator[Overlap]:
    """Both layouts at once, in order. Each must cover all positions, in order and without gaps."""
    lefts, rights = iter(old), iter(new)
    left, right = next(lefts), next(rights)
    start = 0
    while True:
        end = min(left.end, right.end)
        yield Overlap(start, end, left.arm, right.arm)
        if end == SPACE:
            return
        start = end
        if left.end == end:
            left = next(lefts)
        if right.end == end:
            right = next(rights)


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Neighbours of one arm as one span; empty spans dropped."""
    out: list[Span] = []
    for span in spans:
        if not span.width:
            continue
        if out and out[-1].arm == span.arm:
            out[-1] = Span(out[-1].start, span.end, span.arm)
        else:
            out.append(span)
    return tuple(out)
