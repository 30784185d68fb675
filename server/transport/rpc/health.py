"""``grpc.health.v1.Health``: Check, List and Watch over the readiness of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Final

from server._pb import health_pb2 as pb
from server.errors import NotFound
from server.transport.port import Services
from server.transport.rpc.unary import SERVICE as INFERENCE
from server.transport.rpc.unary import Method, parse

SERVICE: Final = "grpc.health.v1.Health"
WATCH_PATH: Final = f"/{SERVICE}/Watch"
_KNOWN: Final = ("", INFERENCE)
_Status = pb.HealthCheckResponse.ServingStatus


class HealthRpcs:
    """Answers for the server as a whole ("") and for the inference service, which are ready together."""

    def __init__(self, services: Services) -> None:
        self._catalog = services.catalog
        self._subscribe = services.subscribe
        self._closing = False
        self._watchers: set[asyncio.Event] = set()
        self.methods: Mapping[str, Method] = {f"/{SERVICE}/Check": self._check, f"/{SERVICE}/List": self._list}

    async def _check(self, raw: bytes) -> bytes:
        service = parse(pb.HealthCheckRequest, raw).service
        if service not in _KNOWN:
            raise NotFound(f"unknown service {service[:128]!r}; known: '' and '{INFERENCE}'")
        return pb.HealthCheckResponse(status=self._status(service)).SerializeToString()

    async def _list(self, raw: bytes) -> bytes:
        parse(pb.HealthListRequest, raw)
        response = pb.HealthListResponse()
        for service in _KNOWN:
            response.statuses[service].status = self._status(service)
        return response.SerializeToString()

    async def watch(self, raw: bytes) -> AsyncIterator[bytes]:
        """The state now and after each change, until ``close``. An unknown service stays SERVICE_UNKNOWN."""
        service = parse(pb.HealthCheckRequest, raw).service
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        unsubscribe = self._subscribe(lambda: loop.call_soon_threadsafe(changed.set))
        self._watchers.add(changed)
        try:
            last: _Status | None = None
            while True:
                changed.clear()
                closing, now = self._closing, self._status(service)
                if now != last:
                    last = now
                    yield pb.HealthCheckResponse(status=now).SerializeToString()
                if closing:  # as it was for what was told: while that was on its way it may have changed
                    return
                await changed.wait()
        finally:
            self._watchers.discard(changed)
            unsubscribe()

    def close(self) -> None:
        """Tell every watcher NOT_SERVING and end its stream."""
        self._closing = True
        for changed in self._watchers:
            changed.set()

    def _status(self, service: str) -> _Status:
        if service not in _KNOWN:
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        serving = self._catalog.ready() and not self._closing
        return pb.HealthCheckResponse.SERVING if serving else pb.HealthCheckResponse.NOT_SERVING
