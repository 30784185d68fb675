"""From values to cells.

A column's sorted distinct knots ``k_0 < ... < k_{K-1}`` divide the numbers into ``2K + 2`` cells: ``2j`` is the open
gap below knot j (``2K``: above the last one), ``2j + 1`` is knot j itself, ``2K + 1`` is missing (NaN). Cells of
numbers are monotone in the value and depend on the knots only, so counts from anywhere can be added and subtracted.

**Search.** The range of the knots is divided into equal buckets; ``table[b]`` is the number of knots in buckets below
b. Because the bucket is monotone in the value, a value in bucket b has at least that many knots below it, and at most
as many more as the bucket holds. ``steps`` branch-free halvings cover the fullest bucket of the column. A value that is
on a knot meets this knot in one of the halvings (a search that ends left of an element has looked at it), so that no
look is left for the end. Knots are followed by ``2**steps`` NaN, which are neither below nor equal to anything.

**Speed.** Some thousand rows are turned column by column, so that the tables of one column stay in the first-level
cache for all their values. The search of a column is a chain of plain loops over some 1,000 values: those that compute
have no indirect access and become vector instructions, those that look up do nothing else and keep the load ports
busy. The tables of many columns together are larger than the second-level cache: each is read once in order before it
is used, at the speed of a stream instead of one miss after the other.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from numba import types
from numpy import int32, uint32, uint64

from monitor.kernels._jit import helper, kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Columns turned at once: 16 floats are one cache line.
_COLUMNS: Final = 16
#: Turned columns lie this much further apart than they are long, so that they do not fall on the same cache set.
_GAP: Final = 16
#: Values searched at once: with the tables of their column they fit into the first-level cache.
_CHUNK: Final = 1024
#: With fewer rows than this a column's tables are not worth reading ahead; elements of 4 bytes in a cache line.
_WORTH_WARMING: Final = 256
_LINE: Final = 16

_U32, _I64 = read_only(types.uint32), read_only(types.int64)
_CELLS = types.Array(types.uint32, 2, "C")


def _rows_of(element: Any) -> Any:
    return types.Array(element, 2, "C", readonly=True)


def _arguments(element: Any) -> tuple[Any, ...]:
    vector = read_only(element)
    tables = (vector, _I64, _U32, _I64, vector, vector, types.int64, _U32)
    return (_rows_of(element), _I64, *tables, _CELLS)


@kernel(
    (read_only(types.float32), types.float32, types.float32, types.int64, types.Array(types.int64, 1, "C")),
    (read_only(types.float64), types.float64, types.float64, types.int64, types.Array(types.int64, 1, "C")),
)
def buckets(values: Array, origin: float, scale: float, last: int, out: Array) -> None:
    """``out[i]`` is the bucket, 0..last, of ``values[i]``, by the formula of ``find_cells``. NaN is in bucket 0."""
    limit = values.dtype.type(last)
    zero = values.dtype.type(0)
    for i in range(values.size):
        place = (values[i] - origin) * scale
        place = place if place > zero else zero
        place = place if place < limit else limit
        out[i] = int32(place)


@helper
def _turn(rows: Array, columns: Array, stage: Array, stride: int) -> None:
    """``stage[j * stride + i] = rows[i, columns[j]]``."""
    left = uint64(columns[0])
    neighbours = columns.size == _COLUMNS
    for j in range(columns.size):
        neighbours = neighbours and columns[j] - columns[0] == j
    if neighbours:
        for i in range(rows.shape[0]):
            for j in range(_COLUMNS):  # a fixed number of them: vector loads
                stage[uint64(j * stride + i)] = rows[uint64(i), left + uint64(j)]
    else:
        for i in range(rows.shape[0]):
            for j in range(columns.size):
                stage[uint64(j * stride + i)] = rows[uint64(i), uint64(columns[j])]


@helper
def _warm(own: Array, below: Array) -> int:
    """Bring a column's tables into the cache. What is returned is of no use but that the reads are not left out."""
    seen = uint32(0)
    for i in range(0, own.size, _LINE):
        seen |= uint32(own[i] > own[0])
    for i in range(0, below.size, _LINE):
        seen |= below[i]
    return int(seen)


@helper
def _search(
    values: Array, own: Array, below: Array, low: float, factor: float, last: int, steps: int, probe: Array, cell: Array
) -> None:
    """``cell[i]`` is the cell of ``values[i]``; what it is for NaN does not matter."""
    limit = values.dtype.type(last)
    zero = values.dtype.type(0)
    one = uint32(1)
    for i in range(values.size):
        t = (values[i] - low) * factor
        t = t if t > zero else zero  # NaN too
        t = t if t < limit else limit
        cell[i] = uint32(int32(t))
    for i in range(values.size):
        cell[i] = below[cell[i]] << one
    shift = uint32(steps)
    while shift > uint32(0):
        half = uint32((one << uint32(shift - one)) - one)
        for i in range(values.size):
            probe[i] = own[uint32((cell[i] >> one) + half)]
        for i in range(values.size):
            cell[i] = uint32(cell[i] + (uint32(probe[i] < values[i]) << shift)) | uint32(probe[i] == values[i])
        shift = uint32(shift - one)


@kernel(_arguments(types.float32), _arguments(types.float64))
def find_cells(
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
    cells: Array,
) -> None:
    """``cells[f, i]`` is the cell, in its column, of the value that row i of ``rows`` (n, width) has in ``columns[f]``.

    ``knots[knot_start[f]:knot_start[f + 1]]`` are column f's knots with their NaN; ``table`` has ``last + 1`` entries
    per column. The caller sees to it that all indices fit and that rows are not too many: 16 columns of them are held.
    Nothing is checked here.
    """
    n = rows.shape[0]
    stride = n + _GAP
    stage = np.empty(min(_COLUMNS, columns.size) * stride, rows.dtype)
    probe = np.empty(_CHUNK, rows.dtype)
    for group in range(0, columns.size, _COLUMNS):
        members = columns[group : group + _COLUMNS]
        _turn(rows, members, stage, stride)
        for j in range(members.size):
            f = group + j
            own = knots[knot_start[f] : knot_start[f + 1]]
            below = table[f * (last + 1) : (f + 1) * (last + 1)]
            missing = uint32(2 * knot_count[f] + 1)
            if n >= _WORTH_WARMING:
                cells[f, 0] = _warm(own, below)
            for first in range(0, n, _CHUNK):
                size = min(_CHUNK, n - first)
                values = stage[j * stride + first : j * stride + first + size]
                found = cells[f, first : first + size]
                _search(values, own, below, origin[f], scale[f], last, steps[f], probe, found)
                for i in range(size):  # NaN equals nothing
                    found[i] = missing if values[i] != values[i] else found[i]
