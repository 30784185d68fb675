"""Panes enter windows and leave them, and what is known of the panes of a window together.

Panes and windows hold *running sums*: how many values of its column are in a cell or below it. They add and subtract
like counts, so a window of running sums is the sum of its panes; a distribution function and the count of any range of
cells are read from them without a pass over all cells.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numba import types
from numpy import int32, int64

from monitor.kernels._jit import helper, kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64 = read_only(types.int64)
_OPENED = types.Array(types.int32, 1, "C")
_SUMS = types.Array(types.int64, 1, "C")
_FACTS = types.Array(types.int64, 2, "C", readonly=True)


@helper
def _run(counts: Array, out: Array) -> None:
    """``out[c]`` = ``counts[0] + ... + counts[c]``, of at most int32.

    A sum waits for the one before it; those of four quarters wait side by side.
    """
    q = counts.size >> 2
    a, b, c, d = int32(0), int32(0), int32(0), int32(0)
    counts_a, counts_b, counts_c, counts_d = counts[:q], counts[q : 2 * q], counts[2 * q : 3 * q], counts[3 * q : 4 * q]
    out_a, out_b, out_c, out_d = out[:q], out[q : 2 * q], out[2 * q : 3 * q], out[3 * q : 4 * q]
    for i in range(q):
        a = int32(a + counts_a[i])
        b = int32(b + counts_b[i])
        c = int32(c + counts_c[i])
        d = int32(d + counts_d[i])
        out_a[i], out_b[i], out_c[i], out_d[i] = a, b, c, d
    b = int32(a + b)
    c = int32(b + c)
    d = int32(c + d)
    for i in range(q):
        out_b[i] += a
    for i in range(q):
        out_c[i] += b
    for i in range(q):
        out_d[i] += c
    for i in range(4 * q, counts.size):
        d = int32(d + counts[i])
        out[i] = d


def _arguments(pane: Any, window: Any) -> tuple[Any, ...]:
    return (_OPENED, _I64, types.Array(pane, 2, "C"), types.int64, _I64, types.Array(window, 2, "C"))


@kernel(
    _arguments(types.int32, types.int64),
    _arguments(types.uint16, types.int32),
    _arguments(types.uint16, types.uint16),
)
def close_pane(opened: Array, start: Array, panes: Array, closed: int, lengths: Array, sums: Array) -> None:
    """The running sums of ``opened`` enter every window and the ring ``panes``; it begins anew, with zeros.

    ``start``: where each column begins, and the end of the last. ``closed`` panes were closed before; pane k is in
    place k modulo the ring's capacity. ``sums[w]`` are those of window w, which the oldest of its ``lengths[w]`` panes
    leaves. The caller sees to it that sums fit their types. Column by column, so that one stays in the first cache.
    """
    capacity = panes.shape[0]
    longest = 0
    for f in range(start.size - 1):
        longest = max(longest, start[f + 1] - start[f])
    scratch = np.empty(longest, np.int32)
    for f in range(start.size - 1):
        own = opened[start[f] : start[f + 1]]
        running = scratch[: own.size]
        _run(own, running)
        for w in range(lengths.size):
            total = sums[w, start[f] : start[f + 1]]
            if closed < lengths[w]:
                for c in range(own.size):
                    total[c] += running[c]
            else:
                oldest = panes[(closed - lengths[w]) % capacity, start[f] : start[f + 1]]
                for c in range(own.size):
                    total[c] += running[c] - int32(oldest[c])
        kept = panes[closed % capacity, start[f] : start[f + 1]]
        for c in range(own.size):
            kept[c] = running[c]
            own[c] = 0


@kernel((_I64, _I64, _SUMS))
def run_columns(counts: Array, start: Array, out: Array) -> None:
    """``out``: the running sums of counts of cells."""
    for f in range(start.size - 1):
        total = int64(0)
        for c in range(start[f], start[f + 1]):
            total += counts[c]
            out[c] = total


@kernel((_FACTS, types.int64, types.int64), brief=True)
def span(facts: Array, closed: int, panes: int) -> tuple[int, int, int, int]:
    """(rows, dropped, first ns, last ns) of the newest ``panes`` of ``closed`` panes; the times are 0 without rows.

    ``facts[k % capacity]`` are rows, dropped, start, end (ns) and more of pane k; one without rows has no times.
    """
    rows = 0
    dropped = 0
    start = 0
    end = 0
    for k in range(max(0, closed - panes), closed):
        fact = facts[k % facts.shape[0]]
        if fact[0] > 0:
            start = min(start, fact[2]) if rows > 0 else fact[2]
            end = max(end, fact[3]) if rows > 0 else fact[3]
        rows += fact[0]
        dropped += fact[1]
    return int(rows), int(dropped), int(start), int(end)
