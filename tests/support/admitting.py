"""The echoing server with the gateway's own admission, which has room for little."""

from __future__ import annotations

import asyncio
import time
from typing import Final, cast

from server.errors import TooManyRequests
from server.gateway import AdmissionLimits, Gateway
from server.telemetry.instruments import Telemetry
from server.types import Permit, RequestHead, RequestLimits
from tests.support.echo import EchoPort, Running

#: Bytes of requests in flight.
ROOM: Final = 18 * 1024 * 1024


class Admitting(EchoPort):
    """To be made on the loop."""

    def __init__(self, limits: RequestLimits) -> None:
        super().__init__(limits)
        loop = asyncio.get_running_loop()
        self.telemetry = Telemetry.create("test")
        self.gateway = Gateway(
            limits=limits,
            admission=AdmissionLimits(max_bytes=ROOM),
            telemetry=self.telemetry,
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_later=loop.call_later,
        )

    def admit(self, head: RequestHead) -> Permit:
        return self.gateway.admit(head)


def has_room(server: Running, size: int) -> bool:
    """Whether a request of so many bytes would be admitted now."""

    def ask() -> bool:
        try:
            server.port.admit(RequestHead("grpc", "", "", {}, 0, content_length=size)).release()
        except TooManyRequests:
            return False
        return True

    return server.call(ask)


def refusals(server: Running) -> int:
    """What was refused because too much was in flight."""
    port = cast("Admitting", server.port)
    return int(server.call(lambda: port.telemetry.rejected(TooManyRequests.code).value))
