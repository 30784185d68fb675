"""server.offline.bundle: one folder that is whole, loads as a configuration, and shows every change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.config.load import load_config
from server.errors import FailedPrecondition, InvalidArgument, TidegateError
from server.offline.bundle import export_bundle, verify_bundle
from server.state import open_state
from tests.support import models


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    opened = open_state(folder)
    source = tmp_path / "source"
    models.affine(source / "model.onnx")
    (source / "labels.txt").write_text("a\nb\n")
    opened.registry.publish("m", source, alias="champion", actor="test")
    named = models.affine(tmp_path / "other.onnx", scale=5.0)
    opened.registry.publish("m", named, alias="challenger", actor="test")
    opened.close()
    return folder


def test_a_bundle_holds_the_version_and_a_configuration_that_loads(tmp_path: Path, state: Path) -> None:
    bundle = export_bundle("m", state, tmp_path / "out")
    assert (bundle.model, bundle.version, bundle.files) == ("m", 1, 3)
    assert verify_bundle(tmp_path / "out") == bundle
    config = load_config(tmp_path / "out" / "config.yaml")
    assert list(config.models) == ["m"]
    assert (tmp_path / "out/models/m/labels.txt").read_text() == "a\nb\n"
    assert json.loads((tmp_path / "out/manifest.json").read_text())["digest"] == bundle.digest
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("reference", "version"), [("m@challenger", 2), ("m:2", 2), ("m@champion", 1)])
def test_references_choose_the_version(tmp_path: Path, state: Path, reference: str, version: int) -> None:
    assert export_bundle(reference, state, tmp_path / "out").version == version


def test_nothing_is_ever_overwritten(tmp_path: Path, state: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FailedPrecondition, match="never overwritten"):
        export_bundle("m", state, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_fails_leaves_nothing(tmp_path: Path, state: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TidegateError, match="no alias 'shadow'"):
        export_bundle("m@shadow", state, tmp_path / "out")
    blob = next(path for path in (state / "blobs/sha256").glob("*/*"))
    for path in (state / "blobs/sha256").glob("*/*"):
        path.unlink()
    with pytest.raises(TidegateError, match="is missing"):
        export_bundle("m", state, tmp_path / "out")
    assert blob.name
    assert sorted(tmp_path.iterdir()) == before


def test_every_change_is_found(tmp_path: Path, state: Path) -> None:
    folder = tmp_path / "out"
    export_bundle("m", state, folder)
    model = folder / "models/m/model.onnx"
    model.chmod(0o644)
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(TidegateError, match=r"models/m/model\.onnx was changed"):
        verify_bundle(folder)
    model.unlink()
    with pytest.raises(TidegateError, match=r"models/m/model\.onnx is missing"):
        verify_bundle(folder)
    (tmp_path / "elsewhere.onnx").write_bytes(whole)
    model.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(TidegateError, match="is not a regular file"):
        verify_bundle(folder)
    model.unlink()
    model.write_bytes(whole)
    verify_bundle(folder)
    (folder / "models/m/libop.so").write_text("")
    with pytest.raises(TidegateError, match=r"libop\.so is not listed"):
        verify_bundle(folder)


def test_what_serving_leaves_in_it_is_no_change(tmp_path: Path, state: Path) -> None:
    export_bundle("m", state, tmp_path / "out")
    (tmp_path / "out/state").mkdir()
    (tmp_path / "out/state/tidegate.db").write_text("")
    verify_bundle(tmp_path / "out")


@pytest.mark.parametrize("manifest", ["", "[]", '{"format": "x"}', '{"format": "tidegate.bundle/1"}'])
def test_what_is_no_bundle_is_said_to_be_none(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(InvalidArgument, match=r"manifest\.json"):
        verify_bundle(tmp_path)


def test_an_empty_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is no bundle"):
        verify_bundle(tmp_path)
