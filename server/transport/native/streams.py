"""gRPC calls with many messages: ModelStreamInfer, health Watch, reflection. One task for each call."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import structlog

from server.errors import Draining, InvalidArgument, TidegateError, TooManyRequests
from server.transport.answers import decision_headers
from server.transport.faults import Internal, RequestTimeout, new_id
from server.transport.native import wire
from server.transport.native.session import Header
from server.transport.native.unary import GrpcHead
from server.transport.rpc.health import HealthRpcs
from server.transport.rpc.reflection import Reflection
from server.transport.rpc.session import StreamSession
from server.transport.status import safe_text
from server.types import Permit, RequestHead

if TYPE_CHECKING:
    from server.transport.native.h2 import Http2Connection

_HEAD: Final = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_OK: Final = ((b"grpc-status", b"0"),)
#: Messages that were received and not read hold the stream's window beyond this size; each counts for so much more
#: than its bytes, since the smallest have none.
_UNREAD_BYTES: Final = 1024 * 1024
_OVERHEAD_BYTES: Final = 64


class StreamCall:
    """One call: messages in by ``read``, out by ``write``, until ``handler`` returns or raises."""

    def __init__(self, connection: Http2Connection, stream_id: int, head: GrpcHead, handler: Handler) -> None:
        self.connection = connection
        self.head = head
        self.permit: Permit | None = None
        self._id = stream_id
        self._deframer = wire.Deframer(connection.server.limits.max_body_bytes)
        self._messages: deque[tuple[bool, bytes]] = deque()  # (compressed, payload)
        self._unread = 0
        self._came = asyncio.Event()
        self._peer_ended = False  # the peer has said everything
        self._ended = False  # nothing more is read: that, or an error, or the server ends
        self._cut = False  # by the server's end
        self._headed = False
        self._seen = self._began = connection.server.now  # more of a message, and the message
        self._error: TidegateError | None = None
        self._log: Any = structlog.get_logger("tidegate.grpc")
        self._task = connection.loop.create_task(self._run(handler))

    # --- for the connection ----------------------------------------------------------------------------------

    def data(self, data: bytes, end: bool) -> None:
        self._peer_ended = end
        if self._ended:
            return
        self._seen = self.connection.server.now
        if not self._deframer.partial:
            self._began = self._seen
        try:
            self._take(self._deframer.feed(data))
            if end and self._deframer.partial:
                raise InvalidArgument("the call ended before its message was complete")
        except TidegateError as error:
            self._error, self._ended = error, True
        self._ended = self._ended or end
        self._came.set()

    def _take(self, messages: list[tuple[bool, bytes]]) -> None:
        if messages:
            self._began = self._seen
            self._messages += messages
            self._unread += sum([len(payload) + _OVERHEAD_BYTES for _, payload in messages])

    def gone(self) -> None:
        self._task.cancel()

    def fail(self, error: Exception) -> None:
        self._task.cancel()
        self._finish(self._told(error))

    def full(self) -> bool:
        return self._unread > _UNREAD_BYTES

    def overdue(self, now: float) -> bool:
        if self._ended or not self._deframer.partial or self.full():
            return False
        settings = self.connection.server.settings
        return now - self._seen > settings.body_idle_s or now - self._began > settings.body_total_s

    def give_up(self) -> None:
        self._error = RequestTimeout("the rest of a message did not arrive in time")
        self._ended = True
        self._came.set()

    def drain(self) -> None:
        if not self._ended:
            self._cut = self._ended = True
            self._came.set()

    # --- for the handler -------------------------------------------------------------------------------------

    async def read(self) -> bytes | None:
        """The next message; None when no more come. Raises TidegateError for what is no message."""
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            self._came.clear()
            await self._came.wait()
        compressed, payload = self._messages.popleft()
        self._unread -= len(payload) + _OVERHEAD_BYTES
        self.connection.used(self._id, wire.PREFIX_BYTES + len(payload))
        if not compressed:
            return payload
        server = self.connection.server
        limit = server.limits.max_body_bytes
        return bytes(await server.offload.run(partial(wire.inflated, payload, self.head.coding, limit)))

    def send_head(self, headers: tuple[Header, ...] = ()) -> None:
        """Initial metadata, once; without this the first message sends it."""
        if not self._headed:
            self._headed = True
            self.connection.session.head(self._id, (*_HEAD, *headers))
            self.connection.flush_soon()

    async def write(self, message: bytes) -> None:
        """Send one message; waits while the peer takes too little of what was sent before."""
        self.send_head()
        framed = wire.framed(message)
        if self.connection.session.body(self._id, framed):
            self.connection.sent(len(framed))
        await self.connection.until_taken(self._id)

    # --- the call --------------------------------------------------------------------------------------------

    async def _run(self, handler: Handler) -> None:
        error: TidegateError | None = None
        try:
            await handler(self)
            if self._cut:
                raise _draining()
        except TidegateError as told:
            error = told
        except Exception as unexpected:  # noqa: BLE001 - the boundary of one stream: logged, no text to the caller
            error = self._told(unexpected)
        finally:
            if self.permit is not None:
                self.permit.release()
        self._finish(error)

    def _told(self, unexpected: Exception) -> TidegateError:
        tidegate_id = new_id() if self.permit is None else self.permit.tidegate_id
        self._log.error("request_failed", id=tidegate_id, protocol="grpc", exc_info=unexpected)
        return Internal(tidegate_id)

    def _finish(self, error: TidegateError | None) -> None:
        connection, session = self.connection, self.connection.session
        trailers = _OK if error is None else _status(connection, error)
        if not self._headed:
            session.head(self._id, (*_HEAD, *trailers), end=True)
        else:
            session.trailers(self._id, trailers)
        if not self._peer_ended:
            connection.end_early(self._id)
        connection.done(self._id)


def _draining() -> Draining:
    return Draining("the server is shutting down")


Handler: TypeAlias = Callable[[StreamCall], Awaitable[None]]


def _status(connection: Http2Connection, error: TidegateError) -> tuple[Header, ...]:
    statuses = connection.server.statuses
    trailers = (
        (b"grpc-status", b"%d" % statuses.of(error).grpc),
        (b"grpc-message", wire.status_text(safe_text(error.message))),
    )
    seconds = statuses.retry_after(error)
    return trailers if seconds is None else (*trailers, (b"retry-after", b"%d" % seconds))


async def infer(call: StreamCall) -> None:
    """``ModelStreamInfer``: many requests under one permit."""
    connection, head = call.connection, call.head
    server = connection.server
    if connection.overfull():
        raise TooManyRequests("answers on this connection wait for their reader: take them first")
    permit = call.permit = server.port.admit(
        RequestHead("grpc", "", "", head.metadata, head.received_ns, head.deadline_ns, None, connection.peer)
    )
    call.send_head(tuple(decision_headers(permit.tidegate_id, None, getattr(permit, "traceresponse", None))))
    session = StreamSession(
        server.port,
        permit,
        call.read,
        call.write,
        max_in_flight=server.http2.max_in_flight_per_stream,
        turns=server.infer.turns,
    )
    await session.run()


def watch(health: HealthRpcs) -> Handler:
    """``Health.Watch``."""

    async def handle(call: StreamCall) -> None:
        async for status in health.watch(await call.read() or b""):
            await call.write(status)
        raise _draining()  # only that ends the states to tell

    return handle


def reflect(answers: Reflection) -> Handler:
    """``ServerReflectionInfo``."""

    async def handle(call: StreamCall) -> None:
        while (raw := await call.read()) is not None:
            await call.write(answers.answer(raw))

    return handle
