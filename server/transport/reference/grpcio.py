"""The reference gRPC listener: grpc.aio with generic handlers that take and give bytes.

Messages are parsed inside the handlers: grpc.aio would answer bytes that are no protobuf with UNKNOWN and the name of
an exception class. Names of models stand in the message and not in the headers, so heads carry an empty model here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc
import structlog

from server.codec import pieces, protobuf
from server.codec.process.steps import Turns
from server.errors import Cancelled, TidegateError
from server.transport.answers import decision_headers
from server.transport.bridge import SingleReply, infer, telling
from server.transport.faults import Internal, check_version, new_id
from server.transport.port import Services
from server.transport.rpc import reflection
from server.transport.rpc.feedback import FeedbackRpcs
from server.transport.rpc.health import WATCH_PATH, HealthRpcs
from server.transport.rpc.session import StreamSession
from server.transport.rpc.unary import SERVICE, InferenceRpcs, Method, check_message_size
from server.transport.status import StatusTable, safe_text
from server.types import Decision, InferenceRequest, Permit, Port, RequestHead

_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_COMPRESSION: Final = {
    "none": grpc.Compression.NoCompression,
    "deflate": grpc.Compression.Deflate,
    "gzip": grpc.Compression.Gzip,
}
_Context: TypeAlias = Any  # grpc.aio.ServicerContext, which is generic over messages that we do not have
_Unary: TypeAlias = Callable[[bytes, _Context], Awaitable[bytes]]
#: Code, text and trailing metadata.
_Refusal: TypeAlias = tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]


@dataclass(slots=True, frozen=True)
class GrpcSettings:
    """Bounds of the gRPC listener. Received messages are bounded by ``RequestLimits.max_body_bytes``."""

    #: An answer may be larger than any request; this is the most that clients can take.
    max_send_bytes: int = 2**31 - 1
    max_streams_per_connection: int = 100
    max_connections: int = 10_000
    #: From accept to the end of the client's handshake, TLS and HTTP/2.
    handshake_s: float = 10.0
    max_in_flight_per_stream: int = 64
    #: When a connection was silent this long it is pinged, and closed when the ping is not answered in time.
    keepalive_s: float = 60.0
    keepalive_timeout_s: float = 20.0
    #: Age at which a connection is asked to end, so that load balancers can spread clients anew; 0: never.
    max_age_s: float = 0.0
    #: Clients may ping this often, calls or not.
    min_client_ping_s: float = 10.0
    #: Of answers: none, deflate or gzip. Requests may always be compressed.
    compression: str = "none"


class _Call:
    """One inference call or stream: what is known of it for its initial metadata."""

    __slots__ = ("_own_id", "_sent", "context", "decision", "handed", "permit")

    def __init__(self, context: _Context) -> None:
        self._own_id = ""
        self._sent = False
        self.context = context
        self.permit: Permit | None = None
        self.decision: Decision | None = None
        self.handed = False  # to the port, which counts it from then on

    @property
    def id(self) -> str:
        """The gateway's, or one of our own for what was refused before the gateway gave one."""
        if self.permit is not None:
            return self.permit.tidegate_id
        self._own_id = self._own_id or new_id()
        return self._own_id

    async def send_headers(self) -> None:
        """Initial metadata of the same names as the HTTP headers; only once."""
        if self._sent:
            return
        self._sent = True
        headers = decision_headers(self.id, self.decision, None if self.permit is None else self.permit.traceresponse)
        await self.context.send_initial_metadata(tuple((name.decode(), value.decode()) for name, value in headers))

    def release(self) -> None:
        if self.permit is not None:
            self.permit.release()


#: A drain: at most this long are answers held, this long without a call is quiet, and this long has the GOAWAY.
_HOLD_S: Final = 0.5
_QUIET_S: Final = 0.03
_GOAWAY_S: Final = 0.05


class _Router(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        self._handlers = handlers

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(details.method)


class GrpcServer:
    """The listener: ``start``, then ``drain``.

    ``turns``: of messages that take long to read or write, here and wherever else they were given to.
    """

    def __init__(
        self,
        port: Port,
        services: Services,
        *,
        settings: GrpcSettings | None = None,
        statuses: StatusTable | None = None,
        credentials: grpc.ServerCredentials | None = None,
        turns: Turns | None = None,
    ) -> None:
        self._port = port
        self._settings = settings or GrpcSettings()
        self._statuses = statuses or StatusTable()
        self._credentials = credentials
        self._turns = turns or Turns()
        self._health = HealthRpcs(services)
        feedback = FeedbackRpcs(services)
        self._methods = {**InferenceRpcs(services).methods, **self._health.methods, **feedback.methods}
        self._draining = False
        self._ending = False  # streams are read no further
        self._goaway_sent = asyncio.Event()
        self._arrived = 0
        self._reads: set[asyncio.Future[Any]] = set()
        self._server: Any = None
        self._log = structlog.get_logger("tidegate.grpc")

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; port 0 picks a free one. Returns the address really bound; raises OSError when that fails."""
        server = grpc.aio.server(options=self._options(), compression=_COMPRESSION[self._settings.compression])
        server.add_generic_rpc_handlers((_Router(self._handlers()),))
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._credentials is None:
                bound = server.add_insecure_port(address)
            else:
                bound = server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from None
        await server.start()
        self._server = server
        return host, bound

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new calls, end streams after their answers, finish the rest. False when calls had to be cut.

        gRPC's core cancels calls that reach it between its shutdown and the client's reading of the GOAWAY. So answers
        are held back first: callers that wait for one send nothing new. Once no call has come for a moment the server
        is stopped, its GOAWAY goes out, and the answers follow behind it on the wire.
        """
        self._draining = True
        self._health.close()
        started = time.monotonic()
        await self._until_quiet(min(_HOLD_S, timeout_s))
        self._ending = True
        for read in list(self._reads):
            read.cancel()
        if self._server is not None:
            stopping = asyncio.ensure_future(self._server.stop(max(0.0, timeout_s - (time.monotonic() - started))))
            await asyncio.wait((stopping,), timeout=_GOAWAY_S)
            self._goaway_sent.set()
            await stopping
        return time.monotonic() - started < timeout_s

    async def _until_quiet(self, most_s: float) -> None:
        """Until no call or message has arrived for a moment, at most ``most_s``."""
        until = time.monotonic() + most_s
        seen = -1
        while self._arrived != seen and time.monotonic() < until:
            seen = self._arrived
            await asyncio.sleep(_QUIET_S)

    async def _hold(self, context: _Context) -> None:
        """While the server drains, an answer waits until the GOAWAY is ahead of it, or half of its time is gone."""
        if self._draining and not self._goaway_sent.is_set():
            remaining_s = context.time_remaining()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._goaway_sent.wait(), None if remaining_s is None else remaining_s / 2)

    def _options(self) -> list[tuple[str, int]]:
        limits, settings = self._port.limits, self._settings
        age = [("grpc.max_connection_age_ms", round(settings.max_age_s * 1000))] if settings.max_age_s else []
        return [
            *age,
            ("grpc.max_receive_message_length", limits.max_body_bytes),
            ("grpc.max_send_message_length", settings.max_send_bytes),
            ("grpc.max_metadata_size", limits.max_header_bytes),
            ("grpc.absolute_max_metadata_size", limits.max_header_bytes),
            ("grpc.max_concurrent_streams", settings.max_streams_per_connection),
            # Its guard counts streams that have ended but are not freed yet, and then resets honest callers' streams.
            ("grpc.http.overload_protection", 0),
            ("grpc.max_allowed_incoming_connections", settings.max_connections),
            ("grpc.server_handshake_timeout_ms", round(settings.handshake_s * 1000)),
            ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(settings.keepalive_timeout_s * 1000)),
            # The core's timer for the option above never starts (1.85): that of any ping, a minute if unsaid, holds.
            ("grpc.http2.ping_timeout_ms", round(settings.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", round(settings.min_client_ping_s * 1000)),
            ("grpc.so_reuseport", 0),
        ]

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        handlers = {path: grpc.unary_unary_rpc_method_handler(self._plain(m)) for path, m in self._methods.items()}
        handlers[f"/{SERVICE}/ModelInfer"] = grpc.unary_unary_rpc_method_handler(self._infer)
        handlers[f"/{SERVICE}/ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream_infer)
        handlers[WATCH_PATH] = grpc.unary_stream_rpc_method_handler(self._watch)
        for path, answers in ((reflection.V1_PATH, reflection.v1()), (reflection.V1ALPHA_PATH, reflection.v1alpha())):
            handlers[path] = grpc.stream_stream_rpc_method_handler(self._reflect(answers))
        return handlers

    # --- handlers ---------------------------------------------------------------------------------------------

    def _plain(self, method: Method) -> _Unary:
        async def handle(raw: bytes, context: _Context) -> bytes:
            self._arrived += 1
            try:
                check_message_size(len(raw))
                answer = await method(raw)
                await self._hold(context)
                return answer
            except Exception as error:  # noqa: BLE001 - the boundary of one call
                return await self._abort(context, self._told(error, new_id()))

        return handle

    async def _infer(self, raw: bytes, context: _Context) -> bytes:
        self._arrived += 1
        call = _Call(context)
        try:
            try:
                answer = await self._answer(call, raw)
                await self._hold(context)
                await call.send_headers()
                return answer
            except Exception as error:  # noqa: BLE001 - the boundary of one request
                refusal = self._refusal(self._refused(call, error))
            # What ``abort`` raises waits for the collector, with its frames: nothing of the request is in them by now.
            del raw
            await call.send_headers()
            return await self._end(context, refusal)
        finally:
            call.release()

    def _refused(self, call: _Call, error: Exception) -> TidegateError:
        told = self._told(error, call.id)
        if not call.handed:
            self._port.refuse(told)
        return told

    async def _answer(self, call: _Call, raw: bytes) -> bytes:
        permit = call.permit = self._port.admit(_head(call.context, len(raw)))
        request = await self._decoded(raw)
        reply = SingleReply(asyncio.get_running_loop())
        call.handed = True
        ticket = await infer(self._port, permit, request, reply)
        call.decision = reply.decision
        with telling(ticket):
            response = reply.result(permit)
            if pieces.has_many(response):
                response = await self._turns.take(pieces.wired(response))
            return protobuf.encode_infer(response)

    async def _decoded(self, raw: bytes) -> InferenceRequest:
        """Contents that take long to read are read by turns with other requests, until gRPC's core ends a late call."""
        large = len(raw) > pieces.SMALL_BODY_BYTES
        request = protobuf.decode_infer(raw, self._port.limits, whole=not large)
        check_version(request.version)
        if large and pieces.unfinished(request):
            await self._turns.take(pieces.finish(request))
        return request

    async def _stream_infer(self, _: object, context: _Context) -> None:
        call = _Call(context)
        try:
            permit = call.permit = self._port.admit(_head(context, None))
            await call.send_headers()
            session = StreamSession(
                self._port,
                permit,
                lambda: self._read(context),
                context.write,
                max_in_flight=self._settings.max_in_flight_per_stream,
                turns=self._turns,
            )
            await session.run()
        except Exception as error:  # noqa: BLE001 - the boundary of one stream
            await call.send_headers()
            await self._abort(context, self._told(error, call.id))
        finally:
            call.release()
        await self._end_stream(context)

    async def _watch(self, raw: bytes, context: _Context) -> None:
        try:
            check_message_size(len(raw))
            async for status in self._health.watch(raw):
                await context.write(status)
        except Exception as error:  # noqa: BLE001 - the boundary of one stream
            await self._abort(context, self._told(error, new_id()))
        await self._end_stream(context)

    def _reflect(self, answers: reflection.Reflection) -> Callable[[object, _Context], Awaitable[None]]:
        async def handle(_: object, context: _Context) -> None:
            try:
                while (raw := await self._read(context)) is not None:
                    check_message_size(len(raw))
                    await context.write(answers.answer(raw))
            except Exception as error:  # noqa: BLE001 - the boundary of one stream
                await self._abort(context, self._told(error, new_id()))
            await self._end_stream(context)

        return handle

    # --- helpers ----------------------------------------------------------------------------------------------

    async def _read(self, context: _Context) -> bytes | None:
        """The next message of a stream; None at its end, and once a drain has come that far."""
        if self._ending:
            return None
        read = asyncio.ensure_future(context.read())
        self._reads.add(read)
        try:
            raw = await read
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._ending and task is not None and not task.cancelling():
                return None
            raise
        finally:
            self._reads.discard(read)
        self._arrived += 1
        return None if raw is grpc.aio.EOF else raw

    async def _end_stream(self, context: _Context) -> None:
        """A stream that a drain ends: not at once, for clients lose what they have not read when an error follows."""
        if self._draining:
            await self._hold(context)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")

    def _told(self, error: Exception, id_: str) -> TidegateError:
        """What the caller is told: the error itself when it was made for that, else only the id it was logged under."""
        if isinstance(error, TidegateError):
            return error
        if isinstance(error, grpc.aio.InternalError):
            return Cancelled("the call was gone before its answer could be written")
        self._log.error("request_failed", id=id_, protocol="grpc", exc_info=error)
        return Internal(id_)

    def _refusal(self, error: TidegateError) -> _Refusal:
        seconds = self._statuses.retry_after(error)
        trailers = () if seconds is None else (("retry-after", str(seconds)),)
        return _CODES[self._statuses.of(error).grpc], safe_text(error.message), trailers

    async def _abort(self, context: _Context, error: TidegateError) -> bytes:
        return await self._end(context, self._refusal(error))

    async def _end(self, context: _Context, refusal: _Refusal) -> bytes:
        await self._hold(context)
        await context.abort(*refusal)
        return b""  # not reached: abort raises


def _head(context: _Context, size: int | None) -> RequestHead:
    received_ns = time.monotonic_ns()
    metadata: dict[str, str] = {}
    for name, value in context.invocation_metadata() or ():
        if isinstance(value, str):
            metadata[name] = f"{metadata[name]}, {value}" if name in metadata else value
    remaining_s = context.time_remaining()
    deadline_ns = 0 if remaining_s is None else received_ns + int(remaining_s * 1e9)
    return RequestHead("grpc", "", "", metadata, received_ns, deadline_ns, size, context.peer())
