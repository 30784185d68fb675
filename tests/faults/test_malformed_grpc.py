"""gRPC calls that no honest client makes: each ends with a status that blames the caller, and the next one is right."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from server._pb import health_pb2, reflection_pb2
from server._pb import inference_pb2 as pb
from tests.support import models
from tests.support.metrics import total, wait_total
from tests.support.server import Server, serving
from tests.support.v2 import get

SERVICE = "/inference.GRPCInferenceService/"
UNARY = [name for name, method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name.items()
         if not method.client_streaming]  # fmt: skip
OTHERS = ["/grpc.health.v1.Health/Check"]
BLAMES_THE_CALLER = {
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION,
}  # fmt: skip
INTERNALS = ("Traceback", ".py", "/work", "/home", "/tmp", ".cc", "Error:", "0x7", "site-packages", "DecodeError")
PATIENCE_S = 20.0
#: Rows of a batch of the model ``gathered``, which waits until it has them.
GATHERED = 128


@pytest.fixture(scope="module", params=["native", "reference"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("repository")
    models.affine(root / "affine" / "1" / "model.onnx")
    models.two_inputs(root / "simple" / "1" / "model.onnx")
    models.lookup(root / "lookup" / "1" / "model.onnx")
    models.slow_scalar(root / "slow" / "1" / "model.onnx", size=512, layers=8)
    models.slow_scalar(root / "slower" / "1" / "model.onnx", size=512, layers=64)
    for name in ("slow", "slower"):
        (root / name / "config.pbtxt").write_text(f'name: "{name}"\nmax_batch_size: 1\n')
    for datatype in models.ELEMENT_TYPES:
        models.identity(root / f"identity_{datatype.lower()}" / "1" / "model.onnx", datatype)
    state = str(tmp_path_factory.mktemp("state"))
    options = ("--model-repository", str(root), "--state-dir", state, "--transport", request.param)
    with serving(*options) as running:
        yield running


@pytest.fixture(params=["native", "reference"])
def gathering(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A server of its own for the model ``gathered``, whose rows of a batch are given and not learned."""
    models.affine(tmp_path / "model.onnx")
    batching = f"{{max_batch_size: {GATHERED}, max_rows: {GATHERED}, max_queue_delay: 60s}}"
    (tmp_path / "tidegate.yaml").write_text(
        "apiVersion: tidegate/v1\nmodels:\n  affine: {source: model.onnx}\n"
        f"  gathered: {{source: model.onnx, batching: {batching}}}\n"
    )
    options = ("--state-dir", str(tmp_path / "state"), "--transport", request.param)
    with serving(str(tmp_path / "tidegate.yaml"), *options) as running:
        yield running


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.grpc, options) as opened:
        yield opened
        assert_sane(server, opened)


def good(value: float = 1.0, model: str = "affine", width: int = 4) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, id=str(value))
    request.inputs.add(name="x", datatype="FP32", shape=[1, width])
    request.raw_input_contents.append(np.full(width, value, "<f4").tobytes())
    return request


def call(channel: grpc.Channel, method: str, raw: bytes, timeout: float = PATIENCE_S, **more: Any) -> bytes:
    path = method if method.startswith("/") else SERVICE + method
    return channel.unary_unary(path)(raw, timeout=timeout, **more)


def values(raw: bytes) -> list[float]:
    return np.frombuffer(pb.ModelInferResponse.FromString(raw).raw_output_contents[0], "<f4").tolist()


def assert_sane(server: Server, channel: grpc.Channel) -> None:
    assert values(call(channel, "ModelInfer", good(3.0).SerializeToString())) == [7.0] * 4
    wait_total(server, "tidegate_pending_requests", 0)
    assert not [line for line in server.lines if line.get("event") == "request_failed"]


def refused(channel: grpc.Channel, method: str, raw: bytes, **more: Any) -> grpc.StatusCode | None:
    """The status of a call that may also succeed (None); any other end than a caller's fault fails the test."""
    try:
        call(channel, method, raw, **more)
    except grpc.RpcError as error:
        code, text = error.code(), error.details()
        assert code in BLAMES_THE_CALLER, (code, text, method, raw[:200])
        assert text
        assert not [word for word in INTERNALS if word in text], text
        return code
    return None


def noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((1, 2, 3, 5, 17, 100, 1000)))


@pytest.mark.parametrize("method", [*UNARY, *OTHERS])
def test_noise_on_every_method(channel: grpc.Channel, method: str) -> None:
    rng = random.Random(method)
    seen = Counter(refused(channel, method, noise(rng)) for _ in range(25))
    assert seen[grpc.StatusCode.INVALID_ARGUMENT] > 0
    assert refused(channel, method, b"\xff" * 10) is grpc.StatusCode.INVALID_ARGUMENT
    assert refused(channel, method, b"\x0a\x05ab") is grpc.StatusCode.INVALID_ARGUMENT
    refused(channel, method, b"\x0a\x02\xff\xfe")  # a string that is not UTF-8
    refused(channel, method, b"\x0b" * 5000)  # groups in groups


def test_bytes_of_a_good_request_changed(channel: grpc.Channel) -> None:
    rng = random.Random(3)
    whole = good().SerializeToString()
    for length in range(len(whole)):
        assert refused(channel, "ModelInfer", whole[:length]) is not None or length == 0, length
    for _ in range(600):
        changed = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        refused(channel, "ModelInfer", bytes(changed))


def edited(edit: Callable[[pb.ModelInferRequest], object], base: pb.ModelInferRequest | None = None) -> bytes:
    request = base or good()
    edit(request)
    return request.SerializeToString()


def without_inputs(request: pb.ModelInferRequest) -> None:
    request.ClearField("inputs")
    request.ClearField("raw_input_contents")


def with_input_twice(request: pb.ModelInferRequest) -> None:
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])


def with_many_parameters(request: pb.ModelInferRequest) -> None:
    for i in range(5000):
        request.parameters[str(i)].int64_param = i


def shaped(*shape: int, datatype: str = "FP32", raw: bytes = b"\0" * 16) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=f"identity_{datatype.lower()}")
    request.inputs.add(name="x", datatype=datatype, shape=shape)
    request.raw_input_contents.append(raw)
    return request


def typed(field: str, contents: list[Any], datatype: str, shape: tuple[int, ...] = (1, 4)) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=f"identity_{datatype.lower()}")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=shape)
    getattr(tensor.contents, field).extend(contents)
    return request


INVALID: dict[str, pb.ModelInferRequest | bytes] = {
    "empty": b"",
    "no model": edited(lambda r: r.ClearField("model_name")),
    "no inputs": edited(without_inputs),
    "raw without inputs": edited(lambda r: r.ClearField("inputs")),
    "inputs without contents": edited(lambda r: r.ClearField("raw_input_contents")),
    "two raws for one input": edited(lambda r: r.raw_input_contents.append(b"\0" * 16)),
    "one raw for two inputs": edited(lambda r: r.inputs.add(name="y", datatype="FP32", shape=[1, 4])),
    "input twice": edited(with_input_twice),
    "raw and typed": edited(lambda r: r.inputs[0].contents.fp32_contents.extend([1, 2, 3, 4])),
    "unknown datatype": edited(lambda r: setattr(r.inputs[0], "datatype", "FP128")),
    "no datatype": edited(lambda r: r.inputs[0].ClearField("datatype")),
    "lower-case datatype": edited(lambda r: setattr(r.inputs[0], "datatype", "fp32")),
    "other datatype of the same size": edited(lambda r: setattr(r.inputs[0], "datatype", "INT32")),
    "no name": edited(lambda r: r.inputs[0].ClearField("name")),
    "long name": edited(lambda r: setattr(r.inputs[0], "name", "n" * 1_000_000)),
    "long id": edited(lambda r: setattr(r, "id", "i" * 1_000_000)),
    "version in words": edited(lambda r: setattr(r, "model_version", "latest")),
    "negative version": edited(lambda r: setattr(r, "model_version", "-1")),
    "unknown output": edited(lambda r: r.outputs.add(name="z")),
    "output twice": edited(lambda r: (r.outputs.add(name="y"), r.outputs.add(name="y"))),
    "unnamed output": edited(lambda r: r.outputs.add()),
    "negative priority": edited(lambda r: setattr(r.parameters["priority"], "int64_param", -1)),
    "priority in words": edited(lambda r: setattr(r.parameters["priority"], "string_param", "high")),
    "negative timeout": edited(lambda r: setattr(r.parameters["timeout"], "int64_param", -5)),
    "timeout of no kind": edited(lambda r: r.parameters["timeout"]),
    "classification in words": edited(
        lambda r: setattr(r.outputs.add(name="y").parameters["classification"], "string_param", "x")
    ),
    "negative classification": edited(
        lambda r: setattr(r.outputs.add(name="y").parameters["classification"], "int64_param", -1)
    ),
    "shared memory": edited(
        lambda r: setattr(r.inputs[0].parameters["shared_memory_region"], "string_param", "/etc/passwd")
    ),
    "5000 parameters": edited(with_many_parameters),
    "5000 inputs": edited(lambda r: [r.inputs.add(name=f"x{i}", datatype="FP32", shape=[1]) for i in range(5000)]),
    "5000 outputs": edited(lambda r: [r.outputs.add(name=f"y{i}") for i in range(5000)]),
    "no shape": shaped(),
    "rank 1": shaped(4),
    "rank 3": shaped(1, 1, 4),
    "rank 5000": shaped(*[1] * 5000),
    "negative dim": shaped(-1, 4),
    "least int64": shaped(-(2**63), 4),
    "zero rows": shaped(0, 4, raw=b""),
    "zero wide": shaped(1, 0, raw=b""),
    "product over 64 bits": shaped(2**62, 2**62),
    "product wraps to 4": shaped(2**32, 2**32 + 4),
    "product wraps to 0": shaped(2**32, 2**32, raw=b""),
    "too many rows": shaped(2**20, 4, raw=b"\0" * 2**24),
    "one byte short": shaped(1, 4, raw=b"\0" * 15),
    "one byte long": shaped(1, 4, raw=b"\0" * 17),
    "texts past the end": shaped(1, 4, datatype="BYTES", raw=b"\xff\xff\xff\xff"),
    "three texts of four": shaped(1, 4, datatype="BYTES", raw=b"\x01\0\0\0a" * 3),
    "five texts of four": shaped(1, 4, datatype="BYTES", raw=b"\x01\0\0\0a" * 5),
    "a text and a half": shaped(1, 4, datatype="BYTES", raw=b"\x01\0\0\0a" * 3 + b"\x02\0\0\0a"),
    "300 for INT8": typed("int_contents", [300, 0, 0, 0], "INT8"),
    "-129 for INT8": typed("int_contents", [-129, 0, 0, 0], "INT8"),
    "256 for UINT8": typed("uint_contents", [256, 0, 0, 0], "UINT8"),
    "70000 for INT16": typed("int_contents", [70000, 0, 0, 0], "INT16"),
    "70000 for UINT16": typed("uint_contents", [70000, 0, 0, 0], "UINT16"),
    "wrong field": typed("fp64_contents", [1, 2, 3, 4], "FP32"),
    "wrong integers": typed("int64_contents", [1, 2, 3, 4], "INT32"),
    "signed for unsigned": typed("int_contents", [1, 2, 3, 4], "UINT32"),
    "typed FP16": typed("fp32_contents", [1, 2, 3, 4], "FP16"),
    "typed BF16": typed("fp32_contents", [1, 2, 3, 4], "BF16"),
    "three of four": typed("fp32_contents", [1, 2, 3], "FP32"),
    "five of four": typed("fp32_contents", [1, 2, 3, 4, 5], "FP32"),
    "texts for numbers": typed("bytes_contents", [b"a"] * 4, "FP32"),
    "a huge shape of nothing": typed("fp32_contents", [], "FP32", (2**31, 2**31)),
}  # fmt: skip

EXPECTED = {
    "empty": grpc.StatusCode.NOT_FOUND,
    "no model": grpc.StatusCode.NOT_FOUND,
}


@pytest.mark.parametrize("case", sorted(INVALID))
def test_requests_that_do_not_fit(channel: grpc.Channel, case: str) -> None:
    request = INVALID[case]
    raw = request if isinstance(request, bytes) else request.SerializeToString()
    code = refused(channel, "ModelInfer", raw)
    assert code is EXPECTED.get(case, grpc.StatusCode.INVALID_ARGUMENT)


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (lambda r: setattr(r, "model_name", "nobody"), grpc.StatusCode.NOT_FOUND),
        (lambda r: setattr(r, "model_name", "../affine"), grpc.StatusCode.NOT_FOUND),
        (lambda r: setattr(r, "model_name", "m" * 100_000), grpc.StatusCode.NOT_FOUND),
        (lambda r: setattr(r, "model_version", "2"), grpc.StatusCode.NOT_FOUND),
        (lambda r: setattr(r, "model_version", "9" * 9), grpc.StatusCode.NOT_FOUND),
        (lambda r: setattr(r, "model_version", "9" * 5000), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_what_is_not_there(channel: grpc.Channel, edit: Any, code: grpc.StatusCode) -> None:
    assert refused(channel, "ModelInfer", edited(edit)) is code


@pytest.mark.parametrize("name", ["ModelMetadata", "ModelConfig", "ModelStatistics", "ModelReady"])
def test_odd_names_on_the_other_methods(channel: grpc.Channel, name: str) -> None:
    kind: Any = getattr(pb, f"{name}Request")
    for model in ("nobody", "m" * 100_000, "../x", "a\0b", "é"):
        code = refused(channel, name, kind(name=model).SerializeToString())
        assert code in (grpc.StatusCode.NOT_FOUND, None)
    for version in ("x", "-1", "1.0", "٣", " 1"):
        code = refused(channel, name, kind(name="affine", version=version).SerializeToString())
        assert code in (grpc.StatusCode.INVALID_ARGUMENT, None if name == "ModelReady" else 0)


def test_names_that_are_no_models_of_the_repository(channel: grpc.Channel) -> None:
    for name in ("", "..", "../affine", "/etc", "a\\b", ".hidden", "a\0b", "m" * 100_000):
        for method, kind in (("Load", pb.RepositoryModelLoadRequest), ("Unload", pb.RepositoryModelUnloadRequest)):
            raw = kind(model_name=name).SerializeToString()
            assert refused(channel, f"RepositoryModel{method}", raw) is grpc.StatusCode.INVALID_ARGUMENT, name


def test_unknown_methods(channel: grpc.Channel) -> None:
    for path in ("/inference.GRPCInferenceService/Nothing", "/x/y", "/", "/a", "//", "/" + "a" * 2000):
        assert refused(channel, path, b"") is grpc.StatusCode.UNIMPLEMENTED


def test_messages_over_the_limit(channel: grpc.Channel) -> None:
    request = good()
    request.raw_input_contents[0] = b"\0" * (65 << 20)
    raw = request.SerializeToString()
    assert refused(channel, "ModelInfer", raw) is grpc.StatusCode.RESOURCE_EXHAUSTED
    packed = refused(channel, "ModelInfer", raw, compression=grpc.Compression.Gzip)
    assert packed is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_streams_of_noise_go_on(channel: grpc.Channel) -> None:
    rng = random.Random(4)
    messages, wanted = [], []
    for i in range(120):
        bad = i % 3
        messages.append(noise(rng) + b"\xff" if bad else good(i).SerializeToString())
        wanted.append(None if bad else [2.0 * i + 1] * 4)
    got: list[list[float] | None] = []
    for raw in channel.stream_stream(SERVICE + "ModelStreamInfer")(iter(messages), timeout=20):
        answer = pb.ModelStreamInferResponse.FromString(raw)
        if answer.error_message:
            assert not [word for word in INTERNALS if word in answer.error_message]
            got.append(None)
        else:
            got.append(np.frombuffer(answer.infer_response.raw_output_contents[0], "<f4").tolist())
    assert got == wanted


def test_noise_on_the_other_streams(channel: grpc.Channel) -> None:
    rng = random.Random(5)
    for path in ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                 "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):  # fmt: skip
        for _ in range(10):
            stream = channel.stream_stream(path)(iter([noise(rng)]), timeout=PATIENCE_S)
            with suppress(grpc.RpcError):
                list(stream)
            assert stream.code() in BLAMES_THE_CALLER | {grpc.StatusCode.OK}
        request = reflection_pb2.ServerReflectionRequest(file_by_filename="../../etc/passwd").SerializeToString()
        (raw,) = channel.stream_stream(path)(iter([request]), timeout=PATIENCE_S)
        assert reflection_pb2.ServerReflectionResponse.FromString(raw).error_response.error_code == 5
    watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"\xff" * 9, timeout=PATIENCE_S)
    with pytest.raises(grpc.RpcError) as raised:
        list(watch)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    unknown = health_pb2.HealthCheckRequest(service="nobody").SerializeToString()
    assert refused(channel, OTHERS[0], unknown) is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "metadata",
    [
        [("traceparent", "00-zz")],
        [("traceparent", "00-" + "0" * 32 + "-" + "0" * 16 + "-01")],
        [("tracestate", "=" * 2000), ("traceparent", "00-" + "a" * 32 + "-" + "b" * 16 + "-01")],
        [("x-bin", b"\0\xff" * 500)],
        [("traceparent-bin", b"\xff")],
        [("x-tidegate-id", "mine")],
        [("x-a", "1")] * 200,
        [("content-length", "5")],
        [("x-tidegate-timeout-ms", "nonsense")],
    ],
)
def test_odd_metadata(channel: grpc.Channel, metadata: list[tuple[str, Any]]) -> None:
    assert values(call(channel, "ModelInfer", good(2.0).SerializeToString(), metadata=metadata)) == [5.0] * 4


def test_metadata_over_the_limit(channel: grpc.Channel) -> None:
    """Over the limit in sum: a single value over 64 KiB is more than libnghttp2 reads."""
    more = [(f"x-{i}", "a" * 10_000) for i in range(10)]
    code = refused(channel, "ModelInfer", good().SerializeToString(), metadata=more)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


# --- calls that end early -------------------------------------------------------------------------------------------


def executed(server: Server, model: str, count: str = "inference_count") -> int:
    return int(get(server.http, f"/v2/models/{model}/stats")[1]["model_stats"][0][count])


def test_a_storm_of_cancels_spares_the_neighbours(gathering: Server) -> None:
    """Of calls that wait for their batch to fill, so that none of them can end before it is cancelled.

    Three connections, for on each the calls in flight stay below its bound of streams.
    """
    rng = random.Random(6)
    before = executed(gathering, "gathered"), executed(gathering, "gathered", "execution_count")
    with ExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [stack.enter_context(grpc.insecure_channel(gathering.grpc, options)) for _ in range(3)]

        def begin(request: pb.ModelInferRequest, i: int) -> Any:
            infer = channels[i % 3].unary_unary(SERVICE + "ModelInfer")
            return infer.future(request.SerializeToString(), timeout=120)

        gathered = [begin(good(i, "gathered"), i) for i in range(120)]
        wait_total(gathering, "tidegate_pending_requests", 120)
        doomed = [i for i in range(120) if i % 5]
        rng.shuffle(doomed)
        neighbours, hasty = {}, {}
        for i in doomed:
            gathered[i].cancel()
            neighbours[i], hasty[i] = begin(good(i), i), begin(good(i), i)
            hasty[i].cancel()  # wherever it is by then: nobody has heard of it, it runs, it was answered
        assert all(gathered[i].cancelled() for i in doomed)
        kept = sorted(set(range(120)) - set(doomed))
        wait_total(gathering, "tidegate_pending_requests", len(kept))
        answered = {i: future for i, future in hasty.items() if not future.cancelled()}
        for i, future in [*neighbours.items(), *answered.items()]:
            assert values(future.result()) == [2.0 * i + 1] * 4
        rest = shaped(GATHERED - len(kept), 4, raw=b"\0" * 16 * (GATHERED - len(kept)))
        rest.model_name = "gathered"
        assert set(values(begin(rest, 0).result())) == {1.0}
        assert [values(gathered[i].result()) for i in kept] == [[2.0 * i + 1] * 4 for i in kept]
        assert_sane(gathering, channels[0])
    after = executed(gathering, "gathered"), executed(gathering, "gathered", "execution_count")
    assert (after[0] - before[0], after[1] - before[1]) == (GATHERED, 1), "cancelled calls were run"


def test_deadlines_drop_queued_work(server: Server, channel: grpc.Channel) -> None:
    """Behind calls that are still at it when the last deadline passes.

    Where this process stood still for as long as they took, nothing was shown, and it is tried again with more of them.
    """
    assert any(queued_behind(server, channel, 10 * 2**i) for i in range(4)), "the calls in front were too short"


def queued_behind(server: Server, channel: grpc.Channel, count: int) -> bool:
    """Late calls behind ``count`` others: they end, and are not run. False where the others had ended before."""
    infer = channel.unary_unary(SERVICE + "ModelInfer")
    before = executed(server, "slower", "execution_count")
    front = [infer.future(good(i, "slower", 1).SerializeToString(), timeout=60) for i in range(count)]
    until = time.monotonic() + PATIENCE_S
    while total(server, "tidegate_pending_requests") < 2 and not front[-1].done():
        assert time.monotonic() < until
    late = [infer.future(good(i, "slower", 1).SerializeToString(), timeout=0.05) for i in range(50)]
    codes = {future.code() for future in late}
    shown = not front[-1].done()
    assert [values(future.result()) for future in front] == [[float(i)] for i in range(count)]
    wait_total(server, "tidegate_pending_requests", 0)
    if shown:
        assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert executed(server, "slower", "execution_count") - before == count, "late calls were run"
    return shown


@pytest.mark.parametrize("timeout", [1e-9, 1e-4, 1e-3])
def test_deadlines_that_have_passed(channel: grpc.Channel, timeout: float) -> None:
    infer = channel.unary_unary(SERVICE + "ModelInfer")
    for _ in range(20):
        future = infer.future(good().SerializeToString(), timeout=timeout)
        assert future.code() in (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED), future.details()


def test_streams_given_up_in_the_middle(server: Server, channel: grpc.Channel) -> None:
    for i in range(30):
        release = threading.Event()

        def messages(held: threading.Event = release) -> Iterator[bytes]:
            for value in range(8):
                yield good(value, "slow", 1).SerializeToString()
            held.wait(10)

        stream = channel.stream_stream(SERVICE + "ModelStreamInfer")(messages(), timeout=20)
        if i % 3:
            next(stream)
        stream.cancel()
        release.set()
    wait_total(server, "tidegate_pending_requests", 0)


def test_connections_made_and_dropped(server: Server, channel: grpc.Channel) -> None:
    host, _, port = server.grpc.rpartition(":")
    rng = random.Random(7)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for i in range(300):
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as raw:
            raw.sendall(
                (b"", preface, preface + b"\0\0\0\x04\0\0\0\0\0", preface + rng.randbytes(60), rng.randbytes(60))[i % 5]
            )

    def visit(i: int) -> None:
        with grpc.insecure_channel(server.grpc, [("grpc.use_local_subchannel_pool", 1)]) as own:
            future = own.unary_unary(SERVICE + "ModelInfer")
            if i % 2:
                assert values(future(good(i).SerializeToString(), timeout=20)) == [2.0 * i + 1] * 4
            else:
                future.future(good(i, "slow", 1).SerializeToString(), timeout=20)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(60)))


def test_bad_timeouts_in_raw_frames(server: Server, channel: grpc.Channel) -> None:
    """``grpc-timeout`` of no known form: the call is answered or refused, the listener lives."""
    host, _, port = server.grpc.rpartition(":")
    for timeout in (b"abc", b"", b"1", b"-1S", b"99999999999S", b"1.5S", b"0n", b"1X"):
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as raw:
            raw.sendall(_raw_call(b"/inference.GRPCInferenceService/ServerLive", timeout))
            received = b""
            while b"grpc-status" not in received and (data := raw.recv(4096)):
                received += data
                if _ended(received):
                    break
            assert received


def _raw_call(path: bytes, timeout: bytes) -> bytes:
    """HTTP/2 preface, settings, one request with literal headers, an empty message."""
    pairs = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"t"),
             (b"content-type", b"application/grpc"), (b"te", b"trailers"), (b"grpc-timeout", timeout)]  # fmt: skip
    block = b"".join(b"\0" + bytes([len(k)]) + k + bytes([len(v)]) + v for k, v in pairs)
    frames = [(4, 0, 0, b""), (1, 4, 1, block), (0, 1, 1, b"\0\0\0\0\0")]
    packed = [len(p).to_bytes(3, "big") + bytes([t, f]) + s.to_bytes(4, "big") + p for t, f, s, p in frames]
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"".join(packed)


def _ended(received: bytes) -> bool:
    """Has the peer ended stream 1 (END_STREAM or RST_STREAM) or said GOAWAY?"""
    at = 0
    while at + 9 <= len(received):
        size, kind, flags = int.from_bytes(received[at : at + 3], "big"), received[at + 3], received[at + 4]
        if kind in (3, 7) or (kind in (0, 1) and flags & 1):
            return True
        at += 9 + size
    return False
