"""router.rollout.gates: verdicts of each kind of gate, how alpha is shared, and what survives a restart."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from router.errors import BadRolloutState
from router.rollout.evidence import OneArm, TwoArms
from router.rollout.gates import Evidence, GateBook, Keys, Level, Means, Verdict, alpha_shares
from router.rollout.spec import (
    NS_PER_S,
    SLOW,
    GateSpec,
    LevelGate,
    MeanGate,
    MismatchGate,
    RateGate,
    RatioGate,
    Reaction,
)
from router.sequential import Moments
from tests.support.rollouts import BAD, GOOD, rollout_spec


def book(*gates: GateSpec, certify: float | None = None) -> GateBook:
    found = GateBook(rollout_spec(gates=tuple((f"g{place}", gate) for place, gate in enumerate(gates))))
    found.enter([] if certify is None else [("g0", certify)])
    return found


def verdict(gates: GateBook, *evidence: Evidence) -> Verdict:
    for found in evidence:
        gates.take({"g0": found}, NS_PER_S)
    return gates.verdicts()[0]


def moments(rng: np.random.Generator, mean: float, count: int = 200) -> Moments:
    found = Moments()
    for value in rng.normal(mean, 1.0, count):
        found.add(float(value))
    return found


def test_gates_that_react_alike_share_alpha() -> None:
    four = tuple((f"g{place}", RatioGate("e")) for place in range(4))
    rest: tuple[tuple[str, GateSpec], ...] = (
        ("hold", RateGate("d", 0.1, Reaction.HOLD)), ("level", LevelGate("psi", 1)), ("keys", MismatchGate()),
    )  # fmt: skip
    shares = alpha_shares(rollout_spec(gates=(*four, *rest), alpha=0.05))
    assert shares == {**{f"g{place}": 0.0125 for place in range(4)}, "hold": 0.05}
    gates = GateBook(rollout_spec(gates=(*four, *rest)))
    bars = {one.gate: one.bar for one in gates.verdicts()}
    assert bars.pop("level") is None
    assert list(bars.values()) == pytest.approx([math.log(80)] * 4 + [math.log(20), math.log(1_000)])


def test_a_ratio_gate_finds_worse_and_certifies_better() -> None:
    assert verdict(book(RatioGate("e")), BAD).worse
    good = verdict(book(RatioGate("e"), certify=2.0), *[GOOD] * 20)
    assert (good.worse, good.certified, good.calm) == (False, True, True)
    assert good.low < 1 < 2.0  # type: ignore[operator]
    assert good.estimate == pytest.approx(0.5)


def test_without_data_nothing_is_known() -> None:
    found = verdict(book(RatioGate("e"), certify=2.0), TwoArms(0, 0, 0, 0), TwoArms(900, 0, 0, 0))
    assert (found.worse, found.certified, found.log_e, found.estimate) == (False, False, pytest.approx(0), None)
    assert (found.low, found.high) == (0.0, None)
    assert found.candidate == (0, 0)


def test_a_gate_that_was_not_asked_certifies_nothing() -> None:
    assert not verdict(book(RatioGate("e")), *[GOOD] * 50).certified


def test_rows_of_different_shares_add_up_without_being_mixed() -> None:
    """Twice the rate in both rows; the rows' pooled counts would say otherwise (Simpson)."""
    rows = (TwoArms(10_000, 200, 90_000, 900), TwoArms(90_000, 18_000, 10_000, 1_000))
    assert verdict(book(RatioGate("e")), rows).estimate == pytest.approx(2.0)


def test_keys_are_judged_by_the_share_that_they_had() -> None:
    found = verdict(book(RatioGate("e")), *[(TwoArms(0, 9, 0, 1, 0.1),)] * 4)
    assert found.worse
    fair = verdict(book(RatioGate("e")), *[(TwoArms(0, 9, 0, 1, 0.9),)] * 4)
    assert not fair.worse


def test_a_rate_gate_holds_a_ceiling_and_certifies_without_a_single_event() -> None:
    assert verdict(book(RateGate("e", 0.02)), OneArm(200, 30)).worse
    clean = verdict(book(RateGate("e", 0.02), certify=0.02), OneArm(400, 0))
    assert (clean.worse, clean.certified) == (False, True)
    assert not verdict(book(RateGate("e", 0.02), certify=0.02), OneArm(20, 0)).certified


def test_a_mean_gate_by_its_direction() -> None:
    rng = np.random.default_rng(2)
    lower = Means(moments(rng, 0.0), moments(rng, 1.0))
    assert verdict(book(MeanGate("clicks")), lower).worse
    assert not verdict(book(MeanGate("cost", higher_is_better=False)), lower).worse
    assert verdict(book(MeanGate("cost", higher_is_better=False), certify=0.1), lower).certified
    same = Means(moments(rng, 1.0, 5), moments(rng, 1.0, 5))
    few = verdict(book(MeanGate("clicks"), certify=9.0), same)
    assert (few.worse, few.certified) == (False, False)


def test_a_level_gate_wants_several_looks_running() -> None:
    gate = LevelGate("psi", 0.25, 3)
    assert not verdict(book(gate), Level(0.9), Level(0.9)).worse
    assert not verdict(book(gate), Level(0.9), Level(0.9), Level(0.25), Level(0.9)).worse
    assert verdict(book(gate), Level(0.9), Level(math.nan), Level(0.3)).worse
    assert verdict(book(gate), Level(0.9), Level(0.1)).calm


def test_a_mismatch_gate_over_changes_of_the_share() -> None:
    fine = verdict(book(MismatchGate()), Keys(1_000, 99_000, 0.01), Keys(5_000, 95_000, 0.05), Keys(0, 100, 1.0))
    assert not fine.worse
    gates = book(MismatchGate())
    assert verdict(gates, Keys(1_000, 99_000, 0.01), Keys(4_000, 96_000, 0.05)).worse
    gates.acknowledge(["g0"])
    assert gates.verdicts()[0].log_e == 0


def test_latency_is_not_judged_while_caches_are_cold() -> None:
    gates = GateBook(rollout_spec(gates=(("slow", RatioGate(SLOW)), ("errors", RatioGate("error")))))
    gates.take({"slow": BAD, "errors": BAD}, NS_PER_S, warming=True)
    assert [found.worse for found in gates.verdicts()] == [False, True]


def test_frequent_events_are_judged_in_blocks() -> None:
    gates = book(RatioGate("flag"))
    row = TwoArms(10, 8, 10, 5)
    for _ in range(6):
        gates.take({"g0": row}, NS_PER_S)
    before = gates.verdicts()[0].log_e
    for _ in range(30):
        gates.take({"g0": row}, NS_PER_S)
    assert gates.verdicts()[0].worse
    assert before is not None


@pytest.mark.parametrize("base", [0.3, 0.6])
def test_frequent_events_at_the_tolerated_ratio_seldom_roll_back(base: float) -> None:
    """100 seeded runs of 120 looks: Ville's bound with three standard errors."""
    rng = np.random.default_rng(4)
    worse = 0
    for _ in range(100):
        gates = book(RatioGate("flag"))
        for _ in range(120):
            row = TwoArms(8, int(rng.binomial(8, 1.2 * base)), 12, int(rng.binomial(12, base)))
            if verdict(gates, row).worse:
                worse += 1
                break
    assert worse <= 100 * 0.05 + 3 * math.sqrt(100 * 0.05 * 0.95)


def test_what_is_stored_goes_on_alike() -> None:
    gates: tuple[GateSpec, ...] = (
        RatioGate("e"), RateGate("e", 0.02), MeanGate("m"), LevelGate("psi", 0.2), MismatchGate(),
    )  # fmt: skip
    rng = np.random.default_rng(1)
    first = {
        "g0": GOOD, "g1": OneArm(9, 1), "g2": Means(moments(rng, 0.0), moments(rng, 0.0)), "g3": Level(0.3),
        "g4": Keys(3, 99, 0.01),
    }  # fmt: skip
    ours, theirs = book(*gates, certify=2.0), book(*gates)
    ours.take(first, NS_PER_S)
    theirs.restore(json.loads(json.dumps(ours.to_dict(), allow_nan=False)))
    for one in (ours, theirs):
        one.take(first, NS_PER_S)
    assert ours.verdicts() == theirs.verdicts()
    assert ours.to_dict() == theirs.to_dict()


def test_a_damaged_state_is_named_so() -> None:
    good = book(RatioGate("e")).to_dict()["g0"]
    damages: list[dict[str, object]] = [
        {}, {"g0": {}}, {"g0": good | {"interval": [1.0]}}, {"g0": good | {"margin": "x"}},
        {"g0": good | {"against": {"logs": [math.inf] * 8, "time_ns": 0}}},
    ]  # fmt: skip
    for damage in damages:
        with pytest.raises(BadRolloutState):
            book(RatioGate("e")).restore(damage)
