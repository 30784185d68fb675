"""A model directory as a registry: the contract, and what only a directory does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from router.registry.base import NotInRegistry, StorageFailed
from router.registry.polled import PolledRegistry
from tests.contracts.registry_contract import Case, Files, RegistryContract, model_files


def add(root: Path, model: str, files: Files) -> int:
    numbers = [int(path.name) for path in (root / model).glob("[0-9]*")]
    version = max(numbers, default=0) + 1
    for name, content in files.items():
        path = root / model / str(version) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return version


class TestContract(RegistryContract):
    def case(self, folder: Path) -> Case:
        root = folder / "repository"
        root.mkdir()
        return Case(PolledRegistry(root), lambda model, files: add(root, model, files))


def test_what_went_is_a_change(tmp_path: Path) -> None:
    add(tmp_path, "a", model_files())
    registry = PolledRegistry(tmp_path)
    cursor = registry.changes(0).generation
    shutil.rmtree(tmp_path / "a")
    assert registry.models() == ("a",)  # nobody looked yet
    assert registry.generation() > cursor
    assert registry.changes(cursor).models == {"a"}
    with pytest.raises(NotInRegistry):
        registry.versions("a")


def test_changed_bytes_are_another_digest(tmp_path: Path) -> None:
    add(tmp_path, "a", model_files(1))
    registry = PolledRegistry(tmp_path)
    before = registry.fetch("a", 1)
    (tmp_path / "a/1/weights.bin").write_bytes(b"other")
    registry.generation()
    after = registry.fetch("a", 1)
    assert after.digest != before.digest
    assert after.folder == before.folder == tmp_path / "a/1"


def test_bytes_that_changed_after_the_look_are_not_taken_for_those_seen(tmp_path: Path) -> None:
    add(tmp_path, "a", model_files(1))
    registry = PolledRegistry(tmp_path)
    (tmp_path / "a/1/weights.bin").write_bytes(b"other")
    with pytest.raises(StorageFailed, match=r"'weights\.bin' changed since the directory was looked at"):
        registry.fetch("a", 1)
    (tmp_path / "a/1/weights.bin").unlink()
    with pytest.raises(StorageFailed, match=r"'weights\.bin' cannot be read"):
        registry.fetch("a", 1)


def test_a_bare_file_is_version_one(tmp_path: Path) -> None:
    (tmp_path / "digits.onnx").write_bytes(b"graph")
    (tmp_path / "other.onnx").write_bytes(b"graph")
    fetched = PolledRegistry(tmp_path).fetch("digits", 1)
    assert fetched.folder == tmp_path
    assert [(entry.path, entry.role) for entry in fetched.files] == [("digits.onnx", "model")]


def test_a_model_file_that_is_a_folder(tmp_path: Path) -> None:
    files = {"model.onnx/model.onnx": b"graph", "model.onnx/w.bin": b"w", "labels.txt": b"l"}
    add(tmp_path, "a", files)
    fetched = PolledRegistry(tmp_path).fetch("a", 1)
    assert {entry.path: (fetched.folder / entry.path).read_bytes() for entry in fetched.files} == files
    assert {entry.path: entry.role for entry in fetched.files if entry.role != "other"} == {
        "model.onnx/model.onnx": "model",
        "labels.txt": "labels",
    }


def test_problems_are_told_and_spoil_nothing_else(tmp_path: Path) -> None:
    add(tmp_path, "a", model_files())
    (tmp_path / "b" / "1").mkdir(parents=True)
    registry = PolledRegistry(tmp_path)
    assert [found.version for found in registry.versions("a")] == [1]
    assert registry.versions("b") == ()
    assert [problem.model for problem in registry.problems] == ["b"]


def test_a_root_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="cannot be read"):
        PolledRegistry(tmp_path / "nowhere")
    root = tmp_path / "root"
    add(root, "a", model_files())
    registry = PolledRegistry(root)
    generation = registry.changes(0).generation
    os.rename(root, tmp_path / "away")
    with pytest.raises(StorageFailed):
        registry.generation()
    assert registry.models() == ("a",)
    os.rename(tmp_path / "away", root)
    assert registry.generation() == generation
