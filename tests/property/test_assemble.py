"""Any members through join, an identity engine, and split: everyone gets back exactly what they sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from server.batching.assemble import Layout
from server.runtime.base import Batch, BatchingOptions
from server.types import BYTES, DATATYPES, Buffer, ModelSpec, Tensor, TensorSpec, element_count


@dataclass
class Part:
    inputs: list[Tensor | None]
    rows: int


@st.composite
def specs(draw: st.DrawFn, bucketed: bool) -> tuple[ModelSpec, BatchingOptions]:
    """A batching model whose outputs are declared like its inputs. With buckets every input has one free axis."""
    declared = []
    for index in range(draw(st.integers(1, 3))):
        dims = draw(st.lists(st.sampled_from([0, 1, 2, 3] if bucketed else [-1, 0, 1, 2, 3]), max_size=2))
        if bucketed:
            dims.insert(draw(st.integers(0, len(dims))), -1)
        datatype = draw(st.sampled_from([*DATATYPES, BYTES]))
        declared.append(TensorSpec(f"x{index}", datatype, (-1, *dims), optional=draw(st.booleans())))
    buckets = {
        tensor.name: tuple(sorted(draw(st.sets(st.integers(1, 6), max_size=2)) | {6}))
        for tensor in declared
        if bucketed
    }
    spec = ModelSpec("m", "1", tuple(declared), tuple(declared), max_batch_size=64, learned_batch_size=64)
    return spec, BatchingOptions(buckets=buckets)


@st.composite
def tensors(draw: st.DrawFn, declared: TensorSpec, rows: int, free: int | None = None) -> Tensor:
    dims = [draw(st.integers(0, 4)) if free is None else free for _ in declared.shape[1:]]
    shape = (rows, *[own if dim < 0 else dim for dim, own in zip(declared.shape[1:], dims, strict=True)])
    size = element_count(shape)
    if declared.datatype == BYTES:
        return Tensor(declared.name, BYTES, shape, draw(st.lists(st.binary(max_size=3), min_size=size, max_size=size)))
    width = DATATYPES[declared.datatype][1] * size
    raw: Buffer = draw(st.binary(min_size=width, max_size=width))
    if declared.datatype == "BOOL":
        raw = bytes([byte & 1 for byte in raw])
    return Tensor(declared.name, declared.datatype, shape, raw if draw(st.booleans()) else memoryview(raw))


@st.composite
def parts(draw: st.DrawFn, spec: ModelSpec, free: int | None = None) -> Part:
    rows = draw(st.integers(1, 4))
    inputs = [
        None if declared.optional and draw(st.booleans()) else draw(tensors(declared, rows, free))
        for declared in spec.inputs
    ]
    return Part(inputs, rows)


def identity(spec: ModelSpec, batch: Batch) -> list[Tensor]:
    """Outputs equal to the joined inputs; an absent input comes back as no elements at all."""
    outputs = []
    for declared, shape, pieces in zip(spec.outputs, batch.shapes, batch.parts, strict=True):
        if pieces is None:
            outputs.append(Tensor(declared.name, "UINT8", (batch.rows, 0), b""))
        elif declared.datatype == BYTES:
            strings = [string for piece in pieces for string in piece]
            assert len(strings) == element_count(shape)
            outputs.append(Tensor(declared.name, BYTES, shape, strings))  # type: ignore[arg-type]
        else:
            raw = b"".join(pieces)  # type: ignore[arg-type]
            assert len(raw) == element_count(shape) * DATATYPES[declared.datatype][1]
            outputs.append(Tensor(declared.name, declared.datatype, shape, raw))
    return outputs


def contents(tensor: Tensor) -> Any:
    return tensor.data if isinstance(tensor.data, list) else bytes(tensor.data)


def check_round_trip(spec: ModelSpec, layout: Layout, members: list[Part]) -> None:
    for plan in {layout.plan(member.inputs) for member in members}:
        together = [member for member in members if layout.plan(member.inputs) == plan]
        inputs, rows = [member.inputs for member in together], [member.rows for member in together]
        batch = layout.join(inputs, sum(rows))
        assert batch.rows == sum(rows)
        shares = layout.split(inputs, rows, identity(spec, batch))
        for member, share in zip(together, shares, strict=True):
            for sent, got in zip(member.inputs, share, strict=True):
                if sent is not None:
                    assert (got.name, got.datatype, got.shape) == (sent.name, sent.datatype, sent.shape)
                    assert contents(got) == contents(sent)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_everyone_gets_back_what_they_sent(data: Any) -> None:
    spec, options = data.draw(specs(bucketed=False))
    members = data.draw(st.lists(parts(spec), min_size=1, max_size=5))
    check_round_trip(spec, Layout(spec, options), members)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_padding_leaves_no_trace(data: Any) -> None:
    """All inputs of one member have one free size, as a text's ids and mask have; members differ."""
    spec, options = data.draw(specs(bucketed=True))
    members = [data.draw(parts(spec, size)) for size in data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))]
    check_round_trip(spec, Layout(spec, options), members)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_equal_plans_are_exactly_equal_row_shapes(data: Any) -> None:
    spec, options = data.draw(specs(bucketed=False))
    layout = Layout(spec, options)
    one, two = data.draw(parts(spec)), data.draw(parts(spec))
    shapes = [[None if tensor is None else tensor.shape[1:] for tensor in part.inputs] for part in (one, two)]
    assert (layout.plan(one.inputs) == layout.plan(two.inputs)) == (shapes[0] == shapes[1])


@given(
    rows=st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=6), min_size=1, max_size=6), pad=st.integers(-9, 9)
)
def test_padded_contents_equal_the_naive_twin(rows: list[list[int]], pad: int) -> None:
    spec = ModelSpec("m", "1", (TensorSpec("x", "INT32", (-1, -1)),), (), max_batch_size=9, learned_batch_size=9)
    layout = Layout(spec, BatchingOptions(buckets={"x": (6,)}, pad_values={"x": pad}))
    members = [Part([Tensor("x", "INT32", (1, len(row)), np.array(row, "<i4").tobytes())], 1) for row in rows]
    batch = layout.join([member.inputs for member in members], len(members))
    got = np.frombuffer(b"".join(batch.parts[0] or []), "<i4").reshape(batch.shapes[0])  # type: ignore[arg-type]
    assert got.tolist() == [row + [pad] * (6 - len(row)) for row in rows]
