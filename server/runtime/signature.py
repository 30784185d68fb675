"""A graph's signature matched with the operator's declarations: the tensors served, and how their shapes map.

Pure: no file, no session. Works on ``GraphTensor``s, which the ONNX module makes from a session's own description.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from server.errors import ModelLoadError
from server.runtime.base import DeclaredTensor, ModelOptions
from server.types import BYTES, TensorSpec, element_count

Shape: TypeAlias = tuple[int, ...]

#: ONNX Runtime's type text -> V2 datatype. What is not here (float8, int4, complex, sequences...) V2 cannot carry.
_V2_DATATYPES: Final = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": BYTES,
}
#: Exporters give every unknown dimension a name of its own; such names say nothing about equality.
_ANONYMOUS_PREFIXES: Final = ("unk__", "?")


@dataclass(slots=True, frozen=True)
class GraphTensor:
    """One input or output of the graph: ``dims`` has numbers, symbol names and None; None as a whole: rank unknown."""

    name: str
    onnx_type: str
    dims: tuple[int | str | None, ...] | None
    #: An initializer that may be overridden: absent in a request, the graph's own value is used.
    overridable: bool = False

    @property
    def datatype(self) -> str:
        """The V2 datatype, or "" when V2 has none for it."""
        return _V2_DATATYPES.get(self.onnx_type, "")


@dataclass(slots=True, frozen=True)
class Port:
    """One input or output as served. With ``reshape``, callers see ``outer`` where the graph has ``inner``.

    Both are shapes without the batch axis; their free dimensions correspond in order.
    """

    spec: TensorSpec
    graph: GraphTensor
    outer: Shape = ()
    inner: Shape = ()
    reshaped: bool = False

    def to_graph(self, shape: Shape, batched: bool) -> Shape:
        """The shape that the graph gets for a caller's shape."""
        return _convert(shape, self.outer, self.inner, batched) if self.reshaped else shape

    def to_caller(self, shape: Shape, batched: bool) -> Shape:
        """The shape that a caller gets for one that the graph gave; as it is when it does not fit the declaration."""
        return _convert(shape, self.inner, self.outer, batched) if self.reshaped else shape


@dataclass(slots=True, frozen=True)
class Signature:
    """What is served of a graph. ``notes`` says what was left out; ``batch_blocker`` why dim 0 is not the batch."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    max_batch_size: int
    notes: tuple[str, ...] = ()
    batch_blocker: str = ""


def match(
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    options: ModelOptions,
    labels: Mapping[str, tuple[str, ...]],
    auto_batch: int,
) -> Signature:
    """Match a graph with the declarations. Raises ModelLoadError naming the tensor, what was wanted and what is there.

    ``auto_batch`` is the maximum for a model that declares none and whose graph looks as if it batches.
    """
    _reject_strangers("input", options.inputs, inputs)
    _reject_strangers("output", options.outputs, outputs)
    used = _used_inputs(inputs, options.inputs)
    served, notes = _served_outputs(used, outputs, options.outputs)
    declared = {"input": _by_name(options.inputs), "output": _by_name(options.outputs)}
    blocker = batch_blocker(used, served)
    if options.max_batch_size is None:
        # Declared dims without a max_batch_size are whole shapes: the operator has said that no axis is the batch.
        whole = any(tensor.dims for tensor in (*options.inputs, *options.outputs))
        limit = 0 if blocker or whole else auto_batch
    else:
        limit = options.max_batch_size

    def ports(kind: str, tensors: list[GraphTensor]) -> tuple[Port, ...]:
        return tuple(_port(kind, t, declared[kind].get(t.name), limit > 0, labels.get(t.name, ())) for t in tensors)

    return Signature(ports("input", used), ports("output", served), limit, tuple(notes), blocker)


def batch_blocker(inputs: Iterable[GraphTensor], outputs: Iterable[GraphTensor]) -> str:
    """Why dim 0 is not the batch everywhere; "" when it looks as if it were, which is not yet a proof."""
    symbols: dict[str, str] = {}
    kinds = [("input", tensor) for tensor in inputs] + [("output", tensor) for tensor in outputs]
    if not any(kind == "input" for kind, _ in kinds):
        return "the model has no inputs"
    for kind, tensor in kinds:
        if tensor.dims is None:
            return f"{kind} '{tensor.name}' has no declared rank"
        if not tensor.dims:
            return f"{kind} '{tensor.name}' is a scalar"
        first = tensor.dims[0]
        if isinstance(first, int):
            return f"the first dimension of {kind} '{tensor.name}' is fixed to {first}"
        if first and not first.startswith(_ANONYMOUS_PREFIXES):
            symbols.setdefault(first, tensor.name)
            if len(symbols) > 1:
                return f"first dimensions differ: {' and '.join(map(repr, symbols))}"
    return ""


def sizes(dims: tuple[int | str | None, ...]) -> Shape:
    """Dimensions as V2 writes them: -1 where free."""
    return tuple(dim if isinstance(dim, int) else -1 for dim in dims)


def _reject_strangers(kind: str, declared: Sequence[DeclaredTensor], graph: Sequence[GraphTensor]) -> None:
    known = {tensor.name for tensor in graph}
    for tensor in declared:
        if tensor.name not in known:
            raise ModelLoadError(f"Declared {kind} '{tensor.name}' is not in the graph, which has {_names(graph)}.")


def _used_inputs(graph: Sequence[GraphTensor], declared: Sequence[DeclaredTensor]) -> list[GraphTensor]:
    """All inputs that the graph needs, and those initializers that the operator declared as optional inputs."""
    names = {tensor.name: tensor for tensor in declared}
    used: list[GraphTensor] = []
    for tensor in graph:
        if tensor.name not in names and (declared or tensor.overridable):
            if not tensor.overridable:
                raise ModelLoadError(f"The graph needs input '{tensor.name}', which is not declared.")
            continue
        if not tensor.datatype:
            raise ModelLoadError(f"Input '{tensor.name}' has type {tensor.onnx_type}, which V2 cannot carry.")
        if tensor.name in names and names[tensor.name].optional and not tensor.overridable:
            raise ModelLoadError(f"Input '{tensor.name}' is declared optional, but the graph has no default for it.")
        used.append(tensor)
    return used


def _served_outputs(
    inputs: Sequence[GraphTensor], graph: Sequence[GraphTensor], declared: Sequence[DeclaredTensor]
) -> tuple[list[GraphTensor], list[str]]:
    """Outputs that V2 can carry, of those declared (or all); and a note for each that had to be left out."""
    names = {tensor.name for tensor in declared}
    # Runs with string inputs cannot be bound by address, and only a bound output can give bfloat16 back.
    feeds_strings = any(tensor.datatype == BYTES for tensor in inputs)
    if feeds_strings and any(tensor.datatype == "BF16" for tensor in inputs):
        raise ModelLoadError("The runtime cannot take BYTES and BF16 inputs in one model.")
    served: list[GraphTensor] = []
    notes: list[str] = []
    for tensor in graph:
        if declared and tensor.name not in names:
            continue
        if not tensor.datatype or (feeds_strings and tensor.datatype == "BF16"):
            problem = f"output '{tensor.name}' has type {tensor.onnx_type}, which cannot be served"
            if declared:
                raise ModelLoadError(f"Declared {problem}.")
            notes.append(f"{problem}: left out")
        else:
            served.append(tensor)
    if not served:
        raise ModelLoadError(f"No output can be served: the graph has {_names(graph, types=True)}.")
    return served, notes


def _port(
    kind: str, tensor: GraphTensor, declared: DeclaredTensor | None, batched: bool, labels: tuple[str, ...]
) -> Port:
    if declared is not None and declared.datatype and declared.datatype != tensor.datatype:
        raise ModelLoadError(
            f"{kind.capitalize()} '{tensor.name}': "
            f"datatype {declared.datatype} is declared, the graph has {tensor.datatype}."
        )
    if batched and kind == "input":
        _require_batch_axis(tensor)
    graph_tail = None if tensor.dims is None else sizes(tensor.dims)[1 if batched else 0 :]
    if declared is not None and (declared.dims or declared.reshape is not None):
        outer = declared.dims
        inner = declared.dims if declared.reshape is None else declared.reshape
        _check_reshape(kind, tensor.name, outer, inner)
        _check_dims(kind, tensor.name, inner, graph_tail)
        reshaped = declared.reshape is not None
    else:
        outer = inner = _undeclared_tail(kind, tensor, graph_tail, batched)
        reshaped = False
    shape = (-1, *outer) if batched else outer
    spec = TensorSpec(tensor.name, tensor.datatype, shape, tensor.overridable, labels)
    return Port(spec, tensor, outer, inner, reshaped)


def _require_batch_axis(tensor: GraphTensor) -> None:
    if tensor.dims is None:
        return
    if not tensor.dims or isinstance(tensor.dims[0], int):
        raise ModelLoadError(
            f"max_batch_size over 0 needs a free first dimension; input '{tensor.name}' "
            f"has shape {list(sizes(tensor.dims))}."
        )


def _undeclared_tail(kind: str, tensor: GraphTensor, graph_tail: Shape | None, batched: bool) -> Shape:
    if graph_tail is not None:
        return graph_tail
    if kind == "input":
        raise ModelLoadError(f"Input '{tensor.name}' has no shape in the graph: declare its dims.")
    return () if batched else (-1,)


def _check_dims(kind: str, name: str, wanted: Shape, graph: Shape | None) -> None:
    """The graph's free dimensions take any declaration; its fixed ones only the same number."""
    if graph is None:
        return
    fits = len(wanted) == len(graph) and all(got in {-1, want} for want, got in zip(wanted, graph, strict=True))
    if not fits:
        raise ModelLoadError(
            f"{kind.capitalize()} '{name}': dims {list(wanted)} are declared, the graph has {list(graph)}."
        )


def _check_reshape(kind: str, name: str, outer: Shape, inner: Shape) -> None:
    def facts(shape: Shape) -> tuple[int, int]:
        return shape.count(-1), element_count(tuple(dim for dim in shape if dim != -1))

    if facts(outer) != facts(inner):
        raise ModelLoadError(f"{kind.capitalize()} '{name}': dims {list(outer)} cannot be reshaped to {list(inner)}.")


def _convert(shape: Shape, source: Shape, target: Shape, batched: bool) -> Shape:
    head, tail = (shape[:1], shape[1:]) if batched else ((), shape)
    if len(tail) != len(source):
        return shape
    free = (got for got, pattern in zip(tail, source, strict=True) if pattern == -1)
    return (*head, *(next(free) if dim == -1 else dim for dim in target))


def _by_name(tensors: Iterable[DeclaredTensor]) -> dict[str, DeclaredTensor]:
    return {tensor.name: tensor for tensor in tensors}


def _names(tensors: Sequence[GraphTensor], types: bool = False) -> str:
    shown = [f"'{tensor.name}'{f' ({tensor.onnx_type})' if types else ''}" for tensor in tensors]
    return ", ".join(shown) or "none"
