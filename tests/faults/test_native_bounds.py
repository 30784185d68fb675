"""Bounds of the native transport of which several hold at once: each alone, where another would hide its absence."""

from __future__ import annotations

import asyncio
import gzip
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import cast

import numpy as np
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from server._pb import inference_pb2 as pb
from server.transport.answers import HttpSettings
from server.transport.http_infer import InferApp
from server.transport.native.h2 import Http2Settings
from server.transport.native.server import GrpcMethods, NativeServer, Served
from server.transport.native.session import Session, SessionLimits, SessionOver
from server.types import RequestLimits
from tests.support import http2
from tests.support.admitting import ROOM, Admitting, has_room
from tests.support.echo import Running, running
from tests.support.http2 import DATA, END_HEADERS, END_STREAM, HEADERS, Http2Wire, frame, opened
from tests.support.wire import Wire

SIZE = MIB = 1 << 20
#: Opened and reset at once, and again: what thousands of deadlines do that expire together.
HONEST_RESETS = 3000


@pytest.fixture
def session() -> Session:
    """Greeted, and with nothing to say."""
    made = Session(SessionLimits())
    made.feed(http2.PREFACE + http2.settings())
    made.out(SIZE)
    return made


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(transport="native") as started:
        yield started


def message() -> bytes:
    request = pb.ModelInferRequest(model_name="affine")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(np.array([1, 2], "<f4").tobytes())
    return request.SerializeToString()


def echoed(size: int) -> bytes:
    request = pb.ModelInferRequest(model_name="echo")
    request.inputs.add(name="x", datatype="FP32", shape=[1, size // 4])
    request.raw_input_contents.append(bytes(size))
    return http2.grpc_message(request.SerializeToString())


def test_resets_of_an_honest_client_do_not_end_its_connection(server: Running) -> None:
    """The library's own budget, 1,000 at once and 33 a second, would."""
    whole = frame(DATA, END_STREAM, 0, http2.grpc_message(message()))
    with Http2Wire(server.grpc) as wire:
        for first in range(1, 2 * HONEST_RESETS, 100):
            streams = range(first, first + 100, 2)
            wire.send(b"".join(opened(i) + whole[:5] + i.to_bytes(4) + whole[9:] for i in streams))
            wire.send(b"".join(http2.reset(i) for i in streams))
        wire.settled()
        assert wire.call(2 * HONEST_RESETS + 101, message()).status == "0"
        assert wire.goaway is None


def test_windows_of_calls_that_are_given_up_are_no_flood(server: Running) -> None:
    """grpcio opens a window of its own for every call, answered or not."""
    with Http2Wire(server.grpc) as wire:
        for first in range(1, 2 * HONEST_RESETS, 100):
            streams = range(first, first + 100, 2)
            wire.send(b"".join(opened(i) + http2.window(i, 1 << 20) for i in streams))
            wire.send(b"".join(http2.reset(i) for i in streams))
        wire.settled()
        assert wire.call(2 * HONEST_RESETS + 101, message()).status == "0"
        assert wire.goaway is None


def test_windows_given_back_in_small_pieces_are_no_flood(server: Running) -> None:
    """A client that reads 2 kB at a time and says so each time: 4,000 frames that move nothing but its own answer."""
    with Http2Wire(server.grpc, generous=False) as wire:
        wire.send(opened(1))
        wire.upload(1, echoed(8_000_000))
        while not wire.answers.get(1, http2.Answer()).ended:
            got = wire.read_frame()
            assert got is not None, wire.goaway
            if got[0] == DATA:
                pieces = -(-len(got[3]) // 2048)
                wire.send(http2.window(0, len(got[3])) + http2.window(1, 2048) * pieces)
        assert wire.answer(1).status == "0"


@pytest.mark.parametrize("asked", [frame(http2.PING, 0, 0, bytes(8)), http2.settings()], ids=["ping", "settings"])
def test_acknowledgements_that_cannot_leave_are_bounded(session: Session, asked: bytes) -> None:
    """A peer that does not read lets the socket fill: what it asks for then waits in the session."""
    with pytest.raises(SessionOver):
        session.feed(asked * 300)


def test_acknowledgements_that_leave_are_not(session: Session) -> None:
    for _ in range(300):
        session.feed(frame(http2.PING, 0, 0, bytes(8)))
        assert session.out(SIZE)
    assert not session.over()


def test_heads_are_bounded_by_what_they_decode_to(session: Session) -> None:
    """Few fields and few bytes, each field naming one table entry of 4 kB: 2 MB in 600 bytes."""
    entry = b"\x40" + http2.length(1) + b"x" + http2.length(4000) + b"a" * 4000
    session.feed(frame(HEADERS, END_HEADERS | END_STREAM, 1, http2.request() + entry))
    with pytest.raises(SessionOver):
        session.feed(frame(HEADERS, END_HEADERS | END_STREAM, 3, http2.request() + b"\xbe" * 500))


def test_a_session_that_is_over_has_nothing_more_to_say(session: Session) -> None:
    """Over some bounds the library ends at once, without a last word: that is no error of ours."""
    entry = b"\x40" + http2.length(1) + b"x" + http2.length(4000) + b"a" * 4000
    with pytest.raises(SessionOver):
        session.feed(frame(HEADERS, END_HEADERS | END_STREAM, 1, http2.request() + entry + b"\xbe" * 500))
    assert session.out(SIZE) == b""
    assert session.over()


# --- calls --------------------------------------------------------------------------------------------------------


def test_a_message_that_stops_is_not_waited_for_all_its_time() -> None:
    """The bound on silence, where the one on the whole would not be reached in this test."""
    settings = HttpSettings(body_idle_s=0.5, body_total_s=600.0)
    with running(transport="native", http=settings) as server, Http2Wire(server.grpc) as wire:
        wire.send(opened(1) + frame(DATA, 0, 1, echoed(1000)[:500]))
        assert wire.answer(1).status == "4"


def test_bytes_behind_a_message_are_refused_as_they_come(server: Running) -> None:
    """Not gathered until the call ends."""
    with Http2Wire(server.grpc) as wire:
        wire.send(opened(1))
        wire.upload(1, echoed(40_000) + b"x", end=False)
        answer = wire.answer(1)
        assert answer.status == "3"
        assert "one message" in answer.headers["grpc-message"]


@pytest.mark.parametrize("flag", [0, 1])
def test_messages_are_admitted_before_they_are_gathered(server: Running, flag: int) -> None:
    """Compressed ones too: what they inflate to is known late, that they are held is known at once."""
    before, size = len(server.port.admitted), 100_000
    with Http2Wire(server.grpc) as wire:
        wire.send(
            opened(1, ("grpc-encoding", "gzip")) + frame(DATA, 0, 1, http2.grpc_message(b"x" * size, flag)[:1000])
        )
        wire.settled()
        assert [head.content_length for head in server.port.admitted[before:]] == [size]
    assert server.port.wait(lambda: len(server.port.released) == len(server.port.admitted))


@pytest.mark.parametrize("flag", [0, 1])
def test_messages_of_other_methods_are_small(server: Running, flag: int) -> None:
    """Nobody admits them: they are refused by what their prefix says."""
    path = http2.INFER.replace("ModelInfer", "ModelReady")
    with Http2Wire(server.grpc) as wire:
        wire.send(opened(1, ("grpc-encoding", "gzip"), path=path) + frame(DATA, 0, 1, b"%c\0\x20\0\0" % flag))
        answer = wire.answer(1)
        assert answer.status == "8"
        assert "2097152 bytes is over the limit of 1048576 bytes" in answer.headers["grpc-message"]


@pytest.mark.parametrize("path", [http2.INFER, http2.STREAM_INFER])
def test_messages_are_bounded_by_what_they_inflate_to(path: str) -> None:
    packed = gzip.compress(echoed(2_000_000)[5:])
    limits = RequestLimits(max_body_bytes=1_000_000)
    with running(transport="native", limits=limits) as server, Http2Wire(server.grpc) as wire:
        wire.send(opened(1, ("grpc-encoding", "gzip"), path=path))
        wire.upload(1, http2.grpc_message(packed, 1))
        assert wire.answer(1).status == "8"


def test_streams_are_refused_while_answers_wait_for_their_reader() -> None:
    bounds, own = Http2Settings(max_unsent_bytes=200_000), {http2.INITIAL_WINDOW_SIZE: 0}
    with running(transport="native", http2=bounds) as server, Http2Wire(server.grpc, own, generous=False) as wire:
        wire.send(opened(1))
        wire.upload(1, echoed(400_000))
        wire.settled()
        wire.send(opened(3, path=http2.STREAM_INFER))
        assert wire.answer(3).status == "14"
        assert "take them first" in wire.answer(3).headers["grpc-message"]
        wire.send(http2.window(0, MIB) + http2.window(1, MIB))
        assert len(wire.answer(1).body) > 400_000
        wire.send(opened(5) + http2.window(5, MIB))
        wire.upload(5, echoed(1000))
        assert wire.answer(5).status == "0"


def test_messages_that_have_begun_count_over_all_connections() -> None:
    """Each connection for itself is far below its own bounds."""
    head = struct.pack(">BI", 0, 8 * MIB)
    with running(transport="native", port=Admitting) as server, ExitStack() as stack:
        wires = [stack.enter_context(Http2Wire(server.grpc)) for _ in range(4)]
        for wire in wires[:3]:
            wire.send(opened(1, path=http2.STREAM_INFER))
            wire.upload(1, head + bytes(5 * MIB), end=False)
            wire.settled()
        assert not has_room(server, 4 * MIB)
        last = wires[3]
        last.send(opened(1, path=http2.STREAM_INFER) + frame(DATA, 0, 1, head))
        while not last.answers.get(1, http2.Answer()).ended:
            last.upload(1, bytes(MIB // 2), end=False)
            last.settled()
        assert last.answers[1].status == "14"
        assert f"the limit of {ROOM}" in last.answers[1].headers["grpc-message"]
        assert "retry-after" in last.answers[1].headers
        for wire in wires[:3]:
            assert not wire.answers[1].ended
            wire.send(http2.reset(1))
            wire.settled()
        assert has_room(server, ROOM)


def test_a_stream_counts_for_no_more_than_it_holds() -> None:
    """Its messages, one after another, are many times what there is room for."""
    refused = pb.ModelInferRequest(model_name="nobody", raw_input_contents=[bytes(5 * MIB)])
    refused.inputs.add(name="x", datatype="UINT8", shape=[5 * MIB])
    whole = http2.grpc_message(refused.SerializeToString())
    with running(transport="native", port=Admitting) as server, Http2Wire(server.grpc) as wire:
        wire.send(opened(1, path=http2.STREAM_INFER))
        for done in range(1, 9):
            wire.upload(1, whole, end=False)
            while wire.answers.get(1, http2.Answer()).body.count(b"unknown model") < done:
                assert wire.read_frame() is not None
        wire.settled()
        assert has_room(server, ROOM - MIB)  # an idle stream's own part
        wire.send(frame(DATA, END_STREAM, 1))
        assert wire.answer(1).status == "0"
        wire.settled()
        assert has_room(server, ROOM)


# --- after the last word ------------------------------------------------------------------------------------------

BREACH = frame(HEADERS, END_HEADERS, 2, b"")  # of a stream that is not the client's to open
CUT_WITHIN_S = 20.0


def is_cut(wire: Http2Wire, piece: bytes, most: int = 1 << 40) -> bool:
    """Whether the server resets the connection, in time and within ``most`` bytes, while it is sent more and more."""
    until, pause, sent = time.monotonic() + CUT_WITHIN_S, threading.Event(), 0
    with suppress(TimeoutError):
        while time.monotonic() < until and sent < most:
            if not wire.send(piece):
                return True
            sent += len(piece)
            pause.wait(0.0 if len(piece) > 1000 else 0.1)
    return False


def test_a_peer_that_does_not_close_is_cut() -> None:
    with running(transport="native", http=HttpSettings(discard_s=0.5)) as server, Http2Wire(server.grpc) as wire:
        wire.send(BREACH)
        assert wire.closed() is not None
        assert is_cut(wire, b"x")


def test_what_comes_after_the_end_is_bounded_in_bytes() -> None:
    settings = HttpSettings(discard_s=60.0, discard_bytes=100_000)
    with running(transport="native", http=settings) as server, Http2Wire(server.grpc) as wire:
        wire.send(BREACH)
        assert wire.closed() is not None
        assert is_cut(wire, bytes(50_000), 50_000_000)


def test_a_last_word_that_nobody_takes_is_cut_short() -> None:
    """Its answers fill the socket, and the peer breaks a rule: what is left is not kept for it."""
    settings = HttpSettings(discard_s=0.5, write_stall_s=0.8)
    own = {http2.INITIAL_WINDOW_SIZE: 2**31 - 1}
    with (
        running(transport="native", http=settings) as server,
        Http2Wire(server.grpc, own, receive_buffer=4096, generous=False) as wire,
    ):
        wire.send(http2.window(0, 2**30) + opened(1))
        wire.upload(1, echoed(8_000_000))
        assert server.port.wait(lambda: bool(server.port.released))
        wire.send(BREACH)
        assert is_cut(wire, b"x")


def test_a_stream_waits_for_its_reader() -> None:
    """Answers of a stream whose peer takes none: no more than its share waits in the session."""
    raw = echoed(100_000)
    with (
        running(transport="native") as server,
        Http2Wire(server.grpc, {http2.INITIAL_WINDOW_SIZE: 0}, generous=False) as wire,
    ):
        wire.send(opened(1, path=http2.STREAM_INFER))
        for _ in range(40):
            wire.upload(1, raw, end=False)
        wire.settled()
        (connection,) = cast("NativeServer", server.grpc_server).live
        assert 1_000_000 < server.call(connection.session.queued) < 1_300_000


# --- HTTP requests on HTTP/2 --------------------------------------------------------------------------------------


@contextmanager
def app_of(server: Running, app: ASGIApp) -> Iterator[tuple[str, int]]:
    """The address of a listener beside ``server``, in front of ``app``."""
    served = Served(server.port, server.catalog, cast("InferApp", app), GrpcMethods(server.services))
    own = server.call(lambda: NativeServer(served))
    yield server.run(own.start("127.0.0.1", 0))
    server.run(own.drain(0.1))


def test_a_message_does_not_wait_for_the_reader_of_another_stream() -> None:
    """The oldest stream has messages that wait while its answers are not taken: over the limit another goes on."""
    raw = echoed(20_000)
    bounds = Http2Settings(max_gathered_bytes=3 * MIB, max_in_flight_per_stream=1)
    with (
        running(transport="native", http2=bounds) as server,
        Http2Wire(server.grpc, {http2.INITIAL_WINDOW_SIZE: 0}) as wire,
    ):
        wire.send(opened(1, path=http2.STREAM_INFER))
        for _ in range(80):
            wire.upload(1, raw, end=False)
        wire.settled()
        (connection,) = cast("NativeServer", server.grpc_server).live
        until = time.monotonic() + http2.PATIENCE_S
        while server.call(connection.session.queued) < MIB:
            assert time.monotonic() < until
        wire.send(opened(3) + http2.window(3, 2**30))
        wire.upload(3, echoed(5_000_000))
        assert wire.answer(3).status == "0"


def test_a_message_goes_on_when_the_one_before_it_waits_for_its_reader() -> None:
    """Watch reads one message. While half of a second one is there it goes on alone; what is there as a whole waits."""
    raw, second, sent = echoed(3_500_000), http2.grpc_message(bytes(100)), 0
    bounds = Http2Settings(max_gathered_bytes=2 * MIB)
    with running(transport="native", http2=bounds) as server, Http2Wire(server.grpc) as wire:
        wire.send(opened(1, path="/grpc.health.v1.Health/Watch"))
        wire.send(frame(DATA, 0, 1, http2.grpc_message(b"") + second[:50]) + opened(3))
        wire.settled()

        def room() -> int:
            return min(wire.own_settings[http2.INITIAL_WINDOW_SIZE] + wire.windows.get(3, 0) - sent, 16_384)

        while size := room():
            wire.send(frame(DATA, 0, 3, raw[sent : sent + size]))
            sent += size
            wire.settled()
        assert sent < len(raw)
        wire.send(frame(DATA, 0, 1, second[50:]))
        while sent < len(raw):
            if size := room():
                wire.send(frame(DATA, END_STREAM * (sent + size >= len(raw)), 3, raw[sent : sent + size]))
                sent += size
            else:
                assert wire.read_frame() is not None
        assert wire.answer(3).status == "0"


def test_what_a_stream_throws_away_holds_nobody_up() -> None:
    """Watch has half of a second message, which is given up: neither that nor what follows counts as waiting."""
    with (
        running(transport="native", http=HttpSettings(body_idle_s=0.5)) as server,
        Http2Wire(server.grpc) as wire,
    ):
        wire.send(opened(1, path="/grpc.health.v1.Health/Watch"))
        wire.send(frame(DATA, 0, 1, http2.grpc_message(b"") + http2.grpc_message(bytes(100))[:50]))
        wire.settled()
        (connection,) = cast("NativeServer", server.grpc_server).live
        until = time.monotonic() + http2.PATIENCE_S
        while server.call(lambda: connection.windows.total):
            assert time.monotonic() < until
        wire.send(frame(DATA, 0, 1, bytes(1000)))
        wire.settled()
        assert server.call(lambda: connection.windows.total) == 0


def test_a_body_that_is_not_read_holds_its_window(server: Running) -> None:
    over = server.call(asyncio.Event)

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        await over.wait()

    with app_of(server, app) as address, Http2Wire(address) as wire:
        wire.send(opened(1, path="/", grpc=False))
        wire.upload(1, bytes(1_000_000), end=False)
        wire.settled()
        assert wire.windows.get(1, 0) < 300_000
        server.call(over.set)


def test_an_app_waits_for_the_reader_of_its_answer(server: Running) -> None:
    sent: list[int] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for i in range(100):
            await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
            sent.append(i)

    own = {http2.INITIAL_WINDOW_SIZE: 0}
    with app_of(server, app) as address, Http2Wire(address, own, generous=False) as wire:
        wire.send(opened(1, path="/", method="GET", grpc=False, end=True))
        wire.settled()
        assert 5 < len(sent) < 15


# --- HTTP/1.1: inference that is taken in front of the app ----------------------------------------------------------

PATH = "/v2/models/echo/infer"
#: A body that is binary behind its first bytes stays on the loop, whatever its size.
BINARY = f"POST {PATH} HTTP/1.1\r\nHost: t\r\nInference-Header-Content-Length: 9\r\n".encode()


def first_status(server: Running, *pieces: bytes) -> int:
    with Wire("{}:{}".format(*server.http)) as wire:
        for piece in pieces:
            wire.send(piece)
        answer = wire.answer()
    assert answer is not None
    return answer.status


def test_bodies_of_any_declared_or_real_size_are_not_gathered() -> None:
    with running(transport="native", limits=RequestLimits(max_body_bytes=1000)) as server:
        assert first_status(server, BINARY + b"Content-Length: 1001\r\n\r\n") == 413
        chunk = b"1f4\r\n" + bytes(500) + b"\r\n"
        assert first_status(server, BINARY + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk, chunk) == 413


def test_what_a_body_does_not_say_counts_as_it_comes() -> None:
    """Chunked bodies are refused while they come, packed ones when they are unpacked; nothing stays held."""
    piece = b"1f4\r\n" + bytes(500) + b"\r\n"
    packed = gzip.compress(b" " * 5000)
    with running(transport="native") as server:
        server.port.room = 1000
        assert first_status(server, BINARY + b"Transfer-Encoding: chunked\r\n\r\n", piece, piece, piece) == 503
        coded = b"Content-Encoding: gzip\r\n"
        size = b"Content-Length: %d\r\n\r\n" % len(packed)
        assert first_status(server, BINARY + coded + size + packed) == 503
        chunked = b"Transfer-Encoding: chunked\r\n\r\n"
        assert first_status(server, BINARY + coded + chunked, piece, piece, piece) == 503
        message = http2.grpc_message(gzip.compress(echoed(2_000_000)[5:]), 1)
        with Http2Wire(server.grpc) as wire:
            wire.send(opened(1, ("grpc-encoding", "gzip")) + frame(DATA, END_STREAM, 1, message))
            assert wire.answer(1).status == "14"
        assert len(server.port.admitted) == 4
        assert server.port.wait(lambda: len(server.port.released) == 4)


@pytest.mark.parametrize(
    ("settings", "header", "status"),
    [
        (HttpSettings(body_idle_s=0.5, body_total_s=600.0), b"", 408),
        (HttpSettings(body_idle_s=600.0, body_total_s=0.5), b"", 408),
        (HttpSettings(body_idle_s=600.0, body_total_s=600.0), b"x-tidegate-timeout-ms: 500\r\n", 504),
    ],
    ids=["silence", "whole", "deadline"],
)
def test_each_bound_on_the_time_of_a_body(settings: HttpSettings, header: bytes, status: int) -> None:
    with running(transport="native", http=settings) as server:
        assert first_status(server, BINARY + header + b"Content-Length: 100\r\n\r\n", b"{") == status
