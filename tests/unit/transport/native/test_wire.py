"""gRPC's framing as bytes."""

from __future__ import annotations

import gzip
import random
import struct
import zlib

import pytest

from server.errors import InvalidArgument, PayloadTooLarge, UnsupportedEncoding
from server.transport.native import wire


@pytest.mark.parametrize(
    ("text", "ns"),
    [("1H", 3600 * 10**9), ("2M", 120 * 10**9), ("3S", 3 * 10**9), ("4m", 4 * 10**6), ("5u", 5000), ("6n", 6),
     ("0S", 0), ("99999999H", 99999999 * 3600 * 10**9)],
)  # fmt: skip
def test_timeouts(text: str, ns: int) -> None:
    assert wire.timeout_ns(text.encode()) == ns


@pytest.mark.parametrize(
    "text",
    ["", "S", "1", "1s", "-1S", "+1S", "1.5S", "1 S", "123456789S", "٣S", "1S ", "S1", "1_0S", "1S, 1S"],
)
def test_bad_timeouts(text: str) -> None:
    with pytest.raises(InvalidArgument, match="grpc-timeout"):
        wire.timeout_ns(text.encode())


def test_status_texts_are_percent_encoded_utf_8() -> None:
    assert wire.status_text("plain ~text") == b"plain ~text"
    assert wire.status_text("100%\né\x7f") == b"100%25%0A%C3%A9%7F"
    assert wire.status_text("\ud800") == b"?"


def test_framed() -> None:
    assert wire.framed(b"abc") == b"\x00\x00\x00\x00\x03abc"


@pytest.mark.parametrize(
    ("prefix", "error"), [(b"\x02\x00\x00\x00\x01", InvalidArgument), (b"\x00\x00\x00\x00\x0b", PayloadTooLarge)]
)
def test_prefixes_that_are_refused(prefix: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        wire.declared(prefix, 10)
    assert wire.declared(b"\x01\x00\x00\x00\x0a", 10) == 10


def test_codings() -> None:
    for coding in ("gzip", "deflate", "identity", ""):
        wire.check_coding(coding)
    with pytest.raises(UnsupportedEncoding):
        wire.check_coding("snappy")
    assert wire.inflated(gzip.compress(b"abc"), "gzip", 10) == b"abc"
    assert wire.inflated(zlib.compress(b"abc"), "deflate", 10) == b"abc"
    with pytest.raises(PayloadTooLarge):
        wire.inflated(gzip.compress(bytes(11)), "gzip", 10)
    for coding, payload in (("", b"abc"), ("identity", b"abc"), ("gzip", b"abc")):
        with pytest.raises(InvalidArgument):
            wire.inflated(payload, coding, 10)


def test_messages_come_whole_however_they_are_cut() -> None:
    rng = random.Random(1)
    messages = [(rng.random() < 0.5, rng.randbytes(rng.choice((0, 1, 5, 300)))) for _ in range(200)]
    stream = b"".join(struct.pack(">BI", flag, len(payload)) + payload for flag, payload in messages)
    for size in (1, 2, 4, 5, 6, 7, 1000, len(stream)):
        deframer = wire.Deframer(300)
        got = [m for i in range(0, len(stream), size) for m in deframer.feed(stream[i : i + size])]
        assert got == messages
        assert not deframer.size


def test_a_message_over_the_limit_is_refused_by_its_prefix() -> None:
    deframer = wire.Deframer(300)
    assert deframer.feed(b"\x00\x00\x00") == []
    assert deframer.size == 3
    assert deframer.feed(b"\xff\xff") == []
    assert isinstance(deframer.error, PayloadTooLarge)
    assert deframer.size == 0


@pytest.mark.parametrize(
    ("bad", "kind"), [(b"\x02\x00\x00\x00\x01", InvalidArgument), (b"\x00\x00\x00\x01\x2d", PayloadTooLarge)]
)
def test_what_came_before_a_bad_prefix_is_given_and_nothing_after_it(bad: bytes, kind: type[Exception]) -> None:
    good = wire.framed(b"abc") + wire.framed(b"")
    stream = good + bad + good
    for size in range(1, len(stream) + 1):
        deframer = wire.Deframer(300)
        got = [m for i in range(0, len(stream), size) for m in deframer.feed(stream[i : i + size])]
        assert got == [(False, b"abc"), (False, b"")]
        assert isinstance(deframer.error, kind)
        assert deframer.size == 0
