"""The hot path: one batch through one session, by addresses bound beforehand.

A ``Lane`` belongs to one engine instance and is used by one thread at a time. For each combination of input shapes it
keeps one IOBinding whose inputs, and outputs of known shape, lie in the lane's arena; a run is then one copy in, one
call, one copy out. Outputs whose shape only the run tells are allocated by ONNX Runtime and copied from there.

Models with BYTES inputs cannot be bound by address and go through ``session.run``.

The session is taken as an object with onnxruntime's methods: this module does not import it.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import numpy as np

from server.errors import InputRejected, RuntimeFailure
from server.runtime.arena import Allocator, Arena, Bytes, allocate_aligned
from server.runtime.base import Batch
from server.runtime.messages import run_error
from server.runtime.signature import Port, Shape, Signature
from server.types import BYTES, DATATYPES, Buffer, Tensor, element_count

#: Combinations of shapes whose bindings are kept: every batch size of a model that gathers 64, and room for others.
MAX_CALLS: Final = 128
#: ONNX's number for bfloat16, which numpy has no type for.
_ONNX_BFLOAT16: Final = 16
#: The two ways in which ONNX Runtime says that a bound output has not the shape that the graph declares.
_WRONG_OUTPUT_SHAPE: Final = ("Got invalid dimensions for output", "The output OrtValue provided for output")

Key: TypeAlias = tuple[Shape | None, ...]


class Session(Protocol):
    """What is used of ``onnxruntime.InferenceSession``."""

    def io_binding(self) -> Any: ...

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None: ...

    def run(
        self, output_names: Sequence[str], input_feed: dict[str, Any], run_options: Any = None
    ) -> Sequence[Any]: ...


class _WrongOutputShape(Exception):
    """An output's shape was taken from the graph's declaration, and the graph gave another."""


@dataclass(slots=True)
class _BoundInput:
    name: str
    datatype: str
    shape: Shape
    region: Bytes
    #: The same memory for plain copying; a memoryview assigns faster than an ndarray.
    target: memoryview


@dataclass(slots=True)
class _Call:
    """One IOBinding and the memory behind it. ``outputs[i]`` is None where ONNX Runtime allocates."""

    binding: Any
    inputs: list[_BoundInput | None]
    outputs: list[tuple[Shape, memoryview] | None]


class Lane:
    """Runs batches of one instance. ``rebind`` is for devices: there a bound input is copied when it is bound."""

    def __init__(
        self, session: Session, signature: Signature, *, rebind: bool = False, allocate: Allocator = allocate_aligned
    ) -> None:
        self._session = session
        self._signature = signature
        self._batched = signature.max_batch_size > 0
        self._rebind = rebind
        self._arena = Arena(allocate)
        self._calls: OrderedDict[Key, _Call] = OrderedDict()
        self._output_names = [port.spec.name for port in signature.outputs]
        self._runs_strings = any(port.spec.datatype == BYTES for port in signature.inputs)
        #: Outputs (by index) whose declared shape has proved wrong: never bound again.
        self._unbound = {index for index, port in enumerate(signature.outputs) if port.spec.datatype == BYTES}

    def run(self, batch: Batch) -> list[Tensor]:
        """One tensor per output. Raises InputRejected, OutOfMemory or RuntimeFailure; the lane stays usable."""
        if self._runs_strings:
            return self._run_strings(batch)
        try:
            return self._run_bound(batch)
        except _WrongOutputShape:
            # Nothing has been answered yet: the same batch runs again with outputs that ONNX Runtime allocates.
            self._unbound.update(range(len(self._output_names)))
            self._calls.clear()
        return self._run_bound(batch)

    def release(self) -> None:
        """Let go of all memory held between runs; a later run takes what it needs again."""
        self._calls.clear()
        self._arena.release()

    # --- bound by address ----------------------------------------------------------------------------------------

    def _run_bound(self, batch: Batch) -> list[Tensor]:
        call = self._call(batch)
        for index, (bound, parts) in enumerate(zip(call.inputs, batch.parts, strict=True)):
            if bound is not None and parts is not None:
                _fill(bound, _whole(batch, index, parts))
                if self._rebind:
                    _bind_input(call.binding, bound)
        self._execute(call.binding)
        return self._collect(call)

    def _call(self, batch: Batch) -> _Call:
        key: Key = tuple(
            None if parts is None else shape for shape, parts in zip(batch.shapes, batch.parts, strict=True)
        )
        call = self._calls.get(key)
        if call is None:
            return self._prepare(key, batch.rows)
        self._calls.move_to_end(key)
        return call

    def _prepare(self, key: Key, rows: int) -> _Call:
        """Lay the tensors out in the arena and bind them; kept for the next batch of these shapes if it fits there."""
        ports = self._signature.inputs
        inputs = [
            None if shape is None else port.to_graph(shape, self._batched)
            for port, shape in zip(ports, key, strict=True)
        ]
        outputs = self._known_outputs(inputs, rows)
        sizes = [_size(port, shape) for port, shape in zip(ports, inputs, strict=True)]
        sizes += [_size(port, shape) for port, shape in zip(self._signature.outputs, outputs, strict=True)]
        if not self._arena.fits(sizes):
            return self._bind(inputs, outputs, self._arena.separate(sizes))
        regions, moved = self._arena.regions(sizes)
        if moved:
            self._calls.clear()
        elif len(self._calls) >= MAX_CALLS:
            self._calls.popitem(last=False)
        call = self._calls[key] = self._bind(inputs, outputs, regions)
        return call

    def _bind(self, inputs: list[Shape | None], outputs: list[Shape | None], regions: list[Bytes]) -> _Call:
        binding = self._session.io_binding()
        bound: list[_BoundInput | None] = []
        for port, shape, region in zip(self._signature.inputs, inputs, regions, strict=False):
            if shape is None:
                bound.append(None)
                continue
            entry = _BoundInput(port.spec.name, port.spec.datatype, shape, region, region.data)
            bound.append(entry)
            if not self._rebind:
                _bind_input(binding, entry)
        targets: list[tuple[Shape, memoryview] | None] = []
        for port, shape, region in zip(self._signature.outputs, outputs, regions[len(inputs) :], strict=True):
            if shape is None:
                binding.bind_output(port.spec.name)
                targets.append(None)
                continue
            element = _element_type(port.spec.datatype)
            binding.bind_output(port.spec.name, "cpu", 0, element, list(shape), region.ctypes.data)
            targets.append((port.to_caller(shape, self._batched), region.data))
        return _Call(binding, bound, targets)

    def _known_outputs(self, inputs: list[Shape | None], rows: int) -> list[Shape | None]:
        """Graph shapes of the outputs as far as numbers, the rows and the inputs' symbols tell them; else None."""
        symbols = _symbols(self._signature.inputs, inputs)
        batch_rows = rows if self._batched else None
        return [
            None if index in self._unbound else _resolve(port.graph.dims, symbols, batch_rows)
            for index, port in enumerate(self._signature.outputs)
        ]

    def _execute(self, binding: Any) -> None:
        try:
            if self._rebind:
                binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            if self._rebind:
                binding.synchronize_outputs()
        except Exception as error:
            if any(text in str(error) for text in _WRONG_OUTPUT_SHAPE) and len(self._unbound) < len(self._output_names):
                raise _WrongOutputShape from error
            raise run_error(error) from error

    def _collect(self, call: _Call) -> list[Tensor]:
        values = call.binding.get_outputs() if None in call.outputs else ()
        answer: list[Tensor] = []
        for index, (port, target) in enumerate(zip(self._signature.outputs, call.outputs, strict=True)):
            spec = port.spec
            if target is not None:
                answer.append(Tensor(spec.name, spec.datatype, target[0], target[1].tobytes()))
                continue
            shape = port.to_caller(tuple(values[index].shape()), self._batched)
            answer.append(Tensor(spec.name, spec.datatype, shape, _owned(values[index], spec.datatype)))
            # A bound value left in place would be taken for a preallocated output of the same shape next time.
            call.binding.bind_output(spec.name)
        return answer

    # --- fed by name ---------------------------------------------------------------------------------------------

    def _run_strings(self, batch: Batch) -> list[Tensor]:
        feed = self._feed(batch)
        try:
            arrays = self._session.run(self._output_names, feed)
        except Exception as error:
            raise run_error(error) from error
        answer: list[Tensor] = []
        for port, array in zip(self._signature.outputs, arrays, strict=True):
            shape = port.to_caller(tuple(array.shape), self._batched)
            data = _encoded(array) if port.spec.datatype == BYTES else array.tobytes()
            answer.append(Tensor(port.spec.name, port.spec.datatype, shape, data))
        return answer

    def _feed(self, batch: Batch) -> dict[str, Any]:
        ports = self._signature.inputs
        shapes = [
            None if parts is None else port.to_graph(shape, self._batched)
            for port, shape, parts in zip(ports, batch.shapes, batch.parts, strict=True)
        ]
        sizes = [_size(port, shape) for port, shape in zip(ports, shapes, strict=True)]
        fits = self._arena.fits(sizes)
        regions = self._arena.regions(sizes)[0] if fits else self._arena.separate(sizes)
        feed: dict[str, Any] = {}
        for index, (port, shape, parts, region) in enumerate(zip(ports, shapes, batch.parts, regions, strict=True)):
            if shape is None or parts is None:
                continue
            name, datatype = port.spec.name, port.spec.datatype
            if datatype == BYTES:
                feed[name] = _decoded(name, parts, shape)
            else:
                _fill(_BoundInput(name, datatype, shape, region, region.data), _whole(batch, index, parts))
                feed[name] = region.view(DATATYPES[datatype][0]).reshape(shape)
        return feed


def _symbols(ports: Sequence[Port], shapes: Sequence[Shape | None]) -> dict[str, int]:
    """Sizes of the named dimensions, without names that stand for different sizes in this run."""
    seen: dict[str, set[int]] = {}
    for port, shape in zip(ports, shapes, strict=True):
        dims = port.graph.dims or ()
        if shape is not None and len(dims) == len(shape):
            for dim, size in zip(dims, shape, strict=True):
                if isinstance(dim, str) and dim:
                    seen.setdefault(dim, set()).add(size)
    return {name: sizes.pop() for name, sizes in seen.items() if len(sizes) == 1}


def _resolve(
    dims: tuple[int | str | None, ...] | None, symbols: dict[str, int], batch_rows: int | None
) -> Shape | None:
    if dims is None or (batch_rows is not None and not dims):
        return None
    shape: list[int] = []
    for axis, dim in enumerate(dims):
        size = dim if isinstance(dim, int) else symbols.get(dim or "")
        if axis == 0 and size is None:
            size = batch_rows
        if size is None:
            return None
        shape.append(size)
    return tuple(shape)


def _size(port: Port, shape: Shape | None) -> int:
    """Bytes of a tensor; 0 for one that is absent, allocated elsewhere, or BYTES."""
    if shape is None or port.spec.datatype == BYTES:
        return 0
    return element_count(shape) * DATATYPES[port.spec.datatype][1]


def _element_type(datatype: str) -> Any:
    return _ONNX_BFLOAT16 if datatype == "BF16" else DATATYPES[datatype][0].type


def _bind_input(binding: Any, bound: _BoundInput) -> None:
    try:
        binding.bind_input(
            bound.name, "cpu", 0, _element_type(bound.datatype), list(bound.shape), bound.region.ctypes.data
        )
    except Exception as error:
        raise run_error(error) from error


def _whole(batch: Batch, index: int, parts: list[Buffer | list[bytes]]) -> Any:
    """The contents of one input. Where they are kept, whoever reads the batch after the run need not join again."""
    if len(parts) == 1:
        return parts[0]
    joined = b"".join(parts)  # type: ignore[arg-type]
    if batch.keep:
        batch.parts[index] = [joined]
    return joined


def _fill(bound: _BoundInput, data: Any) -> None:
    if type(data) is memoryview and (data.format != "B" or data.ndim != 1):
        data = data.cast("B") if data.nbytes else b""
    try:
        bound.target[:] = data
    except (ValueError, TypeError) as error:
        message = f"The batch holds other than the {bound.region.nbytes} bytes of input '{bound.name}'."
        raise RuntimeFailure(message) from error
    if bound.datatype == "BOOL":
        # Kernels may assume 0 or 1; any other byte means true, as it does in C.
        np.not_equal(bound.region, 0, out=bound.region.view(np.bool_))


def _owned(value: Any, datatype: str) -> Buffer | list[bytes]:
    """A copy of an OrtValue's contents; by address, as the binding cannot give bfloat16 as numpy."""
    if datatype != BYTES:
        return ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()) if value.data_ptr() else b""
    try:
        return _encoded(value.numpy())
    except UnicodeDecodeError as error:
        raise run_error(error) from error


def _encoded(array: np.ndarray[Any, np.dtype[Any]]) -> list[bytes]:
    return [text.encode() for text in array.ravel().tolist()]


def _decoded(name: str, parts: list[Buffer | list[bytes]], shape: Shape) -> np.ndarray[Any, np.dtype[Any]]:
    """An object array of ``str``: ONNX Runtime would take ``bytes`` too, and silently write them as ``b'...'``."""
    try:
        texts = [item.decode() for part in parts for item in part]  # type: ignore[union-attr]
    except UnicodeDecodeError as error:
        raise InputRejected(f"Input '{name}' has an element that is not UTF-8; string tensors take UTF-8.") from error
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array.reshape(shape)
