"""A scan over the wire form of ordinary ``inference.ModelInferRequest`` messages.

It takes requests with raw contents and without parameters, and reads only the top-level fields. The bytes of an
``inputs`` or ``outputs`` entry repeat from request to request: they are the key of what protobuf once made of them.
Everything else, and everything wrong, is left to protobuf (:mod:`server.codec.protobuf`): what the scan returns is what
protobuf would have given.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, TypeAlias

from google.protobuf.message import DecodeError

from server._pb import inference_pb2 as pb
from server.codec.binary import input_tensor
from server.codec.checks import check_id, check_name, check_shape, check_unique
from server.errors import TidegateError
from server.types import ALL_DATATYPES, DATATYPES, Buffer, InferenceRequest, RequestedOutput, RequestLimits, Tensor

# Tags of length-delimited fields: (number << 3) | 2.
_MODEL_NAME: Final = 0x0A
_MODEL_VERSION: Final = 0x12
_ID: Final = 0x1A
_INPUT: Final = 0x2A
_OUTPUT: Final = 0x32
_RAW_CONTENTS: Final = 0x3A

#: Longer entries are not kept, so the caches are bounded in bytes too.
_MAX_ENTRY_BYTES: Final = 1024
_MAX_ENTRIES: Final = 4096
_MAX_FORMS: Final = 256
#: Contents of messages up to this size are copied: cheaper than a view, and the message is not kept for them.
_COPIED_BYTES: Final = 4096


class _UnusualError(Exception):
    """Not for the scan."""


#: The top-level fields of one message, still as bytes: model, version, id, inputs, outputs, contents; the last tag.
_Fields: TypeAlias = tuple[bytes, bytes, bytes, list[bytes], list[bytes], list[memoryview], int]


class _Form:
    """Messages of one length that begin alike, and end with the contents of their one input: any bytes will do there.

    They were read under ``limits``.
    """

    __slots__ = ("datatype", "limits", "model", "name", "prefix", "shape", "start", "version")

    def __init__(self, prefix: bytes, request: InferenceRequest, limits: RequestLimits) -> None:
        tensor = request.inputs[0]
        self.prefix = prefix
        self.start = len(prefix)
        self.limits = limits
        self.model = request.model
        self.version = request.version
        self.name = tensor.name
        self.datatype = tensor.datatype
        self.shape = tensor.shape


#: The newest form of each length: clients repeat themselves, and to compare costs less than to read.
_forms: Final[dict[int, _Form]] = {}


def scan(raw: bytes, limits: RequestLimits, *, whole: bool = True) -> InferenceRequest | None:
    """The request; None when protobuf must judge. Never raises. Tensors are views on ``raw``, small ones copies.

    ``whole``: see :func:`server.codec.binary.input_tensor`.
    """
    form = _forms.get(len(raw))
    if form is not None and form.limits is limits and raw.startswith(form.prefix):
        start = form.start
        data: Buffer = raw[start:] if len(raw) <= _COPIED_BYTES else memoryview(raw)[start:]
        tensor = Tensor(form.name, form.datatype, form.shape, data)
        return InferenceRequest(form.model, form.version, "", [tensor], [])
    try:
        return _request(raw, _fields(raw), limits, whole)
    except (_UnusualError, IndexError, UnicodeDecodeError, DecodeError, TidegateError):
        return None


def _fields(raw: bytes) -> _Fields:
    """One loop over the message, without a call for a field: it runs once for each of them in every request."""
    model = version = identifier = b""
    inputs: list[bytes] = []
    outputs: list[bytes] = []
    contents: list[memoryview] = []
    position, size, tag = 0, len(raw), 0
    while position < size:
        tag, length, start = raw[position], raw[position + 1], position + 2
        if length & 0x80:
            length, start = _long_length(raw, position + 1)
        position = start + length
        if position > size:
            raise _UnusualError
        if tag == _RAW_CONTENTS:
            contents.append(memoryview(raw)[start:position])
        elif tag == _INPUT:
            inputs.append(raw[start:position])
        elif tag == _OUTPUT:
            outputs.append(raw[start:position])
        # A singular field that comes again would have to be merged, and the first value still be checked.
        elif tag == _MODEL_NAME and not model:
            model = raw[start:position]
        elif tag == _ID and not identifier:
            identifier = raw[start:position]
        elif tag == _MODEL_VERSION and not version:
            version = raw[start:position]
        else:
            raise _UnusualError
    return model, version, identifier, inputs, outputs, contents, tag


def _long_length(raw: bytes, position: int) -> tuple[int, int]:
    """A length of two to four bytes, and where it ends. Five bytes would be 256 MiB or more."""
    length = 0
    for shift in (0, 7, 14, 21):
        byte = raw[position]
        position += 1
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            return length, position
    raise _UnusualError


def _request(raw: bytes, fields: _Fields, limits: RequestLimits, whole: bool) -> InferenceRequest:
    model, version, raw_id, inputs, requested, contents, last = fields
    count = len(inputs)
    if not 0 < count <= limits.max_inputs or count != len(contents) or len(requested) > limits.max_outputs:
        raise _UnusualError
    tensors = [_input(entry, data, limits.max_dims, whole) for entry, data in zip(inputs, contents, strict=True)]
    outputs = [RequestedOutput(_output_entry(_key(entry))) for entry in requested] if requested else []
    if count > 1:
        check_unique("input", [tensor.name for tensor in tensors])
    if len(outputs) > 1:
        check_unique("output", [output.name for output in outputs])
    identifier = ""
    if raw_id:
        identifier = raw_id.decode()
        check_id(identifier, limits.max_id_bytes)
    request = InferenceRequest(model.decode(), version.decode(), identifier, tensors, outputs)
    # An id is another one each time: a form with it would only drive out others.
    if count == 1 and last == _RAW_CONTENTS and not raw_id and not requested and tensors[0].datatype in _ANY_BYTES:
        _learn(raw, raw[: len(raw) - len(contents[0])], request, limits)
    return request


def _learn(raw: bytes, prefix: bytes, request: InferenceRequest, limits: RequestLimits) -> None:
    if len(prefix) <= _MAX_ENTRY_BYTES:
        if len(_forms) >= _MAX_FORMS:
            _forms.clear()
        _forms[len(raw)] = _Form(prefix, request, limits)


def _input(entry: bytes, data: memoryview, max_dims: int, whole: bool) -> Tensor:
    """The size that the entry's shape asks for is kept with it, so the usual input is checked by one comparison."""
    name, datatype, shape, size = _input_entry(_key(entry), max_dims)
    if len(data) == size:
        return Tensor(name, datatype, shape, data)
    return input_tensor(name, datatype, shape, data, whole=whole)


def _key(entry: bytes) -> bytes:
    if len(entry) > _MAX_ENTRY_BYTES:
        raise _UnusualError
    return entry


#: Datatypes of which any bytes will do.
_ANY_BYTES: Final = frozenset(DATATYPES) - {"BOOL"}


@lru_cache(maxsize=_MAX_ENTRIES)
def _input_entry(entry: bytes, max_dims: int) -> tuple[str, str, tuple[int, ...], int]:
    """Name, datatype, checked shape, and the bytes of its contents (-1: they must be looked at).

    Raises (and keeps nothing) for what is no ordinary raw input.
    """
    message = pb.ModelInferRequest.InferInputTensor.FromString(entry)
    if message.parameters or message.HasField("contents") or message.datatype not in ALL_DATATYPES:
        raise _UnusualError
    check_name("input", message.name)
    shape = tuple(message.shape)
    count = check_shape(message.name, shape, max_dims)
    size = count * DATATYPES[message.datatype][1] if message.datatype in _ANY_BYTES else -1
    return message.name, message.datatype, shape, size


@lru_cache(maxsize=_MAX_ENTRIES)
def _output_entry(entry: bytes) -> str:
    """The name; raises (and keeps nothing) for an output with parameters."""
    message = pb.ModelInferRequest.InferRequestedOutputTensor.FromString(entry)
    if message.parameters:
        raise _UnusualError
    check_name("output", message.name)
    return message.name
