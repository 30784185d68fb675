"""From columns of a table to a model's inputs: which column is which element, and the numbers as the model takes them.

A tensor's elements come from, in this order: what ``--map`` says; a column of its name (a number, or a list or an array
for each row); columns ``x[0]``, ``x[1]``, ...; or, for a model's only input, all columns in their order. Values are
converted only where that is meant: what an integer type cannot hold exactly is refused, floats round once and are
refused where that gives infinity. What is missing is NaN among floats, "" among texts, and refused elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from server.capture.formats import Array, Table
from server.codec.dtypes import bfloat16_bits
from server.errors import InvalidArgument
from server.types import BYTES, DATATYPES, ModelSpec, Tensor, TensorSpec

_PLACE: Final = re.compile(r"([^=]+)=([^\[\]=]+)(?:\[(\d{1,9})\])?")
#: The exponent that infinities have in the bits of BF16, and NaN.
_BF16_INFINITE: Final = 0x7F80
_BOOLEANS: Final = {"true": True, "false": False, "1": True, "0": False}


@dataclass(slots=True, frozen=True)
class Source:
    """Where one input's elements are: ``columns`` in order, or a single one that may hold all of them (``whole``)."""

    spec: TensorSpec
    columns: tuple[str, ...]
    whole: bool


def resolve(spec: ModelSpec, names: Sequence[str], places: Sequence[str] = ()) -> list[Source | None]:
    """The source of every input in the model's order, None for an optional one that is not there.

    ``names``: the table's columns in order; ``places``: ``COLUMN=TENSOR[INDEX]`` each. Raises InvalidArgument.
    """
    mapped = _parsed(spec, names, places)
    batched = spec.max_batch_size > 0
    found = [_source(tensor, names, mapped.get(tensor.name), batched) for tensor in spec.inputs]
    missing = [tensor.name for tensor, source in zip(spec.inputs, found, strict=True) if source is None]
    if len(spec.inputs) == 1 and missing and not mapped:
        return [Source(spec.inputs[0], tuple(names), whole=len(names) == 1)]
    wanted = [tensor.name for tensor in spec.inputs if tensor.name in missing and not tensor.optional]
    if wanted:
        raise InvalidArgument(
            f"the data have no columns for the inputs {', '.join(wanted)}: their columns are {_some(names)}; "
            "say which is which with --map COLUMN=TENSOR[INDEX]"
        )
    return found


def _source(tensor: TensorSpec, names: Sequence[str], mapped: dict[int, str] | None, batched: bool) -> Source | None:
    width = width_of(tensor, batched)
    if mapped is not None:
        wanted = max(mapped) + 1 if width is None else width
        if sorted(mapped) != list(range(wanted)) and not (len(mapped) == 1 and 0 in mapped):
            raise InvalidArgument(f"--map: input '{tensor.name}' has {wanted} elements a row, {len(mapped)} are mapped")
        return Source(tensor, tuple([mapped[index] for index in sorted(mapped)]), whole=len(mapped) == 1)
    if tensor.name in names:
        return Source(tensor, (tensor.name,), whole=True)
    known = set(names)
    count = width if width is not None else next(i for i in range(len(names) + 1) if f"{tensor.name}[{i}]" not in known)
    elements = tuple([f"{tensor.name}[{index}]" for index in range(min(count, len(names) + 1))])
    return Source(tensor, elements, whole=False) if elements and known.issuperset(elements) else None


def _parsed(spec: ModelSpec, names: Sequence[str], places: Sequence[str]) -> dict[str, dict[int, str]]:
    """Tensor -> index -> column."""
    mapped: dict[str, dict[int, str]] = {}
    inputs = [tensor.name for tensor in spec.inputs]
    for place in places:
        parts = _PLACE.fullmatch(place)
        if parts is None:
            raise InvalidArgument(f"--map: wanted COLUMN=TENSOR or COLUMN=TENSOR[INDEX], got {place!r}")
        column, tensor, index = parts[1], parts[2], int(parts[3] or 0)
        if column not in names:
            raise InvalidArgument(f"--map: the data have no column '{column}'; they have {_some(names)}")
        if tensor not in inputs:
            raise InvalidArgument(f"--map: the model has no input '{tensor}'; it has {_some(inputs)}")
        if mapped.setdefault(tensor, {}).setdefault(index, column) != column:
            raise InvalidArgument(f"--map: element {index} of '{tensor}' is mapped twice")
    return mapped


def width_of(tensor: TensorSpec, batched: bool) -> int | None:
    """Elements of a row; None where the model leaves that free."""
    tail = tensor.shape[1:] if batched else tensor.shape
    return None if any(dim < 0 for dim in tail) else math.prod(tail)


# --- values ----------------------------------------------------------------------------------------------------------


def rows_of(source: Source, table: Table, batched: bool) -> Array | list[Array]:
    """One array for each row of the table, each with the shape that the model takes for one row, in its type.

    Rows of one shape are one array with an axis more.
    """
    if not source.whole:
        columns = [_typed(table[name], source.spec.datatype, name) for name in source.columns]
        joined = np.stack(columns, axis=1)
    else:
        values = table[source.columns[0]]
        if values.dtype == object and any(isinstance(value, list | np.ndarray) for value in values):
            parts = [_typed(_row(value), source.spec.datatype, source.columns[0]) for value in values]
            return [_shaped(source, part, batched) for part in parts]
        joined = _typed(values, source.spec.datatype, source.columns[0])
    joined = joined.reshape(len(joined), *(joined.shape[1:] or (1,)))
    return joined.reshape(len(joined), *_shaped(source, joined[0], batched).shape)


def _row(value: object) -> Array:
    """One row's list; lists in lists keep their shape."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value
    return np.array(_plain(value), object)


def _plain(value: object) -> object:
    """Lists in lists, with byte strings that numpy takes for one value: a bytearray would be a list of numbers."""
    if isinstance(value, np.ndarray | list):
        return [_plain(item) for item in value]
    return bytes(value) if isinstance(value, bytearray) else value


def _shaped(source: Source, row: Array, batched: bool) -> Array:
    """A row in the model's shape; a free dimension is what the number of elements leaves."""
    tail = source.spec.shape[1:] if batched else source.spec.shape
    if row.ndim == len(tail) and all(want in (-1, got) for want, got in zip(tail, row.shape, strict=True)):
        return row
    free = [place for place, dim in enumerate(tail) if dim < 0]
    known = math.prod([dim for dim in tail if dim >= 0])
    if len(free) > 1:
        raise InvalidArgument(
            f"input '{source.spec.name}' of shape {list(source.spec.shape)} leaves more than one dimension free: "
            "give arrays of its shape"
        )
    if (row.size != known) if not free else (not known or row.size % known):
        wanted = "a multiple of " if free else ""
        raise InvalidArgument(
            f"input '{source.spec.name}' has {wanted}{known} elements a row, the data have {row.size}"
        )
    return row.reshape([row.size // known if dim < 0 else dim for dim in tail])


def tensor_of(source: Source, rows: Array | Sequence[Array], batched: bool) -> Tensor:
    """Rows of one shape as one tensor."""
    spec = source.spec
    joined: Array = rows[0]
    if batched:
        joined = rows if isinstance(rows, np.ndarray) else np.stack(rows)
    data: Any = joined.reshape(-1).tolist() if spec.datatype == BYTES else np.ascontiguousarray(joined).tobytes()
    return Tensor(spec.name, spec.datatype, joined.shape, data)


def _typed(values: Array, datatype: str, column: str) -> Array:
    """Values as a datatype's own numpy type: numbers, texts of numbers, or for BYTES anything that has a text."""
    if datatype == BYTES:
        return _objects([_bytes(value) for value in values.reshape(-1)]).reshape(values.shape)
    if DATATYPES[datatype][0].kind != "f" and datatype != "BF16" and _lacks(values):
        raise InvalidArgument(f"column '{column}' has values that are missing, and {datatype} has none for them")
    try:
        if datatype == "BOOL" and values.dtype.kind in "OUS":
            flat = [_BOOLEANS[str(value).strip().lower()] for value in values.reshape(-1)]
            return np.array(flat, "?").reshape(values.shape)
        if datatype == "BF16":
            wide = _floats(values)
            bits = bfloat16_bits(wide)
            _require_range(wide, (bits & _BF16_INFINITE) != _BF16_INFINITE, datatype, column)
            return bits
        return _number(values, DATATYPES[datatype][0], datatype, column)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise InvalidArgument(f"column '{column}' has values that are no {datatype}") from None


def _number(values: Array, dtype: np.dtype[Any], datatype: str, column: str) -> Array:
    if dtype.kind == "f":
        wide = values if values.dtype.kind in "fiub" else _floats(values)
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = wide.astype(dtype)
        _require_range(wide, np.isfinite(narrow), datatype, column)
        return narrow
    if values.dtype.kind in "OUS":
        values = _integers(values)
    with np.errstate(invalid="ignore"):
        found = values.astype(dtype)
    if not np.array_equal(found, values):
        raise InvalidArgument(f"column '{column}' has values that {datatype} cannot hold exactly")
    return found


def _require_range(values: Array, fits: Array, datatype: str, column: str) -> None:
    """InvalidArgument for a finite number that the datatype has only infinity for, as online."""
    if not fits.all() and np.isfinite(values[~fits]).any():
        raise InvalidArgument(f"column '{column}' has values outside the range of {datatype}")


def _lacks(values: Array) -> bool:
    return values.dtype == object and any(value is None for value in values.reshape(-1))


def _floats(values: Array) -> Array:
    """Missing values are NaN."""
    if values.dtype.kind != "O" and values.dtype.kind not in "US":
        return values.astype(np.float64)
    flat = [math.nan if value is None or value == "" else float(value) for value in values.reshape(-1)]
    return np.array(flat, np.float64).reshape(values.shape)


def _integers(values: Array) -> Array:
    """Whole numbers of any size, from texts or from what JSON and Parquet give."""
    flat = [_whole_text(value) if isinstance(value, str) else _whole(value) for value in values.reshape(-1)]
    return _objects(flat).reshape(values.shape)


def _whole(value: Any) -> int:
    if value != int(value):
        raise ValueError("not a whole number")
    return int(value)


def _whole_text(text: str) -> int:
    """A whole number as text, also with zeros behind its point as decimals have them."""
    whole, point, behind = text.strip().partition(".")
    if point and behind.strip("0"):
        raise ValueError("not a whole number")
    return int(whole)


def _bytes(value: object) -> bytes:
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    return b"" if value is None else str(value).encode("utf-8", "surrogateescape")


def _objects(values: Sequence[object]) -> Array:
    out = np.empty(len(values), object)
    out[:] = values
    return out


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "none") + more
