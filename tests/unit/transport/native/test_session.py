"""One HTTP/2 connection without a socket: what a peer does never raises but as the end of the connection."""

from __future__ import annotations

import pytest
from hpack import Decoder, Encoder

from server.transport.native import session as native
from server.transport.native.session import Session, SessionLimits, SessionOver
from tests.support import http2
from tests.support.http2 import DATA, END_STREAM, PREFACE, frame, opened

SIZE = 1 << 20


@pytest.fixture
def session() -> Session:
    made = Session(SessionLimits(max_streams=4, max_header_bytes=8192))
    made.feed(PREFACE + http2.settings() + frame(http2.SETTINGS, http2.ACK))
    made.out(SIZE)
    return made


def kinds(session: Session, data: bytes) -> list[str]:
    return [type(event).__name__ for event in session.feed(data)]


def test_first_words() -> None:
    said = Session(SessionLimits(max_streams=7, max_header_bytes=8192)).out(SIZE)
    assert http2.settings({3: 7})[9:] in said
    assert http2.settings({6: 8192})[9:] in said
    assert http2.settings({4: 1 << 20})[9:] in said
    assert said.endswith(http2.window(0, 64 * 1024 * 1024 - 65_535))


def test_a_call(session: Session) -> None:
    assert kinds(session, opened(1) + frame(DATA, END_STREAM, 1, b"abc")) == ["RequestReceived", "DataReceived"]
    assert session.unary(1, [(b":status", b"200")], b"xyz", [(b"grpc-status", b"0")])
    said = session.out(SIZE)
    assert frame(DATA, 0, 1, b"xyz") in said
    assert session.out(SIZE) == b""
    assert not session.over()


def test_ids_pass_through_a_small_table_of_what_was_sent(session: Session) -> None:
    decoder, sizes = Decoder(), []
    for stream_id in range(1, 200, 2):
        session.feed(opened(stream_id, end=True))
        fields = [(b":status", b"200"), (b"x-arm", b"stable"), (b"x-id", b"%016x" % stream_id)]
        assert session.head(stream_id, fields, end=True)
        said = session.out(SIZE)
        block = said[9 : 9 + int.from_bytes(said[:3])]
        assert list(decoder.decode(block, raw=True)) == fields
        sizes.append(len(block))
    assert decoder.header_table.maxsize == 1024
    assert sum(sizes[1:]) / len(sizes[1:]) < sizes[0] * 0.75  # what repeats is mostly in it


def test_out_is_cut_to_size(session: Session) -> None:
    session.feed(http2.window(0, 1 << 20) + opened(1, end=True) + http2.window(1, 1 << 20))
    session.head(1, [(b":status", b"200")])
    session.body(1, bytes(500_000), end=True)
    sizes = []
    while data := session.out(100_000):
        sizes.append(len(data))
    assert max(sizes) <= 100_000
    assert sum(sizes) > 500_000
    assert session.queued() == 0


def test_what_is_said_to_a_stream_that_is_gone_is_dropped(session: Session) -> None:
    session.feed(opened(1) + http2.reset(1))
    assert not session.unary(1, [(b":status", b"200")], b"x", [(b"grpc-status", b"0")])
    assert not session.head(1, [(b":status", b"200")])
    assert not session.body(1, b"x")
    assert not session.trailers(1, [(b"a", b"b")])
    session.consumed(1, 100)
    session.reset(1, 0)
    assert session.queued(1) == 0
    assert kinds(session, opened(3)) == ["RequestReceived"]


def test_windows_survive_resets() -> None:
    """What came of streams that were reset is given back to the connection, or it would starve."""
    session = Session(SessionLimits())
    session.feed(PREFACE + http2.settings() + frame(http2.SETTINGS, http2.ACK))
    session.out(SIZE)
    given = 64 * 1024 * 1024
    for i in range(1, 401, 2):
        body = frame(DATA, 0, i, bytes(16_384)) * 60
        for event in session.feed(opened(i) + body + http2.reset(i)):
            if isinstance(event, native.DataReceived):
                session.consumed(i, len(event.data))
        given -= 60 * 16_384
        said = session.out(SIZE)
        while said:
            size, kind, stream_id = int.from_bytes(said[:3]), said[3], int.from_bytes(said[5:9])
            if (kind, stream_id) == (http2.WINDOW_UPDATE, 0):
                given += int.from_bytes(said[9:13])
            said = said[9 + size :]
        assert given > 1 << 20


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        frame(http2.SETTINGS, 0, 1),
        frame(http2.HEADERS, 4, 1, b"\xff\xff\xff\xff\xff"),
        frame(http2.WINDOW_UPDATE, 0, 0, bytes(4)),
        opened(1, *[(f"x-{j}", "y" * 4000) for j in range(20)]),
    ],
)
def test_broken_peers_get_a_last_word(session: Session, data: bytes) -> None:
    try:
        session.feed(data)
    except SessionOver:
        assert session.over()
    else:
        assert session.out(SIZE)
        assert session.over()
    session.goaway(native.INTERNAL_ERROR)
    session.announce_end()
    session.ping()
    session.out(SIZE)


def test_header_bombs_end_the_connection(session: Session) -> None:
    encoder = Encoder()
    head = encoder.encode([(":method", "POST"), (":scheme", "http"), (":path", "/"), ("x-bomb", "a" * 3900)])
    session.feed(frame(http2.HEADERS, 4, 1, head))
    with pytest.raises(SessionOver):
        session.feed(frame(http2.HEADERS, 4, 3, b"\x83\x86\x84" + b"\xbe" * 12_000))


def test_streams_over_the_maximum_are_refused(session: Session) -> None:
    assert kinds(session, b"".join(opened(i) for i in (1, 3, 5, 7))) == ["RequestReceived"] * 4
    session.feed(opened(9))
    said = session.out(SIZE)
    assert http2.frame(http2.GOAWAY)[3:4] in said or http2.reset(9, native.REFUSED_STREAM) in said


def test_two_step_goodbye(session: Session) -> None:
    session.feed(opened(1))
    session.announce_end()
    assert int.from_bytes(session.out(SIZE)[9:13]) == 2**31 - 1
    session.feed(opened(3))
    session.goaway()
    assert int.from_bytes(session.out(SIZE)[9:13]) == 3
    assert kinds(session, opened(5)) == []
    for i in (1, 3):
        session.head(i, [(b":status", b"204")], end=True)
        session.feed(frame(DATA, END_STREAM, i))
    session.out(SIZE)
    assert session.over()
