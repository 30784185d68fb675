"""What keeps a run of rounds bounded: a time that it may take, whatever the machine and the servers do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

#: A round that follows may take this much longer than the longest one before it.
_SLACK: Final = 1.1


class Budget:
    """Counts from its making."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._end = time.monotonic() + limit_s

    def left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def rounds(self, wanted: int) -> Iterator[int]:
        """Numbers from 0 as long as another round as long as the longest one so far fits. The first always does."""
        longest = 0.0
        for number in range(wanted):
            if number and longest * _SLACK > self.left_s():
                return
            begun = time.monotonic()
            yield number
            longest = max(longest, time.monotonic() - begun)
