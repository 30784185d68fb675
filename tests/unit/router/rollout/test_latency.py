"""router.rollout.latency: the threshold against numpy's quantile, and that it comes from earlier data only."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from router.errors import BadRolloutState
from router.rollout.latency import TailThreshold


def test_nothing_is_slow_before_a_round_has_ended_and_then_one_in_a_hundred_is() -> None:
    rng = np.random.default_rng(1)
    latencies = rng.lognormal(15, 0.5, 20_000).astype(int)
    tail = TailThreshold()
    slow = []
    for latency in latencies:
        if tail.threshold_ns is not None:
            slow.append(latency > tail.threshold_ns)
        tail.add(int(latency))
    assert len(slow) == 19_000
    assert tail.threshold_ns is not None
    assert tail.threshold_ns == pytest.approx(np.quantile(latencies, 0.99), rel=0.12)
    assert 0.005 < np.mean(slow) < 0.015


def test_a_round_changes_nothing_while_it_fills() -> None:
    tail = TailThreshold(0.8, 10)
    tail.add(1_000_000, 10)
    first = tail.threshold_ns
    assert first is not None
    assert 1_000_000 <= first <= 1_050_000
    tail.add(50_000_000, 9)
    assert tail.threshold_ns == first
    tail.add(50_000_000)
    assert tail.threshold_ns is not None
    assert tail.threshold_ns > 50_000_000


def test_old_rounds_fade() -> None:
    tail = TailThreshold(0.8, 10)
    tail.add(50_000_000, 10)
    for _ in range(6):
        tail.add(1_000_000, 10)
    assert tail.threshold_ns is not None
    assert tail.threshold_ns < 1_100_000


@pytest.mark.parametrize("latency", [0, 1, 1_000, 10**18])
def test_latencies_outside_the_cells_count_at_the_ends(latency: int) -> None:
    tail = TailThreshold(0.8, 10)
    tail.add(latency, 10)
    assert tail.threshold_ns is not None
    assert tail.threshold_ns > 0


def test_a_stored_threshold_goes_on() -> None:
    tail, again = TailThreshold(0.8, 10), TailThreshold(0.8, 10)
    tail.add(3_000_000, 10)
    again.restore(json.loads(json.dumps(tail.to_dict())))
    for one in (tail, again):
        one.add(9_000_000, 10)
    assert again.threshold_ns == tail.threshold_ns
    assert again.to_dict() == tail.to_dict()


@pytest.mark.parametrize("damage", [{}, {"past": {"9999": 1.0}, "threshold_ns": 1}, {"past": [], "threshold_ns": 1}])
def test_a_damaged_state_is_named_so(damage: dict[str, Any]) -> None:
    with pytest.raises(BadRolloutState):
        TailThreshold().restore(damage)


@pytest.mark.parametrize(("quantile", "size"), [(0.0, 100), (1.0, 100), (0.99, 50)])
def test_a_round_must_hold_its_quantile(quantile: float, size: int) -> None:
    with pytest.raises(ValueError, match="quantile"):
        TailThreshold(quantile, size)
