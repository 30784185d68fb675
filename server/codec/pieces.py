"""Raw contents that take long to read or write, worked through in short steps.

Elements of BYTES are found one behind the other, some 0.2 us each, and BOOL bytes are looked at: 100,000 elements hold
the event loop for 20 ms. What is larger than one step is left in wire form by the codecs that are told so (``whole`` is
False) and finished here, so that the loop takes a turn after each step, of about a millisecond. No thread would
do that better: the work is Python's own, and holds the interpreter's lock wherever it runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Final

from server.codec.binary import (
    PIECE_BYTES,
    PIECE_ELEMENTS,
    PREFIX_BYTES,
    check_bools,
    check_room,
    left_over,
    past_the_end,
)
from server.codec.process.steps import Steps
from server.types import BYTES, Buffer, InferenceRequest, InferenceResponse, Tensor, element_count

#: A body up to this size has nothing that is larger than a step.
SMALL_BODY_BYTES: Final = PIECE_ELEMENTS * PREFIX_BYTES
#: The lengths of so many elements are added up in well under a millisecond.
_COUNTED_ELEMENTS: Final = 32_768


# --- Requests ------------------------------------------------------------------------------------------------------


def unfinished(request: InferenceRequest) -> bool:
    """Whether a request that was not decoded as a whole has contents for ``finish``."""
    return any(_left(tensor) for tensor in request.inputs)


def _left(tensor: Tensor) -> bool:
    if tensor.datatype == BYTES:
        return not isinstance(tensor.data, list)
    return tensor.datatype == "BOOL" and len(tensor.data) > PIECE_BYTES


def finish(request: InferenceRequest) -> Steps[None]:
    """Decode what is left. Raises the InvalidArgument that decoding it as a whole would have raised."""
    for tensor in request.inputs:
        if isinstance(tensor.data, list) or not _left(tensor):
            continue
        if tensor.datatype == BYTES:
            tensor.data = yield from _elements(tensor.name, memoryview(tensor.data), element_count(tensor.shape))
        else:
            yield from _check_bools(tensor.name, memoryview(tensor.data))


def _elements(name: str, data: memoryview, count: int) -> Steps[list[bytes]]:
    """As ``binary.decode_bytes``."""
    check_room(name, len(data), count)
    elements: list[bytes] = []
    position = 0
    usual = len(data) * PIECE_ELEMENTS // max(count, 1)  # elements are mostly alike; what is taken in vain is copied
    size = min(max(usual, SMALL_BODY_BYTES), PIECE_BYTES)
    while len(elements) < count:
        piece = bytes(data[position : position + size])
        used = _take(piece, min(count - len(elements), PIECE_ELEMENTS), elements)
        position += used or _take_long(name, data[position:], len(data), elements)
        yield
    if position != len(data):
        raise left_over(name, len(data) - position, count)
    return elements


def _take(piece: bytes, count: int, elements: list[bytes]) -> int:
    """Add the elements that lie in ``piece``, at most ``count``; the bytes that they fill."""
    position = 0
    for _ in range(count):
        start = position + PREFIX_BYTES
        end = start + int.from_bytes(piece[position:start], "little")
        if end > len(piece):
            break
        elements.append(piece[start:end])
        position = end
    return position


def _take_long(name: str, data: memoryview, size: int, elements: list[bytes]) -> int:
    """Add an element that is longer than a piece."""
    end = PREFIX_BYTES + int.from_bytes(data[:PREFIX_BYTES], "little")
    if end > len(data):
        raise past_the_end(name, len(elements), size)
    elements.append(bytes(data[PREFIX_BYTES:end]))
    return end


def _check_bools(name: str, data: memoryview) -> Steps[None]:
    for start in range(0, len(data), PIECE_BYTES):
        check_bools(name, data[start : start + PIECE_BYTES])
        yield


# --- Answers -------------------------------------------------------------------------------------------------------


def has_many(response: InferenceResponse) -> bool:
    """Whether an output has more elements than are encoded in one step."""
    for tensor in response.outputs:  # noqa: SIM110 - a generator costs more, and this is asked of every answer
        if len(tensor.data) > PIECE_ELEMENTS and type(tensor.data) is list:
            return True
    return False


def wire_bytes(outputs: Iterable[Tensor]) -> int:
    """How long the outputs of an answer are in wire form; with very many elements, by an even sample of them."""
    size = 0
    for tensor in outputs:
        data = tensor.data
        if isinstance(data, list):
            step = 1 + len(data) // _COUNTED_ELEMENTS
            size += PREFIX_BYTES * len(data) + step * sum(map(len, data[::step]))
        else:
            size += len(data)
    return size


def wired(response: InferenceResponse, names: Iterable[str] | None = None) -> Steps[InferenceResponse]:
    """The answer with its BYTES outputs, or those of ``names``, in wire form where they have many elements."""
    chosen = None if names is None else frozenset(names)
    outputs = list(response.outputs)
    for i, tensor in enumerate(outputs):
        data = tensor.data
        if isinstance(data, list) and len(data) > PIECE_ELEMENTS and (chosen is None or tensor.name in chosen):
            encoded = yield from _wire_form(data)
            outputs[i] = replace(tensor, data=encoded)
    return replace(response, outputs=outputs)


def _wire_form(elements: list[bytes]) -> Steps[Buffer]:
    """As ``binary.encode_bytes``."""
    whole = bytearray()
    rest = iter(elements)
    while piece := _piece(rest):
        whole += piece
        yield
    return whole


def _piece(rest: Iterable[bytes]) -> bytes:
    parts: list[bytes] = []
    size = 0
    for element in islice(rest, PIECE_ELEMENTS):
        parts += (len(element).to_bytes(PREFIX_BYTES, "little"), element)
        size += len(element)
        if size > PIECE_BYTES:
            break
    return b"".join(parts)
