"""gRPC over HTTP/2 as bytes: framing of messages, timeouts, status texts, content codings. No sockets, no session.

https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import struct
from typing import Final
from urllib.parse import quote_from_bytes

from server.codec import compression
from server.errors import InvalidArgument, PayloadTooLarge, TidegateError, UnsupportedEncoding
from server.types import Buffer

#: A message's prefix: compressed or not, length.
PREFIX: Final = struct.Struct(">BI")
PREFIX_BYTES: Final = 5
_UNITS_NS: Final = {
    ord("H"): 3_600_000_000_000,
    ord("M"): 60_000_000_000,
    ord("S"): 1_000_000_000,
    ord("m"): 1_000_000,
    ord("u"): 1_000,
    ord("n"): 1,
}
_MAX_DIGITS: Final = 8
#: What stands in a status text as it is: printable ASCII but the percent sign.
_PLAIN: Final = bytes(b for b in range(0x20, 0x7F) if b != 0x25)
_CODINGS: Final = frozenset({"gzip", "deflate", "identity", ""})


def timeout_ns(value: bytes) -> int:
    """``grpc-timeout`` in ns. Raises InvalidArgument."""
    last = len(value) - 1
    unit = _UNITS_NS.get(value[last], 0) if 0 < last <= _MAX_DIGITS else 0
    number = 0
    for i in range(last if unit else 0):
        digit = value[i] - 0x30
        if not 0 <= digit <= 9:
            unit = 0
            break
        number = number * 10 + digit
    if not unit:
        raise InvalidArgument(
            f"grpc-timeout must be up to {_MAX_DIGITS} digits and a unit of H, M, S, m, u, n; "
            f"got {value.decode('latin-1')[:64]!r}"
        )
    return number * unit


def status_text(message: str) -> bytes:
    """``grpc-message``: percent-encoded UTF-8."""
    return quote_from_bytes(message.encode("utf-8", "replace"), safe=_PLAIN).encode()


def framed(message: Buffer) -> bytes:
    """A message behind its prefix, not compressed."""
    return PREFIX.pack(0, len(message)) + message


def declared(prefix: bytes, limit: int) -> int:
    """The length that a prefix says. Raises PayloadTooLarge over ``limit``, InvalidArgument for a bad flag."""
    flag = prefix[0]
    size = prefix[1] << 24 | prefix[2] << 16 | prefix[3] << 8 | prefix[4]
    if flag > 1:
        raise InvalidArgument(f"the first byte of a gRPC message must be 0 or 1, got {flag}")
    if size > limit:
        raise PayloadTooLarge(f"message of {size} bytes is over the limit of {limit} bytes")
    return size


def check_coding(coding: str) -> None:
    """Raises UnsupportedEncoding for a ``grpc-encoding`` that is not spoken."""
    if coding not in _CODINGS:
        raise UnsupportedEncoding(f"grpc-encoding must be one of gzip, deflate, identity; got {coding[:64]!r}")


def inflated(payload: Buffer, coding: str, limit: int) -> Buffer:
    """A message whose prefix says that it is compressed. Raises InvalidArgument, PayloadTooLarge."""
    if coding in ("", "identity"):
        raise InvalidArgument("a message is marked as compressed, but no grpc-encoding was said")
    return compression.decompress(payload, coding, limit)


class Deframer:
    """Cuts a stream of bytes into messages, still compressed if they were.

    A prefix that ``declared`` refuses ends it: what came before is given, ``error`` says why nothing more is.
    """

    __slots__ = ("_buffer", "_limit", "_wanted", "error")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._wanted = 0
        self.error: TidegateError | None = None

    def feed(self, data: bytes) -> list[tuple[bool, bytes]]:
        """The messages that ``data`` completes: (compressed, payload)."""
        messages: list[tuple[bool, bytes]] = []
        if self.error is None:
            self._buffer += data
            try:
                self._cut(messages)
            except TidegateError as error:
                self.error = error.with_traceback(None)
                self.clear()
        return messages

    def clear(self) -> None:
        """Drop what a message has of itself that is not complete: nothing is fed after this."""
        self._buffer.clear()

    def _cut(self, messages: list[tuple[bool, bytes]]) -> None:
        buffer, start = self._buffer, 0
        with memoryview(buffer) as view:
            while len(view) - start >= PREFIX_BYTES:
                self._wanted = self._wanted or PREFIX_BYTES + declared(
                    bytes(view[start : start + PREFIX_BYTES]), self._limit
                )
                if len(view) - start < self._wanted:
                    break
                messages.append((bool(view[start]), bytes(view[start + PREFIX_BYTES : start + self._wanted])))
                start += self._wanted
                self._wanted = 0
        del buffer[:start]

    @property
    def size(self) -> int:
        """Bytes of a message that has begun and is not complete; 0: there is none."""
        return len(self._buffer)
