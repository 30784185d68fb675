"""loadtests.bench_table and bench_rows: goals name cells that are measured, and are judged by their intervals."""

from __future__ import annotations

import math

import pytest

from loadtests.bench_rows import BARE, GOALS, NATIVE, NGH2, ROWS, USUAL_GRPC, Goal
from loadtests.bench_table import estimate, limit_of, reached, text
from loadtests.results import METRICS, Result
from loadtests.stats import Estimate
from tests.unit.loadtests.test_results import sample

ROW = ROWS[0].name
GOAL = GOALS[0]


def measured(native: list[float], usual: list[float]) -> Result:
    result = Result("bench", {"notes": ["a note"]})
    for column, costs in ((NATIVE, native), (USUAL_GRPC, usual)):
        for cost in costs:
            result.add(ROW, column, sample(cpu_s=cost))
    return result


def test_goals_relate_cells_that_are_there() -> None:
    columns = {row.name: (*row.columns, "onnxruntime") for row in ROWS}
    for goal in GOALS:
        assert goal.column in columns[goal.row]
        assert goal.base_column in columns[goal.base_row]
        assert goal.metric in METRICS
        assert (goal.row, goal.column) != (goal.base_row, goal.base_column)


def test_names_of_rows_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("bounds", "at_least", "word"),
    [
        ((0.4, 0.45, 0.49), False, "reached"),
        ((0.4, 0.45, 0.6), False, "reached, within noise"),
        ((0.4, 0.55, 0.6), False, "NOT reached, within noise"),
        ((0.55, 0.6, 0.7), False, "NOT reached"),
        ((0.55, 0.6, 0.7), True, "reached"),
        ((0.3, 0.4, 0.45), True, "NOT reached"),
        ((math.nan, math.nan, math.nan), False, "not measured"),
    ],
)
def test_verdicts(bounds: tuple[float, float, float], at_least: bool, word: str) -> None:
    low, value, high = bounds
    goal = Goal("r", "c", "r", "b", "cpu_us", 0.5, at_least)
    assert reached(goal, Estimate(value, low, high, 0.95)) == word


def test_a_ratio_without_a_goal_is_shown_and_not_judged() -> None:
    goal = Goal("r", "c", "r", "b", "cpu_us", None)
    assert reached(goal, Estimate(2.0, 1.9, 2.1, 0.95)) == "no goal"
    assert limit_of(goal) == ""
    result = Result("bench")
    for column, cost in ((NATIVE, 2.0), (BARE, 1.0), (NGH2, 1.6)):
        result.add(ROW, column, sample(cpu_s=cost))
    lines = text(result, ROWS).splitlines()
    (bare,) = [line for line in lines if line.startswith(f"{ROW}: native to bare")]
    (ngh2,) = [line for line in lines if line.startswith(f"{ROW}: native to ngh2")]
    assert "2.000 [2.000, 2.000]" in bare
    assert "no goal" in bare
    assert "1.250 [1.250, 1.250]" in ngh2
    assert ngh2.endswith("reached")
    assert sum(line.startswith(("ngh2: ", "bare: ")) for line in lines) == 2


def test_ratios_are_taken_round_by_round() -> None:
    slow = [1.0, 4.0, 2.0, 1.5, 9.0, 1.0]
    result = measured([0.05 * x for x in slow], slow)
    found = estimate(result, GOAL)
    assert (found.low, found.high) == (pytest.approx(0.05), pytest.approx(0.05))
    said = text(result, ROWS)
    assert "0.050 [0.050, 0.050]" in said
    assert "a note" in said
    assert said.count("not measured") == len(GOALS) - 1
    ours = [goal for goal in GOALS if goal.row == ROW]
    assert text(result, ROWS[:1]).count("not measured") == len(ours) - 1


def test_errors_are_told() -> None:
    assert "ERRORS: gRPC 64x1, native: 1 of 100" in text(measured([1.0], [1.0]), ROWS)


def test_a_generator_that_was_the_limit_is_told() -> None:
    result = measured([1.0], [1.0])
    assert "The generator" not in text(result, ROWS)
    result.cells[ROW][NATIVE][0].client_cpu_s = 0.95
    assert "The generator was the limit of the rate: gRPC 64x1, native" in text(result, ROWS)
