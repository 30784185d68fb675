"""What earlier JSON requests of the same form said, so that a client which repeats itself is not read from scratch.

A request's *form* is everything but its numbers: the JSON before and after the one list of numbers that is the data of
its only input, or, with the binary extension, the whole JSON part. Requests of one form differ in what is no part of
it, so they have the same names, shapes, parameters and outputs. A form is learned when it comes a second time and the
request was good; what does not fit it in every detail is read the usual way, errors with it.

The form of a model's newest request is tried first: whether a body begins and ends with it costs less to see than
where the list in a body begins and ends. Whatever stands between is parsed, and has to be one list of numbers.
"""

from __future__ import annotations

import struct
from typing import Any, Final, TypeAlias

import orjson

from server.codec.binary import input_tensor
from server.codec.elements import InexactIntegerError, Pack, are_numbers, contents, packer
from server.errors import InvalidArgument
from server.types import (
    BYTES,
    Buffer,
    InferenceRequest,
    ParameterValue,
    RequestedOutput,
    RequestLimits,
    Tensor,
    element_count,
)

#: (before the numbers, after them); nothing is after where the contents are binary.
Form: TypeAlias = tuple[bytes, bytes]

#: Longer JSON is not looked at: there the form is little of the work.
LONGEST: Final = 16 * 1024
_LONGEST_FORM: Final = 2048
_FORMS: Final = 256
_SEEN: Final = 1024
_DATA: Final = b'"data"'
#: Two lists of numbers that stand in for the data, to see whether it is there that they arrive.
_PROBES: Final = ((b"[1]", 1), (b"[2]", 2))
#: Binary contents of up to this size are copied: it costs less than a view, and does not keep the whole body.
_COPIED_BYTES: Final = 4096
#: A name of this module's own is found faster than one of another module.
_loads: Final = orjson.loads


class _Input:
    """Its contents: ``elements`` numbers of JSON, or bytes ``start`` to ``stop`` of the binary part."""

    __slots__ = ("datatype", "elements", "name", "pack", "shape", "start", "stop")

    def __init__(self, tensor: Tensor, elements: int, start: int, stop: int) -> None:
        self.name = tensor.name
        self.datatype = tensor.datatype
        self.shape = tensor.shape
        self.elements = elements
        self.start = start
        self.stop = stop
        self.pack: Pack | None = packer(tensor.datatype, elements)


class _Known:
    """What a form says under these limits."""

    __slots__ = ("after", "before", "binary_output", "id", "inputs", "limits", "outputs", "parameters")

    def __init__(self, form: Form, limits: RequestLimits, inputs: list[_Input], request: InferenceRequest) -> None:
        self.before, self.after = form
        self.limits = limits
        self.inputs = inputs
        self.id = request.id
        self.outputs: list[RequestedOutput] = list(request.outputs)
        self.parameters: dict[str, ParameterValue] = dict(request.parameters)
        self.binary_output = request.binary_output

    def request(
        self, body: bytes, size: int, model: str, version: str, limits: RequestLimits, whole: bool
    ) -> InferenceRequest | None:
        """None when ``body``, whose JSON part has ``size`` bytes, is not of this form, or other than it says."""
        before, after = self.before, self.after
        if not body.startswith(before) or (self.limits is not limits and self.limits != limits):
            return None
        if after:
            if size != len(body) or not body.endswith(after):
                return None
            inputs = _from_json(self.inputs[0], body[len(before) : size - len(after)])
        else:
            inputs = _from_binary(self.inputs, body, size, whole) if size == len(before) else None
        if inputs is None:
            return None
        # Lists and parameters of its own: whoever has the request may change them.
        outputs = list(self.outputs) if self.outputs else []
        parameters = self.parameters.copy() if self.parameters else {}
        return InferenceRequest(model, version, self.id, inputs, outputs, parameters, self.binary_output)


class Forms:
    """A bounded memory of forms, forgotten as a whole when it is full; that of the newest by model, likewise."""

    def __init__(self) -> None:
        self._known: dict[Form, _Known] = {}
        self._newest: dict[str, _Known] = {}
        self._seen: set[int] = set()

    def __len__(self) -> int:
        return len(self._known)

    def newest(
        self, body: bytes, size: int, model: str, version: str, limits: RequestLimits, *, whole: bool = True
    ) -> InferenceRequest | None:
        """The request, when it has the form of the newest for ``model``. Its JSON is the first ``size`` bytes."""
        known = self._newest.get(model)
        return None if known is None else known.request(body, size, model, version, limits, whole)

    def request(
        self, form: Form, body: bytes, size: int, model: str, version: str, limits: RequestLimits, *, whole: bool = True
    ) -> InferenceRequest | None:
        """The request, when its form is known and all else is as it should be. Its JSON is the first ``size`` bytes."""
        known = self._known.get(form)
        request = None if known is None else known.request(body, size, model, version, limits, whole)
        if known is not None and request is not None:
            if len(self._newest) >= _FORMS:
                self._newest.clear()
            self._newest[model] = known
        return request

    def learn(self, form: Form, request: InferenceRequest, binary_size: int, limits: RequestLimits) -> None:
        """``form`` was not known; ``request`` is what it was read as, its JSON parsed without exact integers."""
        mark = hash(form)
        if mark not in self._seen:
            if len(self._seen) >= _SEEN:
                self._seen.clear()
            self._seen.add(mark)
            return
        inputs = _layout(request.inputs, binary_size) if binary_size else _one_list(form, request.inputs)
        if inputs is None or len(form[0]) + len(form[1]) > _LONGEST_FORM:
            return
        if len(self._known) >= _FORMS:
            self._known.clear()
        self._known[form] = _Known(form, limits, inputs, request)


def form_of(text: bytes, *, has_binary: bool) -> Form | None:
    """Of a request's JSON; None when it has no list of numbers. Whether that list is the data is not known yet."""
    if has_binary:
        return text, b""
    first = text.find(b"[", text.find(_DATA) + 1)
    stop = text.find(b"]", first) + 1
    if not 0 < first < stop < len(text):  # something closes the request: a form without an end is one with binary
        return None
    start = text.rfind(b"[", first, stop)  # one row of data may be a list in a list
    return text[:start], text[stop:]


def _from_json(given: _Input, values_text: bytes) -> list[Tensor] | None:
    pack = given.pack
    try:
        values = _loads(values_text)
        if type(values) is not list or len(values) != given.elements:
            return None
        if pack is None:
            data = contents(given.name, given.datatype, values, exact=False)
        elif are_numbers(values):
            data = pack(*values)
        else:
            return None
    except (orjson.JSONDecodeError, InvalidArgument, InexactIntegerError, OverflowError, struct.error):
        return None
    return [Tensor(given.name, given.datatype, given.shape, data)]


def _from_binary(inputs: list[_Input], body: bytes, size: int, whole: bool) -> list[Tensor] | None:
    if inputs[-1].stop != len(body) - size:
        return None
    tensors = []
    for given in inputs:
        start, stop = size + given.start, size + given.stop
        data: Buffer = body[start:stop] if stop - start <= _COPIED_BYTES else memoryview(body)[start:stop]
        if given.datatype == "BOOL":
            tensors.append(input_tensor(given.name, given.datatype, given.shape, data, whole=whole))
        else:
            tensors.append(Tensor(given.name, given.datatype, given.shape, data))
    return tensors


def _one_list(form: Form, inputs: list[Tensor]) -> list[_Input] | None:
    """What the form says of the only input, when the list that it leaves out is that input's data."""
    if len(inputs) != 1:
        return None
    (tensor,) = inputs
    if tensor.datatype == BYTES or not all(_arrives(form, *probe) for probe in _PROBES):
        return None
    return [_Input(tensor, element_count(tensor.shape), 0, 0)]


def _arrives(form: Form, text: bytes, number: int) -> bool:
    try:
        data: Any = orjson.loads(text.join(form))["inputs"][0].get("data")
    except orjson.JSONDecodeError:  # it was no list by itself
        return False
    while type(data) is list and len(data) == 1:
        (data,) = data
    return type(data) is int and data == number


def _layout(inputs: list[Tensor], binary_size: int) -> list[_Input] | None:
    """Where each input's contents are, when all have theirs in the binary part, in their order, and none is strings."""
    found: list[_Input] = []
    stop = 0
    for tensor in inputs:
        size = None if tensor.datatype == BYTES else _size(tensor.data)
        if size is None:
            return None
        start, stop = stop, stop + size
        found.append(_Input(tensor, 0, start, stop))
    return found if stop == binary_size else None


def _size(data: Buffer | list[bytes]) -> int | None:
    """Bytes of contents that are a view on the binary part; None for those that came as JSON."""
    if isinstance(data, list):
        return None
    return len(data) if isinstance(data, memoryview) else None
