"""What is said to an upstream server, and how its answers are read: V2 over HTTP, in JSON or with binary tensors.

Tensors are sent in binary form where the server says that it reads them (``binary_tensor_data`` among its extensions),
else as JSON. Answers may have either form, tensor by tensor, whatever was asked for. Nothing of an answer is believed
before it is checked: names, datatypes, shapes, sizes, rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar
from uuid import uuid4

import numpy as np
import orjson

from server.codec.binary import input_tensor, raw_contents
from server.codec.checks import shown
from server.codec.elements import InexactIntegerError, contents
from server.codec.json import flat_values, parse, parse_exactly, printable
from server.errors import InputRejected, InvalidArgument, RuntimeFailure, UpstreamFailure
from server.runtime.base import Batch
from server.types import BYTES, DATATYPES, Buffer, ModelSpec, Tensor, TensorSpec, element_count

T = TypeVar("T")

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
#: The extension whose servers read and write tensors in binary form.
BINARY_EXTENSION: Final = "binary_tensor_data"
_MAX_RANK: Final = 32


class BadAnswer(Exception):
    """An answer that is not what the protocol or the model's signature says; the text names what is wrong."""


class Dialect:
    """How one version's batches are written for its upstream, in ``binary`` form or as JSON, and the answers read."""

    def __init__(self, spec: ModelSpec, *, binary: bool) -> None:
        self.binary = binary
        self._spec = spec
        self._outputs = {output.name: output for output in spec.outputs}
        asked = {"parameters": {"binary_data": True}} if binary else {}
        self._wanted = [{"name": output.name, **asked} for output in spec.outputs]

    def request(self, batch: Batch) -> tuple[bytes, dict[str, str]]:
        """The body and its headers. InputRejected for values that JSON cannot carry, where JSON is all there is."""
        given = zip(self._spec.inputs, batch.shapes, batch.parts, strict=True)
        inputs = [_input(spec, shape, parts) for spec, shape, parts in given if parts is not None]
        if not self.binary:
            document = self._document([_head(tensor) | {"data": _data(tensor)} for tensor in inputs])
            return document, {"Content-Type": "application/json"}
        raw = [raw_contents(tensor) for tensor in inputs]
        sizes = [{"parameters": {"binary_data_size": len(data)}} for data in raw]
        document = self._document([_head(tensor) | size for tensor, size in zip(inputs, sizes, strict=True)])
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(document))}
        return b"".join([document, *raw]), headers

    def answer(self, batch: Batch, header_length: str | None, content: bytes) -> list[Tensor]:
        """The outputs in the order of the signature, binary ones as views of ``content``, or UpstreamFailure."""
        try:
            found = _tensors(self._outputs, header_length, content)
            tensors = [found[output.name] for output in self._spec.outputs]
            for tensor in tensors:
                self._check_rows(tensor, batch.rows)
        except KeyError as error:
            raise UpstreamFailure(f"The server of this version answered without output {error}.") from None
        except BadAnswer as error:
            raise UpstreamFailure(f"The server of this version answered wrongly: {error}.") from None
        return tensors

    def _document(self, inputs: list[dict[str, Any]]) -> bytes:
        # The id is optional in the protocol; models that answer with their request's fail where there is none.
        document = {"id": uuid4().hex, "inputs": inputs, "outputs": self._wanted}
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)

    def _check_rows(self, tensor: Tensor, rows: int) -> None:
        if self._spec.max_batch_size and tensor.shape[0] != rows:
            raise BadAnswer(f"output '{tensor.name}' has {tensor.shape[0]} rows for a batch of {rows}")


# --- requests --------------------------------------------------------------------------------------------------------


def _input(spec: TensorSpec, shape: tuple[int, ...], parts: list[Buffer | list[bytes]]) -> Tensor:
    """One input of all members. Parts that do not fill the shape are a mistake of ours."""
    wanted = element_count(shape)
    if spec.datatype == BYTES:
        elements = [element for part in parts for element in part if isinstance(element, bytes)]
        _require(spec, len(elements), wanted, "elements")
        return Tensor(spec.name, BYTES, shape, elements)
    data = b"".join([part for part in parts if not isinstance(part, list)])
    _require(spec, len(data), wanted * DATATYPES[spec.datatype][1], "bytes")
    return Tensor(spec.name, spec.datatype, shape, data)


def _require(spec: TensorSpec, got: int, wanted: int, unit: str) -> None:
    if got != wanted:
        raise RuntimeFailure(f"The batch holds {got} {unit} of input '{spec.name}', its shape says {wanted}.")


def _head(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}


def _data(tensor: Tensor) -> list[str] | np.ndarray[Any, np.dtype[Any]]:
    """What orjson writes as the flat ``data`` of an input, exactly."""
    if isinstance(tensor.data, list):
        try:
            return [element.decode() for element in tensor.data]
        except UnicodeDecodeError:
            raise _not_json(tensor, "BYTES that are not UTF-8") from None
    array = printable(tensor)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _not_json(tensor, "NaN or infinite values")
    return array


def _not_json(tensor: Tensor, what: str) -> InputRejected:
    return InputRejected(f"Input '{tensor.name}' has {what}; the server of this version takes JSON only.")


# --- answers ---------------------------------------------------------------------------------------------------------


def json_object(text: bytes) -> dict[str, Any]:
    """A document that is an object, or BadAnswer."""
    return _object(_read(parse, text)[0])


def error_text(content: bytes) -> str:
    """The reason that a V2 error answer gives; "" when it is no such answer."""
    try:
        text = json_object(content).get("error")
    except BadAnswer:
        return ""
    return text if isinstance(text, str) else ""


def dimensions(value: Any, *, least: int) -> tuple[int, ...] | None:
    """A list of whole numbers from ``least`` up, or None."""
    if not isinstance(value, list) or len(value) > _MAX_RANK:
        return None
    # Some servers write sizes as text in places; a shape of text is not one.
    return tuple(value) if all(type(dim) is int and least <= dim < 2**62 for dim in value) else None


def _read(parser: Callable[[bytes], T], text: bytes) -> T:
    try:
        return parser(text)
    except InvalidArgument:
        raise BadAnswer("it is not JSON") from None


def _object(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise BadAnswer("it is not a JSON object")
    return document


def _tensors(outputs: Mapping[str, TensorSpec], header_length: str | None, content: bytes) -> dict[str, Tensor]:
    """Every output of the answer that the signature names."""
    size = _json_size(header_length, len(content))
    text, binary = content[:size], memoryview(content)[size:]
    document, exact = _read(parse, text)
    try:
        return _Reader(outputs, binary, exact=exact).read(_object(document))
    except InexactIntegerError:
        return _Reader(outputs, binary, exact=True).read(_object(_read(parse_exactly, text)))


def _json_size(header_length: str | None, size: int) -> int:
    """Where the JSON part of an answer ends: at its end, unless a header says otherwise."""
    if header_length is None:
        return size
    if not (header_length.isascii() and header_length.isdigit()) or int(header_length[:19]) > size:
        raise BadAnswer("its JSON part does not end within it")
    return int(header_length)


class _Reader:
    """One answer's walk from its document to tensors. ``binary`` follows the JSON part; see the codec for ``exact``."""

    def __init__(self, outputs: Mapping[str, TensorSpec], binary: memoryview, *, exact: bool) -> None:
        self._outputs = outputs
        self._rest = binary
        self._exact = exact

    def read(self, document: dict[str, Any]) -> dict[str, Tensor]:
        entries = document.get("outputs")
        if not isinstance(entries, list):
            raise BadAnswer("its JSON part has no list of outputs")
        found: dict[str, Tensor] = {}
        for entry in entries:
            name, raw = self._contents(entry)
            if name in found:
                raise BadAnswer(f"output '{name[:64]}' comes twice")
            if name in self._outputs:
                found[name] = self._tensor(self._outputs[name], entry, raw)
        if self._rest:
            raise BadAnswer(f"{len(self._rest)} bytes belong to no output")
        return found

    def _contents(self, entry: Any) -> tuple[str, memoryview | None]:
        """An output's name, and its binary contents if it has such."""
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise BadAnswer("an output has no name")
        parameters = entry.get("parameters")
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is None:
            return name, None
        if type(size) is not int or not 0 <= size <= len(self._rest) or entry.get("data") is not None:
            raise BadAnswer(f"output '{name[:64]}' is not as large as the answer says")
        raw, self._rest = self._rest[:size], self._rest[size:]
        return name, raw

    def _tensor(self, spec: TensorSpec, entry: dict[str, Any], raw: memoryview | None) -> Tensor:
        shape = _fitting(spec, entry)
        try:
            if raw is not None:
                return input_tensor(spec.name, spec.datatype, shape, raw)
            values = flat_values(spec.name, shape, entry.get("data"))
            data = contents(spec.name, spec.datatype, values, exact=self._exact)
        except InvalidArgument as error:
            # The codec speaks of what it usually reads.
            reason = error.message.removeprefix(f"input {shown(spec.name)}").lstrip(": ")
            raise BadAnswer(f"output '{spec.name}': {reason}") from None
        return Tensor(spec.name, spec.datatype, shape, data)


def _fitting(spec: TensorSpec, entry: dict[str, Any]) -> tuple[int, ...]:
    """The shape of an output that is of its declared datatype and fits its declared shape."""
    if entry.get("datatype") != spec.datatype:
        raise BadAnswer(f"output '{spec.name}' is not {spec.datatype}")
    shape = dimensions(entry.get("shape"), least=0)
    if shape is None or len(shape) != len(spec.shape):
        raise BadAnswer(f"the shape of output '{spec.name}' is not like {list(spec.shape)}")
    if any(want not in (-1, got) for want, got in zip(spec.shape, shape, strict=True)):
        raise BadAnswer(f"output '{spec.name}' has shape {list(shape)}, which does not fit {list(spec.shape)}")
    return shape
