"""Saved counts: one file for each profile and settings, a bounded number of them, and no error that escapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import structlog

from monitor.engine import Monitor
from monitor.profile import ReferenceProfile
from monitor.tap import Item
from monitor.types import Settings, rows_window
from server.monitoring.files import StateFiles

ROWS = np.random.default_rng(1).standard_normal((400, 1)).astype("f4")
PROFILE = ReferenceProfile.from_arrays({"x": ROWS})


def monitor(version: str = "1", length: int = 100, count: int = 0) -> Monitor:
    made = Monitor("m", version, PROFILE, Settings(windows=(rows_window(length),)))
    if count:
        made.ingest(made.keys, [Item(1, "stable", count, 0, [[ROWS[:count].tobytes()]])])
    return made


def restored(files: StateFiles, made: Monitor) -> tuple[dict[str, int], list[Any]]:
    with structlog.testing.capture_logs() as logs:
        files.restore(made)
    return made.report().counted, logs


def test_what_was_saved_is_gone_on_from(tmp_path: Path) -> None:
    files = StateFiles(tmp_path)
    files.save(monitor(count=300))
    assert restored(files, monitor()) == ({"stable": 300}, [])
    assert restored(files, monitor("1+2")) == ({"stable": 300}, [])


def test_other_settings_and_other_versions_start_anew(tmp_path: Path) -> None:
    files = StateFiles(tmp_path)
    files.save(monitor(count=300))
    counted, logs = restored(files, monitor(length=200))
    assert counted == {}
    assert [line["event"] for line in logs] == ["monitor_starts_anew"]
    assert restored(files, monitor("2")) == ({}, [])


def test_damage_is_logged(tmp_path: Path) -> None:
    files = StateFiles(tmp_path)
    files.save(monitor(count=300))
    (path,) = tmp_path.rglob("*.state")
    path.write_bytes(path.read_bytes()[:-1])
    counted, logs = restored(files, monitor())
    assert counted == {}
    assert "checksum" in logs[0]["reason"]


def test_a_folder_that_cannot_be_written_is_logged(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("a file where the folder should be")
    with structlog.testing.capture_logs() as logs:
        StateFiles(tmp_path).save(monitor(count=100))
    assert [line["event"] for line in logs] == ["monitor_not_saved"]


def test_the_oldest_files_go(tmp_path: Path) -> None:
    files = StateFiles(tmp_path)
    for version in range(1, 21):
        files.save(monitor(str(version), count=100))
    kept = {path.name.split("-")[0] for path in (tmp_path / "m").iterdir()}
    assert len(kept) == 16
    assert "20" in kept
    assert "1" not in kept


def test_without_a_folder_nothing_is_kept() -> None:
    files = StateFiles(None)
    files.save(monitor(count=100))
    assert restored(files, monitor()) == ({}, [])
