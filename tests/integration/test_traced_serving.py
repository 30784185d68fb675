"""Tracing from outside: a served gateway, W3C context in and out on both protocols, spans at a real OTLP receiver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from server._pb import inference_pb2 as pb
from tests.support import models
from tests.support.otlp import Receiver
from tests.support.server import Server, serving
from tests.support.v2 import call, tensor

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE}-b7ad6b7169203331-01"
UNSAMPLED = f"00-{TRACE}-b7ad6b7169203331-00"
BODY = {"inputs": [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])]}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    running = Receiver()
    yield running
    running.close()


def config(root: Path, endpoint: str, sampling: str) -> str:
    models.affine(root / "m.onnx")
    path = root / "config.yaml"
    path.write_text(
        f"apiVersion: tidegate/v1\n"
        f"telemetry:\n  traces: {{enabled: true, sampling: {sampling}, endpoint: {endpoint}}}\n"
        f"models:\n  m: {{source: {root}/m.onnx}}\n"
    )
    return str(path)


def message() -> bytes:
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    return request.SerializeToString()


def infer_over_grpc(server: Server, traceparent: str) -> dict[str, str]:
    """The initial metadata of one answer."""
    with grpc.insecure_channel(server.grpc) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        _, done = infer.with_call(message(), timeout=20, metadata=(("traceparent", traceparent),))
        return {str(k): str(v) for k, v in done.initial_metadata()}


def test_a_callers_trace_goes_through_both_protocols(tmp_path: Path, receiver: Receiver) -> None:
    path = config(tmp_path, receiver.url, "0%")
    with serving(path, "--state-dir", str(tmp_path / "state")) as server:
        status, _, headers = call(server.http, "POST", "/v2/models/m/infer", BODY, {"traceparent": SAMPLED})
        assert status == 200
        answered = [headers["traceresponse"], infer_over_grpc(server, SAMPLED)["traceresponse"]]
        _, _, plain = call(server.http, "POST", "/v2/models/m/infer", BODY, {"traceparent": UNSAMPLED})
        assert "traceresponse" not in plain
        assert all(value.startswith(f"00-{TRACE}-") for value in answered)
        server.terminate()
        assert server.wait() == 0
    spans = receiver.spans()
    requests = {span.span_id.hex(): span for span in spans if span.parent_span_id.hex() == "b7ad6b7169203331"}
    assert set(requests) == {value.split("-")[2] for value in answered}
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    for own in requests:
        names = {span.name.split()[0] for span in spans if span.parent_span_id.hex() == own}
        assert len(names) >= 2
    linked = {link.span_id.hex() for span in spans for link in span.links}
    assert set(requests) <= linked


@pytest.mark.parametrize("transport", ["native", "reference"])
def test_each_message_of_a_stream_has_a_span_of_its_own(tmp_path: Path, receiver: Receiver, transport: str) -> None:
    """Under the caller's; the first is the one that the head of the answers names."""
    path = config(tmp_path, receiver.url, "0%")
    with serving(path, "--state-dir", str(tmp_path / "state"), "--transport", transport) as server:
        with grpc.insecure_channel(server.grpc) as channel:
            stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(
                iter([message()] * 4), timeout=20, metadata=(("traceparent", SAMPLED),)
            )
            assert len(list(stream)) == 4
            named = dict(stream.initial_metadata())["traceresponse"].split("-")[2]
        server.terminate()
        assert server.wait() == 0
    spans = receiver.spans()
    requests = [span.span_id.hex() for span in spans if span.parent_span_id.hex() == "b7ad6b7169203331"]
    assert len(requests) == len(set(requests)) == 4
    assert named in requests
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert set(requests) <= {link.span_id.hex() for span in spans for link in span.links}
    for own in requests:
        assert len([span for span in spans if span.parent_span_id.hex() == own]) >= 2


def test_a_receiver_that_is_gone_costs_no_request(tmp_path: Path, receiver: Receiver) -> None:
    path = config(tmp_path, "http://127.0.0.1:9", "100%")
    with serving(path, "--state-dir", str(tmp_path / "state")) as server:
        for _ in range(20):
            status, _, headers = call(server.http, "POST", "/v2/models/m/infer", BODY)
            assert status == 200
            assert headers["traceresponse"].endswith("-01")
        server.terminate()
        assert server.wait() == 0
    assert receiver.spans() == []


def test_tracing_is_off_by_default(tmp_path: Path) -> None:
    path = models.affine(tmp_path / "m.onnx")
    with serving(str(path), "--state-dir", str(tmp_path / "state")) as server:
        _, _, headers = call(server.http, "POST", "/v2/models/m/infer", BODY, {"traceparent": SAMPLED})
        assert "traceresponse" not in headers
