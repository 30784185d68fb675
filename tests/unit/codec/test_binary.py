"""Raw tensor contents, the length header and bodies without a JSON part."""

from __future__ import annotations

import numpy as np
import pytest

from server.codec.binary import (
    decode_bytes,
    decode_raw,
    encode_bytes,
    input_tensor,
    parse_header_length,
    raw_contents,
)
from server.errors import InvalidArgument
from server.types import InferenceRequest, ModelSpec, Tensor, TensorSpec


@pytest.mark.parametrize(("text", "size"), [(None, None), ("0", 0), ("10", 10), (" 7 ", 7), ("007", 7)])
def test_header_length(text: str | None, size: int | None) -> None:
    assert parse_header_length(text, 10) == size


@pytest.mark.parametrize("text", ["", "-1", "11", "ten", "1.0", "+1", "1_0", "0x1", "\u0661", "9" * 5000])
def test_bad_header_length(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"whole number in 0..10") as caught:
        parse_header_length(text, 10)
    assert len(caught.value.message) < 300


def test_bytes_layout() -> None:
    wire = b"\x03\x00\x00\x00abc\x00\x00\x00\x00"
    assert encode_bytes([b"abc", b""]) == wire
    assert decode_bytes("x", memoryview(wire), 2) == [b"abc", b""]
    assert decode_bytes("x", b"", 0) == []


@pytest.mark.parametrize(
    ("wire", "count", "text"),
    [
        (b"\x04\x00\x00\x00abc", 1, "element 0 goes past the end"),
        (b"\xff\xff\xff\xff", 1, "past the end"),
        (b"\x00\x00\x00", 1, "need at least 4 bytes, got 3"),
        (b"\x01\x00\x00\x00a\x00\x00\x00", 2, "element 1 goes past the end"),
        (b"\x00\x00\x00\x00", 2**62, "need at least"),
        (b"\x00\x00\x00\x00x", 1, "1 bytes are left over"),
        (b"x", 0, "1 bytes are left over"),
    ],
)
def test_damaged_bytes(wire: bytes, count: int, text: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"'x'.*{text}"):
        decode_bytes("x", wire, count)


def test_fixed_size_contents_stay_a_view() -> None:
    data = memoryview(np.arange(4, dtype="<i2").tobytes())
    tensor = input_tensor("x", "INT16", (2, 2), data)
    assert tensor.data is data
    assert raw_contents(tensor) is data
    assert tensor.array().tolist() == [[0, 1], [2, 3]]
    with pytest.raises(InvalidArgument, match="wants 8 bytes of data, got 6"):
        input_tensor("x", "INT16", (2, 2), data[:6])


def test_bool_bytes() -> None:
    assert input_tensor("x", "BOOL", (2,), b"\x00\x01").array().tolist() == [False, True]
    with pytest.raises(InvalidArgument, match="0 or 1, got 2"):
        input_tensor("x", "BOOL", (2,), b"\x01\x02")


def raw(body: bytes, *inputs: TensorSpec, batch: int = 0) -> InferenceRequest:
    return decode_raw(body, model="m", version="3", spec=ModelSpec("m", "3", inputs, (), max_batch_size=batch))


@pytest.mark.parametrize(
    ("declared", "batch", "size", "shape"),
    [
        ((2, 3), 0, 24, (2, 3)),
        ((), 0, 4, ()),
        ((-1, 3), 0, 24, (2, 3)),
        ((-1, 3), 8, 12, (1, 3)),
        ((-1, -1, 2), 8, 24, (1, 3, 2)),
        ((-1,), 0, 0, (0,)),
    ],
)
def test_raw_body_takes_its_shape_from_the_model(
    declared: tuple[int, ...], batch: int, size: int, shape: tuple[int, ...]
) -> None:
    request = raw(b"\x00" * size, TensorSpec("x", "FP32", declared), batch=batch)
    assert request == InferenceRequest("m", "3", "", [Tensor("x", "FP32", shape, b"\x00" * size)], binary_output=True)


@pytest.mark.parametrize(
    ("declared", "batch", "size", "text"),
    [
        ((2, 3), 0, 20, "wants 24 bytes of data, got 20"),
        ((-1, 3), 0, 20, "multiple of 12 bytes"),
        ((-1, 0), 0, 4, "multiple of 0 bytes"),
        ((-1, -1), 0, 24, "2 dimensions are free"),
        ((-1, 3), 8, 24, "wants 12 bytes"),
    ],
)
def test_raw_body_that_does_not_fit(declared: tuple[int, ...], batch: int, size: int, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        raw(b"\x00" * size, TensorSpec("x", "FP32", declared), batch=batch)


def test_raw_bytes_body_is_one_element() -> None:
    spec = TensorSpec("x", "BYTES", (-1, 1))
    assert raw(b"a\x00b", spec, batch=4).inputs == [Tensor("x", "BYTES", (1, 1), [b"a\x00b"])]
    assert raw(b"", TensorSpec("x", "BYTES", (-1,))).inputs == [Tensor("x", "BYTES", (1,), [b""])]
    with pytest.raises(InvalidArgument, match="one element"):
        raw(b"a", TensorSpec("x", "BYTES", (2,)))


def test_raw_body_needs_a_single_input() -> None:
    one = TensorSpec("x", "FP32", (1,))
    for inputs in ((), (one, TensorSpec("y", "FP32", (1,)))):
        with pytest.raises(InvalidArgument, match=f"has {len(inputs)}"):
            raw(b"\x00" * 4, *inputs)
