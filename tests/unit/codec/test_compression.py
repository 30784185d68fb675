"""Content codings and their bounds."""

from __future__ import annotations

import gzip
import os
import tracemalloc
import zlib

import pytest

from server.codec.compression import compress, decompress
from server.errors import InvalidArgument, PayloadTooLarge, UnsupportedEncoding

PLAIN = b'{"inputs": []}' * 50


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


CODED = {"gzip": gzip.compress(PLAIN), "x-gzip": gzip.compress(PLAIN), "deflate": zlib.compress(PLAIN)}


@pytest.mark.parametrize("encoding", [None, "", "identity", "Identity"])
def test_identity(encoding: str | None) -> None:
    assert decompress(PLAIN, encoding, len(PLAIN)) is PLAIN
    with pytest.raises(PayloadTooLarge, match="limit of 699 bytes"):
        decompress(PLAIN, encoding, len(PLAIN) - 1)


@pytest.mark.parametrize("encoding", [*CODED, "GZIP", " gzip "])
def test_codings(encoding: str) -> None:
    coded = CODED[encoding.strip().lower()]
    assert decompress(coded, encoding, len(PLAIN)) == PLAIN
    assert decompress(memoryview(coded), encoding, len(PLAIN)) == PLAIN
    with pytest.raises(PayloadTooLarge, match="when decompressed"):
        decompress(coded, encoding, len(PLAIN) - 1)


def test_deflate_without_zlib_header() -> None:
    assert decompress(raw_deflate(PLAIN), "deflate", 10_000) == PLAIN


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_damaged_bodies(encoding: str) -> None:
    coded = CODED[encoding]
    for size in range(len(coded)):
        with pytest.raises(InvalidArgument):
            decompress(coded[:size], encoding, 10_000)
    with pytest.raises(InvalidArgument, match="3 bytes follow"):
        decompress(coded + b"abc", encoding, 10_000)
    with pytest.raises(InvalidArgument, match="follow"):
        decompress(coded + coded, encoding, 10_000)
    with pytest.raises(InvalidArgument):
        decompress(coded[:-1] + bytes((coded[-1] ^ 0xFF,)), encoding, 10_000)
    with pytest.raises(InvalidArgument):
        decompress(PLAIN, encoding, 10_000)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, deflate", "gzip,gzip", "x" * 10_000])
def test_unknown_codings(encoding: str) -> None:
    with pytest.raises(UnsupportedEncoding, match="gzip, deflate, identity") as caught:
        decompress(PLAIN, encoding, 10_000)
    assert len(caught.value.message) < 300


def test_a_bomb_is_not_inflated() -> None:
    bomb = gzip.compress(bytes(64 * 1024 * 1024))
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge):
            decompress(bomb, "gzip", 1024 * 1024)
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024 * 1024
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        (None, None),
        ("", None),
        ("identity", None),
        ("br", None),
        ("gzip", "gzip"),
        ("x-gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("deflate, gzip", "gzip"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip;q=0", None),
        ("gzip;q=0, *", "deflate"),
        ("*", "gzip"),
        ("*;q=0", None),
        ("identity;q=1, gzip;q=0.5", None),
        ("identity;q=0.5, gzip ; q=0.5", "gzip"),
        ("gzip;q=nonsense", None),
        ("gzip;q=2", None),
        ("gzip;q=nan", None),
        ("gzip;level=3", "gzip"),
        (",;,=;q", None),
    ],
)
def test_accept_encoding(accept: str | None, coding: str | None) -> None:
    body, chosen = compress(PLAIN, accept)
    assert chosen == coding
    assert decompress(body, chosen, len(PLAIN)) == PLAIN


def test_round_trip_of_random_bytes() -> None:
    data = os.urandom(100_000)
    for accept in ("gzip", "deflate"):
        body, coding = compress(data, accept)
        assert decompress(body, coding, len(data)) == data
