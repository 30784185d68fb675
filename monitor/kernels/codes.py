"""From values to counts of cells.

A column's sorted distinct knots ``k_0 < ... < k_{K-1}`` divide the numbers into ``2K + 2`` cells: ``2j`` is the open
gap below knot j (``2K``: above the last one), ``2j + 1`` is knot j itself, ``2K + 1`` is missing (NaN). Cells of
numbers are monotone in the value and depend on the knots only, so counts from anywhere can be added and subtracted.

**Search.** The range of the knots is divided into equal buckets; ``table[b]`` is the number of knots in buckets below
b. Because the bucket is monotone in the value, a value in bucket b has at least that many knots below it, and at most
as many more as the bucket holds. ``steps`` branch-free halvings cover the fullest bucket of the column. Each pass runs
over a tile of rows in the first-level cache and is a loop of independent iterations, so the compiler can use gathers.
Knots are followed by ``2**steps`` NaN, which are neither below nor equal to anything.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from numba import types
from numpy import int32, uint32

from monitor.kernels._jit import kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Rows of one tile, and columns transposed at once: 16 floats are one cache line.
_ROWS: Final = 1024
_COLUMNS: Final = 16
#: Tile columns lie this far apart, so that they do not fall on the same cache set.
_STRIDE: Final = _ROWS + 16

_U32, _I64 = read_only(types.uint32), read_only(types.int64)
_COUNTS = types.Array(types.int32, 1, "C")


def _rows_of(element: Any) -> Any:
    return types.Array(element, 2, "C", readonly=True)


def _arguments(element: Any) -> tuple[Any, ...]:
    vector = read_only(element)
    tables = (vector, _I64, _U32, _I64, vector, vector, types.int64, _U32)
    return (_rows_of(element), _I64, *tables, _I64, _COUNTS)


@kernel(
    (read_only(types.float32), types.float32, types.float32, types.int64, types.Array(types.int64, 1, "C")),
    (read_only(types.float64), types.float64, types.float64, types.int64, types.Array(types.int64, 1, "C")),
)
def buckets(values: Array, origin: float, scale: float, last: int, out: Array) -> None:
    """``out[i]`` is the bucket, 0..last, of ``values[i]``, by the formula of ``count_cells``. NaN is in bucket 0."""
    limit = values.dtype.type(last)
    zero = values.dtype.type(0)
    for i in range(values.size):
        place = (values[i] - origin) * scale
        place = place if place > zero else zero
        place = place if place < limit else limit
        out[i] = int32(place)


@kernel(_arguments(types.float32), _arguments(types.float64))
def count_cells(
    rows: Array,
    columns: Array,
    knots: Array,
    knot_start: Array,
    table: Array,
    knot_count: Array,
    origin: Array,
    scale: Array,
    last: int,
    steps: Array,
    cell_start: Array,
    counts: Array,
) -> None:
    """``counts[cell_start[f] + cell] += 1`` for each row's value in column ``columns[f]`` of ``rows`` (n, width).

    ``knots[knot_start[f]:knot_start[f + 1]]`` are column f's knots with their NaN; ``table`` has ``last + 1`` entries
    per column. The caller sees to it that all indices fit; nothing is checked here.
    """
    n = rows.shape[0]
    stage = np.empty(_COLUMNS * _STRIDE, rows.dtype)
    place = np.empty(_ROWS, np.uint32)
    limit = rows.dtype.type(last)
    zero = rows.dtype.type(0)
    one = uint32(1)
    for first in range(0, n, _ROWS):
        tile = min(_ROWS, n - first)
        for group in range(0, columns.size, _COLUMNS):
            members = min(_COLUMNS, columns.size - group)
            for i in range(tile):
                for j in range(members):
                    stage[j * _STRIDE + i] = rows[first + i, columns[group + j]]
            for j in range(members):
                f = group + j
                values = stage[j * _STRIDE : j * _STRIDE + tile]
                own = knots[knot_start[f] : knot_start[f + 1]]
                below = table[f * (last + 1) : (f + 1) * (last + 1)]
                low = origin[f]
                factor = scale[f]
                for i in range(tile):
                    t = (values[i] - low) * factor
                    t = t if t > zero else zero  # NaN too
                    t = t if t < limit else limit
                    place[i] = below[uint32(int32(t))]
                shift = uint32(steps[f])
                while shift > uint32(0):
                    shift = uint32(shift - one)
                    half = uint32((one << shift) - one)
                    for i in range(tile):
                        p = place[i]
                        place[i] = uint32(p + (uint32(own[uint32(p + half)] < values[i]) << shift))
                missing = uint32(2 * knot_count[f] + 1)
                for i in range(tile):
                    p = place[i]
                    cell = uint32((p << one) + uint32(own[p] == values[i]))
                    place[i] = missing if values[i] != values[i] else cell
                mine = counts[cell_start[f] : cell_start[f + 1]]
                for i in range(tile):
                    mine[place[i]] += 1
