"""From tables in files to a model's tensors: which column is which element, and what the model answers to them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from monitor.errors import ProfileError
from monitor.loaders import TEXT_FILES, read_table
from monitor.profile import datatype_of, kind_of, tensor_column_names
from monitor.types import KINDS, Column, Kind, Source
from server.codec.dtypes import bfloat16_bits, bfloat16_values
from server.errors import InvalidArgument
from server.runtime.base import Batch, Engine, LoadRequest, ModelOptions
from server.types import ALL_DATATYPES, BYTES, DATATYPES, ModelSpec, TensorSpec

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Table: TypeAlias = Mapping[str, Array]

#: Columns of a profile at most: a tensor of an image is no table.
MOST_COLUMNS: Final = 4096
#: Columns of samples and captured rows that are not the model's begin so: when, on which arm, by whom a row came.
RESERVED: Final = "__"
#: What became of a captured request: the model was not run over the rows of those that failed.
_STATUS: Final = f"{RESERVED}status"
_ANSWERED: Final = ("ok", b"ok")
_PLACE: Final = re.compile(r"([^=]+)=([^\[\]=]+)(?:\[(\d{1,9})\])?")


@dataclass(slots=True)
class Tabular:
    """``columns`` with their values in ``table``, one-dimensional each."""

    columns: list[Column]
    table: dict[str, Array]

    def add(self, name: str, values: Array, column: Column) -> None:
        if name in self.table:
            raise InvalidArgument(f"column names must differ, got '{name}' twice")
        self.columns.append(column)
        self.table[name] = values


# --- reading ---------------------------------------------------------------------------------------------------------


def read_tables(
    paths: Sequence[Path], columns: Collection[str] | None = None, *, texts: bool = False
) -> dict[str, Array]:
    """All rows of several files with the same columns, in the order given. ``columns`` and ``texts`` as
    ``monitor.loaders.read_table`` has them."""
    parts = [_read(path, columns, texts) for path in paths]
    first = parts[0]
    for path, part in zip(paths[1:], parts[1:], strict=True):
        if part.keys() != first.keys():
            raise InvalidArgument(f"{path.name} has other columns than {paths[0].name}: {_differing(first, part)}")
    if len(parts) == 1:
        return first
    try:
        return {name: np.concatenate([part[name] for part in parts]) for name in first}
    except ValueError as error:
        raise InvalidArgument(f"the files' columns cannot be put together: {error}") from error


def _read(path: Path, columns: Collection[str] | None, texts: bool) -> dict[str, Array]:
    try:
        found = read_table(path, columns, texts=texts)
    except ProfileError as error:
        raise InvalidArgument(str(error)) from error
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror or error}") from error
    single = sorted([name for name, values in found.items() if not values.ndim])
    if single:
        raise InvalidArgument(f"{path.name}: '{single[0]}' is a single value, wanted one per row")
    status = found.get(_STATUS) if columns is None else _status(path)
    own = {name: values for name, values in found.items() if not name.startswith(RESERVED)}
    if status is None:
        return own
    answered = np.array([value in _ANSWERED for value in status.tolist()], bool)
    return {name: values[answered] if len(values) == len(answered) else values for name, values in own.items()}


def _status(path: Path) -> Array | None:
    """What became of each captured request of a file that can be read; None for rows that were not captured."""
    try:
        return read_table(path, [_STATUS])[_STATUS]
    except ProfileError:
        return None


def _differing(one: Table, other: Table) -> str:
    names = sorted(one.keys() ^ other.keys())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_signature(path: Path) -> ModelSpec:
    """A model's signature from JSON: ``inputs`` and ``outputs`` with name, datatype and shape, as V2 metadata has them.

    They may also stand under ``signature``, as in a registry description. The first dimension is the batch.
    """
    try:
        found = json.loads(path.read_bytes())
        found = found.get("signature", found)
        sides = [tuple([_tensor(entry) for entry in found.get(side, [])]) for side in ("inputs", "outputs")]
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidArgument(f"{path.name}: wanted JSON with inputs and outputs of a model: {error}") from error
    return ModelSpec(path.stem, "", sides[0], sides[1], max_batch_size=1)


def _tensor(entry: Mapping[str, Any]) -> TensorSpec:
    datatype, shape = str(entry["datatype"]), tuple([int(dim) for dim in entry["shape"]])
    if datatype not in ALL_DATATYPES:
        raise ValueError(f"unknown datatype {datatype!r}")
    return TensorSpec(str(entry["name"]), datatype, shape)


# --- columns to elements ---------------------------------------------------------------------------------------------


def arrange(
    table: Table, spec: ModelSpec | None, places: Sequence[str] = (), kinds: Mapping[str, Kind] | None = None
) -> Tabular:
    """The columns of a table as elements of tensors. ``places``: ``column=tensor[index]`` each.

    Without places: by tensors' names, by names such as ``tensor[3]``, or the columns in order as the elements of the
    only input. Columns of outputs are taken along where they are named after them. Raises InvalidArgument.
    """
    found = Tabular([], {})
    if places:
        _by_places(found, table, spec, places)
    elif spec is None:
        for name, values in table.items():
            _whole(found, name, values, "input", datatype_of(values, name), None)
    else:
        _by_spec(found, table, spec)
    if not found.columns:
        raise InvalidArgument("the data have no column that the model knows")
    if len(found.columns) > MOST_COLUMNS:
        raise InvalidArgument(f"{len(found.columns)} columns are too many, at most {MOST_COLUMNS} can be watched")
    return with_kinds(found, kinds or {})


def with_kinds(found: Tabular, kinds: Mapping[str, Kind]) -> Tabular:
    """The same columns, some of another kind. Raises InvalidArgument for a column that is not there."""
    for name in kinds:
        if name not in found.table:
            raise InvalidArgument(f"--kind: there is no column '{name}'; there are {_some(found.table)}")
    columns = [replace(column, kind=kinds.get(column.name, column.kind)) for column in found.columns]
    return Tabular(columns, found.table)


def with_strings(found: Tabular, paths: Sequence[Path], strings: Sequence[str] | None = None) -> Tabular:
    """The same with every string as the files have it: ``007`` in a text file was taken for a number, as long as nobody
    knew that the model takes a string there. ``strings``: the columns that hold some, by default those that say so."""
    names = strings
    if names is None:
        names = [column.name for column in found.columns if column.datatype == BYTES]
    if not names or not any(path.name.lower().endswith(TEXT_FILES) for path in paths):
        return found
    return Tabular(found.columns, {**found.table, **read_tables(paths, names, texts=True)})


def width_of(spec: TensorSpec) -> int | None:
    """Elements of a row; None where the model leaves them free. The first dimension is the batch."""
    tail = spec.shape[1:]
    return None if any(dim < 0 for dim in tail) else math.prod(tail)


def _by_spec(found: Tabular, table: Table, spec: ModelSpec) -> None:
    names = {tensor.name for tensor in spec.outputs}
    named = [_own(tensor, table) for tensor in spec.inputs]
    if all(columns is not None for columns in named):
        for tensor, columns in zip(spec.inputs, named, strict=True):
            _take(found, table, tensor, columns or [], "input")
    elif len(spec.inputs) == 1:
        elements = {element for tensor in spec.outputs for element in _own(tensor, table) or ()}
        _take(found, table, spec.inputs[0], [name for name in table if name not in names | elements], "input")
    else:
        wanted = ", ".join([tensor.name for tensor in spec.inputs])
        raise InvalidArgument(f"the model has the inputs {wanted}, which the data do not name: use --map COLUMN=TENSOR")
    for tensor in spec.outputs:
        columns = _own(tensor, table)
        if columns is not None and columns[0] not in found.table:
            _take(found, table, tensor, columns, "output")


def _own(tensor: TensorSpec, table: Table) -> list[str] | None:
    """The columns that are named after a tensor or after its elements; None when there are none such."""
    if tensor.name in table:
        return [tensor.name]
    width = width_of(tensor)
    if width is None:
        width = next((i for i in range(MOST_COLUMNS + 1) if f"{tensor.name}[{i}]" not in table), 0)
    names = tensor_column_names(tensor.name, width) if 0 < width <= MOST_COLUMNS else []
    return names if names and all(name in table for name in names) else None


def _take(found: Tabular, table: Table, tensor: TensorSpec, columns: Sequence[str], source: Source) -> None:
    """One tensor: a whole array under its name, or a column for each of its elements."""
    width = width_of(tensor)
    if len(columns) == 1 and (columns[0] == tensor.name or table[columns[0]].ndim > 1):
        _whole(found, tensor.name, table[columns[0]], source, tensor.datatype, width)
        return
    if width is not None and len(columns) != width:
        raise InvalidArgument(
            f"{source} '{tensor.name}' has {width} elements a row, the data have {len(columns)} columns: use "
            "--map COLUMN=TENSOR[INDEX] to say which is which"
        )
    for index, name in enumerate(columns):
        column = Column(name, tensor.name, source, index, len(columns), tensor.datatype, kind_of(tensor.datatype))
        found.add(name, table[name], column)


def _whole(found: Tabular, name: str, values: Array, source: Source, datatype: str, width: int | None) -> None:
    if not values.size:
        raise InvalidArgument(f"'{name}' has no rows, or no element in them")
    flat = values.reshape(len(values), -1)
    if flat.shape[1] != (flat.shape[1] if width is None else width):
        raise InvalidArgument(f"{source} '{name}' has {width} elements a row, the data have {flat.shape[1]}")
    if flat.shape[1] > MOST_COLUMNS:
        raise InvalidArgument(f"'{name}' has {flat.shape[1]} elements a row, at most {MOST_COLUMNS} can be columns")
    for index, label in enumerate(tensor_column_names(name, flat.shape[1])):
        column = Column(label, name, source, index, flat.shape[1], datatype, kind_of(datatype))
        found.add(label, flat[:, index], column)


def _by_places(found: Tabular, table: Table, spec: ModelSpec | None, places: Sequence[str]) -> None:
    parsed = [_place(text) for text in places]
    tensors: dict[str, tuple[Source, TensorSpec]] = {}
    if spec is not None:
        tensors |= {tensor.name: ("input", tensor) for tensor in spec.inputs}
        tensors |= {tensor.name: ("output", tensor) for tensor in spec.outputs if tensor.name not in tensors}
    for column, tensor, index in parsed:
        if column not in table or table[column].ndim != 1:
            raise InvalidArgument(f"--map: the data have no column '{column}'; they have {_some(table)}")
        if spec is not None and tensor not in tensors:
            raise InvalidArgument(f"--map: the model has no tensor '{tensor}'; it has {_some(tensors)}")
        most = max([other for _, name, other in parsed if name == tensor]) + 1
        source, declared = tensors.get(tensor, ("input", TensorSpec(tensor, "", (-1, most))))
        width = width_of(declared) or most
        if index >= width:
            raise InvalidArgument(f"--map: '{tensor}' has {width} elements a row, got index {index}")
        first = next(other for other, *element in parsed if element == [tensor, index])
        if first != column:
            raise InvalidArgument(f"--map: '{first}' and '{column}' are both mapped to {tensor}[{index}]")
        datatype = declared.datatype or datatype_of(table[column], column)
        found.add(column, table[column], Column(column, tensor, source, index, width, datatype, kind_of(datatype)))


def _place(text: str) -> tuple[str, str, int]:
    parts = _PLACE.fullmatch(text)
    if parts is None:
        raise InvalidArgument(f"--map: wanted COLUMN=TENSOR or COLUMN=TENSOR[INDEX], got {text!r}")
    return parts[1], parts[2], int(parts[3] or 0)


def _some(names: Mapping[str, object]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(list(names)[:10]) or "none") + more


def parse_kinds(texts: Sequence[str]) -> dict[str, Kind]:
    """``column=categorical`` each. Raises InvalidArgument."""
    kinds: dict[str, Kind] = {}
    for text in texts:
        name, mark, wanted = text.rpartition("=")
        known = next((kind for kind in KINDS if kind == wanted), None)
        if not mark or not name or known is None:
            raise InvalidArgument(f"--kind: wanted COLUMN=KIND with one of {', '.join(KINDS)}, got {text!r}")
        kinds[name] = known
    return kinds


# --- running the model -----------------------------------------------------------------------------------------------


def load(model: Path) -> Engine:
    """The model as the server would run it, but for batch sizes, which are not measured. Raises ModelLoadError."""
    from server.runtime.onnx import OnnxRuntime

    request = LoadRequest(model.stem, "1", model, ModelOptions())
    return OnnxRuntime(measure_budget_s=0).load(request)


def add_outputs(found: Tabular, engine: Engine) -> None:
    """Run the model over all rows and add its outputs as columns. Raises InvalidArgument, or what a run raises."""
    spec = engine.spec
    tensors = [input_rows(found, tensor) for tensor in spec.inputs]
    parts = list(run_rows(engine, tensors))
    for place, tensor in enumerate(spec.outputs):
        if any(column.tensor == tensor.name and column.source == "output" for column in found.columns):
            continue
        values = np.concatenate([part[place] for part in parts])
        _whole(found, tensor.name, values, "output", tensor.datatype, None)


def input_rows(found: Tabular, tensor: TensorSpec) -> Array:
    """(rows, elements) of one input, in the type that the model takes."""
    columns = sorted(
        [c for c in found.columns if (c.tensor, c.source) == (tensor.name, "input")], key=lambda c: c.index
    )
    if not columns or [column.index for column in columns] != list(range(columns[0].width)):
        raise InvalidArgument(f"wanted every element of input '{tensor.name}', the data have {len(columns)}")
    return np.stack([_typed(found.table[column.name], column) for column in columns], axis=1)


def _typed(values: Array, column: Column) -> Array:
    if column.datatype == BYTES:
        out = np.empty(len(values), object)
        out[:] = [_text(value) for value in values.tolist()]
        return out
    try:
        wide = values.astype("f8") if values.dtype == object else values
        if column.datatype == "BF16":
            return bfloat16_bits(wide.astype("f8"))
        dtype = DATATYPES[column.datatype][0]
        if dtype.kind in "iub" and wide.dtype.kind == "f" and not np.isfinite(wide).all():
            raise InvalidArgument(f"column '{column.name}' has missing values, which {column.datatype} cannot carry")
        return wide.astype(dtype)
    except (ValueError, TypeError):
        raise InvalidArgument(f"column '{column.name}' is not all numbers, wanted {column.datatype}") from None


def _text(value: object) -> bytes:
    return value if isinstance(value, bytes) else b"" if value is None else str(value).encode()


def run_rows(engine: Engine, tensors: Sequence[Array]) -> Iterator[list[Array]]:
    """Outputs, one list per run of at most ``max_batch_size`` rows; models that do not batch are run row by row."""
    for batch in batches(engine.spec, tensors, engine.spec.max_batch_size or 1):
        yield [_output(tensor.array(), tensor.datatype, batch.rows) for tensor in engine.run(0, batch)]


def batches(spec: ModelSpec, tensors: Sequence[Array], step: int) -> Iterator[Batch]:
    """All rows, ``step`` at a time; ``tensors``: (rows, elements) per input. Raises InvalidArgument."""
    shapes = [_row_shape(known, tensor.shape[1]) for known, tensor in zip(spec.inputs, tensors, strict=True)]
    for start in range(0, len(tensors[0]), step):
        taken = [tensor[start : start + step] for tensor in tensors]
        count = len(taken[0])
        yield Batch(count, [(count, *shape) for shape in shapes], [[_contents(part)] for part in taken])


def _row_shape(spec: TensorSpec, width: int) -> tuple[int, ...]:
    if not spec.shape or spec.shape[0] not in (-1, 1):
        raise InvalidArgument(f"input '{spec.name}' of shape {list(spec.shape)} takes no single rows")
    free = [place for place, dim in enumerate(spec.shape[1:]) if dim < 0]
    if len(free) > 1:
        raise InvalidArgument(f"input '{spec.name}' of shape {list(spec.shape)} has more than one free dimension")
    known = math.prod([dim for dim in spec.shape[1:] if dim >= 0])
    return tuple([width // max(1, known) if dim < 0 else dim for dim in spec.shape[1:]])


def _contents(part: Array) -> bytes | list[bytes]:
    return part.reshape(-1).tolist() if part.dtype == object else np.ascontiguousarray(part).tobytes()


def _output(values: Array, datatype: str, rows: int) -> Array:
    read = bfloat16_values(values) if datatype == "BF16" else values
    if not read.shape or read.shape[0] != rows:
        raise InvalidArgument(f"an output of shape {list(read.shape)} is not one value per row")
    return np.array(read)
