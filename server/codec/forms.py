"""What earlier JSON requests of the same form said, so that a client which repeats itself is not read from scratch.

A request's *form* is everything but its numbers: the JSON before and after the one list of numbers that is the data of
its only input, or, with the binary extension, the whole JSON part. Requests of one form differ in what is no part of
it, so they have the same names, shapes, parameters and outputs. A form is learned when it comes a second time and the
request was good; what does not fit it in every detail is read the usual way, errors with it.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import orjson

from server.codec.binary import input_tensor
from server.codec.elements import InexactIntegerError, contents
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


class _Input:
    """Its contents: ``elements`` numbers of JSON, or bytes ``start`` to ``stop`` of the binary part."""

    __slots__ = ("datatype", "elements", "name", "shape", "start", "stop")

    def __init__(self, tensor: Tensor, elements: int, start: int, stop: int) -> None:
        self.name = tensor.name
        self.datatype = tensor.datatype
        self.shape = tensor.shape
        self.elements = elements
        self.start = start
        self.stop = stop


class _Known:
    """What a form says under these limits."""

    __slots__ = ("binary_output", "id", "inputs", "limits", "outputs", "parameters")

    def __init__(self, limits: RequestLimits, inputs: list[_Input], request: InferenceRequest) -> None:
        self.limits = limits
        self.inputs = inputs
        self.id = request.id
        self.outputs: list[RequestedOutput] = list(request.outputs)
        self.parameters: dict[str, ParameterValue] = dict(request.parameters)
        self.binary_output = request.binary_output

    def request(self, model: str, version: str, inputs: list[Tensor]) -> InferenceRequest:
        """A request of its own: whoever has it may change its lists and its parameters."""
        parameters = self.parameters.copy() if self.parameters else {}
        return InferenceRequest(model, version, self.id, inputs, list(self.outputs), parameters, self.binary_output)


class Forms:
    """A bounded memory of forms, forgotten as a whole when it is full."""

    def __init__(self) -> None:
        self._known: dict[Form, _Known] = {}
        self._seen: set[int] = set()

    def __len__(self) -> int:
        return len(self._known)

    def request(
        self,
        form: Form,
        text: bytes,
        binary: memoryview,
        model: str,
        version: str,
        limits: RequestLimits,
        *,
        whole: bool = True,
    ) -> InferenceRequest | None:
        """The request, when its form is known and all else is as it should be. ``text`` is its JSON."""
        known = self._known.get(form)
        if known is None or (known.limits is not limits and known.limits != limits):
            return None
        if binary:
            inputs = _from_binary(known, binary, whole)
        else:
            inputs = _from_json(known, text[len(form[0]) : len(text) - len(form[1])])
        return None if inputs is None else known.request(model, version, inputs)

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
        self._known[form] = _Known(limits, inputs, request)


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


def _from_json(known: _Known, values_text: bytes) -> list[Tensor] | None:
    given = known.inputs[0]
    try:
        values = orjson.loads(values_text)
        if len(values) != given.elements:
            return None
        return [
            Tensor(given.name, given.datatype, given.shape, contents(given.name, given.datatype, values, exact=False))
        ]
    except (orjson.JSONDecodeError, InvalidArgument, InexactIntegerError):
        return None


def _from_binary(known: _Known, binary: memoryview, whole: bool) -> list[Tensor] | None:
    inputs = known.inputs
    if inputs[-1].stop != len(binary):
        return None
    return [
        Tensor(given.name, given.datatype, given.shape, binary[given.start : given.stop])
        if given.datatype != "BOOL"
        else input_tensor(given.name, given.datatype, given.shape, binary[given.start : given.stop], whole=whole)
        for given in inputs
    ]


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
