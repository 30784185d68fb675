"""What an ONNX file says of itself before anything is built from it: versions, operators, where its weights lie.

The file is walked as protobuf wire format, not parsed: only the fields named below are looked into, so a file of 2 GiB
costs a few reads. Numbers are field numbers of ``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from server.runtime.wireformat import Malformed, TooLarge, WireFile

_MODEL_IR_VERSION, _MODEL_GRAPH, _MODEL_OPSET, _MODEL_TRAINING, _MODEL_FUNCTION = 1, 7, 8, 20, 25
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_TRAINING_GRAPHS: Final = frozenset({1, 2})
_FUNCTION_NAME, _FUNCTION_NODE, _FUNCTION_DOMAIN, _FUNCTION_ATTRIBUTE = 1, 7, 10, 11
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 5, 11, 12, 15
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = frozenset({5, 10}), frozenset({6, 11}), frozenset({22, 23})
_SPARSE_TENSORS: Final = frozenset({1, 2})
_TENSOR_NAME, _TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION, _EXTERNAL = 8, 13, 14, 1
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_EXTERNAL_KEYS: Final = ("location", "offset", "length")
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE = 1, 2, 1, 2

_MODEL: Final = frozenset({_MODEL_GRAPH, _MODEL_OPSET, _MODEL_TRAINING, _MODEL_FUNCTION})
_FUNCTION: Final = frozenset({_FUNCTION_NAME, _FUNCTION_NODE, _FUNCTION_DOMAIN, _FUNCTION_ATTRIBUTE})
_GRAPH: Final = frozenset({_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE})
_NODE: Final = frozenset({_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN})
_ATTRIBUTE: Final = _ATTRIBUTE_TENSORS | _ATTRIBUTE_GRAPHS | _ATTRIBUTE_SPARSE
_TENSOR: Final = frozenset({_TENSOR_NAME, _TENSOR_EXTERNAL_DATA})
_ENTRY: Final = frozenset({_ENTRY_KEY, _ENTRY_VALUE})

#: Bounds on what is kept, far over any real model.
_MAX_OPERATORS: Final = 10_000
_MAX_OPSETS: Final = 1_000
_MAX_EXTERNAL_TENSORS: Final = 200_000
_MAX_QUOTED_CHARS: Final = 120
#: Decimal digits of an offset or a length: enough for 2**63.
_MAX_DIGITS: Final = 19


@dataclass(slots=True, frozen=True)
class ExternalTensor:
    """A tensor whose bytes lie in another file. ``length`` None: up to the size that its shape asks for."""

    name: str
    location: str
    offset: int
    length: int | None


@dataclass(slots=True, frozen=True)
class ModelFacts:
    """What a file says of itself.

    ``opsets``: domain -> version imported, the highest when it comes twice; plain ONNX is "". ``foreign``: domain -> an
    operator of it, for each domain but plain ONNX whose operators the graphs use and the file does not define itself
    as functions. ``unranked``: inputs and outputs that declare no shape.
    """

    ir_version: int
    opsets: Mapping[str, int]
    foreign: Mapping[str, str]
    external: tuple[ExternalTensor, ...]
    unranked: frozenset[str]


def read_facts(file: WireFile, max_graph_depth: int) -> ModelFacts:
    """Walk the file once. Raises Malformed or TooLarge."""
    reader = _Reader(file, max_graph_depth)
    reader.model()
    foreign = {domain: name for domain, name in sorted(reader.operators - reader.functions) if domain}
    return ModelFacts(reader.ir_version, reader.opsets, foreign, tuple(reader.external), frozenset(reader.unranked))


def quoted(text: str) -> str:
    """A name out of a file, fit for a sentence: printable, in quotes, and not too long."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return f"'{shown}'" if len(shown) <= _MAX_QUOTED_CHARS else f"'{shown[:_MAX_QUOTED_CHARS]}...'"


class _Reader:
    """One walk; each method reads one message at ``start:end`` and keeps what is asked for."""

    def __init__(self, file: WireFile, max_graph_depth: int) -> None:
        self._file = file
        self._max_graph_depth = max_graph_depth
        self.ir_version = 0
        self.opsets: dict[str, int] = {}
        self.operators: set[tuple[str, str]] = set()
        self.functions: set[tuple[str, str]] = set()
        self.external: list[ExternalTensor] = []
        self.unranked: set[str] = set()

    def model(self) -> None:
        numbers = {_MODEL_IR_VERSION: 0}
        graphs = 0
        for field, start, end in self._file.fields(0, self._file.size, _MODEL, numbers):
            if field == _MODEL_GRAPH:
                self._graph(start, end, 1)
                graphs += 1
            elif field == _MODEL_OPSET:
                self._opset(start, end)
            elif field == _MODEL_FUNCTION:
                self._function(start, end)
            else:
                for _, first, last in self._file.fields(start, end, _TRAINING_GRAPHS):
                    self._graph(first, last, 1)
        self.ir_version = numbers[_MODEL_IR_VERSION]
        if not graphs:
            raise Malformed("there is no graph in it")

    def _opset(self, start: int, end: int) -> None:
        numbers = {_OPSET_VERSION: 0}
        domain = ""
        for _, first, last in self._file.fields(start, end, frozenset({_OPSET_DOMAIN}), numbers):
            domain = _canonical(self._file.text(first, last))
        self.opsets[domain] = max(numbers[_OPSET_VERSION], self.opsets.get(domain, 0))
        if len(self.opsets) > _MAX_OPSETS:
            raise TooLarge(f"imports more than {_MAX_OPSETS} operator sets")

    def _function(self, start: int, end: int) -> None:
        domain = name = ""
        for field, first, last in self._file.fields(start, end, _FUNCTION):
            if field == _FUNCTION_NAME:
                name = self._file.text(first, last)
            elif field == _FUNCTION_DOMAIN:
                domain = _canonical(self._file.text(first, last))
            elif field == _FUNCTION_NODE:
                self._node(first, last, 1)
            else:
                self._attribute(first, last, 1)
        self.functions.add((domain, name))
        if len(self.functions) > _MAX_OPERATORS:
            raise TooLarge(f"defines more than {_MAX_OPERATORS} functions")

    def _graph(self, start: int, end: int, depth: int) -> None:
        if depth > self._max_graph_depth:
            raise TooLarge(f"has graphs inside graphs more than {self._max_graph_depth} deep")
        for field, first, last in self._file.fields(start, end, _GRAPH):
            if field == _GRAPH_NODE:
                self._node(first, last, depth)
            elif field == _GRAPH_INITIALIZER:
                self._tensor(first, last)
            elif field == _GRAPH_SPARSE:
                self._sparse(first, last)
            elif depth == 1:
                self._value(first, last)

    def _node(self, start: int, end: int, depth: int) -> None:
        domain = operator = ""
        for field, first, last in self._file.fields(start, end, _NODE):
            if field == _NODE_ATTRIBUTE:
                self._attribute(first, last, depth)
            elif field == _NODE_OPERATOR:
                operator = self._file.text(first, last)
            else:
                domain = _canonical(self._file.text(first, last))
        self.operators.add((domain, operator))
        if len(self.operators) > _MAX_OPERATORS:
            raise TooLarge(f"uses more than {_MAX_OPERATORS} different operators")

    def _attribute(self, start: int, end: int, depth: int) -> None:
        for field, first, last in self._file.fields(start, end, _ATTRIBUTE):
            if field in _ATTRIBUTE_TENSORS:
                self._tensor(first, last)
            elif field in _ATTRIBUTE_SPARSE:
                self._sparse(first, last)
            else:
                self._graph(first, last, depth + 1)

    def _sparse(self, start: int, end: int) -> None:
        for _, first, last in self._file.fields(start, end, _SPARSE_TENSORS):
            self._tensor(first, last)

    def _tensor(self, start: int, end: int) -> None:
        numbers = {_TENSOR_DATA_LOCATION: 0}
        name: tuple[int, int] = (start, start)
        entries: list[tuple[str, str]] = []
        for field, first, last in self._file.fields(start, end, _TENSOR, numbers):
            if field == _TENSOR_NAME:
                name = first, last
            elif (entry := self._entry(first, last))[0] in _EXTERNAL_KEYS:
                entries.append(entry)
        # An enum has 32 bits; entries of a tensor that is not external are never followed.
        if numbers[_TENSOR_DATA_LOCATION] & 0xFFFFFFFF == _EXTERNAL:
            self.external.append(_external(self._file.text(*name), entries))
            if len(self.external) > _MAX_EXTERNAL_TENSORS:
                raise TooLarge(f"has more than {_MAX_EXTERNAL_TENSORS} tensors with external data")

    def _entry(self, start: int, end: int) -> tuple[str, str]:
        key = value = ""
        for field, first, last in self._file.fields(start, end, _ENTRY):
            text = self._file.text(first, last)
            key, value = (text, value) if field == _ENTRY_KEY else (key, text)
        return key, value

    def _value(self, start: int, end: int) -> None:
        name, shaped = "", False
        for field, first, last in self._file.fields(start, end, frozenset({_VALUE_NAME, _VALUE_TYPE})):
            if field == _VALUE_NAME:
                name = self._file.text(first, last)
            else:
                shaped = shaped or self._has_shape(first, last)
        if not shaped:
            self.unranked.add(name)

    def _has_shape(self, start: int, end: int) -> bool:
        return any(
            True
            for _, first, last in self._file.fields(start, end, frozenset({_TYPE_TENSOR}))
            for _ in self._file.fields(first, last, frozenset({_TENSOR_SHAPE}))
        )


def _canonical(domain: str) -> str:
    """``ai.onnx`` is another name of plain ONNX."""
    return "" if domain == "ai.onnx" else domain


def _external(name: str, entries: list[tuple[str, str]]) -> ExternalTensor:
    keys = [key for key, _ in entries]
    for key in _EXTERNAL_KEYS:
        if keys.count(key) > 1:
            raise Malformed(f"tensor {quoted(name)} gives the {key} of its external data more than once")
    values = dict(entries)
    offset, length = (_number(name, key, values) for key in _EXTERNAL_KEYS[1:])
    return ExternalTensor(name, values.get("location", ""), offset or 0, length)


def _number(name: str, key: str, values: Mapping[str, str]) -> int | None:
    text = values.get(key)
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise Malformed(f"tensor {quoted(name)} has external data with {key} {quoted(text)}, wanted a whole number")
    return int(text)
