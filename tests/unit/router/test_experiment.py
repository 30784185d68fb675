"""router.experiment: exposures once per unit and day, counts per arm, outcomes that settle in time, reports."""

from __future__ import annotations

import random
from typing import Any

import pytest

from router.experiment import Difference, ExperimentBooks, ExperimentSpec, ExposureMarks, OutcomeSpec, Report

S = 1_000_000_000
HOUR = 3_600 * S
DAY = 24 * HOUR
CLICK = OutcomeSpec("click", "binary", DAY)
SPENT = OutcomeSpec("spent", "number", DAY)


def books(**more: Any) -> ExperimentBooks:
    settings = {"arms": (("control", 5_000), ("b", 5_000)), "outcomes": (CLICK, SPENT), "log_slots": 1 << 12}
    return ExperimentBooks(ExperimentSpec("e", **(settings | more)))


def arm(report: Report, name: str) -> Any:
    return next(one for one in report.arms if one.arm == name)


def difference(report: Report, metric: str) -> Difference:
    return next(one for one in report.differences if one.metric == metric)


# --- exposures ---


def test_an_exposure_is_logged_once_per_unit_and_day() -> None:
    experiment = books()
    assert [experiment.expose("b", 7, hour * HOUR) for hour in (1, 2, 23)] == [True, False, False]
    assert [experiment.expose("b", 7, DAY + hour * HOUR) for hour in (0, 1)] == [True, False]
    assert experiment.expose("control", 8, HOUR)
    assert [counts.units for counts in experiment.counts] == [1, 1]


def test_who_is_on_no_arm_is_not_exposed() -> None:
    experiment = books()
    assert not experiment.expose("stable", 7, 0)
    experiment.attempt("stable", 7, False, 5)
    assert [(counts.units, counts.requests) for counts in experiment.counts] == [(0, 0), (0, 0)]


def test_with_more_units_than_slots_exposures_repeat_but_none_is_lost() -> None:
    rng = random.Random(1)
    marks = ExposureMarks(1 << 8)
    units = [rng.getrandbits(64) for _ in range(1_000)]
    assert all(marks.first_today(unit, 3) for unit in units)
    again = sum(marks.first_today(unit, 3) for unit in units)
    assert 0 < again <= 1_000
    few = ExposureMarks(1 << 16)
    assert sum(few.first_today(unit, 3) for unit in units * 3) < 1_050


def test_unit_zero_is_a_unit() -> None:
    marks = ExposureMarks(1 << 4)
    assert [marks.first_today(0, 0), marks.first_today(0, 0)] == [True, False]


def test_more_units_than_fit_are_logged_and_counted_but_not_analysed() -> None:
    experiment = books(max_units=3)
    assert all(experiment.expose("b", unit, 0) for unit in range(5))
    for unit in range(5):
        experiment.attempt("b", unit, True, 5)
    report = experiment.report(0)
    assert (arm(report, "b").units, arm(report, "b").requests, report.unplaced) == (3, 5, 2)
    assert experiment.counts[1].attempted_units == 3


# --- attempts ---


def test_requests_count_all_attempts_and_units_their_first() -> None:
    experiment = books()
    experiment.expose("b", 7, 0)
    for failed, latency in ((True, 100), (False, 20), (False, 40), (True, 100)):
        experiment.attempt("b", 7, failed, latency)
    counts = experiment.counts[1]
    assert (counts.requests, counts.errors, counts.latency.count, counts.latency.mean) == (4, 2, 2, 30)
    assert (counts.attempted_units, counts.failed_units) == (1, 1)


# --- outcomes ---


def test_outcomes_settle_when_their_window_has_passed() -> None:
    experiment = books()
    experiment.expose("b", 1, 0)
    experiment.expose("b", 2, HOUR)
    assert experiment.outcome("click", 1, 1, 2 * HOUR)
    assert experiment.outcome("spent", 1, 2.5, 2 * HOUR)
    assert experiment.outcome("spent", 1, 1.5, 3 * HOUR)
    assert arm(experiment.report(DAY - 1), "b").outcomes["click"][0] == 0
    settled, estimate = arm(experiment.report(DAY), "b").outcomes["click"]
    assert (settled, estimate.value) == (1, 1.0)
    outcomes = arm(experiment.report(DAY + HOUR), "b").outcomes
    assert (outcomes["click"][0], outcomes["click"][1].value) == (2, 0.5)
    assert (outcomes["spent"][0], outcomes["spent"][1].value) == (2, 2.0)


def test_silence_may_be_left_out() -> None:
    experiment = books(outcomes=(OutcomeSpec("rating", "number", HOUR, "skip"),))
    for unit in range(3):
        experiment.expose("b", unit, 0)
    experiment.outcome("rating", 1, 4.0, 0)
    settled, estimate = arm(experiment.report(HOUR), "b").outcomes["rating"]
    assert (settled, estimate.value) == (1, 4.0)


def test_a_yes_is_a_yes_however_often_and_whatever_follows() -> None:
    experiment = books()
    experiment.expose("b", 1, 0)
    for value in (1, 1, 0):
        experiment.outcome("click", 1, value, 0)
    assert arm(experiment.report(DAY), "b").outcomes["click"][1].value == 1.0


def test_feedback_that_is_late_unknown_or_no_number() -> None:
    experiment = books()
    experiment.expose("b", 1, 0)
    assert not experiment.outcome("click", 1, 1, DAY)
    assert not experiment.outcome("click", 99, 1, 0)
    report = experiment.report(DAY)
    assert (report.late, report.unknown) == (1, 1)
    assert arm(report, "b").outcomes["click"][1].value == 0.0
    with pytest.raises(ValueError, match="finite number"):
        experiment.outcome("spent", 1, float("nan"), 0)
    with pytest.raises(KeyError):
        experiment.outcome("other", 1, 1, 0)


# --- reports ---


def traffic(experiment: ExperimentBooks, units: int, *, click: tuple[float, float], fail: tuple[float, float]) -> None:
    rng = random.Random(4)
    for _ in range(units):
        unit = rng.getrandbits(64)
        number = rng.random() < 0.5
        name = ("control", "b")[number]
        experiment.expose(name, unit, 0)
        for _ in range(rng.randrange(1, 4)):
            experiment.attempt(name, unit, rng.random() < fail[number], 1_000_000)
        if rng.random() < click[number]:
            experiment.outcome("click", unit, 1, HOUR)
            experiment.outcome("spent", unit, rng.uniform(1, 9), HOUR)


def test_a_report_finds_what_differs_and_nothing_else() -> None:
    experiment = books()
    traffic(experiment, 6_000, click=(0.10, 0.20), fail=(0.05, 0.05))
    report = experiment.report(DAY)
    click = difference(report, "click").estimate
    assert click.low is not None
    assert click.low > 0
    assert click.value == pytest.approx(0.1, abs=0.03)
    spent = difference(report, "spent").estimate
    assert spent.low is not None
    assert spent.low > 0
    errors = difference(report, "errors").estimate
    assert errors.low is not None
    assert errors.high is not None
    assert errors.low < 0 < errors.high
    assert not report.mismatch


def test_a_failing_arm_shows() -> None:
    experiment = books()
    traffic(experiment, 3_000, click=(0.1, 0.1), fail=(0.02, 0.2))
    errors = difference(experiment.report(DAY), "errors").estimate
    assert errors.low is not None
    assert errors.low > 0
    assert arm(experiment.report(DAY), "b").error_rate.value == pytest.approx(0.2, abs=0.03)


def test_few_units_give_numbers_without_intervals() -> None:
    experiment = books()
    for unit in range(58):
        experiment.expose(("control", "b")[unit % 2], unit, 0)
        experiment.attempt(("control", "b")[unit % 2], unit, False, 1)
    report = experiment.report(DAY)
    assert all(one.estimate.low is None for one in report.differences)
    assert arm(report, "b").error_rate.low is None
    assert arm(report, "b").outcomes["click"][0] == 29


def test_a_mismatch_is_raised_and_stays() -> None:
    experiment = books()
    for unit in range(400):
        experiment.expose("b" if unit % 4 else "control", unit, 0)
    report = experiment.report(0)
    assert report.mismatch
    assert report.mismatch_evidence > 1_000
    for unit in range(1_000, 1_200):
        experiment.expose("control", unit, 0)
    report = experiment.report(0)
    assert report.mismatch_evidence < 1
    assert report.mismatch


def test_weights_are_relative() -> None:
    experiment = books(arms=(("control", 1), ("b", 3)))
    for unit in range(4_000):
        experiment.expose("b" if unit % 4 else "control", unit, 0)
    assert not experiment.report(0).mismatch


@pytest.mark.parametrize(
    "bad",
    [
        {"arms": (("a", 1),)},
        {"arms": (("a", 1), ("a", 1))},
        {"arms": (("a", 1), ("b", 0))},
        {"outcomes": (CLICK, CLICK)},
        {"alpha": 0.0},
        {"mismatch_alpha": 1.0},
        {"max_units": 0},
        {"log_slots": 1000},
    ],
)
def test_experiments_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        books(**bad)
