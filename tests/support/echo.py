"""A small real server behind the transports: models that echo, compute, wait or refuse, and their catalog.

It fulfils ``server.types.Port`` and ``server.transport.port`` with the same rules as the gateway, so that transports
can be tested without one. Everything runs on the loop of ``Running``.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import uvloop

from server._pb.model_config_pb2 import ModelConfig
from server.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ModelNotFound,
    QueueFull,
    TidegateError,
    TooManyRequests,
    VersionNotFound,
)
from server.transport.answers import HttpSettings
from server.transport.app import build_app
from server.transport.native.h2 import Http2Settings
from server.transport.native.server import GrpcMethods, NativeServer, Served
from server.transport.port import IndexEntry, Services
from server.transport.reference.asgi import HttpServer
from server.transport.reference.grpcio import GrpcServer, GrpcSettings
from server.transport.settings import MemorySettings
from server.transport.status import StatusTable
from server.types import (
    Decision,
    InferenceRequest,
    InferenceResponse,
    ModelSpec,
    ParameterValue,
    Permit,
    Reply,
    RequestHead,
    RequestLimits,
    Tensor,
    TensorSpec,
)

#: echo: outputs are the inputs. affine: y = 2x + 1. later: affine, answered on the next turn of the loop.
#: held: affine, answered when the test says so. full, broken: refuse. many: two answers. none: no answer.
TRANSPORT = os.environ.get("TIDEGATE_TEST_TRANSPORT", "native")
MODELS = ("echo", "affine", "later", "held", "full", "broken", "many", "none")
_T = TypeVar("_T")


def spec_of(model: str) -> ModelSpec:
    tensor = [TensorSpec(name, "FP32", (-1, -1)) for name in ("x", "y")]
    return ModelSpec(model, "1", (tensor[0],), (tensor[1],), max_batch_size=64)


@dataclass
class EchoPermit:
    head: RequestHead
    tidegate_id: str
    port: EchoPort
    traceresponse: str | None = None
    released: int = 0

    def hold(self, size: int) -> None:
        if size > self.port.room:
            raise TooManyRequests(f"{size} bytes are over the room of {self.port.room}")

    def release(self) -> None:
        self.released += 1
        self.port.released.append(self.tidegate_id)
        self.port.notify()


class EchoTicket:
    """Counts cancels that came before the end."""

    def __init__(self, port: EchoPort, request: InferenceRequest, reply: Reply) -> None:
        self.port, self.request, self.reply = port, request, reply
        self.ended = False

    def answer(self) -> None:
        if not self.ended:
            self.ended = True
            self.reply.message(*_affine(self.request))
            self.reply.finish(None)

    def cancel(self) -> None:
        if not self.ended:
            self.ended = True
            self.port.cancelled.append(self.request.id)
            self.port.notify()

    def written(self, code: str) -> None:
        self.port.written.append(code)
        self.port.notify()


def _decision(request: InferenceRequest) -> Decision:
    return Decision(request.model, "1", "stable", 7)


def _affine(request: InferenceRequest) -> tuple[InferenceResponse, Decision]:
    if len(request.inputs) != 1:
        raise InvalidArgument(f"model '{request.model}' has one input 'x', got {len(request.inputs)}")
    x = request.inputs[0]
    if x.datatype != "FP32":
        raise InvalidArgument(f"input '{x.name}' wants FP32, got {x.datatype}")
    y = (2 * x.array() + 1).astype("<f4")
    response = InferenceResponse(request.model, "1", request.id, [Tensor("y", "FP32", x.shape, y.tobytes())])
    return response, _decision(request)


def _echo(request: InferenceRequest) -> tuple[InferenceResponse, Decision]:
    names = [output.name for output in request.outputs]
    outputs = [tensor for tensor in request.inputs if not names or tensor.name in names]
    return InferenceResponse(request.model, "1", request.id, outputs), _decision(request)


class EchoPort:
    """``server.types.Port``. ``in_flight`` bounds admission; ``changed`` tells tests about arrivals and cancels."""

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self.max_in_flight = 10_000
        #: What a request may hold that did not say how much it has.
        self.room = 1 << 40
        self.admitted: list[RequestHead] = []
        self.released: list[str] = []
        self.cancelled: list[str] = []
        #: What became of answers that took long to write.
        self.written: list[str] = []
        #: Codes of what was refused before it was handed over.
        self.refused: list[str] = []
        self.held: list[EchoTicket] = []
        self.changed = threading.Condition()

    def notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def wait(self, ready: Callable[[], bool], timeout: float = 30) -> bool:
        """Called by tests, off the loop: until ``ready`` holds."""
        with self.changed:
            return self.changed.wait_for(ready, timeout)

    def refuse(self, error: TidegateError) -> TidegateError:
        self.refused.append(error.code)
        return error

    def admit(self, head: RequestHead) -> Permit:
        if head.protocol == "http":
            _check_model(head.model, head.version)
        if len(self.admitted) - len(self.released) >= self.max_in_flight:
            raise TooManyRequests(f"over {self.max_in_flight} requests are in flight", retry_after_s=2.5)
        self.admitted.append(head)
        self.notify()
        traceparent = head.metadata.get("traceparent")
        return EchoPermit(head, f"echo-{len(self.admitted)}", self, traceparent)

    def handle(self, permit: Permit, request: InferenceRequest, reply: Reply, received_ns: int = 0) -> EchoTicket:
        ticket = EchoTicket(self, request, reply)
        if request.model == "broken":
            raise RuntimeError("secret: /etc/passwd")
        try:
            _check_model(request.model, request.version)
            if permit.head.deadline_ns and permit.head.deadline_ns <= permit.head.received_ns:
                raise DeadlineExceeded("the deadline had passed on arrival")
            self._run(ticket, request, reply)
        except TidegateError as error:
            ticket.ended = True
            reply.finish(error)
        return ticket

    def _run(self, ticket: EchoTicket, request: InferenceRequest, reply: Reply) -> None:
        match request.model:
            case "held":
                self.held.append(ticket)
                self.notify()
                return
            case "later":
                asyncio.get_running_loop().call_soon(ticket.answer)
                return
            case "full":
                raise QueueFull("Exceeds maximum queue size", retry_after_s=0.2)
            case "echo":
                reply.message(*_echo(request))
            case "many":
                reply.message(*_affine(request))
                reply.message(*_affine(request))
            case "none":
                pass
            case _:
                reply.message(*_affine(request))
        ticket.ended = True
        reply.finish(None)

    def answer_held(self) -> None:
        """On the loop: answer every request that waits."""
        held, self.held = self.held, []
        for ticket in held:
            ticket.answer()


def _check_model(model: str, version: str) -> None:
    if model not in MODELS:
        raise ModelNotFound(f"Request for unknown model: '{model}' is not found")
    if version not in ("", "1"):
        raise VersionNotFound(f"Request for unknown model: '{model}' version {version} is not found")


class EchoCatalog:
    """``Catalog`` and readiness over ``MODELS``."""

    def __init__(self) -> None:
        self.is_ready = True
        self._callbacks: list[Callable[[], object]] = []

    def set_ready(self, ready: bool) -> None:
        self.is_ready = ready
        for callback in list(self._callbacks):
            callback()

    def subscribe(self, callback: Callable[[], object]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def server_name(self) -> str:
        return "echo-server"

    def server_version(self) -> str:
        return "1.2.3"

    def extensions(self) -> tuple[str, ...]:
        return ("binary_tensor_data", "statistics")

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return self.is_ready

    def model_ready(self, model: str, version: str) -> bool:
        _check_model(model, version)
        return model != "none"

    def metadata(self, model: str, version: str) -> tuple[ModelSpec, tuple[str, ...]]:
        _check_model(model, version)
        if model == "broken":
            raise RuntimeError("secret: /etc/passwd")
        return spec_of(model), ("1",)

    def config(self, model: str, version: str) -> ModelConfig:
        _check_model(model, version)
        return ModelConfig(name=model, max_batch_size=64)

    def config_json(self, model: str, version: str) -> bytes:
        return json.dumps({"name": self.config(model, version).name, "max_batch_size": 64}).encode()

    def statistics(self, model: str, version: str) -> list[dict[str, Any]]:
        if model:
            _check_model(model, version)
        stats = {"inference_count": 3, "execution_count": 2, "inference_stats": {"success": {"count": 3, "ns": 2**60}}}
        return [{"name": name, "version": "1", **stats} for name in MODELS if model in ("", name)]

    def repository_index(self, ready_only: bool) -> list[IndexEntry]:
        entries = [IndexEntry(name, "1", "READY" if name != "none" else "UNAVAILABLE", "") for name in MODELS]
        return [entry for entry in entries if entry.state == "READY" or not ready_only]


class EchoControl:
    """``ModelControl`` that remembers what was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, object]] = []

    async def load(self, model: str, parameters: Mapping[str, ParameterValue]) -> None:
        if model == "locked":
            raise FailedPrecondition("model control is off")
        if model not in MODELS:
            raise ModelNotFound(f"failed to load '{model}', no such model in the repository")
        if parameters:
            raise InvalidArgument(f"load parameters are not accepted, got {sorted(parameters)}")
        self.calls.append(("load", model, dict(parameters)))

    async def unload(self, model: str, unload_dependents: bool) -> None:
        self.calls.append(("unload", model, unload_dependents))


class Running:
    """Both listeners on a loop in a thread of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, **options: Any) -> None:
        self.loop = loop
        self.port: EchoPort = options.get("port", EchoPort)(options.get("limits") or RequestLimits())
        self.catalog, self.control = EchoCatalog(), EchoControl()
        statuses = options.get("statuses") or StatusTable()
        http: HttpSettings = options.get("http") or HttpSettings()
        services = self.services = Services(
            self.catalog,
            self.control,
            MemorySettings(),
            self.catalog.subscribe,
            lambda model, items: sum(item.id == "a" for item in items),
        )
        app = build_app(self.port, services, statuses=statuses, settings=http)
        grpc: GrpcSettings = options.get("grpc") or GrpcSettings()
        self.http_server: HttpServer
        self.grpc_server: GrpcServer | NativeServer
        if options.get("transport", TRANSPORT) == "native":
            served = Served(self.port, self.catalog, app, GrpcMethods(services))
            bounds: Http2Settings = options.get("http2") or Http2Settings(
                max_streams=grpc.max_streams_per_connection, max_in_flight_per_stream=grpc.max_in_flight_per_stream
            )
            given = {"limits": self.port.limits, "settings": http, "http2": bounds, "statuses": statuses}
            self.http_server, self.grpc_server = NativeServer(served, **given), NativeServer(served, **given)
        else:
            self.http_server = HttpServer(app, limits=self.port.limits, settings=http, statuses=statuses)
            self.grpc_server = GrpcServer(self.port, services, settings=grpc, statuses=statuses)

    async def start(self) -> None:
        self.http = await self.http_server.start("127.0.0.1", 0)
        self.grpc = await self.grpc_server.start("127.0.0.1", 0)

    async def stop(self) -> None:
        self.port.answer_held()
        await asyncio.gather(self.http_server.drain(0.5), self.grpc_server.drain(0.5))

    def run(self, work: Awaitable[_T], timeout: float = 30) -> _T:
        """Await ``work`` on the server's loop, from a test's thread."""

        async def awaited() -> _T:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(timeout)

    def call(self, work: Callable[[], _T]) -> _T:
        """Call ``work`` on the server's loop, from a test's thread."""

        async def called() -> _T:
            return work()

        return self.run(called())


@contextmanager
def running(**options: Any) -> Iterator[Running]:
    """Servers on free ports; drained at the end. The loop is uvloop unless ``loop`` names another factory."""
    factory = options.pop("loop", uvloop.new_event_loop)
    started: list[Running] = []
    up = threading.Event()

    async def serve() -> None:
        server = Running(asyncio.get_running_loop(), **options)
        server.over = asyncio.Event()  # type: ignore[attr-defined]
        await server.start()
        started.append(server)
        up.set()
        await server.over.wait()  # type: ignore[attr-defined]
        await server.stop()

    def body() -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(serve())

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    if not up.wait(20):
        raise AssertionError("the servers did not start")
    try:
        yield started[0]
    finally:
        started[0].loop.call_soon_threadsafe(started[0].over.set)  # type: ignore[attr-defined]
        thread.join(20)


def floats(*values: float) -> np.ndarray[Any, Any]:
    return np.array([values], dtype="<f4")
