"""Latencies counted in buckets whose width grows with the value, as HDR histograms do: small, exact to a fixed share.

A value of up to ``2**(BITS + 1)`` ns is counted as it is; a larger one keeps its ``BITS + 1`` leading bits, so that a
bucket is at most ``2**-BITS`` (0.4 %) of its values wide, whatever their size. Counting is one list index;
histograms of several connections or rounds add up exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

BITS: Final = 8
#: Longer than 18 minutes is counted as this.
MOST_NS: Final = 2**40 - 1
_SIZE: Final = (MOST_NS.bit_length() - BITS + 1) << BITS


def bucket(value_ns: int) -> int:
    """Where a value is counted. Negative values are zero."""
    value = min(max(value_ns, 0), MOST_NS)
    shift = max(0, value.bit_length() - BITS - 1)
    return (shift << BITS) + (value >> shift)


def highest(index: int) -> int:
    """The greatest value that is counted in a bucket, in ns."""
    shift = max(0, (index >> BITS) - 1)
    return ((index - (shift << BITS) + 1) << shift) - 1


class Histogram:
    """Counts of durations in ns."""

    __slots__ = ("_counts", "count", "greatest_ns", "total_ns")

    def __init__(self) -> None:
        self._counts = [0] * _SIZE
        self.count = 0
        self.total_ns = 0
        self.greatest_ns = 0

    def record(self, value_ns: int) -> None:
        self._counts[bucket(value_ns)] += 1
        self.count += 1
        self.total_ns += value_ns
        if value_ns > self.greatest_ns:
            self.greatest_ns = value_ns

    def add(self, other: Histogram) -> None:
        """Count what ``other`` has counted too."""
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        self.count += other.count
        self.total_ns += other.total_ns
        self.greatest_ns = max(self.greatest_ns, other.greatest_ns)

    def percentile(self, percent: float) -> float:
        """The smallest bucket's end in ns that at least ``percent`` of all values do not exceed; NaN without values."""
        if not self.count:
            return math.nan
        wanted = max(1, math.ceil(self.count * percent / 100 - 1e-9))
        seen, found = 0, 0
        for index, count in self.buckets():
            seen, found = seen + count, index
            if seen >= wanted:
                break
        return float(min(highest(found), self.greatest_ns))

    def mean(self) -> float:
        """In ns; NaN without values."""
        return self.total_ns / self.count if self.count else math.nan

    def over(self, limit_ns: int) -> int:
        """How many values are greater than ``limit_ns``, to the width of a bucket."""
        return sum(count for index, count in self.buckets() if index > bucket(limit_ns))

    def buckets(self) -> Iterator[tuple[int, int]]:
        """(index, count) of buckets that hold something, the smallest values first."""
        return ((index, count) for index, count in enumerate(self._counts) if count)

    def to_json(self) -> dict[str, Any]:
        return {
            "bits": BITS,
            "count": self.count,
            "total_ns": self.total_ns,
            "greatest_ns": self.greatest_ns,
            "buckets": [list(pair) for pair in self.buckets()],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Histogram:
        """Raises ValueError for buckets of another width, or counts that do not add up."""
        if found.get("bits") != BITS:
            raise ValueError(f"histogram must have {BITS} bits of precision, got {found.get('bits')!r}")
        histogram = cls()
        for index, count in found["buckets"]:
            if not (0 <= index < _SIZE and count > 0):
                raise ValueError(f"histogram has no bucket {index!r} with {count!r} values")
            histogram._counts[index] += count
            histogram.count += count
        if histogram.count != found["count"]:
            raise ValueError(f"histogram says {found['count']!r} values and has {histogram.count}")
        histogram.total_ns, histogram.greatest_ns = int(found["total_ns"]), int(found["greatest_ns"])
        return histogram
