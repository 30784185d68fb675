"""``tidegate registry card``: everything about a version in one document, as JSON, Markdown and a page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from monitor.engine import Monitor
from monitor.profile import ReferenceProfile
from monitor.types import Column, Settings, rows_window
from router.registry.manifest import CodeSource, DataSource, Description, Lineage, Metric, Signature, TensorEntry
from router.rollout.quality import Finding, Status
from server.audit import AuditEvent
from server.cli.main import cli
from server.gates.keeper import event_of
from server.gates.outcome import GateOutcome
from server.monitoring.files import StateFiles
from server.state import State, open_state
from tests.support import models

ABOUT = Description(
    signature=Signature((TensorEntry("x", "FP32", (-1, 4)),), (TensorEntry("y", "FP32", (-1, 4)),)),
    metrics=(Metric("validation", "auc", 0.91, 5000),),
    params={"depth": 7},
    lineage=Lineage(
        data=DataSource("s3://bucket/train.parquet", rows=1000, time_range=("2026-01-01", "2026-02-01")),
        code=CodeSource("https://example.org/repo", "abc123", False),
        trigger_id="trigger-1",
    ),
    card="Scores *loans*. <script>alert(1)</script>",
    licence="Apache-2.0",
    publisher="risk | team",
)
QUALITY = Finding(
    "quality", Status.FAILED, "at least 0.02, allowed are 0.001",
    {
        "rows": 3000, "low": 0.02, "high": 0.03, "limit": 0.001,
        "metrics": {"candidate": {"auc": 0.8, "brier": 0.18}, "champion": {"auc": 0.85, "brier": 0.16}},
    },
)  # fmt: skip
SLICES = Finding(
    "slices of region", Status.PASSED, "the least is 0.7",
    {"groups": {"<b>north": 0.7, "south": 0.8}, "rows": {"<b>north": 210, "south": 300}, "min": 0.7, "gap": 0.1},
)  # fmt: skip
ODDS = Finding(
    "equalized odds of sex", Status.PASSED, "close",
    {"gap": 0.05, "true_positive_rate": {"groups": {"f": 0.6, "m": 0.65}, "rows": {"f": 40, "m": 50}, "gap": 0.05}},
)  # fmt: skip


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    """``loans``: 2 is the champion now, 1 was it before."""
    found = open_state(tmp_path)
    model = models.affine(tmp_path / "model.onnx")
    other = models.affine(tmp_path / "other.onnx", scale=3)
    found.registry.publish("loans", {"model.onnx": other}, alias="champion", actor="ann")
    found.registry.publish("loans", {"model.onnx": model}, ABOUT, actor="ann")
    outcome = GateOutcome(
        "loans", "2", (QUALITY, SLICES, ODDS), "c" * 64, "d" * 64, "1", "e" * 64, {"rows": 3000, "sha256": "f" * 64}
    )
    found.audit.record(event_of(GateOutcome("loans", "2", (SLICES,)), "earlier"))
    found.audit.record(event_of(outcome, "bob@ci"))
    detail = {"from": "step", "to": "rolled_back", "weight": 500, "reason": "errors", "evidence": []}
    found.audit.record(AuditEvent("tidegate", "rollout.rolled_back", "loans:2", detail))
    found.audit.record(AuditEvent("carl", "registry.override", "loans:9", {}))
    found.registry.promote("loans", 2, actor="eve")
    yield found
    found.close()


def card(folder: Path, reference: str, *options: str) -> str:
    result = CliRunner().invoke(cli, ["registry", "card", reference, "--state-dir", str(folder), *options])
    assert result.exit_code == 0, f"{result.output} {result.exception}"
    return result.stdout


def test_the_document_holds_what_is_known(state: State, tmp_path: Path) -> None:
    found: dict[str, Any] = json.loads(card(tmp_path, "loans", "--json"))
    assert (found["model"], found["version"], found["aliases"]) == ("loans", 2, ["champion"])
    assert found["digest"] == state.registry.version("loans", 2).digest
    assert found["description"]["licence"] == "Apache-2.0"
    assert [(gate["actor"], gate["status"]) for gate in found["gates"]] == [("bob@ci", "failed"), ("earlier", "passed")]
    assert [event["action"] for event in found["history"]] == [
        "registry.publish", "rollout.rolled_back", "registry.promote",
    ]  # fmt: skip
    assert "--url" in found["drift"]["reason"]
    replaced: dict[str, Any] = json.loads(card(tmp_path, "loans@previous", "--json"))
    assert [event["action"] for event in replaced["history"]] == [
        "registry.publish", "registry.promote", "registry.promote",
    ]  # fmt: skip


def test_markdown_says_it_and_nobodys_text_is_markup(state: State, tmp_path: Path) -> None:
    text = card(tmp_path, "loans:2")
    for line in (
        "# Model card of loans:2",
        "- licence: Apache-2.0",
        "- publisher: risk \\| team",
        "- data uri: s3://bucket/train.parquet",
        "- data time\\_range: 2026-01-01 to 2026-02-01",
        "- parameter depth: 7",
        "| inputs | x | FP32 | -1 x 4 |",
        "| validation | auc | 0.910 | 5000 |",
        "- verdict: failed",
        "- beside version: 1",
        "| auc | 0.800 | 0.850 |",
        "| slices of region | \\<b\\>north | 210 | 0.700 | — |",
        "| equalized odds of sex | f, true\\_positive\\_rate | 40 | 0.600 | — |",
        "Scores \\*loans\\*. \\<script\\>alert(1)\\</script\\>",
    ):
        assert line in text.splitlines(), line
    assert (
        "| quality | failed | at least 0.02, allowed are 0.001 | rows 3000, low 0.020, high 0.030, limit 0.001 |"
        in text
    )
    assert "from step, reason errors, to rolled\\_back, weight 500" in text
    assert "eve | champion from 1, champion generation 2, champion to 2" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_the_page_is_whole_and_escaped(state: State, tmp_path: Path) -> None:
    page = card(tmp_path, "loans:2", "--html")
    assert page.startswith("<!DOCTYPE html>")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;north" in page
    assert "http" not in page.replace("https://example.org/repo", "").replace("http-equiv", "")
    for heading in ("Version", "Lineage", "Quality gates", "Slices", "Rollouts and decisions", "Drift since launch"):
        assert f"<h2>{heading}</h2>" in page


def test_a_version_that_nothing_is_known_of(tmp_path: Path) -> None:
    state = open_state(tmp_path)
    state.registry.publish("bare", {"model.onnx": models.affine(tmp_path / "m.onnx")}, actor="ann")
    state.close()
    text = card(tmp_path, "bare:1")
    for line in ("No gate was looked at.", "It was never rolled out.", "Its publisher gave none."):
        assert line in text


def test_drift_from_the_counts_that_were_saved(state: State, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    column = Column("a", "x", "input", 0, 1, "FP32", "numeric")
    profile = ReferenceProfile.from_table({"a": rng.normal(size=500)}, [column])
    monitor = Monitor("loans", "2", profile, Settings(windows=(rows_window(100),)))
    StateFiles(tmp_path / "monitors").save(monitor)
    drift = json.loads(card(tmp_path, "loans:2", "--json"))["drift"]
    assert drift["profile"] == profile.sha256
    assert "saved" in drift
    assert "## Drift since launch" in card(tmp_path, "loans:2")
    next((tmp_path / "monitors" / "loans").glob("*.state")).write_bytes(b"damaged")
    assert "cannot be read" in json.loads(card(tmp_path, "loans:2", "--json"))["drift"]["reason"]


def test_drift_from_an_address_where_nobody_is(state: State, tmp_path: Path) -> None:
    drift = json.loads(card(tmp_path, "loans:2", "--json", "--url", "127.0.0.1:9"))["drift"]
    assert "127.0.0.1:9" in drift["reason"]
