"""What the gateway and the codec process say to each other: a head, as JSON, and the bytes of tensors behind it.

A message lies in a ``SharedFile``; the socket between the two carries only a ``Notice`` of where it is and how large.
The standard library writes the heads: it keeps integers of any size, NaN and infinities, as parameters may have them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import islice
from operator import attrgetter
from typing import Any, Final, NamedTuple

from server.codec.binary import raw_contents
from server.codec.json import binary_outputs
from server.codec.process.steps import Steps
from server.types import Buffer, InferenceRequest, InferenceResponse, RequestedOutput, RequestLimits, Tensor

_NOTICE: Final = struct.Struct("<IQQ")
#: No notice is longer.
NOTICE_BYTES: Final = 64
#: What the process says first, when it has started.
HELLO: Final = b"hello"
#: No UTF-8 text has this byte, so it parts the elements of BYTES that came from JSON or go there.
_PART: Final = b"\xff"
#: Tensors lie on multiples of it, as numpy and runtimes like them.
_ALIGNED: Final = 16
_LIMITS: Final = attrgetter(*(field.name for field in fields(RequestLimits)))
#: Elements parted in one step: a few hundred microseconds.
_PIECE_ELEMENTS: Final = 4096


class Unfit(Exception):
    """The codec process does not do this; the caller's own process does."""


class Notice(NamedTuple):
    """A message lies in the file number ``file``: ``head`` bytes of JSON, ``size`` bytes in all."""

    file: int
    head: int
    size: int

    def packed(self) -> bytes:
        return _NOTICE.pack(*self)

    @classmethod
    def unpacked(cls, data: bytes) -> Notice:
        return cls(*_NOTICE.unpack(data))


def packed_head(head: dict[str, Any]) -> bytes:
    """The text, with blanks up to where tensors may begin."""
    text = json.dumps(head, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _ALIGNED)


def parted(notice: Notice, message: memoryview) -> tuple[dict[str, Any], memoryview]:
    """The head and what follows it."""
    head: dict[str, Any] = json.loads(bytes(message[: notice.head]))
    return head, message[notice.head :]


# --- tensors -------------------------------------------------------------------------------------------------------


class Elsewhere:
    """Stands for contents in wire form that stay with the gateway: their length is all that an answer's JSON says."""

    __slots__ = ("_size",)

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def pack_tensors(tensors: Iterable[Tensor]) -> Steps[tuple[list[Any], list[Buffer]]]:
    """What a head says of ``tensors``, and their bytes. Raises Unfit for BYTES that are no text."""
    entries: list[Any] = []
    chunks: list[Buffer] = []
    for tensor in tensors:
        if isinstance(tensor.data, Elsewhere):
            entries.append((tensor.name, tensor.datatype, tensor.shape, len(tensor.data)))
            continue
        if isinstance(tensor.data, list):
            pieces: list[Buffer] = yield from _joined(tensor.data)
        else:
            pieces = [tensor.data]
        sizes = [len(piece) for piece in pieces]
        entries.append((tensor.name, tensor.datatype, tensor.shape, sizes))
        chunks += (*pieces, bytes(-sum(sizes) % _ALIGNED))
    return entries, chunks


def _joined(elements: list[bytes]) -> Steps[list[Buffer]]:
    pieces: list[Buffer] = []
    rest = iter(elements)
    while piece := list(islice(rest, _PIECE_ELEMENTS)):
        joined = _PART.join(piece)
        if joined.count(_PART) != len(piece) - 1:
            raise Unfit("BYTES that are not UTF-8")
        pieces.append(joined)
        yield
    return pieces


def unpack_tensors(entries: list[Any], data: memoryview) -> Steps[list[Tensor]]:
    """The tensors; those of a fixed size are views on ``data``."""
    tensors: list[Tensor] = []
    position = 0
    for name, datatype, shape, sizes in entries:
        contents: Any
        if isinstance(sizes, int):
            contents = Elsewhere(sizes)
        elif datatype == "BYTES":
            contents = []
            for size in sizes:
                contents += bytes(data[position : position + size]).split(_PART)
                position += size
                yield
        else:
            contents = data[position : position + sizes[0]]
            position += sizes[0]
        position += -position % _ALIGNED
        tensors.append(Tensor(name, datatype, tuple(shape), contents))
    return tensors


# --- jobs and their results ----------------------------------------------------------------------------------------


def decode_job(json_size: int | None, limits: RequestLimits) -> dict[str, Any]:
    """Parse a request's body, which follows."""
    return {"job": "decode", "json_size": json_size, "limits": _LIMITS(limits)}


def limits_of(head: dict[str, Any]) -> RequestLimits:
    return RequestLimits(*head["limits"])


def decoded(request: InferenceRequest) -> Steps[tuple[dict[str, Any], list[Buffer]]]:
    """The result of a decode job; the model and its version stay with who asked."""
    entries, chunks = yield from pack_tensors(request.inputs)
    head = {
        "id": request.id,
        "inputs": entries,
        "outputs": packed_outputs(request.outputs),
        "parameters": request.parameters,
        "binary_output": request.binary_output,
    }
    return head, chunks


def request_of(head: dict[str, Any], data: memoryview, model: str, version: str) -> Steps[InferenceRequest]:
    """The request that ``decoded`` packed."""
    inputs = yield from unpack_tensors(head["inputs"], data)
    outputs = unpacked_outputs(head["outputs"])
    return InferenceRequest(model, version, head["id"], inputs, outputs, head["parameters"], head["binary_output"])


def _stripped(
    response: InferenceResponse, outputs: list[RequestedOutput], binary_default: bool
) -> tuple[InferenceResponse, list[Buffer]]:
    """The answer without the contents that follow its JSON in binary, and those contents, in their order."""
    binary = binary_outputs(response, outputs, binary_default)
    if not binary:
        return response, []
    kept: list[Buffer] = []
    tensors = list(response.outputs)
    for i, tensor in enumerate(tensors):
        if tensor.name in binary:
            raw = raw_contents(tensor)
            kept.append(raw)
            absent: Any = Elsewhere(len(raw))
            tensors[i] = replace(tensor, data=absent)
    return replace(response, outputs=tensors), kept


def encode_job(
    response: InferenceResponse, outputs: list[RequestedOutput], binary_default: bool, strict_json: bool
) -> Steps[tuple[dict[str, Any], list[Buffer], list[Buffer]]]:
    """Write the JSON of an answer: the job, the tensors that are to be in it, and the contents that are to follow it.

    Raises Unfit.
    """
    response, kept = _stripped(response, outputs, binary_default)
    entries, chunks = yield from pack_tensors(response.outputs)
    head = {
        "job": "encode",
        "response": (response.model, response.version, response.id),
        "parameters": response.parameters,
        "tensors": entries,
        "outputs": packed_outputs(outputs),
        "binary_default": binary_default,
        "strict_json": strict_json,
    }
    return head, chunks, kept


def response_of(head: dict[str, Any], data: memoryview) -> Steps[InferenceResponse]:
    """The answer that ``encode_job`` packed."""
    tensors = yield from unpack_tensors(head["tensors"], data)
    model, version, id_ = head["response"]
    return InferenceResponse(model, version, id_, tensors, head["parameters"])


def packed_outputs(outputs: list[RequestedOutput]) -> list[tuple[str, bool | None, int]]:
    return [(output.name, output.binary, output.classification) for output in outputs]


def unpacked_outputs(items: list[Any]) -> list[RequestedOutput]:
    return [RequestedOutput(*item) for item in items]
