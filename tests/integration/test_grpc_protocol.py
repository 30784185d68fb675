"""The gRPC side of the reference transport over real channels: rpcs, streams, health, reflection, and wrong bytes."""

from __future__ import annotations

import asyncio
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from types import FrameType
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.message import Message

from server._pb import health_pb2, reflection_pb2, reflection_v1alpha_pb2
from server._pb import inference_pb2 as pb
from server.errors import TidegateError
from server.transport.native.h2 import Http2Settings
from server.transport.reference.grpcio import GrpcServer, GrpcSettings
from server.transport.status import StatusTable
from server.types import Decision, InferenceRequest, InferenceResponse, Permit, Reply, RequestLimits, Tensor
from tests.support import http2
from tests.support.admitting import ROOM, Admitting, has_room, refusals
from tests.support.echo import MODELS, EchoTicket, Running, running
from tests.support.garbage import cycles
from tests.support.http2 import PING, Http2Wire

LIMITS = RequestLimits(max_body_bytes=1024 * 1024)
SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
STREAM = f"/{SERVICE.full_name}/ModelStreamInfer"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = {
    "v1": ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", reflection_pb2),
    "v1alpha": ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", reflection_v1alpha_pb2),
}
UNARY = [f"/{SERVICE.full_name}/{m.name}" for m in SERVICE.methods if m.name != "ModelStreamInfer"]
UNARY += ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List"]
STREAMS = [WATCH, *(path for path, _ in REFLECTION.values())]


TRANSPORTS = ["native", "reference"]


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(limits=LIMITS, transport=request.param) as started:
        yield started


@pytest.fixture(scope="module")
def channel(server: Running) -> Iterator[grpc.Channel]:
    with connect(server) as opened:
        yield opened


def connect(server: Running) -> grpc.Channel:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    return grpc.insecure_channel(f"{server.grpc[0]}:{server.grpc[1]}", options=options)


def call(channel: grpc.Channel, name: str, request: Message, answer: Callable[[bytes], Any], **options: Any) -> Any:
    path = name if name.startswith("/") else f"/{SERVICE.full_name}/{name}"
    return answer(channel.unary_unary(path)(request.SerializeToString(), timeout=30, **options))


def refused(channel: grpc.Channel, name: str, request: Message) -> tuple[str, str]:
    """Code and text of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, name, request, lambda raw: raw)
    return caught.value.code().name, caught.value.details()


def infer_request(model: str = "affine", values: tuple[float, ...] = (1, 2.5), **fields: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, **fields)
    request.inputs.add(name="x", datatype="FP32", shape=[1, len(values)])
    request.raw_input_contents.append(np.array(values, "<f4").tobytes())
    return request


def outputs(response: pb.ModelInferResponse) -> list[float]:
    values: list[float] = np.frombuffer(response.raw_output_contents[0], "<f4").tolist()
    return values


def settled(server: Running) -> bool:
    """Every permit given was released exactly once."""
    port = server.port
    return port.wait(lambda: len(port.admitted) == len(port.released)) and len(set(port.released)) == len(port.released)


# --- unary ---


def test_health_and_metadata(channel: grpc.Channel) -> None:
    assert call(channel, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse.FromString).live
    assert call(channel, "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse.FromString).ready
    answer = call(channel, "ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse.FromString)
    assert (answer.name, answer.version, list(answer.extensions)) == (
        "echo-server",
        "1.2.3",
        ["binary_tensor_data", "statistics"],
    )
    answer = call(channel, "ModelMetadata", pb.ModelMetadataRequest(name="affine"), pb.ModelMetadataResponse.FromString)
    assert (answer.name, list(answer.versions), answer.platform) == ("affine", ["1"], "onnxruntime_onnx")
    assert [(i.name, i.datatype, list(i.shape)) for i in answer.inputs] == [("x", "FP32", [-1, -1])]
    assert [(o.name, o.datatype, list(o.shape)) for o in answer.outputs] == [("y", "FP32", [-1, -1])]


@pytest.mark.parametrize(("name", "ready"), [("affine", True), ("none", False), ("nothing", False)])
def test_model_ready_of_unknown_is_false(channel: grpc.Channel, name: str, ready: bool) -> None:
    answer = call(channel, "ModelReady", pb.ModelReadyRequest(name=name), pb.ModelReadyResponse.FromString)
    assert answer.ready is ready


def test_config_statistics_and_index(channel: grpc.Channel) -> None:
    config = call(channel, "ModelConfig", pb.ModelConfigRequest(name="affine"), pb.ModelConfigResponse.FromString)
    assert (config.config.name, config.config.max_batch_size) == ("affine", 64)
    every = call(channel, "ModelStatistics", pb.ModelStatisticsRequest(), pb.ModelStatisticsResponse.FromString)
    assert [entry.name for entry in every.model_stats] == list(MODELS)
    assert every.model_stats[0].inference_stats.success.ns == 2**60
    index = call(channel, "RepositoryIndex", pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse.FromString)
    assert [model.name for model in index.models] == list(MODELS)
    index = call(
        channel, "RepositoryIndex", pb.RepositoryIndexRequest(ready=True), pb.RepositoryIndexResponse.FromString
    )
    assert len(index.models) == len(MODELS) - 1


def test_load_and_unload_reach_the_control(server: Running, channel: grpc.Channel) -> None:
    server.control.calls.clear()
    load = pb.RepositoryModelLoadRequest(model_name="affine")
    call(channel, "RepositoryModelLoad", load, pb.RepositoryModelLoadResponse.FromString)
    unload = pb.RepositoryModelUnloadRequest(model_name="affine")
    unload.parameters["unload_dependents"].bool_param = True
    call(channel, "RepositoryModelUnload", unload, pb.RepositoryModelUnloadResponse.FromString)
    assert server.control.calls == [("load", "affine", {}), ("unload", "affine", True)]


def load_with(name: str, **value: Any) -> pb.RepositoryModelLoadRequest:
    request = pb.RepositoryModelLoadRequest(model_name="affine")
    request.parameters[name].CopyFrom(pb.ModelRepositoryParameter(**value))
    return request


@pytest.mark.parametrize(
    ("name", "request_", "code", "text"),
    [
        ("ModelReady", pb.ModelReadyRequest(name="affine", version="x"), "INVALID_ARGUMENT", "decimal number"),
        ("ModelMetadata", pb.ModelMetadataRequest(name="no"), "NOT_FOUND", "Request for unknown model"),
        ("ModelMetadata", pb.ModelMetadataRequest(name="affine", version="9"), "NOT_FOUND", "unknown model"),
        ("ModelMetadata", pb.ModelMetadataRequest(name="broken"), "INTERNAL", "internal error, id "),
        ("ModelConfig", pb.ModelConfigRequest(name="affine", version="-1"), "INVALID_ARGUMENT", "decimal"),
        ("ModelStatistics", pb.ModelStatisticsRequest(name="no"), "NOT_FOUND", "unknown model"),
        ("RepositoryIndex", pb.RepositoryIndexRequest(repository_name="r"), "UNIMPLEMENTED", "repository"),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="no"), "NOT_FOUND", "no such model"),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="../x"), "INVALID_ARGUMENT", "slash"),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(), "INVALID_ARGUMENT", "1 to 255"),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="locked"), "FAILED_PRECONDITION", "off"),
        ("RepositoryModelLoad", load_with("config", string_param="{}"), "INVALID_ARGUMENT", "config"),
        ("RepositoryModelLoad", load_with("file:1/m", bytes_param=b"x"), "INVALID_ARGUMENT", "boolean, integer"),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=".."), "INVALID_ARGUMENT", "dot"),
        ("TraceSetting", pb.TraceSettingRequest(model_name="no"), "NOT_FOUND", "unknown model"),
        ("SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterRequest(), "UNIMPLEMENTED", "shared memory"),
        ("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(), "UNIMPLEMENTED", "shared memory"),
        ("CudaSharedMemoryRegister", pb.CudaSharedMemoryRegisterRequest(), "UNIMPLEMENTED", "shared memory"),
        ("CudaSharedMemoryUnregister", pb.CudaSharedMemoryUnregisterRequest(), "UNIMPLEMENTED", "shared memory"),
        ("Nothing", pb.ServerLiveRequest(), "UNIMPLEMENTED", ""),
        ("/other.Service/Call", pb.ServerLiveRequest(), "UNIMPLEMENTED", ""),
        ("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service="x"), "NOT_FOUND", "unknown service"),
    ],
)
def test_wrong_calls(channel: grpc.Channel, name: str, request_: Message, code: str, text: str) -> None:
    got = refused(channel, name, request_)
    assert got[0] == code
    assert text in got[1]
    assert "secret" not in got[1]


def test_shared_memory_status_is_empty(channel: grpc.Channel) -> None:
    for kind in ("System", "Cuda"):
        request = getattr(pb, f"{kind}SharedMemoryStatusRequest")()
        answer = getattr(pb, f"{kind}SharedMemoryStatusResponse")
        assert not call(channel, f"{kind}SharedMemoryStatus", request, answer.FromString).regions


def test_trace_and_log_settings(channel: grpc.Channel) -> None:
    change = pb.TraceSettingRequest(model_name="echo")
    change.settings["trace_rate"].value.append("5")
    answer = call(channel, "TraceSetting", change, pb.TraceSettingResponse.FromString)
    assert list(answer.settings["trace_rate"].value) == ["5"]
    assert list(answer.settings["trace_level"].value) == ["OFF"]
    clear = pb.TraceSettingRequest(model_name="echo")
    clear.settings["trace_rate"].SetInParent()
    answer = call(channel, "TraceSetting", clear, pb.TraceSettingResponse.FromString)
    assert list(answer.settings["trace_rate"].value) == ["1000"]
    log = pb.LogSettingsRequest()
    log.settings["log_verbose_level"].uint32_param = 3
    log.settings["log_info"].bool_param = False
    log.settings["log_format"].string_param = "ISO8601"
    answer = call(channel, "LogSettings", log, pb.LogSettingsResponse.FromString)
    assert answer.settings["log_verbose_level"].uint32_param == 3
    assert answer.settings["log_info"].bool_param is False
    assert answer.settings["log_format"].string_param == "ISO8601"
    log = pb.LogSettingsRequest()
    log.settings["log_file"].string_param = "/tmp/x"
    assert refused(channel, "LogSettings", log) == (
        "INVALID_ARGUMENT",
        "setting 'log_file' cannot be changed by a client",
    )


@pytest.mark.parametrize("path", UNARY)
def test_bytes_that_are_no_message(server: Running, channel: grpc.Channel, path: str) -> None:
    """INVALID_ARGUMENT, or an ordinary answer where chance made a message; never UNKNOWN, never INTERNAL."""
    rng = random.Random(path)
    wrong = [
        b"\xff",
        b"\x0a\xff\xff\xff\xff\x7f",
        b"\x0a\x02\xff\xfe",
        *(rng.randbytes(rng.randint(1, 60)) for _ in range(25)),
    ]
    codes = [_code(partial(channel.unary_unary(path), raw, timeout=30)) for raw in wrong]
    assert codes[:2] == ["INVALID_ARGUMENT"] * 2
    assert set(codes) <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}
    assert outputs(call(channel, "ModelInfer", infer_request(), pb.ModelInferResponse.FromString)) == [3.0, 6.0]
    assert settled(server)


@pytest.mark.parametrize("path", STREAMS)
def test_bytes_that_are_no_message_on_streams(channel: grpc.Channel, path: str) -> None:
    opened = channel.unary_stream(path) if path == WATCH else channel.stream_stream(path)
    raw = b"\x0a\xff\xff"
    assert _code(lambda: list(opened(raw if path == WATCH else iter([raw]), timeout=30))) == "INVALID_ARGUMENT"


def _code(work: Callable[[], object]) -> str:
    try:
        work()
    except grpc.RpcError as error:
        name: str = error.code().name
        return name
    return "OK"


# --- inference ---


@pytest.mark.parametrize("model", ["affine", "later"])
def test_infer_answers_with_initial_metadata(server: Running, channel: grpc.Channel, model: str) -> None:
    request = infer_request(model, id="7", model_version="1").SerializeToString()
    raw, done = channel.unary_unary(f"/{SERVICE.full_name}/ModelInfer").with_call(
        request, timeout=1000, metadata=(("traceparent", "00-aa"), ("x", "1"), ("x", "2"), ("y-bin", b"\x00"))
    )
    response = pb.ModelInferResponse.FromString(raw)
    assert (response.model_name, response.model_version, response.id) == (model, "1", "7")
    assert outputs(response) == [3.0, 6.0]
    headers = dict(done.initial_metadata())
    assert settled(server)
    assert headers["x-tidegate-id"] in server.port.released
    assert (headers["x-tidegate-version"], headers["x-tidegate-arm"]) == ("1", "stable")
    assert headers["x-tidegate-generation"] == "7"
    assert headers["traceresponse"] == "00-aa"
    head = server.port.admitted[-1]
    assert (head.protocol, head.metadata["x"], "y-bin" in head.metadata) == ("grpc", "1, 2", False)
    # Sent in few digits, rounded up, and some of it was over on arrival.
    assert 900 * 10**9 < head.deadline_ns - head.received_ns < 1_020 * 10**9


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (infer_request("nothing"), "NOT_FOUND", "Request for unknown model"),
        (infer_request(model_version="x"), "INVALID_ARGUMENT", "decimal number"),
        (infer_request(model_version="2"), "NOT_FOUND", "unknown model"),
        (infer_request("full"), "UNAVAILABLE", "Exceeds maximum queue size"),
        (infer_request("broken"), "INTERNAL", "internal error, id echo-"),
        (infer_request("none"), "INTERNAL", "internal error, id echo-"),
        (infer_request("many"), "UNIMPLEMENTED", "several answers"),
        (infer_request("n\u00f6\u2603" * 5000), "NOT_FOUND", "..."),
        (pb.ModelInferRequest(model_name="affine"), "INVALID_ARGUMENT", "input"),
    ],
)
def test_errors_of_infer_carry_an_id(
    server: Running, channel: grpc.Channel, request_: pb.ModelInferRequest, code: str, text: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, "ModelInfer", request_, lambda raw: raw)
    error = caught.value
    assert (error.code().name, text in error.details()) == (code, True), error.details()
    assert settled(server)
    assert dict(error.initial_metadata())["x-tidegate-id"] in server.port.released
    assert ("retry-after" in dict(error.trailing_metadata())) == (code == "UNAVAILABLE")


def test_refused_admission_has_an_id_too(server: Running, channel: grpc.Channel) -> None:
    server.call(lambda: setattr(server.port, "max_in_flight", 0))
    try:
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, "ModelInfer", infer_request(), lambda raw: raw)
    finally:
        server.call(lambda: setattr(server.port, "max_in_flight", 10_000))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(caught.value.initial_metadata())["x-tidegate-id"]
    assert dict(caught.value.trailing_metadata())["retry-after"] == "3"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_shedding_is_resource_exhausted_where_the_operator_wants_it(transport: str) -> None:
    with running(statuses=StatusTable(shed_as_429=True), transport=transport) as server, connect(server) as channel:
        assert refused(channel, "ModelInfer", infer_request("full"))[0] == "RESOURCE_EXHAUSTED"


def test_message_over_the_limit(server: Running, channel: grpc.Channel) -> None:
    large = infer_request(values=(1.0,) * 300_000)
    admitted = len(server.port.admitted)
    assert refused(channel, "ModelInfer", large)[0] == "RESOURCE_EXHAUSTED"
    assert len(server.port.admitted) == admitted
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, "ModelInfer", large, lambda raw: raw, compression=compression)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.port.wait(lambda: len(server.port.released) == len(server.port.admitted))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_only_inference_takes_large_messages(compression: grpc.Compression, transport: str) -> None:
    """What nobody admits is small, packed or not."""
    large = pb.ModelMetadataRequest(name="x" * 1024 * 1024)
    with running(transport=transport) as server, connect(server) as channel:
        with pytest.raises(grpc.RpcError, match="over the limit of 1048576 bytes") as caught:
            call(channel, "ModelMetadata", large, lambda raw: raw, compression=compression)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        just = pb.ModelMetadataRequest(name="x" * (1024 * 1024 - 4))
        assert just.ByteSize() == 1024 * 1024
        assert refused(channel, "ModelMetadata", just)[0] == "NOT_FOUND"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compression_both_ways(compression: grpc.Compression, transport: str) -> None:
    """Of answers on the reference only, which has it from its library; requests may be compressed on both."""
    settings = GrpcSettings(compression=compression.name.lower())
    with running(grpc=settings, transport=transport) as server, connect(server) as channel:
        request = infer_request(values=(1.0,) * 20_000)
        answer = call(channel, "ModelInfer", request, pb.ModelInferResponse.FromString, compression=compression)
    assert outputs(answer) == [3.0] * 20_000


def test_cancel_and_deadline_cancel_the_request(server: Running, channel: grpc.Channel) -> None:
    infer = channel.unary_unary(f"/{SERVICE.full_name}/ModelInfer")
    waiting = infer.future(infer_request("held", id="c1").SerializeToString(), timeout=30)
    assert server.port.wait(lambda: bool(server.port.held))
    waiting.cancel()
    assert server.port.wait(lambda: "c1" in server.port.cancelled)
    assert _code(lambda: infer(infer_request("held", id="c2").SerializeToString(), timeout=1.0)) == "DEADLINE_EXCEEDED"
    assert server.port.wait(lambda: "c2" in server.port.cancelled)
    assert settled(server)
    server.call(server.port.answer_held)


def test_many_calls_at_once(server: Running, channel: grpc.Channel) -> None:
    def one(i: int) -> bool:
        request = infer_request("later" if i % 2 else "affine", (float(i),), id=str(i))
        answer = call(channel, "ModelInfer", request, pb.ModelInferResponse.FromString)
        return (answer.id, outputs(answer)) == (str(i), [2.0 * i + 1])

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(300)))
    assert settled(server)


# --- streams ---


class Stream:
    """A bidirectional call whose requests are sent when the test says so."""

    def __init__(self, channel: grpc.Channel, path: str = STREAM) -> None:
        self._more = threading.Condition()
        self._requests: list[bytes | None] = []
        self.call = channel.stream_stream(path)(self._sending(), timeout=20)

    def _sending(self) -> Iterator[bytes]:
        while True:
            with self._more:
                self._more.wait_for(lambda: self._requests)
                raw = self._requests.pop(0)
            if raw is None:
                return
            yield raw

    def send(self, raw: bytes | None) -> None:
        with self._more:
            self._requests.append(raw)
            self._more.notify()

    def close(self) -> None:
        self.send(None)

    def read(self) -> pb.ModelStreamInferResponse:
        return pb.ModelStreamInferResponse.FromString(next(self.call))

    def rest(self) -> list[pb.ModelStreamInferResponse]:
        return [pb.ModelStreamInferResponse.FromString(raw) for raw in self.call]


def test_stream_answers_in_request_order_and_survives_errors(server: Running, channel: grpc.Channel) -> None:
    admitted = len(server.port.admitted)
    stream = Stream(channel)
    stream.send(infer_request("held", id="0").SerializeToString())
    stream.send(infer_request("affine", id="1").SerializeToString())
    stream.send(b"\x0a\xff")
    stream.send(infer_request("nothing", id="3").SerializeToString())
    stream.send(infer_request("broken", id="4").SerializeToString())
    stream.send(infer_request("later", (7.0,), id="5").SerializeToString())
    stream.send(infer_request("affine", id="6", model_version="x").SerializeToString())
    assert server.port.wait(lambda: bool(server.port.held))
    server.call(server.port.answer_held)
    answers = [stream.read() for _ in range(7)]
    stream.close()
    assert stream.rest() == []
    assert [answer.infer_response.id for answer in answers] == ["0", "1", "", "3", "4", "5", "6"]
    assert [bool(answer.error_message) for answer in answers] == [False, False, True, True, True, False, True]
    assert "ModelInferRequest" in answers[2].error_message
    assert "Request for unknown model" in answers[3].error_message
    assert answers[4].error_message.startswith("internal error, id echo-")
    assert "decimal number" in answers[6].error_message
    assert outputs(answers[5].infer_response) == [15.0]
    assert stream.call.code() is grpc.StatusCode.OK
    assert dict(stream.call.initial_metadata())["x-tidegate-id"].startswith("echo-")
    assert len(server.port.admitted) == admitted + 1
    assert settled(server)


def test_stream_marks_the_final_answer(channel: grpc.Channel) -> None:
    stream = Stream(channel)
    for model in ("affine", "many", "none", "full"):
        request = infer_request(model, id=model)
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        stream.send(request.SerializeToString())
    stream.close()
    got = [
        (
            a.infer_response.id,
            a.infer_response.parameters["triton_final_response"].bool_param,
            len(a.infer_response.outputs),
        )
        for a in stream.rest()
    ]
    assert got == [("affine", True, 1), ("many", False, 1), ("many", True, 1), ("none", True, 0), ("full", False, 0)]


def _broken_messages() -> list[bytes]:
    """Refused while they are read, by turns, and by the port."""
    strings = pb.ModelInferRequest(model_name="affine")
    strings.inputs.add(name="x", datatype="BYTES", shape=[20_000])
    strings.raw_input_contents.append(bytes(80_001))
    wide = infer_request()
    wide.inputs[0].shape[1] = 3
    return [b"\xff" * 1000, wide.SerializeToString(), strings.SerializeToString(), _request("full"), _request("nobody")]


def _request(model: str) -> bytes:
    return infer_request(model).SerializeToString()


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
@pytest.mark.parametrize("path", [f"/{SERVICE.full_name}/ModelInfer", STREAM])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_refusal_lets_go_of_its_request(transport: str, path: str, compression: grpc.Compression) -> None:
    """An error in a cycle with its own traceback keeps the frames that it came through, and the message in them."""
    with running(transport=transport) as server, connect(server) as channel:
        assert channel.unary_unary(path.replace("ModelStreamInfer", "ModelInfer"))(_request("affine"))
        with cycles() as found:
            messages = _broken_messages()
            for raw in messages:
                if path == STREAM:
                    assert len(list(channel.stream_stream(path)(iter([raw]), compression=compression))) == 1
                else:
                    with pytest.raises(grpc.RpcError):
                        channel.unary_unary(path)(raw, compression=compression)
            assert settled(server)
            server.run(asyncio.sleep(0))  # the tasks have ended in which the answers were given
            assert found(TidegateError) == []
            frames = [item for item in found(FrameType) if isinstance(item, FrameType)]
            assert [frame for frame in frames if any(value in messages for value in frame.f_locals.values())] == []


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_stream_bounds_what_is_in_flight(transport: str) -> None:
    settings = GrpcSettings(max_in_flight_per_stream=4)
    with running(grpc=settings, transport=transport) as server, connect(server) as channel:
        stream = Stream(channel)
        for i in range(20):
            stream.send(infer_request("held", id=str(i)).SerializeToString())
        stream.close()
        ids: list[str] = []
        while len(ids) < 20:
            assert server.port.wait(lambda: len(server.port.held) == 4)
            server.call(server.port.answer_held)
            ids += [stream.read().infer_response.id for _ in range(4)]
        assert ids == [str(i) for i in range(20)]
        assert settled(server)


class Wide(Admitting):
    """Answers of 1 MiB to small requests."""

    def handle(self, permit: Permit, request: InferenceRequest, reply: Reply, received_ns: int = 0) -> EchoTicket:
        y = Tensor("y", "UINT8", (1 << 20,), bytes(1 << 20))
        reply.message(InferenceResponse(request.model, "1", request.id, [y]), Decision(request.model, "1", "stable", 7))
        reply.finish(None)
        return EchoTicket(self, request, reply)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_answers_that_wait_for_the_reader_of_a_stream_count(transport: str) -> None:
    """There is room for fewer than are asked for. Those that find none are refused, each for itself, in its turn."""
    with running(transport=transport, port=Wide) as server, connect(server) as channel:
        stream = Stream(channel)
        for i in range(40):
            stream.send(infer_request(id=str(i)).SerializeToString())
        while refusals(server) < 10:
            assert stream.call.is_active()
        assert not has_room(server, ROOM // 2)
        stream.close()
        answers = stream.rest()
        assert [answer.infer_response.id for answer in answers] == [str(i) for i in range(40)]
        kept = [not answer.error_message for answer in answers]
        assert 10 < sum(kept) <= 30
        assert all(str(ROOM) in answer.error_message for answer in answers if answer.error_message)
        while not has_room(server, ROOM):
            pass


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_messages_in_flight_count_for_what_they_have(transport: str) -> None:
    """Four of 4 MiB fit. A message that is there is refused alone, one that is still to be gathered ends its stream."""
    with running(transport=transport, port=Admitting) as server, connect(server) as channel:
        stream = Stream(channel)
        for id_ in "012345":
            stream.send(infer_request("held", (1.0,) * (1 << 20), id=id_).SerializeToString())
        while refusals(server) < (1 if transport == "native" else 2):
            assert stream.call.is_active()
        assert [ticket.request.id for ticket in server.port.held] == ["0", "1", "2", "3"]
        assert not has_room(server, 2 << 20)
        server.call(server.port.answer_held)
        assert [stream.read().infer_response.id for _ in range(4)] == ["0", "1", "2", "3"]
        if transport == "native":
            assert _code(stream.rest) == "UNAVAILABLE"
            stream.close()
        else:
            stream.close()
            assert ["18874368" in answer.error_message for answer in stream.rest()] == [True, True]
        while not has_room(server, ROOM):
            pass


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_messages_of_other_streams_are_small(transport: str) -> None:
    with running(transport=transport) as server, connect(server) as channel:
        for path in STREAMS:
            stream = Stream(channel, path)
            stream.send(bytes((1 << 20) + 1))
            assert _code(stream.rest) == "RESOURCE_EXHAUSTED"
            stream.close()


def test_cancelled_stream_cancels_every_request(server: Running, channel: grpc.Channel) -> None:
    stream = Stream(channel)
    ids = [f"s{i}" for i in range(5)]
    for id_ in ids:
        stream.send(infer_request("held", id=id_).SerializeToString())
    assert server.port.wait(lambda: len(server.port.held) == 5)
    stream.call.cancel()
    assert server.port.wait(lambda: set(ids) <= set(server.port.cancelled))
    assert settled(server)
    server.call(server.port.answer_held)


def test_thousand_messages_in_a_stream(server: Running, channel: grpc.Channel) -> None:
    stream = Stream(channel)
    for i in range(1000):
        stream.send(infer_request("later" if i % 3 else "affine", (float(i),), id=str(i)).SerializeToString())
    stream.close()
    answers = stream.rest()
    assert [answer.infer_response.id for answer in answers] == [str(i) for i in range(1000)]
    assert [outputs(answer.infer_response) for answer in answers] == [[2.0 * i + 1] for i in range(1000)]
    assert settled(server)


# --- health and reflection ---

_STATUS = health_pb2.HealthCheckResponse
_INFERENCE = "inference.GRPCInferenceService"


@pytest.mark.parametrize("service", ["", _INFERENCE])
def test_health_check_and_watch_follow_readiness(server: Running, channel: grpc.Channel, service: str) -> None:
    request = health_pb2.HealthCheckRequest(service=service)

    def check() -> Any:
        return call(channel, "/grpc.health.v1.Health/Check", request, _STATUS.FromString).status

    watch = channel.unary_stream(WATCH)(request.SerializeToString(), timeout=20)
    try:
        seen = [_STATUS.FromString(next(watch)).status]
        assert check() == _STATUS.SERVING
        for ready in (False, True):
            server.call(partial(server.catalog.set_ready, ready))
            seen.append(_STATUS.FromString(next(watch)).status)
            assert check() == seen[-1]
    finally:
        server.call(lambda: server.catalog.set_ready(True))
        watch.cancel()
    assert seen == [_STATUS.SERVING, _STATUS.NOT_SERVING, _STATUS.SERVING]


def test_watch_of_an_unknown_service_stays_open(channel: grpc.Channel) -> None:
    request = health_pb2.HealthCheckRequest(service="no.Such").SerializeToString()
    watch = channel.unary_stream(WATCH)(request, timeout=20)
    assert _STATUS.FromString(next(watch)).status == _STATUS.SERVICE_UNKNOWN
    assert watch.is_active()
    watch.cancel()


def test_health_list(channel: grpc.Channel) -> None:
    answer = call(
        channel,
        "/grpc.health.v1.Health/List",
        health_pb2.HealthListRequest(),
        health_pb2.HealthListResponse.FromString,
    )
    assert {name: status.status for name, status in answer.statuses.items()} == {
        "": _STATUS.SERVING,
        _INFERENCE: _STATUS.SERVING,
    }


def reflect(channel: grpc.Channel, version: str, **question: Any) -> Any:
    path, module = REFLECTION[version]
    request = module.ServerReflectionRequest(host="h", **question)
    (raw,) = channel.stream_stream(path)(iter([request.SerializeToString()]), timeout=30)
    answer = module.ServerReflectionResponse.FromString(raw)
    assert (answer.valid_host, answer.original_request) == ("h", request)
    return answer


@pytest.mark.parametrize("version", list(REFLECTION))
def test_reflection_lists_every_service_and_gives_whole_files(channel: grpc.Channel, version: str) -> None:
    listed = [s.name for s in reflect(channel, version, list_services="*").list_services_response.service]
    assert listed == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        _INFERENCE,
        "tidegate.v1.Feedback",
    ]
    for symbol in [*listed, "inference.ModelInferRequest.InferInputTensor", f"{_INFERENCE}.ModelInfer"]:
        answer = reflect(channel, version, file_containing_symbol=symbol)
        files = answer.file_descriptor_response.file_descriptor_proto
        parsed = [descriptor_pb2.FileDescriptorProto.FromString(raw) for raw in files]
        names = {file.name for file in parsed}
        assert all(dependency in names for file in parsed for dependency in file.dependency)
        again = reflect(channel, version, file_by_filename=parsed[0].name)
        assert again.file_descriptor_response == answer.file_descriptor_response


@pytest.mark.parametrize("version", list(REFLECTION))
@pytest.mark.parametrize(
    ("question", "code"),
    [
        ({"file_by_filename": "no.proto"}, 5),
        ({"file_containing_symbol": "no.Such"}, 5),
        ({"file_containing_extension": {"containing_type": "inference.ModelInferRequest", "extension_number": 1}}, 5),
        ({"file_containing_extension": {"containing_type": "no.Such", "extension_number": 1}}, 5),
        ({"all_extension_numbers_of_type": "no.Such"}, 5),
        ({}, 3),
    ],
)
def test_reflection_of_what_is_not_there(
    channel: grpc.Channel, version: str, question: dict[str, Any], code: int
) -> None:
    answer = reflect(channel, version, **question)
    assert answer.error_response.error_code == code
    assert answer.error_response.error_message


def test_reflection_of_extensions(channel: grpc.Channel) -> None:
    answer = reflect(channel, "v1", all_extension_numbers_of_type="inference.ModelInferRequest")
    numbers = answer.all_extension_numbers_response
    assert (numbers.base_type_name, list(numbers.extension_number)) == ("inference.ModelInferRequest", [])


# --- drain and sockets ---


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("factory", [None, asyncio.new_event_loop])
def test_drain_answers_what_is_in_flight_and_ends_streams(factory: Any, transport: str) -> None:
    options = {"transport": transport, **({"loop": factory} if factory else {})}
    with running(**options) as server, connect(server) as channel, ThreadPoolExecutor(1) as pool:
        infer = channel.unary_unary(f"/{SERVICE.full_name}/ModelInfer")
        unary = infer.future(infer_request("held", id="u").SerializeToString(), timeout=20)
        stream, idle = Stream(channel), Stream(channel)
        stream.send(infer_request("held", id="s").SerializeToString())
        watch = channel.unary_stream(WATCH)(health_pb2.HealthCheckRequest().SerializeToString(), timeout=20)
        path, module = REFLECTION["v1"]
        reflecting = Stream(channel, path)
        reflecting.send(module.ServerReflectionRequest(list_services="").SerializeToString())
        next(reflecting.call)
        assert _STATUS.FromString(next(watch)).status == _STATUS.SERVING
        told = pool.submit(next, watch)  # grpcio drops what nobody waits for when an error follows
        assert server.port.wait(lambda: len(server.port.held) == 2)
        assert idle.call.initial_metadata()
        call(channel, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse.FromString)  # by then somebody waits
        drained = asyncio.run_coroutine_threadsafe(server.grpc_server.drain(10), server.loop)
        assert _STATUS.FromString(told.result(10)).status == _STATUS.NOT_SERVING
        assert _code(lambda: next(watch)) == "UNAVAILABLE"
        assert _code(lambda: next(idle.call)) == "UNAVAILABLE"
        assert _code(lambda: next(reflecting.call)) == "UNAVAILABLE"
        server.call(server.port.answer_held)
        assert pb.ModelInferResponse.FromString(unary.result(10)).id == "u"
        assert stream.read().infer_response.id == "s"
        assert _code(stream.rest) == "UNAVAILABLE"
        assert drained.result(10) is True
        for opened in (stream, idle, reflecting):
            opened.close()
        assert _code(lambda: infer(infer_request().SerializeToString(), timeout=20)) == "UNAVAILABLE"
        assert settled(server)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_watch_ends_no_sooner_than_its_connection(transport: str) -> None:
    """What it tells of the end goes out at once, its own end behind the last GOAWAY."""
    with running(transport=transport) as server, Http2Wire(server.grpc) as wire:
        wire.send(http2.opened(1, path=WATCH) + http2.frame(http2.DATA, http2.END_STREAM, 1, http2.grpc_message(b"")))
        while not wire.answers.get(1, http2.Answer()).body:
            assert wire.read_frame()
        drained = asyncio.run_coroutine_threadsafe(server.grpc_server.drain(10), server.loop)
        answer = wire.answer(1)
        assert [answer.body[6], answer.body[13]] == [_STATUS.SERVING, _STATUS.NOT_SERVING]
        assert (answer.status, wire.goaway) == ("14", (1, 0))
        wire.closed()
        assert drained.result(10) is True


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_drain_cuts_what_does_not_end(transport: str) -> None:
    with running(transport=transport) as server, connect(server) as channel:
        infer = channel.unary_unary(f"/{SERVICE.full_name}/ModelInfer")
        waiting = infer.future(infer_request("held", id="u").SerializeToString(), timeout=20)
        assert server.port.wait(lambda: bool(server.port.held))
        assert server.run(server.grpc_server.drain(0.2)) is False
        assert waiting.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert server.port.wait(lambda: server.port.cancelled == ["u"])
        assert settled(server)


def asking(transport: str, timeout_s: float) -> AbstractContextManager[Running]:
    """Servers that send a PING after a short silence, and wait so long for the answer."""
    silence = {"keepalive_s": 0.3, "keepalive_timeout_s": timeout_s}
    return running(transport=transport, http2=Http2Settings(**silence), grpc=GrpcSettings(**silence))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_who_answers_no_ping_is_cut_off(transport: str) -> None:
    """A peer that does answer is asked again and again, and served."""
    with asking(transport, 0.5) as server, Http2Wire(server.grpc, alive=False, settle=False) as mute:
        mute.closed()
        assert mute.ended
    with asking(transport, 2.0) as server, Http2Wire(server.grpc) as alive:
        first, asked = math.inf, 0
        while asked < 4 or time.monotonic() < first + 2.5:  # as long as one without an answer would not be waited for
            frame = alive.read_frame()
            assert frame is not None, alive.goaway
            asked += frame[0] == PING
            first = min(first, time.monotonic()) if asked else first
        assert alive.call(1, infer_request().SerializeToString()).status == "0"


def test_two_servers_cannot_share_an_address(server: Running) -> None:
    second = server.call(lambda: GrpcServer(server.port, server.services))
    with pytest.raises(OSError, match="cannot listen on"):
        server.run(second.start(*server.grpc))


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
        b"\x16\x03\x01" + bytes(100),
        bytes(24),
    ],
)
def test_what_is_not_http_2_ends_its_own_connection_only(server: Running, channel: grpc.Channel, raw: bytes) -> None:
    with socket.create_connection(server.grpc, timeout=30) as sock:
        sock.sendall(raw)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    assert outputs(call(channel, "ModelInfer", infer_request(), pb.ModelInferResponse.FromString)) == [3.0, 6.0]
