"""Unary gRPC calls on a connection: inference without a task, every other method in one."""

from __future__ import annotations

import asyncio
from functools import partial
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, Final

import structlog

from server.codec import pieces, protobuf
from server.errors import DeadlineExceeded, InvalidArgument, TidegateError, TooManyRequests, Unimplemented
from server.transport.answers import decision_headers, header_value
from server.transport.bridge import Owed, telling
from server.transport.faults import Internal, RequestTimeout, check_version, new_id
from server.transport.http_infer import ANSWERED_LATE, DECODED_LATE, by_deadline
from server.transport.native import wire
from server.transport.native.metadata import Metadata
from server.transport.native.session import Header
from server.transport.rpc.unary import Method, check_message_size
from server.transport.status import safe_text
from server.types import WRITING, Decision, InferenceRequest, InferenceResponse, Permit, Reply, RequestHead, Ticket

if TYPE_CHECKING:
    from server.transport.native.h2 import Http2Connection

_OK: Final[tuple[Header, ...]] = ((b"grpc-status", b"0"),)
_HEAD: Final[tuple[Header, ...]] = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_SMALL_BODY_BYTES: Final[int] = pieces.SMALL_BODY_BYTES
_INCOMPLETE: Final = "the call ended before its message was complete"

_log: Any = structlog.get_logger("tidegate.grpc")


class GrpcHead:
    """What the head of a gRPC call says. Raises TidegateError for what cannot be served."""

    __slots__ = ("coding", "deadline_ns", "metadata", "received_ns")

    def __init__(self, metadata: Metadata) -> None:
        self.received_ns = monotonic_ns()
        self.metadata = metadata
        self.deadline_ns = 0
        self.coding = ""
        timeout = metadata.timeout
        if timeout is not None:
            self.deadline_ns = self.received_ns + wire.timeout_ns(timeout)
        if metadata.encoded:
            self.coding = metadata["grpc-encoding"]
            wire.check_coding(self.coding)


def _decided(decision: Decision | None) -> tuple[Header, ...]:
    """The head of an answer up to what differs from request to request."""
    if decision is None:
        return _HEAD
    if not decision.metadata:
        decision.metadata = (*_HEAD, *decision_headers("", decision, None)[1:])
    return decision.metadata


class UnaryCall:
    """A call that has one message, and an answer of one. What it is for, ``_start`` says."""

    __slots__ = (
        "_began",
        "_connection",
        "_declared",
        "_ended",
        "_head",
        "_id",
        "_parts",
        "_seen",
        "_size",
        "_working",
    )

    def __init__(self, connection: Http2Connection, stream_id: int, head: GrpcHead) -> None:
        self._connection = connection
        self._id = stream_id
        self._head = head
        self._parts: list[bytes] = []
        self._size = 0
        self._declared = -1
        self._began = self._seen = connection.server.now
        self._ended = False  # the peer has said everything
        self._working: asyncio.Task[None] | None = None  # on its message or its answer

    # --- the message -----------------------------------------------------------------------------------------

    def data(self, data: bytes, end: bool) -> None:
        self._ended = end
        try:
            if self._declared < 0 and not self._parts and len(data) >= wire.PREFIX_BYTES:
                if end and data[0] == 0:
                    self._whole(data)
                    return
                self._begin(data)
            elif data:
                self._add(data)
            if end:
                self._complete()
        except TidegateError as error:
            self._fail(error)

    def _whole(self, data: bytes) -> None:
        """All of an uncompressed message in one piece, as small ones come: nothing needs to be gathered."""
        size = wire.declared(data, self._connection.server.limits.max_body_bytes)
        self._admit(size)
        if size != len(data) - wire.PREFIX_BYTES:
            self._declared, self._size = size, len(data)
            self._check_size()
            raise InvalidArgument(_INCOMPLETE)
        self._start(data[wire.PREFIX_BYTES :])

    def _begin(self, data: bytes) -> None:
        """The first piece, with the whole prefix in it as it nearly always is."""
        self._declared = wire.declared(data, self._connection.server.limits.max_body_bytes)
        self._admit(self._declared)
        self._size = len(data)
        self._parts.append(data)
        self._check_size()

    def _add(self, data: bytes) -> None:
        self._seen = self._connection.server.now
        self._size += len(data)
        self._parts.append(data)
        if self._declared < 0 and self._size >= wire.PREFIX_BYTES:
            whole = b"".join(self._parts)
            self._parts.clear()
            self._begin(whole)
        else:
            self._check_size()

    def _check_size(self) -> None:
        if 0 <= self._declared < self._size - wire.PREFIX_BYTES:
            raise InvalidArgument(
                f"a unary call takes one message: {self._size - wire.PREFIX_BYTES} bytes came, "
                f"the message has {self._declared}"
            )

    def _complete(self) -> None:
        if self._declared < 0 or self._declared != self._size - wire.PREFIX_BYTES:
            raise InvalidArgument(_INCOMPLETE if self._size else "a unary call takes one message, got none")
        parts, self._parts = self._parts, []
        compressed = parts[0][0]
        parts[0] = parts[0][wire.PREFIX_BYTES :]
        message = b"".join(parts) if len(parts) > 1 else parts[0]
        if compressed:
            self._working = self._connection.loop.create_task(self._unpack(message))
        else:
            self._start(message)

    async def _unpack(self, payload: bytes) -> None:
        """A compressed message: a small one may inflate a thousandfold, so that leaves the loop."""
        server = self._connection.server
        try:
            message = await server.offload.run(
                partial(wire.inflated, payload, self._head.coding, server.limits.max_body_bytes)
            )
            self._hold(len(message))
            self._start(bytes(message))
        except TidegateError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the boundary of one call
            self.fail(error)

    def _admit(self, size: int) -> None:
        """Take or refuse before the message is gathered."""

    def _hold(self, size: int) -> None:
        """It was packed, and has so many bytes."""

    def _start(self, message: bytes) -> None:
        """All of it is there, and not packed any more."""

    # --- the end ---------------------------------------------------------------------------------------------

    def _fail(self, error: TidegateError) -> None:
        """Answer with a status, once."""
        connection, session = self._connection, self._connection.session
        statuses = connection.server.statuses
        trailers: list[Header] = [(b"grpc-status", b"%d" % statuses.of(error).grpc)]
        trailers.append((b"grpc-message", wire.status_text(safe_text(error.message))))
        seconds = statuses.retry_after(error)
        if seconds is not None:
            trailers.append((b"retry-after", b"%d" % seconds))
        head = self._answer_head()
        if self._ended:
            session.head(self._id, head) and session.trailers(self._id, trailers)
        else:
            session.head(self._id, (*head, *trailers), end=True)
            connection.end_early(self._id, bare=True)
        self._over()
        connection.done(self._id)

    def _answer_head(self) -> tuple[Header, ...]:
        return _HEAD

    def _over(self) -> None:
        """Give back whatever the call holds."""

    def fail(self, error: Exception) -> None:
        tidegate_id = self._tidegate_id()
        _log.error("request_failed", id=tidegate_id, protocol="grpc", exc_info=error)
        self._fail(Internal(tidegate_id))

    def _tidegate_id(self) -> str:
        return new_id()

    def gone(self) -> None:
        if self._working is not None:
            self._working.cancel()
        self._over()

    def full(self) -> bool:
        return False

    def unread(self) -> bool:
        return False

    def overdue(self, now: float) -> bool:
        if self._ended:
            return False
        settings = self._connection.server.settings
        return now - self._seen > settings.body_idle_s or now - self._began > settings.body_total_s or self._late()

    def _late(self) -> bool:
        return 0 < self._head.deadline_ns <= monotonic_ns()

    def give_up(self) -> None:
        self._fail(
            DeadlineExceeded("the deadline passed before the message was complete")
            if self._late()
            else RequestTimeout("the message did not arrive in time")
        )

    def drain(self) -> None:
        """A unary call ends by itself."""


class InferCall(UnaryCall, Reply):
    """``ModelInfer``: from the last byte of its message to its answer there is no task. It is its own ``Reply``."""

    __slots__ = ("_answers", "_decision", "_handed", "_permit", "_response", "_ticket")

    def __init__(self, connection: Http2Connection, stream_id: int, head: GrpcHead) -> None:
        super().__init__(connection, stream_id, head)
        self._permit: Permit | None = None
        self._ticket: Ticket | None = None
        self._decision: Decision | None = None
        self._response: InferenceResponse | None = None
        self._answers = 0
        self._handed = False  # to the port, which counts it from then on

    def _admit(self, size: int) -> None:
        connection, head = self._connection, self._head
        if connection.overfull():
            raise TooManyRequests("answers on this connection wait for their reader: take them first")
        self._permit = connection.server.port.admit(
            RequestHead(
                "grpc", "", "", head.metadata, head.received_ns, head.deadline_ns, size, connection.peer,
                head.metadata.traceparent,
            )
        )  # fmt: skip

    def _hold(self, size: int) -> None:
        if self._permit is not None:
            self._permit.hold(size)

    def _start(self, message: bytes) -> None:
        server, permit = self._connection.server, self._permit
        if permit is None:  # an empty message is admitted like any other
            raise Internal(new_id())
        large = len(message) > _SMALL_BODY_BYTES
        request = protobuf.decode_infer(message, server.limits, whole=not large)
        if request.version:
            check_version(request.version)
        self._connection.windows.forget(self._id)
        if large and pieces.unfinished(request):
            self._working = self._connection.loop.create_task(self._finish_later(permit, request))
        else:
            self._submit(permit, request)

    def _submit(self, permit: Permit, request: InferenceRequest) -> None:
        self._handed = True
        ticket = self._connection.server.port.handle(permit, request, self)
        if self._permit is not None:
            self._ticket = ticket

    async def _finish_later(self, permit: Permit, request: InferenceRequest) -> None:
        """Contents that take long to read are read by turns with other requests."""
        work = self._connection.server.infer.turns.take(pieces.finish(request))
        try:
            await by_deadline(work, self._head.deadline_ns, DECODED_LATE)
            self._submit(permit, request)
        except TidegateError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the boundary of one call
            self.fail(error)

    def _fail(self, error: TidegateError) -> None:
        if not self._handed:
            self._connection.server.port.refuse(error)
        super()._fail(error)

    # Reply:

    def message(self, response: InferenceResponse, decision: Decision) -> None:
        self._answers += 1
        self._response, self._decision = response, decision

    def finish(self, error: TidegateError | None) -> str | None:
        if error is not None:
            self._fail(error)  # raised, it would be held by its own traceback, and with it what the callers hold
            return None
        try:
            return self._answer()
        except TidegateError as refusal:
            self._fail(refusal)
            return refusal.code
        except Exception as failure:  # noqa: BLE001 - the boundary of one request: logged here, no text to the caller
            self.fail(failure)
            return Internal.code

    def _answer(self) -> str | None:
        if self._answers > 1:
            raise Unimplemented("this model gave several answers to one request: call it with ModelStreamInfer")
        response = self._response
        if response is None:
            raise Internal(self._tidegate_id())
        if pieces.has_many(response):
            owed = Owed(self._connection.owe)
            owed.owe(pieces.wire_bytes(response.outputs))
            self._working = self._connection.loop.create_task(self._answer_later(response, owed))
            self._working.add_done_callback(owed.settle)  # cancelled before it begins, it says nothing itself
            return WRITING
        self._send(protobuf.framed_infer(response))
        return None

    async def _answer_later(self, response: InferenceResponse, owed: Owed) -> None:
        """Contents that take long to write are written by turns with other requests."""
        work = self._connection.server.infer.turns.take(pieces.wired(response))
        try:
            with telling(self._ticket):
                body = protobuf.framed_infer(await by_deadline(work, self._head.deadline_ns, ANSWERED_LATE))
            owed.settle()  # from here on it is counted as what it is
            self._send(body)
        except TidegateError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the boundary of one call
            self.fail(error)

    def _send(self, body: bytes) -> None:
        connection = self._connection
        head = self._answer_head()
        self._over()
        connection.done(self._id, len(body) if connection.session.unary(self._id, head, body, _OK) else 0)

    def _tidegate_id(self) -> str:
        return new_id() if self._permit is None else self._permit.tidegate_id

    def _answer_head(self) -> tuple[Header, ...]:
        permit, decision = self._permit, self._decision
        if permit is None:
            return (*_HEAD, (b"x-tidegate-id", new_id().encode()))
        trace = permit.traceresponse
        head = _decided(decision)
        if trace:
            head += ((b"traceresponse", header_value(trace)),)
        return head + ((b"x-tidegate-id", permit.tidegate_id.encode()),)  # noqa: RUF005 - one copy, not two

    def _over(self) -> None:
        ticket, permit = self._ticket, self._permit
        self._ticket = self._permit = self._response = None
        if ticket is not None:
            ticket.cancel()
        if permit is not None:
            permit.release()


class MethodCall(UnaryCall):
    """Any other unary method, as a task: they are rare, and some of them wait."""

    __slots__ = ("_method", "_task")

    def __init__(self, connection: Http2Connection, stream_id: int, head: GrpcHead, method: Method) -> None:
        super().__init__(connection, stream_id, head)
        self._method = method
        self._task: asyncio.Task[None] | None = None

    def _admit(self, size: int) -> None:
        check_message_size(size)

    def _hold(self, size: int) -> None:
        check_message_size(size)

    def _start(self, message: bytes) -> None:
        self._connection.windows.forget(self._id)
        self._task = self._connection.loop.create_task(self._run(message))

    async def _run(self, message: bytes) -> None:
        try:
            answer = wire.framed(await self._method(message))
        except TidegateError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the boundary of one call: logged there, no text to the caller
            self.fail(error)
        else:
            if self._connection.session.unary(self._id, _HEAD, answer, _OK):
                self._connection.sent(len(answer))
            self._connection.done(self._id)

    def _over(self) -> None:
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()


class UnknownCall(UnaryCall):
    """A method that nobody serves, or a head that cannot be served: answered at once, whatever follows."""

    __slots__ = ()

    def refuse(self, error: TidegateError, *, ended: bool) -> None:
        self._ended = ended
        self._fail(error)
