"""Capture of a live server: what callers were answered is what the segments hold, and labels find it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import duckdb
import grpc
import numpy as np
import pytest

from server._pb import inference_pb2 as pb
from server.capture.segments import entries
from tests.support import models
from tests.support.cli import quickly
from tests.support.metrics import total
from tests.support.routed import eventually
from tests.support.server import Server, serving
from tests.support.v2 import call, tensor

CONFIG = """\
apiVersion: tidegate/v1
capture:
  {{sample: 100%, format: parquet, segment: {{rows: 40}}, columns: {{"x[1]": drop}}, models: {{quiet: {{sample: 0%}}}}}}
models:
  m: {{versions: {{"1": {{source: {root}/m.onnx}}}}, aliases: [also]}}
  quiet: {{versions: {{"1": {{source: {root}/m.onnx}}}}}}
"""


def serve(root: Path) -> Any:
    models.affine(root / "m.onnx", scale=2.0, shift=1.0)
    (root / "config.yaml").write_text(CONFIG.format(root=root))
    return serving(str(root / "config.yaml"), "--state-dir", str(root / "state"))


def ask(server: Server, number: int, *, name: str = "m", width: int = 4) -> int:
    """One request; those of odd numbers have an id of their own."""
    body: dict[str, Any] = {"inputs": [tensor("x", "FP32", [1, width], [number] * width)]}
    if number % 2:
        body["id"] = f"c{number}"
    return call(server.http, "POST", f"/v2/models/{name}/infer", body)[0]


def ask_grpc(channel: grpc.Channel, number: int) -> None:
    request = pb.ModelInferRequest(model_name="m", id=f"g{number}")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.full(4, number, np.float32).tobytes())
    infer = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelInferResponse.FromString,
    )
    infer(request, timeout=20)


def test_segments_hold_what_callers_were_answered(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "capture"
    with serve(tmp_path) as server:

        def caller(first: int) -> None:
            for number in range(first, 100, 4):
                assert ask(server, number, name="also" if number % 3 == 0 else "m") == 200

        threads = [threading.Thread(target=caller, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        with grpc.insecure_channel(server.grpc) as channel:
            for number in range(200, 210):
                ask_grpc(channel, number)
        assert ask(server, 1000, width=3) == 400
        assert ask(server, 1001, name="nobody") == 404
        assert ask(server, 7, name="quiet") == 200
        labels = [{"id": f"c{number}", "outcome": number} for number in range(1, 100, 2)]
        status, told, _ = call(server.http, "POST", "/v2/models/also/feedback", labels)
        assert (status, told) == (200, {"accepted": 50, "joined": 50})
        assert call(server.http, "POST", "/v2/models/quiet/feedback", labels[3])[1]["joined"] == 0
        assert total(server, "tidegate_captured_total") == 111 + 50
        server.terminate()
        assert server.wait() == 0
    assert len(entries(folder, "m", "requests")) > 2
    assert not (folder / "quiet").exists()
    quickly("data", "export", "--capture-dir", str(folder), "--model", "m", "-o", str(tmp_path / "out.parquet"))
    with duckdb.connect() as connection:
        connection.execute(f"CREATE VIEW rows AS SELECT * FROM '{tmp_path / 'out.parquet'}'")  # noqa: S608

        def one(query: str) -> object:
            return connection.execute(f"SELECT {query} FROM rows").fetchone()  # noqa: S608 - the test's own words

        assert one("count(*), count(DISTINCT __id)") == (111, 111)
        assert one('count(*) FILTER ("y[0]" = 2 * "x[0]" + 1 AND "y[3]" = 2 * "x[3]" + 1)') == (110,)
        assert one("count(*) FILTER (__label = \"x[0]\" AND __client_id = 'c' || CAST(__label AS INT))") == (50,)
        assert one("count(*) FILTER (__status = 'invalid_argument' AND \"x[0]\" IS NULL)") == (1,)
        assert one("count(*) FILTER (__arm = 'stable' AND __version = '1' AND __latency_ns > 0)") == (111,)
        assert one("count(*) FILTER (__client_id LIKE 'g%')") == (10,)
        names = {row[0] for row in connection.execute("DESCRIBE rows").fetchall()}
        assert {"x[0]", "x[2]"} <= names
        assert "x[1]" not in names


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_the_libraries_of_a_format_come_when_they_are_needed_and_go_without_a_word(tmp_path: Path, form: str) -> None:
    models.affine(tmp_path / "m.onnx", scale=2.0, shift=1.0)
    (tmp_path / "config.yaml").write_text(CONFIG.format(root=tmp_path).replace("parquet", form))
    with serving(str(tmp_path / "config.yaml"), "--state-dir", str(tmp_path / "state")) as server:
        assert ask(server, 1) == 200
        loaded = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert ("duckdb" in loaded) == (form == "parquet")
        server.terminate()
        assert server.wait() == 0
        assert len(entries(tmp_path / "state" / "capture", "m", "requests")) == 1
        assert [line for line in server.lines if line["event"] == ""] == [], server.raw


SHADOWED = """\
apiVersion: tidegate/v1
capture: {{sample: 30%, format: parquet, shadows: {shadows}}}
models:
  m:
    versions: {{"1": {{source: {root}/m.onnx}}, "2": {{source: {root}/n.onnx}}}}
    stable: "1"
    shadow: [{{to: "2", sample: 100%, budget: {{rps: 100000, timeout: 20s}}}}]
"""
ASKED = 300


@pytest.mark.parametrize("shadows", ["true", "false"])
def test_what_a_shadow_answered_is_captured_beside_its_request(tmp_path: Path, shadows: str) -> None:
    models.affine(tmp_path / "m.onnx", scale=2.0, shift=1.0)
    models.affine(tmp_path / "n.onnx", scale=3.0, shift=0.0)
    (tmp_path / "config.yaml").write_text(SHADOWED.format(root=tmp_path, shadows=shadows))
    folder = tmp_path / "state" / "capture"
    with serving(str(tmp_path / "config.yaml"), "--state-dir", str(tmp_path / "state")) as server:
        server.wait_for("shadow_ready")
        for number in range(ASKED):
            assert ask(server, number) == 200
        eventually(lambda: total(server, "tidegate_shadow_pairs_total") == ASKED)
        server.terminate()
        assert server.wait() == 0
    if shadows == "false":
        assert entries(folder, "m", "shadows") == []
        return
    out = str(tmp_path / "o.npz")
    quickly("data", "export", "--capture-dir", str(folder), "--model", "m", "--shadow", "2", "-o", out)
    with np.load(out) as found:
        x = found["x[0]"]
        assert 0.1 * ASKED < len(x) < 0.5 * ASKED, "about 30 %: half of the ids are the server's, and new in each run"
        assert np.array_equal(found["y[0]"], 2 * x + 1)
        assert np.array_equal(found["shadow:y[0]"], 3 * x)
        assert set(found["__shadow_status"]) == {"ok"}
