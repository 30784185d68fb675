"""Models and holdout data for gates: small sklearn models as ONNX, each with a property that a gate is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import to_onnx
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.tree import DecisionTreeClassifier

COLUMNS = ("age", "income", "debt", "region")
TRAINED, HELD = 4000, 3000


def draw(rows: int, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Features (rows, 4) FP32 and labels: more age and debt, and less income, make a yes likelier. Region is 0..3."""
    rng = np.random.default_rng(seed)
    features = np.column_stack([rng.normal(size=(rows, 3)), rng.integers(0, 4, rows)]).astype(np.float32)
    score = 1.5 * features[:, 0] - features[:, 1] + 0.7 * features[:, 2]
    return features, (rng.random(rows) < 1 / (1 + np.exp(-score))).astype(int)


def write_holdout(path: Path, *, labels: bool = True, seed: int = 2) -> Path:
    """A CSV of rows that no model was trained on."""
    features, label = draw(HELD, seed)
    table = np.column_stack([features, label] if labels else [features])
    head = ",".join([*COLUMNS, "label"] if labels else COLUMNS)
    np.savetxt(path, table, delimiter=",", header=head, comments="", fmt="%.6g")
    return path


def _save(path: Path, model: Any, *, zipmap: bool = True) -> Path:
    options = {id(model): {"zipmap": False}} if zipmap else None
    path.write_bytes(to_onnx(model, draw(1, 0)[0], options=options, target_opset=17).SerializeToString())
    return path


def good(path: Path, seed: int = 1) -> Path:
    """A logistic regression that fits; another seed is another sample of the same."""
    return _save(path, LogisticRegression().fit(*draw(TRAINED, seed)))


def worse(path: Path) -> Path:
    """The same from labels of which 3 in 10 are wrong."""
    features, label = draw(TRAINED, 1)
    wrong = np.random.default_rng(3).random(TRAINED) < 0.3
    return _save(path, LogisticRegression().fit(features, np.where(wrong, 1 - label, label)))


def biased(path: Path) -> Path:
    """As good as others in regions 0 to 2, and no better than a coin in region 3."""
    weights = np.array([1.5, -1.0, 0.7, 0.0], np.float32)
    initial = {"w": weights.reshape(4, 1), "cut": np.array([2.5], np.float32), "last": np.array([3], np.int64)}
    return _graph(
        path,
        [
            helper.make_node("MatMul", ["x", "w"], ["score"]),
            helper.make_node("Gather", ["x", "last"], ["region"], axis=1),
            helper.make_node("Less", ["region", "cut"], ["fair"]),
            helper.make_node("Cast", ["fair"], ["factor"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["score", "factor"], ["left"]),
            helper.make_node("Sigmoid", ["left"], ["p"]),
        ],
        initial,
    )


def tree(path: Path) -> Path:
    """A decision tree: finite whatever its inputs are, and up and down in every one of them."""
    return _save(path, DecisionTreeClassifier(max_depth=10, random_state=0).fit(*draw(TRAINED, 1)))


def slow(path: Path, size: int = 512, layers: int = 16) -> Path:
    """The truth, by a detour of matrix products that takes many times as long."""
    weights = np.array([1.5, -1.0, 0.7, 0.0], np.float32).reshape(4, 1)
    wide = np.zeros((1, size), np.float32)
    wide[0, 0] = 1
    narrow = wide.reshape(size, 1)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["s"]), helper.make_node("MatMul", ["s", "wide"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{i}", f"m{i}"], [f"h{i + 1}"]) for i in range(layers)]
    nodes += [
        helper.make_node("MatMul", [f"h{layers}", "narrow"], ["t"]),
        helper.make_node("Sigmoid", ["t"], ["p"]),
    ]
    middle = {f"m{i}": np.eye(size, dtype=np.float32) for i in range(layers)}
    return _graph(path, nodes, {"w": weights, "wide": wide, "narrow": narrow, **middle})


def truth(path: Path, scale: float = 1.0) -> Path:
    """The chance that labels are drawn with, for a scale of 1."""
    weights = scale * np.array([1.5, -1.0, 0.7, 0.0], np.float32).reshape(4, 1)
    return _graph(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["s"]), helper.make_node("Sigmoid", ["s"], ["p"])],
        {"w": weights},
    )


def not_finite(path: Path) -> Path:
    """The truth where age is over -1, and NaN elsewhere."""
    return _graph(
        path,
        [
            helper.make_node("MatMul", ["x", "w"], ["s"]),
            helper.make_node("Gather", ["x", "first"], ["age"], axis=1),
            helper.make_node("Add", ["age", "one"], ["over"]),
            helper.make_node("Sqrt", ["over"], ["root"]),
            helper.make_node("Mul", ["root", "zero"], ["nothing"]),
            helper.make_node("Sigmoid", ["s"], ["q"]),
            helper.make_node("Add", ["q", "nothing"], ["p"]),
        ],
        {
            "w": np.array([1.5, -1.0, 0.7, 0.0], np.float32).reshape(4, 1),
            "first": np.array([0], np.int64),
            "one": np.array([1], np.float32),
            "zero": np.array([0], np.float32),
        },
    )


def line(path: Path, shift: float = 0.0) -> Path:
    """A linear regression of income on the other columns' draw, ``shift`` beside the truth."""
    features, _ = draw(TRAINED, 1)
    return _save(path, LinearRegression().fit(features, 2 * features[:, 0] + features[:, 2] + shift), zipmap=False)


def _graph(path: Path, nodes: list[Any], constants: dict[str, np.ndarray[Any, Any]]) -> Path:
    """``p`` [n, 1] from ``X`` [n, 4], which sklearn's models call their input; nodes call it ``x``."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["X"], ["x"]), *nodes],
        "gate",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path
