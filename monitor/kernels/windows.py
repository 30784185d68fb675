"""Cells are counted, panes enter windows and leave them, and what is known of the panes of a window together.

Panes and windows hold *running sums*: how many values of its column are in a cell or below it. They add and subtract
like counts, so a window of running sums is the sum of its panes; a distribution function and the count of any range of
cells are read from them without a pass over all cells.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numba import types
from numpy import int32, int64, uint64

from monitor.kernels._jit import helper, kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64 = read_only(types.int64)
_CELLS = types.Array(types.uint32, 2, "C", readonly=True)
_OPENED = types.Array(types.int32, 1, "C")
_SUMS = types.Array(types.int64, 1, "C")
_FACTS = types.Array(types.int64, 2, "C", readonly=True)
_SPANS = types.Array(types.int64, 2, "C")


@helper
def _enter(cells: Array, first: int, last: int, counts: Array) -> None:
    for i in range(first, last):
        counts[cells[i]] += 1


@kernel((_CELLS, types.int64, types.int64, _I64, _OPENED))
def enter(cells: Array, first: int, last: int, start: Array, counts: Array) -> None:
    """``counts[start[f] + cells[f, i]] += 1`` for the rows ``first`` <= i < ``last`` of each column f."""
    for f in range(cells.shape[0]):
        _enter(cells[f], first, last, counts[start[f] : start[f + 1]])


@helper
def _run(counts: Array, out: Array) -> None:
    """``out[c]`` = ``counts[0] + ... + counts[c]``, which begin anew with zeros. Sums fit their type, which is that of
    the counts; both are whole words of 64 bits.

    A sum waits for the one before it. The counts of one word are summed by shifts (to the left is later, the lowest
    byte being the first), in vector instructions, so that only words wait for each other, and not counts.
    """
    words = counts.view(np.uint64)
    sums = out.view(np.uint64)
    bits = uint64(8 * counts.itemsize)
    last = uint64(64) - bits
    ones = ~uint64(0) // ((uint64(1) << bits) - uint64(1))  # in every count of a word
    for i in range(words.size):
        word = words[i]
        word += word << bits
        if bits < 32:
            word += word << (bits + bits)
        sums[i] = word
    carry = uint64(0)
    for i in range(words.size):
        word = sums[i] >> last
        words[i] = carry
        carry += word
    for i in range(words.size):
        sums[i] += words[i] * ones
        words[i] = uint64(0)


def _arguments(pane: Any, window: Any) -> tuple[Any, ...]:
    rings = (_I64, types.Array(pane, 2, "C"), _I64, types.Array(window, 2, "C"))
    return (_OPENED, *rings, types.int64, types.boolean, _CELLS, types.int64, types.int64)


@kernel(
    _arguments(types.int32, types.int64),
    _arguments(types.uint16, types.int32),
    _arguments(types.uint16, types.uint16),
)
def close_pane(
    opened: Array,
    start: Array,
    panes: Array,
    lengths: Array,
    sums: Array,
    closed: int,
    empty: bool,
    cells: Array,
    first: int,
    last: int,
) -> None:
    """The running sums of ``opened`` and of its last rows enter every window and the ring ``panes``; ``opened`` begins
    anew, with zeros.

    The last rows are those of ``cells`` with ``first`` <= i < ``last`` (see ``enter``); ``empty`` says that ``opened``
    has no other, and counts nothing but columns that ``cells`` does not have. ``start``: where each column begins, and
    the end of the last. ``closed`` panes were closed before; pane k is in place k modulo the ring's capacity.
    ``sums[w]`` are those of window w, which the oldest of its ``lengths[w]`` panes leaves. The caller sees to it that
    sums fit their types. Column by column, so that one stays in the first cache.
    """
    capacity = panes.shape[0]
    longest = 0
    for f in range(start.size - 1):
        longest = max(longest, start[f + 1] - start[f])
    several = 8 // panes.itemsize
    fresh = np.zeros((longest // several + 1) * several, panes.dtype)
    scratch = np.empty(fresh.size, panes.dtype)
    for f in range(start.size - 1):
        size = start[f + 1] - start[f]
        if not empty or f >= cells.shape[0]:  # else it need not be fetched
            own = opened[start[f] : start[f + 1]]
            for c in range(size):
                fresh[c] = own[c]
                own[c] = 0
        if f < cells.shape[0]:
            _enter(cells[f], first, last, fresh)
        whole = (size + several - 1) // several * several
        _run(fresh[:whole], scratch[:whole])
        running = scratch[:size]
        for w in range(lengths.size):
            total = sums[w, start[f] : start[f + 1]]
            if closed < lengths[w]:
                for c in range(size):
                    total[c] += running[c]
            else:
                oldest = panes[(closed - lengths[w]) % capacity, start[f] : start[f + 1]]
                for c in range(size):
                    total[c] += int32(running[c]) - int32(oldest[c])
        kept = panes[closed % capacity, start[f] : start[f + 1]]
        for c in range(size):
            kept[c] = running[c]


@kernel((_I64, _I64, _SUMS))
def run_columns(counts: Array, start: Array, out: Array) -> None:
    """``out``: the running sums of counts of cells."""
    for f in range(start.size - 1):
        total = int64(0)
        for c in range(start[f], start[f + 1]):
            total += counts[c]
            out[c] = total


@kernel((_FACTS, _I64, _SPANS, types.int64), brief=True)
def span(facts: Array, lengths: Array, spans: Array, closed: int) -> None:
    """``spans[w]`` = (rows, dropped, first ns, last ns) of the newest ``lengths[w]`` of ``closed`` panes; the times are
    0 without rows.

    ``facts[k % capacity]`` are rows, dropped, start, end (ns) and more of pane k; one without rows has no times.
    """
    for w in range(lengths.size):
        rows = 0
        dropped = 0
        start = 0
        end = 0
        for k in range(max(0, closed - lengths[w]), closed):
            fact = facts[k % facts.shape[0]]
            if fact[0] > 0:
                start = min(start, fact[2]) if rows > 0 else fact[2]
                end = max(end, fact[3]) if rows > 0 else fact[3]
            rows += fact[0]
            dropped += fact[1]
        spans[w, 0] = rows
        spans[w, 1] = dropped
        spans[w, 2] = start
        spans[w, 3] = end
