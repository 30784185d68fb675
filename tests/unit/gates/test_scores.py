"""server.gates.scores: hand-worked numbers, and scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from router.rollout.quality import slices
from server.errors import InvalidArgument
from server.gates.scores import (
    Decided,
    area_under_curve,
    as_text,
    classification_loss,
    classification_metrics,
    decide,
    find_classes,
    metric_rows,
    places,
    regression_loss,
    regression_metrics,
    two_sided,
)


def test_labels_compare_as_texts() -> None:
    assert as_text(np.array([1, 0])).tolist() == ["1", "0"]
    assert as_text(np.array([1.0, np.nan, 0.5])).tolist() == ["1", "", "0.5"]
    assert as_text(np.array([True, False])).tolist() == ["1", "0"]
    assert as_text(np.array([b"yes", "no", None, 2.0, True], object)).tolist() == ["yes", "no", "", "2", "1"]


def test_classes_are_numbers_when_labels_are_and_sorted_texts_otherwise() -> None:
    assert find_classes(np.array(["1", "0"]), 3) == ("0", "1", "2")
    assert find_classes(np.array(["no", "yes", "no"]), 2) == ("no", "yes")
    assert find_classes(np.array(["10", "9"]), 0) == ("9", "10")
    assert find_classes(np.array(["a"]), 2, ("b", "a")) == ("b", "a")
    with pytest.raises(InvalidArgument, match="names 1 classes, the output has 2"):
        find_classes(np.array(["a"]), 2, ("a",))
    with pytest.raises(InvalidArgument, match="name the classes"):
        find_classes(np.array(["a", "b", "c"]), 2)
    assert places(np.array(["b", "x"]), ("a", "b")).tolist() == [1, -1]


def test_decisions_by_threshold_and_by_the_most_probable() -> None:
    two = two_sided(np.array([[0.2], [0.5], [0.9]]))
    assert two.shape == (3, 2)
    assert decide(two, 1, 0.5).tolist() == [0, 1, 1]
    assert decide(two, 1, 0.95).tolist() == [0, 0, 0]
    assert decide(two, 0, 0.5).tolist() == [0, 0, 1]
    assert decide(np.array([[0.2, 0.5, 0.3]]), 2, 0.5).tolist() == [1]


def test_losses_by_hand() -> None:
    chances = np.array([[0.8, 0.2], [0.4, 0.6]])
    labels = np.array([0, 1])
    found = Decided(np.array([0, 0]), chances)
    assert classification_loss("brier", found, labels) == pytest.approx([0.04, 0.16])
    assert classification_loss("log_loss", found, labels) == pytest.approx([-np.log(0.8), -np.log(0.6)])
    assert classification_loss("zero_one", found, labels).tolist() == [0, 1]
    three = Decided(np.array([0]), np.array([[0.5, 0.3, 0.2]]))
    assert classification_loss("brier", three, np.array([0])) == pytest.approx([0.25 + 0.09 + 0.04])
    assert regression_loss("squared", np.array([1.0, 3.0]), np.array([2.0, 3.0])).tolist() == [1, 0]
    assert regression_loss("absolute", np.array([1.0, 3.0]), np.array([2.0, 3.5])).tolist() == [1, 0.5]
    with pytest.raises(InvalidArgument, match="needs probabilities"):
        classification_loss("brier", Decided(np.array([0])), np.array([0]))


@pytest.mark.parametrize("loss", ["brier", "log_loss", "zero_one"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(loss: str, bad: float) -> None:
    chances = two_sided(np.array([[bad], [0.7]]))
    found = classification_loss(loss, Decided(decide(chances, 1, 0.5), chances), np.array([1, 1]))
    assert [bool(np.isfinite(value)) for value in found] == [False, True]


def test_metrics_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 500)
    chance = np.round(np.clip(0.3 * labels + 0.7 * rng.random(500), 0, 1), 2)
    chances = two_sided(chance)
    found = classification_metrics(Decided(decide(chances, 1, 0.5), chances), labels, 1)
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(labels, chance))
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(labels, chance))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, chance >= 0.5))
    assert found["calibration"] == pytest.approx(chance.mean() - labels.mean())
    truth, guess = rng.normal(size=300), rng.normal(size=300)
    other = regression_metrics(guess, truth)
    assert other["r2"] == pytest.approx(metrics.r2_score(truth, guess))
    assert other["rmse"] == pytest.approx(np.sqrt(metrics.mean_squared_error(truth, guess)))
    assert regression_metrics(guess, np.zeros(300))["r2"] is None
    assert area_under_curve(chance, np.ones(500, bool)) is None
    assert classification_metrics(Decided(labels), labels, 1) == {"accuracy": 1.0}


#: group, label, decision of ten rows. By hand: a has labels 1 1 0 0 0, decisions 1 0 1 0 0; b 1 1 1 0 0 and 1 1 0 0 0.
GROUP = np.array(list("aaaaabbbbb"))
LABEL = np.array([1, 1, 0, 0, 0, 1, 1, 1, 0, 0])
DECISION = np.array([1, 0, 1, 0, 0, 1, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("metric", "a", "b"),
    [
        ("accuracy", 3 / 5, 4 / 5),
        ("selection_rate", 2 / 5, 2 / 5),
        ("true_positive_rate", 1 / 2, 2 / 3),
        ("false_positive_rate", 1 / 3, 0 / 2),
        ("precision", 1 / 2, 2 / 2),
    ],
)
def test_rates_of_groups_by_hand(metric: str, a: float, b: float) -> None:
    """As fairlearn 0.15 defines them; its MetricFrame gave the same numbers on random data to the last bit but one."""
    values, mask = metric_rows(metric, DECISION, LABEL, 1)
    found = slices(values, GROUP, rows=mask, min_rows=1).evidence
    assert found["groups"] == {"a": pytest.approx(a), "b": pytest.approx(b)}
    assert found["gap"] == pytest.approx(abs(a - b))
