"""The protobuf form of inference requests and answers: ``inference.ModelInferRequest`` and ``ModelInferResponse``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

import numpy as np
from google.protobuf.message import DecodeError

from server._pb import inference_pb2 as pb
from server.codec.binary import input_tensor, raw_contents
from server.codec.checks import (
    check_datatype,
    check_element_count,
    check_id,
    check_limit,
    check_name,
    check_shape,
    check_unique,
    refuse_shared_memory,
    requested_output,
    shown,
)
from server.codec.dtypes import INTEGER_RANGES
from server.codec.scan import scan
from server.errors import InvalidArgument
from server.types import (
    BYTES,
    DATATYPES,
    Buffer,
    InferenceRequest,
    InferenceResponse,
    ParameterValue,
    RequestedOutput,
    RequestLimits,
    Tensor,
)

_Input = pb.ModelInferRequest.InferInputTensor

#: Datatype -> the field of InferTensorContents that carries it. FP16 and BF16 have none: they travel raw only.
_FIELDS: Final = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
#: Datatypes whose field has wider elements than they have, and the numpy type of that field.
_WIDER: Final = {"INT8": np.int32, "INT16": np.int32, "UINT8": np.uint32, "UINT16": np.uint32}

# Tags of length-delimited fields: (number << 3) | 2.
_ID: Final = 0x1A
_RAW_CONTENTS: Final = 0x32
_STREAM_ANSWER: Final = 0x12


# --- Requests ------------------------------------------------------------------------------------------------------


def decode_infer(raw: bytes, limits: RequestLimits, *, whole: bool = True) -> InferenceRequest:
    """The request in ``raw``; raw contents may stay views on it.

    Ordinary requests are read by :func:`server.codec.scan.scan`, all others by :func:`decode_message`. Anything wrong
    raises InvalidArgument, shared memory too. ``whole``: see :func:`server.codec.binary.input_tensor`.
    """
    return scan(raw, limits, whole=whole) or decode_message(raw, limits, whole=whole)


def decode_message(raw: bytes, limits: RequestLimits, *, whole: bool = True) -> InferenceRequest:
    """As :func:`decode_infer`, by protobuf alone."""
    try:
        message = pb.ModelInferRequest.FromString(raw)
    except DecodeError:
        raise InvalidArgument("the message is not a valid inference.ModelInferRequest") from None
    check_id(message.id, limits.max_id_bytes)
    return InferenceRequest(
        message.model_name,
        message.model_version,
        message.id,
        _inputs(message, limits, whole),
        _outputs(message, limits),
        _parameters("request", message.parameters, limits),
    )


def _inputs(message: pb.ModelInferRequest, limits: RequestLimits, whole: bool) -> list[Tensor]:
    check_limit("inputs", len(message.inputs), limits.max_inputs)
    check_unique("input", [entry.name for entry in message.inputs])
    raws = message.raw_input_contents
    if not raws:
        return [_typed_input(entry, _checked_shape(entry, limits)) for entry in message.inputs]
    for entry in message.inputs:
        if entry.contents.ListFields():
            raise InvalidArgument(f"input {shown(entry.name)} has typed contents beside raw_input_contents")
    shapes = [_checked_shape(entry, limits) for entry in message.inputs]
    if len(raws) != len(shapes):
        raise InvalidArgument(
            f"raw_input_contents must have one entry per input: wanted {len(shapes)}, got {len(raws)}"
        )
    return [
        input_tensor(entry.name, entry.datatype, shape, raw, whole=whole)
        for entry, shape, raw in zip(message.inputs, shapes, raws, strict=True)
    ]


def _checked_shape(entry: _Input, limits: RequestLimits) -> tuple[int, ...]:
    """The shape of an entry, when nothing but its contents can still be wrong."""
    check_name("input", entry.name)
    refuse_shared_memory("input", entry.name, _parameters(f"input {shown(entry.name)}", entry.parameters, limits))
    check_datatype(entry.name, entry.datatype)
    shape = tuple(entry.shape)
    check_shape(entry.name, shape, limits.max_dims)
    return shape


def _typed_input(entry: _Input, shape: tuple[int, ...]) -> Tensor:
    wanted = _FIELDS.get(entry.datatype)
    if wanted is None:
        raise InvalidArgument(f"input {shown(entry.name)}: {entry.datatype} is accepted in raw_input_contents only")
    for descriptor, _ in entry.contents.ListFields():
        if descriptor.name != wanted:
            raise InvalidArgument(
                f"input {shown(entry.name)}: {entry.datatype} belongs in {wanted}, got {descriptor.name}"
            )
    values = getattr(entry.contents, wanted)
    check_element_count(entry.name, shape, len(values))
    if entry.datatype == BYTES:
        return Tensor(entry.name, BYTES, shape, list(values))
    dtype = DATATYPES[entry.datatype][0]
    array = np.array(values, dtype=_WIDER.get(entry.datatype, dtype))
    if entry.datatype in _WIDER:
        _check_range(entry, array)
    return Tensor(entry.name, entry.datatype, shape, array.astype(dtype, copy=False).tobytes())


def _check_range(
    entry: _Input, array: np.ndarray[tuple[int, ...], np.dtype[np.signedinteger | np.unsignedinteger]]
) -> None:
    low, high = INTEGER_RANGES[entry.datatype]
    outside = np.flatnonzero((array < low) | (array > high))
    if outside.size:
        index = int(outside[0])
        raise InvalidArgument(
            f"input {shown(entry.name)}: element {index} is {int(array[index])}; "
            f"{entry.datatype} wants an integer in {low}..{high}"
        )


def _outputs(message: pb.ModelInferRequest, limits: RequestLimits) -> list[RequestedOutput]:
    check_limit("outputs", len(message.outputs), limits.max_outputs)
    check_unique("output", [entry.name for entry in message.outputs])
    outputs = []
    for entry in message.outputs:
        check_name("output", entry.name)
        parameters = _parameters(f"output {shown(entry.name)}", entry.parameters, limits)
        outputs.append(requested_output(entry.name, parameters))
    return outputs


def _parameters(
    owner: str, parameters: Mapping[str, pb.InferParameter], limits: RequestLimits
) -> dict[str, ParameterValue]:
    check_limit(f"parameters of {owner}", len(parameters), limits.max_parameters)
    return {key: _parameter(owner, key, value) for key, value in parameters.items()}


def _parameter(owner: str, key: str, message: pb.InferParameter) -> ParameterValue:
    choice = message.WhichOneof("parameter_choice")
    if choice is None:
        raise InvalidArgument(f"{owner}: parameter {shown(key)} has no value")
    value: ParameterValue = getattr(message, choice)
    return value


# --- Answers -------------------------------------------------------------------------------------------------------


def encode_infer(response: InferenceResponse) -> bytes:
    """A ModelInferResponse with the outputs in ``raw_output_contents``."""
    return b"".join(_infer_parts(response, framed=False))


def framed_infer(response: InferenceResponse) -> bytes:
    """``encode_infer`` as a gRPC message that is not compressed: behind a zero and its length in four bytes."""
    return b"".join(_infer_parts(response, framed=True))


def _infer_parts(response: InferenceResponse, *, framed: bool) -> list[Buffer]:
    """A ModelInferResponse in pieces, with the outputs in ``raw_output_contents``.

    The fields follow each other as protobuf allows for serialized messages: what repeats from answer to answer is
    serialized once, and contents are referred to. The usual answer, one output and nothing else, is two pieces.
    """
    outputs = response.outputs
    if len(outputs) == 1 and not response.id and not response.parameters:
        output = outputs[0]
        raw = raw_contents(output)
        if framed:
            return [_head_before(response, output, len(raw)), raw]
        return [
            _single_head(response.model, response.version, output.name, output.datatype, output.shape, len(raw)),
            raw,
        ]
    parts: list[Buffer] = [_model_head(response.model, response.version)]
    if response.id:
        identifier = response.id.encode()
        parts += (_prefix(_ID, len(identifier)), identifier)
    if response.parameters:
        parts.append(_serialized_parameters(response.parameters))
    parts += [_output_head(tensor.name, tensor.datatype, tensor.shape) for tensor in response.outputs]
    for tensor in response.outputs:
        raw = raw_contents(tensor)
        parts += (_prefix(_RAW_CONTENTS, len(raw)), raw)
    return [_frame(sum(map(len, parts))), *parts] if framed else parts


def _frame(size: int) -> bytes:
    return b"\0" + size.to_bytes(4, "big")


class _Heads:
    """The head that was written last, and for what: the answers of a batch have one after the other the same."""

    __slots__ = ("datatype", "head", "model", "name", "shape", "size", "version")

    def __init__(self) -> None:
        self.model = self.version = self.name = self.datatype = ""
        self.shape: tuple[int, ...] = ()
        self.size = -1
        self.head = b""


_last: Final = _Heads()


def _head_before(response: InferenceResponse, output: Tensor, size: int) -> bytes:
    """As ``_framed_head``. Strings are compared by identity: they come from the model's signature."""
    last = _last
    if (
        last.size == size
        and last.model is response.model
        and last.version is response.version
        and last.name is output.name
        and last.datatype is output.datatype
        and last.shape == output.shape
    ):
        return last.head
    last.model, last.version, last.name, last.datatype = response.model, response.version, output.name, output.datatype
    last.shape, last.size = output.shape, size
    last.head = _framed_head(response.model, response.version, output.name, output.datatype, output.shape, size)
    return last.head


@lru_cache(maxsize=4096)
def _framed_head(model: str, version: str, name: str, datatype: str, shape: tuple[int, ...], size: int) -> bytes:
    head = _single_head(model, version, name, datatype, shape, size)
    return _frame(len(head) + size) + head


def encode_stream_infer(response: InferenceResponse) -> bytes:
    """A ModelStreamInferResponse that carries an answer."""
    answer = encode_infer(response)
    return _prefix(_STREAM_ANSWER, len(answer)) + answer


def encode_stream_error(message: str, request_id: str) -> bytes:
    """A ModelStreamInferResponse that carries the error of one request, whose id it repeats."""
    answer = pb.ModelInferResponse(id=request_id)
    return pb.ModelStreamInferResponse(error_message=message, infer_response=answer).SerializeToString()


@lru_cache(maxsize=1024)
def _model_head(model: str, version: str) -> bytes:
    return pb.ModelInferResponse(model_name=model, model_version=version).SerializeToString()


@lru_cache(maxsize=4096)
def _single_head(model: str, version: str, name: str, datatype: str, shape: tuple[int, ...], size: int) -> bytes:
    """All of an answer with one output up to its contents, which are ``size`` bytes."""
    return _model_head(model, version) + _output_head(name, datatype, shape) + _prefix(_RAW_CONTENTS, size)


@lru_cache(maxsize=4096)
def _output_head(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    entry = pb.ModelInferResponse.InferOutputTensor(name=name, datatype=datatype, shape=shape)
    return pb.ModelInferResponse(outputs=[entry]).SerializeToString()


def _prefix(tag: int, length: int) -> bytes:
    """Tag and length of a field; the length is a varint."""
    varint = bytearray((tag,))
    while length > 0x7F:
        varint.append(length & 0x7F | 0x80)
        length >>= 7
    varint.append(length)
    return bytes(varint)


def _serialized_parameters(parameters: Mapping[str, ParameterValue]) -> bytes:
    message = pb.ModelInferResponse()
    for key, value in parameters.items():
        _set_parameter(message.parameters[key], value)
    return message.SerializeToString()


def _set_parameter(message: pb.InferParameter, value: ParameterValue) -> None:
    if isinstance(value, bool):
        message.bool_param = value
    elif isinstance(value, str):
        message.string_param = value
    elif isinstance(value, float):
        message.double_param = value
    elif value > INTEGER_RANGES["INT64"][1]:
        message.uint64_param = value
    else:
        message.int64_param = value
