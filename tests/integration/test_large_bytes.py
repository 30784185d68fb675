"""BYTES tensors of many elements over real sockets: small requests are answered meanwhile, and no rule changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import grpc
import pytest

from server._pb import inference_pb2 as pb
from server.codec.binary import encode_bytes
from server.codec.process.steps import Steps
from server.transport.http_infer import ANSWERED_LATE, DECODED_LATE
from server.transport.native.server import NativeServer
from server.transport.reference.grpcio import GrpcServer
from server.types import Permit, Reply
from tests.support.echo import EchoPort, EchoTicket, Running, running
from tests.support.http2 import DATA, END_STREAM, Http2Wire, frame, grpc_message, opened
from tests.support.routed import eventually
from tests.support.wire import Answer, Wire, post

ELEMENTS = [b"%d" % i for i in range(100_000)]
RAW = encode_bytes(ELEMENTS)
SMALL = json.dumps({"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}]}).encode()
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
#: Long enough for a large request to come and to be begun, on whatever machine: it is to pass while that waits.
SHORT_MS = 2000


class Counting(EchoPort):
    """Remembers how many requests came as far as this."""

    handled = 0

    def handle(self, permit: Permit, request: Any, reply: Reply, received_ns: int = 0) -> EchoTicket:
        self.handled += 1
        try:
            return super().handle(permit, request, reply)
        finally:
            self.notify()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(transport="native", port=Counting) as started:
        yield started


@pytest.fixture(scope="module", params=["native", "reference"])
def called(server: Running, request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """Where gRPC is served: by ``server`` itself, or by the reference, which shares its models and its turns."""
    if request.param == "native":
        yield server.grpc
        return
    turns = cast("NativeServer", server.http_server).infer.turns
    reference = server.call(lambda: GrpcServer(server.port, server.services, turns=turns))
    address = server.run(reference.start("127.0.0.1", 0))
    yield address
    server.run(reference.drain(0.5))


@pytest.fixture(autouse=True)
def settled(server: Running) -> Iterator[None]:
    """Every permit given was released, and every request that was begun was ended."""
    yield
    port = server.port
    assert port.wait(lambda: len(port.admitted) == len(port.released))


def grpc_request(*, raw: bytes = RAW, count: int = len(ELEMENTS), model: str = "echo", id: str = "") -> bytes:
    request = pb.ModelInferRequest(model_name=model, id=id)
    request.inputs.add(name="s", datatype="BYTES", shape=[count])
    request.raw_input_contents.append(raw)
    return request.SerializeToString()


def grpc_small() -> bytes:
    request = pb.ModelInferRequest(model_name="affine")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    request.raw_input_contents.append(bytes(4))
    return request.SerializeToString()


def http_request(
    *, raw: bytes = RAW, headers: dict[str, str] | None = None, binary: bool = True, model: str = "echo"
) -> bytes:
    entry = {"name": "s", "shape": [len(ELEMENTS)], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    text = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": binary}}).encode()
    length = {"Inference-Header-Content-Length": str(len(text))}
    return post(f"/v2/models/{model}/infer", text + raw, length | (headers or {}))


def handled(server: Running) -> int:
    return cast("Counting", server.port).handled


@contextmanager
def held(server: Running) -> Iterator[None]:
    """Nobody gets a turn but this, which takes one after the other."""
    over = False

    def endless() -> Steps[None]:
        while not over:
            yield

    async def begin() -> Any:
        return server.loop.create_task(turns.take(endless()))

    turns = cast("NativeServer", server.http_server).infer.turns
    task = server.run(begin())
    try:
        yield
    finally:
        over = True
        server.run(task)


# --- over gRPC -------------------------------------------------------------------------------------------------------


def test_a_small_call_behind_a_large_one_is_answered_before_it(server: Running) -> None:
    """In one stream of bytes, so that the order in which they come is sure. The large one has a short answer."""
    with Http2Wire(server.grpc) as wire:
        whole = grpc_message(grpc_request(model="affine"))
        wire.send(opened(1))
        wire.upload(1, whole[:-1], end=False)
        small = opened(3) + frame(DATA, END_STREAM, 3, grpc_message(grpc_small()))
        wire.send(frame(DATA, END_STREAM, 1, whole[-1:]) + small)
        assert wire.answer(3).status == "0"
        assert 1 not in wire.answers
        assert wire.answer(1).headers["grpc-message"] == "input 's' wants FP32, got BYTES"


def test_a_small_message_is_answered_while_a_large_answer_is_written(server: Running, called: tuple[str, int]) -> None:
    """Typed contents come as elements: nothing is read by turns, so that it must be the answer that waits."""
    request = pb.ModelInferRequest(model_name="echo")
    entry = request.inputs.add(name="s", datatype="BYTES", shape=[len(ELEMENTS)])
    entry.contents.bytes_contents.extend(ELEMENTS)
    with Http2Wire(called) as wire:
        wire.send(opened(1))
        with held(server):
            wire.upload(1, grpc_message(request.SerializeToString()))
            assert wire.call(3, grpc_small()).status == "0"
            wire.settled()
            assert 1 not in wire.answers
        answer = pb.ModelInferResponse.FromString(wire.answer(1).body[5:])
        assert answer.raw_output_contents[0] == RAW


def test_messages_of_a_stream_keep_their_order(server: Running, called: tuple[str, int]) -> None:
    other = pb.ModelInferRequest(model_name="affine", id="small")
    other.MergeFromString(grpc_small())
    with grpc.insecure_channel("{}:{}".format(*called)) as channel:
        call = channel.stream_stream(STREAM)(
            iter([grpc_request(id="large"), other.SerializeToString(), grpc_request(id="last", raw=RAW[:-1])]),
            timeout=30,
        )
        answers = [pb.ModelStreamInferResponse.FromString(raw) for raw in call]
    assert [answer.infer_response.id for answer in answers] == ["large", "small", "last"]
    assert answers[0].infer_response.raw_output_contents[0] == RAW
    assert "element 99999 goes past the end" in answers[2].error_message


def test_streams_wait_for_their_turn_too(server: Running, called: tuple[str, int]) -> None:
    with grpc.insecure_channel("{}:{}".format(*called)) as channel:
        with held(server):
            before = handled(server)
            call = channel.stream_stream(STREAM)(iter([grpc_request(id="large"), grpc_small()]), timeout=30)
            port = server.port
            assert port.wait(lambda: len(port.admitted) > len(port.released))
            with Http2Wire(called) as wire:
                for i in range(1, 40, 2):
                    assert wire.call(i, grpc_small()).status == "0"
            assert handled(server) == before + 20
        answers = [pb.ModelStreamInferResponse.FromString(raw).infer_response for raw in call]
        assert [answer.id for answer in answers] == ["large", ""]
        assert answers[0].raw_output_contents[0] == RAW


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_damaged_contents_are_refused(server: Running, called: tuple[str, int], compression: grpc.Compression) -> None:
    with grpc.insecure_channel("{}:{}".format(*called)) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as refused:
            ask(grpc_request(raw=RAW + b"x"), timeout=30, compression=compression)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.value.details() == "input 's': 1 bytes are left over after 100000 BYTES elements"
        assert pb.ModelInferResponse.FromString(ask(grpc_request(), timeout=30)).raw_output_contents[0] == RAW


def test_a_deadline_of_a_call_that_waits_for_its_turn(server: Running, called: tuple[str, int]) -> None:
    """The client's own clock is not asked: it would have told the same without the server."""
    port, seen = server.port, handled(server)
    with Http2Wire(called) as wire, held(server):
        wire.send(opened(1, ("grpc-timeout", str(SHORT_MS) + "m")))
        wire.upload(1, grpc_message(grpc_request()))
        assert wire.call(3, grpc_small()).status == "0"
        answer = wire.answer(1)
        assert answer.status == "4"
        # In the reference, gRPC's core ends calls by itself.
        assert answer.headers["grpc-message"] == (DECODED_LATE if called == server.grpc else "Deadline Exceeded")
        assert port.wait(lambda: len(port.admitted) == len(port.released))
    assert handled(server) == seen + 1


def test_a_cancelled_call_gives_its_turn_back(server: Running, called: tuple[str, int]) -> None:
    port = server.port
    before, seen = len(port.released), handled(server)
    with Http2Wire(called) as wire:
        with held(server):
            for stream in (1, 3):
                wire.send(opened(stream))
                wire.upload(stream, grpc_message(grpc_request()))
            assert port.wait(lambda: len(port.admitted) == before + 2)
            wire.send(frame(3, 0, 1, (8).to_bytes(4)))
            assert port.wait(lambda: len(port.released) == before + 1)
        assert wire.answer(3).status == "0"
        assert handled(server) == seen + 1


# --- over HTTP -------------------------------------------------------------------------------------------------------


def http_wire(server: Running) -> Wire:
    return Wire("{}:{}".format(*server.http))


def answer_of(wire: Wire) -> Answer:
    """The next answer but the one to ``Expect``."""
    answer = wire.answer()
    if answer is not None and answer.status == 100:
        answer = wire.answer()
    assert answer is not None
    return answer


def binary_of(answer: Answer) -> bytes:
    """What follows the JSON part."""
    assert answer.status == 200, answer
    return bytes(answer.body[int(answer.headers["inference-header-content-length"]) :])


WAYS = {"taken in front": {}, "through the app": {"Expect": "100-continue"}}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_small_request_is_answered_while_a_large_one_waits(server: Running, way: str) -> None:
    with http_wire(server) as large, http_wire(server) as small:
        with held(server):
            before = handled(server)
            large.send(http_request(headers=WAYS[way], model="affine"))
            port = server.port
            assert port.wait(lambda: len(port.admitted) > len(port.released))
            for _ in range(20):
                small.send(post("/v2/models/affine/infer", SMALL))
                assert answer_of(small).status == 200
            assert handled(server) == before + 20
        assert answer_of(large).body == {"error": "input 's' wants FP32, got BYTES"}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_deadline_that_passes_meanwhile(server: Running, way: str) -> None:
    with http_wire(server) as wire:
        with held(server):
            wire.send(http_request(headers=WAYS[way] | {"x-tidegate-timeout-ms": str(SHORT_MS)}))
            answer = answer_of(wire)
            assert answer.status == 504
            assert answer.body == {"error": DECODED_LATE}
        wire.send(http_request())
        assert binary_of(answer_of(wire)) == RAW


def test_a_deadline_of_an_answer_that_waits_for_its_turn(server: Running) -> None:
    """JSON comes as elements: nothing is read by turns, so that it must be the answer that waits."""
    document = {
        "inputs": [{"name": "s", "shape": [5000], "datatype": "BYTES", "data": ["a"] * 5000}],
        "parameters": {"binary_data_output": True},
    }
    body = json.dumps(document).encode()
    with http_wire(server) as wire:
        with held(server):
            wire.send(post("/v2/models/echo/infer", body, {"x-tidegate-timeout-ms": str(SHORT_MS)}))
            answer = answer_of(wire)
            assert answer.status == 504
            assert answer.body == {"error": ANSWERED_LATE}
        wire.send(post("/v2/models/echo/infer", body))
        assert binary_of(answer_of(wire)) == encode_bytes([b"a"] * 5000)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_an_answer_that_waits_to_be_written_counts_with_its_bytes(server: Running, way: str) -> None:
    """JSON comes as elements: nothing is read by turns, so that it is the answer that waits."""
    elements = ["a" * 100] * 5000
    values = {"name": "s", "shape": [5000], "datatype": "BYTES", "data": elements}
    body = json.dumps({"inputs": [values], "parameters": {"binary_data_output": True}}).encode()
    unsent = server.http_server.unsent
    with http_wire(server) as wire:
        with held(server):
            wire.send(post("/v2/models/echo/infer", body, WAYS[way]))
            eventually(lambda: server.call(lambda: unsent.total) > 0)
            assert server.call(lambda: unsent.total) == 5000 * 104
        assert len(binary_of(answer_of(wire))) == 5000 * 104
    eventually(lambda: server.call(lambda: unsent.total == 0))


def test_an_answer_over_grpc_that_waits_to_be_written_counts_with_its_bytes(server: Running) -> None:
    request = pb.ModelInferRequest(model_name="echo")
    entry = request.inputs.add(name="s", datatype="BYTES", shape=[5000])
    entry.contents.bytes_contents.extend([b"a" * 100] * 5000)
    unsent = cast("NativeServer", server.grpc_server).unsent
    with Http2Wire(server.grpc) as wire:
        with held(server):
            wire.send(opened(1))
            wire.upload(1, grpc_message(request.SerializeToString()))
            eventually(lambda: server.call(lambda: unsent.total) > 0)
            assert server.call(lambda: unsent.total) == 5000 * 104
        answer = wire.answer(1)
        assert answer.status == "0"
    eventually(lambda: server.call(lambda: unsent.total == 0))


def test_a_client_that_leaves_gives_its_turn_back(server: Running) -> None:
    port = server.port
    before, seen = len(port.released), handled(server)
    with held(server):
        with http_wire(server) as wire:
            wire.send(http_request())
            assert port.wait(lambda: len(port.admitted) == before + 1)
        assert port.wait(lambda: len(port.released) == before + 1)
    with http_wire(server) as wire:
        wire.send(http_request())
        assert binary_of(answer_of(wire)) == RAW
    assert handled(server) == seen + 1


def test_a_client_that_leaves_before_its_answer_is_written(server: Running) -> None:
    """Nothing is left that waits for a turn."""
    values = {"name": "s", "shape": [5000], "datatype": "BYTES", "data": ["a"] * 5000}
    body = json.dumps({"inputs": [values], "parameters": {"binary_data_output": True}}).encode()
    port = server.port
    with held(server):
        before, tasks = len(port.released), tasks_of(server)
        with http_wire(server) as wire:
            seen = handled(server)
            wire.send(post("/v2/models/echo/infer", body))
            assert port.wait(lambda: handled(server) == seen + 1)
            assert tasks_of(server) == tasks + 1
        assert port.wait(lambda: len(port.released) == before + 1)
        assert tasks_of(server) == tasks


def tasks_of(server: Running) -> int:
    return server.call(lambda: len(asyncio.all_tasks(server.loop)))


def test_damaged_contents_over_http(server: Running) -> None:
    with http_wire(server) as wire:
        wire.send(http_request(raw=RAW[:-1]))
        answer = answer_of(wire)
        assert answer.status == 400
        assert "element 99999 goes past the end of the data" in answer.body["error"]
        wire.send(http_request(binary=False))
        assert answer_of(wire).body["outputs"][0]["data"] == [element.decode() for element in ELEMENTS]


class Breaks(EchoPort):
    """Raises where a request is handed over, which no port may."""

    def handle(self, permit: Permit, request: Any, reply: Reply, received_ns: int = 0) -> EchoTicket:
        raise RuntimeError("secret")


def test_what_goes_wrong_unexpectedly_is_told_without_its_text() -> None:
    with running(transport="native", port=Breaks) as server:
        with http_wire(server) as wire:
            wire.send(http_request())
            answer = answer_of(wire)
            assert answer.status == 500
            assert "secret" not in answer.body["error"]
        with Http2Wire(server.grpc) as calls:
            calls.send(opened(1))
            calls.upload(1, grpc_message(grpc_request()))
            assert calls.answer(1).status == "13"
            assert "secret" not in calls.answer(1).headers["grpc-message"]
