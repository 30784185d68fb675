"""Memory comes back after an unload, and does not creep over many loads and unloads."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from tests.support import models
from tests.support.server import Server, serving
from tests.support.v2 import call

MIB = 2**20
WEIGHTS_MIB = 96
SLACK_MIB = 32
CYCLES = 5


def heavy(path: Path) -> Path:
    """A model of ``WEIGHTS_MIB`` of weights."""
    width = WEIGHTS_MIB * MIB // 4 // 64
    weight = np.random.default_rng(0).standard_normal((64, width)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("ReduceSum", ["h", "axes"], ["y"])]
    kind = TensorProto.FLOAT
    return models.save(
        path, nodes, [("x", kind, ["n", 64])], [("y", kind, ["n", 1])], {"w": weight, "axes": np.array([1])}
    )


def resident_mib(server: Server) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def test_memory_returns_and_does_not_creep(tmp_path: Path) -> None:
    heavy(tmp_path / "models" / "heavy" / "1" / "model.onnx")
    models.affine(tmp_path / "models" / "light" / "1" / "model.onnx")
    with serving(
        "--model-repository", str(tmp_path / "models"), "--state-dir", str(tmp_path / "state"),
        "--model-control", "explicit", "--load-model", "light",
    ) as server:  # fmt: skip
        after: list[float] = []
        before = resident_mib(server)
        for _ in range(CYCLES):
            assert call(server.http, "POST", "/v2/repository/models/heavy/load", {})[0] == 200
            assert resident_mib(server) > before + WEIGHTS_MIB / 2
            assert call(server.http, "POST", "/v2/repository/models/heavy/unload", {})[0] == 200
            until = time.monotonic() + 20
            while resident_mib(server) > before + SLACK_MIB and time.monotonic() < until:
                time.sleep(0.05)
            after.append(resident_mib(server))
        assert max(after) < before + SLACK_MIB, (before, after)
