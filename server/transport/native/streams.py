"""gRPC calls with many messages: ModelStreamInfer, health Watch, reflection. One task for each call."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import structlog

from server.errors import Draining, TidegateError, TooManyRequests
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
#: Messages that were received and not read hold the stream's window beyond this size.
_UNREAD_BYTES: Final = 1024 * 1024


class StreamCall:
    """One call: messages in by ``read``, out by ``write``, until ``handler`` returns or raises."""

    def __init__(self, connection: Http2Connection, stream_id: int, head: GrpcHead, handler: Handler) -> None:
        self.connection = connection
        self.head = head
        self.permit: Permit | None = None
        self._id = stream_id
        self._deframer = wire.Deframer(head.coding, connection.server.limits.max_body_bytes)
        self._messages: deque[bytes] = deque()
        self._unread = 0
        self._came = asyncio.Event()
        self._ended = False  # the peer has said everything, or the server ends
        self._headed = False
        self._seen = connection.server.now
        self._error: TidegateError | None = None
        self._log: Any = structlog.get_logger("tidegate.grpc")
        self._task = connection.loop.create_task(self._run(handler))

    # --- for the connection ----------------------------------------------------------------------------------

    def data(self, data: bytes, end: bool) -> None:
        self._seen = self.connection.server.now
        try:
            for message in self._deframer.feed(data):
                self._messages.append(message)
                self._unread += len(message)
        except TidegateError as error:
            self._error, end = error, True
        self._ended = self._ended or end
        self._came.set()
        if not self._deframer.partial and not self._messages:
            self.connection.release(self._id)

    def gone(self) -> None:
        self._task.cancel()

    def fail(self, error: Exception) -> None:
        self._task.cancel()
        self._finish(self._told(error))

    def full(self) -> bool:
        return self._unread > _UNREAD_BYTES

    def waiting_since(self) -> float:
        return self._seen if self._deframer.partial and not self._ended else math.inf

    def give_up(self) -> None:
        self._error = RequestTimeout("the rest of a message did not arrive in time")
        self._ended = True
        self._came.set()

    def drain(self) -> None:
        self._ended = True
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
        message = self._messages.popleft()
        was_full = self.full()
        self._unread -= len(message)
        if not self._messages and not self._deframer.partial:
            self.connection.release(self._id)
        elif was_full and not self.full():
            self.connection.let_go()
        return message

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
            if self.connection.server.draining:
                error = Draining("the server is shutting down")
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
        if not self._ended:
            connection.end_early(self._id)
        connection.done(self._id)


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
        server.port, permit, call.read, call.write, max_in_flight=server.http2.max_in_flight_per_stream
    )
    await session.run()


def watch(health: HealthRpcs) -> Handler:
    """``Health.Watch``."""

    async def handle(call: StreamCall) -> None:
        async for status in health.watch(await call.read() or b""):
            await call.write(status)

    return handle


def reflect(answers: Reflection) -> Handler:
    """``ServerReflectionInfo``."""

    async def handle(call: StreamCall) -> None:
        while (raw := await call.read()) is not None:
            await call.write(answers.answer(raw))

    return handle
