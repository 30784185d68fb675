"""Aligned memory that one engine instance reuses from run to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

#: Kernels give other last bits on oddly aligned input; every tensor starts on a cache line.
ALIGNMENT = 64
#: One instance keeps at most this much; a larger run gets memory of its own, freed with it.
MAX_BYTES = 64 * 1024 * 1024
_MIN_BYTES = 4096

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
#: Returns a writable uint8 array of that many bytes, ALIGNMENT-aligned, that keeps its memory alive.
Allocator: TypeAlias = Callable[[int], Bytes]


def allocate_aligned(size: int) -> Bytes:
    """Uninitialised host memory starting at a multiple of ALIGNMENT."""
    raw = np.empty(size + ALIGNMENT, dtype=np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + size]


class Arena:
    """One growing buffer. Whoever uses it has it whole: regions of two layouts overlap."""

    def __init__(self, allocate: Allocator = allocate_aligned, max_bytes: int = MAX_BYTES) -> None:
        self._allocate = allocate
        self._max_bytes = max_bytes
        self._buffer = allocate(0)

    @property
    def size(self) -> int:
        return self._buffer.nbytes

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether regions of these sizes stay within the bound."""
        return _total(sizes) <= self._max_bytes

    def regions(self, sizes: Sequence[int]) -> tuple[list[Bytes], bool]:
        """Aligned regions of these sizes, and whether the buffer moved: then earlier regions must be let go."""
        total = _total(sizes)
        moved = total > self._buffer.nbytes
        if moved:
            self._buffer = self._allocate(min(max(_MIN_BYTES, 1 << (total - 1).bit_length()), self._max_bytes))
        return _split(self._buffer, sizes), moved

    def separate(self, sizes: Sequence[int]) -> list[Bytes]:
        """Aligned regions in memory of their own, for a run that does not fit."""
        return _split(self._allocate(_total(sizes)), sizes)

    def release(self) -> None:
        self._buffer = self._allocate(0)


def _padded(size: int) -> int:
    """Rounded up to the alignment; an empty tensor still gets an address of its own."""
    return max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)


def _total(sizes: Sequence[int]) -> int:
    return sum(map(_padded, sizes))


def _split(buffer: Bytes, sizes: Sequence[int]) -> list[Bytes]:
    out: list[Bytes] = []
    start = 0
    for size in sizes:
        out.append(buffer[start : start + size])
        start += _padded(size)
    return out
