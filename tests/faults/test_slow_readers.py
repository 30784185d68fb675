"""Answers that nobody reads: what they hold is seen and bounded over all connections, and given back at their end."""

from __future__ import annotations

import gc
import json
import os
import socket
import ssl
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import cast

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper

from server._pb import inference_pb2 as pb
from server.errors import QueueFull
from server.transport.answers import HttpSettings
from server.transport.native.server import NativeServer
from server.types import Decision, InferenceRequest, InferenceResponse, Permit, Reply, Tensor
from tests.support import http2, models, pki
from tests.support.echo import EchoPort, EchoTicket, Running, running
from tests.support.http2 import Http2Wire, opened
from tests.support.metrics import samples, total, wait_total
from tests.support.server import Server, serving
from tests.support.v2 import tensor
from tests.support.wire import Wire, post

MIB = 1 << 20
ELEMENTS = [b"element"] * 10_000
#: In wire form: each with its length in front.
ELEMENT_BYTES = 10_000 * (4 + len(b"element"))
ANSWER = 16 * MIB  # more than the buffers of sockets take
BOUND = 24 * MIB
HEAD = 4096  # more than an answer has beside its values
READERS = 8
PATIENCE_S = 20.0


def until(reached: Callable[[], bool]) -> bool:
    """Whether it is within ``PATIENCE_S``."""
    end, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not reached() and time.monotonic() < end:
        pause.wait(0.05)
    return reached()


def wide(path: Path) -> Path:
    """``y`` = ``x`` [1, 1], repeated: a large answer to a small request."""
    return models.save(
        path,
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        [("x", TensorProto.FLOAT, [1, 1])],
        [("y", TensorProto.FLOAT, [1, ANSWER // 4])],
        {"shape": np.array([1, ANSWER // 4], np.int64)},
    )


def body_of(model: str) -> bytes:
    width = 1 if model == "wide" else 4
    inputs = [tensor("x", "FP32", [1, width], [3.0] * width)]
    return json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()


def message(model: str) -> bytes:
    width = 1 if model == "wide" else 4
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=[1, width])
    request.raw_input_contents.append(np.full(width, 3, "<f4").tobytes())
    return request.SerializeToString()


def resident(server: Server) -> int:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class House:
    """A server, and what its clients trust if it speaks TLS."""

    server: Server
    authority: Path | None

    def reader(self) -> Reader:
        context = None if self.authority is None else ssl.create_default_context(cafile=str(self.authority))
        return Reader(self.server.http, context)

    def http(self, model: str) -> tuple[HTTPResponse, bytes]:
        """A request of a client that reads."""
        with self.reader() as reader:
            reader.ask(model)
            return reader.read()

    def grpc(self, model: str) -> bytes:
        """Likewise. Raises grpc.RpcError."""
        options = [("grpc.max_receive_message_length", -1)]
        if self.authority is None:
            channel = grpc.insecure_channel(self.server.grpc, options)
        else:
            trust = grpc.ssl_channel_credentials(self.authority.read_bytes())
            channel = grpc.secure_channel(self.server.grpc, trust, options)
        with channel:
            answer: bytes = channel.unary_unary(http2.INFER)(message(model), timeout=PATIENCE_S)
            return answer

    def unsent(self) -> float:
        return total(self.server, "tidegate_unsent_bytes")

    def refused(self) -> float:
        return samples(self.server, "tidegate_rejected_total").get('{reason="too_many_requests"}', 0.0)


class Reader:
    """A client of HTTP/1.1 that reads when it is told to."""

    def __init__(self, address: str, context: ssl.SSLContext | None) -> None:
        host, _, port = address.rpartition(":")
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.settimeout(PATIENCE_S)
        plain.connect((host, int(port)))
        self._connection = HTTPConnection(host, int(port))
        self._connection.sock = plain if context is None else context.wrap_socket(plain, server_hostname=host)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, model: str) -> None:
        self._connection.request("POST", f"/v2/models/{model}/infer", body_of(model))

    def read(self) -> tuple[HTTPResponse, bytes]:
        response = self._connection.getresponse()
        return response, response.read()


@pytest.fixture(scope="module", params=["native", "native over TLS", "reference"])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root, own = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("own")
    models.affine(root / "affine" / "1" / "model.onnx")
    wide(root / "wide" / "1" / "model.onnx")
    (root / "wide" / "config.pbtxt").write_text('name: "wide"\nmax_batch_size: 0\n')
    text = f"apiVersion: tidegate/v1\nserver:\n  limits: {{max_unsent: {BOUND // MIB}MiB}}\n"
    authority = None
    if "TLS" in request.param:
        pki.usual(own)
        authority = own / "ca.pem"
        text += f"  tls: {{certificate: {own}/server.pem, private_key: {own}/server.key}}\n"
    (own / "tidegate.yaml").write_text(text)
    args = [str(own / "tidegate.yaml"), "--model-repository", str(root), "--state-dir", str(own / "state")]
    with serving(*args, "--transport", request.param.split()[0]) as server:
        yield House(server, authority)


def test_unread_answers_fill_a_bound_and_readers_empty_it(house: House) -> None:
    refused = house.refused()
    with ExitStack() as stack:
        readers = [stack.enter_context(house.reader()) for _ in range(READERS)]
        for reader in readers:
            reader.ask("wide")  # all at once: most are admitted before the first is answered
        assert until(lambda: house.unsent() > BOUND and total(house.server, "tidegate_requests_in_flight") == 0)
        assert house.unsent() <= BOUND + ANSWER + HEAD  # the bound is looked at before each answer

        response, body = house.http("affine")
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert "wait for their readers" in json.loads(body)["error"]
        with pytest.raises(grpc.RpcError) as over_grpc:
            house.grpc("affine")
        assert over_grpc.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "wait for their readers" in str(over_grpc.value.details())

        answers = [reader.read() for reader in readers]  # and what they took is whole, slow as they were
    statuses = [response.status for response, _ in answers]
    assert set(statuses) == {200, 503}
    for response, body in answers:
        size = int(response.headers.get("Inference-Header-Content-Length", 0))
        assert response.status == 503 or body[size:] == np.full(ANSWER // 4, 3, "<f4").tobytes()
    assert house.refused() == refused + statuses.count(503) + 2
    assert until(lambda: house.unsent() == 0)
    assert house.http("affine")[0].status == 200
    assert house.grpc("affine")


def test_readers_that_leave_give_back_what_they_held(house: House) -> None:
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(house.reader()).ask("wide")
        assert until(lambda: house.unsent() > ANSWER)
    wait_total(house.server, "tidegate_unsent_bytes", 0)


def test_what_was_held_goes_with_its_readers(house: House) -> None:
    """Answers that were refused too: nothing waits for the collector to come round."""
    before, growth = resident(house.server), 2 * ANSWER
    with ExitStack() as stack:
        for _ in range(READERS):
            stack.enter_context(house.reader()).ask("wide")
        assert until(lambda: total(house.server, "tidegate_requests_in_flight") == 0 and house.unsent() > BOUND)
    assert until(lambda: house.unsent() == 0 and resident(house.server) - before < growth), (
        resident(house.server) - before
    )


def test_answers_that_are_read_are_not_held(house: House) -> None:
    for _ in range(3):
        assert house.http("wide")[0].status == 200
        assert len(house.grpc("wide")) > ANSWER
    wait_total(house.server, "tidegate_unsent_bytes", 0)


class Refusing(EchoPort):
    """Refuses what was admitted, and remembers with what."""

    refusal: weakref.ref[QueueFull]

    def handle(self, permit: Permit, request: InferenceRequest, reply: Reply, received_ns: int = 0) -> EchoTicket:
        error = QueueFull("full")
        self.refusal = weakref.ref(error)
        reply.finish(error)
        return EchoTicket(self, request, reply)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_refusal_is_not_held_by_its_own_traceback(protocol: str) -> None:
    """It would keep the frames that led to it, and with them the request and its answer."""
    gc.disable()
    try:
        with running(transport="native", port=Refusing) as server:
            if protocol == "http":
                with Wire(f"{server.http[0]}:{server.http[1]}") as wire:
                    wire.send(post("/v2/models/affine/infer", body_of("affine")))
                    answer = wire.answer()
                    assert answer is not None
                    assert answer.status == 503
            else:
                with Http2Wire(server.grpc) as wire2:
                    assert wire2.call(1, message("affine")).status == "14"
            assert until(lambda: cast("Refusing", server.port).refusal() is None)
    finally:
        gc.enable()


# --- HTTP/2: what waits in the session ----------------------------------------------------------------------------


@pytest.fixture
def native(request: pytest.FixtureRequest) -> Iterator[Running]:
    settings = HttpSettings(write_stall_s=getattr(request, "param", 30.0))
    with running(transport="native", http=settings) as started:
        yield started


def held(server: Running) -> int:
    """Over both listeners."""
    grpc_server = server.grpc_server
    return server.http_server.unsent.total + (grpc_server.unsent.total if isinstance(grpc_server, NativeServer) else 0)


def held_in_the_turn_of_their_answers(server: Running) -> int:
    """Of all requests that wait to be answered: before any answer has been written."""

    def answered() -> int:
        server.port.answer_held()
        return held(server)

    return server.call(answered)


def echoed(size: int, model: str = "echo") -> bytes:
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=[1, size // 4])
    request.raw_input_contents.append(bytes(size))
    return http2.grpc_message(request.SerializeToString())


def test_a_window_that_stays_closed_holds_its_answer(native: Running) -> None:
    """Not a byte of it has left the session."""
    own = {http2.INITIAL_WINDOW_SIZE: 0}
    with Http2Wire(native.grpc, own, generous=False) as wire:
        wire.send(opened(1))
        wire.upload(1, echoed(4 * MIB))
        assert until(lambda: held(native) > 4 * MIB)
        wire.send(http2.window(0, 8 * MIB) + http2.window(1, 2 * MIB))
        assert until(lambda: 2 * MIB < held(native) < 3 * MIB)
        wire.send(http2.window(1, 4 * MIB))
        assert wire.answer(1).status == "0"
        assert until(lambda: held(native) == 0)


def test_a_session_without_its_connection_holds_nothing(native: Running) -> None:
    """Connections are known to what they call back: they stay until the collector comes round."""
    with Http2Wire(native.grpc, {http2.INITIAL_WINDOW_SIZE: 0}, generous=False) as wire:
        wire.send(opened(1))
        wire.upload(1, echoed(4 * MIB))
        assert until(lambda: held(native) > 4 * MIB)
        (connection,) = cast("NativeServer", native.grpc_server).live
    assert until(lambda: held(native) == 0)
    assert native.call(connection.session.queued) == 0
    assert not native.call(lambda: connection.session.head(1, []))


def test_many_small_answers_are_seen_too(native: Running) -> None:
    """Each is too small to be counted by itself."""
    own = {http2.INITIAL_WINDOW_SIZE: 0}
    with Http2Wire(native.grpc, own, generous=False) as wire:
        for stream_id in range(1, 201, 2):
            wire.send(opened(stream_id))
            wire.upload(stream_id, echoed(20_000))
        assert until(lambda: held(native) > 2_000_000)
        for stream_id in range(1, 201, 2):
            wire.send(http2.reset(stream_id))
        assert until(lambda: held(native) == 0)


def test_answers_of_one_turn_see_each_other_over_http2(native: Running) -> None:
    """None of them has been written yet."""
    with Http2Wire(native.grpc, {http2.INITIAL_WINDOW_SIZE: 0}, generous=False) as wire:
        for stream_id in (1, 3, 5):
            wire.send(opened(stream_id))
            wire.upload(stream_id, echoed(MIB, "held"))
        assert native.port.wait(lambda: len(native.port.held) == 3)
        assert 3 * MIB < held_in_the_turn_of_their_answers(native) < 3 * (MIB + HEAD)
        wire.send(http2.window(0, 8 * MIB) + b"".join(http2.window(i, 2 * MIB) for i in (1, 3, 5)))
        assert [wire.answer(i).status for i in (1, 3, 5)] == ["0"] * 3
    assert until(lambda: held(native) == 0)


class ListTicket(EchoTicket):
    """Its answer has many elements of BYTES."""

    def answer(self) -> None:
        model, elements = self.request.model, Tensor("s", "BYTES", (len(ELEMENTS),), ELEMENTS)
        if not self.ended:
            self.ended = True
            self.reply.message(InferenceResponse(model, "1", "", [elements]), Decision(model, "1", "stable", 7))
            self.reply.finish(None)


class Listing(EchoPort):
    """Holds every request."""

    def handle(self, permit: Permit, request: InferenceRequest, reply: Reply, received_ns: int = 0) -> EchoTicket:
        ticket = ListTicket(self, request, reply)
        self.held.append(ticket)
        self.notify()
        return ticket


#: What becomes of answers that no one has begun to write.
ENDS = pytest.mark.parametrize("end", ["read", "reset", "reset at once", "lost"])


def ended_over_http2(server: Running, wire: Http2Wire, owed: int, end: str) -> None:
    """Three calls wait to be answered: their answers count from that turn on, and no more when they have ended."""
    assert server.port.wait(lambda: len(server.port.held) == 3)
    resets = b"".join(http2.reset(i) for i in (1, 3, 5))
    (connection,) = cast("NativeServer", server.grpc_server).live

    def answered() -> int:
        server.port.answer_held()
        counted = held(server)
        if end == "reset at once":  # the tasks that were to write them have not begun
            connection.data_received(resets)
        return counted

    assert server.call(answered) == 3 * owed
    if end == "read":
        assert [wire.answer(i).status for i in (1, 3, 5)] in (["0"] * 3, ["200"] * 3)
    elif end == "reset":
        wire.send(resets)
    elif end == "lost":
        wire.socket.close()
    assert until(lambda: held(server) == 0)
    assert end == "lost" or connection in cast("NativeServer", server.grpc_server).live
    assert server.port.wait(lambda: len(server.port.released) == 3)


@ENDS
def test_answers_that_are_written_by_turns_count_before_theirs_has_come(end: str) -> None:
    with running(transport="native", port=Listing) as server, Http2Wire(server.grpc) as wire:
        for stream_id in (1, 3, 5):
            wire.send(opened(stream_id))
            wire.upload(stream_id, http2.grpc_message(message("held")))
        ended_over_http2(server, wire, ELEMENT_BYTES, end)


@ENDS
def test_answers_to_http_requests_over_http2_count_before_they_are_written(native: Running, end: str) -> None:
    head, _, body = large_request("held", MIB).partition(b"\r\n\r\n")
    size = head.rpartition(b" ")[2].decode()
    path = "/v2/models/held/infer"
    with Http2Wire(native.grpc) as wire:
        for stream_id in (1, 3, 5):
            wire.send(opened(stream_id, ("inference-header-content-length", size), path=path, grpc=False))
            wire.upload(stream_id, body)
        ended_over_http2(native, wire, MIB, end)


def test_pieces_of_an_answer_that_wait_for_those_before_them_count(native: Running) -> None:
    """Over HTTP/2 an app is made to wait while much of its answer is untaken: what it has yet to hand over counts."""
    values, sizes = bytes(2 * MIB), {"shape": [1, MIB // 2], "parameters": {"binary_data_size": 2 * MIB}}
    inputs = [{"name": name, "datatype": "FP32", **sizes} for name in ("x", "y")]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    size = ("inference-header-content-length", str(len(head)))
    with Http2Wire(native.grpc, {http2.INITIAL_WINDOW_SIZE: 0}, generous=False) as wire:
        wire.send(opened(1, size, path="/v2/models/echo/infer", grpc=False))
        wire.upload(1, head + values + values)
        (connection,) = cast("NativeServer", native.grpc_server).live
        assert until(lambda: 2 * MIB < native.call(connection.session.queued) < 2 * MIB + HEAD)
        assert 4 * MIB <= native.call(lambda: held(native)) < 4 * MIB + HEAD
        wire.send(http2.window(0, 8 * MIB) + http2.window(1, MIB + HEAD))
        assert until(lambda: 2 * MIB < held(native) <= 3 * MIB)
        wire.send(http2.window(1, 8 * MIB))
        assert wire.answer(1).body.endswith(values + values)
        assert until(lambda: held(native) == 0)


@pytest.mark.parametrize("native", [1.0], indirect=True)
def test_who_is_cut_off_over_http2_holds_nothing(native: Running) -> None:
    own = {http2.INITIAL_WINDOW_SIZE: 2**31 - 1}
    with Http2Wire(native.grpc, own, receive_buffer=4096, generous=False) as wire:
        wire.send(http2.window(0, 2**30) + opened(1))
        wire.upload(1, echoed(16 * MIB))
        assert until(lambda: held(native) > 4 * MIB)
        assert until(lambda: held(native) == 0)
        wire.closed()


# --- HTTP/1.1 -----------------------------------------------------------------------------------------------------


def large_request(model: str = "echo", size: int = ANSWER, **more: str) -> bytes:
    """Answered with as much as it says."""
    values = bytes(size)
    sizes = {"shape": [1, len(values) // 4], "parameters": {"binary_data_size": len(values)}}
    inputs = {"name": "x", "datatype": "FP32", **sizes}
    head = json.dumps({"inputs": [inputs], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), **more}
    return post(f"/v2/models/{model}/infer", head + values, headers)


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("transport", ["native", "reference"])
def test_answers_of_one_turn_see_each_other_over_http1(transport: str, leaves: bool) -> None:
    """They count while they are still being written down, until they are read or their readers leave.

    Readers who only close are still written to: these are gone at once, and sooner than their answers are compressed.
    """
    coding = "gzip" if leaves else "identity"
    with running(transport=transport) as server:
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(f"{server.http[0]}:{server.http[1]}")) for _ in range(3)]
            for wire in wires:
                wire.send(large_request("held", **{"Accept-Encoding": coding}))
            assert server.port.wait(lambda: len(server.port.held) == 3)
            assert held_in_the_turn_of_their_answers(server) == 3 * ANSWER
            for wire in () if leaves else wires:
                answer = wire.answer()
                assert answer is not None
                assert answer.body[-ANSWER:] == np.ones(ANSWER // 4, "<f4").tobytes()
            for wire in wires if leaves else ():
                wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            assert leaves or until(lambda: held(server) == 0)
        assert until(lambda: held(server) == 0)


@pytest.mark.parametrize("transport", ["native", "reference"])
def test_an_answer_behind_one_that_is_not_read_counts_too(transport: str) -> None:
    """The second waits in its task until the socket takes more."""
    with running(transport=transport) as server:
        with Wire(f"{server.http[0]}:{server.http[1]}", receive_buffer=4096) as wire:
            wire.send(large_request())
            assert until(lambda: held(server) > 4 * MIB)
            wire.send(large_request())
            assert until(lambda: held(server) > 4 * MIB + ANSWER)
        assert until(lambda: held(server) == 0)


@pytest.mark.parametrize("transport", ["native", "reference"])
def test_a_rest_that_the_socket_is_about_to_take_is_not_held(transport: str) -> None:
    """So little that writing is not paused for it: nobody would tell when it is gone."""
    with running(transport=transport) as server:
        address, asked = f"{server.http[0]}:{server.http[1]}", 8 * MIB
        with Wire(address, receive_buffer=4096) as wire:
            wire.send(large_request(size=asked))
            assert until(lambda: 0 < held(server) < asked)
            room = asked - held(server)  # what sockets take of it
        assert until(lambda: held(server) == 0)
        with Wire(address, receive_buffer=4096) as wire:
            wire.send(large_request(size=room // 4 * 4 + 32 * 1024))
            assert server.port.wait(lambda: len(server.port.released) == 2)
            answer = wire.answer()
            assert answer is not None
            assert answer.status == 200
            assert server.call(lambda: held(server)) == 0


@pytest.mark.parametrize("native", [1.0], indirect=True)
def test_who_is_cut_off_over_http1_holds_nothing(native: Running) -> None:
    with Wire(f"{native.http[0]}:{native.http[1]}", receive_buffer=4096) as wire:
        wire.send(large_request())
        assert until(lambda: held(native) > 4 * MIB)
        assert until(lambda: held(native) == 0)
        assert wire.closed()


@pytest.mark.parametrize("transport", ["native", "reference"])
def test_an_answer_that_is_read_longer_than_a_connection_may_be_idle_is_whole(transport: str) -> None:
    settings = HttpSettings(keep_alive_s=0.4)
    with running(transport=transport, http=settings) as server:
        with Wire(f"{server.http[0]}:{server.http[1]}", receive_buffer=4096) as wire:
            wire.send(large_request())
            assert until(lambda: server.http_server.unsent.total > 4 * MIB)
            threading.Event().wait(1.5)  # as a slow link would; well under what counts as a stall
            answer = wire.answer()
            assert answer is not None
            assert len(answer.body) > 16 * MIB
            assert wire.closed()  # idle now
        assert server.http_server.unsent.total == 0
