"""The addresses of one serving process: what answers at each of them, on which transport, within which bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ssl import SSLContext
from typing import Final

import structlog
from starlette.types import ASGIApp

from server.codec.process.client import CodecProcess
from server.config.settings import Address, ServerSettings
from server.control.reload import ConfigControl
from server.gateway import Gateway
from server.lifecycle import Listener
from server.telemetry.instruments import Telemetry
from server.telemetry.snapshot import FamilySnapshot, Points
from server.transport.admin import AdminViews, admin_app, is_loopback
from server.transport.answers import HttpSettings
from server.transport.app import build_app
from server.transport.hints import RegistryHints
from server.transport.metrics import metrics_app
from server.transport.native.h2 import Http2Settings
from server.transport.native.server import GrpcMethods, NativeServer
from server.transport.native.server import Served as NativeServed
from server.transport.port import Services
from server.transport.reference.asgi import HttpServer
from server.transport.reference.grpcio import GrpcServer, GrpcSettings
from server.transport.status import StatusTable
from server.transport.tls import grpc_credentials, tls_context

log = structlog.get_logger("tidegate")

#: More streams of one connection make gRPC's core neglect other connections while one is flooded with resets.
_CORE_STREAMS: Final = 100


@dataclass(slots=True, frozen=True)
class Admin:
    """What the admin address is built from."""

    token: str | None
    reconfigure: ConfigControl | None
    views: AdminViews
    hints: RegistryHints | None = None


@dataclass(slots=True)
class Bound:
    """A server of one of the transports with the address it is to listen on."""

    name: str
    server: HttpServer | GrpcServer
    address: Address

    async def start(self) -> str:
        """Bind; the real HOST:PORT."""
        try:
            host, port = await self.server.start(*self.address)
        except OSError as error:
            wanted = _host_port(*self.address)
            raise OSError(f"{self.name} cannot listen on {wanted}: {error.strerror or error}") from error
        return _host_port(host, port)

    async def drain(self, timeout_s: float) -> None:
        """Stop listening and finish what is in flight."""
        if not await self.server.drain(timeout_s):
            log.warning("drain_incomplete", listener=self.name, seconds=timeout_s)


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listeners(
    settings: ServerSettings,
    gateway: Gateway,
    services: Services,
    telemetry: Telemetry,
    admin: Admin,
    codec: CodecProcess | None,
) -> list[Listener]:
    """The four addresses: inference over HTTP and gRPC, metrics, admin."""
    tls = settings.tls
    statuses = StatusTable(shed_as_429=settings.shed_as_429)
    http = HttpSettings(
        max_connections=settings.max_connections,
        strict_json=settings.strict_json,
        keep_alive_s=settings.idle_s,
        offload_bytes=settings.offload_bytes,
    )
    context = None if tls is None else tls_context(tls)

    def listen(app: ASGIApp, tls: SSLContext | None = None) -> HttpServer:
        return HttpServer(app, limits=settings.limits, settings=http, statuses=statuses, tls=tls, unsent=gateway.unsent)

    inference = build_app(gateway, services, statuses=statuses, settings=http, codec=codec)
    if settings.transport == "native":
        served = NativeServed(gateway, services.catalog, inference, GrpcMethods(services))
        http2 = Http2Settings(
            max_streams=settings.max_concurrent_streams,
            keepalive_s=settings.ping_after_s,
            keepalive_timeout_s=settings.ping_timeout_s,
            max_age_s=settings.max_connection_age_s,
        )
        native = {
            name: NativeServer(
                served,
                limits=settings.limits,
                settings=http,
                http2=http2,
                statuses=statuses,
                tls=context,
                unsent=gateway.unsent,
            )
            for name in (("http",) if settings.single_port else ("http", "grpc"))
        }
        telemetry.metrics.collect(lambda: _connections(native))
        addresses = {"http": settings.http, "grpc": settings.grpc}
        inference_listeners = [Bound(name, server, addresses[name]) for name, server in native.items()]
    else:
        grpc_settings = GrpcSettings(
            max_streams_per_connection=min(settings.max_concurrent_streams, _CORE_STREAMS),
            max_connections=settings.max_connections,
            keepalive_s=settings.ping_after_s,
            keepalive_timeout_s=settings.ping_timeout_s,
            max_age_s=settings.max_connection_age_s,
        )
        credentials = None if tls is None else grpc_credentials(tls)
        grpc_server = GrpcServer(
            gateway,
            services,
            settings=grpc_settings,
            statuses=statuses,
            credentials=credentials,
            turns=inference.turns,
        )
        inference_listeners = [
            Bound("http", listen(inference, context), settings.http),
            Bound("grpc", grpc_server, settings.grpc),
        ]
    metrics = metrics_app(lambda openmetrics: telemetry.metrics.render(openmetrics=openmetrics))
    operators = admin_app(
        services.catalog,
        token=admin.token,
        loopback=is_loopback(settings.admin[0]),
        reconfigure=admin.reconfigure,
        views=admin.views,
        hints=admin.hints,
        statuses=statuses,
        settings=http,
    )
    return [
        *inference_listeners,
        Bound("metrics", listen(metrics), settings.metrics),
        Bound("admin", listen(operators), settings.admin),
    ]


def _connections(servers: Mapping[str, NativeServer]) -> Iterator[FamilySnapshot]:
    """What ``max_connections`` bounds, by listener."""
    opened: Points = {(name,): server.connections for name, server in servers.items()}
    yield FamilySnapshot(
        "tidegate_connections", "Open connections, TLS handshakes included.", "gauge", ("listener",), opened
    )
    refused: Points = {(name,): server.refused for name, server in servers.items()}
    yield FamilySnapshot(
        "tidegate_connections_refused_total",
        "Connections that found no place: over server.limits.max_connections.",
        "counter",
        ("listener",),
        refused,
    )
