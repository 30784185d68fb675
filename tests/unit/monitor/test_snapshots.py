"""Snapshot files: names that differ and stay in the folder, whole writes, pruning."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from monitor import snapshots


@pytest.mark.parametrize("other", [("m", "1", "b"), ("m", "2", "a"), ("n", "1", "a"), ("m\0" + "1", "", "a")])
def test_names_differ_by_model_version_and_profile(other: tuple[str, str, str]) -> None:
    assert snapshots.file_name("m", "1", "a") != snapshots.file_name(*other)
    assert snapshots.file_name("m", "1", "a").startswith("m-1-")


def test_names_are_plain_file_names(tmp_path: Path) -> None:
    name = snapshots.file_name("../../etc/" + "x" * 500, "v/\n2", "sha")
    snapshots.write(tmp_path / "new" / "folder", name, b"state")
    assert (tmp_path / "new" / "folder" / name).read_bytes() == b"state"
    assert snapshots.read(tmp_path / "new" / "folder", name) == b"state"
    assert snapshots.read(tmp_path, name) is None


def test_pruning_keeps_the_named_and_the_newest_others(tmp_path: Path) -> None:
    for age, name in enumerate(("new.state", "old.state", "older.state", "oldest.state")):
        snapshots.write(tmp_path, name, b"")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "note.txt").write_text("not ours")
    assert snapshots.prune(tmp_path, {"oldest.state"}, 1) == ["old.state", "older.state"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.state", "note.txt", "oldest.state"]
