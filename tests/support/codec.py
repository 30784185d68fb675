"""Servers with a codec process, on the test's own loop, and bodies large enough for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import uvloop

from server.codec.process.client import CodecProcess, CodecSettings
from server.transport.answers import HttpSettings
from server.transport.app import build_app
from server.transport.native.server import GrpcMethods, NativeServer, Served
from server.transport.port import Services
from server.transport.reference.asgi import HttpServer
from server.transport.settings import MemorySettings
from server.types import RequestLimits
from tests.support.echo import EchoCatalog, EchoControl, EchoPort

TRANSPORTS = ("native", "reference")
#: Everything goes to the process: nothing is too small for it.
ALL = HttpSettings(offload_bytes=0, drain_idle_s=0.05)
_T = TypeVar("_T")


def on_loop(work: Callable[[], Coroutine[Any, Any, _T]], timeout_s: float = 50) -> _T:
    """Run a test's coroutine on the loop that the server uses."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(work(), timeout_s))


async def until(holds: Callable[[], bool]) -> None:
    """Bounded by ``on_loop``."""
    while not holds():  # noqa: ASYNC110 - a process's jobs ring no bell
        await asyncio.sleep(0.005)


@asynccontextmanager
async def codec_process(settings: CodecSettings | None = None) -> AsyncIterator[CodecProcess]:
    """A process that takes jobs; ended afterwards."""
    codec = CodecProcess(settings)
    try:
        assert await codec.ready()
        yield codec
    finally:
        await codec.close()


@dataclass
class Serving:
    """A server in front of ``EchoPort``; ``codec`` is ready."""

    host: str
    port: int
    codec: CodecProcess
    gateway: EchoPort

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


@asynccontextmanager
async def serving(
    transport: str,
    *,
    http: HttpSettings = ALL,
    limits: RequestLimits | None = None,
    settings: CodecSettings | None = None,
) -> AsyncIterator[Serving]:
    """One listener of a transport with a codec process."""
    port, catalog = EchoPort(limits or RequestLimits()), EchoCatalog()
    services = Services(catalog, EchoControl(), MemorySettings(), catalog.subscribe)
    async with codec_process(settings) as codec:
        app = build_app(port, services, settings=http, codec=codec)
        server: HttpServer
        if transport == "native":
            served = Served(port, catalog, app, GrpcMethods(services))
            server = NativeServer(served, limits=port.limits, settings=http)
        else:
            server = HttpServer(app, limits=port.limits, settings=http)
        host, number = await server.start("127.0.0.1", 0)
        try:
            yield Serving(host, number, codec, port)
        finally:
            port.answer_held()
            await server.drain(2)


def tensor_body(values: np.ndarray[Any, Any], **more: Any) -> bytes:
    """A request with one FP32 tensor, as a client writes it."""
    tensor = {"name": "x", "datatype": "FP32", "shape": list(values.shape), "data": values.ravel().tolist()}
    return json.dumps({"id": "a", "inputs": [tensor], **more}).encode()
