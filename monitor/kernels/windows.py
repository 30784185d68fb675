"""Panes enter windows and leave them, and what is known of the panes of a window together."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numba import types
from numpy import int32

from monitor.kernels._jit import kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64 = read_only(types.int64)
_OPENED = types.Array(types.int32, 1, "C")
_FACTS = types.Array(types.int64, 2, "C", readonly=True)


def _arguments(pane: Any, window: Any) -> tuple[Any, ...]:
    return (_OPENED, types.Array(pane, 2, "C"), types.int64, _I64, types.Array(window, 2, "C"))


@kernel(
    _arguments(types.int32, types.int64),
    _arguments(types.uint16, types.int32),
    _arguments(types.uint16, types.uint16),
)
def close_pane(opened: Array, panes: Array, closed: int, lengths: Array, sums: Array) -> None:
    """``opened`` enters every window, takes its place in the ring ``panes`` and begins anew, with zeros.

    ``closed`` panes were closed before; pane k is in place k modulo the ring's capacity. ``sums[w]`` are the counts of
    window w, which the oldest of its ``lengths[w]`` panes leaves. The caller sees to it that counts fit their types.
    """
    capacity = panes.shape[0]
    for w in range(lengths.size):
        total = sums[w]
        if closed < lengths[w]:
            for c in range(opened.size):
                total[c] += opened[c]
        else:
            oldest = panes[(closed - lengths[w]) % capacity]
            for c in range(opened.size):
                total[c] += opened[c] - int32(oldest[c])
    kept = panes[closed % capacity]
    for c in range(opened.size):
        kept[c] = opened[c]
        opened[c] = 0


@kernel((_FACTS, types.int64, types.int64))
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
