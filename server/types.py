"""The gateway's own nouns: tensors, requests, answers, limits, and the synchronous port. stdlib + numpy only.

Tensor contents stay what the wire carried: one contiguous little-endian row-major buffer for fixed-size datatypes,
a flat list of ``bytes`` for BYTES. Nothing here knows JSON, protobuf, HTTP, gRPC or ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias

import numpy as np

from server.errors import TidegateError

Buffer: TypeAlias = bytes | bytearray | memoryview
ParameterValue: TypeAlias = bool | int | float | str

#: V2 datatype -> (numpy dtype used for views, bytes per element). BF16 has no numpy type: its view is uint16.
DATATYPES: Final[dict[str, tuple[np.dtype[Any], int]]] = {
    "BOOL": (np.dtype("?"), 1),
    "UINT8": (np.dtype("u1"), 1),
    "UINT16": (np.dtype("<u2"), 2),
    "UINT32": (np.dtype("<u4"), 4),
    "UINT64": (np.dtype("<u8"), 8),
    "INT8": (np.dtype("i1"), 1),
    "INT16": (np.dtype("<i2"), 2),
    "INT32": (np.dtype("<i4"), 4),
    "INT64": (np.dtype("<i8"), 8),
    "FP16": (np.dtype("<f2"), 2),
    "BF16": (np.dtype("<u2"), 2),
    "FP32": (np.dtype("<f4"), 4),
    "FP64": (np.dtype("<f8"), 8),
}
BYTES: Final = "BYTES"
ALL_DATATYPES: Final = frozenset(DATATYPES) | {BYTES}


def element_count(shape: tuple[int, ...]) -> int:
    """Product of the dimensions as an unbounded integer (1 for a scalar)."""
    count = 1
    for dim in shape:
        count *= dim
    return count


# What every request makes has its ``__init__`` written out: the one that dataclass makes stays interpreted.


@dataclass(slots=True, init=False)
class Tensor:
    """One named tensor.

    ``data`` is a little-endian row-major buffer of exactly ``element_count(shape) * itemsize`` bytes, or for BYTES a
    flat list of exactly ``element_count(shape)`` ``bytes`` objects. Whoever builds a Tensor has checked that.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer | list[bytes]

    def __init__(self, name: str, datatype: str, shape: tuple[int, ...], data: Buffer | list[bytes]) -> None:
        self.name = name
        self.datatype = datatype
        self.shape = shape
        self.data = data

    def array(self) -> np.ndarray[Any, np.dtype[Any]]:
        """A numpy view (BYTES: an object array of ``bytes``; BF16: uint16 bit patterns) with this shape."""
        if isinstance(self.data, list):
            out = np.empty(len(self.data), dtype=object)
            out[:] = self.data
            return out.reshape(self.shape)
        return np.frombuffer(self.data, dtype=DATATYPES[self.datatype][0]).reshape(self.shape)


@dataclass(slots=True, frozen=True)
class TensorSpec:
    """What a model declares of one input or output. ``-1`` is a free dimension; dim 0 is the batch when batched."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False
    labels: tuple[str, ...] = ()


@dataclass(slots=True, frozen=True)
class ModelSpec:
    """The signature of one loaded version, as metadata reports it and as requests are checked against.

    ``max_batch_size`` 0: the model does not batch and shapes are taken as they are. Over 0: dim 0 of every input
    and output is the batch, requests carry 1..max_batch_size rows and agree on that number.
    ``max_batch_size`` is the *declared* limit a single request may carry; how many rows the batcher gathers is
    ``learned_batch_size`` (<= max_batch_size), found by measurement at warm-up.
    """

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    platform: str = "onnxruntime_onnx"
    backend: str = "onnxruntime"
    max_batch_size: int = 0
    learned_batch_size: int = 0
    digest: str = ""
    #: Why batching is off or limited, for operators; empty when nothing is to be said.
    batching_note: str = ""


@dataclass(slots=True)
class RequestedOutput:
    """One entry of the request's ``outputs``. ``binary`` None means the request-level default."""

    name: str
    binary: bool | None = None
    classification: int = 0


@dataclass(slots=True, init=False)
class InferenceRequest:
    """A decoded request; large tensors stay views on the received buffer, which is immutable until released."""

    model: str
    version: str
    id: str
    inputs: list[Tensor]
    outputs: list[RequestedOutput]
    parameters: dict[str, ParameterValue]
    #: Request-level ``binary_data_output`` (JSON protocol only).
    binary_output: bool

    def __init__(
        self,
        model: str,
        version: str,
        id: str,
        inputs: list[Tensor],
        outputs: list[RequestedOutput] | None = None,
        parameters: dict[str, ParameterValue] | None = None,
        binary_output: bool = False,
    ) -> None:
        self.model = model
        self.version = version
        self.id = id
        self.inputs = inputs
        self.outputs = [] if outputs is None else outputs
        self.parameters = {} if parameters is None else parameters
        self.binary_output = binary_output


@dataclass(slots=True, init=False)
class InferenceResponse:
    """One answer. Outputs stand in the order asked for, or the model's own when none were named."""

    model: str
    version: str
    id: str
    outputs: list[Tensor]
    parameters: dict[str, ParameterValue]

    def __init__(
        self,
        model: str,
        version: str,
        id: str,
        outputs: list[Tensor],
        parameters: dict[str, ParameterValue] | None = None,
    ) -> None:
        self.model = model
        self.version = version
        self.id = id
        self.outputs = outputs
        self.parameters = {} if parameters is None else parameters


@dataclass(slots=True, frozen=True)
class RequestLimits:
    """Bounds on one request, on by default. Over a bound: InvalidArgument or PayloadTooLarge naming the bound."""

    max_body_bytes: int = 64 * 1024 * 1024
    max_json_depth: int = 100
    max_inputs: int = 256
    max_outputs: int = 256
    max_dims: int = 32
    max_parameters: int = 256
    max_id_bytes: int = 4096
    max_chunks: int = 65_536
    max_header_bytes: int = 64 * 1024


# --- The port between transports and gateway -------------------------------------------------------------------

# Compiled classes name these protocols as their bases: then they are called without a look-up. Others cannot.


@dataclass(slots=True, init=False)
class RequestHead:
    """What a transport knows before it has read a body.

    ``metadata`` has lower-case names (HTTP headers or gRPC metadata). ``deadline_ns`` and ``received_ns`` are on the
    monotonic clock (``time.monotonic_ns``); 0 means no deadline. ``traceparent``: that header as bytes, b"" without; a
    transport that has it at hand gives it, for every request is asked for it.
    """

    protocol: str  # "http" | "grpc"
    model: str
    version: str  # "" when the caller named none
    metadata: Mapping[str, str]
    received_ns: int
    deadline_ns: int
    content_length: int | None
    peer: str
    traceparent: bytes

    def __init__(
        self,
        protocol: str,
        model: str,
        version: str,
        metadata: Mapping[str, str],
        received_ns: int,
        deadline_ns: int = 0,
        content_length: int | None = None,
        peer: str = "",
        traceparent: bytes | None = None,
    ) -> None:
        self.protocol = protocol
        self.model = model
        self.version = version
        self.metadata = metadata
        self.received_ns = received_ns
        self.deadline_ns = deadline_ns
        self.content_length = content_length
        self.peer = peer
        if traceparent is None:
            traceparent = metadata.get("traceparent", "").encode("latin-1", "replace")
        self.traceparent = traceparent


class Permit(Protocol):
    """Leave to send one request (or one stream of them) in. Release it exactly once, after the last handle."""

    __slots__ = ()

    head: RequestHead
    #: Unique id made by the gateway; answered as ``x-tidegate-id`` whatever happens.
    tidegate_id: str

    @property
    def traceresponse(self) -> str | None:
        """The ``traceresponse`` header of a sampled request; None for any other."""
        ...

    def hold(self, size: int) -> None:
        """It holds so many bytes now, and counts for no fewer than its head said. Raises TidegateError: no room."""
        ...

    def release(self) -> None: ...


@dataclass(slots=True, init=False)
class Decision:
    """Where a request went, for the answer's headers."""

    model: str
    version: str
    arm: str
    generation: int
    #: Why: the name of the rule that matched, or version, default, split, keyless, fallback.
    reason: str
    #: What the transports say of it, kept by them: requests share a decision. HTTP header lines, gRPC metadata.
    lines: bytes = field(default=b"", repr=False, compare=False)
    metadata: tuple[tuple[bytes, bytes], ...] = field(default=(), repr=False, compare=False)

    def __init__(self, model: str, version: str, arm: str, generation: int, reason: str = "") -> None:
        self.model = model
        self.version = version
        self.arm = arm
        self.generation = generation
        self.reason = reason
        self.lines = b""
        self.metadata = ()


#: What ``Reply.finish`` says where the answer is still being written.
WRITING: Final = ""


class Reply(Protocol):
    """The transport's end of one handled request; called on the loop that called ``handle``.

    Zero or more ``message``, then exactly one ``finish``; both may come before ``handle`` returns.
    """

    __slots__ = ()

    def message(self, response: InferenceResponse, decision: Decision) -> None: ...

    def finish(self, error: TidegateError | None) -> str | None:
        """No more follows. ``error`` None: what came is the answer.

        Returns what has become of that: None, it is written; the code of an error, which the caller is told in its
        place; or WRITING, and ``Ticket.written`` follows, or a cancel.
        """
        ...


class Ticket(Protocol):
    """A request in flight. ``cancel`` after the end is harmless; after a cancel nothing more is replied."""

    __slots__ = ()

    def cancel(self) -> None: ...

    def written(self, code: str) -> None:
        """What has become of an answer that was still being written: "ok", or the code of an error told instead."""
        ...


@dataclass(slots=True, eq=False)
class Unsent:
    """Bytes of answers that wait for readers, over all connections of the process. Over ``limit`` nothing is admitted.

    Requests are over when their answers are handed to a connection: what lies there is held by no permit. Connections
    count themselves, from the moment when their socket takes no more.
    """

    limit: int = 256 * 1024 * 1024
    total: int = 0

    def moved(self, before: int, now: int) -> int:
        """One connection held ``before`` and holds ``now``, which is returned."""
        self.total += now - before
        return now


class Port(Protocol):
    """What a transport sees of the gateway. Synchronous: no coroutine, task or future behind it."""

    limits: RequestLimits

    def admit(self, head: RequestHead) -> Permit:
        """Take or refuse from headers alone, before a body is read. Raises TidegateError naming the limit hit."""
        ...

    def refuse(self, error: TidegateError) -> TidegateError:
        """Count a request that ends by this error before it was handed over; what was refused here is known."""
        ...

    def handle(self, permit: Permit, request: InferenceRequest, reply: Reply, received_ns: int = 0) -> Ticket:
        """Validate, route, batch and run. Never raises: every outcome reaches ``reply``.

        ``received_ns``: when this request came, where its permit is one of many (0: when the permit's head did).
        """
        ...


Clock: TypeAlias = Callable[[], int]
