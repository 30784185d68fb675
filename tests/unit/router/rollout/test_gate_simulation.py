"""loadtests.gate_simulation: the replay of many runs is the shipped evidence, and its tables hold with few runs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loadtests.gate_simulation import (
    ALPHA,
    Cell,
    Counts,
    Replay,
    at_most,
    drive,
    late_regression,
    rollout_spec,
    shared_incident,
    steady,
)
from router.rollout.events import State
from router.rollout.evidence import TwoArms
from router.rollout.gates import RatioEvidence
from router.rollout.spec import NS_PER_S, RatioGate


@pytest.mark.parametrize(("share", "ratio"), [(0.01, 1.0), (0.05, 4.0), (0.5, 2.0)])
def test_the_replay_is_what_the_gates_compute(share: float, ratio: float) -> None:
    counts = steady(np.random.default_rng(8), 3, share, ratio, seconds=130)
    # Seconds in which one arm, or both, have nothing.
    counts.candidate[:, 5] = counts.candidate_events[:, 5] = 0
    counts.stable[:, 9] = counts.stable_events[:, 9] = 0
    against, certificate = Replay(counts).against(1.2), Replay(counts).certificate(2.0)
    for run in range(3):
        gate = RatioEvidence("errors", RatioGate("error"), ALPHA, ALPHA)
        gate.enter(2.0)
        for second in range(130):
            row = TwoArms(*(int(values[run, second]) for values in fields(counts)))
            gate.take(row, NS_PER_S)
            if second in {5, 9}:
                gate.take(TwoArms(1, 0, 1, 0), NS_PER_S)
            verdict = gate.verdict()
            assert verdict.log_e == pytest.approx(against[run, second], rel=1e-9, abs=1e-9)
            assert verdict.log_certificate == pytest.approx(certificate[run, second], rel=1e-9, abs=1e-9)


def fields(counts: Counts) -> tuple[np.ndarray, ...]:
    return counts.candidate, counts.candidate_events, counts.stable, counts.stable_events


@pytest.mark.parametrize("share", [0.01, 0.05])
@pytest.mark.parametrize("ratio", [1.0, 1.2])
def test_tolerable_canaries_are_seldom_rolled_back(share: float, ratio: float) -> None:
    runs = 200
    evidence = Replay(steady(np.random.default_rng(1), runs, share, ratio, seconds=900)).against(1.2)
    assert (evidence.max(axis=1) >= -math.log(ALPHA)).sum() <= runs * at_most(ALPHA, runs)


def test_shared_incidents_and_late_regressions() -> None:
    for table in (shared_incident, late_regression):
        assert [cell for cell in table(np.random.default_rng(2), True) if not cell.passed] == []


def test_whole_rollouts_through_the_machine() -> None:
    """Healthy ones are promoted, sick ones rolled back, each at the hand of the shipped machine."""
    rng = np.random.default_rng(6)
    spec = rollout_spec((500, 2_500))
    healthy = [drive(spec, rng, 1.0, 900)[0] for _ in range(20)]
    assert sum(rollout.state is State.ROLLING_BACK for rollout in healthy) <= 20 * at_most(ALPHA, 20)
    assert sum(rollout.state is State.PROMOTING for rollout in healthy) >= 15
    sick = [drive(spec, rng, 10.0, 120)[0] for _ in range(10)]
    assert all(rollout.state is State.ROLLING_BACK for rollout in sick)


def test_a_cell_compares_both_ways() -> None:
    assert Cell("t", "r", "c", 5.0, 5.0).passed
    assert not Cell("t", "r", "c", 5.1, 5.0).passed
    assert not Cell("t", "r", "c", 0.9, 0.99, least=True).passed
    assert Cell("t", "r", "c", math.inf).passed
