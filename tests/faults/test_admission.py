"""Hostile and changing files against the real runtime: each is refused with one sentence, and nothing else happens."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from server.errors import ModelLoadError
from server.runtime.base import Batch, InspectionLimits, LoadRequest, ModelOptions
from server.runtime.onnx import OnnxEngine, OnnxRuntime
from tests.support.models import affine, identity, save

FLOAT = onnx.TensorProto.FLOAT


def load(path: Path, folder: Path | None = None, **fields: Any) -> OnnxEngine:
    request = LoadRequest("m", "1", path, ModelOptions(), folder=folder or path.parent, **fields)
    return OnnxRuntime(measure_budget_s=0).load(request)


def refusal(path: Path, **fields: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(path, **fields)
    message = caught.value.message
    assert message.endswith(".")
    assert "\n" not in message
    assert str(path.parent) not in message
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def external(path: Path) -> Path:
    """``y = x + w`` with ``w`` in ``w.bin``."""
    save(
        path,
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [("x", FLOAT, ["n", 4])],
        [("y", FLOAT, ["n", 4])],
        {"w": np.arange(4, dtype=np.float32)},
    )
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


def answer(engine: OnnxEngine) -> list[float]:
    (output,) = engine.run(0, Batch(1, [(1, 4)], [[np.zeros(4, "<f4").tobytes()]]))
    return output.array().ravel().tolist()


class Tripwire(dict[str, Any]):
    """A manifest that lets files be changed at the moment it is first asked: hashed already, not loaded yet."""

    def __init__(self, files: list[Path], change: Callable[[], None]) -> None:
        super().__init__({file.name: Entry(file) for file in files})
        self._change: Callable[[], None] | None = change

    def get(self, key: str, default: Any = None) -> Any:
        if self._change is not None:
            self._change()
            self._change = None
        return super().get(key, default)


class Entry:
    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        self.size = len(content)
        self.sha256 = hashlib.sha256(content).hexdigest()


# --- bytes that change -----------------------------------------------------------------------------------------------


def test_other_bytes_than_were_admitted(path: Path) -> None:
    admitted = load(affine(path)).spec.digest
    assert load(path, expected_digest=admitted).spec.digest == admitted
    affine(path, scale=3.0)
    now = hashlib.sha256(path.read_bytes()).hexdigest()
    assert refusal(path, expected_digest=admitted) == (
        f"model.onnx: bytes changed after admission, the digest was {admitted[:12]} and is {now[:12]}."
    )


def test_weights_other_than_were_admitted(path: Path) -> None:
    engine = load(external(path))
    assert answer(engine) == [0, 1, 2, 3]
    engine.close()
    weights = path.parent / "w.bin"
    weights.write_bytes(weights.read_bytes()[::-1])
    assert "bytes changed after admission" in refusal(path, expected_digest=engine.spec.digest)


def test_a_model_swapped_between_hash_and_load(path: Path, tmp_path: Path) -> None:
    other = affine(tmp_path / "other" / "model.onnx", scale=5.0)
    listed = Tripwire([affine(path)], lambda: other.replace(path))
    assert refusal(path, listed=listed) == "'model.onnx' was changed while it was loaded."


def test_a_model_swapped_and_swapped_back(path: Path, tmp_path: Path) -> None:
    """The path leads to the first file again when the load is over; that it was away shows."""
    affine(path)
    moved = tmp_path / "moved"

    def away_and_back() -> None:
        path.rename(moved)
        moved.rename(path)

    stamp = path.stat().st_ctime_ns
    while time.time_ns() < stamp + 200_000_000:  # the file must be older than the clock's grain: this costs 0.2 s
        os.sched_yield()
    assert "was changed while it was loaded" in refusal(path, listed=Tripwire([path], away_and_back))


def test_weights_written_between_hash_and_load(path: Path) -> None:
    weights = path.parent / "w.bin"
    external(path)
    changed = weights.read_bytes()[::-1]
    listed = Tripwire([path, weights], lambda: weights.write_bytes(changed) and None)
    assert refusal(path, listed=listed) == "'w.bin' was changed while it was loaded."


def test_a_model_cut_short_between_hash_and_load(path: Path) -> None:
    listed = Tripwire([affine(path)], lambda: os.truncate(path, 20))
    assert refusal(path, listed=listed).startswith("model.onnx cannot be loaded: ")


# --- hostile files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret"])
def test_external_data_outside_is_refused_before_a_session_is_built(path: Path, location: str) -> None:
    external(path)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    assert refusal(path).startswith("Tensor 'w' has its external data at ")


def test_a_graph_nested_ten_thousand_deep(path: Path) -> None:
    content = b""
    for tag in (b"\x32", b"\x2a", b"\x0a") * 10_000:
        content = tag + _varint(len(content)) + content
    path.write_bytes(b"\x3a" + _varint(len(content)) + content)
    assert refusal(path) == "model.onnx has graphs inside graphs more than 32 deep."


def test_a_file_of_nothing_but_nodes_takes_bounded_time(path: Path) -> None:
    content = b"\x0a\x00" * 20_000_000
    path.write_bytes(b"\x3a" + _varint(len(content)) + content)
    assert refusal(path, limits=InspectionLimits(max_fields=1_000_000)) == (
        "model.onnx has more than 1000000 fields to look at."
    )


def test_versions_that_are_too_new_name_both_numbers(path: Path) -> None:
    model = onnx.load(identity(path))
    model.opset_import[0].version = 1000
    path.write_bytes(model.SerializeToString())
    assert "needs opset 1000 of ai.onnx, onnxruntime " in refusal(path)
    model.opset_import[0].version = 17
    model.ir_version = 1000
    path.write_bytes(model.SerializeToString())
    assert "has IR version 1000, onnxruntime " in refusal(path)


# --- custom operators ------------------------------------------------------------------------------------------------


def allowed(*libraries: Path) -> InspectionLimits:
    return InspectionLimits(
        allowed_custom_ops=frozenset(hashlib.sha256(library.read_bytes()).hexdigest() for library in libraries)
    )


def test_a_library_is_loaded_only_when_its_digest_is_allowed(path: Path, tmp_path: Path) -> None:
    library = tmp_path / "elsewhere" / "ops.so"
    library.parent.mkdir()
    library.write_bytes(b"\x7fELF")
    digest = hashlib.sha256(b"\x7fELF").hexdigest()
    identity(path)
    message = refusal(path, folder=path.parent, custom_ops=(library,), limits=allowed(path))
    assert "'elsewhere/ops.so' beside the model is a shared library" in message
    library.replace(tmp_path.parent / f"{tmp_path.name}-ops.so")
    library = tmp_path.parent / f"{tmp_path.name}-ops.so"
    assert refusal(path, custom_ops=(library,)) == (
        f"Custom-operator library {library.name} has SHA-256 {digest[:12]}, which is not allowed."
    )
    message = refusal(path, custom_ops=(library,), limits=allowed(library))
    assert message.startswith(f"Custom-operator library {library.name} cannot be loaded: ")
    assert str(library.parent) not in message


def test_a_library_that_is_not_there(path: Path, tmp_path: Path) -> None:
    message = refusal(identity(path), custom_ops=(tmp_path / "ops.so",))
    assert message == "There is no custom-operator library 'ops.so'."


def test_operators_of_an_allowed_library_run(path: Path) -> None:
    spec = importlib.util.find_spec("onnxruntime_extensions")
    if spec is None or spec.origin is None:
        pytest.skip("onnxruntime-extensions is not installed")
    (library,) = Path(spec.origin).parent.glob("_extensions_pydll*.so")
    string = onnx.TensorProto.STRING
    graph = helper.make_graph(
        [helper.make_node("StringUpper", ["x"], ["y"], domain="ai.onnx.contrib")],
        "upper",
        [helper.make_tensor_value_info("x", string, ["n", 1])],
        [helper.make_tensor_value_info("y", string, ["n", 1])],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.contrib", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString())
    assert "uses operator 'StringUpper' of domain 'ai.onnx.contrib'" in refusal(path)
    engine = load(path, custom_ops=(library,), limits=allowed(library))
    (output,) = engine.run(0, Batch(1, [(1, 1)], [[[b"abc"]]]))
    assert output.data == [b"ABC"]


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])
