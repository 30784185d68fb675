"""Tests behind label alarms: sizes without change, power with it, tails against scipy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from monitor.decay import ReferenceRows, Signal, SignalJudge, log_tail_normal
from monitor.kernels._jit import compile_all
from monitor.label_windows import LabelWindows
from monitor.outcomes import LabelRules, LabelSettings
from monitor.performance import Ranking, scorer_of
from monitor.types import AlarmRules, rows_window

ROWS = 1000
Rows = tuple[np.ndarray, np.ndarray]


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    compile_all()


def binary(rng: np.random.Generator, count: int, power: float = 1.0, noise: float = 0.0) -> Rows:
    """Scores whose chance of a positive is their ``power``, or a coin's with probability ``noise``."""
    scores = rng.beta(1.0, 3.0, count)
    chance = np.where(rng.random(count) < noise, scores.mean(), scores**power)
    return scores[:, None], (rng.random(count) < chance).astype("f8")


def multiclass(rng: np.random.Generator, count: int, noise: float = 0.0) -> Rows:
    scores = rng.dirichlet(np.ones(3) * 0.7, count)
    truth = (scores.cumsum(axis=1) < rng.random(count)[:, None]).sum(axis=1).clip(0, 2)
    return scores, np.where(rng.random(count) < noise, rng.integers(0, 3, count), truth).astype("f8")


def regression(rng: np.random.Generator, count: int, spread: float = 1.0, bias: float = 0.0) -> Rows:
    said = rng.standard_normal(count)
    return said[:, None], said - bias + spread * rng.exponential(1.0, count) - spread


def settings_of(task: Any, **rules: Any) -> LabelSettings:
    classes = ("a", "b", "c") if task == "multiclass" else ()
    return LabelSettings(task, "p", classes=classes, windows=(rows_window(ROWS, ROWS),), rules=LabelRules(**rules))


def signals(wanted: LabelSettings, rows: Rows, reference: Rows | None) -> dict[str, Signal]:
    scorer = scorer_of(wanted)
    (window,) = LabelWindows(wanted, scorer).add(*rows, np.zeros(len(rows[1]), "i8"))
    known = None
    if reference is not None:
        pairs, ranking = scorer.pairs(*reference), Ranking(100_000)
        if pairs is not None:
            ranking.add(*pairs)
        known = ReferenceRows(scorer.tally(*reference), ranking if pairs is not None else None)
    return {signal.name: signal for signal in SignalJudge(wanted, scorer).signals(window, known, 1)}


def test_the_normal_tail() -> None:
    z = [0.0, 0.5, 3.0, 12.0, 29.9, 30.1, 200.0]
    assert [log_tail_normal(value) for value in z] == pytest.approx(stats.norm.logsf(z).tolist(), rel=1e-5)
    assert log_tail_normal(math.inf) == -math.inf


@pytest.mark.parametrize("make", [binary, multiclass, regression])
def test_p_values_without_change_are_no_smaller_than_they_say(make: Callable[..., Rows]) -> None:
    wanted, rng = settings_of(make.__name__), np.random.default_rng(1)
    small: dict[str, int] = {}
    for _ in range(300):
        for name, signal in signals(wanted, make(rng, ROWS), make(rng, 3000)).items():
            small[name] = small.get(name, 0) + (signal.log_p < math.log(0.02))
    assert set(small) == set(wanted.signals)
    assert max(small.values()) <= 14, small  # of 300, 6 expected: Poisson reaches 15 once in 700


def test_calibrated_scores_without_a_reference() -> None:
    wanted, rng = settings_of("binary", learn_rows=0), np.random.default_rng(2)
    small = 0
    for _ in range(300):
        found = signals(wanted, binary(rng, ROWS), None)
        small += found["calibration"].log_p < math.log(0.02)
        assert math.isnan(found["accuracy"].effect)
        assert not found["accuracy"].quiet
    assert small <= 14
    bent = signals(wanted, binary(rng, ROWS, power=1.5), None)
    assert bent["calibration"].over
    assert bent["calibration"].reference == 0.0


def test_nothing_is_judged_while_the_reference_is_learnt() -> None:
    found = signals(settings_of("binary"), binary(np.random.default_rng(0), ROWS), None)
    assert all(math.isnan(signal.effect) and not signal.over and not signal.quiet for signal in found.values())


@pytest.mark.parametrize(
    ("make", "change", "over"),
    [
        (binary, {"noise": 0.7}, {"accuracy", "log_loss", "auc", "calibration", "brier_excess"}),
        (binary, {"power": 1.5}, {"calibration"}),
        (multiclass, {"noise": 0.4}, {"accuracy", "log_loss", "calibration", "brier_excess"}),
        (regression, {"spread": 1.4}, {"mae", "rmse"}),
        (regression, {"bias": 0.4}, {"bias"}),
        (regression, {"bias": -0.4}, {"bias"}),
    ],
)
def test_changes_are_found(make: Callable[..., Rows], change: dict[str, float], over: set[str]) -> None:
    rng = np.random.default_rng(3)
    found = signals(settings_of(make.__name__), make(rng, ROWS, **change), make(rng, 4000))
    assert over <= {name for name, signal in found.items() if signal.over}
    kinds = {name: signal.kind for name, signal in found.items()}
    assert kinds.get("accuracy", "label") == "label"
    assert {kinds.get(name, "calibration") for name in ("calibration", "brier_excess", "bias")} == {"calibration"}


@pytest.mark.parametrize("make", [binary, multiclass, regression])
def test_better_is_no_alarm(make: Callable[..., Rows]) -> None:
    rng = np.random.default_rng(4)
    worse = {"spread": 2.0} if make is regression else {"noise": 0.7}
    found = signals(settings_of(make.__name__), make(rng, ROWS), make(rng, 4000, **worse))
    assert not any(signal.over for signal in found.values() if signal.name != "calibration")


def test_real_is_not_large() -> None:
    rng = np.random.default_rng(5)
    rules = {"margins": {"accuracy": 0.5}, "alarm": AlarmRules(ert_rows=100_000)}
    found = signals(settings_of("binary", **rules), binary(rng, ROWS, noise=0.9), binary(rng, 4000))
    assert found["accuracy"].real
    assert not found["accuracy"].large
    assert not found["accuracy"].over
    assert found["accuracy"].quiet


def test_given_numbers_are_the_reference() -> None:
    rng = np.random.default_rng(6)
    rows = binary(rng, ROWS)
    scorer = scorer_of(settings_of("binary"))
    tally, ranking = scorer.tally(*rows), Ranking(ROWS)
    pairs = scorer.pairs(*rows)
    assert pairs is not None
    ranking.add(*pairs)
    known = scorer.metrics(tally, ranking)
    level = {name: known[name] for name in ("accuracy", "auc", "log_loss", "brier_excess")}
    same = signals(settings_of("binary", reference=level), rows, None)
    assert all(same[name].effect == pytest.approx(0.0, abs=1e-12) for name in level)
    assert not any(signal.over for signal in same.values())
    better = {"accuracy": 0.99, "auc": 0.95, "log_loss": 0.1, "brier_excess": -0.1}
    found = signals(settings_of("binary", reference=better), rows, None)
    assert all(found[name].over for name in better)
    measured = signals(settings_of("binary", reference=better, given_rows=30), rows, None)
    assert all(measured[name].log_p > found[name].log_p for name in better)


def test_shares_of_errors_against_binomial_tails() -> None:
    """The signed root is near the exact tail where a normal approximation is off by orders of magnitude."""
    rng = np.random.default_rng(7)
    labels = np.zeros(ROWS)
    scores = np.zeros((ROWS, 1))
    scores[rng.permutation(ROWS)[:25]] = 1.0
    wanted = settings_of("binary", reference={"accuracy": 0.995})
    found = signals(wanted, (scores, labels), None)["accuracy"]
    exact = stats.binom.logsf(24, ROWS, 0.005)
    assert found.log_p == pytest.approx(exact, rel=0.1)
    assert stats.norm.logsf((25 - 5) / math.sqrt(5)) < exact - 15


def test_one_class_alone_has_no_area() -> None:
    rng = np.random.default_rng(8)
    scores = rng.random((ROWS, 1)) * 0.3
    found = signals(settings_of("binary"), (scores, np.zeros(ROWS)), binary(rng, 4000))
    assert math.isnan(found["auc"].effect)
    assert not found["auc"].quiet


def test_a_perfect_model_that_fails() -> None:
    labels = np.arange(ROWS) % 2.0
    perfect = (labels[:, None], labels)
    wrong = labels.copy()
    wrong[:100] = 1 - wrong[:100]
    found = signals(settings_of("binary"), (wrong[:, None], labels), perfect)
    assert {"accuracy", "auc", "log_loss"} <= {name for name, signal in found.items() if signal.over}
    exact = signals(settings_of("regression"), (labels[:, None], labels), perfect)
    assert not any(signal.over for signal in exact.values())
