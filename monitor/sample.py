"""The newest rows as they came, for people and for other tools: a captured window.

Rows of consecutive batches are not a random sample of the period they are from: they are alike, and an hour is not a
day. Numbers are kept in the float type that the monitor compares them in, strings up to ``MAX_STRING`` bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from monitor.layout import Block, Layout
from monitor.types import BYTES, Array

#: Bytes of a string that are kept: what is read back takes as much for every row as for the longest string.
MAX_STRING: Final = 256
#: What a string costs beside its contents.
_STRING_OVERHEAD: Final = 40


@dataclass(slots=True, eq=False)
class _Rows:
    """Some rows of one arm; ``columns`` in the layout's order."""

    arm: str
    times: Array
    columns: list[Array]
    size: int


class RowSample:
    """The last ``rows`` rows of all arms together, fewer when those would take more than ``max_bytes``.

    What is over is forgotten block by block, so up to a block of rows more may be held. Not thread safe.
    """

    def __init__(self, layout: Layout, rows: int, max_bytes: int) -> None:
        self._layout = layout
        self._max_rows, self._max_bytes = rows, max_bytes
        self._kept: deque[_Rows] = deque()
        self._rows = self._bytes = 0

    def add(self, arm: str, times: Array, block: Block) -> None:
        """``times``: int64 wall ns per row."""
        newest = slice(max(0, block.rows - self._max_rows), None)
        columns = [_copied(block.column(place), newest) for place in range(len(self._layout.columns))]
        size = sum([_size(column) for column in columns]) + times[newest].nbytes
        self._kept.append(_Rows(arm, times[newest].copy(), columns, size))
        self._rows += len(times[newest])
        self._bytes += size
        while self._kept and (self._rows - len(self._kept[0].times) >= self._max_rows or self._bytes > self._max_bytes):
            gone = self._kept.popleft()
            self._rows -= len(gone.times)
            self._bytes -= gone.size

    def read(self) -> dict[str, Array]:
        """Column -> values, oldest row first, with ``time`` (int64 wall ns) and ``arm`` (text) under ``__time``,
        ``__arm``. Strings are a bytes array (dtype S), so that ``numpy.savez`` needs no pickle."""
        newest = slice(max(0, self._rows - self._max_rows), None)
        kept = list(self._kept)
        arms = [np.full(len(rows.times), rows.arm) for rows in kept]
        out = {
            column.column.name: _joined(
                [rows.columns[place] for rows in kept], column.column.carrier, column.column.datatype == BYTES
            )[newest]
            for place, column in enumerate(self._layout.columns)
        }
        out["__time"] = np.concatenate([np.empty(0, "i8"), *[rows.times for rows in kept]])[newest]
        out["__arm"] = np.concatenate([np.empty(0, "U1"), *arms])[newest]
        return out


def _copied(values: Array | list[bytes], part: slice) -> Array:
    if not isinstance(values, list):
        return values[part].copy()
    out = np.empty(len(values[part]), object)
    out[:] = [value[:MAX_STRING] for value in values[part]]
    return out


def _size(column: Array) -> int:
    if column.dtype != object:
        return column.nbytes
    return sum(map(len, column.tolist())) + (8 + _STRING_OVERHEAD) * len(column)


def _joined(parts: Sequence[Array], carrier: np.dtype[Any], text: bool) -> Array:
    if text:
        return np.array([value for part in parts for value in part.tolist()], "S")
    return np.concatenate([np.empty(0, carrier), *parts])
