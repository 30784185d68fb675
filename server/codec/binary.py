"""Raw tensor contents: the binary tensor extension of HTTP, and ``raw_*_contents`` of gRPC.

Fixed-size datatypes are little-endian and row-major without padding. A BYTES element is a 4-byte little-endian length
and then that many bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from server.codec.checks import check_byte_size, dims, shown
from server.errors import InvalidArgument
from server.types import BYTES, DATATYPES, Buffer, InferenceRequest, ModelSpec, Tensor, TensorSpec, element_count

#: The length in front of an element of BYTES.
PREFIX_BYTES: Final = 4
#: What is read or written at once, in elements of BYTES and in bytes: about a millisecond. See ``server.codec.pieces``.
PIECE_ELEMENTS: Final = 4096
PIECE_BYTES: Final = 1024 * 1024
#: Decimal digits that any acceptable length has at most; longer text is refused before it becomes a number.
_MAX_LENGTH_DIGITS: Final = 19


def parse_header_length(value: str | None, body_size: int) -> int | None:
    """The JSON part's size from ``Inference-Header-Content-Length``; None when the header is absent.

    0 means a raw binary request (see :func:`decode_raw`). InvalidArgument unless it is a whole number of at most
    ``body_size``, the size of the (decompressed) body.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit() and len(text) <= _MAX_LENGTH_DIGITS and int(text) <= body_size:
        return int(text)
    raise InvalidArgument(
        f"Inference-Header-Content-Length must be a whole number in 0..{body_size}, the body's size; got {shown(value)}"
    )


def encode_bytes(elements: Sequence[bytes]) -> bytes:
    """The wire form of a BYTES tensor."""
    parts: list[bytes] = []
    for element in elements:
        parts += (len(element).to_bytes(PREFIX_BYTES, "little"), element)
    return b"".join(parts)


def decode_bytes(name: str, data: Buffer, count: int) -> list[bytes]:
    """Exactly ``count`` elements that fill ``data``; InvalidArgument naming the input otherwise."""
    raw = bytes(data)
    check_room(name, len(raw), count)
    elements: list[bytes] = []
    position = 0
    for index in range(count):
        start = position + PREFIX_BYTES
        # Near the end the slice is short: then `start` is past the end, whatever length it reads as.
        position = start + int.from_bytes(raw[position:start], "little")
        if position > len(raw):
            raise past_the_end(name, index, len(raw))
        elements.append(raw[start:position])
    if position != len(raw):
        raise left_over(name, len(raw) - position, count)
    return elements


def check_room(name: str, size: int, count: int) -> None:
    """``count`` elements of BYTES have their lengths, at least, in ``size`` bytes."""
    if count * PREFIX_BYTES > size:
        raise InvalidArgument(
            f"input {shown(name)}: {count} BYTES elements need at least {count * PREFIX_BYTES} bytes, got {size}"
        )


def past_the_end(name: str, index: int, size: int) -> InvalidArgument:
    return InvalidArgument(f"input {shown(name)}: BYTES element {index} goes past the end of the data of {size} bytes")


def left_over(name: str, size: int, count: int) -> InvalidArgument:
    return InvalidArgument(f"input {shown(name)}: {size} bytes are left over after {count} BYTES elements")


def input_tensor(name: str, datatype: str, shape: tuple[int, ...], data: Buffer, *, whole: bool = True) -> Tensor:
    """A tensor over raw contents, which stay a view for fixed-size datatypes. The shape has been checked before.

    Unless it is to be done as a ``whole``, what is more than one piece of BYTES or BOOL is left, still in wire form and
    not looked at, to :func:`server.codec.pieces.finish`.
    """
    if datatype == BYTES:
        count = element_count(shape)
        if not whole and (count > PIECE_ELEMENTS or len(data) > PIECE_BYTES):
            return Tensor(name, datatype, shape, data)
        return Tensor(name, datatype, shape, decode_bytes(name, data, count))
    check_byte_size(name, datatype, shape, len(data))
    if datatype == "BOOL" and (whole or len(data) <= PIECE_BYTES):
        check_bools(name, data)
    return Tensor(name, datatype, shape, data)


def check_bools(name: str, data: Buffer) -> None:
    """A BOOL byte is 0 or 1: what a runtime makes of any other is undefined."""
    if rest := bytes(data).translate(None, b"\x00\x01"):
        raise InvalidArgument(f"input {shown(name)}: a BOOL byte must be 0 or 1, got {rest[0]}")


def raw_contents(tensor: Tensor) -> Buffer:
    """The wire form of any tensor; no copy for fixed-size datatypes."""
    return encode_bytes(tensor.data) if isinstance(tensor.data, list) else tensor.data


# --- A body that is nothing but one tensor -------------------------------------------------------------------------


def decode_raw(body: Buffer, *, model: str, version: str, spec: ModelSpec, whole: bool = True) -> InferenceRequest:
    """The request that a body without a JSON part stands for; all outputs are to be answered in binary.

    The model must have exactly one input. A batching model gets one row. At most one other dimension may be free: it
    follows from the body's size. For BYTES the whole body, without length prefix, is the one element. ``whole``: see
    :func:`input_tensor`.
    """
    if len(spec.inputs) != 1:
        names = ", ".join(shown(declared.name) for declared in spec.inputs)
        raise InvalidArgument(
            f"a body without a JSON part is for models with one input, {shown(spec.name)} has {len(spec.inputs)}: "
            f"{names}"
        )
    declared = spec.inputs[0]
    wanted = (1, *declared.shape[1:]) if spec.max_batch_size > 0 else declared.shape
    if declared.datatype == BYTES:
        tensor = Tensor(declared.name, BYTES, _one_element(declared, wanted), [bytes(body)])
    else:
        shape = _deduced(declared, wanted, len(body))
        tensor = input_tensor(declared.name, declared.datatype, shape, body, whole=whole)
    return InferenceRequest(model, version, "", [tensor], binary_output=True)


def _one_element(declared: TensorSpec, wanted: tuple[int, ...]) -> tuple[int, ...]:
    shape = tuple(1 if dim < 0 else dim for dim in wanted)
    if element_count(shape) != 1:
        raise InvalidArgument(
            f"input {shown(declared.name)}: a BYTES body without a JSON part is one element, shape is {dims(wanted)}"
        )
    return shape


def _deduced(declared: TensorSpec, wanted: tuple[int, ...], size: int) -> tuple[int, ...]:
    free = [axis for axis, dim in enumerate(wanted) if dim < 0]
    if len(free) > 1:
        raise InvalidArgument(
            f"input {shown(declared.name)}: shape {dims(wanted)} cannot follow from the body's size, "
            f"{len(free)} dimensions are free; send a JSON part"
        )
    if not free:
        return wanted
    step = element_count(tuple(dim for dim in wanted if dim >= 0)) * DATATYPES[declared.datatype][1]
    if step == 0 or size % step:
        raise InvalidArgument(
            f"input {shown(declared.name)}: {declared.datatype} with shape {dims(wanted)} wants a multiple of "
            f"{step} bytes of data, got {size}"
        )
    return tuple(size // step if dim < 0 else dim for dim in wanted)
