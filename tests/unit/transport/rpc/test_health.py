"""What watchers of health are told, whatever their connections are doing meanwhile."""

from __future__ import annotations

import asyncio

from server._pb import health_pb2 as pb
from server.transport.port import Services
from server.transport.rpc.health import HealthRpcs
from server.transport.settings import MemorySettings
from tests.support.echo import EchoCatalog, EchoControl

STATUS = pb.HealthCheckResponse


def test_an_end_that_comes_while_a_status_is_on_its_way_is_told_too() -> None:
    async def told() -> list[int]:
        catalog = EchoCatalog()
        services = Services(catalog, EchoControl(), MemorySettings(), catalog.subscribe, lambda model, items: 0)
        health = HealthRpcs(services)
        seen: list[int] = []
        async for raw in health.watch(b""):
            seen.append(pb.HealthCheckResponse.FromString(raw).status)
            health.close()
        return seen

    assert asyncio.run(asyncio.wait_for(told(), 20)) == [STATUS.SERVING, STATUS.NOT_SERVING]
