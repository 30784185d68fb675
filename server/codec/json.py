"""The JSON form of inference requests and answers, with the binary tensor extension.

orjson parses and writes. Where it cannot say what is meant, the standard library's parser takes the text instead
(``parse_exactly``): NaN and Infinity literals, and integers beyond 64 bits in integer tensors, which orjson would turn
into doubles. orjson writes non-finite numbers as null; their literals are put in place of those.
"""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from itertools import chain
from typing import Any, Final

import numpy as np
import orjson

from server.codec.binary import input_tensor, raw_contents
from server.codec.checks import (
    check_datatype,
    check_element_count,
    check_id,
    check_limit,
    check_shape,
    check_unique,
    dims,
    kind_of,
    refuse_shared_memory,
    requested_output,
    shown,
    whole_number,
)
from server.codec.dtypes import bfloat16_values
from server.codec.elements import InexactIntegerError, contents
from server.codec.forms import LONGEST, Forms, form_of
from server.errors import InvalidArgument
from server.types import (
    DATATYPES,
    Buffer,
    InferenceRequest,
    InferenceResponse,
    ParameterValue,
    RequestedOutput,
    RequestLimits,
    Tensor,
)

#: Of all requests of the process.
_FORMS: Final = Forms()
_PARAMETER_TYPES: Final[frozenset[type]] = frozenset({bool, int, float, str})
_INT: Final[frozenset[type]] = frozenset({int})
_FRAMES: Final = 1024
_SLATE_BYTES: Final = 1024
#: What orjson writes as it is.
_WRITTEN: Final = frozenset(DATATYPES) - {"FP16", "BF16"}
#: Names of this module's own are found faster than those of another module.
_dumps: Final = orjson.dumps
_OPTION: Final = orjson.OPT_SERIALIZE_NUMPY
_N: Final = ord("n")


# --- Requests: bytes -> document -----------------------------------------------------------------------------------


def decode_infer(
    body: Buffer, *, model: str, version: str, limits: RequestLimits, json_size: int | None, whole: bool = True
) -> InferenceRequest:
    """The request in ``body``: JSON, then, when ``json_size`` says where the JSON ends, binary tensor contents.

    ``json_size`` comes from :func:`server.codec.binary.parse_header_length`; for 0 see
    :func:`server.codec.binary.decode_raw`. Tensors with binary contents are views on ``body``. Anything wrong raises
    InvalidArgument, shared memory too. ``whole``: see :func:`server.codec.binary.input_tensor`.
    """
    size = len(body) if json_size is None else json_size
    if size > len(body):
        raise InvalidArgument(f"the JSON part is said to have {size} bytes, the body has {len(body)}")
    form = None
    if isinstance(body, bytes) and size <= LONGEST:
        known = _FORMS.newest(body, size, model, version, limits, whole=whole)
        if known is not None:
            return known
        form = form_of(body[:size], has_binary=size < len(body))
        known = None if form is None else _FORMS.request(form, body, size, model, version, limits, whole=whole)
        if known is not None:
            return known
    part = body[:size] if size < len(body) else body
    text = part if isinstance(part, bytes) else bytes(part)
    binary = memoryview(body)[size:]
    _check_depth(text, limits.max_json_depth)
    try:
        document, exact = parse(text)
        request = _Decoder(binary, limits, exact=exact, whole=whole).request(document, model, version)
    except InexactIntegerError:
        return _Decoder(binary, limits, exact=True, whole=whole).request(parse_exactly(text), model, version)
    if form is not None and not exact:
        _FORMS.learn(form, request, len(binary), limits)
    return request


def parse(text: bytes) -> tuple[Any, bool]:
    """The document, and whether its integers are exact at any size. InvalidArgument when it is not JSON."""
    try:
        return orjson.loads(text), False
    except orjson.JSONDecodeError as error:
        if b"NaN" in text or b"Infinity" in text:
            return parse_exactly(text), True
        raise InvalidArgument(f"the request is not valid JSON: {error}") from None


def _finite(literal: str) -> float:
    number = float(literal)
    if math.isinf(number):
        raise InvalidArgument(f"the request is not valid JSON: {shown(literal)} is beyond the range of a double")
    return number


_EXACT: Final = json.JSONDecoder(parse_float=_finite)


def parse_exactly(text: bytes) -> Any:
    """The document with exact integers, NaN and infinities; otherwise as strict as orjson: InvalidArgument."""
    try:
        document = _EXACT.decode(text.decode())
        if b"\\u" in text:
            json.dumps(document, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"the request is not valid JSON: {error}") from None
    return document


_ESCAPE: Final = re.compile(rb"\\.", re.DOTALL)
_STRING: Final = re.compile(rb'"[^"]*"?')
#: Brackets looked at together: bounds the memory that counting takes.
_DEPTH_SLICE: Final = 65_536
_NOT_STRUCTURE: Final = bytes(set(range(256)) - set(b'[]{}"'))


def _check_depth(text: bytes, limit: int) -> None:
    """Refuse deep nesting before any parser sees it. Few brackets cannot be deep; only many are looked at."""
    if text.count(b"[") + text.count(b"{") > limit and (depth := _depth(text)) > limit:
        raise InvalidArgument(f"the JSON is nested too deeply: at most {limit} levels are accepted, got {depth}")


def _depth(text: bytes) -> int:
    """The deepest nesting of brackets outside strings. Exact up to the first error of grammar, if there is one."""
    if b"\\" in text:
        text = _ESCAPE.sub(b"", text)
    marks = text.translate(None, _NOT_STRUCTURE)
    if b'"' in marks:
        marks = _STRING.sub(b"", marks)
    deepest = level = 0
    for start in range(0, len(marks), _DEPTH_SLICE):
        # Bit 1 is set in the codes of [ and {, and clear in those of ] and }.
        piece = np.frombuffer(marks[start : start + _DEPTH_SLICE], dtype=np.uint8)
        levels = np.cumsum((piece & 2).astype(np.int8) - 1, dtype=np.int64)
        deepest = max(deepest, level + int(levels.max()))
        level += int(levels[-1])
    return deepest


# --- Requests: document -> types -----------------------------------------------------------------------------------


class _Decoder:
    """One request's walk from its document to types.

    ``binary`` is what follows the JSON part; ``exact`` says that the document's integers are exact at any size.
    """

    __slots__ = ("_binary", "_exact", "_limits", "_taken", "_whole")

    def __init__(self, binary: memoryview, limits: RequestLimits, *, exact: bool, whole: bool) -> None:
        self._binary = binary
        self._limits = limits
        self._exact = exact
        self._whole = whole
        self._taken = 0

    def request(self, document: Any, model: str, version: str) -> InferenceRequest:
        if type(document) is not dict:
            raise InvalidArgument(f"the request must be a JSON object, got {kind_of(document)}")
        parameters = document.get("parameters")
        if parameters is not None:
            parameters = self._parameters("request", parameters)
        request = InferenceRequest(
            model,
            version,
            self._id(document.get("id")),
            self._inputs(document.get("inputs")),
            self._outputs(document.get("outputs")),
        )
        if parameters:
            request.binary_output = _flag(parameters.pop("binary_data_output", False))
            request.parameters = parameters
        if self._taken != len(self._binary):
            raise InvalidArgument(
                f"{len(self._binary) - self._taken} bytes of the body belong to no input: its JSON part and the "
                f"'binary_data_size' of its inputs leave them over"
            )
        return request

    def _id(self, value: Any) -> str:
        if value is None:
            return ""
        if type(value) is not str:
            raise InvalidArgument(f"'id' must be a string, got {kind_of(value)}")
        check_id(value, self._limits.max_id_bytes)
        return value

    def _parameters(self, owner: str, value: Any) -> dict[str, ParameterValue]:
        if value is None:
            return {}
        if type(value) is not dict:
            raise InvalidArgument(f"{owner}: 'parameters' must be a JSON object, got {kind_of(value)}")
        check_limit(f"parameters of {owner}", len(value), self._limits.max_parameters)
        for key, item in value.items():
            if type(item) not in _PARAMETER_TYPES:
                raise InvalidArgument(
                    f"{owner}: parameter {shown(key)} must be a boolean, a number or a string, got {kind_of(item)}"
                )
        return value

    def _inputs(self, items: Any) -> list[Tensor]:
        if type(items) is not list:
            raise InvalidArgument(f"'inputs' must be a list of tensors, got {kind_of(items)}")
        check_limit("inputs", len(items), self._limits.max_inputs)
        tensors = [self._input(item) for item in items]
        if len(tensors) > 1:
            check_unique("input", [tensor.name for tensor in tensors])
        return tensors

    def _input(self, item: Any) -> Tensor:
        name = _name("inputs", item)
        datatype = item.get("datatype")
        if type(datatype) is not str:
            raise InvalidArgument(f"input {shown(name)}: 'datatype' must be a string, got {kind_of(datatype)}")
        check_datatype(name, datatype)
        shape = _shape(name, item.get("shape"))
        count = check_shape(name, shape, self._limits.max_dims)
        parameters = item.get("parameters")
        if parameters is not None:
            parameters = self._parameters(f"input {shown(name)}", parameters)
            refuse_shared_memory("input", name, parameters)
            if "binary_data_size" in parameters:
                return self._binary_input(name, datatype, shape, item, parameters["binary_data_size"])
        values = item.get("data")
        if type(values) is not list or not values or len(values) != count or type(values[0]) is list:
            values = flat_values(name, shape, values)
        return Tensor(name, datatype, shape, contents(name, datatype, values, exact=self._exact))

    def _binary_input(
        self, name: str, datatype: str, shape: tuple[int, ...], item: dict[str, Any], declared: ParameterValue
    ) -> Tensor:
        if item.get("data") is not None:
            raise InvalidArgument(f"input {shown(name)} has both 'data' and 'binary_data_size'; wanted one of them")
        size = whole_number(declared)
        left = len(self._binary) - self._taken
        if size is None or not 0 <= size <= left:
            raise InvalidArgument(
                f"input {shown(name)}: 'binary_data_size' must be a whole number in 0..{left}, the bytes left in the "
                f"body behind the JSON part; got {shown(declared)}"
            )
        start = self._taken
        self._taken = start + size
        return input_tensor(name, datatype, shape, self._binary[start : self._taken], whole=self._whole)

    def _outputs(self, items: Any) -> list[RequestedOutput]:
        if items is None:
            return []
        if type(items) is not list:
            raise InvalidArgument(f"'outputs' must be a list, got {kind_of(items)}")
        check_limit("outputs", len(items), self._limits.max_outputs)
        outputs = [self._output(item) for item in items]
        check_unique("output", [output.name for output in outputs])
        return outputs

    def _output(self, item: Any) -> RequestedOutput:
        name = _name("outputs", item)
        parameters = item.get("parameters")
        if parameters is None:
            return RequestedOutput(name)
        return requested_output(name, self._parameters(f"output {shown(name)}", parameters))


def _flag(value: ParameterValue) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"parameter 'binary_data_output' must be true or false, got {kind_of(value)}")
    return value


def _name(where: str, item: Any) -> str:
    if type(item) is not dict:
        raise InvalidArgument(f"every entry of {where!r} must be a JSON object, got {kind_of(item)}")
    name = item.get("name")
    if type(name) is not str or not name:
        raise InvalidArgument(
            f"every entry of {where!r} needs a 'name' that is a non-empty string, got {kind_of(name)}"
        )
    return name


def _shape(name: str, items: Any) -> tuple[int, ...]:
    if type(items) is not list:
        raise InvalidArgument(f"input {shown(name)}: 'shape' must be a list of integers, got {kind_of(items)}")
    if _INT.issuperset(map(type, items)):
        return tuple(items)
    shape = []
    for item in items:
        dim = item if type(item) is int else whole_number(item)
        if dim is None:
            raise InvalidArgument(f"input {shown(name)}: a dimension must be an integer, got {kind_of(item)}")
        shape.append(dim)
    return tuple(shape)


def flat_values(name: str, shape: tuple[int, ...], data: Any) -> list[Any]:
    """The flat list of elements of ``data``, which is flat or nested as ``shape`` says."""
    if type(data) is not list:
        raise InvalidArgument(
            f"input {shown(name)}: 'data' must be a list, or binary data must follow the JSON part; got {kind_of(data)}"
        )
    values: list[Any] = _flattened(name, shape, data) if data and type(data[0]) is list else data
    check_element_count(name, shape, len(values))
    return values


def _flattened(name: str, shape: tuple[int, ...], data: list[Any]) -> list[Any]:
    """The elements in row-major order. Lists that are nested deeper than ``shape`` remain as elements."""
    if shape and len(data) != shape[0]:
        raise InvalidArgument(f"input {shown(name)}: shape {dims(shape)} wants {shape[0]} lists, got {len(data)}")
    for axis, dim in enumerate(shape[1:], start=1):
        if not {list}.issuperset(map(type, data)) or not {dim}.issuperset(map(len, data)):
            raise InvalidArgument(
                f"input {shown(name)}: nested data do not match shape {dims(shape)}: every list on level {axis} "
                f"must have {dim} entries"
            )
        data = list(chain.from_iterable(data))
    return data


# --- Answers -------------------------------------------------------------------------------------------------------


def encode_infer(
    response: InferenceResponse,
    *,
    outputs: list[RequestedOutput],
    binary_default: bool,
    strict_json: bool = False,
) -> tuple[list[Buffer], int | None]:
    """The body in chunks, and the size of its JSON part when binary contents follow it (else None: all is JSON).

    ``outputs`` are the request's; an output that it does not name, or names without preference, goes by
    ``binary_default``. Numbers in JSON are flat and row-major. NaN and infinities are written as ``NaN``, ``Infinity``
    and ``-Infinity``, which common clients read and strict JSON parsers refuse; with ``strict_json`` they raise
    InvalidArgument naming the output. So do BYTES in JSON that are not UTF-8.
    """
    if len(response.outputs) == 1 and not response.parameters:
        return _single(response, response.outputs[0], outputs, binary_default, strict_json)
    chosen = {output.name: output.binary for output in outputs if output.binary is not None} if outputs else {}
    tail: list[Buffer] = []
    entries: list[bytes] = []
    for tensor in response.outputs:
        head = _output_head(tensor.name, tensor.datatype, tensor.shape)
        if chosen.get(tensor.name, binary_default):
            raw = raw_contents(tensor)
            tail.append(raw)
            entries.append(b'%b,"parameters":{"binary_data_size":%d}}' % (head, len(raw)))
        else:
            entries.append(b'%b,"data":%b}' % (head, _data(tensor, strict_json)))
    document = b'%b,"outputs":[%b]}' % (_response_head(response), b",".join(entries))
    return ([document, *tail], len(document)) if tail else ([document], None)


def _single(
    response: InferenceResponse, tensor: Tensor, outputs: list[RequestedOutput], binary: bool, strict: bool
) -> tuple[list[Buffer], int | None]:
    """An answer with one output and no parameters: most are."""
    for output in outputs:
        if output.name == tensor.name and output.binary is not None:
            binary = output.binary
    if not binary:
        frame = _frame(response, tensor, -1)
        return [b"%b%b}]}" % (frame.start(response.id), frame.numbers(tensor, strict))], None
    raw = raw_contents(tensor)
    start = _frame(response, tensor, len(raw)).start(response.id)
    return [start, raw], len(start)


class _Slate:
    """Memory to be written on anew for each answer, which costs less than an array over each answer's contents."""

    __slots__ = ("array", "view")

    def __init__(self, datatype: str, size: int) -> None:
        memory = bytearray(size)
        self.array: np.ndarray[Any, np.dtype[Any]] = np.frombuffer(memory, dtype=DATATYPES[datatype][0])
        self.view = memoryview(memory)


class _Frame:
    """What answers with one output have around their contents, up to an id and from there on.

    ``size``: of the contents behind the JSON; -1 when they are in it.
    """

    __slots__ = (
        "_datatype",
        "_head",
        "_name",
        "_rest",
        "_shape",
        "_size",
        "_slate_bytes",
        "_slates",
        "_version",
        "_whole",
    )

    def __init__(self, response: InferenceResponse, tensor: Tensor, size: int) -> None:
        self._version = response.version
        self._name = tensor.name
        self._datatype = tensor.datatype
        self._shape = tensor.shape
        self._size = size
        contents = b'"data":' if size < 0 else b'"parameters":{"binary_data_size":%d}}]}' % size
        self._head = _model_head(response.model, response.version)
        self._rest = b',"outputs":[%b,%b' % (_output_head(tensor.name, tensor.datatype, tensor.shape), contents)
        self._whole = self._head + self._rest
        #: Of contents to be written as numbers; -1: they are many, or other than orjson writes by itself.
        self._slate_bytes = -1
        if len(tensor.data) <= _SLATE_BYTES and tensor.datatype in _WRITTEN:
            self._slate_bytes = len(tensor.data)
        #: Those that nobody writes on.
        self._slates: list[_Slate] = []

    def fits(self, response: InferenceResponse, tensor: Tensor, size: int) -> bool:
        """Whether it is the frame of this answer of its model."""
        return (
            self._size == size
            and self._version == response.version
            and self._name == tensor.name
            and self._datatype == tensor.datatype
            and self._shape == tensor.shape
        )

    def start(self, identifier: str) -> bytes:
        return b'%b,"id":%b%b' % (self._head, orjson.dumps(identifier), self._rest) if identifier else self._whole

    def numbers(self, tensor: Tensor, strict: bool) -> bytes:
        data = tensor.data
        if not isinstance(data, bytes) or len(data) != self._slate_bytes:
            return _data(tensor, strict)
        try:
            slate = self._slates.pop()
        except IndexError:
            slate = _Slate(self._datatype, self._slate_bytes)
        slate.view[:] = data
        text = _numbers(tensor.name, slate.array, strict)
        self._slates.append(slate)
        return text


#: Frames by all that they are of, and those of each model's newest answer: forgotten as a whole when there are many.
_frames: Final[dict[tuple[str, str, str, str, tuple[int, ...], int], _Frame]] = {}
_newest: Final[dict[str, _Frame]] = {}


def _frame(response: InferenceResponse, tensor: Tensor, size: int) -> _Frame:
    newest = _newest.get(response.model)
    if newest is not None and newest.fits(response, tensor, size):
        return newest
    key = (response.model, response.version, tensor.name, tensor.datatype, tensor.shape, size)
    frame = _frames.get(key)
    if frame is None:
        if len(_frames) >= _FRAMES:
            _frames.clear()
            _newest.clear()
        frame = _frames[key] = _Frame(response, tensor, size)
    _newest[response.model] = frame
    return frame


def binary_outputs(response: InferenceResponse, outputs: list[RequestedOutput], binary_default: bool) -> frozenset[str]:
    """Those that :func:`encode_infer` does not write as JSON."""
    chosen = {output.name: output.binary for output in outputs if output.binary is not None}
    return frozenset(tensor.name for tensor in response.outputs if chosen.get(tensor.name, binary_default))


def _response_head(response: InferenceResponse) -> bytes:
    head = _model_head(response.model, response.version)
    if response.id:
        head = b'%b,"id":%b' % (head, orjson.dumps(response.id))
    if response.parameters:
        head = b'%b,"parameters":%b' % (head, orjson.dumps(response.parameters))
    return head


@lru_cache(maxsize=1024)
def _model_head(model: str, version: str) -> bytes:
    return b'{"model_name":%b,"model_version":%b' % (orjson.dumps(model), orjson.dumps(version))


@lru_cache(maxsize=4096)
def _output_head(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    document = {"name": name, "datatype": datatype, "shape": list(shape)}
    return orjson.dumps(document)[:-1]


def _data(tensor: Tensor, strict: bool) -> bytes:
    if isinstance(tensor.data, list):
        return _strings(tensor.name, tensor.data)
    return _numbers(tensor.name, printable(tensor), strict)


def _numbers(name: str, array: np.ndarray[Any, np.dtype[Any]], strict: bool) -> bytes:
    text = _dumps(array, option=_OPTION)
    # Only "null" has an n in the text of numbers; of booleans none is ever null. Bytes look for a number faster.
    if _N not in text or array.dtype.kind != "f":
        return text
    if strict:
        raise InvalidArgument(
            f"output {shown(name)} has NaN or infinite values, which strict JSON cannot carry; "
            f"ask for it as binary data"
        )
    return _with_literals(text, array)


def printable(tensor: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """A flat, aligned array of a type that orjson writes: 16-bit floats become float32, which holds them exactly."""
    flat = np.frombuffer(tensor.data, dtype=DATATYPES[tensor.datatype][0])  # type: ignore[arg-type]
    if tensor.datatype == "BF16":
        return bfloat16_values(flat)
    if tensor.datatype == "FP16":
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
            return flat.astype(np.float32)
    return flat if flat.flags.aligned else flat.copy()


def _with_literals(text: bytes, array: np.ndarray[Any, np.dtype[Any]]) -> bytes:
    """``text`` with each null replaced by the literal of the non-finite number that orjson wrote it for."""
    pieces = text.split(b"null")
    parts = [pieces[0]]
    for value, piece in zip(array[~np.isfinite(array)].tolist(), pieces[1:], strict=True):
        parts += (b"NaN" if math.isnan(value) else b"Infinity" if value > 0 else b"-Infinity", piece)
    return b"".join(parts)


def _strings(name: str, elements: list[bytes]) -> bytes:
    try:
        return orjson.dumps([element.decode() for element in elements])
    except UnicodeDecodeError:
        raise InvalidArgument(
            f"output {shown(name)} has BYTES that are not UTF-8, which JSON cannot carry; ask for it as binary data"
        ) from None
