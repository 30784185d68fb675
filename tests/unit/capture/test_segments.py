"""server.capture.segments: whole or not there, within the cap, true whatever a dead writer left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.capture.formats import StorageError
from server.capture.segments import Facts, SegmentStore, entries, is_whole, read_entry
from server.errors import ConfigError


def store(folder: Path, max_bytes: int = 10**9, max_segments: int = 100, form: str = "jsonl") -> SegmentStore:
    return SegmentStore(folder, form, max_bytes=max_bytes, max_segments=max_segments)


def write(opened: SegmentStore, at: int, rows: int = 3) -> Any:
    return opened.write(Facts("requests", "m", "1", "d", at, at), {"a": np.arange(rows), "b": np.ones(rows, "f4")})


def times(folder: Path) -> list[int]:
    return [entry.facts.first_ns for entry in entries(folder, "m", "requests")]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_segment_is_listed_with_its_digest(tmp_path: Path, form: str) -> None:
    opened = store(tmp_path, form=form)
    written = write(opened, 5)
    (entry,) = entries(tmp_path, "m", "requests")
    assert entry == written
    assert (entry.rows, entry.columns) == (3, {"a": "BIGINT", "b": "FLOAT"})
    assert is_whole(entry)
    entry.path.write_bytes(entry.path.read_bytes()[:-1])
    assert not is_whole(entry)
    opened.close()


def test_the_oldest_go_when_the_disk_share_is_used(tmp_path: Path) -> None:
    opened = store(tmp_path)
    size = write(opened, 1).size
    opened.close()
    opened = store(tmp_path, max_bytes=3 * size)
    for at in range(2, 10):
        write(opened, at)
        held = sum(path.stat().st_size for path in tmp_path.rglob("*.jsonl"))
        assert held == opened.bytes <= 3 * size
    assert times(tmp_path) == [7, 8, 9]
    assert opened.removed == 6
    opened.close()


def test_the_oldest_go_when_there_are_too_many(tmp_path: Path) -> None:
    opened = store(tmp_path, max_segments=2)
    for at in range(5):
        write(opened, at)
    assert times(tmp_path) == [3, 4]
    opened.close()


def test_a_segment_over_the_whole_share_is_refused_without_a_trace(tmp_path: Path) -> None:
    opened = store(tmp_path, max_bytes=10)
    with pytest.raises(StorageError, match="over the 10 that may be kept"):
        write(opened, 1)
    assert list((tmp_path / "m").iterdir()) == []
    opened.close()


def test_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    opened = store(tmp_path)
    first = write(opened, 1)
    opened.close()
    opened = store(tmp_path)
    assert write(opened, 1).file != first.file
    assert len(entries(tmp_path, "m", "requests")) == 2
    opened.close()


def test_one_process_writes_a_folder(tmp_path: Path) -> None:
    opened = store(tmp_path)
    with pytest.raises(ConfigError, match="written by another process"):
        store(tmp_path)
    opened.close()
    store(tmp_path).close()


def left_behind(folder: Path, step: str) -> None:
    """What a writer leaves that dies at a step of its second segment."""
    opened = store(folder)
    write(opened, 1)
    second = write(opened, 2)
    opened.close()
    entry = second.path.with_name(second.file + ".json")
    if step == "before the names":
        second.path.rename(second.path.with_name(f".{second.file}.tmp"))
    if step in {"before the names", "between the names"}:
        entry.rename(entry.with_name(f".{entry.name}.tmp"))
    if step == "no file":
        second.path.unlink()
    if step == "no entry":
        entry.unlink()


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        ("before the names", [1]),
        ("between the names", [1, 2]),
        ("no file", [1]),
        ("no entry", [1]),
    ],
)
def test_what_a_dead_writer_left_is_finished_or_removed(tmp_path: Path, step: str, kept: list[int]) -> None:
    left_behind(tmp_path, step)
    opened = store(tmp_path)
    assert times(tmp_path) == kept
    assert all(is_whole(entry) for entry in entries(tmp_path, "m", "requests"))
    assert opened.bytes == sum(entry.size for entry in entries(tmp_path, "m", "requests"))
    assert [path.name for path in (tmp_path / "m").iterdir() if path.name.startswith(".")] == []
    assert len(list((tmp_path / "m").iterdir())) == 2 * len(kept)
    opened.close()


def test_an_entry_that_somebody_else_spoilt_is_left_alone_and_named(tmp_path: Path) -> None:
    opened = store(tmp_path)
    written = write(opened, 1)
    opened.close()
    entry = written.path.with_name(written.file + ".json")
    entry.write_text("{")
    store(tmp_path).close()
    assert written.path.exists()
    with pytest.raises(StorageError, match=entry.name):
        entries(tmp_path, "m", "requests")


def test_readers_leave_out_what_is_removed_meanwhile(tmp_path: Path) -> None:
    opened = store(tmp_path)
    write(opened, 1)
    opened.close()
    shutil.rmtree(tmp_path / "m")
    assert entries(tmp_path, "m", "requests") == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other/1"}'])
def test_what_is_no_entry_is_said_to_be_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "requests-1.jsonl.json"
    path.write_text(content)
    with pytest.raises(StorageError, match=r"requests-1\.jsonl\.json"):
        read_entry(path)
