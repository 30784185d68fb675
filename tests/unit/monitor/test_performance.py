"""Metrics of joined rows against scikit-learn and against definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from monitor.outcomes import LabelSettings
from monitor.performance import GRID, Ranking, Tally, auc_of, scorer_of
from tests.reference import naive_labels as naive


def binary_rows(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.beta(2, 3, count), rng.integers(1, 17))
    return scores, (rng.random(count) < scores).astype("f8")


def of_rows(settings: LabelSettings, predictions: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Tallied in uneven pieces."""
    scorer, ranking = scorer_of(settings), Ranking(len(labels))
    total: Tally = scorer.empty()
    for part in np.array_split(np.arange(len(labels)), 3):
        total = total.plus(scorer.tally(predictions[part], labels[part]))
        pairs = scorer.pairs(predictions[part], labels[part])
        if pairs is not None:
            ranking.add(*pairs)
    return scorer.metrics(total, ranking if scorer.ranks else None)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_binary_equals_scikit_learn(seed: int, threshold: float) -> None:
    scores, labels = binary_rows(seed, 997)
    found = of_rows(LabelSettings("binary", "p", threshold=threshold), scores[:, None], labels)
    truth, said = labels.astype(int), (scores >= threshold).astype(int)
    wanted = {
        "accuracy": metrics.accuracy_score(truth, said),
        "precision": metrics.precision_score(truth, said),
        "recall": metrics.recall_score(truth, said),
        "f1": metrics.f1_score(truth, said),
        "specificity": metrics.recall_score(truth, said, pos_label=0),
        "log_loss": metrics.log_loss(truth, scores),
        "brier": metrics.brier_score_loss(truth, scores),
        "auc": metrics.roc_auc_score(truth, scores),
        "average_precision": metrics.average_precision_score(truth, scores),
        "ece": naive.ece(scores.tolist(), labels.astype(bool).tolist(), 10),
        "base_rate": truth.mean(),
        "mean_score": scores.mean(),
        "brier_excess": np.mean((scores - truth) ** 2 - scores * (1 - scores)),
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)
    assert found["confusion"] == metrics.confusion_matrix(truth, said).tolist()
    assert found["auc_error"] == 0


def test_binary_float32_scores_at_the_ends() -> None:
    scores, labels = np.array([0.0, 1.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0, 1.0])
    found = of_rows(LabelSettings("binary", "p"), scores[:, None], labels)
    assert found["log_loss"] == pytest.approx(metrics.log_loss(labels, scores), abs=1e-9)
    assert found["auc"] == 0.5
    assert found["ece"] == 0.5
    assert found["reliability"]["rows"] == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert math.isnan(found["reliability"]["observed"][1])


def test_undefined_is_nan() -> None:
    settings = LabelSettings("binary", "p")
    found = of_rows(settings, np.array([[0.1], [0.2]]), np.zeros(2))
    assert [name for name, value in found.items() if isinstance(value, float) and math.isnan(value)] == [
        "precision", "recall", "f1", "auc", "auc_error", "auc_standard_error", "average_precision",
    ]  # fmt: skip
    assert found["accuracy"] == 1.0
    for task in (settings, LabelSettings("regression", "p"), LabelSettings("multiclass", "p", classes=("a", "b"))):
        scorer = scorer_of(task)
        empty = scorer.metrics(scorer.empty(), None)
        assert all(math.isnan(value) for value in empty.values() if isinstance(value, float))


def test_classes_without_scores() -> None:
    said, truth = np.array([1.0, 0.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.0, 1.0])
    found = of_rows(LabelSettings("binary", "p", form="class", threshold=0.99), said[:, None], truth)
    assert found["f1"] == pytest.approx(metrics.f1_score(truth, said))
    assert "auc" not in found
    assert "log_loss" not in found
    many = LabelSettings("multiclass", "p", form="class", classes=("a", "b", "c"))
    said, truth = np.array([2.0, 0.0, 1.0, 1.0]), np.array([2.0, 1.0, 0.0, 1.0])
    found = of_rows(many, said[:, None], truth)
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(truth, said, average="macro"))
    assert "log_loss" not in found


@pytest.mark.parametrize("seed", range(4))
def test_multiclass_equals_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.ones(4), 500)
    truth = np.array([rng.choice(4, p=row) for row in scores])
    truth[truth == 3] = 2  # a class that is predicted and never true
    found = of_rows(LabelSettings("multiclass", "p", classes=tuple("abcd")), scores, truth.astype("f8"))
    said = scores.argmax(axis=1)
    wanted = {
        "accuracy": metrics.accuracy_score(truth, said),
        "macro_f1": metrics.f1_score(truth, said, average="macro", zero_division=0),
        "micro_f1": metrics.f1_score(truth, said, average="micro"),
        "log_loss": metrics.log_loss(truth, scores, labels=range(4)),
        "ece": naive.ece(scores.max(axis=1).tolist(), (said == truth).tolist(), 10),
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)
    assert found["confusion"] == metrics.confusion_matrix(truth, said, labels=range(4)).tolist()
    assert found["precision"] == pytest.approx(
        metrics.precision_score(truth, said, average=None, zero_division=0).tolist(), abs=1e-9
    )
    assert math.isnan(found["recall"][3])


@pytest.mark.parametrize(("center", "spread"), [(0.0, 1.0), (1e7, 1.0), (-3e5, 1e-3), (1e-9, 1e-12)])
def test_regression_equals_scikit_learn(center: float, spread: float) -> None:
    rng = np.random.default_rng(3)
    truth = center + spread * rng.standard_normal(800)
    said = truth + spread * (0.1 + 0.5 * rng.standard_normal(800))
    found = of_rows(LabelSettings("regression", "p"), said[:, None], truth)
    wanted = {
        "mae": metrics.mean_absolute_error(truth, said),
        "rmse": metrics.root_mean_squared_error(truth, said),
        "bias": (said - truth).mean(),
        "mape": metrics.mean_absolute_percentage_error(truth, said) if abs(center) != 1e-9 else found["mape"],
        "mean_label": truth.mean(),
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
    assert found["r2"] == pytest.approx(metrics.r2_score(truth, said), abs=1e-7)


def test_regression_at_the_edges() -> None:
    settings = LabelSettings("regression", "p")
    found = of_rows(settings, np.array([[1.0], [3.0], [5.0]]), np.array([0.0, 2.0, 4.0]))
    assert found["mape"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert found["mape_rows"] == 2
    same = of_rows(settings, np.array([[1.0], [3.0]]), np.array([7.0, 7.0]))
    assert math.isnan(same["r2"])
    huge = of_rows(settings, np.array([[1e60], [-1e60]]), np.array([-1e60, 1e-300]))
    assert huge["rmse"] == pytest.approx(math.sqrt((4e120 + 1e120) / 2))
    assert math.isfinite(huge["mape"])


def test_delong_variance_by_definition() -> None:
    scores, labels = binary_rows(1, 150)
    positive = labels.astype(bool)
    ranking = Ranking(len(scores))
    ranking.add(scores, positive)
    found = auc_of(ranking)
    assert found.value == pytest.approx(naive.auc(scores.tolist(), positive.tolist()), abs=1e-12)
    assert found.variance == pytest.approx(naive.delong_variance(scores.tolist(), positive.tolist()), abs=1e-12)


def test_delong_variance_is_the_variance_of_the_area() -> None:
    rng, areas, variances = np.random.default_rng(5), [], []
    for _ in range(400):
        positive = rng.random(300) < 0.3
        ranking = Ranking(300)
        ranking.add(1 / (1 + np.exp(-rng.standard_normal(300) - positive)), positive)
        found = auc_of(ranking)
        areas.append(found.value)
        variances.append(found.variance)
    assert np.mean(variances) == pytest.approx(np.var(areas), rel=0.2)


def test_a_ranking_over_its_limit_becomes_a_grid() -> None:
    scores, labels = binary_rows(2, 3000)
    positive, exact, grid = labels.astype(bool), Ranking(3000), Ranking(2999)
    for part in np.array_split(np.arange(3000), 7):
        exact.add(scores[part], positive[part])
        grid.add(scores[part], positive[part])
    assert grid.rows() is None
    assert grid.cells().shape == (2, GRID)
    assert (grid.cells() == exact.cells()).all()
    mixed = Ranking(0)
    mixed.merge(exact)
    mixed.merge(grid)
    assert (mixed.cells() == 2 * exact.cells()).all()


def test_a_sample_of_cells_keeps_the_share_of_every_stretch() -> None:
    scores, labels = binary_rows(9, 30_000)
    exact = Ranking(30_000)
    exact.add(scores, labels == 1)
    np.testing.assert_array_equal(np.sort(exact.sample(10)[0]), np.sort(scores))
    cells = Ranking.of_cells(exact.cells())
    whole, positive = cells.sample(30_000)
    assert (len(whole), int(positive.sum())) == (30_000, int(labels.sum()))
    assert np.abs(np.sort(whole) - np.sort(scores)).max() <= 1 / GRID
    thin, thin_positive = cells.sample(3000)
    assert 2998 <= len(thin) <= 3000
    for low in np.arange(0.0, 1.0, 0.125):
        for side in (False, True):
            part = ((scores >= low) & (scores < low + 0.125) & ((labels == 1) == side)).sum() / 10
            got = ((thin >= low) & (thin < low + 0.125) & (thin_positive == side)).sum()
            assert abs(got - part) <= 1
