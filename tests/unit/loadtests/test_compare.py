"""loadtests.compare: which cells meet, what their ratio is, and when it means something."""

from __future__ import annotations

import pytest

from loadtests.compare import Compared, compare, differences, text
from tests.unit.loadtests.test_results import result, sample


def found(rows: list[Compared], column: str, metric: str) -> Compared:
    (one,) = [row for row in rows if (row.column, row.metric) == (column, metric)]
    return one


def test_a_clear_change_and_none() -> None:
    first = result(a=[sample(100 + i, latency_us=500) for i in range(6)])
    second = result(a=[sample(200 + 2 * i, latency_us=500) for i in range(6)])
    rows = compare(first, second)
    rate = found(rows, "a", "rate")
    assert rate.ratio.value == pytest.approx(2, rel=0.02)
    assert rate.verdict == "more"
    assert found(rows, "a", "cpu_us").verdict == "less"
    assert found(rows, "a", "p99_us").verdict == "same"
    assert found(compare(second, first), "a", "rate").verdict == "less"


def test_only_cells_of_both_are_compared() -> None:
    rows = compare(result(a=[sample()], b=[sample()]), result(b=[sample()], c=[sample()]))
    assert {row.column for row in rows} == {"b"}


def test_single_cells_are_compared_by_whatever_name() -> None:
    rows = compare(result("before", a=[sample()]), result("after", other=[sample(300)]))
    assert found(rows, "other", "rate").ratio.value == 3


def test_what_was_not_measured_has_no_ratio() -> None:
    rows = compare(result(a=[sample(cpu_s=None)]), result(a=[sample()]))
    assert "cpu_us" not in {row.metric for row in rows}


def test_unlike_machines_and_settings_are_named_first() -> None:
    first, second = result(a=[sample()]), result(a=[sample()])
    assert differences(first, second) == []
    second.machine["cpu"] = "another"
    second.machine["compiled"] = not first.machine["compiled"]
    second.settings["rounds"] = 9
    assert [line.partition(" ")[0] for line in differences(first, second)] == ["cpu", "compiled", "rounds"]
    assert text(first, second).startswith("warning: cpu differs")


def test_nothing_in_common_is_said() -> None:
    assert text(result(), result()).endswith("no cell is in both results")
