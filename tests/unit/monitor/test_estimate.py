"""Estimates without labels: calibrators against scikit-learn, expectations against definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from monitor.errors import CalibrationError
from monitor.estimate import Calibrator, Estimate, estimate_accuracy, estimate_binary
from monitor.outcomes import CalibratorKind
from tests.reference import naive_labels as naive

KINDS: list[CalibratorKind] = ["isotonic", "platt", "bins"]


def drawn(seed: int, count: int, power: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose chance of a positive is their ``power``."""
    rng = np.random.default_rng(seed)
    scores = rng.beta(1.5, 2.5, count)
    return scores, rng.random(count) < scores**power


@pytest.mark.parametrize("decimals", [1, 2, 15])
def test_isotonic_equals_scikit_learn(decimals: int) -> None:
    scores, hit = drawn(0, 2000, 2.0)
    scores = np.round(scores, decimals)
    ours = Calibrator.fit(scores, hit, "isotonic")
    theirs = IsotonicRegression(out_of_bounds="clip").fit(scores, hit)
    grid = np.linspace(0, 1, 501)
    assert ours(grid) == pytest.approx(theirs.predict(grid), abs=1e-9)


def test_platt_equals_scikit_learn() -> None:
    scores, hit = drawn(1, 5000, 2.0)
    ours = Calibrator.fit(scores, hit, "platt")
    logit = np.log(scores / (1 - scores))[:, None]
    theirs = LogisticRegression(C=np.inf).fit(logit, hit).predict_proba(logit)[:, 1]
    assert ours(scores) == pytest.approx(theirs, abs=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_calibrators_find_the_chance(kind: CalibratorKind) -> None:
    scores, hit = drawn(2, 40_000, 2.0)
    found = Calibrator.fit(scores, hit, kind)
    middle = np.linspace(0.15, 0.8, 30)
    assert np.abs(found(middle) - middle**2).max() < 0.06
    assert ((found(np.linspace(0, 1, 99)) >= 0) & (found(np.linspace(0, 1, 99)) <= 1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_one_value(kind: CalibratorKind) -> None:
    found = Calibrator.fit(np.full(100, 0.5), np.arange(100) < 30, kind)
    assert found(np.array([0.5])) == pytest.approx([0.3], abs=0.01)


@pytest.mark.parametrize(
    ("scores", "hit"),
    [
        (np.full(20, 0.5), np.arange(20) < 10),
        (np.full(100, 0.5), np.arange(100) < 4),
        (np.full(100, 1.5), np.arange(100) < 50),
        (np.full(100, np.nan), np.arange(100) < 50),
    ],
)
def test_too_little_to_learn_from(scores: np.ndarray, hit: np.ndarray) -> None:
    with pytest.raises(CalibrationError):
        Calibrator.fit(scores, hit)


def identity() -> Calibrator:
    return Calibrator("bins", 1000, np.array([0.0, 1.0]), np.array([0.0, 1.0]))


def test_expectations_by_definition() -> None:
    scores = np.round(drawn(3, 80)[0], 2)
    found = estimate_binary(scores, identity(), 0.4).metrics
    said = scores >= 0.4
    tp, fp, fn = scores[said].sum(), (1 - scores[said]).sum(), scores[~said].sum()
    wanted = {
        "accuracy": (tp + (1 - scores[~said]).sum()) / 80,
        "precision": tp / (tp + fp),
        "recall": tp / (tp + fn),
        "f1": 2 * tp / (2 * tp + fp + fn),
        "base_rate": scores.mean(),
        "auc": naive.expected_auc(scores.tolist(), scores.tolist()),
        "brier": (scores * (1 - scores)).mean(),
        "log_loss": -(scores * np.log(scores) + (1 - scores) * np.log(1 - scores)).mean(),
    }
    assert {name: entry.value for name, entry in found.items()} == pytest.approx(wanted, abs=1e-9)


def test_estimates_meet_the_truth_that_is_hidden_from_them() -> None:
    calibrator = Calibrator.fit(*drawn(4, 20_000, 2.0))
    inside: dict[str, int] = {}
    for seed in range(60):
        scores, hit = drawn(100 + seed, 1500, 2.0)
        found = estimate_binary(scores, calibrator, 0.5).metrics
        said = scores >= 0.5
        truth = {
            "accuracy": float((said == hit).mean()),
            "f1": metrics.f1_score(hit, said),
            "auc": metrics.roc_auc_score(hit, scores),
            "brier": metrics.brier_score_loss(hit, scores),
        }
        for name, value in truth.items():
            inside[name] = inside.get(name, 0) + (found[name].low <= value <= found[name].high)
    assert min(inside.values()) >= 50  # of 60; 95 % of them nominally, less what the calibrator is off by


def test_intervals_are_as_wide_as_labels_vary() -> None:
    scores = drawn(8, 1500)[0]
    found = estimate_binary(scores, identity(), 0.5).metrics
    rng, said, values = np.random.default_rng(9), scores >= 0.5, []
    for _ in range(300):
        hit = rng.random(1500) < scores
        tp = int((hit & said).sum())
        area = metrics.roc_auc_score(hit, scores)
        loss = metrics.log_loss(hit, scores)
        values.append(((said == hit).mean(), tp / hit.sum(), 2 * tp / (hit.sum() + said.sum()), area, loss))
    for name, spread in zip(("accuracy", "recall", "f1", "auc", "log_loss"), np.std(values, axis=0), strict=True):
        assert (found[name].high - found[name].low) / (2 * 1.96) == pytest.approx(spread, rel=0.15), name


def test_a_change_of_concept_is_invisible() -> None:
    calibrator = Calibrator.fit(*drawn(5, 20_000))
    scores, hit = drawn(6, 5000, 4.0)
    found = estimate_binary(scores, calibrator, 0.5)
    assert not found.metrics["base_rate"].low <= hit.mean() <= found.metrics["base_rate"].high
    assert found.estimated
    assert "no concept drift" in found.assumption


def test_an_estimate_says_what_it_is() -> None:
    found = estimate_accuracy(np.array([0.5, 0.75]), identity())
    assert isinstance(found, Estimate)
    assert found.metrics["accuracy"].value == 0.625
    entry = found.to_dict()
    assert (entry["estimated"], entry["rows"], entry["reference_rows"], entry["calibrator"]) == (True, 2, 1000, "bins")
    assert set(entry["metrics"]["accuracy"]) == {"value", "low", "high"}


def test_no_rows_and_one_class() -> None:
    assert math.isnan(estimate_binary(np.empty(0), identity(), 0.5).metrics["auc"].value)
    sure = estimate_binary(np.ones(10), identity(), 0.5).metrics
    assert sure["accuracy"].value == 1.0
    assert math.isnan(sure["auc"].value)


def test_equal_arguments_give_equal_estimates() -> None:
    scores = drawn(7, 500)[0]
    assert estimate_binary(scores, identity(), 0.5) == estimate_binary(scores[::-1], identity(), 0.5)
