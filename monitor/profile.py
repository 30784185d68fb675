"""Reference profiles: what a model's columns looked like when it was trained. No training row is kept.

A column's profile is its knots (see ``monitor.kernels.codes``), the reference's count in every cell, and the bins that
PSI is taken over. Two ways of choosing knots:

* **all** distinct values: KS is exact, the profile is as large as the reference has distinct values;
* **G quantiles** (default 1024): KS is known within the largest reference share that lies strictly inside one gap,
  about 1/G. Values that are frequent are knots themselves and cost nothing.

**Bins.** Ordered columns with more than 20 distinct values: runs of cells between quantiles, right-closed (x <= edge).
Columns with fewer, and discrete ones: a bin for each value with at least 0.5 % of the rows, one for the rarer ones, one
for values that the reference does not have. The last bin of every column is missing values. *Levels*, which
Jensen-Shannon, L-infinity and chi-square are taken over, are the same but with every known value by itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from monitor import sealed
from monitor.errors import ProfileError
from monitor.outcomes import LabelReference
from monitor.types import BYTES, DATATYPES, KINDS, Array, Column, Kind, Source

DEFAULT_KNOTS: Final = 1024
DEFAULT_BINS: Final = 10
#: Ordered columns with no more distinct values than this have a bin for each, and are not tested by KS.
FEW_VALUES: Final = 20
#: A category with a smaller share of the reference has no PSI bin of its own.
RARE_SHARE: Final = 0.005
#: Categories with a cell of their own; the rarest of more share one. Over MAX_KNOWN a column is not categorical.
MAX_CATEGORIES: Final = 1024
MAX_KNOWN: Final = 65_536
#: An ordered column with more distinct values than this cannot have them all as knots.
MAX_KNOTS: Final = 4_000_000

MISSING_BIN: Final = "missing"
NEW_BIN: Final = "new"
RARE_BIN: Final = "rare"
#: The cell that the strings beyond the most frequent share, where it is a bin of its own.
OTHERS_BIN: Final = "others"
_KIND: Final = "reference profile"
_SCHEMA: Final = 1


@dataclass(slots=True, frozen=True, eq=False)
class ColumnProfile:
    """One column of the reference.

    ``knots`` float64 (K), exact in the column's carrier; ``counts`` int64 (2K + 2); ``bin_of`` and ``level_of`` int32
    (2K + 2), bin and level of each cell. BYTES: knot j stands for ``categories[j]``; when ``rare`` is not empty the
    last knot stands for all of those. ``mean`` and ``sd`` are over finite values (0 for BYTES).
    """

    column: Column
    knots: Array
    counts: Array
    bin_of: Array
    level_of: Array
    bins: tuple[str, ...]
    levels: int
    mean: float = 0.0
    sd: float = 0.0
    categories: tuple[bytes, ...] = ()
    rare: tuple[bytes, ...] = ()

    @property
    def rows(self) -> int:
        return int(self.counts.sum())

    @property
    def present(self) -> int:
        return self.rows - int(self.counts[-1])

    @property
    def ordered(self) -> bool:
        """Whether KS says something: the values have an order and are many."""
        return not self.column.discrete and NEW_BIN not in self.bins

    @property
    def ks_resolution(self) -> float:
        """The most that KS from these cells can be off: the largest reference share strictly inside one gap."""
        return float(self.counts[:-1:2].max(initial=0)) / max(1, self.present)


@dataclass(slots=True, frozen=True, eq=False)
class SegmentReference:
    """The reference cut by the values of one column (``monitor.segments.with_segments`` makes it).

    ``counts`` int64 (values, cells): one row per value, in the cells' order of ``monitor.layout.Layout``.
    """

    column: str
    values: tuple[str | float, ...]
    counts: Array


@dataclass(frozen=True, eq=False)
class ReferenceProfile:
    """The columns of one model version's reference, and the SHA-256 that names them."""

    columns: tuple[ColumnProfile, ...]
    segments: SegmentReference | None = None
    labels: LabelReference | None = None

    @cached_property
    def sha256(self) -> str:
        """Lower-case hex; equal contents have equal digests."""
        return sealed.content_digest(_KIND, *self._contents())

    @property
    def rows(self) -> int:
        return self.columns[0].rows if self.columns else 0

    @classmethod
    def from_table(
        cls,
        table: Mapping[str, Any],
        columns: Sequence[Column],
        *,
        knots: int | None = DEFAULT_KNOTS,
        bins: int = DEFAULT_BINS,
    ) -> ReferenceProfile:
        """From one 1-D array per column, by column name. ``knots`` None: all distinct values (exact KS).

        Values are cast to the column's datatype first: what is compared is what the model is sent. None and NaN are
        missing, and so is the empty string in a BYTES column. Raises ProfileError naming the column.
        """
        if not columns:
            raise ProfileError("a profile needs at least one column")
        names = [column.name for column in columns]
        if len(set(names)) != len(names):
            raise ProfileError(
                f"column names must differ, got {sorted({n for n in names if names.count(n) > 1})} twice"
            )
        if knots is not None and not 2 <= knots <= MAX_KNOTS:
            raise ProfileError(f"a profile takes 2 to {MAX_KNOTS} knots per column, got {knots}")
        if not 2 <= bins <= 1000:
            raise ProfileError(f"bins must be in 2..1000, got {bins}")
        built = tuple([_build(column, column_values(table, column), knots, bins) for column in columns])
        if len({found.rows for found in built}) > 1:
            raise ProfileError(f"columns differ in rows: { {found.column.name: found.rows for found in built} }")
        if not built[0].rows:
            raise ProfileError("the reference has no rows")
        return cls(built)

    @classmethod
    def from_arrays(
        cls,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any] | None = None,
        *,
        datatypes: Mapping[str, str] | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        kinds: Mapping[str, Kind] | None = None,
        knots: int | None = DEFAULT_KNOTS,
        bins: int = DEFAULT_BINS,
    ) -> ReferenceProfile:
        """From one array per tensor: (rows,) or (rows, ...). A row's elements become columns ``tensor[0]``, ...

        ``datatypes`` (V2, by tensor) default to the arrays' own; ``names`` gives a tensor's columns names; ``kinds``
        (by column name) says which numbers are categories.
        """
        table: dict[str, Array] = {}
        columns: list[Column] = []
        both: tuple[tuple[Source, Mapping[str, Any]], ...] = (("input", inputs), ("output", outputs or {}))
        for source, tensors in both:
            for tensor, values in tensors.items():
                array = _array(values, f"tensor '{tensor}'")
                if array.ndim == 0:
                    raise ProfileError(f"tensor '{tensor}' has no rows")
                flat = array.reshape(len(array), math.prod(array.shape[1:]))
                given = (names or {}).get(tensor)
                labels = list(given) if given is not None else tensor_column_names(tensor, flat.shape[1])
                if len(labels) != flat.shape[1]:
                    raise ProfileError(f"tensor '{tensor}' has {flat.shape[1]} columns, got {len(labels)} names")
                datatype = (datatypes or {}).get(tensor) or datatype_of(array, tensor)
                for index, name in enumerate(labels):
                    kind = (kinds or {}).get(name, kind_of(datatype))
                    columns.append(Column(name, tensor, source, index, flat.shape[1], datatype, kind))
                    if name in table:
                        raise ProfileError(f"column names must differ, got '{name}' twice")
                    table[name] = flat[:, index]
        return cls.from_table(table, columns, knots=knots, bins=bins)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        sealed.write_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> ReferenceProfile:
        """Read a saved profile. Raises ProfileError when it is damaged or not a profile, OSError when unreadable."""
        return cls.from_bytes(path.read_bytes(), str(path.name))

    def to_bytes(self) -> bytes:
        return sealed.pack(_KIND, *self._contents())

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "profile") -> ReferenceProfile:
        header, arrays, _ = sealed.unpack(data, _KIND, ProfileError, what)
        try:
            if header["schema"] != _SCHEMA:
                raise ProfileError(f"{what}: schema {header['schema']} is not known, wanted {_SCHEMA}")
            columns = _columns_from(header, arrays)
            return cls(columns, _segments_from(header, arrays, columns), _labels_from(header, arrays))
        except (KeyError, TypeError, ValueError, IndexError) as failure:
            raise ProfileError(f"{what}: the profile is damaged ({type(failure).__name__})") from None

    def _contents(self) -> tuple[dict[str, Any], dict[str, Array]]:
        header: dict[str, Any] = {"schema": _SCHEMA, "columns": [_column_header(found) for found in self.columns]}
        strings = [s for found in self.columns for s in (*found.categories, *found.rare)]
        arrays = {
            "knots": np.concatenate([found.knots for found in self.columns]),
            "counts": np.concatenate([found.counts for found in self.columns]),
            "bin_of": np.concatenate([found.bin_of for found in self.columns]),
            "level_of": np.concatenate([found.level_of for found in self.columns]),
            "strings": np.frombuffer(b"".join(strings), "u1"),
            "string_sizes": np.array([len(s) for s in strings], "i8"),
        }
        if self.segments is not None:
            header["segments"] = {"column": self.segments.column, "values": list(self.segments.values)}
            arrays["segments"] = self.segments.counts
        if self.labels is not None:
            header["labels"] = {"basis": dict(self.labels.basis), "rows": self.labels.rows}
            arrays |= {"label_counts": self.labels.counts, "label_sums": self.labels.sums}
            if self.labels.cells is not None:
                arrays["label_cells"] = self.labels.cells
        return header, arrays


def tensor_column_names(tensor: str, width: int) -> list[str]:
    """How a tensor's columns are called when nobody names them."""
    return [tensor] if width == 1 else [f"{tensor}[{index}]" for index in range(width)]


def datatype_of(array: Array, what: str) -> str:
    """The V2 datatype of a numpy array; objects and texts are BYTES. Raises ProfileError for dates and the like."""
    if array.dtype.kind in "OSU":
        return BYTES
    for name, (dtype, _) in DATATYPES.items():
        if name != "BF16" and dtype == array.dtype.newbyteorder("<"):
            return name
    raise ProfileError(f"'{what}': values of dtype {array.dtype} are no tensor's; convert them to numbers or strings")


def kind_of(datatype: str) -> Kind:
    """What a column is taken for unless somebody says otherwise."""
    if datatype == BYTES:
        return "bytes"
    if datatype == "BOOL":
        return "boolean"
    return "numeric" if datatype in ("FP16", "BF16", "FP32", "FP64") else "integer"


# --- values ----------------------------------------------------------------------------------------------------------


def column_values(table: Mapping[str, Any], column: Column) -> Array:
    """float64 values as the model is sent them (NaN: missing), or an object array of ``bytes`` (b"": missing)."""
    if column.name not in table:
        raise ProfileError(f"no column '{column.name}' in the data; there are {sorted(table)}")
    if column.datatype not in DATATYPES or column.kind not in KINDS:
        raise ProfileError(f"column '{column.name}': unknown datatype {column.datatype!r} or kind {column.kind!r}")
    if (column.datatype == BYTES) != (column.kind == "bytes"):
        raise ProfileError(f"column '{column.name}': datatype BYTES and kind 'bytes' go together")
    array = _array(table[column.name], f"column '{column.name}'")
    if array.ndim != 1:
        raise ProfileError(f"column '{column.name}' must be one-dimensional, got shape {list(array.shape)}")
    return _strings(array, column) if column.datatype == BYTES else _numbers(array, column)


def _array(values: Any, what: str) -> Array:
    try:
        return np.asarray(values)
    except ValueError:
        raise ProfileError(f"{what}: not all rows have the same shape") from None


def _strings(array: Array, column: Column) -> Array:
    out = np.empty(len(array), object)
    try:
        out[:] = [_string(value) for value in array.tolist()]
    except UnicodeEncodeError as failure:
        raise ProfileError(f"column '{column.name}' holds text that UTF-8 has no bytes for: {failure.reason}") from None
    return out


def _string(value: object) -> bytes:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return b""
    return value if isinstance(value, bytes) else str(value).encode()


def _numbers(array: Array, column: Column) -> Array:
    if array.dtype.kind in "cMm":
        raise ProfileError(f"column '{column.name}' holds {array.dtype} values, wanted {column.datatype}")
    try:
        wide = array.astype("f8")
    except (ValueError, TypeError):
        raise ProfileError(f"column '{column.name}': not all values are numbers, wanted {column.datatype}") from None
    except OverflowError:
        raise ProfileError(f"column '{column.name}' holds a number that is too large for a double") from None
    return carried(_whole(wide, column), column)


def carried(wide: Array, column: Column) -> Array:
    """float64 as they are compared with the column's values: limits, and values of integers that are whole already."""
    with np.errstate(over="ignore"):
        if column.datatype == "FP16":
            return wide.astype("f2").astype("f8")
        if column.datatype == "BF16":
            return _bfloat16(wide)
        return wide.astype(column.carrier).astype("f8")


def _whole(wide: Array, column: Column) -> Array:
    """What is left of numbers in a tensor of integers or truth values; missing ones stay missing."""
    kind = kind_of(column.datatype)
    if kind == "boolean":
        return np.where(np.isnan(wide), wide, wide != 0)
    return np.trunc(wide) if kind == "integer" else wide


def _bfloat16(wide: Array) -> Array:
    """Rounded to the nearest, ties to even."""
    bits = wide.astype("f4").view("u4").astype("u8")
    rounded = np.where(np.isnan(wide), bits, bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return cast("Array", rounded.astype("u4").view("f4").astype("f8"))


# --- building --------------------------------------------------------------------------------------------------------


def _build(column: Column, values: Array, knots: int | None, bins: int) -> ColumnProfile:
    if column.datatype == BYTES:
        return _build_strings(column, values)
    present = np.sort(values[~np.isnan(values)])
    by_value = column.discrete or len(np.unique(present)) <= FEW_VALUES
    chosen = _all_knots(column, present) if knots is None or by_value else quantile_knots(present, knots)
    counts = count_cells(values, chosen)
    finite = present[np.isfinite(present)]
    with np.errstate(over="ignore", invalid="ignore"):
        mean, sd = (float(np.mean(finite)), float(np.std(finite))) if finite.size else (0.0, 0.0)
    mean, sd = (mean if math.isfinite(mean) else 0.0), (sd if math.isfinite(sd) else 0.0)
    if by_value:
        bin_of, level_of, names, levels = _value_bins(counts, [f"{knot:g}" for knot in chosen])
    else:
        bin_of, names = _quantile_bins(present, chosen, bins)
        level_of, levels = bin_of, len(names)
    return ColumnProfile(column, chosen, counts, bin_of, level_of, names, levels, mean, sd)


def _all_knots(column: Column, present: Array) -> Array:
    found = np.unique(present)
    limit = MAX_KNOWN if column.discrete else MAX_KNOTS
    if len(found) > limit:
        raise ProfileError(
            f"column '{column.name}' has {len(found)} distinct values, at most {limit} can be kept apart"
        )
    return found


def quantile_knots(ordered: Array, count: int) -> Array:
    """The distinct values among the first and the ``count`` quantiles of sorted values."""
    if not len(ordered):
        return np.empty(0)
    count = min(count, len(ordered))  # more are all the values
    places = np.minimum(np.arange(1, count + 1) * len(ordered) // count, len(ordered)) - 1
    return np.unique(ordered[np.maximum(np.concatenate([[0], places]), 0)])


def count_cells(values: Array, knots: Array) -> Array:
    """int64 counts of the ``2K + 2`` cells; the plain way, for building a profile."""
    missing = np.isnan(values)
    present = values[~missing]
    below = np.searchsorted(knots, present)
    on = knots[np.minimum(below, len(knots) - 1)] == present if len(knots) else np.zeros(len(present), bool)
    counts = np.bincount(2 * below + (on & (below < len(knots))), minlength=2 * len(knots) + 2).astype("i8")
    counts[-1] += int(missing.sum())
    return counts


def _quantile_bins(ordered: Array, knots: Array, bins: int) -> tuple[Array, tuple[str, ...]]:
    """Right-closed bins between quantiles that are knots; each edge is the largest knot at or below the quantile."""
    quantiles = np.quantile(ordered, np.arange(1, bins) / bins, method="inverted_cdf")
    places = np.unique(np.maximum(np.searchsorted(knots, quantiles, side="right") - 1, 0))
    places = places[places < len(knots) - 1]  # an edge at the maximum would leave a bin without reference
    bin_of = np.searchsorted(2 * places + 1, np.arange(2 * len(knots) + 2)).astype("i4")
    bin_of[-1] = len(places) + 1
    edges = [f"{knots[place]:g}" for place in places]
    inner = [f"({low}, {high}]" for low, high in pairwise(edges)]
    ends = [f"<= {edges[0]}", *inner, f"> {edges[-1]}"] if edges else ["any"]
    return bin_of, (*ends, MISSING_BIN)


def _value_bins(counts: Array, labels: Sequence[str]) -> tuple[Array, Array, tuple[str, ...], int]:
    """(bin_of, level_of, names of bins, levels): a bin per frequent value, rare ones together, new ones, missing."""
    known = counts[1:-1:2]
    frequent = np.flatnonzero(known >= max(1.0, RARE_SHARE * int(counts[:-1].sum())))
    names = [labels[int(j)] for j in frequent]
    place = np.full(len(known), len(names), "i4")
    place[frequent] = np.arange(len(frequent))
    if len(frequent) < len(known):
        names.append(RARE_BIN)
    bin_of = np.full(len(counts), len(names), "i4")
    bin_of[1:-1:2] = place
    bin_of[-1] = len(names) + 1
    level_of = np.full(len(counts), len(known), "i4")
    level_of[1:-1:2] = np.arange(len(known))
    level_of[-1] = len(known) + 1
    return bin_of, level_of, (*names, NEW_BIN, MISSING_BIN), len(known) + 2


def _build_strings(column: Column, values: Array) -> ColumnProfile:
    known, codes = np.unique(values, return_inverse=True) if len(values) else (values, np.empty(0, int))
    if len(known) > MAX_KNOWN:
        raise ProfileError(
            f"column '{column.name}' has {len(known)} distinct strings, at most {MAX_KNOWN} can be categories: "
            "leave it out, or group its values"
        )
    amounts = np.bincount(codes, minlength=len(known))
    strings = [(bytes(s), int(n)) for s, n in zip(known, amounts, strict=True) if s]
    missing = len(values) - sum(n for _, n in strings)
    own, rare = _own_and_rare(strings)
    sizes = [n for _, n in own] + ([sum(n for _, n in rare)] if rare else [])
    counts = np.zeros(2 * len(sizes) + 2, "i8")
    counts[1:-1:2] = sizes
    counts[-1] = missing
    labels = [s.decode("utf-8", "backslashreplace")[:64] for s, _ in own] + ([OTHERS_BIN] if rare else [])
    bin_of, level_of, names, levels = _value_bins(counts, labels)
    categories, others = tuple([s for s, _ in own]), tuple([s for s, _ in rare])
    knots = np.arange(len(sizes), dtype="f8")
    return ColumnProfile(column, knots, counts, bin_of, level_of, names, levels, 0.0, 0.0, categories, others)


def _own_and_rare(strings: list[tuple[bytes, int]]) -> tuple[list[tuple[bytes, int]], list[tuple[bytes, int]]]:
    """The most frequent strings in their own order, and those that must share one cell."""
    if len(strings) <= MAX_CATEGORIES:
        return strings, []
    ranked = sorted(strings, key=lambda found: (-found[1], found[0]))
    return sorted(ranked[: MAX_CATEGORIES - 1]), sorted(ranked[MAX_CATEGORIES - 1 :])


# --- files -----------------------------------------------------------------------------------------------------------


def _column_header(found: ColumnProfile) -> dict[str, Any]:
    return {
        **asdict(found.column),
        "knots": len(found.knots),
        "bins": list(found.bins),
        "levels": found.levels,
        "mean": found.mean,
        "sd": found.sd,
        "categories": len(found.categories),
        "rare": len(found.rare),
    }


def _columns_from(header: Mapping[str, Any], arrays: Mapping[str, Array]) -> tuple[ColumnProfile, ...]:
    blob = arrays["strings"].tobytes()
    ends = np.cumsum(arrays["string_sizes"])
    strings = [blob[end - size : end] for end, size in zip(ends.tolist(), arrays["string_sizes"].tolist(), strict=True)]
    built: list[ColumnProfile] = []
    knot = cell = string = 0
    fields: Collection[str] = Column.__dataclass_fields__
    for entry in header["columns"]:
        count = int(entry["knots"])
        cells = slice(cell, cell + 2 * count + 2)
        middle, last = string + int(entry["categories"]), string + int(entry["categories"]) + int(entry["rare"])
        found = ColumnProfile(
            Column(**{name: entry[name] for name in fields}),
            arrays["knots"][knot : knot + count],
            arrays["counts"][cells],
            arrays["bin_of"][cells],
            arrays["level_of"][cells],
            tuple(entry["bins"]),
            int(entry["levels"]),
            float(entry["mean"]),
            float(entry["sd"]),
            tuple(strings[string:middle]),
            tuple(strings[middle:last]),
        )
        _check(found)
        built.append(found)
        knot, cell, string = knot + count, cells.stop, last
    if knot != len(arrays["knots"]) or cell != len(arrays["counts"]) or not built:
        raise ValueError("sizes")
    return tuple(built)


def _segments_from(
    header: Mapping[str, Any], arrays: Mapping[str, Array], columns: Sequence[ColumnProfile]
) -> SegmentReference | None:
    if "segments" not in header:
        return None
    column, values = str(header["segments"]["column"]), tuple(header["segments"]["values"])
    counts = arrays["segments"]
    if counts.shape != (len(values), sum(len(found.counts) for found in columns)) or counts.min(initial=0) < 0:
        raise ValueError("segments")
    if not all(isinstance(value, str | int | float) for value in values):
        raise ValueError("segments")
    return SegmentReference(column, values, counts)


def _labels_from(header: Mapping[str, Any], arrays: Mapping[str, Array]) -> LabelReference | None:
    if "labels" not in header:
        return None
    counts, sums, cells = arrays["label_counts"], arrays["label_sums"], arrays.get("label_cells")
    rows, basis = int(header["labels"]["rows"]), dict(header["labels"]["basis"])
    if rows < 1 or counts.ndim != 1 or sums.ndim != 2 or sums.dtype != np.uint8 or counts.min(initial=0) < 0:
        raise ValueError("labels")
    if cells is not None and (cells.ndim != 2 or len(cells) != 2 or cells.min(initial=0) < 0):
        raise ValueError("labels")
    return LabelReference(basis, rows, counts, sums, cells)


def _check(found: ColumnProfile) -> None:
    """What the kernels take on trust: sizes, order of knots, and bins in range."""
    cells = 2 * len(found.knots) + 2
    sizes = {len(found.counts), len(found.bin_of), len(found.level_of)}
    ascending = bool((np.diff(found.knots) > 0).all()) and not np.isnan(found.knots).any()
    bins = found.bin_of.min() >= 0 and found.bin_of.max() < len(found.bins)
    levels = found.level_of.min() >= 0 and found.level_of.max() < found.levels
    if sizes != {cells} or not (ascending and bins and levels and found.counts.min() >= 0):
        raise ValueError("columns")
    if found.column.datatype not in DATATYPES or not 0 <= found.column.index < found.column.width:
        raise ValueError("datatype or index")
