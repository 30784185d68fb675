"""Counts over the last while: a ring of buckets with running totals. Time comes in as integer nanoseconds."""

from __future__ import annotations


class SlidingCounts:
    """Two counts over the last ``buckets`` whole buckets and the one that is filling.

    So a look covers at least ``buckets * bucket_ns`` and less than one bucket more. A step costs O(1), and O(buckets)
    after a pause. A clock that goes back counts into the newest bucket.
    """

    __slots__ = ("_bucket_ns", "_epoch", "_first", "_second", "first", "second")

    def __init__(self, window_ns: int, buckets: int) -> None:
        if buckets < 1 or window_ns < buckets:
            raise ValueError(f"wanted at least one bucket of at least 1 ns, got {buckets} in {window_ns} ns")
        self._bucket_ns = -(-window_ns // buckets)
        self._epoch = 0
        self._first = [0] * (buckets + 1)
        self._second = [0] * (buckets + 1)
        self.first = 0
        self.second = 0

    def advance(self, now_ns: int) -> None:
        """Forget what is older than the window."""
        epoch = now_ns // self._bucket_ns
        size = len(self._first)
        for step in range(max(self._epoch + 1, epoch - size + 1), epoch + 1):
            slot = step % size
            self.first -= self._first[slot]
            self.second -= self._second[slot]
            self._first[slot] = self._second[slot] = 0
        self._epoch = max(epoch, self._epoch)

    def add(self, first: int, second: int, now_ns: int) -> None:
        """Count, after forgetting what is too old."""
        if now_ns // self._bucket_ns > self._epoch:
            self.advance(now_ns)
        slot = self._epoch % len(self._first)
        self._first[slot] += first
        self._second[slot] += second
        self.first += first
        self.second += second

    def clear(self) -> None:
        """Forget everything."""
        size = len(self._first)
        self._first, self._second = [0] * size, [0] * size
        self.first = self.second = 0
