"""W3C trace context, the gate's decisions, and the bounded sink."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.telemetry.trace import (
    MAX_TRACESTATE,
    RequestTrace,
    SpanSink,
    TraceContext,
    TraceGate,
    bound_tracestate,
    format_traceparent,
    parse_traceparent,
)
from server.types import RequestHead

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{SPAN}-01"
UNSAMPLED = f"00-{TRACE}-{SPAN}-00"


def start(gate: TraceGate, headers: dict[str, str]) -> TraceContext | None:
    return gate.start(RequestHead("grpc", "", "", headers, 0).traceparent, headers)


@pytest.mark.parametrize(
    ("header", "sampled"),
    [
        (SAMPLED, True),
        (UNSAMPLED, False),
        (f"00-{TRACE}-{SPAN}-03", True),  # the random bit beside the sampled one
        (f"00-{TRACE}-{SPAN}-02", False),
        (f"00-{TRACE}-{SPAN}-ff", True),
        (f"01-{TRACE}-{SPAN}-01", True),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", True),
        (f"cc-{TRACE}-{SPAN}-00-", False),
    ],
)
def test_valid_traceparents_are_read(header: str, sampled: bool) -> None:
    parsed = parse_traceparent(header)
    assert parsed is not None
    assert (parsed.trace_id, parsed.span_id, parsed.sampled) == (int(TRACE, 16), int(SPAN, 16), sampled)


INVALID = [
    "",
    "00",
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f"00-{TRACE}-{SPAN.upper()}-01",
    f"00-{TRACE}-{SPAN}-0A",
    f"0A-{TRACE}-{SPAN}-01",
    f"00-{TRACE[1:]}-{SPAN}-01",
    f"00-{TRACE}-{SPAN[1:]}-01",
    f"00-{TRACE}-{SPAN}-1",
    f"00-{TRACE}-{SPAN}",
    f"00-{TRACE}-{SPAN}-01-",
    f"00-{TRACE}-{SPAN}-01-extra",
    f"00-{TRACE}-{SPAN}-01\n",
    f"01-{TRACE}-{SPAN}-01.x",
    f"01-{TRACE}-{SPAN}-012",
    f" {SAMPLED}",
    f"{SAMPLED} ",
    f"00_{TRACE}_{SPAN}_01",
    f"00-{TRACE[:-1]}g-{SPAN}-01",
    f"00-{TRACE[:-1]}\u0661-{SPAN}-01",  # an Arabic digit is a digit to int(), not to the specification
    f"00-{TRACE[:-2]}_1-{SPAN}-01",
    f"00-{TRACE[:-1]}\ud800-{SPAN}-01",  # no text, and nothing that could be encoded
    f"{SAMPLED},{SAMPLED}",
]


@pytest.mark.parametrize("header", INVALID)
def test_invalid_traceparents_are_ignored(header: str) -> None:
    assert parse_traceparent(header) is None
    started = start(TraceGate(1.0), {"traceparent": header})
    assert started is not None
    assert started.parent_id == 0
    assert started.trace_id != int(TRACE, 16)
    assert start(TraceGate(0.0), {"traceparent": header}) is None


@given(trace_id=st.integers(1, 2**128 - 1), span_id=st.integers(1, 2**64 - 1), sampled=st.booleans())
def test_format_and_parse_are_inverse(trace_id: int, span_id: int, sampled: bool) -> None:
    assert parse_traceparent(format_traceparent(trace_id, span_id, sampled=sampled)) == (trace_id, span_id, sampled)


@given(st.text(alphabet="0123456789abcdefABCDEFg-\n \u0660", max_size=70))
def test_any_text_is_read_or_ignored_alike_by_gate_and_parser(header: str) -> None:
    parsed = parse_traceparent(header)
    never = start(TraceGate(0.0), {"traceparent": header})
    assert (never is not None) == (parsed is not None and parsed.sampled)
    started = start(TraceGate(1.0), {"traceparent": header})
    if parsed is None:
        assert started is not None
        assert started.parent_id == 0
    else:
        assert (started is not None) == parsed.sampled


#: The specification's grammar, by the letter: what the reader, which is made to be quick, is held against.
GRAMMAR = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?=-|\Z)")


def by_the_letter(header: str) -> bool:
    fields = GRAMMAR.match(header)
    return fields is not None and (len(header) == 55 or not header.startswith("00"))


@given(
    st.from_regex(r"\A(00|01|0f|ff|fe)-(0{32}|[0-9a-f]{32})-(0{16}|[0-9a-f]{16})-[0-9a-f]{2}(|-|-x|x|\n)\Z"),
    st.integers(0, 60),
    st.characters(),
    st.booleans(),
)
def test_a_header_is_valid_as_the_grammar_says_whatever_is_put_into_it(
    header: str, place: int, character: str, instead: bool
) -> None:
    changed = header[:place] + character + header[place + instead :]
    for one in (header, changed):
        assert (parse_traceparent(one) is not None) == by_the_letter(one)


def test_tracestate_is_cut_at_an_entry() -> None:
    entries = [f"vendor{i}=value{i}" for i in range(60)]
    cut = bound_tracestate(",".join(entries))
    assert len(cut) <= MAX_TRACESTATE
    kept = cut.split(",")
    assert kept == entries[: len(kept)]
    assert len(",".join(entries[: len(kept) + 1])) > MAX_TRACESTATE


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("a=1,b=2", "a=1,b=2"),
        ("a=" + "x" * (MAX_TRACESTATE - 2), "a=" + "x" * (MAX_TRACESTATE - 2)),
        ("a=" + "x" * (MAX_TRACESTATE - 2) + ",b=2", "a=" + "x" * (MAX_TRACESTATE - 2)),
        ("a=" + "x" * MAX_TRACESTATE, ""),
        ("a=\u00e9", ""),
        ("a=1\r\nx-evil: 1", ""),
    ],
)
def test_tracestate_bounds(value: str, kept: str) -> None:
    assert bound_tracestate(value) == kept


def test_a_caller_decides_when_the_gate_is_parent_based() -> None:
    never, always = TraceGate(0.0), TraceGate(1.0)
    assert start(always, {"traceparent": UNSAMPLED}) is None
    context = start(never, {"traceparent": SAMPLED, "tracestate": "vendor=1"})
    assert context is not None
    assert (context.trace_id, context.parent_id) == (int(TRACE, 16), int(SPAN, 16))
    assert context.tracestate == "vendor=1"
    assert context.span_id not in (0, int(SPAN, 16))


def test_without_parent_based_only_the_trace_id_is_taken_over() -> None:
    assert start(TraceGate(0.0, parent_based=False), {"traceparent": SAMPLED}) is None
    context = start(TraceGate(1.0, parent_based=False), {"traceparent": UNSAMPLED})
    assert context is not None
    assert (context.trace_id, context.parent_id) == (int(TRACE, 16), int(SPAN, 16))


def test_the_ratio_is_kept() -> None:
    random.seed(20240607)
    gate = TraceGate(0.1)
    sampled = sum(start(gate, {}) is not None for _ in range(20_000))
    assert 1_830 <= sampled <= 2_170  # four standard deviations


@pytest.mark.parametrize("ratio", [0.03, 0.5, 0.9])
def test_every_request_has_the_same_chance_whatever_became_of_those_before(ratio: float) -> None:
    random.seed(20240607)
    gates = [TraceGate(ratio) for _ in range(4_000)]
    first = [[start(gate, {}) is not None for _ in range(6)] for gate in gates]
    four_deviations = 4 * (ratio * (1 - ratio) / len(gates)) ** 0.5
    for place in range(6):
        assert abs(sum(one[place] for one in first) / len(gates) - ratio) < four_deviations
    together = sum(one[place] and one[place + 1] for one in first for place in range(5)) / (5 * len(gates))
    assert abs(together - ratio**2) < four_deviations


def test_callers_who_decide_leave_the_share_of_the_others_alone() -> None:
    """Requests with a decision lie between those without, and are passed over with the same chance."""
    random.seed(20240607)
    gate = TraceGate(0.1)
    sampled = 0
    for _ in range(20_000):
        assert start(gate, {"traceparent": UNSAMPLED}) is None
        assert start(gate, {"traceparent": SAMPLED}) is not None
        sampled += start(gate, {}) is not None
        assert start(gate, {"traceparent": UNSAMPLED}) is None
    assert 1_830 <= sampled <= 2_170


@pytest.mark.parametrize("ratio", [5e-324, 1e-300, 1e-18])
def test_a_share_that_is_next_to_nothing_is_none(ratio: float) -> None:
    gate = TraceGate(ratio)
    assert [start(gate, {}) for _ in range(100)] == [None] * 100


def test_nearly_all() -> None:
    gate = TraceGate(1.0 - 2**-53)
    assert all(start(gate, {}) is not None for _ in range(100))


@pytest.mark.parametrize("ratio", [-0.01, 1.01, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        TraceGate(ratio)


def test_traceresponse_names_the_request_span() -> None:
    context = start(TraceGate(0.0), {"traceparent": SAMPLED})
    assert context is not None
    assert context.header() == f"00-{TRACE}-{context.span_id:016x}-01"
    assert parse_traceparent(context.header()) == (context.trace_id, context.span_id, True)


def test_new_ids_differ() -> None:
    gate = TraceGate(1.0)
    contexts = [context for context in (start(gate, {}) for _ in range(1000)) if context is not None]
    assert len({context.trace_id for context in contexts}) == len({context.span_id for context in contexts}) == 1000


def record(number: int = 1) -> RequestTrace:
    return RequestTrace(TraceContext(number, number), "http", received_ns=number)


def test_a_full_sink_drops_the_newest_and_counts() -> None:
    sink = SpanSink(capacity=3)
    records = [record(n) for n in range(1, 6)]
    for item in records:
        sink.offer(item)
    assert (len(sink), sink.dropped) == (3, 2)
    assert sink.take(2) == records[:2]
    sink.offer(records[4])
    assert sink.take(10) == [records[2], records[4]]
    assert sink.take(10) == []


def test_a_sink_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SpanSink(0)
