"""loadtests.lanes on real sockets: each request is answered once, headers vary, connections come back."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import uvloop

from loadtests.lanes import CHECK_EVERY, LOST, OK, WRONG, GrpcioLane, GrpcLane, HttpLane, Lane, http_request
from loadtests.load import Closed, Taken
from server.transport.native import wire
from server.transport.native.session import DataReceived, RequestReceived, Session, SessionLimits
from tests.support.ports import reserved_port

MESSAGE, ANSWER = b"question", b"answer"
_HEAD = ((b":status", b"200"), (b"content-type", b"application/grpc"))


class GrpcServer(asyncio.Protocol):
    """Answers by the number of the request: good, ``refuse`` by trailers only, ``drop`` by cutting the connection."""

    def __init__(self, log: list[dict[bytes, bytes]], refuse: int = 0, drop: int = 0, goaway: int = 0) -> None:
        self.log, self.refuse, self.drop, self.goaway = log, refuse, drop, goaway
        self.session = Session(SessionLimits())
        self.heads: dict[int, dict[bytes, bytes]] = {}
        self.bodies: dict[int, bytes] = {}

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.flush()

    def data_received(self, data: bytes) -> None:
        for event in self.session.feed(data):
            if isinstance(event, RequestReceived):
                self.heads[event.stream_id] = dict(event.headers)
                self.bodies[event.stream_id] = b""
            elif isinstance(event, DataReceived):
                self.session.consumed(event.stream_id, len(event.data))
                self.bodies[event.stream_id] += event.data
                if event.end_stream:
                    self.log.append(self.heads.pop(event.stream_id))
                    assert self.bodies.pop(event.stream_id) == wire.framed(MESSAGE)
                    self.answer(event.stream_id, len(self.log))
        self.flush()

    def answer(self, stream_id: int, number: int) -> None:
        if self.drop and number % self.drop == 0:
            self.transport.abort()
        elif self.refuse and number % self.refuse == 0:
            self.session.head(stream_id, [*_HEAD, (b"grpc-status", b"14")], end=True)
        else:
            self.session.unary(stream_id, _HEAD, wire.framed(ANSWER), ((b"grpc-status", b"0"),))
        if self.goaway and number % self.goaway == 0:
            self.session.goaway()

    def flush(self) -> None:
        while data := self.session.out(65536):
            self.transport.write(data)
        if self.session.over():
            self.transport.close()


class HttpServer(asyncio.Protocol):
    """Answers whole requests of a known length; ``close`` ends the connection after every so many."""

    def __init__(self, log: list[bytes], size: int, *, close: int = 0, drop: int = 0, fail: int = 0) -> None:
        self.log, self.size, self.close, self.drop, self.fail = log, size, close, drop, fail
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while len(self.buffer) >= self.size:
            self.log.append(self.buffer[: self.size])
            self.buffer = self.buffer[self.size :]
            self.answer(len(self.log))

    def answer(self, number: int) -> None:
        if self.drop and number % self.drop == 0:
            return self.transport.abort()
        last = bool(self.close) and number % self.close == 0
        status = b"503 Busy" if self.fail and number % self.fail == 0 else b"200 OK"
        ending = b"connection: close\r\n" if last else b""
        self.transport.write(
            b"HTTP/1.1 %b\r\n%btransfer-encoding: chunked\r\n\r\n6\r\nanswer\r\n0\r\n\r\n" % (status, ending)
        )
        if last:
            self.transport.close()
        return None


REQUEST = http_request("host", "/v2/models/m/infer", b"body", [("x-test", "1")])


def drive(
    protocol: Callable[[], asyncio.Protocol],
    make: Callable[[str], list[Lane]],
    enough: Callable[[Counter[str]], bool] = lambda outcomes: outcomes[OK] > 30,
) -> Counter[str]:
    """How requests ended in a closed loop of lanes against a server on a free port.

    One window follows the other until it is ``enough``: in any of them the machine may have stood still.
    """

    async def run() -> Counter[str]:
        server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
        lanes = make(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with server:
            await asyncio.gather(*(lane.open() for lane in lanes))
            try:
                outcomes = Counter[str]()
                until = time.monotonic() + 20
                while not enough(outcomes) and time.monotonic() < until:
                    outcomes += (await Closed(lanes).run(0.0, 0.3)).outcomes
                return outcomes
            finally:
                await asyncio.gather(*(lane.close() for lane in lanes))

    return uvloop.run(run())


def is_answer(body: bytes) -> bool:
    return body == ANSWER


def test_grpc_requests_are_answered_once_each_under_headers_of_their_own() -> None:
    log: list[dict[bytes, bytes]] = []
    outcomes = drive(lambda: GrpcServer(log), lambda at: [GrpcLane(at, MESSAGE, 4, is_answer) for _ in range(3)])
    assert outcomes == {OK: len(log)}
    traces = [headers[b"traceparent"] for headers in log]
    assert len(set(traces)) == len(traces) > 20
    assert all(re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-01", trace) for trace in traces)
    assert {headers[b":path"] for headers in log} == {b"/inference.GRPCInferenceService/ModelInfer"}


def test_grpc_errors_come_by_status() -> None:
    log: list[dict[bytes, bytes]] = []
    outcomes = drive(lambda: GrpcServer(log, refuse=3), lambda at: [GrpcLane(at, MESSAGE, 4)])
    assert outcomes == {OK: len(log) - len(log) // 3, "grpc 14": len(log) // 3}


def test_grpc_connections_come_back_after_a_cut() -> None:
    log: list[dict[bytes, bytes]] = []
    outcomes = drive(lambda: GrpcServer(log, drop=9), lambda at: [GrpcLane(at, MESSAGE, 2)])
    assert outcomes[LOST]
    assert outcomes[OK] > 9  # the second connection
    assert set(outcomes) == {OK, LOST}


def test_grpc_calls_move_to_another_connection_after_goaway() -> None:
    log: list[dict[bytes, bytes]] = []
    outcomes = drive(lambda: GrpcServer(log, goaway=8), lambda at: [GrpcLane(at, MESSAGE, 1)])
    assert outcomes == {OK: len(log)}
    assert len(log) > 8


def test_http_requests_are_answered_once_each() -> None:
    log: list[bytes] = []
    size = len(REQUEST)
    outcomes = drive(lambda: HttpServer(log, size), lambda at: [HttpLane(at, REQUEST, is_answer) for _ in range(3)])
    assert outcomes == {OK: len(log)}
    assert set(log) == {REQUEST}
    assert len(log) > 20


def test_http_connections_that_end_are_opened_again_without_a_loss() -> None:
    log: list[bytes] = []
    outcomes = drive(lambda: HttpServer(log, len(REQUEST), close=5), lambda at: [HttpLane(at, REQUEST)])
    assert outcomes == {OK: len(log)}
    assert len(log) > 5


def test_http_losses_and_errors_are_told_apart() -> None:
    log: list[bytes] = []
    outcomes = drive(lambda: HttpServer(log, len(REQUEST), drop=10, fail=3), lambda at: [HttpLane(at, REQUEST)])
    assert set(outcomes) == {OK, "http 503", LOST}
    assert sum(outcomes.values()) == len(log)


def test_wrong_answers_are_found_by_samples() -> None:
    log: list[bytes] = []
    outcomes = drive(lambda: HttpServer(log, len(REQUEST)), lambda at: [HttpLane(at, REQUEST, lambda _: False)])
    assert outcomes[WRONG] == -(-len(log) // CHECK_EVERY)

    def damaged(_: bytes) -> bool:
        raise ValueError("not JSON")

    outcomes = drive(lambda: HttpServer([], len(REQUEST)), lambda at: [HttpLane(at, REQUEST, damaged)])
    assert outcomes[WRONG]


@pytest.mark.parametrize("status", [None, grpc.StatusCode.UNAVAILABLE])
def test_the_real_client(status: grpc.StatusCode | None) -> None:
    traces: Counter[str] = Counter()

    async def infer(request: bytes, context: Any) -> bytes:
        assert request == MESSAGE
        traces.update(value for name, value in context.invocation_metadata() if name == "traceparent")
        if status is not None:
            await context.abort(status)
        return ANSWER

    async def run() -> Taken:
        server = grpc.aio.server()
        handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
        service = "inference.GRPCInferenceService"
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        lanes = [GrpcioLane(f"127.0.0.1:{port}", MESSAGE, 2, is_answer) for _ in range(2)]
        await asyncio.gather(*(lane.open() for lane in lanes))
        try:
            return await Closed(lanes).run(0.0, 0.2)
        finally:
            await asyncio.gather(*(lane.close() for lane in lanes))
            await server.stop(None)

    taken = asyncio.run(run())
    assert set(taken.outcomes) == {OK if status is None else "grpc 14"}
    assert sum(traces.values()) == len(traces) == taken.latency.count


@pytest.mark.parametrize(("sampled", "flags"), [(0.0, {"00"}), (0.5, {"00", "01"}), (1.0, {"01"})])
def test_traces_are_flagged_as_often_as_it_is_said(sampled: float, flags: set[str]) -> None:
    log: list[dict[bytes, bytes]] = []
    drive(lambda: GrpcServer(log), lambda at: [GrpcLane(at, MESSAGE, 8, sampled=sampled)])
    assert len(log) > 20
    assert {headers[b"traceparent"].decode()[-2:] for headers in log} == flags


def test_nobody_listens() -> None:
    async def run() -> None:
        address = f"127.0.0.1:{reserved_port()}"
        for lane in (HttpLane(address, REQUEST), GrpcLane(address, MESSAGE)):
            with pytest.raises(OSError, match=f"cannot connect to {address}"):
                await lane.open()
            await lane.close()

    asyncio.run(run())
