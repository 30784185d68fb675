"""A gRPC echo as a user of the ``ngh2`` library writes it: plain Python, an asyncio protocol on uvloop, libnghttp2.

Whole unary gRPC for one method: messages in any number of pieces, their framing, calls that are reset, the statuses of
what cannot be answered, flow control both ways. Nothing around it: no deadlines, no limits, no drain, no model; the
answer is there already. It shares no code with the native transport.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import ngh2

from loadtests.floors.canned import Canned
from loadtests.lanes import INFER_PATH

_PATH: Final = (b":path", INFER_PATH.encode())
_HEAD: Final = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_OK: Final = ((b"grpc-status", b"0"),)
_PREFIX: Final = struct.Struct(">BI")
_UNIMPLEMENTED: Final = 12
_INTERNAL: Final = 13
_SETTINGS: Final = {
    ngh2.Setting.MAX_CONCURRENT_STREAMS: 1000,
    ngh2.Setting.INITIAL_WINDOW_SIZE: 1024 * 1024,
    ngh2.Setting.NO_RFC7540_PRIORITIES: 1,
}
_CONNECTION_WINDOW: Final = 16 * 1024 * 1024


class Ngh2Echo(asyncio.Protocol):
    """One connection. ``answer``: the message that every call gets."""

    def __init__(self, answer: bytes) -> None:
        self._answer = _PREFIX.pack(0, len(answer)) + answer
        self._connection = ngh2.Connection(ngh2.Role.SERVER)
        self._transport: Any = None
        #: Bodies of the calls whose request has not ended, in pieces.
        self._bodies: dict[int, list[bytes]] = {}

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._connection.initiate_connection(_SETTINGS)
        self._connection.set_local_window_size(_CONNECTION_WINDOW)
        transport.write(self._connection.data_to_send())

    def pause_writing(self) -> None:
        """The peer does not read its answers: no more of its requests are read."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        connection = self._connection
        try:
            connection.receive_data(data)
            self._handle(connection.events())
            if out := connection.data_to_send():
                self._transport.write(out)
            over = not connection.want_read
        except ngh2.NGH2Error:
            over = True
        if over:
            self._transport.close()

    def _handle(self, events: Iterable[ngh2.Event]) -> None:
        bodies = self._bodies
        for event in events:
            if isinstance(event, ngh2.DataReceived):
                body = bodies.get(event.stream_id)
                if body is not None:
                    body.append(event.data)
                    if event.end_stream:
                        self._ended(event.stream_id, body)
            elif isinstance(event, ngh2.RequestReceived):
                self._begun(event)
            elif isinstance(event, (ngh2.StreamClosed, ngh2.StreamReset)):
                bodies.pop(event.stream_id, None)
            elif isinstance(event, ngh2.TrailersReceived):
                body = bodies.get(event.stream_id)
                if body is not None:
                    self._ended(event.stream_id, body)

    def _begun(self, request: ngh2.RequestReceived) -> None:
        if _PATH not in request.headers:
            self._fail(request.stream_id, _UNIMPLEMENTED)
        elif request.end_stream:
            self._fail(request.stream_id, _INTERNAL)
        else:
            self._bodies[request.stream_id] = []

    def _ended(self, stream_id: int, body: list[bytes]) -> None:
        """The request is whole: answer it if it is one message, and not compressed."""
        del self._bodies[stream_id]
        message = body[0] if len(body) == 1 else b"".join(body)
        if len(message) < _PREFIX.size:
            self._fail(stream_id, _INTERNAL)
            return
        compressed, size = _PREFIX.unpack_from(message)
        if compressed or size != len(message) - _PREFIX.size:
            self._fail(stream_id, _UNIMPLEMENTED if compressed else _INTERNAL)
            return
        connection = self._connection
        try:
            connection.send_response(stream_id, _HEAD)
            connection.send_data(stream_id, self._answer)
            connection.send_trailers(stream_id, _OK)
        except ngh2.StreamUnavailableError:
            return  # reset in the same read as its last byte

    def _fail(self, stream_id: int, status: int) -> None:
        try:
            self._connection.send_response(stream_id, (*_HEAD, (b"grpc-status", b"%d" % status)), end_stream=True)
        except ngh2.StreamUnavailableError:
            return


async def start(folder: Path) -> tuple[asyncio.Server, dict[str, str]]:
    """A gRPC listener and its address."""
    answer = Canned.of(folder).grpc
    server = await asyncio.get_running_loop().create_server(lambda: Ngh2Echo(answer), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    return server, {"grpc": f"{host}:{port}"}
