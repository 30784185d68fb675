"""server.offline.dataset: captured rows meet their labels, and SQL and plain Python agree on every one of them."""

from __future__ import annotations

import csv
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.capture.formats import StorageError
from server.capture.segments import entries
from server.capture.service import Capture
from server.config.capture_options import CaptureSettings, CaptureSpec
from server.errors import FailedPrecondition, InvalidArgument, NotFound
from server.offline.chunks import read_chunks
from server.offline.dataset import Wanted, export_dataset
from server.types import Decision, ModelSpec, Tensor, TensorSpec

SPEC = ModelSpec(
    "m", "1", (TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "INT64", (-1, 1)),), max_batch_size=8, digest="d"
)
#: Another version with an input more: its column is missing in the rows of the first.
WIDER = replace(SPEC, version="2", inputs=(*SPEC.inputs, TensorSpec("z", "INT32", (-1, 1))), digest="e")


ALL_ROWS = Wanted()


class Traffic:
    """Captured traffic of one model at times that the test chooses."""

    def __init__(self, folder: Path, form: Any = "jsonl", **settings: Any) -> None:
        self.now = 0
        self.capture = Capture(
            CaptureSettings(default=CaptureSpec(10_000), format=form, **settings), folder, wall_clock=lambda: self.now
        )

    def request(self, at: int, number: int, client: str = "", rows: int = 1, spec: ModelSpec = SPEC) -> str:
        self.now = at
        x = Tensor("x", "FP32", (rows, 2), np.full((rows, 2), number, np.float32).tobytes())
        z = Tensor("z", "INT32", (rows, 1), np.full(rows, number, np.int32).tobytes())
        y = Tensor("y", "INT64", (rows, 1), np.full(rows, number, np.int64).tobytes())
        own = f"{1:016x}-{number:x}"
        inputs = [x, z] if spec is WIDER else [x]
        self.capture.offer("m", client, own, Decision("m", spec.version, "stable", 1), spec, inputs, [y], "ok", 7)
        return own

    def shadow(self, at: int, number: int, version: str = "9", rows: int = 1, *, well: bool = True, **of: Any) -> None:
        """What a shadow answered to the copy of request ``number``: ten times as much."""
        self.now = at
        y = Tensor("y", "INT64", (rows, 1), np.full(rows, 10 * number, np.int64).tobytes())
        spec = replace(SPEC, version=version, digest="s" * 4, **of)
        status, outputs = ("ok", [y]) if well else ("version_timeout", None)
        self.capture.offer_shadow("m", "", f"{1:016x}-{number:x}", spec, rows, outputs, status, 70)

    def label(self, at: int, request: str, value: float, name: str = "", row: int = 0) -> None:
        self.now = max(self.now, at)  # what is told cannot lie ahead
        assert self.capture.offer_label("m", request, name, value, row, at)

    def done(self) -> None:
        assert self.capture.flush()
        assert not self.capture.report().dropped
        self.capture.close()


def exported(folder: Path, target: Path, wanted: Wanted = ALL_ROWS) -> list[dict[str, str]]:
    export_dataset(folder, "m", target, wanted)
    with target.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(params=["parquet", "jsonl"])
def traffic(request: pytest.FixtureRequest, tmp_path: Path) -> Traffic:
    return Traffic(tmp_path / "capture", request.param)


def test_labels_meet_their_rows(tmp_path: Path, traffic: Traffic) -> None:
    first, second = traffic.request(10, 1, rows=2), traffic.request(20, 2, client="mine")
    traffic.request(30, 3)
    traffic.label(100, first, 1.0, row=1)
    traffic.label(110, second, 0.5)
    traffic.label(90, "nobody's", 9.0)
    traffic.done()
    rows = exported(tmp_path / "capture", tmp_path / "out.csv")
    assert [(row["x[0]"], row["__row"], row["__label"], row["__label_time"]) for row in rows] == [
        ("1.0", "0", "NaN", ""), ("1.0", "1", "1.0", "100"), ("2.0", "0", "0.5", "110"), ("3.0", "0", "NaN", "")
    ]  # fmt: skip


def test_the_latest_label_counts_whenever_it_was_told(tmp_path: Path, traffic: Traffic) -> None:
    own = traffic.request(10, 1, client="mine")
    traffic.label(300, own, 3.0)
    traffic.label(200, own, 2.0)
    traffic.label(250, "mine", 2.5)
    traffic.done()
    (row,) = exported(tmp_path / "capture", tmp_path / "out.csv")
    assert (row["__label"], row["__label_time"]) == ("3.0", "300")


def test_a_clients_id_that_came_twice_means_its_newest_request(tmp_path: Path, traffic: Traffic) -> None:
    traffic.request(10, 1, client="again")
    traffic.request(20, 2, client="again")
    traffic.label(30, "again", 1.0)
    traffic.done()
    rows = exported(tmp_path / "capture", tmp_path / "out.csv")
    assert [row["__label"] for row in rows] == ["NaN", "1.0"]


def test_what_a_shadow_answered_stands_beside_its_request(tmp_path: Path, traffic: Traffic) -> None:
    traffic.request(10, 1, rows=2)
    traffic.request(20, 2)
    traffic.request(30, 3)
    traffic.shadow(40, 1, rows=2)
    traffic.shadow(41, 1, rows=2, well=False)  # told again: the first counts
    traffic.shadow(42, 2, rows=1, well=False)
    traffic.shadow(43, 3, "8")
    traffic.shadow(44, 3, "9", name="other")
    traffic.shadow(45, 77)  # its request was not captured
    traffic.done()
    folder = tmp_path / "capture"
    rows = exported(folder, tmp_path / "out.csv", Wanted(shadow="m:9"))
    told = [(row["y"], row["shadow:y"], row["__shadow_status"], row["__shadow_latency_ns"]) for row in rows]
    failed = ("2", "", "version_timeout", "70")
    assert told == [("1", "10", "ok", "70"), ("1", "10", "ok", "70"), failed, ("3", "", "", "")]
    report = export_dataset(folder, "m", tmp_path / "8.csv", Wanted(shadow="m:8"))
    assert (report.rows, report.shadowed) == (4, 1)
    (row,) = [row for row in exported(folder, tmp_path / "o.csv", Wanted(shadow="other:9")) if row["shadow:y"]]
    assert (row["__row"], row["y"], row["shadow:y"]) == ("0", "3", "30")
    assert "__shadow_status" not in exported(folder, tmp_path / "none.csv")[0]
    with pytest.raises(NotFound, match="those of: m:8, m:9, other:9"):
        export_dataset(folder, "m", tmp_path / "x.csv", Wanted(shadow="m:7"))


def test_a_row_that_was_captured_twice_is_one(tmp_path: Path, traffic: Traffic) -> None:
    traffic.request(10, 1)
    traffic.request(20, 1)
    traffic.done()
    (row,) = exported(tmp_path / "capture", tmp_path / "out.csv")
    assert row["__time"] == "10"


def test_times_bound_requests_and_not_labels(tmp_path: Path, traffic: Traffic) -> None:
    owns = [traffic.request(at, at) for at in (10, 20, 30)]
    traffic.label(999, owns[1], 1.0)
    traffic.done()
    rows = exported(tmp_path / "capture", tmp_path / "out.csv", Wanted(20, 30))
    assert [(row["__time"], row["__label"]) for row in rows] == [("20", "1.0")]
    rows = exported(tmp_path / "capture", tmp_path / "labelled.csv", Wanted(labelled_only=True))
    assert [row["__time"] for row in rows] == ["20"]
    with pytest.raises(NotFound, match="no captured request matches"):
        export_dataset(tmp_path / "capture", "m", tmp_path / "none.csv", Wanted(31, 40))
    assert not (tmp_path / "none.csv").exists()


def test_named_outcomes_and_columns_of_other_versions(tmp_path: Path, traffic: Traffic) -> None:
    first, second = traffic.request(10, 1), traffic.request(20, 2, spec=WIDER)
    traffic.label(30, first, 1.0, "clicked")
    traffic.label(30, second, 2.0, "paid")
    traffic.done()
    rows = exported(tmp_path / "capture", tmp_path / "out.csv")
    assert [(row["__version"], row["z"], row["__label_clicked"], row["__label_paid"]) for row in rows] == [
        ("1", "", "1.0", "NaN"), ("2", "2", "NaN", "2.0")
    ]  # fmt: skip


def random_traffic(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    traffic = Traffic(folder, segment_rows=rng.choice([3, 10, 1000]))
    known = []
    for number in range(rng.randrange(1, 60)):
        client = rng.choice(["", f"c{rng.randrange(8)}"])
        spec = rng.choice([SPEC, WIDER])
        rows, at = rng.randrange(1, 4), rng.randrange(100)
        again = rng.choice([number, max(0, number - 1)])
        known += [traffic.request(at, again, client, rows, spec)] + ([client] if client else [])
        if rng.random() < 0.4:
            traffic.shadow(at + 1, again, rng.choice(["8", "9"]), rows, well=rng.random() < 0.8)
        if rng.random() < 0.7:
            name = rng.choice(["", "a", "it's"])
            traffic.label(rng.randrange(200), rng.choice(known), float(rng.randrange(5)), name, rng.randrange(4))
    traffic.done()


@pytest.mark.parametrize("seed", range(8))
def test_sql_and_python_give_the_same(tmp_path: Path, seed: int) -> None:
    random_traffic(tmp_path / "capture", seed)
    versions = {entry.facts.version for entry in entries(tmp_path / "capture", "m", "shadows")}
    wanted = Wanted(5, 90, shadow=max(versions, default=""))
    by_sql = export_dataset(tmp_path / "capture", "m", tmp_path / "sql.npz", wanted, sql=True)
    by_python = export_dataset(tmp_path / "capture", "m", tmp_path / "python.npz", wanted, sql=False)
    assert replace(by_sql, output="") == replace(by_python, output="")
    with np.load(tmp_path / "sql.npz") as one, np.load(tmp_path / "python.npz") as other:
        assert sorted(one.files) == sorted(other.files)
        for name in one.files:
            floats = one[name].dtype.kind == "f"
            assert np.array_equal(one[name], other[name], equal_nan=floats), name


def test_every_format_has_the_same_rows(tmp_path: Path) -> None:
    random_traffic(tmp_path / "capture", 3)
    times = []
    for suffix in ("parquet", "csv", "jsonl", "npz"):
        export_dataset(tmp_path / "capture", "m", tmp_path / f"out.{suffix}", Wanted())
        (table,) = read_chunks(tmp_path / f"out.{suffix}", 100_000)
        times.append([int(value) for value in table["__time"]])
    assert times[0] == times[1] == times[2] == times[3] == sorted(times[0])


def test_damaged_segments_are_named_and_removed_ones_left_out(tmp_path: Path, traffic: Traffic) -> None:
    traffic.request(10, 1)
    assert traffic.capture.flush()
    traffic.request(20, 2)
    traffic.done()
    first, second = entries(tmp_path / "capture", "m", "requests")
    first.path.unlink()
    assert len(exported(tmp_path / "capture", tmp_path / "out.csv")) == 1
    second.path.write_bytes(b"x" * second.size)
    with pytest.raises(StorageError, match="is not what was written"):
        export_dataset(tmp_path / "capture", "m", tmp_path / "other.csv", Wanted())


def test_what_cannot_be_exported_is_said(tmp_path: Path, traffic: Traffic) -> None:
    traffic.request(10, 1)
    traffic.done()
    folder = tmp_path / "capture"
    (tmp_path / "there.csv").write_text("mine")
    with pytest.raises(FailedPrecondition, match="never overwritten"):
        export_dataset(folder, "m", tmp_path / "there.csv", Wanted())
    with pytest.raises(NotFound, match="nothing is captured of model 'other'"):
        export_dataset(folder, "other", tmp_path / "out.csv", Wanted())
    with pytest.raises(InvalidArgument, match="wanted a name that ends with"):
        export_dataset(folder, "m", tmp_path / "out.xls", Wanted())
