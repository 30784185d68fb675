"""router.rollout.machine: what leads from state to state, who may do what in each, and what is stored."""

from __future__ import annotations

from typing import Any

import pytest

from router.errors import BadRolloutState, RolloutRefused
from router.rollout.events import (
    Accepted,
    AliasMoved,
    CandidateFailed,
    ConsentWanted,
    Load,
    Loaded,
    MoveAlias,
    Order,
    Ordered,
    Publish,
    Published,
    Release,
    Shadow,
    State,
    Tick,
)
from router.rollout.evidence import OneArm
from router.rollout.gates import Keys, Level
from router.rollout.machine import Rollout
from router.rollout.spec import MINUTE_NS, NS_PER_S, RatioGate, StepSpec
from tests.support.rollouts import (
    BAD,
    DISAGREE,
    GATES,
    GOOD,
    OPEN,
    STEPS,
    Driven,
    confirm,
    published,
    records,
    restarted,
    rollout_spec,
)

# --- steps ------------------------------------------------------------------------------------------------------------


def test_a_step_lasts_its_least_time_and_ends_on_a_look_with_traffic() -> None:
    driven = Driven().reach(State.STEP)
    driven.good(9)
    assert driven.rollout.step == 0
    assert next(verdict for verdict in driven.rollout.verdicts() if verdict.gate == "errors").certified
    driven.tick(5, attempts=0)
    assert driven.rollout.step == 0
    driven.tick(errors=GOOD)
    assert driven.rollout.step == 1


def test_certificates_are_earned_anew_in_each_step() -> None:
    driven = Driven().reach(State.STEP)
    driven.good(12)
    assert driven.rollout.step == 1
    verdict = driven.rollout.verdicts()[0]
    assert (verdict.margin, verdict.certified) == (2.0, False)


def test_a_candidate_that_no_gate_could_decide_on_waits_for_people() -> None:
    driven = Driven(rollout_spec(approvals=2))
    with pytest.raises(RolloutRefused, match="nothing waits for approval, it is pending"):
        driven.order(Order.APPROVE)
    assert records(driven.tell(ConsentWanted("no holdout")))[0].reason == "waits for approval: no holdout"
    driven.silence(7_200)
    driven.order(Order.APPROVE, "bob")
    again = restarted(driven)
    assert (again.state, again.rollout.reason) == (State.PENDING, "no holdout")
    assert Load() in again.order(Order.APPROVE, "eve")
    assert (again.state, again.rollout.reason) == (State.LOADING, "approved by bob, eve")


# --- what is not good -------------------------------------------------------------------------------------------------


BREACHED = [(state, False) for state in OPEN] + [
    (state, True) for state in OPEN if state not in {State.PROMOTING, State.PROMOTED}
]


@pytest.mark.parametrize(("state", "paused"), BREACHED)
@pytest.mark.parametrize("gate", [{"errors": BAD}, {"ceiling": OneArm(500, 250)}])
def test_a_breach_in_any_state_rolls_back(state: State, paused: bool, gate: dict[str, Any]) -> None:
    driven = Driven().reach(state)
    if paused:
        driven.order(Order.PAUSE)
    actions = driven.tick(**gate)
    assert driven.state is State.ROLLING_BACK
    assert published(actions) == [Publish(driven.rollout.serial, "7", 0)]
    assert isinstance(actions[0], Shadow | Publish)
    assert Load() not in actions
    assert (MoveAlias("8", "7") in actions) == (state in {State.PROMOTING, State.PROMOTED})
    confirm(driven)
    assert driven.state is State.ROLLED_BACK
    assert driven.rollout.failed
    assert driven.log[-1] == Release("8")


@pytest.mark.parametrize("state", [State.SHADOWING, State.STEP, State.AWAITING])
def test_a_gate_that_holds_holds_and_lets_go_when_it_is_calm(state: State) -> None:
    driven = Driven().reach(state)
    for _ in range(3):
        driven.tick(drift=Level(0.3))
    assert driven.state is State.HOLD
    assert driven.rollout.reason == "held by drift"
    driven.tick()
    assert driven.state is State.HOLD
    driven.tick(drift=Level(0.1))
    assert driven.state is (State.SHADOWING if state is State.SHADOWING else State.STEP)


def test_shadow_pairs_that_disagree_hold() -> None:
    driven = Driven().reach(State.SHADOWING)
    driven.tick(diverge=DISAGREE)
    assert (driven.state, driven.rollout.weight) == (State.HOLD, 0)
    driven.order(Order.RESUME)
    assert driven.state is State.SHADOWING


def test_few_shadow_pairs_are_not_enough() -> None:
    driven = Driven().reach(State.SHADOWING)
    driven.tick(diverge=OneArm(999, 0))
    assert driven.state is State.SHADOWING
    driven.tick(diverge=OneArm(1, 0))
    assert driven.state is State.STEP


def test_keys_on_the_wrong_arms_hold_until_a_person_has_looked() -> None:
    driven = Driven().reach(State.STEP)
    driven.tick(srm=Keys(2_000, 50_000, 0.01))
    assert driven.state is State.HOLD
    for _ in range(20):
        driven.tick(srm=Keys(0, 10_000, 0.01))
    assert driven.state is State.HOLD
    driven.order(Order.RESUME)
    driven.tick()
    assert driven.state is State.STEP


def test_no_traffic_for_an_hour_changes_nothing_and_then_holds() -> None:
    driven = Driven().reach(State.STEP)
    driven.silence(3_600)
    assert (driven.state, driven.rollout.step) == (State.STEP, 0)
    driven.silence(3_600)
    assert driven.state is State.HOLD
    assert driven.rollout.reason == "inconclusive: not shown: errors under 4"
    driven.silence(36_000)
    assert driven.state is State.HOLD


def test_what_stays_inconclusive_is_rolled_back_if_asked_for() -> None:
    spec = rollout_spec(inconclusive_then="rollback", inconclusive_after_ns=10 * MINUTE_NS)
    driven = Driven(spec).reach(State.STEP)
    driven.silence(600)
    assert driven.state is State.ROLLING_BACK
    held = Driven(spec).reach(State.HOLD)
    held.silence(600)
    assert held.state is State.ROLLING_BACK


def test_a_pause_stops_the_clock_of_indecision_but_not_time_for_people() -> None:
    driven = Driven().reach(State.STEP)
    driven.order(Order.PAUSE)
    driven.silence(4 * 3_600)
    driven.good(200)
    assert (driven.state, driven.rollout.step, driven.rollout.step_ns) == (State.STEP, 0, 0)
    driven.order(Order.RESUME)
    driven.good(12)
    assert driven.rollout.step == 1


def test_an_inconclusive_hold_ends_when_evidence_comes() -> None:
    driven = Driven().reach(State.STEP)
    driven.silence(7_200)
    assert driven.state is State.HOLD
    driven.good(12)
    assert (driven.state, driven.rollout.step) == (State.STEP, 1)


def test_waiting_for_approval_never_ends_by_itself() -> None:
    driven = Driven(rollout_spec(inconclusive_then="rollback")).reach(State.AWAITING)
    driven.good(2_000)
    assert driven.state is State.AWAITING


def test_time_that_nobody_watched_does_not_count() -> None:
    driven = Driven().reach(State.STEP)
    driven.tick(24 * 3_600)
    assert driven.rollout.step_ns == 60 * NS_PER_S
    driven.now_ns = 0
    driven.tick(0)
    assert driven.rollout.step_ns == 60 * NS_PER_S


# --- too late ---------------------------------------------------------------------------------------------------------


def test_loading_and_promoting_end_in_time_or_not_at_all() -> None:
    loading = Driven().reach(State.LOADING)
    loading.silence(600)
    assert loading.state is State.FAILED
    promoting = Driven().reach(State.PROMOTING)
    promoting.silence(600)
    assert promoting.state is State.ROLLING_BACK


def test_events_that_come_too_late_change_nothing() -> None:
    driven = Driven().reach(State.STEP)
    for event in (Accepted(), Loaded(), CandidateFailed("late"), Published(1), AliasMoved("8")):
        assert driven.tell(event) == ()
    assert driven.state is State.STEP


# --- people -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [*OPEN[:-1]])
def test_an_abort_takes_everything_back_from_any_state_but_promoted(state: State) -> None:
    driven = Driven().reach(state)
    actions = driven.order(Order.ABORT)
    if state in {State.PENDING, State.LOADING}:
        assert published(actions) == []
    else:
        assert published(actions)[0].weight == 0
        confirm(driven)
    assert driven.state is State.ABORTED
    assert not driven.rollout.failed
    assert records(driven.log)[-1 if state in {State.PENDING, State.LOADING} else -2].actor == "bob"


@pytest.mark.parametrize("state", OPEN)
def test_a_person_may_roll_back_from_any_state(state: State) -> None:
    driven = Driven().reach(state)
    driven.order(Order.ROLLBACK)
    confirm(driven)
    assert driven.state is State.ROLLED_BACK


REFUSED = [
    (State.STEP, Order.APPROVE, "nothing waits for approval, it is step"),
    (State.STEP, Order.RESUME, "neither paused nor held"),
    (State.SHADOWING, Order.PROMOTE, "serves no traffic"),
    (State.LOADING, Order.PROMOTE, "serves no traffic"),
    (State.PROMOTED, Order.ABORT, "it is promoted; roll it back"),
    (State.PROMOTED, Order.PAUSE, "cannot pause"),
    (State.PROMOTED, Order.PROMOTE, "cannot promote"),
    (State.PROMOTING, Order.RESUME, "cannot resume"),
]


@pytest.mark.parametrize(("state", "order", "message"), REFUSED)
def test_what_makes_no_sense_is_refused_and_changes_nothing(state: State, order: Order, message: str) -> None:
    driven = Driven().reach(state)
    before = driven.rollout.to_dict()
    with pytest.raises(RolloutRefused, match=message):
        driven.order(order)
    assert driven.rollout.to_dict() == before


@pytest.mark.parametrize("order", list(Order))
def test_nothing_can_be_asked_of_a_rollout_that_has_ended_or_is_going_back(order: Order) -> None:
    driven = Driven().reach(State.STEP)
    driven.tick(errors=BAD)
    with pytest.raises(RolloutRefused, match="being rolled back already"):
        driven.order(order)
    confirm(driven)
    with pytest.raises(RolloutRefused, match=r"it has ended \(rolled_back\)"):
        driven.order(order)


def test_after_keep_warm_there_is_no_way_back() -> None:
    driven = Driven().reach(State.PROMOTED)
    driven.silence(15 * 60)
    with pytest.raises(RolloutRefused, match="no longer kept warm"):
        driven.order(Order.ROLLBACK)
    assert driven.tick(ceiling=OneArm(500, 250)) == ()


@pytest.mark.parametrize("actor", ["", "automatic"])
def test_orders_want_a_name(actor: str) -> None:
    with pytest.raises(RolloutRefused, match="name of a person"):
        Driven().reach(State.STEP).order(Order.PAUSE, actor)


def test_paused_twice_and_approved_while_paused_are_refused() -> None:
    driven = Driven().reach(State.AWAITING)
    driven.order(Order.PAUSE)
    with pytest.raises(RolloutRefused, match="paused already"):
        driven.order(Order.PAUSE)
    with pytest.raises(RolloutRefused, match="resume it first"):
        driven.order(Order.APPROVE)
    driven.order(Order.RESUME)
    driven.order(Order.APPROVE)
    assert driven.state is State.PROMOTING


@pytest.mark.parametrize("order", [Order.APPROVE, Order.PROMOTE])
def test_two_people_who_are_not_the_one_who_started(order: Order) -> None:
    driven = Driven(rollout_spec(approvals=2, two_person=True)).reach(State.AWAITING)
    with pytest.raises(RolloutRefused, match="ada started it"):
        driven.order(order, "ada")
    first = driven.order(order, "bob")
    assert driven.state is State.AWAITING
    assert "1 of 2" in records(first)[0].reason
    with pytest.raises(RolloutRefused, match="bob has done so"):
        driven.order(order, "bob")
    driven.order(order, "eve")
    assert driven.state is State.PROMOTING
    assert "bob, eve" in driven.rollout.reason


def test_a_person_may_promote_early_but_not_over_a_gate() -> None:
    driven = Driven().reach(State.STEP)
    driven.order(Order.PROMOTE)
    assert driven.state is State.PROMOTING
    held = Driven().reach(State.HOLD)
    with pytest.raises(RolloutRefused, match="drift says that the candidate is worse"):
        held.order(Order.PROMOTE)


def test_gates_and_candidate_cannot_change_while_it_runs() -> None:
    driven = Driven().reach(State.STEP)
    driven.rollout.check_unchanged(rollout_spec())
    lowered = (("errors", RatioGate("error", 5.0)), *GATES[1:])
    for change in ({"gates": lowered}, {"candidate": "9"}, {"steps": (*STEPS[:1], StepSpec(10_000))}):
        with pytest.raises(RolloutRefused, match=f"{next(iter(change))} cannot change while it runs"):
            driven.rollout.check_unchanged(rollout_spec(**change))
    driven.order(Order.ABORT)
    confirm(driven)
    driven.rollout.check_unchanged(rollout_spec(candidate="9"))


# --- stored -----------------------------------------------------------------------------------------------------------


DAMAGE: list[dict[str, Any]] = [
    {"version": 2}, {"state": "flying"}, {"step": 7}, {"step": -2}, {"weight": "all"}, {"paused": 1}, {"gates": {}},
    {"spec": {}}, {"last_ns": "x"}, {"approvals": 3}, {"state_ns": None},
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_named_so(damage: dict[str, Any]) -> None:
    stored = Driven().reach(State.STEP).rollout.to_dict()
    with pytest.raises(BadRolloutState):
        Rollout.from_dict(stored | damage)


# --- what it refuses to be told ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("evidence", [{"latency": GOOD}, {"errors": OneArm(1, 0)}, {"drift": GOOD}, {"srm": [GOOD]}])
def test_evidence_that_no_gate_takes_is_an_error_and_changes_nothing(evidence: dict[str, Any]) -> None:
    driven = Driven().reach(State.STEP)
    before = driven.rollout.to_dict()
    with pytest.raises(ValueError, match="evidence for gate"):
        driven.tell(Tick({"ceiling": OneArm(5, 1), **evidence}, 5))
    assert driven.rollout.to_dict() == before


def test_an_order_is_named_in_the_record() -> None:
    driven = Driven().reach(State.STEP)
    record = records(driven.tell(Ordered(Order.PAUSE, "bob", "lunch")))[0]
    assert (record.actor, record.reason, record.origin, record.state) == (
        "bob",
        "paused: lunch",
        State.STEP,
        State.STEP,
    )
