"""The native listener: HTTP/1.1, HTTP/2 and gRPC on one address, in clear or over TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import structlog
from starlette.types import ASGIApp

from server.errors import TidegateError, Unimplemented
from server.transport.answers import Headers, HttpSettings, error_answer
from server.transport.faults import HeadersTooLarge
from server.transport.http_infer import InferApp
from server.transport.native import asgi, streams
from server.transport.native.accepting import SecureListener, Undecided
from server.transport.native.asgi import AsgiStream
from server.transport.native.h2 import Http2Connection, Http2Settings, Stream
from server.transport.native.heads import KnownHeads
from server.transport.native.http1 import NativeHttp1
from server.transport.native.metadata import Metadata
from server.transport.native.session import REFUSED_STREAM, Header
from server.transport.native.streams import Handler, StreamCall
from server.transport.native.unary import GrpcHead, InferCall, MethodCall, UnknownCall
from server.transport.offload import Offload
from server.transport.port import Catalog, Services
from server.transport.reference.asgi import HttpServer
from server.transport.rpc import reflection
from server.transport.rpc.feedback import FeedbackRpcs
from server.transport.rpc.health import WATCH_PATH, HealthRpcs
from server.transport.rpc.unary import SERVICE, InferenceRpcs, Method
from server.transport.status import StatusTable
from server.types import Port, RequestLimits, Unsent

_HEADER_OVERHEAD: Final = 32
_TICK_S: Final = 0.5
#: So much of the time between two looks at the clock counts at most: nobody who is allowed more than that was late
#: while the process itself stood still.
_STEP_S: Final = 4 * _TICK_S
_INFER: Final = f"/{SERVICE}/ModelInfer".encode()


class GrpcMethods:
    """What can be called, by path. One for all listeners of a server."""

    def __init__(self, services: Services) -> None:
        self.health = HealthRpcs(services)
        unary = {**InferenceRpcs(services).methods, **self.health.methods, **FeedbackRpcs(services).methods}
        self.unary: Mapping[bytes, Method] = {path.encode(): method for path, method in unary.items()}
        handlers: dict[str, Handler] = {
            f"/{SERVICE}/ModelStreamInfer": streams.infer,
            WATCH_PATH: streams.watch(self.health),
            reflection.V1_PATH: streams.reflect(reflection.v1()),
            reflection.V1ALPHA_PATH: streams.reflect(reflection.v1alpha()),
        }
        self.streaming: Mapping[bytes, Handler] = {path.encode(): handler for path, handler in handlers.items()}


@dataclass(slots=True, frozen=True)
class Served:
    """What the listeners of one server share."""

    port: Port
    catalog: Catalog
    infer: InferApp
    grpc: GrpcMethods


class NativeServer(HttpServer):
    """One address: ``start``, then ``drain``."""

    # Set by the base, which is not compiled; asked of every request, so they have a place here.
    limits: RequestLimits
    unsent: Unsent

    def __init__(
        self,
        served: Served,
        *,
        limits: RequestLimits | None = None,
        settings: HttpSettings | None = None,
        http2: Http2Settings | None = None,
        statuses: StatusTable | None = None,
        tls: ssl.SSLContext | None = None,
        unsent: Unsent | None = None,
    ) -> None:
        super().__init__(served.infer, limits=limits, settings=settings, statuses=statuses, tls=tls, unsent=unsent)
        self.port = served.port
        self.catalog = served.catalog
        self.infer = served.infer
        self.http2 = http2 or Http2Settings()
        self._grpc = served.grpc
        #: The connections' clock, of which only differences mean something.
        self.now = 0.0
        self._swept = 0.0
        #: Stands where requests that nobody awaits keep an event.
        self.no_event = asyncio.Event()
        self.status_ok = b""
        self.heads = KnownHeads()
        #: Connections that found no place.
        self.refused = 0
        self._secure: SecureListener | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self.offload = Offload(self.settings.offload_threads)
        self._log: Any = structlog.get_logger("tidegate.native")
        if tls is not None:
            tls.set_alpn_protocols(["h2", "http/1.1"])

    @property
    def app(self) -> ASGIApp:
        """What answers requests that are no inference calls."""
        return self.infer

    @property
    def live(self) -> set[Any]:
        """The connections that are open."""
        return cast("set[Any]", self._state.connections)

    @property
    def default_headers(self) -> Headers:
        """On every HTTP answer."""
        return self._state.default_headers

    async def start(self, host: str, port: int) -> tuple[str, int]:
        loop = asyncio.get_running_loop()
        self._swept = loop.time()
        self._sweep(loop)
        if self._tls is None:
            return await super().start(host, port)
        self._config.load()
        self._tick(loop)
        self._secure = SecureListener(self, self._tls)
        return await self._secure.start(host, port)

    async def drain(self, timeout_s: float) -> bool:
        self._grpc.health.close()
        if self._secure is not None:
            self._secure.close()
        clean = await super().drain(timeout_s)
        if self._sweeper is not None:
            self._sweeper.cancel()
        return clean

    def _connection(self) -> asyncio.Protocol:
        return Undecided(self)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        super()._tick(loop)
        self.status_ok = b"HTTP/1.1 200 OK\r\n" + b"".join([b"%b: %b\r\n" % header for header in self.default_headers])

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """The connections' clock, and their timers."""
        moment = loop.time()
        self.now += min(moment - self._swept, _STEP_S)
        self._swept = moment
        self._sweeper = loop.call_later(_TICK_S, self._sweep, loop)
        for connection in tuple(self.live):
            try:
                connection.sweep(self.now)
            except Exception as error:  # noqa: BLE001 - the boundary of one connection: the others have timers too
                self._log.error("connection_failed", exc_info=error)
                connection.transport.abort()

    def http1(self) -> NativeHttp1:
        """The protocol of a connection that speaks HTTP/1.1."""
        return NativeHttp1(self, self._config, self._state)

    # --- HTTP/2 streams --------------------------------------------------------------------------------------

    def open_stream(
        self, connection: Http2Connection, stream_id: int, headers: tuple[Header, ...], ended: bool
    ) -> Stream | None:
        """What a new stream is; None when it was answered already."""
        metadata = Metadata(headers)
        fits = metadata.size + _HEADER_OVERHEAD * len(headers) <= self.limits.max_header_bytes
        if not _is_grpc(metadata.content_type):
            if not fits:
                asgi.refuse(connection, stream_id, error_answer(self._too_large(), self.statuses), ended=ended)
            elif len(connection.tasks) >= self.http2.max_streams:
                connection.session.reset(stream_id, REFUSED_STREAM)
            else:
                return AsgiStream(connection, stream_id, headers)
            return None
        if not fits:
            self._refuse(connection, stream_id, self._too_large(), ended)
            return None
        try:
            return self._call(connection, stream_id, metadata.path, GrpcHead(metadata))
        except TidegateError as error:
            if metadata.path == _INFER:
                self.port.refuse(error)
            self._refuse(connection, stream_id, error, ended)
            return None

    def _call(self, connection: Http2Connection, stream_id: int, path: bytes, head: GrpcHead) -> Stream:
        if path == _INFER:
            return InferCall(connection, stream_id, head)
        method = self._grpc.unary.get(path)
        if method is not None:
            return MethodCall(connection, stream_id, head, method)
        handler = self._grpc.streaming.get(path)
        if handler is not None:
            return StreamCall(connection, stream_id, head, handler)
        raise Unimplemented(f"there is no method {path[:256].decode('latin-1')!r}")

    def _refuse(self, connection: Http2Connection, stream_id: int, error: TidegateError, ended: bool) -> None:
        UnknownCall(connection, stream_id, GrpcHead(Metadata(()))).refuse(error, ended=ended)

    def _too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(f"the request's headers are over the limit of {self.limits.max_header_bytes} bytes")


def _is_grpc(content_type: bytes) -> bool:
    """``application/grpc``, with or without a subtype; ``application/grpc-web`` is another protocol."""
    return content_type == b"application/grpc" or content_type.startswith((b"application/grpc+", b"application/grpc;"))
