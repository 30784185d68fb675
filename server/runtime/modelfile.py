"""The ONNX file on disk: its digest with external data, and the two facts ONNX Runtime's Python API does not tell.

The file is walked as protobuf wire format, not parsed: only the fields named below are looked into, so a file of
2 GiB costs a few jumps. Numbers are field numbers of ``onnx.proto``.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.errors import ModelLoadError

#: protobuf messages, and with them ONNX files, cannot be larger.
MAX_FILE_BYTES = 2**31 - 1

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 5, 11, 12, 15
_NODE_ATTRIBUTE = 5
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_TENSOR_EXTERNAL_DATA = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE = 1, 2, 1, 2
_MAX_GRAPH_DEPTH = 32

Span = tuple[int, int]


class _Malformed(Exception):
    """The bytes are not protobuf wire format."""


def check(path: Path) -> None:
    """Raise ModelLoadError unless ``path`` is a regular file of a size that ONNX allows."""
    if not path.exists():
        raise ModelLoadError(f"{path.name} does not exist.")
    if not path.is_file():
        raise ModelLoadError(f"{path.name} is not a regular file.")
    size = path.stat().st_size
    if size == 0:
        raise ModelLoadError(f"{path.name} is empty.")
    if size > MAX_FILE_BYTES:
        raise ModelLoadError(f"{path.name} has {size} bytes; an ONNX file has at most {MAX_FILE_BYTES}.")


def digest(path: Path) -> str:
    """SHA-256 (hex) over the file and, in name order, each external data file it names that lies beside it."""
    with path.open("rb") as file:
        total = hashlib.file_digest(file, "sha256")
    folder = path.parent.resolve()
    for location in sorted(external_locations(path)):
        data = folder / location
        # ONNX Runtime itself refuses locations outside the folder, and missing ones, when it loads the file.
        if data.is_file() and data.resolve().is_relative_to(folder):
            with data.open("rb") as file:
                total.update(location.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def external_locations(path: Path) -> set[str]:
    """File names of external data that the graph's tensors refer to; empty for a malformed file."""
    with _mapped(path) as data:
        if data.find(b"location") < 0:
            return set()
        try:
            return {
                location
                for graph in _fields(data, (0, len(data)), _MODEL_GRAPH)
                for tensor in _tensors(data, graph, _MAX_GRAPH_DEPTH)
                for location in _locations(data, tensor)
            }
        except _Malformed:
            return set()


def unranked(path: Path) -> set[str]:
    """Names of graph inputs and outputs that declare no shape: ONNX Runtime reports them like scalars."""
    with _mapped(path) as data:
        try:
            return {
                name
                for graph in _fields(data, (0, len(data)), _MODEL_GRAPH)
                for value in _fields(data, graph, _GRAPH_INPUT, _GRAPH_OUTPUT)
                for name in _name_if_unranked(data, value)
            }
        except _Malformed:
            return set()


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _name_if_unranked(data: mmap.mmap, value: Span) -> Iterator[str]:
    shaped = any(
        True
        for kind in _fields(data, value, _VALUE_TYPE)
        for tensor in _fields(data, kind, _TYPE_TENSOR)
        for _ in _fields(data, tensor, _TENSOR_SHAPE)
    )
    if not shaped:
        for start, end in _fields(data, value, _VALUE_NAME):
            yield data[start:end].decode(errors="replace")


def _tensors(data: mmap.mmap, graph: Span, depth: int) -> Iterator[Span]:
    """Every TensorProto of a graph and of the sub-graphs of its nodes."""
    if depth == 0:
        return
    yield from _fields(data, graph, _GRAPH_INITIALIZER)
    for sparse in _fields(data, graph, _GRAPH_SPARSE):
        yield from _fields(data, sparse, 1, 2)
    for node in _fields(data, graph, _GRAPH_NODE):
        for attribute in _fields(data, node, _NODE_ATTRIBUTE):
            yield from _fields(data, attribute, _ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS)
            for inner in _fields(data, attribute, _ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                yield from _tensors(data, inner, depth - 1)


def _locations(data: mmap.mmap, tensor: Span) -> Iterator[str]:
    for entry in _fields(data, tensor, _TENSOR_EXTERNAL_DATA):
        keys = [data[start:end] for start, end in _fields(data, entry, _ENTRY_KEY)]
        if keys == [b"location"]:
            for start, end in _fields(data, entry, _ENTRY_VALUE):
                yield data[start:end].decode(errors="replace")


def _fields(data: mmap.mmap, span: Span, *wanted: int) -> Iterator[Span]:
    """Spans of the length-delimited fields of one message whose number is wanted."""
    position, end = span
    while position < end:
        tag, position = _varint(data, position, end)
        field, wire = tag >> 3, tag & 7
        if wire == 2:
            length, position = _varint(data, position, end)
            if length > end - position:
                raise _Malformed
            if field in wanted:
                yield position, position + length
            position += length
        else:
            position = _skip(data, position, end, wire)


def _skip(data: mmap.mmap, position: int, end: int, wire: int) -> int:
    if wire == 0:
        return _varint(data, position, end)[1]
    if wire in {1, 5}:
        return position + (8 if wire == 1 else 4)
    raise _Malformed


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise _Malformed
