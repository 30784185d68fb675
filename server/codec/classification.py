"""Triton's classification extension: the best N classes of an output instead of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.codec.checks import shown
from server.codec.dtypes import bfloat16_values
from server.errors import InvalidArgument
from server.types import BYTES, Tensor


def classify(tensor: Tensor, count: int, labels: Sequence[str], *, batched: bool) -> Tensor:
    """The ``count`` largest elements, largest first, as BYTES ``value:index`` or ``value:index:label``.

    With ``batched`` dim 0 is kept and each row is ranked alone: shape ``[rows, n]``, else ``[n]``, where n is
    ``count`` or the number of classes if that is smaller. Equal values stand in the order of their indices, NaN last.
    An index without a (non-empty) label gets none. InvalidArgument for a BYTES output, which has no largest element.
    """
    if tensor.datatype == BYTES:
        raise InvalidArgument(f"output {shown(tensor.name)}: classification needs numbers, this output is BYTES")
    values = _values(tensor)
    rows = values.shape[0] if batched and values.ndim else 1
    table = values.reshape(rows, -1) if values.size else values.reshape(rows, 0)
    kept = min(count, table.shape[1])
    text = [_element(row[index], int(index), labels) for row in table for index in _ranking(row)[:kept]]
    return Tensor(tensor.name, BYTES, (rows, kept) if batched else (kept,), text)


def _values(tensor: Tensor) -> NDArray[Any]:
    values = tensor.array()
    return bfloat16_values(values) if tensor.datatype == "BF16" else values


def _ranking(row: NDArray[Any]) -> NDArray[np.intp]:
    """Indices from the largest element to the smallest, then NaN. Sorting the reversed row keeps equals in order."""
    order = len(row) - 1 - np.argsort(row[::-1], kind="stable")[::-1]
    if row.dtype.kind == "f":
        order = order[np.argsort(np.isnan(row[order]), kind="stable")]
    return order


def _element(value: np.generic, index: int, labels: Sequence[str]) -> bytes:
    number = f"{float(value):f}" if value.dtype.kind == "f" else str(int(value))
    label = labels[index] if index < len(labels) else ""
    return f"{number}:{index}:{label}".encode() if label else f"{number}:{index}".encode()
