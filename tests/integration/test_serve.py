"""The served product from outside: a real process, real models, real sockets."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
import pytest

from server import types as server_types
from server._pb import inference_pb2 as pb
from tests.support import models
from tests.support.cli import cli
from tests.support.metrics import samples, wait_total
from tests.support.server import ROOT, Server, serving
from tests.support.v2 import call, get, infer, tensor

CONFIG = """
name: "declared"
platform: "onnxruntime_onnx"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 4 ] label_filename: "labels.txt" } ]
dynamic_batching { max_queue_delay_microseconds: 200 }
version_policy { all { } }
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    models.affine(root / "affine" / "1" / "model.onnx")
    models.affine(root / "affine" / "2" / "model.onnx", scale=3.0)
    models.affine(root / "declared" / "1" / "model.onnx")
    models.affine(root / "declared" / "7" / "model.onnx", scale=7.0, shift=0.0)
    (root / "declared" / "config.pbtxt").write_text(CONFIG)
    (root / "declared" / "labels.txt").write_text("cat\ndog\nbird\nfish\n")
    models.two_inputs(root / "simple" / "1" / "model.onnx")
    models.lookup(root / "lookup" / "1" / "model.onnx")
    models.across_rows(root / "across" / "1" / "model.onnx")
    models.constant(root / "constant" / "1" / "model.onnx")
    for datatype in models.ELEMENT_TYPES:
        models.identity(root / f"identity_{datatype.lower()}" / "1" / "model.onnx", datatype)
    (root / "broken" / "1").mkdir(parents=True)
    (root / "broken" / "1" / "model.onnx").write_bytes(b"this is not a model")
    return root


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    state = str(tmp_path_factory.mktemp("state"))
    with serving("--model-repository", str(repository), "--state-dir", state) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as opened:
        yield opened


def rpc(channel: grpc.Channel, method: str, request: Any, answer: Any, timeout: float = 20) -> Any:
    return channel.unary_unary(
        f"/inference.GRPCInferenceService/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=answer.FromString,
    )(request, timeout=timeout)


def test_health_bodies(server: Server) -> None:
    assert get(server.http, "/v2/health/live") == (200, {"live": True})
    assert get(server.http, "/v2/health/ready") == (200, {"ready": True})
    assert get(server.http, "/v2/models/affine/ready") == (200, {"name": "affine", "ready": True})
    assert get(server.http, "/v2/models/nobody/ready")[0] == 404


def test_a_broken_model_does_not_stop_the_others(server: Server) -> None:
    failed = server.wait_for("model_load_failed", model="broken")
    assert "model.onnx" in failed["error"]
    status, body = infer(server.http, "broken", [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])])
    assert status == 503
    assert "broken" in body["error"]
    _, index, _ = call(server.http, "POST", "/v2/repository/index", {})
    row = next(row for row in index if row["name"] == "broken")
    assert row["state"] == "UNAVAILABLE"
    assert row["reason"]


def test_newest_version_answers_and_older_ones_are_not_loaded_by_default(server: Server) -> None:
    x = tensor("x", "FP32", [1, 4], [1, 2, 3, 4])
    status, body = infer(server.http, "affine", [x], id="one")
    assert status == 200
    assert body["id"] == "one"
    assert body["model_version"] == "2"
    assert body["outputs"][0]["data"] == [4.0, 7.0, 10.0, 13.0]
    assert infer(server.http, "affine", [x], version="1")[0] == 404


def test_version_policy_all_serves_both(server: Server) -> None:
    x = tensor("x", "FP32", [1, 4], [1, 2, 3, 4])
    assert infer(server.http, "declared", [x], version="1")[1]["outputs"][0]["data"] == [3.0, 5.0, 7.0, 9.0]
    assert infer(server.http, "declared", [x])[1]["outputs"][0]["data"] == [7.0, 14.0, 21.0, 28.0]
    status, metadata = get(server.http, "/v2/models/declared")
    assert status == 200
    assert metadata["versions"] == ["1", "7"]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]


def test_answer_headers(server: Server) -> None:
    body = {"inputs": [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])]}
    seen = set()
    for _ in range(2):
        status, _, headers = call(server.http, "POST", "/v2/models/affine/infer", body)
        assert status == 200
        assert headers["x-tidegate-version"] == "2"
        assert headers["x-tidegate-arm"] == "stable"
        assert int(headers["x-tidegate-generation"]) > 0
        seen.add(headers["x-tidegate-id"])
    assert len(seen) == 2


@pytest.mark.parametrize("datatype", sorted(models.ELEMENT_TYPES))
def test_every_datatype_over_grpc_raw(channel: grpc.Channel, datatype: str) -> None:
    size = {"BOOL": 1, "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8}.get(datatype)
    if datatype == "BYTES":
        raw = b"".join(len(x).to_bytes(4, "little") + x for x in (b"", "é".encode(), b"abc", b"x" * 300))
    elif datatype == "BOOL":
        raw = bytes([0, 1, 1, 0])
    else:
        size = size or int(datatype.lstrip("UINT")) // 8
        raw = bytes(range(4 * size))
    request = pb.ModelInferRequest(model_name=f"identity_{datatype.lower()}", id="7")
    request.inputs.add(name="x", datatype=datatype, shape=[1, 4])
    request.raw_input_contents.append(raw)
    answer = rpc(channel, "ModelInfer", request, pb.ModelInferResponse)
    assert answer.id == "7"
    assert answer.outputs[0].datatype == datatype
    assert list(answer.outputs[0].shape) == [1, 4]
    assert answer.raw_output_contents[0] == raw


def test_int64_never_passes_through_a_double(server: Server) -> None:
    values = [2**63 - 1, -(2**63), 2**53 + 1, -(2**53) - 1]
    status, body = infer(server.http, "identity_int64", [tensor("x", "INT64", [1, 4], values)])
    assert (status, body["outputs"][0]["data"]) == (200, values)
    big = [2**64 - 1, 2**63, 0, 1]
    assert infer(server.http, "identity_uint64", [tensor("x", "UINT64", [1, 4], big)])[1]["outputs"][0]["data"] == big


def test_nan_and_infinity_in_json(server: Server) -> None:
    raw = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[NaN,Infinity,-Infinity,1.5]}]}'
    status, body, _ = call(server.http, "POST", "/v2/models/identity_fp32/infer", raw)
    assert status == 200
    data = body["outputs"][0]["data"]
    assert math.isnan(data[0])
    assert data[1:] == [math.inf, -math.inf, 1.5]


def test_classification(server: Server) -> None:
    x = tensor("x", "FP32", [1, 4], [1, 9, 3, 4])
    outputs = [{"name": "y", "parameters": {"classification": 2}}]
    status, body = infer(server.http, "declared", [x], outputs=outputs)
    assert status == 200
    assert [entry.split(":")[1:] for entry in body["outputs"][0]["data"]] == [["1", "dog"], ["3", "fish"]]


BAD = {
    "wrong datatype": ([tensor("x", "INT32", [1, 4], [1, 2, 3, 4])], ["x", "FP32", "INT32"]),
    "wrong rank": ([tensor("x", "FP32", [4], [1, 2, 3, 4])], ["x", "[-1, 4]", "[4]"]),
    "wrong dim": ([tensor("x", "FP32", [1, 3], [1, 2, 3])], ["x", "[-1, 4]", "[1, 3]"]),
    "unknown input": ([tensor("z", "FP32", [1, 4], [1, 2, 3, 4])], ["'z'", "'x'"]),
    "no rows": ([tensor("x", "FP32", [0, 4], [])], ["x", "got 0"]),
    "too many rows": ([tensor("x", "FP32", [9, 4], [0.0] * 36)], ["8", "9"]),
    "twice": ([tensor("x", "FP32", [1, 4], [1, 2, 3, 4])] * 2, ["x"]),
    "short data": ([tensor("x", "FP32", [1, 4], [1, 2, 3])], ["x", "4", "3"]),
    "negative dim": ([tensor("x", "FP32", [-1, 4], [1, 2, 3, 4])], ["x", "-1"]),
    "huge shape": ([tensor("x", "FP32", [2**62, 2**62], [1])], ["x"]),
    "text": ([tensor("x", "FP32", [1, 4], [1, "2", 3, 4])], ["x"]),
    "none": ([], ["input"]),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_requests_are_named(server: Server, case: str) -> None:
    inputs, words = BAD[case]
    status, body = infer(server.http, "declared", inputs)
    assert status == 400
    for word in words:
        assert word in body["error"]
    assert infer(server.http, "declared", [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])])[0] == 200


def test_unknown_model_version_and_path(server: Server, channel: grpc.Channel) -> None:
    status, body = infer(server.http, "nobody", [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])])
    assert status == 404
    assert "Request for unknown model" in body["error"]
    assert get(server.http, "/v2/models/affine/versions/9")[0] == 404
    assert get(server.http, "/v2/models/affine/versions/x")[0] == 400
    status, body, headers = call(server.http, "GET", "/nothing/here")
    assert (status, list(body)) == (404, ["error"])
    assert headers["content-type"].startswith("application/json")
    assert call(server.http, "GET", "/v2/models/affine/infer")[0] == 405
    request = pb.ModelInferRequest(model_name="nobody")
    with pytest.raises(grpc.RpcError) as caught:
        rpc(channel, "ModelInfer", request, pb.ModelInferResponse)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_bad_row_fails_alone(server: Server) -> None:
    status, body = infer(server.http, "lookup", [tensor("x", "INT64", [1, 1], [99])])
    assert status == 400
    assert "lookup" in body["error"] or "99" in body["error"]
    assert infer(server.http, "lookup", [tensor("x", "INT64", [1, 1], [3])])[1]["outputs"][0]["data"] == [30.0]


def test_rows_that_look_at_each_other_are_never_combined(server: Server) -> None:
    line = server.wait_for("model_ready", model="across")
    assert line["batch_rows"] <= 1
    assert line["note"]


def test_results_equal_onnxruntime_bit_for_bit(server: Server, repository: Path, channel: grpc.Channel) -> None:
    session = ort.InferenceSession(str(repository / "affine" / "2" / "model.onnx"), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    wanted = session.run(None, {"x": x})[0]
    request = pb.ModelInferRequest(model_name="affine")
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    request.raw_input_contents.append(x.tobytes())
    answer = rpc(channel, "ModelInfer", request, pb.ModelInferResponse)
    assert answer.raw_output_contents[0] == wanted.tobytes()


def test_statistics_and_metrics_count(server: Server) -> None:
    def successes() -> int:
        _, body = get(server.http, "/v2/models/simple/stats")
        return int(body["model_stats"][0]["inference_stats"]["success"]["count"])

    before = successes()
    data = list(range(16))
    status, body = infer(
        server.http, "simple", [tensor("INPUT0", "INT32", [1, 16], data), tensor("INPUT1", "INT32", [1, 16], data)]
    )
    assert status == 200
    assert body["outputs"][0]["data"] == [2 * x for x in data]
    assert successes() == before + 1
    status, page, headers = call(server.metrics, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    text = page.decode()
    assert f'nv_inference_request_success{{model="simple",version="1"}} {before + 1}' in text
    assert "tidegate_request_duration_seconds_bucket" in text


def test_a_model_without_inputs_answers_over_both_protocols(server: Server, channel: grpc.Channel) -> None:
    status, body = infer(server.http, "constant", [])
    assert (status, body["outputs"][0]["data"]) == (200, [1.0, 2.0, 3.0])
    answer = rpc(channel, "ModelInfer", pb.ModelInferRequest(model_name="constant"), pb.ModelInferResponse)
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [1.0, 2.0, 3.0]
    status, body = infer(server.http, "affine", [])
    assert (status, body["error"]) == (400, "expected 1 inputs but got 0 inputs for model 'affine': missing 'x'")


def test_config_endpoint(server: Server) -> None:
    status, config = get(server.http, "/v2/models/declared/config")
    assert status == 200
    assert config["name"] == "declared"
    assert config["max_batch_size"] == 8
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    auto = get(server.http, "/v2/models/affine/config")[1]
    assert auto["output"][0]["name"] == "y"


def test_server_metadata_and_openapi(server: Server) -> None:
    for path in ("/v2", "/v2/"):
        status, body = get(server.http, path)
        assert status == 200
        assert body["name"] == "tidegate"
        assert "binary_tensor_data" in body["extensions"]
    assert get(server.http, "/openapi.json")[1]["openapi"].startswith("3.1")


def test_load_is_refused_when_model_control_is_off(server: Server) -> None:
    assert call(server.http, "POST", "/v2/repository/models/nobody/load", {})[0] == 404
    status, body, _ = call(server.http, "POST", "/v2/repository/models/affine/load", {})
    assert status in (400, 503)
    assert "explicit" in body["error"]
    assert call(server.http, "POST", "/v2/repository/models/..%2Faffine/load", {})[0] in (400, 404)


def run_cli(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", *args],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
        **options,
    )


def test_serving_a_bare_file(tmp_path: Path) -> None:
    path = models.affine(tmp_path / "my_model.onnx")
    with serving(str(path), "--state-dir", str(tmp_path / "state")) as running:
        status, body = infer(running.http, "my_model", [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])])
        assert (status, body["outputs"][0]["data"]) == (200, [3.0, 5.0, 7.0, 9.0])
        running.terminate()
        assert running.wait() == 0


def test_nothing_that_can_be_served_is_an_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nonsense")
    server = Server(str(bad), "--state-dir", str(tmp_path / "state"))
    try:
        assert server.wait() == 1
        assert any("bad.onnx" in line for line in server.raw)
    finally:
        server.kill()


def test_wrong_usage_exits_2(tmp_path: Path) -> None:
    assert run_cli("serve", "--http", "nonsense", "--model-repository", str(tmp_path)).returncode == 2
    assert run_cli("serve", "--model-repository", str(tmp_path / "missing")).returncode == 2
    assert run_cli("serve", "--no-such-flag").returncode == 2
    assert run_cli("serve").returncode == 2


def test_looks_that_fail_are_told_of_until_they_work_again(tmp_path: Path) -> None:
    folder, away = tmp_path / "models", tmp_path / "away"
    models.affine(folder / "affine" / "1" / "model.onnx")
    config = tmp_path / "tidegate.yaml"
    config.write_text("apiVersion: tidegate/v1\nserver: {model_control: poll, poll_interval: 100ms}\n")
    with serving(str(config), "--model-repository", str(folder), "--state-dir", str(tmp_path / "state")) as running:
        assert samples(running, "tidegate_poll_failing") == {"": 0}
        folder.rename(away)
        running.wait_for("poll_failed")
        wait_total(running, "tidegate_poll_failing", 1)
        assert infer(running.http, "affine", [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])])[0] == 200
        away.rename(folder)
        running.wait_for("poll_works_again")
        wait_total(running, "tidegate_poll_failing", 0)


def test_explicit_control(tmp_path: Path, repository: Path) -> None:
    with serving(
        "--model-repository", str(repository), "--model-control", "explicit", "--load-model", "affine",
        "--state-dir", str(tmp_path / "state"),
    ) as running:  # fmt: skip
        x = [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])]
        assert infer(running.http, "affine", x)[0] == 200
        assert infer(running.http, "declared", x)[0] in (404, 503)
        assert call(running.http, "POST", "/v2/repository/models/declared/load", {})[0] == 200
        assert infer(running.http, "declared", x)[0] == 200
        assert call(running.http, "POST", "/v2/repository/models/declared/unload", {})[0] == 200
        assert infer(running.http, "declared", x)[0] in (404, 503)
        status, body, _ = call(running.http, "POST", "/v2/repository/models/broken/load", {})
        assert status >= 400
        assert "broken" in body["error"]
        status, body, _ = call(
            running.http, "POST", "/v2/repository/models/declared/load", {"parameters": {"config": "{}"}}
        )
        assert status == 400


def test_check_config_and_doctor(tmp_path: Path) -> None:
    good = tmp_path / "good.yaml"
    models.affine(tmp_path / "m.onnx")
    good.write_text(f"apiVersion: tidegate/v1\nmodels:\n  m:\n    source: {tmp_path / 'm.onnx'}\n")
    assert run_cli("check-config", str(good)).returncode == 0
    bad = tmp_path / "bad.yaml"
    bad.write_text("apiVersion: tidegate/v1\nservr: {}\nmodels:\n  m:\n    sorce: x\n")
    done = run_cli("check-config", str(bad))
    assert done.returncode == 2
    assert "bad.yaml:2:1" in done.stdout + done.stderr
    assert "bad.yaml:5:5" in done.stdout + done.stderr
    done = run_cli("doctor", "--json", "--state-dir", str(tmp_path / "state"))
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert report["ok"] is True


def test_what_the_tests_start_is_what_they_import(tmp_path: Path) -> None:
    """Compiled or not: tests of the compiled request path would else talk to servers that have the source's."""
    findings = json.loads(cli("doctor", "--json", "--state-dir", str(tmp_path)).stdout)["findings"]
    (path,) = [check["detail"] for check in findings if check["check"] == "request path"]
    assert path.startswith("compiled") == server_types.__file__.endswith(".so")
