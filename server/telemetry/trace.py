"""Tracing without a tracing library: W3C trace context, the sampling gate, and plain records of what was sampled.

Nearly every request is not sampled, so the gate decides before anything else is made: ``TraceGate.start`` returns
None, and that is all tracing costs. A sampled request carries a ``RequestTrace``, onto which the gateway and the
batcher write times; when it is over, the record goes into the bounded ``SpanSink``, and an exporter (``otel``) makes
spans of it later, elsewhere.

An unsampled request makes no context of its own. Whoever calls an upstream for it forwards the caller's
``traceparent`` and ``tracestate`` as they came.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

MAX_TRACESTATE: Final = 512
#: Characters of the four fields together; only a version after 00 may have more.
_LENGTH: Final = 55
#: Lower-case hexadecimal digits become 0, all else stays: one pass in C, a quarter of what a regular expression takes.
_DIGITS: Final = bytes([48 if byte in b"0123456789abcdef" else byte for byte in range(256)])
_SHAPE: Final = b"00-00000000000000000000000000000000-0000000000000000-00"
_NO_TRACE: Final = b"0" * 32
_NO_SPAN: Final = b"0" * 16
_DASH: Final = 45
_ZERO: Final = 48
_F: Final = 102
#: Where the last digit of the flags field is, and the digits with which the sampled bit is set.
_FLAGS: Final = 54
_ODD: Final = b"13579bdf"
#: More requests than any process answers.
_NEVER: Final = 1 << 60


class TraceParent(NamedTuple):
    """What a valid ``traceparent`` says: ids as integers, never 0."""

    trace_id: int
    span_id: int
    sampled: bool


def parse_traceparent(value: str) -> TraceParent | None:
    """The header's content, or None when W3C Trace Context says that it must be ignored.

    Lower-case hex only; version ff and all-zero ids are invalid; version 00 has exactly four fields; a later version
    is read by its first four fields.
    """
    data = value.encode("latin-1", "replace")
    if not _valid(data):
        return None
    return TraceParent(int(data[3:35], 16), int(data[36:52], 16), data[_FLAGS] in _ODD)


def _valid(data: bytes) -> bool:
    if len(data) != _LENGTH:
        if len(data) < _LENGTH or data[_LENGTH] != _DASH or data.startswith(b"00"):
            return False
        data = data[:_LENGTH]
    return (
        data.translate(_DIGITS) == _SHAPE
        and (data[3] != _ZERO or data[3:35] != _NO_TRACE)
        and (data[36] != _ZERO or data[36:52] != _NO_SPAN)
        and (data[0] != _F or data[1] != _F)
    )


def format_traceparent(trace_id: int, span_id: int, *, sampled: bool = True) -> str:
    return f"00-{trace_id:032x}-{span_id:016x}-{int(sampled):02x}"


def bound_tracestate(value: str) -> str:
    """The vendors' list, cut at an entry's end to at most 512 characters; empty when it is not printable ASCII."""
    if not (value.isascii() and value.isprintable()):
        return ""
    if len(value) <= MAX_TRACESTATE:
        return value
    return value[: MAX_TRACESTATE + 1].rpartition(",")[0]


@dataclass(slots=True)
class TraceContext:
    """The place of one sampled request in its trace. ``parent_id`` is the caller's span, 0 when it starts here."""

    trace_id: int
    span_id: int
    parent_id: int = 0
    tracestate: str = ""

    def header(self) -> str:
        """The value of ``traceresponse`` to the caller, and of ``traceparent`` to an upstream."""
        return format_traceparent(self.trace_id, self.span_id)


class TraceGate:
    """Decides whether a request is traced. For one thread.

    ``ratio`` (0..1) is the share sampled by chance. With ``parent_based`` a caller that sent a valid ``traceparent``
    has decided already, either way; without it only the caller's trace id is taken over.

    Instead of a draw for each request there is one for how many are passed over until the next that is sampled: a
    geometric variable, which gives every request the same chance, whatever became of those before it.
    """

    __slots__ = ("_parent_based", "_passed_over", "_ratio")

    def __init__(self, ratio: float, parent_based: bool = True) -> None:
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"a sampling ratio is between 0 and 1, got {ratio}")
        self._ratio = ratio
        self._parent_based = parent_based
        #: How many more requests chance passes over.
        self._passed_over = self._draw()

    def start(self, traceparent: bytes, metadata: Mapping[str, str]) -> TraceContext | None:
        """A new context when the request is sampled, else None.

        ``traceparent``: that header, b"" without. ``metadata``: all headers by lower-case names.
        """
        drawn = self._passed_over == 0
        self._passed_over = self._draw() if drawn else self._passed_over - 1
        asked = self._parent_based and len(traceparent) >= _LENGTH and traceparent[_FLAGS] in _ODD
        if not (drawn or asked):
            return None  # whether it is valid or not
        if not _valid(traceparent):
            return _root() if drawn else None
        if self._parent_based and not asked:
            return None
        state = bound_tracestate(metadata.get("tracestate", ""))
        return TraceContext(int(traceparent[3:35], 16), new_span_id(), int(traceparent[36:52], 16), state)

    def _draw(self) -> int:
        """Requests until the next that is sampled, by inversion: floor(ln u / ln(1 - ratio)), u uniform in (0, 1]."""
        if self._ratio == 0.0:
            return _NEVER
        if self._ratio == 1.0:
            return 0
        u = 1.0 - random.random()  # noqa: S311 - spread is needed, not secrecy
        return int(min(math.log(u) / math.log1p(-self._ratio), float(_NEVER)))


def _root() -> TraceContext:
    return TraceContext(_random_id(128), new_span_id())


def new_span_id() -> int:
    return _random_id(64)


def _random_id(bits: int) -> int:
    """Ids need spread, not secrecy; the generator is seeded anew in a forked child."""
    return random.getrandbits(bits) or 1  # 0 is not a valid id


# --- Records -------------------------------------------------------------------------------------------------------


def _wall_offset() -> int:
    return time.time_ns() - time.monotonic_ns()


@dataclass(slots=True)
class BatchTrace:
    """One run of an engine in which at least one member was sampled. Times are monotonic ns; 0: did not happen.

    ``started``: taken from the queue. ``assembled``: inputs joined. ``computed``: the engine returned (or failed).
    ``finished``: outputs split, or the failure known. All are written before any member is replied to.
    """

    model: str
    version: str
    rows: int
    #: Every sampled member's request span, in order, at least one: the links of the batch span.
    members: tuple[TraceContext, ...]
    started_ns: int
    assembled_ns: int = 0
    computed_ns: int = 0
    finished_ns: int = 0
    #: The code of the error with which the run failed.
    code: str = "ok"
    span_id: int = field(default_factory=new_span_id)
    #: The exporter's note that this batch's span is made: members share the batch, and each brings it along.
    exported: bool = False


@dataclass(slots=True, init=False)
class RequestTrace:
    """One sampled request. Times are monotonic ns; 0: did not happen.

    ``received``: head read. ``decoded``: request parsed. ``queued``: handed to the batcher. ``finished``: the answer
    or the error is there. ``encoded``: it is written to the transport.
    """

    context: TraceContext
    protocol: str
    received_ns: int
    tidegate_id: str
    decoded_ns: int
    queued_ns: int
    finished_ns: int
    encoded_ns: int
    model: str
    version: str
    arm: str
    rows: int
    code: str
    #: Usually one; more when a failed batch's members were run again alone.
    batches: list[BatchTrace]
    #: What to add to a monotonic time to get Unix time.
    wall_offset_ns: int

    def __init__(
        self,
        context: TraceContext,
        protocol: str,
        received_ns: int,
        tidegate_id: str = "",
        decoded_ns: int = 0,
        queued_ns: int = 0,
        finished_ns: int = 0,
        encoded_ns: int = 0,
        model: str = "",
        version: str = "",
        arm: str = "",
        rows: int = 0,
        code: str = "ok",
        wall_offset_ns: int | None = None,
    ) -> None:
        self.context = context
        self.protocol = protocol
        self.received_ns = received_ns
        self.tidegate_id = tidegate_id
        self.decoded_ns = decoded_ns
        self.queued_ns = queued_ns
        self.finished_ns = finished_ns
        self.encoded_ns = encoded_ns
        self.model = model
        self.version = version
        self.arm = arm
        self.rows = rows
        self.code = code
        self.batches = []
        self.wall_offset_ns = _wall_offset() if wall_offset_ns is None else wall_offset_ns


@dataclass(slots=True)
class ShadowTrace:
    """A copy of a sampled request at a shadow, which is over. Times are monotonic ns; 0: did not happen.

    ``context``: in the primary's trace, its parent is the primary's request span. ``sent``: handed to the shadow's
    batcher. ``started``, ``computed``: its batch was taken, and came back.
    """

    context: TraceContext
    model: str
    version: str
    sent_ns: int
    finished_ns: int
    tidegate_id: str = ""
    rows: int = 0
    started_ns: int = 0
    computed_ns: int = 0
    code: str = "ok"
    wall_offset_ns: int = field(default_factory=_wall_offset)


#: What becomes spans.
Record: TypeAlias = RequestTrace | ShadowTrace


class SpanSink:
    """Finished records on their way to an exporter. When full, the newest is dropped and counted. Any threads."""

    __slots__ = ("_capacity", "_records", "dropped", "undelivered")

    def __init__(self, capacity: int = 4096) -> None:
        if capacity < 1:
            raise ValueError(f"a sink holds at least 1 record, got {capacity}")
        self._capacity = capacity
        self._records: deque[Record] = deque()
        #: Records refused because the sink was full.
        self.dropped = 0
        #: Records that the exporter took and could not hand over; the exporter's own count.
        self.undelivered = 0

    def __len__(self) -> int:
        return len(self._records)

    def offer(self, record: Record) -> None:
        """Take a record that nobody writes to any more, or drop it."""
        if len(self._records) >= self._capacity:
            self.dropped += 1
        else:
            self._records.append(record)

    def take(self, limit: int) -> list[Record]:
        """Up to ``limit`` records, oldest first."""
        records = self._records
        taken: list[Record] = []
        while records and len(taken) < limit:
            taken.append(records.popleft())
        return taken
