from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from server.errors import ModelLoadError
from server.runtime import modelfile
from tests.unit.runtime.graphs import FLOAT, INT64, constant, node, save, unary


def external(path: Path, location: str = "weights.bin") -> Path:
    """A graph whose one constant lies in a file beside it, and another inside a sub-graph."""
    inner = helper.make_graph(
        [node("Identity", ["deep"], ["z"])],
        "inner",
        [],
        [helper.make_tensor_value_info("z", FLOAT, [4])],
        [constant("deep", np.ones(4))],
    )
    save(
        path,
        [node("If", ["c"], ["i"], then_branch=inner, else_branch=inner), node("Add", ["i", "w"], ["y"])],
        [("c", onnx.TensorProto.BOOL, [])],
        [("y", FLOAT, [4])],
        [constant("w", np.ones(4))],
    )
    model = onnx.load(str(path))
    onnx.save(model, str(path), save_as_external_data=True, location=location, size_threshold=0)
    return path


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "does not exist"), (b"", "is empty")],
)
def test_what_is_no_model_file(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=rf"^model.onnx {reason}\.$"):
        modelfile.check(path)


def test_a_folder_is_no_model_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is not a regular file"):
        modelfile.check(tmp_path)


def test_a_file_over_the_format_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(modelfile.MAX_FILE_BYTES + 1)
    with pytest.raises(ModelLoadError, match="2147483648 bytes; an ONNX file has at most 2147483647"):
        modelfile.check(path)


def test_external_data_is_found_and_counts_in_the_digest(tmp_path: Path) -> None:
    path = external(tmp_path / "model.onnx")
    assert modelfile.external_locations(path) == {"weights.bin"}
    before = modelfile.digest(path)
    assert before == modelfile.digest(path)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[::-1] + b"x")
    assert modelfile.digest(path) != before


def test_external_data_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    path = external(tmp_path / "in" / "model.onnx", "weights.bin")
    secret = tmp_path / "secret"
    secret.write_bytes(b"1")
    (path.parent / "weights.bin").unlink()
    (path.parent / "weights.bin").symlink_to(secret)
    before = modelfile.digest(path)
    secret.write_bytes(b"2")
    assert modelfile.digest(path) == before


def test_the_digest_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    first = unary(tmp_path / "a" / "model.onnx", "Relu")
    second = unary(tmp_path / "b" / "other.onnx", "Relu")
    third = unary(tmp_path / "c" / "model.onnx", "Sigmoid")
    assert modelfile.digest(first) == modelfile.digest(second) != modelfile.digest(third)


def test_a_missing_shape_is_not_a_scalar(tmp_path: Path) -> None:
    path = save(
        tmp_path / "model.onnx",
        [node("Reshape", ["x", "s"], ["y"])],
        [("x", FLOAT, None), ("s", INT64, [])],
        [("y", FLOAT, None)],
    )
    assert modelfile.unranked(path) == {"x", "y"}


@pytest.mark.parametrize(
    "content", [b"\xff" * 40, b"location" * 3, bytes(range(256)), b":\xff\xff\xff\xff\x0flocation"]
)
def test_garbage_holds_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert modelfile.external_locations(path) == set()
    assert modelfile.unranked(path) == set()
    assert len(modelfile.digest(path)) == 64
