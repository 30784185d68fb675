"""server.capture.service: what is sampled, what the rules leave, and that nothing ever reaches the caller's request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from server.capture.columns import hashed
from server.capture.formats import read_json_lines
from server.capture.segments import entries, is_whole
from server.capture.service import Capture
from server.config.capture_options import CaptureSettings, CaptureSpec, ColumnRule
from server.errors import ConfigError
from server.types import Decision, ModelSpec, Tensor, TensorSpec

SECRET = "a secret of the tests"
SPEC = ModelSpec(
    "m",
    "7",
    (TensorSpec("x", "FP32", (-1, 3)), TensorSpec("word", "BYTES", (-1, 1)), TensorSpec("ids", "INT64", (-1, -1))),
    (TensorSpec("y", "FP16", (-1, 1)),),
    max_batch_size=8,
    digest="d" * 64,
)
DECISION = Decision("m", "7", "candidate", 42)
ALL = CaptureSpec(10_000)


def inputs(rows: int = 2, fill: float = 1.5) -> list[Tensor | None]:
    return [
        Tensor("x", "FP32", (rows, 3), memoryview(np.full((rows, 3), fill, np.float32).tobytes())),
        Tensor("word", "BYTES", (rows, 1), [b"secret word"] * rows),
        Tensor("ids", "INT64", (rows, 2), np.arange(2 * rows).tobytes()),
    ]


def outputs(rows: int = 2) -> list[Tensor]:
    return [Tensor("y", "FP16", (rows, 1), np.full((rows, 1), 0.1, np.float16).tobytes())]


@contextmanager
def capturing(folder: Path, spec: CaptureSpec = ALL, **settings: Any) -> Iterator[Capture]:
    made = Capture(CaptureSettings(default=spec, secret=SECRET, **settings), folder, wall_clock=lambda: 1_000)
    try:
        yield made
    finally:
        made.close()


def offer(capture: Capture, number: int = 0, client_id: str = "", **more: Any) -> None:
    fields: dict[str, Any] = {"inputs": inputs(), "outputs": outputs(), "status": "ok"} | more
    capture.offer("m", client_id, f"{1:016x}-{number:x}", DECISION, SPEC, latency_ns=5, **fields)


def rows_of(folder: Path, kind: Any = "requests") -> list[dict[str, Any]]:
    """Every captured row, read as its entries say."""
    found: list[dict[str, Any]] = []
    for entry in entries(folder, "m", kind):
        assert is_whole(entry)
        if entry.path.suffix == ".parquet":
            answer = duckdb.connect().execute("SELECT * FROM read_parquet(?)", [str(entry.path)])
            names = [column[0] for column in answer.description]
            found += [dict(zip(names, row, strict=True)) for row in answer.fetchall()]
        else:
            table = read_json_lines(entry.path, entry.columns)
            found += [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    return found


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_request_becomes_one_row_for_each_row_of_its_batch(tmp_path: Path, form: Any) -> None:
    with capturing(tmp_path, format=form) as capture:
        offer(capture, client_id="mine")
        assert capture.flush()
    first, second = rows_of(tmp_path)
    assert {name: first[name] for name in first if name.startswith("__")} == {
        "__id": "0000000000000001-0", "__client_id": "mine", "__model": "m", "__version": "7", "__digest": "d" * 64,
        "__arm": "candidate", "__generation": 42, "__time": 1_000, "__latency_ns": 5, "__status": "ok", "__row": 0,
    }  # fmt: skip
    assert second["__row"] == 1
    assert [first["x[0]"], first["x[2]"]] == [1.5, 1.5]
    assert [list(first["ids"]), list(second["ids"])] == [[0, 1], [2, 3]]
    assert first["y"] == pytest.approx(float(np.float16(0.1)))
    assert "word" not in first, "strings are left out unless a rule says otherwise"


def test_non_finite_numbers_are_the_same_in_both_formats(tmp_path: Path) -> None:
    values = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    x = [Tensor("x", "FP32", (1, 3), values.tobytes())]
    for form in ("parquet", "jsonl"):
        with capturing(tmp_path / form, format=form) as capture:
            offer(capture, inputs=x, outputs=outputs(1))
            assert capture.flush()
        (row,) = rows_of(tmp_path / form)
        assert np.array_equal([row[f"x[{i}]"] for i in range(3)], values[0], equal_nan=True)


def test_rules_drop_hash_and_bucket(tmp_path: Path) -> None:
    rules = {
        "x[0]": ColumnRule("drop"),
        "x[1]": ColumnRule("bucket", (0.0, 1.5, 3.0)),
        "word": ColumnRule("hmac"),
        "ids": ColumnRule("drop"),
        "__client_id": ColumnRule("hmac"),
    }
    with capturing(tmp_path, replace(ALL, rules=rules)) as capture:
        offer(capture, client_id="alice")
        assert capture.offer_label("m", "alice", "", 1.0)
        assert capture.flush()
    row = rows_of(tmp_path)[0]
    assert "x[0]" not in row
    assert "ids" not in row
    assert (row["x[1]"], row["x[2]"]) == (2, 1.5)
    assert row["word"] == hashed(b"secret word", SECRET.encode())
    assert row["__client_id"] == hashed(b"alice", SECRET.encode()) == rows_of(tmp_path, "labels")[0]["__id"]
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"alice" not in everything
    assert b"secret word" not in everything


def test_hashing_without_a_secret_is_refused(tmp_path: Path) -> None:
    spec = replace(ALL, rules={"word": ColumnRule("hmac")})
    with pytest.raises(ConfigError, match=r"'word' is to be hashed, which needs capture\.secret"):
        Capture(CaptureSettings(default=spec), tmp_path)


def test_request_and_label_agree_on_the_sample(tmp_path: Path) -> None:
    with capturing(tmp_path, CaptureSpec(1_000)) as capture:
        for number in range(2_000):
            offer(capture, number, client_id=f"c{number}", inputs=inputs(1), outputs=outputs(1))
        taken = [capture.offer_label("m", f"c{number}", "", 1.0) for number in range(2_000)]
        assert capture.flush()
    drawn = {row["__client_id"] for row in rows_of(tmp_path)}
    assert drawn == {f"c{number}" for number in range(2_000) if taken[number]}
    assert 140 < len(drawn) < 260  # 10 % of 2,000, five standard deviations to either side


def test_a_label_under_the_gateways_id_finds_a_request_that_had_its_own(tmp_path: Path) -> None:
    with capturing(tmp_path, CaptureSpec(5_000)) as capture:
        for number in range(100):
            offer(capture, number, client_id=f"c{number}", inputs=inputs(1), outputs=outputs(1))
        captured = capture.report().captured
        for number in range(100):
            capture.offer_label("m", f"{1:016x}-{number:x}", "", 1.0)
        assert capture.flush()
    ids = {row["__id"] for row in rows_of(tmp_path)}
    assert len(ids) == captured
    assert ids <= {row["__id"] for row in rows_of(tmp_path, "labels")}


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_what_a_shadow_answered_is_captured_exactly_when_its_request_is(tmp_path: Path, form: Any) -> None:
    shadow = replace(SPEC, name="other", version="9")
    with capturing(tmp_path, CaptureSpec(3_000), shadows=True, format=form) as capture:
        for number in range(200):
            client_id = f"c{number}" if number % 2 else ""
            offer(capture, number, client_id)
            capture.offer_shadow("m", client_id, f"{1:016x}-{number:x}", shadow, 2, outputs(), "ok", 7)
        capture.flush()
        report = capture.report()
        assert (report.captured, report.dropped) == (report.shadows, {})
        assert 20 < report.shadows < 120
        told = {value for family in capture.families() for value in family.points}
        assert ("shadows",) in told
    asked, answered = rows_of(tmp_path), rows_of(tmp_path, "shadows")
    assert {(row["__id"], row["__client_id"], row["__row"]) for row in asked} == {
        (row["__id"], row["__client_id"], row["__row"]) for row in answered
    }
    assert set(answered[0]) == {
        "__id", "__client_id", "__model", "__version", "__digest", "__time", "__latency_ns", "__status", "__row", "y",
    }  # fmt: skip
    assert {(row["__model"], row["__version"], row["__latency_ns"], row["__status"]) for row in answered} == {
        ("m", "9", 7, "ok")
    }
    assert {entry.facts.version for entry in entries(tmp_path, "m", "shadows")} == {"other:9"}


def test_a_shadow_that_failed_has_a_row_for_each_of_the_copy(tmp_path: Path) -> None:
    with capturing(tmp_path, shadows=True) as capture:
        capture.offer_shadow("m", "", "id", SPEC, 3, None, "version_timeout", 7)
        capture.offer_shadow("m", "", "one", replace(SPEC, max_batch_size=0), 0, None, "version_timeout", 7)
    found = [(row["__id"], row["__row"], row["__status"]) for row in rows_of(tmp_path, "shadows")]
    assert sorted(found) == [("id", row, "version_timeout") for row in range(3)] + [("one", 0, "version_timeout")]


def test_models_have_samples_of_their_own(tmp_path: Path) -> None:
    settings = CaptureSettings(default=CaptureSpec(0), specs={"m": ALL})
    capture = Capture(settings, tmp_path)
    offer(capture)
    capture.offer("other", "", "b", DECISION, SPEC, inputs(), outputs(), "ok", 5)
    assert not capture.offer_label("other", "b", "", 1.0)
    assert capture.report().captured == 1
    capture.close()


def test_what_is_captured_is_a_copy(tmp_path: Path) -> None:
    body = bytearray(np.full((1, 3), 1.5, np.float32).tobytes())
    x = [Tensor("x", "FP32", (1, 3), memoryview(body)), *inputs(1)[1:]]
    with capturing(tmp_path) as capture:
        offer(capture, inputs=x, outputs=outputs(1))
        body[:] = bytes(len(body))
        assert capture.flush()
    assert rows_of(tmp_path)[0]["x[0]"] == 1.5


def test_a_refused_request_is_a_row_without_tensors(tmp_path: Path) -> None:
    with capturing(tmp_path) as capture:
        offer(capture, inputs=[], outputs=None, status="queue_full")
        offer(capture, 1, inputs=inputs(2), outputs=None, status="runtime_failure")
        assert capture.flush()
    by_status = {row["__status"]: row for row in rows_of(tmp_path)}
    assert "x[0]" not in by_status["queue_full"]
    assert "y" not in by_status["runtime_failure"]
    assert by_status["runtime_failure"]["x[0]"] == 1.5


class Gate:
    """Holds the writer's thread where it tells of a written segment."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, _: object) -> None:
        self.entered.set()
        assert self.open.wait(20)


def test_a_full_buffer_drops_and_counts_and_takes_again(tmp_path: Path) -> None:
    gate = Gate()
    settings = CaptureSettings(default=ALL, max_requests=10, segment_rows=1)
    capture = Capture(settings, tmp_path, tell=gate)
    offer(capture)
    threading.Thread(target=capture.flush).start()
    assert gate.entered.wait(20)
    for number in range(1, 20):
        offer(capture, number)
    assert capture.report().dropped == {"full": 10}
    gate.open.set()
    assert capture.flush()
    offer(capture, 99)
    assert capture.flush()
    assert capture.report().captured == 11
    assert capture.report().held_requests == 0
    capture.close()


def test_a_request_over_a_segments_size_is_dropped(tmp_path: Path) -> None:
    with capturing(tmp_path, segment_bytes=600) as capture:
        offer(capture, inputs=inputs(8))
        assert capture.report().dropped == {"too_large": 1}


def test_nothing_reaches_the_request_that_is_captured(tmp_path: Path) -> None:
    broken: Callable[..., Any] = lambda: 1 / 0  # noqa: E731
    capture = Capture(CaptureSettings(default=ALL), tmp_path, wall_clock=broken)
    offer(capture)
    assert capture.report().dropped == {"failed": 1}
    capture.close()


def test_what_cannot_become_a_table_costs_its_segment_and_not_the_writer(tmp_path: Path) -> None:
    with capturing(tmp_path) as capture:
        lying = Tensor("x", "FP32", (1, 3), b"too short")
        offer(capture, inputs=[lying], outputs=outputs(1))
        assert capture.flush()
        offer(capture, 1)
        assert capture.flush()
        assert capture.report().dropped == {"unwritable": 1}
    assert len(rows_of(tmp_path)) == 2


def test_a_disk_that_cannot_be_written_is_counted_and_used_again(tmp_path: Path) -> None:
    with capturing(tmp_path) as capture:
        (tmp_path / "m").write_text("a file where the model's folder should be")
        offer(capture)
        assert capture.flush()
        assert capture.report().dropped == {"disk": 1}
        assert capture.report().held_bytes == 0
        (tmp_path / "m").unlink()
        offer(capture, 1)
        assert capture.flush()
        assert capture.report().written_segments == 1
    assert len(rows_of(tmp_path)) == 2


def test_ids_that_are_no_unicode_are_escaped(tmp_path: Path) -> None:
    with capturing(tmp_path) as capture:
        offer(capture, client_id="\ud800'; DROP TABLE x --")
        assert capture.flush()
    assert rows_of(tmp_path)[0]["__client_id"] == "\\ud800'; DROP TABLE x --"


def test_closing_writes_what_waits_and_takes_nothing_more(tmp_path: Path) -> None:
    capture = Capture(CaptureSettings(default=ALL), tmp_path)
    offer(capture)
    capture.close()
    offer(capture, 1)
    assert capture.report().captured == 1
    assert len(rows_of(tmp_path)) == 2


def test_counts_are_metrics(tmp_path: Path) -> None:
    with capturing(tmp_path) as capture:
        offer(capture)
        families = {family.name: family.points for family in capture.families()}
        assert families["tidegate_captured_total"] == {("requests",): 1, ("labels",): 0}
        assert families["tidegate_capture_held_bytes"] == {(): capture.report().held_bytes}
