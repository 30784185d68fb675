"""Counts as evidence of gates, each in the form that its kind takes."""

from __future__ import annotations

from typing import Any

from router.rollout.evidence import OneArm, TwoArms
from router.rollout.first_events import Placing
from router.rollout.gates import GateBook, Keys, Level, Means
from router.rollout.spec import EVENTS, SLOW, LevelGate, MeanGate, MismatchGate, RateGate, RatioGate
from server.control.rollouts.evidence import Look, PairCounts
from server.gateway.rollout_outcomes import OutcomeBooks
from server.gateway.rollouts import RolloutBooks, Taken
from tests.support.rollouts import rollout_spec

GATES = (
    ("errors", RatioGate("error")),
    ("slow", RatioGate(SLOW)),
    ("ceiling", RateGate("error", 0.02)),
    ("diverge", RateGate("disagree", 0.03, paired=True)),
    ("drift", LevelGate("psi", 0.25)),
    ("chargeback", RatioGate("chargeback")),
    ("chargebacks", RateGate("chargeback", 0.1)),
    ("revenue", MeanGate("revenue")),
    ("srm", MismatchGate()),
)


def look(taken: Taken, comparison: dict[str, Any] | None = None, level: float | None = None) -> Look:
    spec = rollout_spec(gates=GATES, shadow=None, steps=())
    return Look(spec, taken, {} if level is None else {"psi": level}, PairCounts(), comparison)


def taken(**changes: Any) -> Taken:
    rows: dict[str, tuple[TwoArms, ...]] = dict.fromkeys(EVENTS, ())
    alone = {event: OneArm(0, 0.0) for event in EVENTS}
    values: dict[str, Any] = {"attempts": 0, "compared": 0, "rows": rows, "alone": alone, "keys": Keys(0, 0, 0.5)}
    values["outcomes"] = {}
    return Taken(**values | changes)


def test_every_gate_gets_what_it_takes() -> None:
    heard = OutcomeBooks(["chargeback", "revenue"])
    for arm, outcome, money in ((True, 1.0, 2.0), (False, 0.0, 4.0)):
        heard.answered([str(arm)], arm, 0, Placing())
        heard.hear(str(arm), "chargeback", outcome)
        heard.hear(str(arm), "revenue", money)
    rows = {"error": (TwoArms(10, 1, 10, 0),), "timeout": (), SLOW: (TwoArms(0, 1, 0, 0, 0.5),)}
    found = look(taken(rows=rows, outcomes=heard.take()), {"pairs": 7, "disagreeing": 2, "outputs": {}}, 0.4).evidence()
    assert found["errors"] == rows["error"]
    assert found["slow"] == rows[SLOW]
    assert found["diverge"] == OneArm(7, 2.0)
    assert found["drift"] == Level(0.4)
    assert found["chargeback"] == (TwoArms(1, 1, 1, 0),)
    assert found["chargebacks"] == OneArm(1, 1.0)
    assert isinstance(found["revenue"], Means)
    assert (found["revenue"].candidate.mean, found["revenue"].stable.mean) == (2.0, 4.0)
    GateBook(rollout_spec(gates=GATES)).take(found, 10**9)  # raises for evidence of the wrong kind


def test_what_nobody_knows_is_left_out() -> None:
    found = look(taken()).evidence()
    assert set(found) == {"ceiling", "srm"}
    books = RolloutBooks()
    GateBook(rollout_spec(gates=GATES)).take(look(books.take()).evidence(), 10**9)


def test_pairs_are_told_of_once_and_a_new_comparison_from_its_beginning() -> None:
    pairs = PairCounts()

    def news(units: int, agreeing: int) -> OneArm:
        output = {"argmax_rows": units, "argmax_agreeing": agreeing}
        return pairs.news("argmax_disagree", {"outputs": {"y": output, "z": {"argmax_rows": 0, "argmax_agreeing": 0}}})

    assert news(10, 9) == OneArm(10, 1.0)
    assert news(10, 9) == OneArm(0, 0.0)
    assert news(15, 12) == OneArm(5, 2.0)
    assert news(4, 4) == OneArm(4, 0.0)
