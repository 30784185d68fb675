"""One HTTP/2 connection against a small real server: streams, windows, bounds, timers and ends, frame by frame."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import cast

import numpy as np
import pytest
from starlette.types import Receive, Scope, Send

from server._pb import health_pb2
from server._pb import inference_pb2 as pb
from server.transport.answers import HttpSettings
from server.transport.http_infer import InferApp
from server.transport.native.h2 import Http2Settings
from server.transport.native.server import GrpcMethods, NativeServer, Served
from server.types import RequestLimits
from tests.support import http2
from tests.support.echo import Running, running
from tests.support.http2 import DATA, END_STREAM, HEADERS, Http2Wire, frame, grpc_message, opened

LIMITS = RequestLimits(max_body_bytes=1024 * 1024, max_header_bytes=8 * 1024)
NO_ERROR, PROTOCOL_ERROR, REFUSED_STREAM, ENHANCE_YOUR_CALM = 0, 1, 7, 11


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(transport="native", limits=LIMITS) as started:
        yield started


# Each of these is short of patience with one thing: a test of it does everything else as late as the machine has it.


@pytest.fixture(scope="module")
def narrow() -> Iterator[Running]:
    """Room for little, and short patience with a peer that takes nothing."""
    bounds = Http2Settings(max_streams=8, max_unsent_bytes=200_000)
    with running(transport="native", limits=LIMITS, http=HttpSettings(write_stall_s=0.8), http2=bounds) as started:
        yield started


@pytest.fixture(scope="module")
def greedy() -> Iterator[Running]:
    """Short patience with bodies that are slow to come."""
    times = HttpSettings(body_idle_s=0.6, body_total_s=2.0)
    with running(transport="native", limits=LIMITS, http=times) as started:
        yield started


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    """Short patience with connections that do not begin."""
    with running(transport="native", limits=LIMITS, http=HttpSettings(head_s=0.4)) as started:
        yield started


def asking(timeout_s: float) -> AbstractContextManager[Running]:
    """A server that sends a PING after a short silence, and waits so long for the answer."""
    bounds = Http2Settings(keepalive_s=0.6, keepalive_timeout_s=timeout_s)
    return running(transport="native", limits=LIMITS, http2=bounds)


@pytest.fixture
def wire(server: Running) -> Iterator[Http2Wire]:
    with Http2Wire(server.grpc) as opened_wire:
        yield opened_wire
    assert settled(server)


def settled(server: Running) -> bool:
    """Every permit given was released exactly once."""
    port = server.port
    return port.wait(lambda: len(port.admitted) == len(port.released)) and len(set(port.released)) == len(port.released)


def message(model: str = "affine", *values: float, id: str = "") -> bytes:
    request = pb.ModelInferRequest(model_name=model, id=id)
    values = values or (1.0, 2.5)
    request.inputs.add(name="x", datatype="FP32", shape=[1, len(values)])
    request.raw_input_contents.append(np.array(values, "<f4").tobytes())
    return request.SerializeToString()


def wide(count: int, model: str = "echo") -> bytes:
    return message(model, *range(count))


def body(stream_id: int, raw: bytes, *, end: bool = True, size: int = 16_384) -> bytes:
    parts = [raw[i : i + size] for i in range(0, len(raw), size)]
    last = len(parts) - 1
    return b"".join(frame(DATA, END_STREAM * (end and i == last), stream_id, part) for i, part in enumerate(parts))


def outputs(answer: http2.Answer) -> list[float]:
    assert answer.status == "0", answer.headers
    response = pb.ModelInferResponse.FromString(answer.body[5:])
    return np.frombuffer(response.raw_output_contents[0], "<f4").tolist()


# --- messages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 50, 1000])
def test_a_message_cut_anywhere(wire: Http2Wire, size: int) -> None:
    wire.send(opened(1) + body(1, grpc_message(message()), size=size))
    assert outputs(wire.answer(1)) == [3.0, 6.0]


def test_empty_frames_around_a_message(wire: Http2Wire) -> None:
    empty, whole = frame(DATA, 0, 1), grpc_message(message())
    wire.send(opened(1) + empty + body(1, whole[:3], end=False) + empty + body(1, whole[3:], end=False) + empty)
    wire.send(frame(DATA, END_STREAM, 1))
    assert outputs(wire.answer(1)) == [3.0, 6.0]


def test_request_trailers_end_a_call(wire: Http2Wire) -> None:
    trailers = frame(HEADERS, http2.END_HEADERS | END_STREAM, 1, http2.block([("x-end", "y")]))
    wire.send(opened(1) + body(1, grpc_message(message()), end=False) + trailers)
    assert outputs(wire.answer(1)) == [3.0, 6.0]


@pytest.mark.parametrize("raw", [grpc_message(message())[:n] for n in range(8)] + [grpc_message(message())[:-1]])
def test_calls_that_end_within_their_message(wire: Http2Wire, raw: bytes) -> None:
    wire.send(opened(1) + (body(1, raw) or frame(DATA, END_STREAM, 1)))
    answer = wire.answer(1)
    assert answer.status == "3", answer.headers
    assert "message" in answer.headers["grpc-message"]


def test_more_than_one_message_in_a_unary_call(wire: Http2Wire) -> None:
    wire.send(opened(1) + body(1, grpc_message(message()) * 2))
    assert wire.answer(1).status == "3"


def test_a_bad_flag_and_a_size_over_the_limit(wire: Http2Wire) -> None:
    wire.send(opened(1) + body(1, grpc_message(b"abc", 2)))
    assert wire.answer(1).status == "3"
    wire.send(opened(3) + body(3, struct.pack(">BI", 0, 2**32 - 1) + bytes(100), end=False))
    answer = wire.answer(3)
    assert answer.status == "8"
    wire.settled()
    assert wire.answers[3].reset == NO_ERROR  # the rest is not wanted


def test_an_empty_message_is_admitted_like_any_other(server: Running, wire: Http2Wire) -> None:
    before = len(server.port.admitted)
    assert wire.call(1, b"").status == "5"
    assert len(server.port.admitted) == before + 1


def test_gzip_both_kinds_of_call(wire: Http2Wire) -> None:
    packed = grpc_message(gzip.compress(message()), 1)
    coding = ("grpc-encoding", "gzip")
    wire.send(opened(1, coding) + body(1, packed))
    assert outputs(wire.answer(1)) == [3.0, 6.0]
    wire.send(opened(3, coding, path=http2.STREAM_INFER) + body(3, packed * 3))
    answer = wire.answer(3)
    assert answer.status == "0"
    assert answer.body.count(b"affine") == 3
    wire.send(opened(5) + body(5, packed))
    assert wire.answer(5).status == "3"
    wire.send(opened(7, ("grpc-encoding", "snappy")))
    assert wire.answer(7).status == "12"


def test_deadlines(server: Running, wire: Http2Wire) -> None:
    assert wire.call(1, message(), http2.INFER, ("grpc-timeout", "0m")).status == "4"
    assert wire.call(3, message(), http2.INFER, ("grpc-timeout", "1x")).status == "3"
    assert wire.call(5, message(), http2.INFER, ("grpc-timeout", "1H")).status == "0"
    assert server.port.admitted[-1].deadline_ns > time.monotonic_ns() + 3_500_000_000_000


def test_a_deadline_that_passes_within_the_message(wire: Http2Wire) -> None:
    whole = grpc_message(message())
    wire.send(opened(1, ("grpc-timeout", "10m")) + body(1, whole[:-1], end=False))
    assert wire.answer(1).status == "4"


def test_metadata_reaches_the_port(server: Running, wire: Http2Wire) -> None:
    more = (("traceparent", "00-1-2-03"), ("x-key", "a"), ("x-key", "b"), ("x-bin", "AAE"))
    answer = wire.call(1, message(), http2.INFER, *more)
    metadata = server.port.admitted[-1].metadata
    assert (metadata["x-key"], metadata["traceparent"]) == ("a, b", "00-1-2-03")
    assert "x-bin" not in metadata
    assert answer.headers["x-tidegate-version"] == "1"
    assert answer.headers["traceresponse"] == "00-1-2-03"


def test_streams_that_end_within_a_message(wire: Http2Wire) -> None:
    whole = grpc_message(message())
    wire.send(opened(1, path=http2.STREAM_INFER) + body(1, whole + whole[:-1]))
    answer = wire.answer(1)
    assert answer.status == "3"
    assert answer.body.count(b"affine") == 1


@pytest.mark.parametrize("size", [1, 5, 64, 1000])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize(
    ("bad", "status"), [(grpc_message(b"abc", 7), "3"), (struct.pack(">BI", 0, 1 << 30) + b"abc", "8")]
)
def test_streams_answer_what_came_before_broken_framing(
    wire: Http2Wire, bad: bytes, status: str, end: bool, size: int
) -> None:
    """However it is cut: the last of the good messages and the bad prefix may share a frame."""
    wire.send(opened(1, path=http2.STREAM_INFER) + body(1, grpc_message(message()) * 2 + bad, end=end, size=size))
    answer = wire.answer(1)
    assert answer.status == status
    assert answer.body.count(b"affine") == 2


def test_broken_streams_give_their_slot_back(narrow: Running) -> None:
    """An error ends a stream whose peer goes on sending: it must not stay open."""
    with Http2Wire(narrow.grpc) as wire:
        for i in range(1, 60, 2):
            wire.send(opened(i, path=http2.STREAM_INFER) + body(i, grpc_message(b"abc", 7), end=False))
            assert wire.answer(i).status == "3"
            wire.send(body(i, grpc_message(message()), end=False))
        assert wire.call(61, message()).status == "0"
    assert settled(narrow)


# --- neighbours --------------------------------------------------------------------------------------------------


def test_a_reset_in_the_same_read_as_the_last_byte(wire: Http2Wire) -> None:
    """The session has closed the stream already while it is being handled."""
    for i in range(1, 401, 4):
        whole = body(i, grpc_message(message()))
        wire.send(opened(i) + whole + http2.reset(i) + opened(i + 2) + body(i + 2, grpc_message(message())))
        assert outputs(wire.answer(i + 2)) == [3.0, 6.0]


def test_what_one_stream_raises_ends_that_stream(server: Running, wire: Http2Wire) -> None:
    wire.send(opened(1) + body(1, grpc_message(message("held"))))
    assert server.port.wait(lambda: bool(server.port.held))
    answer = wire.call(3, message("broken"))
    assert answer.status == "13"
    assert "secret" not in str(answer.headers)
    server.call(server.port.answer_held)
    assert outputs(wire.answer(1)) == [3.0, 6.0]


def test_resets_cancel_their_own_work(server: Running, wire: Http2Wire) -> None:
    server.port.cancelled.clear()
    calls = b"".join(opened(i) + body(i, grpc_message(message("held", id=str(i)))) for i in range(1, 9, 2))
    wire.send(calls)
    assert server.port.wait(lambda: len(server.port.held) == 4)
    wire.send(http2.reset(1) + http2.reset(5))
    assert server.port.wait(lambda: len(server.port.cancelled) == 2)
    assert sorted(server.port.cancelled) == ["1", "5"]
    server.call(server.port.answer_held)
    assert outputs(wire.answer(3)) == outputs(wire.answer(7)) == [3.0, 6.0]


def test_a_lost_connection_cancels_all(server: Running) -> None:
    server.port.cancelled.clear()
    with Http2Wire(server.grpc) as wire:
        wire.send(b"".join(opened(i) + body(i, grpc_message(message("held", id=str(i)))) for i in range(1, 9, 2)))
        wire.send(opened(9, path=http2.STREAM_INFER) + body(9, grpc_message(message("held", id="9")), end=False))
        wire.send(opened(11) + body(11, grpc_message(message())[:-1], end=False))
        assert server.port.wait(lambda: len(server.port.held) == 5)
    assert server.port.wait(lambda: len(server.port.cancelled) == 5)
    assert settled(server)
    server.port.held.clear()


def test_a_stream_that_is_not_read_leaves_its_neighbours_room(server: Running) -> None:
    """Its messages wait for answers that wait for a slow peer; other calls on the connection go on."""
    with Http2Wire(server.grpc, {http2.INITIAL_WINDOW_SIZE: 0}, generous=False) as wire:
        for i in range(1, 21, 2):
            wire.send(opened(i, path=http2.STREAM_INFER))
            wire.send(body(i, grpc_message(wide(60_000)) * 4, end=False))  # within the stream's window
        wire.send(http2.window(0, 1 << 20))
        wire.send(opened(101) + body(101, grpc_message(message())) + http2.window(101, 1000))
        assert outputs(wire.answer(101)) == [3.0, 6.0]
    assert settled(server)


def test_uploads_that_are_refused_do_not_use_the_window_up(server: Running, wire: Http2Wire) -> None:
    """Hundreds of times most of a stream's window, thrown away each time."""
    big = struct.pack(">BI", 0, 8 << 20) + bytes(900_000)
    for i in range(1, 801, 2):
        wire.send(opened(i) + body(i, big, end=False))
        assert wire.answer(i).status == "8"
    assert outputs(wire.call(801, message())) == [3.0, 6.0]


def test_a_long_stream_does_not_count_as_hoarding() -> None:
    """Bytes that were read are given back to the account, though the stream is never quite empty."""
    bounds = Http2Settings(max_gathered_bytes=1_000_000)
    with running(transport="native", limits=LIMITS, http2=bounds) as server, Http2Wire(server.grpc) as wire:
        one = grpc_message(wide(20_000))
        wire.send(opened(1, path=http2.STREAM_INFER))
        wire.upload(1, one[:100], end=False)
        for _ in range(40):
            wire.upload(1, one[100:] + one[:100], end=False)
        while len(wire.answers.get(1, http2.Answer()).body) < 40 * 80_000:
            assert wire.read_frame()
        wire.send(opened(3))
        wire.upload(3, grpc_message(wide(200_000))[:700_000], end=False)
        while not wire.windows.get(3):
            assert wire.read_frame()
        wire.send(http2.reset(3) + http2.reset(1))
        assert settled(server)


def test_empty_messages_that_are_not_read_hold_the_window(server: Running, wire: Http2Wire) -> None:
    """They have no bytes of their own, yet each takes room."""
    wire.send(opened(1, path=http2.STREAM_INFER))
    wire.upload(1, grpc_message(message("held")) + grpc_message(b"") * 140_000, end=False)
    wire.settled()
    assert 1 not in wire.windows
    wire.send(http2.reset(1))
    assert settled(server)
    server.port.held.clear()


# --- flow control of answers -------------------------------------------------------------------------------------


def test_answers_wait_for_windows(server: Running) -> None:
    with Http2Wire(server.grpc, {http2.INITIAL_WINDOW_SIZE: 10}, generous=False) as wire:
        wire.send(opened(1) + body(1, grpc_message(wide(5000))))
        wire.settled()
        assert len(wire.answers[1].body) == 10
        wire.send(http2.window(1, 1 << 20))
        assert outputs(wire.answer(1)) == list(range(5000))


def test_an_early_answer_is_not_lost_to_the_reset_behind_it(server: Running) -> None:
    """An answer that flow control holds back is followed by its reset, never overtaken."""
    with Http2Wire(server.http, {http2.INITIAL_WINDOW_SIZE: 0}, generous=False) as wire:
        wire.send(opened(1, ("content-length", "9999999"), path="/v2/models/affine/infer", grpc=False))
        while 1 not in wire.answers:
            assert wire.read_frame()
        wire.settled()
        assert wire.answers[1].headers[":status"] == "413"
        assert wire.answers[1].reset is None
        wire.send(http2.window(1, 1000))
        answer = wire.answer(1)
        assert b"over the limit" in answer.body
        wire.settled()
        assert answer.reset == NO_ERROR


def exhaust(wire: Http2Wire) -> None:
    """Use the connection's window up, to its last byte, and leave nothing queued."""
    wire.send(opened(1) + body(1, grpc_message(wide(16_000))))
    left, i = 65_535 - len(wire.answer(1).body), 3
    while left:
        size = left if left <= 164 else min(164, left - 38)  # an answer has 37 bytes and those of its id
        wire.send(opened(i) + body(i, grpc_message(message("echo", 1.0, id="i" * (size - 37)))))
        left -= len(wire.answer(i).body)
        i += 2


def test_an_error_is_not_lost_to_the_reset_behind_it(server: Running) -> None:
    """Trailers wait for windows too, where no byte is before them."""
    with Http2Wire(server.grpc, {http2.INITIAL_WINDOW_SIZE: 1 << 20}, generous=False) as wire:
        exhaust(wire)
        wire.send(opened(101, path=http2.STREAM_INFER))
        while 101 not in wire.answers:
            assert wire.read_frame()
        wire.send(body(101, grpc_message(b"abc", 7), end=False))
        assert settled(server)
        wire.settled()
        assert (wire.answers[101].ended, wire.answers[101].reset) == (False, None)
        wire.send(http2.window(0, 1 << 20))
        assert wire.answer(101).status == "3"
        wire.settled()
        assert wire.answers[101].reset == NO_ERROR


def test_a_drain_waits_for_the_end_of_an_answer_that_has_no_bytes() -> None:
    own = {http2.INITIAL_WINDOW_SIZE: 1 << 20}
    with running(transport="native", limits=LIMITS) as server, Http2Wire(server.grpc, own, generous=False) as wire:
        exhaust(wire)
        wire.send(opened(101) + body(101, grpc_message(message("nobody"))))
        while 101 not in wire.answers:
            assert wire.read_frame()
        with draining(server):
            while wire.goaway is None or wire.goaway[0] != 101:
                assert wire.read_frame()
            wire.settled()
            wire.send(http2.window(0, 1000))
            assert wire.answer(101).status == "5"
            wire.closed()


def test_a_drain_does_not_wait_for_windows_without_end() -> None:
    own = {http2.INITIAL_WINDOW_SIZE: 1 << 20}
    settings = HttpSettings(write_stall_s=0.5)
    with (
        running(transport="native", limits=LIMITS, http=settings) as server,
        Http2Wire(server.grpc, own, generous=False) as wire,
    ):
        exhaust(wire)
        wire.send(opened(101) + body(101, grpc_message(message("nobody"))))
        drained = asyncio.run_coroutine_threadsafe(server.grpc_server.drain(30), server.loop)
        wire.closed()
        assert drained.result(10) is True
        assert not wire.answers[101].ended


def test_a_large_answer_of_a_stream_does_not_wait_for_a_window_that_is_open(server: Running) -> None:
    """Larger than a stream's share: what the peer's windows let out at once is not waited for."""
    with Http2Wire(server.grpc, {http2.INITIAL_WINDOW_SIZE: 2**31 - 1}, generous=False) as wire:
        wire.send(http2.window(0, 2**30) + opened(1, path=http2.STREAM_INFER))
        wire.upload(1, grpc_message(wide(250_000)) * 4)
        assert wire.answer(1).status == "0"
        assert len(wire.answers[1].body) > 4_000_000


def test_a_peer_that_takes_nothing_is_refused_then_cut_off(narrow: Running) -> None:
    with Http2Wire(narrow.grpc, {http2.INITIAL_WINDOW_SIZE: 0}, generous=False) as wire:
        wire.send(b"".join(opened(i) + body(i, grpc_message(wide(20_000))) for i in range(1, 15, 2)))
        wire.closed()
        assert wire.ended
        statuses = [answer.headers.get("grpc-status") for answer in wire.answers.values()]
        assert "8" in statuses or "14" in statuses  # over max_unsent_bytes
    assert settled(narrow)


def test_a_peer_that_takes_slowly_is_not_cut_off() -> None:
    with running(transport="native", http=HttpSettings(write_stall_s=2.0)) as server:
        assert any(took_slowly(server, 2.0) for _ in range(10)), "the machine stands still too often"


def took_slowly(server: Running, stall_s: float) -> bool:
    """Take an answer in small pieces, longer than ``stall_s`` in all; False where this side was that late with one."""
    with Http2Wire(server.grpc, {http2.INITIAL_WINDOW_SIZE: 0}, generous=False) as wire:
        pause, latest = threading.Event(), 0.0
        taken = time.monotonic()
        wire.send(opened(1) + body(1, grpc_message(wide(100))))
        try:
            for more in (*[30] * 20, 1 << 16):
                pause.wait(0.15)
                wire.send(http2.window(1, more))
                latest, taken = max(latest, time.monotonic() - taken), time.monotonic()
                wire.settled()
            assert outputs(wire.answer(1)) == list(range(100))
        except AssertionError:
            if latest < stall_s - 0.5:  # the server's clock
                raise
            return False
    return True


def test_an_answer_that_waits_from_the_first_is_no_stall_yet(server: Running) -> None:
    """A new connection has its full time too, when its first answer is unsent as the timers are first looked at."""
    with Http2Wire(server.grpc, {http2.INITIAL_WINDOW_SIZE: 0}, generous=False) as wire:
        wire.send(opened(1) + body(1, grpc_message(message())))
        pause = threading.Event()
        for _ in range(12):
            pause.wait(0.1)  # more than two looks in all
            wire.settled()
        wire.send(http2.window(1, 1 << 16))
        assert wire.answer(1).status == "0"


def test_a_peer_that_reads_nothing(server: Running) -> None:
    """Streams whose answers are not taken stay open, so the bound on streams ends it."""
    wide_open = {http2.INITIAL_WINDOW_SIZE: 2**31 - 1}
    taken = len(server.port.admitted)
    with Http2Wire(server.grpc, wide_open, receive_buffer=4096, generous=False) as wire:
        wire.send(http2.window(0, 2**30) + opened(1))
        wire.send(body(1, grpc_message(wide(240_000))))
        with suppress(OSError):
            for i in range(3, 20_003, 2):
                wire.socket.sendall(opened(i) + body(i, grpc_message(message())))
        assert settled(server)
        assert len(server.port.admitted) - taken < 2000


# --- bounds and timers -------------------------------------------------------------------------------------------


def test_streams_over_the_maximum(narrow: Running) -> None:
    """Refused while the client may not know the bound; after that it is a breach that ends the connection."""
    begun = b"".join(opened(i, path=http2.STREAM_INFER) for i in range(1, 31, 2))
    with Http2Wire(narrow.grpc, settle=False) as wire:
        wire.send(begun)
        wire.settled()
        refused = [i for i, answer in wire.answers.items() if answer.reset == REFUSED_STREAM]
        assert len(refused) == 7
        assert wire.own_settings[3] == 8
    with Http2Wire(narrow.grpc) as wire:
        wire.send(begun)
        goaway = wire.closed()
        assert goaway is not None
        assert goaway[1] == PROTOCOL_ERROR
    assert settled(narrow)


def test_running_tasks_of_reset_http_requests_are_bounded(server: Running) -> None:
    """A reset ends the stream, not what the app does: it counts until it is over."""
    begun: list[Scope] = []
    over = server.call(asyncio.Event)

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        begun.append(scope)
        await over.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    served = Served(server.port, server.catalog, cast("InferApp", app), GrpcMethods(server.services))
    own = server.call(lambda: NativeServer(served, http2=Http2Settings(max_streams=8)))
    with Http2Wire(server.run(own.start("127.0.0.1", 0))) as wire:
        for i in range(1, 61, 2):
            wire.send(opened(i, path="/", method="GET", grpc=False, end=True) + http2.reset(i))
        wire.settled()
        assert len(begun) == 8
        server.call(over.set)
        wire.settled()
        wire.send(opened(61, path="/", method="GET", grpc=False, end=True))
        assert wire.answer(61).headers[":status"] == "204"
    assert server.run(own.drain(5))


@pytest.mark.parametrize("first", [b"", b"PRI * HT", http2.PREFACE, http2.PREFACE + b"\x00\x00"])
def test_connections_that_do_not_begin(hasty: Running, first: bytes) -> None:
    with Http2Wire(hasty.grpc, greet=False) as wire:
        wire.send(first)
        while wire.socket.recv(4096):
            pass


def test_bodies_that_stop_and_bodies_that_trickle(greedy: Running) -> None:
    whole = grpc_message(message())
    with Http2Wire(greedy.grpc) as wire:
        wire.send(opened(1) + body(1, whole[:20], end=False))
        wire.send(opened(3))
        wire.send(opened(5, path=http2.STREAM_INFER) + body(5, whole[:20], end=False))
        assert [wire.answer(i).status for i in (1, 3, 5)] == ["4", "4", "4"]
        stop, pause = time.monotonic() + 20, threading.Event()
        wire.send(opened(7) + opened(9, path=http2.STREAM_INFER) + body(9, whole[:6], end=False))
        wire.send(body(7, whole[:6], end=False))
        trickling = {7, 9}
        while time.monotonic() < stop and trickling:
            pause.wait(0.2)
            for i in trickling:
                wire.send(frame(DATA, 0, i, b"\x00"))
            wire.settled()
            trickling -= {i for i, answer in wire.answers.items() if answer.ended}
        assert not trickling
        assert [wire.answer(i).status for i in (7, 9)] == ["4", "4"]
    assert settled(greedy)


def test_silent_peers_are_asked_and_dropped() -> None:
    with asking(0.6) as server, Http2Wire(server.grpc, alive=False, settle=False) as wire:
        asked = 0
        while (got := wire.read_frame()) is not None:
            asked += got[0] == http2.PING
        assert asked == 1


def test_peers_that_answer_pings_stay() -> None:
    """However late they are; the next PING shows that the one before was answered."""
    with asking(20) as server, Http2Wire(server.grpc) as wire:
        for _ in range(3):
            while (got := wire.read_frame()) is not None and got[0] != http2.PING:
                pass
            assert got is not None
        assert wire.call(1, message()).status == "0"


def test_pings_for_round_trips_are_no_flood(server: Running, wire: Http2Wire) -> None:
    """Go's client measures with a PING for every answer, thousands in a second."""
    for i in range(1, 6001, 2):
        wire.send(frame(http2.PING, 0, 0, b"12345678") + opened(i) + body(i, grpc_message(message())))
        assert wire.answer(i).status == "0"
        del wire.answers[i]
    assert wire.goaway is None


def test_the_last_word_of_a_cut_is_heard(server: Running) -> None:
    """The reason reaches a peer that still sends: closing with bytes unread would have reset the connection."""
    with Http2Wire(server.grpc) as wire:
        for _ in range(300):
            wire.send(http2.window(0, 1) * 20)
        goaway = wire.closed()
        assert goaway is not None
        assert goaway[1] == ENHANCE_YOUR_CALM
        assert not wire.was_reset


def test_connections_over_the_maximum() -> None:
    with running(transport="native", http=HttpSettings(max_connections=3)) as server:
        kept = [Http2Wire(server.grpc) for _ in range(3)]
        for wire in kept:
            wire.settled()
        with Http2Wire(server.grpc, settle=False) as wire:
            goaway = wire.closed()
            assert goaway is not None
            assert goaway[1] == ENHANCE_YOUR_CALM
        silent = [socket.create_connection(server.grpc, 20) for _ in range(100)]
        assert silent[-1].recv(1) == b""  # closed without a word
        assert kept[0].call(1, message()).status == "0"
        for each in silent:
            each.close()
        for wire in kept:
            wire.socket.close()


# --- HTTP over HTTP/2 --------------------------------------------------------------------------------------------


def test_http_requests(wire: Http2Wire) -> None:
    wire.send(opened(1, path="/v2/models/affine?x=%20", method="GET", grpc=False, end=True))
    answer = wire.answer(1)
    assert (answer.headers[":status"], answer.headers["content-type"]) == ("200", "application/json")
    assert b'"affine"' in answer.body
    wire.send(opened(3, path="/v2/models/affine", method="HEAD", grpc=False, end=True))
    answer = wire.answer(3)
    assert answer.body == b""
    wire.send(opened(5, path="/nowhere", method="GET", grpc=False, end=True))
    assert wire.answer(5).headers[":status"] == "404"
    wire.send(opened(7, path="/v2", method="BREW", grpc=False, end=True))
    assert wire.answer(7).headers[":status"] == "405"


def test_http_inference_with_trailers(wire: Http2Wire) -> None:
    raw = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[1,2.5]}]}'
    trailers = frame(HEADERS, http2.END_HEADERS | END_STREAM, 1, http2.block([("x-end", "y")]))
    wire.send(opened(1, path="/v2/models/affine/infer", grpc=False) + body(1, raw, end=False, size=7) + trailers)
    answer = wire.answer(1)
    assert answer.headers[":status"] == "200"
    assert b"[3.0,6.0]" in answer.body.replace(b" ", b"")


def test_http_requests_that_are_cancelled(server: Running, wire: Http2Wire) -> None:
    server.port.cancelled.clear()
    raw = b'{"id":"h2","inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[1]}]}'
    wire.send(opened(1, path="/v2/models/held/infer", grpc=False) + body(1, raw))
    assert server.port.wait(lambda: bool(server.port.held))
    wire.send(http2.reset(1))
    assert server.port.wait(lambda: server.port.cancelled == ["h2"])
    server.port.held.clear()


@pytest.mark.parametrize("length", ["1", "1000"])
def test_a_length_that_lies(server: Running, wire: Http2Wire, length: str) -> None:
    for i, options in ((1, {}), (3, {"path": "/v2/models/affine/infer", "grpc": False})):
        wire.send(opened(i, ("content-length", length), **options) + body(i, grpc_message(message())))
        assert wire.answer(i).reset == PROTOCOL_ERROR
    assert wire.call(5, message()).status == "0"


def test_heads_over_the_limit(wire: Http2Wire) -> None:
    many = [(f"x-{i}", "y" * 100) for i in range(90)]
    wire.send(opened(1, *many) + opened(3, *many, path="/v2", method="GET", grpc=False, end=True))
    assert wire.answer(1).status == "8"
    answer = wire.answer(3)
    assert answer.headers[":status"] == "431"
    assert answer.headers["content-type"] == "application/json"


def test_grpc_web_is_no_grpc(wire: Http2Wire) -> None:
    fields = [(":method", "POST"), (":scheme", "http"), (":path", http2.INFER), (":authority", "test")]
    for i, content_type, status in ((1, "application/grpc-web", "404"), (3, "application/grpc+proto", "0")):
        wire.send(frame(HEADERS, http2.END_HEADERS, i, http2.block([*fields, ("content-type", content_type)])))
        wire.send(body(i, grpc_message(message())))
        assert wire.answer(i).status == status


# --- ends --------------------------------------------------------------------------------------------------------


@contextmanager
def draining(server: Running) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=lambda: server.run(server.grpc_server.drain(8), 20), daemon=True)
    thread.start()
    yield thread
    thread.join(20)
    assert not thread.is_alive()


def test_a_drain_answers_what_it_took() -> None:
    with running(transport="native") as server, Http2Wire(server.grpc) as wire:
        wire.send(opened(1) + body(1, grpc_message(message("held"))))
        wire.send(opened(3, path=http2.STREAM_INFER) + body(3, grpc_message(message("held"))))  # ended by the peer
        wire.send(opened(5, path=http2.STREAM_INFER) + body(5, grpc_message(message()), end=False))
        assert server.port.wait(lambda: len(server.port.held) == 2)
        with draining(server):
            while wire.goaway is None:
                assert wire.read_frame()
            assert wire.goaway[0] == 2**31 - 1
            wire.send(opened(7) + body(7, grpc_message(message())))  # was on its way
            assert wire.answer(7).status == "0"
            while wire.goaway[0] == 2**31 - 1:
                assert wire.read_frame()
            assert wire.goaway == (7, NO_ERROR)
            wire.send(opened(9) + body(9, grpc_message(message())))
            assert wire.answer(5).status == "14"
            server.call(server.port.answer_held)
            assert outputs(wire.answer(1)) == [3.0, 6.0]
            assert wire.answer(3).status == "0"
            wire.closed()
            assert 9 not in wire.answers


def test_a_drain_waits_for_a_slow_reader() -> None:
    """The answer is out of our hands only when the peer's window has let it go."""
    zero = {http2.INITIAL_WINDOW_SIZE: 0}
    with running(transport="native") as server, Http2Wire(server.grpc, zero, generous=False) as wire:
        wire.send(opened(1) + body(1, grpc_message(message())))
        wire.settled()
        with draining(server):
            while wire.goaway is None or wire.goaway[0] != 1:
                assert wire.read_frame()
            wire.settled()
            wire.send(http2.window(1, 1000))
            assert outputs(wire.answer(1)) == [3.0, 6.0]
            wire.closed()


@contextmanager
def young(server: Running, age_s: float) -> Iterator[Http2Wire]:
    """A connection whose stream 1 was opened before it was old; where the machine was late with it, another one."""
    for _ in range(20):
        began = time.monotonic()
        with Http2Wire(server.grpc, settle=False) as wire:
            wire.send(opened(1, path=http2.STREAM_INFER))
            if time.monotonic() - began < age_s / 2:
                yield wire
                return
    raise AssertionError("the machine stands still too often")


def test_connections_of_an_age_end_and_their_streams_do_not() -> None:
    bounds = Http2Settings(max_age_s=0.5)
    with running(transport="native", http2=bounds) as server, young(server, bounds.max_age_s) as wire:
        while wire.goaway is None or wire.goaway[0] == 2**31 - 1:
            assert wire.read_frame()
        assert wire.goaway == (1, NO_ERROR)
        wire.send(body(1, grpc_message(message())))
        assert wire.answer(1).status == "0"
        wire.closed()


def test_watch_tells_of_the_end_and_ends_behind_the_last_goaway() -> None:
    """A client that reads slowly has the time between to learn that it is to go elsewhere."""
    path = "/grpc.health.v1.Health/Watch"
    with running(transport="native") as server, Http2Wire(server.grpc) as wire:
        asked = health_pb2.HealthCheckRequest().SerializeToString()
        wire.send(opened(1, path=path) + body(1, grpc_message(asked)))
        while len(wire.answers.get(1, http2.Answer()).body) < 7:
            assert wire.read_frame()
        with draining(server):
            while len(wire.answers[1].body) < 14:
                assert wire.read_frame()
            assert wire.answers[1].body[-1] == health_pb2.HealthCheckResponse.NOT_SERVING
            assert wire.goaway in (None, (2**31 - 1, NO_ERROR))
            assert not wire.answers[1].ended
            assert wire.answer(1).status == "14"
            assert wire.goaway == (1, NO_ERROR)
            wire.closed()


def test_half_closed_peers_are_let_go(server: Running) -> None:
    with Http2Wire(server.grpc) as wire:
        wire.settled()
        wire.socket.shutdown(socket.SHUT_WR)
        wire.closed()
        assert wire.ended
