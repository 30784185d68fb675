"""A profile made ready for counting: where each column's cells lie in one vector, and the tables of the search.

A pane of counts is one int32 vector of ``cells`` entries, column after column. Everything that is derived here depends
on the profile only, so counts made under equal profiles mean the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any, Final, cast

import numpy as np

from monitor.errors import ProfileError, SettingsError
from monitor.kernels import codes
from monitor.kernels._jit import compile_all
from monitor.kernels.measures import fold, tally
from monitor.kernels.windows import enter, run_columns
from monitor.profile import ColumnProfile, ReferenceProfile, column_values
from monitor.types import BYTES, DATATYPES, Array, Column, Parts, Source, counts_of

#: Rows searched at once: enough for a column's tables to be worth fetching.
_SEARCHED_ROWS: Final = 2048
#: Buckets of the search table, and the shares of knots that may lie in each of its two end buckets.
_BUCKETS: Final = 2048
_TAILS: Final = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02)


@dataclass(slots=True, frozen=True, eq=False)
class _Tables:
    """Arguments of ``codes.find_cells`` for the columns of one tensor."""

    columns: Array
    knots: Array
    knot_start: Array
    table: Array
    knot_count: Array
    origin: Array
    scale: Array
    steps: Array


class TensorPlan:
    """How the rows of one tensor are read and counted."""

    __slots__ = (
        "_dtype",
        "_lookups",
        "_tables",
        "carrier",
        "columns",
        "datatype",
        "name",
        "places",
        "read_columns",
        "source",
        "width",
    )

    def __init__(self, profiles: Sequence[ColumnProfile], places: Sequence[int]) -> None:
        first = profiles[0].column
        self.name, self.source, self.width, self.datatype = first.tensor, first.source, first.width, first.datatype
        self.places = tuple(places)
        self.columns = [found.column.index for found in profiles]
        self.carrier = first.carrier
        self._dtype = DATATYPES[self.datatype][0]
        #: Which columns of a matrix made by ``rows_of`` are the monitored ones.
        self.read_columns = self._read_columns()
        self._tables = _tables(profiles, self.carrier, self.read_columns)
        self._lookups = [_lookup(found) for found in profiles] if self.datatype == BYTES else []

    @property
    def row_size(self) -> int:
        """Bytes of a row, of a BYTES tensor its strings."""
        return self.width if self.datatype == BYTES else self.width * self._dtype.itemsize

    def _read_columns(self) -> Array:
        if self.datatype == BYTES or self._dtype != self.carrier:
            return np.arange(len(self.columns), dtype="i8")
        return np.array(self.columns, "i8")

    def rows_of(self, parts: Parts, rows: int) -> Array | None:
        """A matrix of the carrier type with ``rows`` rows, or None when the contents do not have that many.

        Only monitored columns are converted; contents already in the carrier type are not copied when in one piece.
        """
        if self.datatype == BYTES:
            return self._strings(parts, rows)
        pieces = cast("Sequence[bytes]", parts)
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if memoryview(data).nbytes != rows * self.width * self._dtype.itemsize:
            return None
        read = np.frombuffer(data, self._dtype).reshape(rows, self.width)
        if self._dtype == self.carrier:
            return read
        picked = np.ascontiguousarray(read[:, self.columns])
        if self.datatype == "BF16":
            return (picked.astype("u4") << 16).view("f4")
        return picked.astype(self.carrier)

    def missing_rows(self, rows: int) -> Array:
        """What an optional input that is absent counts as."""
        return np.full((rows, self.width), np.nan, self.carrier)

    def strings_of(self, parts: Parts | None, rows: int) -> list[bytes]:
        """The elements of a BYTES tensor, row after row; empty ones for ``rows`` rows when it is absent."""
        if parts is None:
            return [b""] * (rows * self.width)
        pieces = cast("Sequence[list[bytes]]", parts)
        return pieces[0] if len(pieces) == 1 else [value for piece in pieces for value in piece]

    def _strings(self, parts: Parts, rows: int) -> Array | None:
        values = self.strings_of(parts, rows)
        if len(values) != rows * self.width:
            return None
        out = np.empty((rows, len(self.columns)), "f4")
        for place, (index, lookup) in enumerate(zip(self.columns, self._lookups, strict=True)):
            out[:, place] = np.fromiter(map(lookup.get, values[index :: self.width], repeat(-1.0)), "f4", rows)
        return out

    def search(self, rows: Array, cells: Array) -> None:
        """``cells[f, i]`` (uint32) is the cell, in its column, of column f in row i of a matrix made by ``rows_of``."""
        t = self._tables
        places = (t.columns, t.knots, t.knot_start, t.table, t.knot_count, t.origin, t.scale)
        codes.find_cells(rows, *places, _BUCKETS, t.steps, cells)


@dataclass(slots=True, frozen=True, eq=False)
class Folding:
    """Which cells make up which bins, as runs of neighbours: the ``last`` cell of each (int64) and its bin (int32).
    Those of column f begin with run ``start[f]`` (int64), and the next with the last."""

    last: Array
    bin_of: Array
    start: Array
    size: int

    @classmethod
    def of(cls, parts: Sequence[Array], size: int) -> Folding:
        """From every cell's bin, column after column, no bin being of two; ``size`` bins."""
        bin_of = _joined(parts, "i4")
        last = np.flatnonzero(np.diff(bin_of, append=-1))
        return cls(last, bin_of[last], np.searchsorted(last, _starts([len(part) for part in parts])), size)

    def fold(self, running: Array) -> Array:
        """int64 counts of bins from running sums of cells (``kernels.windows``)."""
        out = np.empty(self.size, "i8")
        fold(running, self.last, self.bin_of, self.start, out)
        return out


@dataclass(slots=True, frozen=True, eq=False)
class Block:
    """Rows of all tensors of a layout. ``matrices``: as ``TensorPlan.rows_of`` makes them; ``strings[t]``: the elements
    of a BYTES tensor, None for others."""

    layout: Layout
    rows: int
    matrices: Sequence[Array]
    strings: Sequence[list[bytes] | None]

    def column(self, place: int) -> Array | list[bytes]:
        """The values of one column of the layout: floats of the carrier type (a view), or strings."""
        tensor, position = self.layout.seat[place]
        plan, strings = self.layout.tensors[tensor], self.strings[tensor]
        if strings is not None:
            return strings[plan.columns[position] :: plan.width]
        return np.asarray(self.matrices[tensor][:, plan.read_columns[position]])


class Layout:
    """All tensors of one profile. Making one compiles the kernels when nobody has before: never do it in a request."""

    def __init__(self, profile: ReferenceProfile) -> None:
        compile_all()
        groups: dict[tuple[Source, str], list[ColumnProfile]] = {}
        for found in profile.columns:
            groups.setdefault((found.column.source, found.column.tensor), []).append(found)
        #: Columns in the layout's order: tensor by tensor, in the order of their first appearance in the profile.
        ordered = [found for group in groups.values() for found in group]
        self.profile = profile
        self.sha256 = profile.sha256
        self.columns = tuple(ordered)
        self.names = tuple([found.column.name for found in ordered])
        self.start = _starts([len(found.counts) for found in ordered])
        self.cells = int(self.start[-1])
        self.reference = _joined([found.counts for found in ordered], "i8")
        self.bin_start = _starts([len(found.bins) for found in ordered])
        bins = [f.bin_of + s for f, s in zip(ordered, self.bin_start, strict=False)]
        self.bins = Folding.of(bins, int(self.bin_start[-1]))
        self.level_start = _starts([found.levels for found in ordered])
        levels = [f.level_of + s for f, s in zip(ordered, self.level_start, strict=False)]
        self.levels = Folding.of(levels, int(self.level_start[-1]))
        #: Per column: its last cell, of missing values.
        self.missing = self.start[1:] - 1
        self.profiled = Sample.of(self, self.reference)
        #: bool per column: is it discrete, and is it tested by KS.
        self.discrete = np.array([found.column.discrete for found in ordered], bool)
        self.any_discrete = bool(self.discrete.any())
        self.ordered = np.array([found.ordered for found in ordered], bool)
        self.knots = _joined([found.knots for found in ordered], "f8")
        self.knot_start = _starts([len(found.knots) for found in ordered])
        self.tensors: list[TensorPlan] = []
        #: Per column: (place of its tensor, its position among that tensor's columns).
        self.seat: list[tuple[int, int]] = []
        place = 0
        for group in groups.values():
            _check_group([found.column for found in group])
            self.seat.extend([(len(self.tensors), position) for position in range(len(group))])
            self.tensors.append(TensorPlan(group, range(place, place + len(group))))
            place += len(group)
        #: Where ``search`` puts cells; pages that are never used are never real.
        self._found = np.empty(len(ordered) * _SEARCHED_ROWS, "u4")

    def place_of(self, column: str) -> int:
        """Where a column is in this order. Raises SettingsError for one that the profile does not have."""
        if column not in self.names:
            raise SettingsError(f"the profile has no column '{column}'; there are {', '.join(self.names)}")
        return self.names.index(column)

    def read(self, contents: Sequence[Parts | None], rows: int) -> Block | None:
        """Rows from the contents of each tensor (None: absent, all missing), or None when one has not that many."""
        matrices: list[Array] = []
        strings: list[list[bytes] | None] = []
        for plan, given in zip(self.tensors, contents, strict=True):
            texts = plan.strings_of(given, rows) if plan.datatype == BYTES else None
            parts = given if texts is None else [texts]
            matrix = plan.rows_of(parts, rows) if parts is not None else plan.missing_rows(rows)
            if matrix is None:
                return None
            matrices.append(matrix)
            strings.append(texts)
        return Block(self, rows, matrices, strings)

    def count(self, matrices: Sequence[Array], counts: Array) -> None:
        """Add rows to ``counts`` (int32, ``cells``): one matrix per tensor, as ``TensorPlan.rows_of`` makes them."""
        for cells in self.search(matrices, len(matrices[0])):
            enter(cells, 0, cells.shape[1], self.start, counts)

    def search(self, matrices: Sequence[Array], rows: int) -> Iterator[Array]:
        """Which cells the values of such matrices are in, some rows at a time: uint32 (column, row), counted from the
        column's first cell.

        What is given is valid until the next is asked for, and of one layout only one search may go on at a time.
        """
        for first in range(0, rows, _SEARCHED_ROWS):
            last = min(first + _SEARCHED_ROWS, rows)
            cells = self._found[: len(self.columns) * (last - first)].reshape(-1, last - first)
            for plan, matrix in zip(self.tensors, matrices, strict=True):
                plan.search(matrix[first:last], cells[plan.places[0] : plan.places[-1] + 1])
            yield cells

    def count_table(self, table: dict[str, Array]) -> Array:
        """int64 counts of one 1-D array per column: for calibration and reports, not for traffic.

        Values are cast as ``ReferenceProfile.from_table`` casts them.
        """
        return np.concatenate([np.bincount(code, minlength=n) for code, n in self.codes_of(table)]).astype("i8")

    def codes_of(self, table: dict[str, Array]) -> list[tuple[Array, int]]:
        """(cell of each row, number of cells) per column, in the layout's order."""
        return [(cells_of(found, table), len(found.counts)) for found in self.columns]


class Sample:
    """One sample by its ``running`` sums of cells (``kernels.windows``), int64, int32 or uint16, and what is made of
    them: int64, per cell, bin or column.

    Made when first asked for: a view of sums that move is to be asked before they do. ``rows`` have the ``missing``
    values with them.
    """

    def __init__(self, layout: Layout, running: Array) -> None:
        self._layout = layout
        self.running = running

    @classmethod
    def of(cls, layout: Layout, counts: Array) -> Sample:
        """Of counts of the layout's cells, of any integer type."""
        running = running_of(counts, layout.start)
        most = running[layout.missing].max(initial=0)
        return cls(layout, running.astype("i4") if most <= np.iinfo("i4").max else running)

    @cached_property
    def _tally(self) -> tuple[Array, Array, Array]:
        layout, bins = self._layout, self._layout.bins
        found = np.empty(bins.size, "i8"), *np.empty((2, len(layout.columns)), "i8")
        tally(self.running, bins.last, bins.bin_of, bins.start, layout.missing, *found)
        return found

    @cached_property
    def bins(self) -> Array:
        return self._tally[0]

    @property
    def rows(self) -> Array:
        return self._tally[1]

    @property
    def missing(self) -> Array:
        return self._tally[2]

    @cached_property
    def counts(self) -> Array:
        """int64 per cell."""
        return counts_of(self.running, self._layout.start).astype("i8", copy=False)

    @cached_property
    def levels(self) -> Array:
        """Counts of levels (``Layout.level_start``)."""
        return self._layout.levels.fold(self.running)


def running_of(counts: Array, start: Array) -> Array:
    """int64 running sums of cells from their counts, of any integer type: ``types.counts_of`` the other way."""
    out = np.empty(len(counts), "i8")
    run_columns(np.ascontiguousarray(counts, "i8"), start, out)
    return out


def cells_of(found: ColumnProfile, table: dict[str, Array]) -> Array:
    """The cell of each value of one column, by plain search."""
    values = column_values(table, found.column)
    if found.column.datatype == BYTES:
        lookup = _lookup(found)
        values = np.array([lookup.get(value, -1.0) for value in values.tolist()])
    missing = np.isnan(values)
    below = np.searchsorted(found.knots, values)
    padded = np.append(found.knots, np.nan)
    code = 2 * np.minimum(below, len(found.knots)) + (padded[below] == values)
    return np.where(missing, 2 * len(found.knots) + 1, code)


def _lookup(found: ColumnProfile) -> dict[bytes, float]:
    """String -> knot; what is not in it is new, the empty string is missing."""
    lookup = {string: float(code) for code, string in enumerate(found.categories)}
    lookup.update(dict.fromkeys(found.rare, float(len(found.categories))))
    lookup[b""] = float("nan")
    return lookup


def _check_group(columns: Sequence[Column]) -> None:
    first = columns[0]
    for column in columns:
        if (column.width, column.datatype) != (first.width, first.datatype):
            raise ProfileError(f"columns of tensor '{first.tensor}' disagree on its width or datatype")


def _starts(sizes: Sequence[int]) -> Array:
    return np.concatenate([[0], np.cumsum(sizes)]).astype("i8")


def _joined(parts: Sequence[Array], dtype: str) -> Array:
    return np.concatenate([np.empty(0), *parts]).astype(dtype)


# --- the tables of the search ----------------------------------------------------------------------------------------


def _tables(profiles: Sequence[ColumnProfile], carrier: np.dtype[Any], columns: Array) -> _Tables:
    searches = [_search(found.knots.astype(carrier)) for found in profiles]
    padded = [
        np.concatenate([found.knots.astype(carrier), np.full(1 << steps, np.nan, carrier)])
        for found, (_, _, _, steps) in zip(profiles, searches, strict=True)
    ]
    return _Tables(
        columns,
        np.concatenate(padded),
        _starts([len(knots) for knots in padded]),
        np.concatenate([below for below, _, _, _ in searches]),
        np.array([len(found.knots) for found in profiles], "i8"),
        np.array([origin for _, origin, _, _ in searches], carrier),
        np.array([scale for _, _, scale, _ in searches], carrier),
        np.array([steps for _, _, _, steps in searches], "u4"),
    )


def _search(knots: Array) -> tuple[Array, Any, Any, int]:
    """(knots below each bucket, origin, scale, halvings): the range of buckets with the fewest halvings."""
    zero = knots.dtype.type(0)
    #: Scale 0 puts everything into bucket 0: always right, and all there is when the knots have no range.
    best = (np.zeros(_BUCKETS + 1, "u4"), zero, zero, _halvings(len(knots)))
    finite = knots[np.isfinite(knots)]
    for tail in _TAILS if len(finite) > 1 else ():
        low, high = finite[int(tail * len(finite))], finite[int((1 - tail) * (len(finite) - 1))]
        if not low < high:
            continue
        with np.errstate(over="ignore", under="ignore"):
            scale = knots.dtype.type(_BUCKETS / (float(high) - float(low)))
        if not (np.isfinite(scale) and scale > 0):
            continue
        place = np.empty(len(knots), "i8")
        codes.buckets(knots, low, scale, _BUCKETS, place)
        ends = np.searchsorted(place, np.arange(_BUCKETS + 2))
        halvings = _halvings(int(np.diff(ends).max()))
        if halvings < best[3]:
            best = (ends[:-1].astype("u4"), low, scale, halvings)
    return best


def _halvings(knots: int) -> int:
    return knots.bit_length()
