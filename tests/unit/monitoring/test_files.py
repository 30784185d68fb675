"""Saved counts and labels: one file for each profile and settings, a bounded number, and no error that escapes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from monitor import sealed
from monitor.engine import Monitor
from monitor.errors import StateError
from monitor.outcomes import LabelSettings
from monitor.profile import ReferenceProfile
from monitor.tap import Item
from monitor.types import Settings, rows_window
from server.monitoring.files import LabelFiles, StateFiles
from server.monitoring.labels import LabelWatch, ModelLabels
from server.types import Tensor

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


def test_counts_in_the_place_of_another_version_are_not_believed(tmp_path: Path) -> None:
    files = StateFiles(tmp_path)
    files.save(monitor(count=300))
    (path,) = tmp_path.rglob("*.state")
    path.rename(path.with_name(path.name.replace("1-", "2-", 1)))
    counted, logs = restored(files, monitor("2"))
    assert counted == {}
    assert [line["reason"].partition(": ")[2] for line in logs] == ["the counts are of m:1"]


#: A process that writes to the folder, and what a killed one has left there.
OTHER = """
import sys
from pathlib import Path
from tests.unit.monitoring.test_files import labels, monitor
from server.monitoring.files import LabelFiles, StateFiles

states, joined = StateFiles(Path(sys.argv[1])), LabelFiles(Path(sys.argv[1]))
states.save(monitor(count=300))
joined.save(labels(rows=30))
print("saved", flush=True)
sys.stdin.read()
"""


def test_one_process_writes_at_a_time_and_the_next_clears_up(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", OTHER, str(tmp_path)]
    states, learnt = StateFiles(tmp_path), LabelFiles(tmp_path)
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "saved\n"
        (counts,) = tmp_path.rglob("*.state")
        (outcomes,) = tmp_path.rglob("*.labels")
        left = [path.with_name(f".{path.name}.1.tmp") for path in (counts, outcomes)]
        for path in left:
            path.write_bytes(b"half")
        before = counts.read_bytes(), outcomes.read_bytes()
        with structlog.testing.capture_logs() as logs:
            for _ in range(2):
                states.save(monitor(count=200))
                assert not learnt.save(labels(rows=10))
        assert (counts.read_bytes(), outcomes.read_bytes()) == before
        assert [line["event"] for line in logs] == ["monitor_folder_taken"] * 2  # once for each kind
        assert restored(states, monitor()) == ({"stable": 300}, [])
        other.kill()
    states.save(monitor(count=200))
    assert learnt.save(labels(rows=10))
    assert restored(states, monitor()) == ({"stable": 200}, [])
    assert not any(path.exists() for path in left)


def test_damage_is_logged(tmp_path: Path) -> None:
    files = StateFiles(tmp_path)
    files.save(monitor(count=300))
    (path,) = tmp_path.rglob("*.state")
    path.write_bytes(path.read_bytes()[:-1])
    counted, logs = restored(files, monitor())
    assert counted == {}
    assert "checksum" in logs[0]["reason"]


def test_past_alarms_that_are_damaged_start_anew_and_say_so(tmp_path: Path) -> None:
    files, first = StateFiles(tmp_path), monitor(length=200)
    first.ingest(first.keys, [Item(1, "stable", len(ROWS), 0, [[(ROWS + 9).tobytes()]])])
    assert len(first.past_alarms()) == 2
    files.save(first)
    (path,) = tmp_path.rglob("*.state")
    header, arrays, _ = sealed.unpack(path.read_bytes(), "monitor state", StateError, path.name)
    for wholes in (arrays["/past/wholes"] - 10**18, np.full_like(arrays["/past/wholes"], 2)):
        path.write_bytes(sealed.pack("monitor state", header, {**arrays, "/past/wholes": wholes}))
        again = monitor(length=200)
        counted, logs = restored(files, again)
        assert (counted, again.past_alarms()) == ({}, [])
        assert [line["event"] for line in logs] == ["monitor_starts_anew"]
        assert "past alarms are damaged" in logs[0]["reason"]


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


# --- labels ---


def labels(model: str = "m", slice_: str = "", rows: int = 0) -> ModelLabels:
    settings = LabelSettings("binary", "y", windows=(rows_window(20),))
    made = ModelLabels(model, LabelWatch(settings, slice_), lambda *_: None)
    if rows:
        outputs = [Tensor("y", "FP64", (rows, 1), np.linspace(0, 1, rows).tobytes())]
        made.monitor.join.remember(["a"], "1", "stable", rows, outputs, "", 1)
        for row in range(rows):
            made.label("a", row, float(row % 2), "", "", 2)
        made.monitor.drain(3)
    return made


def joined(files: LabelFiles, made: ModelLabels) -> tuple[list[int], list[Any]]:
    with structlog.testing.capture_logs() as logs:
        files.restore(made)
    return [group["joined"] for group in made.monitor.report()["join"]["groups"]], logs


def test_labels_go_on_from_what_was_saved(tmp_path: Path) -> None:
    files, first, again = LabelFiles(tmp_path), labels(rows=30), labels()
    assert files.save(first)
    assert first.run != again.run
    assert joined(files, again) == ([30], [])
    assert again.run == first.run
    assert again.monitor.report()["windows"][0]["rows"] == 20
    assert joined(files, labels("other")) == ([], [])


def test_labels_of_other_settings_start_anew_and_say_so(tmp_path: Path) -> None:
    files = LabelFiles(tmp_path)
    files.save(labels(rows=30))
    counted, logs = joined(files, labels(slice_="x"))
    assert counted == []
    assert [(line["event"], line["reason"]) for line in logs] == [
        ("labels_start_anew", "the saved labels are of other settings")
    ]


def test_a_file_in_the_place_of_another_is_not_believed(tmp_path: Path) -> None:
    files = LabelFiles(tmp_path)
    files.save(labels(rows=30))
    (path,) = tmp_path.rglob("*.labels")
    path.rename(path.with_name(f"{labels(slice_='x').mark}.labels"))
    counted, logs = joined(files, labels(slice_="x"))
    assert counted == []
    assert "under the settings" in logs[0]["reason"]


def test_damaged_labels_are_logged(tmp_path: Path) -> None:
    files = LabelFiles(tmp_path)
    files.save(labels(rows=30))
    (path,) = tmp_path.rglob("*.labels")
    path.write_bytes(path.read_bytes()[:-1])
    counted, logs = joined(files, labels())
    assert counted == []
    assert "checksum" in logs[0]["reason"]


def test_labels_that_cannot_be_written_are_logged(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("a file where the folder should be")
    with structlog.testing.capture_logs() as logs:
        assert not LabelFiles(tmp_path).save(labels(rows=3))
    assert [line["event"] for line in logs] == ["labels_not_saved"]


def test_few_files_of_labels_are_kept_and_none_of_counts_go_for_them(tmp_path: Path) -> None:
    StateFiles(tmp_path).save(monitor(count=100))
    for number in range(7):
        LabelFiles(tmp_path).save(labels(slice_=f"x[{number}]", rows=3))
    assert len(list(tmp_path.rglob("*.labels"))) == 4
    assert len(list(tmp_path.rglob("*.state"))) == 1


def test_without_a_folder_no_labels_are_kept() -> None:
    files = LabelFiles(None)
    assert files.save(labels(rows=3))
    assert joined(files, labels()) == ([], [])
