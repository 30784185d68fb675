"""The models that are served while load is measured.

All have one FP32 input ``x`` and one FP32 output ``y``, both batched, and weights from a fixed seed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from loadtests.session import session as session  # noqa: PLC0414 - offered here too, with the models

FEATURES: Final = 30
MODEL: Final = "bench"
#: 600 kB of FP32 in a row; about 1.4 MB of JSON when its numbers have few digits.
WIDE_FEATURES: Final = 150_000
WIDE: Final = "wide"
HEAVY: Final = "heavy"
HEAVY_FEATURES: Final = 64
HEAVY_ROWS: Final = 8
_OPSET: Final = 17
_IR_VERSION: Final = 8


def write_model(path: Path) -> None:
    """A two-layer network: FP32 [batch, 30] -> FP32 [batch, 2]."""
    _write_layers(path, (FEATURES, 64, 2))


def write_wide(path: Path) -> None:
    """Much to carry and little to compute: FP32 [batch, 150000] -> its first two columns."""
    ends = {"first": [0], "last": [2], "axis": [1]}
    weights = {name: np.array(value, np.int64) for name, value in ends.items()}
    _save(path, [helper.make_node("Slice", ["x", *weights], ["y"])], weights, WIDE_FEATURES)


def write_heavy(path: Path, width: int) -> None:
    """Much to compute and little to carry: FP32 [batch, 64] -> FP32 [batch, 2] by way of ``width`` x ``width``."""
    _write_layers(path, (HEAVY_FEATURES, width, width, 2))


def write_heavy_for(path: Path, batch_s: float) -> float:
    """The smallest heavy model of a doubling series whose batch takes ``batch_s``; returns how long it takes."""
    width = 1024
    while True:
        write_heavy(path, width)
        took = batch_seconds(session(path), HEAVY_ROWS, HEAVY_FEATURES)
        if took >= batch_s or width >= 16_384:
            return took
        width = int(width * 1.4)


def batch_seconds(model: ort.InferenceSession, rows: int, features: int, repeats: int = 5) -> float:
    """The shortest of a few runs of one batch."""
    batch = np.ones((rows, features), np.float32)
    return min(_timed(model, batch) for _ in range(repeats))


def _timed(model: ort.InferenceSession, batch: np.ndarray[Any, Any]) -> float:
    started = time.perf_counter()
    model.run(None, {"x": batch})
    return time.perf_counter() - started


def _write_layers(path: Path, sizes: tuple[int, ...]) -> None:
    """Matrices with a ReLU between them, scaled so that values keep their size."""
    random = np.random.default_rng(7)
    weights, nodes, came = {}, [], "x"
    layers = len(sizes) - 1
    for i in range(layers):
        matrix = random.standard_normal((sizes[i], sizes[i + 1]), dtype=np.float32)
        weights[f"w{i}"] = matrix / np.float32(np.sqrt(sizes[i]))
        out = "y" if i == layers - 1 else f"h{i}"
        nodes.append(helper.make_node("MatMul", [came, f"w{i}"], [out]))
        if out != "y":
            nodes.append(helper.make_node("Relu", [out], [f"r{i}"]))
            came = f"r{i}"
    _save(path, nodes, weights, sizes[0])


def _save(path: Path, nodes: list[Any], weights: dict[str, np.ndarray[Any, Any]], features: int) -> None:
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION), path)


def bench_row() -> np.ndarray[Any, Any]:
    """The one row that the small model is asked about."""
    return np.random.default_rng(1).standard_normal((1, FEATURES)).astype(np.float32)
