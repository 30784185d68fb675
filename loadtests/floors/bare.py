"""The least that a transport of Tidegate's class can do: read a whole request, send an answer that is there already.

Same event loop, same HTTP/2 session and HTTP parser as the native transport; no limits, no timers, no routing, no
codec, no model. What the gateway costs over this is what it does for a request.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import httptools

from loadtests.floors.canned import Canned
from server.transport.native import wire
from server.transport.native.session import DataReceived, RequestReceived, Session, SessionLimits, SessionOver

_HEAD: Final = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_OK: Final = ((b"grpc-status", b"0"),)
_PIECE_BYTES: Final = 256 * 1024


class BareGrpc(asyncio.Protocol):
    """Answers a call when its request has ended."""

    def __init__(self, canned: Canned) -> None:
        self._answer = wire.framed(canned.grpc)
        self._session = Session(SessionLimits())
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._flush()

    def data_received(self, data: bytes) -> None:
        session = self._session
        try:
            for event in session.feed(data):
                if isinstance(event, DataReceived):
                    session.consumed(event.stream_id, len(event.data))
                elif not isinstance(event, RequestReceived):
                    continue
                if event.end_stream:
                    session.unary(event.stream_id, _HEAD, self._answer, _OK)
        except SessionOver:
            self._transport.close()
        self._flush()

    def _flush(self) -> None:
        while data := self._session.out(_PIECE_BYTES):
            self._transport.write(data)


class BareHttp(asyncio.Protocol):
    """Answers JSON with JSON and binary with binary, told apart by the one header that differs."""

    def __init__(self, canned: Canned) -> None:
        self._json, self._binary = _http(canned.json), _http(canned.binary)
        self._parser = httptools.HttpRequestParser(self)
        self._transport: Any = None
        self._body: list[bytes] = []
        self._is_binary = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    # What the parser calls:

    def on_header(self, name: bytes, _value: bytes) -> None:
        if name.lower() == b"inference-header-content-length":
            self._is_binary = True

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        b"".join(self._body)
        self._transport.write(self._binary if self._is_binary else self._json)
        self._body, self._is_binary = [], False


def _http(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


async def start(folder: Path) -> tuple[list[asyncio.Server], dict[str, str]]:
    """Both listeners and their addresses."""
    canned, loop = Canned.of(folder), asyncio.get_running_loop()
    http = await loop.create_server(lambda: BareHttp(canned), "127.0.0.1", 0)
    grpc = await loop.create_server(lambda: BareGrpc(canned), "127.0.0.1", 0)
    return [http, grpc], {"http": _address(http), "grpc": _address(grpc)}


def _address(server: asyncio.Server) -> str:
    host, port = server.sockets[0].getsockname()
    return f"{host}:{port}"
