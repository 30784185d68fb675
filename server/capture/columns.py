"""From tensors to columns of a table, and what the rules leave of them.

A row of the table is a row of a request's batch; a request of a model that does not batch is one row. Columns of
tensors are called after them (``x[0]``, ``x[1]``, or just ``x`` when there is one element), as drift profiles call
them; what is known of the request stands in columns that begin with two underscores. Strings are UTF-8; bytes that are
not are written as ``\\xNN``.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from server.capture.formats import Array
from server.codec.dtypes import bfloat16_values
from server.config.capture_options import CaptureSpec, ColumnRule
from server.types import BYTES, ModelSpec, Tensor, TensorSpec

CLIENT_ID: Final = "__client_id"
#: Of a keyed hash, this much is kept: 128 bits.
_HMAC_HEX: Final = 32

_KEEP: Final = ColumnRule("keep")
_DROP: Final = ColumnRule("drop")


@dataclass(slots=True, frozen=True)
class TensorPlan:
    """How one tensor becomes columns. ``rules`` by element; one only for a column of lists (``as_list``)."""

    name: str
    label: str
    datatype: str
    width: int
    rules: tuple[ColumnRule, ...]
    as_list: bool

    def columns(self) -> list[str]:
        """The names of all its columns, dropped ones too."""
        return [self.label] if self.as_list else column_names(self.label, self.width)


@dataclass(slots=True, frozen=True)
class Plan:
    """What is captured of one version. ``inputs`` and ``outputs`` by the name of the tensor."""

    batched: bool
    inputs: Mapping[str, TensorPlan]
    outputs: Mapping[str, TensorPlan]
    client_id: ColumnRule


def column_names(label: str, width: int) -> list[str]:
    """What the elements of a row are called."""
    return [label] if width == 1 else [f"{label}[{index}]" for index in range(width)]


def plan_of(spec: ModelSpec, capture: CaptureSpec) -> Plan:
    """What the rules leave of a model's tensors."""
    batched = spec.max_batch_size > 0
    taken = {tensor.name for tensor in spec.inputs}
    inputs = [_tensor(tensor, tensor.name, batched, capture) for tensor in spec.inputs]
    outputs = [
        _tensor(tensor, f"output:{tensor.name}" if tensor.name in taken else tensor.name, batched, capture)
        for tensor in spec.outputs
    ]
    client_id = capture.rules.get(CLIENT_ID, _KEEP)
    return Plan(batched, {t.name: t for t in inputs if t}, {t.name: t for t in outputs if t}, client_id)


def _tensor(spec: TensorSpec, label: str, batched: bool, capture: CaptureSpec) -> TensorPlan | None:
    """The plan of a tensor, None when nothing of it is captured."""
    tail = spec.shape[1:] if batched else spec.shape
    width = math.prod(tail) if all(dim >= 0 for dim in tail) else -1
    if width > capture.max_elements or width == 0:
        return None
    as_list = not 0 < width <= capture.max_columns
    names = [label] if as_list else column_names(label, width)
    rules = tuple([_rule(name, label, spec.datatype, capture.rules) for name in names])
    if all(rule.action == "drop" for rule in rules):
        return None
    return TensorPlan(spec.name, label, spec.datatype, width, rules, as_list)


def _rule(column: str, tensor: str, datatype: str, rules: Mapping[str, ColumnRule]) -> ColumnRule:
    """The rule of one column. A number can be looked up in buckets, a string cannot: it is left out then."""
    rule = rules.get(column) or rules.get(tensor) or (_DROP if datatype == BYTES else _KEEP)
    return _DROP if rule.action == "bucket" and datatype == BYTES else rule


# --- values ----------------------------------------------------------------------------------------------------------


def rows_of(tensor: Tensor, batched: bool) -> Array:
    """(rows, elements) of a tensor; floats that numpy or SQL does not have are widened, which changes no value."""
    values = tensor.array()
    if tensor.datatype == "BF16":
        values = bfloat16_values(values)
    elif tensor.datatype == "FP16":
        values = values.astype(np.float32)
    rows = tensor.shape[0] if batched else 1
    return values.reshape(rows, -1) if rows else values.reshape(0, 0)


def tensor_columns(plan: TensorPlan, parts: Sequence[Array], secret: bytes) -> dict[str, Array]:
    """The columns of one tensor over many requests, each part (rows, elements)."""
    if plan.as_list:
        return _lists(plan, parts, secret)
    joined = np.concatenate(parts)
    return {
        name: masked(joined[:, index], rule, secret)
        for index, (name, rule) in enumerate(zip(plan.columns(), plan.rules, strict=True))
        if rule.action != "drop"
    }


def _lists(plan: TensorPlan, parts: Sequence[Array], secret: bytes) -> dict[str, Array]:
    rows = [masked(row, plan.rules[0], secret) for part in parts for row in part]
    out = np.empty(len(rows), object)
    for place, row in enumerate(rows):  # assigned one by one: equal lengths would make numpy a second axis of them
        out[place] = row.tolist() if row.dtype == object else row
    return {plan.label: out}


def masked(values: Array, rule: ColumnRule, secret: bytes) -> Array:
    """One column after its rule: numbers stay numbers, strings become text."""
    if rule.action == "hmac":
        return _objects([hashed(_bytes(value), secret) for value in values.tolist()])
    if rule.action == "bucket":
        return _buckets(values, rule.edges)
    if values.dtype == object:
        return _objects([text(value) for value in values.tolist()])
    return np.ascontiguousarray(values)


def _buckets(values: Array, edges: Sequence[float]) -> Array:
    numbers = values.astype(np.float64)
    return np.where(np.isnan(numbers), -1, np.searchsorted(edges, numbers, side="right")).astype(np.int32)


def hashed(value: bytes, secret: bytes) -> str:
    """The keyed hash of a value: equal values stay equal, and nobody without the secret can try values out."""
    return hmac.new(secret, value, hashlib.sha256).hexdigest()[:_HMAC_HEX]


def text(value: bytes) -> str:
    """Bytes as text that every format takes."""
    return value.decode("utf-8", "backslashreplace")


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else repr(value).encode()


def _objects(values: Sequence[object]) -> Array:
    out = np.empty(len(values), object)
    out[:] = values
    return out


def client_id_of(value: str, rule: ColumnRule, secret: bytes) -> str:
    """A client's id after its rule."""
    if rule.action == "keep" or not value:
        return value
    return hashed(value.encode("utf-8", "surrogatepass"), secret) if rule.action == "hmac" else ""
