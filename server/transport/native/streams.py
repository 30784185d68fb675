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
from server.transport.rpc.unary import MAX_BYTES
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
    """One call: messages in by ``read``, out by ``write``, until ``handler`` returns or raises.

    With a permit, all that came and is not answered counts as bytes that the permit holds: a message from its first
    byte on, what was not read, and what ``hold`` says. Where there is no room for more, the stream ends so.
    """

    def __init__(self, connection: Http2Connection, stream_id: int, head: GrpcHead, handler: Handler) -> None:
        self.connection = connection
        self.head = head
        self.permit: Permit | None = None
        self._id = stream_id
        self._limit = connection.server.limits.max_body_bytes if handler is infer else MAX_BYTES
        self._deframer = wire.Deframer(self._limit)
        self._messages: deque[tuple[bool, bytes]] = deque()  # (compressed, payload)
        self._unread = 0
        self._working = 0  # bytes of messages that were read and are not answered
        self._came = asyncio.Event()
        self._peer_ended = False  # the peer has said everything
        self._ended = False  # nothing more is read: that, or an error, or the server ends
        self._cut = False  # by the server's end
        self._draining = False
        self._headed = False
        self._seen = self._began = connection.server.now  # more of a message, and the message
        self._error: TidegateError | None = None
        self._log: Any = structlog.get_logger("tidegate.grpc")
        self._task = connection.loop.create_task(self._run(handler))

    # --- for the connection ----------------------------------------------------------------------------------

    def data(self, data: bytes, end: bool) -> None:
        self._peer_ended = end
        if self._ended:
            self._drop_rest()
            return
        deframer = self._deframer
        self._seen = self.connection.server.now
        if not deframer.size:
            self._began = self._seen
        try:
            self._take(deframer.feed(data))
        except TidegateError as error:
            self._stop(error)
            return
        if deframer.error is not None:
            self._stop(deframer.error)
        elif end:
            self._stop(InvalidArgument("the call ended before its message was complete") if deframer.size else None)
        else:
            self._came.set()

    def _take(self, messages: list[tuple[bool, bytes]]) -> None:
        size = sum([len(payload) + _OVERHEAD_BYTES for _, payload in messages])
        self._weigh(size)
        if messages:
            self._began = self._seen
            self._messages += messages
            self._unread += size

    def _weigh(self, more: int) -> None:
        if self.permit is not None:
            self.permit.hold(self._deframer.size + self._unread + self._working + more)

    def _stop(self, error: TidegateError | None) -> None:
        """Nothing more is read than what came whole; then ``error`` is raised."""
        self._error, self._ended = error, True
        self._deframer.clear()
        self._drop_rest()
        self._came.set()

    def _drop_rest(self) -> None:
        """What is no whole message holds nobody up."""
        self.connection.kept(self._id, self._unread - len(self._messages) * (_OVERHEAD_BYTES - wire.PREFIX_BYTES))

    def gone(self) -> None:
        self._task.cancel()

    def fail(self, error: Exception) -> None:
        self._task.cancel()
        self._finish(self._told(error))

    def full(self) -> bool:
        return self._unread > _UNREAD_BYTES

    def unread(self) -> bool:
        return self._unread > 0

    def overdue(self, now: float) -> bool:
        if self._ended or not self._deframer.size or self.full():
            return False
        settings = self.connection.server.settings
        return now - self._seen > settings.body_idle_s or now - self._began > settings.body_total_s

    def give_up(self) -> None:
        self._stop(RequestTimeout("the rest of a message did not arrive in time"))

    def drain(self) -> None:
        self._draining = True
        if not self._ended:
            self._cut = True
            self._stop(None)
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
        inflate = partial(wire.inflated, payload, self.head.coding, self._limit)
        return bytes(await self.connection.server.offload.run(inflate))

    def admitted(self, permit: Permit) -> None:
        """The call has a permit from now on, and gives it back when it is over. Raises TidegateError, see ``hold``."""
        self.permit = permit
        self._weigh(0)

    def hold(self, size: int) -> None:
        """Messages of so many bytes were read and are not answered. Raises TidegateError where there is no room."""
        before, self._working = self._working, size
        try:
            self._weigh(0)
        except TidegateError:
            self._working = before
            raise

    async def until_drained(self) -> None:
        """Until the server ends, and its GOAWAY is out."""
        while not self._draining:
            self._came.clear()
            await self._came.wait()

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
            connection.end_early(self._id, bare=not self._headed)
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
    permit = server.port.admit(
        RequestHead("grpc", "", "", head.metadata, head.received_ns, head.deadline_ns, None, connection.peer)
    )
    call.admitted(permit)
    call.send_head(tuple(decision_headers(permit.tidegate_id, None, permit.traceresponse)))
    session = StreamSession(
        server.port,
        permit,
        call.read,
        call.write,
        max_in_flight=server.http2.max_in_flight_per_stream,
        hold=call.hold,
        turns=server.infer.turns,
    )
    await session.run()


def watch(health: HealthRpcs) -> Handler:
    """``Health.Watch``."""

    async def handle(call: StreamCall) -> None:
        async for status in health.watch(await call.read() or b""):
            await call.write(status)
        # Only the server's end ends the states to tell. The last of them is read before a status that is an error: some
        # clients drop with that what they had not read.
        await call.until_drained()
        raise _draining()

    return handle


def reflect(answers: Reflection) -> Handler:
    """``ServerReflectionInfo``."""

    async def handle(call: StreamCall) -> None:
        while (raw := await call.read()) is not None:
            await call.write(answers.answer(raw))

    return handle
