"""Connections that carry requests: HTTP/1.1 and gRPC over HTTP/2 as plain protocols, and grpcio's own client.

A lane takes ``send(due_ns)`` up to ``width`` times before answers come, and tells its ``sink`` of each request exactly
once how it ended. It sends the same body each time; a gRPC request has a ``traceparent`` of its own, so that header
compression has the work that real traffic gives it, and ``sampled`` is the share of them whose flag says that they are
traced. Lost connections are opened again.

The outcome is ``ok``, or says what happened: ``http 503``, ``grpc 14``, ``lost``, ``wrong answer``.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from random import getrandbits, random
from typing import Any, Final, Protocol

import grpc
import httptools
import ngh2

OK: Final = "ok"
LOST: Final = "lost"
WRONG: Final = "wrong answer"
INFER_PATH: Final = "/inference.GRPCInferenceService/ModelInfer"
#: Answers are read in full every so many; of the others only the status is.
CHECK_EVERY: Final = 64
_RECONNECT_S: Final = 0.05
_ATTEMPTS: Final = 40
_PREFIX: Final = struct.Struct(">BI")
_STREAM_WINDOW: Final = 4 * 1024 * 1024
_CONNECTION_WINDOW: Final = 64 * 1024 * 1024
_PIECE_BYTES: Final = 256 * 1024

#: Says whether a body is the right answer.
Check = Callable[[bytes], bool]


class Sink(Protocol):
    def answered(self, lane: Lane, due_ns: int, outcome: str) -> None:
        """One request has ended; the lane has room for another."""


class Lane(Protocol):
    """One connection. ``sink`` is set before the first ``send``."""

    width: int
    sink: Sink

    async def open(self) -> None:
        """Raises OSError when nobody listens."""
        ...

    def send(self, due_ns: int) -> None: ...

    async def close(self) -> None: ...


def traceparent(sampled: float = 1.0) -> str:
    """Of a new trace, flagged as sampled with this probability."""
    return f"00-{getrandbits(128):032x}-{getrandbits(64):016x}-{'01' if random() < sampled else '00'}"


@dataclass(slots=True)
class Sampled:
    """Reads one answer in ``CHECK_EVERY``, the first among them."""

    check: Check | None
    seen: int = 0

    def outcome(self, body: Iterable[bytes], skip: int = 0) -> str:
        """``body`` without its first ``skip`` bytes is an answer whose status was good."""
        number, self.seen = self.seen, self.seen + 1
        if self.check is None or number % CHECK_EVERY:
            return OK
        try:
            return OK if self.check(b"".join(body)[skip:]) else WRONG
        except Exception:  # noqa: BLE001 - whatever a body makes a reader raise, the answer was wrong
            return WRONG


class _Connected(asyncio.Protocol):
    """A connection that comes back: what is sent while it is away waits, and is lost when it stays away."""

    sink: Sink

    def __init__(self, address: str, width: int) -> None:
        host, _, port = address.rpartition(":")
        self.width = width
        self._host, self._port = host.strip("[]"), int(port)
        self._transport: Any = None
        self._waiting: list[int] = []
        self._again: asyncio.Task[None] | None = None
        self._closed = False

    async def open(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self, self._host, self._port)
        except OSError as error:
            raise ConnectionError(f"cannot connect to {self._host}:{self._port}: {error}") from None

    async def close(self) -> None:
        self._closed = True
        if self._again is not None:
            self._again.cancel()
            with suppress(asyncio.CancelledError):
                await self._again
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._begin()
        waiting, self._waiting = self._waiting, []
        for due_ns in waiting:
            self.send(due_ns)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self._closed:
            self._again = asyncio.get_running_loop().create_task(self._reopen())
        for due_ns in self._abandoned():
            self.sink.answered(self, due_ns, LOST)

    async def _reopen(self) -> None:
        for _ in range(_ATTEMPTS):
            await asyncio.sleep(_RECONNECT_S)
            with suppress(OSError):
                return await self.open()
        waiting, self._waiting = self._waiting, []
        self._again = asyncio.get_running_loop().create_task(self._reopen())
        for due_ns in waiting:
            self.sink.answered(self, due_ns, LOST)
        return None

    def send(self, due_ns: int) -> None:
        if self._transport is None:
            self._waiting.append(due_ns)
        else:
            self._send(due_ns)

    def _begin(self) -> None:
        """The connection is new."""
        raise NotImplementedError

    def _send(self, due_ns: int) -> None:
        raise NotImplementedError

    def _abandoned(self) -> list[int]:
        """Requests that the connection took with it."""
        raise NotImplementedError


class HttpLane(_Connected):
    """HTTP/1.1: one request at a time."""

    def __init__(self, address: str, request: bytes, check: Check | None = None) -> None:
        super().__init__(address, 1)
        self._request = request
        self._sampled = Sampled(check)
        self._due: int | None = None
        self._body: list[bytes] = []
        self._parser: Any = None

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)

    def _send(self, due_ns: int) -> None:
        self._due = due_ns
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # ours
        except httptools.HttpParserError:
            self._transport.abort()

    # What the parser calls:

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        status, body, due = self._parser.get_status_code(), self._body, self._due
        self._body, self._due = [], None
        if due is None:  # nobody asked
            self._transport.abort()
            return
        if not self._parser.should_keep_alive():
            transport, self._transport = self._transport, None
            transport.close()
        self.sink.answered(self, due, self._sampled.outcome(body) if status == 200 else f"http {status}")

    def _abandoned(self) -> list[int]:
        due, self._due, self._body = self._due, None, []
        return [] if due is None else [due]


def http_request(address: str, path: str, body: bytes, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """A POST as one piece of bytes."""
    fields = [("host", address), ("content-length", str(len(body))), *headers]
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields), "", ""]
    return "\r\n".join(lines).encode() + body


@dataclass(slots=True)
class _Call:
    """One call on a connection: its body so far, and its status when that came."""

    due_ns: int
    body: list[bytes]
    status: bytes = b""


class GrpcLane(_Connected):
    """gRPC over HTTP/2 in clear, ``width`` calls at a time."""

    def __init__(
        self, address: str, message: bytes, width: int = 1, check: Check | None = None, sampled: float = 1.0
    ) -> None:
        super().__init__(address, width)
        self._traced = sampled
        self._framed = _PREFIX.pack(0, len(message)) + message
        self._sampled = Sampled(check)
        self._head = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", INFER_PATH.encode()),
            (b":authority", address.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", b"tidegate-loadtests"),
            (b"grpc-accept-encoding", b"identity"),
        )
        self._calls: dict[int, _Call] = {}
        self._connection = ngh2.Connection(ngh2.Role.CLIENT)
        self._receiving = self._flushing = self._leaving = False

    def _begin(self) -> None:
        self._leaving = False
        self._connection = ngh2.Connection(ngh2.Role.CLIENT)
        self._connection.initiate_connection(
            {ngh2.Setting.ENABLE_PUSH: 0, ngh2.Setting.INITIAL_WINDOW_SIZE: _STREAM_WINDOW}
        )
        self._connection.set_local_window_size(_CONNECTION_WINDOW)
        self._flush()

    def _send(self, due_ns: int) -> None:
        if self._leaving or not self._connection.can_send_request:
            self._waiting.append(due_ns)
            self._leave_when_idle()
            return
        stream = self._connection.send_request((*self._head, (b"traceparent", traceparent(self._traced).encode())))
        self._connection.send_data(stream, self._framed, end_stream=True)
        self._calls[stream] = _Call(due_ns, [])
        if not (self._receiving or self._flushing):
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        transport = self._transport
        if transport is None:
            return
        try:
            while data := self._connection.data_to_send(_PIECE_BYTES):
                transport.write(data)
        except ngh2.NGH2Error:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self._receiving = True
        try:
            self._connection.receive_data(data)
            for event in self._connection.events():
                self._handle(event)
        except ngh2.NGH2Error:
            self._transport.abort()
        finally:
            self._receiving = False
        self._flush()

    def _handle(self, event: ngh2.Event) -> None:
        match event:
            case ngh2.DataReceived() if event.stream_id in self._calls:
                self._calls[event.stream_id].body.append(event.data)
            case ngh2.ResponseReceived() | ngh2.TrailersReceived() if event.stream_id in self._calls:
                call = self._calls[event.stream_id]
                call.status = _status(event.headers) or call.status
            case ngh2.StreamClosed():
                self._ended(event.stream_id, event.error_code)
            case ngh2.GoAwayReceived() | ngh2.ConnectionClosed():
                self._leaving = True
                self._leave_when_idle()

    def _ended(self, stream_id: int, error_code: int) -> None:
        call = self._calls.pop(stream_id, None)
        if call is None:
            return
        if call.status == b"0":
            outcome = self._sampled.outcome(call.body, _PREFIX.size)
        else:
            outcome = f"grpc {call.status.decode()}" if call.status else f"reset {error_code}"
        self.sink.answered(self, call.due_ns, outcome)
        self._leave_when_idle()

    def _leave_when_idle(self) -> None:
        """A connection that takes no more calls ends with its last one; another follows it."""
        if self._leaving and not self._calls and self._transport is not None:
            transport, self._transport = self._transport, None
            transport.close()

    def _abandoned(self) -> list[int]:
        calls, self._calls = self._calls, {}
        return [call.due_ns for call in calls.values()]


def _status(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """``grpc-status``, where it is."""
    return next((value for name, value in headers if name == b"grpc-status"), b"")


class GrpcioLane:
    """grpcio's asyncio client with a channel of its own: what most Python callers use, and what it costs them."""

    sink: Sink

    def __init__(
        self, address: str, message: bytes, width: int = 1, check: Check | None = None, sampled: float = 1.0
    ) -> None:
        self.width = width
        self._traced = sampled
        self._address, self._message = address, message
        self._sampled = Sampled(check)
        self._tasks: set[asyncio.Task[None]] = set()
        self._channel: Any = None
        self._method: Any = None

    async def open(self) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        options += [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
        self._channel = grpc.aio.insecure_channel(self._address, options)
        self._method = self._channel.unary_unary(INFER_PATH)
        try:
            async with asyncio.timeout(10):
                await self._channel.channel_ready()
        except TimeoutError:
            raise ConnectionRefusedError(f"no gRPC server answers at {self._address}") from None

    def send(self, due_ns: int) -> None:
        task = asyncio.get_running_loop().create_task(self._ask(due_ns))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, due_ns: int) -> None:
        try:
            answer = await self._method(self._message, metadata=(("traceparent", traceparent(self._traced)),))
            outcome = self._sampled.outcome((answer,))
        except grpc.aio.AioRpcError as error:
            outcome = f"grpc {error.code().value[0]}"
        self.sink.answered(self, due_ns, outcome)

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()
