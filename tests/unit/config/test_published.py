"""server.config.published: options, files beside the graph, and the signature of a registry's version."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.registry.base import Version
from router.registry.manifest import CONFIG, DATA, MODEL, Description, FileEntry, Manifest, Signature, TensorEntry
from server.config.published import files_beside, options_of, signature_of
from server.errors import ModelLoadError
from server.runtime.base import ModelOptions
from server.types import TensorSpec

GRAPH = FileEntry("sub/model.onnx", "a" * 64, 1, MODEL)


def test_files_beside_the_graph() -> None:
    weights = FileEntry("sub/deep/w.bin", "b" * 64, 1, DATA)
    other = FileEntry("w.bin", "c" * 64, 1, DATA)
    text = FileEntry("sub/readme", "d" * 64, 1)
    manifest = Manifest((GRAPH, weights, other, text))
    assert files_beside(GRAPH, manifest) == {"model.onnx": GRAPH, "deep/w.bin": weights}


def test_options_of_its_own_configuration(tmp_path: Path) -> None:
    base = ModelOptions()
    assert options_of("m", Manifest((GRAPH,)), tmp_path, base) is base
    manifest = Manifest((GRAPH, FileEntry("config.pbtxt", "e" * 64, 1, CONFIG)))
    with pytest.raises(ModelLoadError, match=r"config\.pbtxt cannot be read"):
        options_of("m", manifest, tmp_path, base)
    (tmp_path / "config.pbtxt").write_text('platform: "onnxruntime_onnx"\nmax_batch_size: 8\n')
    assert options_of("m", manifest, tmp_path, base).max_batch_size == 8


def test_signatures() -> None:
    assert signature_of(Version("m", 1), "m", "1") is None
    assert signature_of(Version("m", 1, manifest=Manifest((GRAPH,))), "m", "1") is None
    signature = Signature((TensorEntry("x", "FP32", (-1, 4)),), (TensorEntry("y", "FP32", (-1, 1)),))
    found = signature_of(Version("m", 1, manifest=Manifest((GRAPH,), Description(signature))), "public", "7")
    assert found is not None
    assert (found.name, found.version) == ("public", "7")
    assert found.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert found.outputs == (TensorSpec("y", "FP32", (-1, 1)),)
