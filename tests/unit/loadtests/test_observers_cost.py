"""loadtests.observers_cost: what is switched off is off, shares add up, and the whole runs end to end."""

from __future__ import annotations

import json
import math
import socket
import urllib.request
from pathlib import Path

import pytest

from loadtests import payloads
from loadtests.models import MODEL, bench_row, write_model
from loadtests.monitor_overhead import write_profile
from loadtests.observers_cost import COSTS, SERVERS, Copies, Plan, measure, rows, running, shares, text, write_config
from loadtests.results import Result
from loadtests.servers import ROOT
from loadtests.unobserved import copy_source
from server.config.load import load_config
from tests.unit.loadtests.test_results import sample

ROW = rows()[0].name
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def result_of(rounds: int, *every: tuple[float, float, float, float]) -> Result:
    """``every``: processor time per request of each of ``SERVERS``, round by round."""
    result = Result("observers", {"rounds": rounds, "compiled": True, "apart": {}})
    for costs in every:
        for name, cost in zip(SERVERS, costs, strict=True):
            result.add(ROW, name, sample(cpu_s=cost))
    return result


def test_shares_are_those_of_neighbours_in_a_round() -> None:
    found = shares(result_of(1, (8.0, 9.0, 9.5, 10.0), (160.0, 180.0, 190.0, 200.0)), ROW)
    assert {name: one.value for name, one in found.items()} == pytest.approx(
        {"statistics": 0.1, "gate": 0.05, "all": 0.05, "total": 0.2}
    )


def test_a_start_counts_once_whatever_its_rounds_say() -> None:
    quiet, wild, dead = (9.0, 9.0, 9.0, 10.0), (1.0, 1.0, 1.0, 10.0), (9.0, 9.0, math.nan, 10.0)
    found = shares(result_of(3, quiet, wild, quiet, quiet, quiet, quiet), ROW)["total"]
    assert (found.low, found.value, found.high) == pytest.approx((0.1, 0.1, 0.1))
    # A round in which a server did not get to answer is left out, and with it a start that has no other.
    gate = shares(result_of(1, quiet, dead), ROW)["gate"]
    assert (gate.value, gate.confidence) == (0.0, 0.0)


def test_the_text_holds_the_goal_against_the_sum() -> None:
    good, bad = result_of(1, (9.1, 9.4, 9.7, 10.0)), result_of(1, (8.0, 9.4, 9.7, 10.0))
    for result, verdict in ((good, "reached"), (bad, "NOT reached")):
        (line,) = [line for line in text(result).splitlines() if line.startswith(f"{ROW}: all three")]
        assert line.split("]")[-1].strip() == verdict
    assert all(f"{ROW}: {what}" in text(good) for what in COSTS.values())
    assert "NOT COMPILED" not in text(good)
    good.settings["compiled"] = False
    assert "NOT COMPILED" in text(good)


def test_each_server_has_one_more_than_the_one_before(tmp_path: Path) -> None:
    configs = [load_config(write_config(tmp_path / name, name, tmp_path, 1)) for name in SERVERS]
    assert [config.models[MODEL].monitor.profile is not None for config in configs] == [False, False, False, True]
    assert [config.telemetry.traces.enabled for config in configs] == [False, False, True, True]


@pytest.mark.timeout(120)
def test_what_is_off_is_off(tmp_path: Path) -> None:
    write_model(tmp_path / f"{MODEL}.onnx")
    write_profile(tmp_path / "profile.tgp")
    copy_source(tmp_path / "copy")
    counts, traced = {}, {}
    with (
        socket.create_server(("127.0.0.1", 0)) as receiver,
        running(Copies(ROOT, tmp_path / "copy"), tmp_path, receiver.getsockname()[1]) as targets,
    ):
        for name, target in targets.items():
            url = f"http://{target.http}/v2/models/{MODEL}"
            body, headers = payloads.json_body({"x": bench_row()}), {"traceparent": TRACEPARENT}
            request = urllib.request.Request(f"{url}/infer", body, headers)
            with urllib.request.urlopen(request, timeout=20) as answer:
                traced[name] = answer.headers["traceresponse"] is not None
            with urllib.request.urlopen(f"{url}/stats", timeout=20) as answer:
                (stats,) = json.load(answer)["model_stats"]
            counts[name] = (stats["inference_count"], stats["execution_count"])
    assert counts == {"none": (0, 0), "statistics": (1, 1), "gate": (1, 1), "all": (1, 1)}
    assert traced == {"none": False, "statistics": False, "gate": True, "all": True}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_end_to_end() -> None:
    result = measure(Plan(1, 2, 0.3, compiled=False))
    assert {row: list(columns) for row, columns in result.cells.items()} == {row.name: list(SERVERS) for row in rows()}
    assert all(len(samples) == 2 for columns in result.cells.values() for samples in columns.values())
    assert all(0 <= part < 0.5 for row in result.settings["apart"].values() for part in row["none"])
    assert "all three" in text(result)
