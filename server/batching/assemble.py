"""Members' tensors to one ``Batch`` and the batch's outputs back to each member's own. No copies but those of padding
and of small shares.

**Row plan.** Members may share a batch when they leave out the same optional inputs and their inputs agree on every
dimension after the batch, once padded. Datatypes and fixed dimensions are the spec's: the gateway has checked them.

**Padding** happens for inputs with declared buckets only. Such an input has exactly one free axis (the batch axis
aside); its contents are extended at the end of that axis, with the declared value (0 if none; an empty string for
BYTES), to the smallest bucket that holds them. What comes back is cut: an output axis is shortened to the size that
the member had sent when

* the spec leaves that output axis free, and a padded input has its free axis at the same position, and
* the output's size there is the padded size, and
* all padded inputs of which both is true had the same size before padding.

Otherwise the output is passed on as the model gave it. Nothing is promised about values: a model whose results depend
on padding needs a mask among its inputs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple, TypeAlias, cast

import numpy as np

from server.errors import ConfigError, InvalidArgument, RuntimeFailure
from server.runtime.base import Batch, BatchingOptions
from server.types import BYTES, DATATYPES, Buffer, ModelSpec, Tensor, TensorSpec

#: Shares of up to this size on average are copied out of the batch.
_COPIED_BYTES: Final = 4096


#: One member's part of a batch, in spec order; None is an absent optional input.
Inputs: TypeAlias = list[Tensor | None]


class _Bucketed(NamedTuple):
    """An input with buckets: its free axis, the ascending sizes, and the padding element (None for BYTES)."""

    name: str
    axis: int
    sizes: tuple[int, ...]
    fill: np.generic | None

    def padded(self, size: int) -> int:
        place = bisect_left(self.sizes, size)
        if place == len(self.sizes):
            raise InvalidArgument(
                f"input '{self.name}': the size of dimension {self.axis} must be at most {self.sizes[-1]}, the largest "
                f"declared bucket, got {size}"
            )
        return self.sizes[place]


class Layout:
    """How members of one loaded version are put together and taken apart. Raises ConfigError for impossible buckets."""

    def __init__(self, spec: ModelSpec, options: BatchingOptions) -> None:
        self._batched = spec.max_batch_size > 0
        self._buckets = _compile_buckets(spec, options)
        #: Inputs that can differ between two valid requests; the others need no place in the plan.
        self._varying = [
            index
            for index, declared in enumerate(spec.inputs)
            if declared.optional or _free_axes(declared, self._batched)
        ]
        self._cuts = [self._cuts_of(declared) for declared in spec.outputs] if self._buckets else []

    def _cuts_of(self, output: TensorSpec) -> dict[int, list[int]]:
        """Output axis -> the bucketed inputs that can have made it grow."""
        cuts: dict[int, list[int]] = {}
        for index, bucketed in self._buckets.items():
            if bucketed.axis in _free_axes(output, self._batched):
                cuts.setdefault(bucketed.axis, []).append(index)
        return cuts

    def plan(self, inputs: Sequence[Tensor | None]) -> Hashable:
        """The row plan: equal for members that may share a batch. InvalidArgument when over the largest bucket."""
        if not self._varying:
            return ()
        return tuple([self._row_shape(index, inputs[index]) for index in self._varying])

    def _row_shape(self, index: int, tensor: Tensor | None) -> tuple[int, ...] | None:
        if tensor is None:
            return None
        shape = self._padded_shape(index, tensor) if index in self._buckets else tensor.shape
        return shape[1:] if self._batched else shape

    def _padded_shape(self, index: int, tensor: Tensor) -> tuple[int, ...]:
        bucketed = self._buckets[index]
        shape, axis = tensor.shape, bucketed.axis
        return (*shape[:axis], bucketed.padded(shape[axis]), *shape[axis + 1 :])

    def join(self, members: list[Inputs], rows: int) -> Batch:
        """One batch of members that share a row plan and have so many rows in all.

        Contents are referred to, not copied, unless padded.
        """
        shapes: list[tuple[int, ...]] = []
        parts: list[list[Buffer | list[bytes]] | None] = []
        for index, first in enumerate(members[0]):
            if first is None:
                shapes.append(())
                parts.append(None)
                continue
            # The plan says which are absent, and it is the same for all.
            present = [cast("Tensor", inputs[index]) for inputs in members]
            if index in self._buckets:
                present = [self._pad(index, tensor) for tensor in present]
            shape = present[0].shape
            shapes.append((rows, *shape[1:]) if self._batched else shape)
            parts.append([tensor.data for tensor in present])
        return Batch(rows, shapes, parts)

    def _pad(self, index: int, tensor: Tensor) -> Tensor:
        shape = self._padded_shape(index, tensor)
        return tensor if shape == tensor.shape else _pad(tensor, shape, self._buckets[index])

    def split(self, members: list[Inputs], rows: list[int], outputs: list[Tensor]) -> list[list[Tensor]]:
        """Each member's own outputs, as slices of the batch's, ``rows[i]`` for member i. One alone gets them unchanged.

        Raises RuntimeFailure when an output's first dimension is not the rows of a batch of several members.
        """
        if len(members) == 1:
            shares = [outputs]
        else:
            shares = [[] for _ in members]
            for tensor in outputs:
                _deal(tensor, rows, shares)
        if self._buckets:
            return [self._unpad(inputs, share) for inputs, share in zip(members, shares, strict=True)]
        return shares

    def _unpad(self, inputs: Inputs, outputs: list[Tensor]) -> list[Tensor]:
        return [
            _cut(tensor, sizes) if (sizes := self._sent_sizes(inputs, tensor, cuts)) else tensor
            for tensor, cuts in zip(outputs, self._cuts, strict=True)
        ]

    def _sent_sizes(self, inputs: Inputs, output: Tensor, cuts: dict[int, list[int]]) -> dict[int, int]:
        """Output axis -> the size to cut it back to, for the axes that grew beyond doubt."""
        sizes: dict[int, int] = {}
        for axis, indexes in cuts.items():
            sent = {
                tensor.shape[axis]
                for index in indexes
                if (tensor := inputs[index]) is not None
                and len(output.shape) > axis
                and self._buckets[index].padded(tensor.shape[axis]) == output.shape[axis]
            }
            if len(sent) == 1 and (size := sent.pop()) != output.shape[axis]:
                sizes[axis] = size
        return sizes


# --- slices ----------------------------------------------------------------------------------------------------------


def _deal(tensor: Tensor, counts: list[int], shares: list[list[Tensor]]) -> None:
    """The tensor's rows, ``counts[i]`` of them to ``shares[i]``."""
    total = sum(counts)
    if not tensor.shape or tensor.shape[0] != total:
        raise RuntimeFailure(
            f"output '{tensor.name}' of a batch of {total} rows has shape {list(tensor.shape)}: its first dimension "
            f"must be the batch"
        )
    name, datatype, row_shape, data = tensor.name, tensor.datatype, tensor.shape[1:], tensor.data
    if isinstance(data, bytes) and len(data) <= _COPIED_BYTES * len(counts):
        _deal_copies(name, datatype, row_shape, data, counts, len(data) // total, shares)
        return
    source: memoryview | list[bytes] = data if isinstance(data, list) else _flat(data)
    step = len(source) // total
    start = 0
    for count, share in zip(counts, shares, strict=True):
        end = start + count * step
        share.append(Tensor(name, datatype, (count, *row_shape), source[start:end]))
        start = end


def _deal_copies(
    name: str,
    datatype: str,
    row_shape: tuple[int, ...],
    data: bytes,
    counts: list[int],
    step: int,
    shares: list[list[Tensor]],
) -> None:
    """Small shares: a copy costs less than a view, and does not keep the whole."""
    start = before = 0
    shape: tuple[int, ...] = ()
    for index, count in enumerate(counts):
        if count != before:
            before, shape = count, (count, *row_shape)
        end = start + count * step
        shares[index].append(Tensor(name, datatype, shape, data[start:end]))
        start = end


def _flat(data: Buffer) -> memoryview:
    """The buffer as single bytes, whatever the exporter's item type."""
    view = memoryview(data)
    if view.ndim == 1 and view.itemsize == 1:
        return view
    return view.cast("B") if view.nbytes else memoryview(b"")


# --- padding ---------------------------------------------------------------------------------------------------------


def _pad(tensor: Tensor, shape: tuple[int, ...], bucketed: _Bucketed) -> Tensor:
    kept = tuple([slice(size) for size in tensor.shape])
    if bucketed.fill is None:
        strings = np.full(shape, b"", dtype=object)
        strings[kept] = tensor.array()
        return Tensor(tensor.name, tensor.datatype, shape, strings.ravel().tolist())
    array = np.full(shape, bucketed.fill)
    array[kept] = tensor.array()
    return Tensor(tensor.name, tensor.datatype, shape, array.tobytes())


def _cut(tensor: Tensor, sizes: dict[int, int]) -> Tensor:
    shape = tuple([sizes.get(axis, size) for axis, size in enumerate(tensor.shape)])
    kept = tensor.array()[tuple([slice(size) for size in shape])]
    data = kept.ravel().tolist() if tensor.datatype == BYTES else kept.tobytes()
    return Tensor(tensor.name, tensor.datatype, shape, data)


def _free_axes(declared: TensorSpec, batched: bool) -> list[int]:
    return [axis for axis, size in enumerate(declared.shape) if size < 0 and not (batched and axis == 0)]


def _compile_buckets(spec: ModelSpec, options: BatchingOptions) -> dict[int, _Bucketed]:
    """Input index -> its buckets, checked against the spec."""
    places = {declared.name: index for index, declared in enumerate(spec.inputs)}
    for name in (*options.buckets, *options.pad_values):
        if name not in places:
            raise ConfigError(f"model '{spec.name}': buckets or pad value for '{name}', which is not one of its inputs")
    return {
        places[name]: _bucketed(spec, spec.inputs[places[name]], sizes, options.pad_values.get(name, 0))
        for name, sizes in options.buckets.items()
        if sizes
    }


def _bucketed(spec: ModelSpec, declared: TensorSpec, sizes: tuple[int, ...], pad_value: float) -> _Bucketed:
    where = f"model '{spec.name}', input '{declared.name}'"
    axes = _free_axes(declared, spec.max_batch_size > 0)
    if len(axes) != 1:
        raise ConfigError(
            f"{where}: buckets need exactly one variable dimension, shape {list(declared.shape)} has {len(axes)}"
        )
    if sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
        raise ConfigError(f"{where}: bucket sizes must be positive and ascending, got {list(sizes)}")
    fill = None if declared.datatype == BYTES else _fill(where, declared.datatype, pad_value)
    return _Bucketed(declared.name, axes[0], sizes, fill)


def _fill(where: str, datatype: str, value: float) -> np.generic:
    """The padding element; ConfigError when the datatype cannot hold the value."""
    if datatype == "BF16":  # the upper half of the float's bits
        return np.uint16(np.float32(value).view(np.uint32) >> 16)
    dtype: np.dtype[Any] = DATATYPES[datatype][0]
    if dtype.kind != "f":
        whole = int(value) if float(value).is_integer() else None
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if whole is None or not low <= whole <= high:
            raise ConfigError(f"{where}: pad value {value:g} does not fit datatype {datatype}")
        return cast("np.generic", dtype.type(whole))
    return cast("np.generic", dtype.type(value))
