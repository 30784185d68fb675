"""router.rollout.transitions: what each asks for, and in which order; restarts in every state."""

from __future__ import annotations

import json

import pytest

from router.errors import BadRollout
from router.rollout.events import (
    Accepted,
    AliasMoved,
    AliasRefused,
    CandidateFailed,
    KeepWarm,
    Load,
    Loaded,
    MoveAlias,
    Order,
    Overridden,
    Publish,
    Published,
    Release,
    Shadow,
    SpecRemoved,
    State,
)
from router.rollout.evidence import OneArm
from router.rollout.machine import Rollout
from tests.support.rollouts import BAD, OPEN, RUNNING, Driven, confirm, published, records, restarted, rollout_spec

# --- forward ----------------------------------------------------------------------------------------------------------


def test_a_good_candidate_goes_through_all_states_to_promotion() -> None:
    driven = Driven()
    assert [type(action).__name__ for action in driven.tell(Accepted())] == ["Record", "Load"]
    assert Shadow(True) in driven.tell(Loaded())
    assert driven.state is State.SHADOWING
    driven.reach(State.AWAITING)
    driven.order(Order.APPROVE)
    assert driven.state is State.PROMOTING
    actions = driven.tell(AliasMoved("8"))
    assert driven.state is State.PROMOTED
    assert published(actions) == [Publish(driven.rollout.serial, "8", 0)]
    assert [(table.stable, table.weight) for table in published(driven.log)] == [
        ("7", 100), ("7", 500), ("7", 10_000), ("8", 0),
    ]  # fmt: skip
    assert MoveAlias("7", "8") in driven.log
    assert KeepWarm("7") in driven.log
    driven.silence(15 * 60)
    assert driven.rollout.ended
    assert driven.log.count(Release("7")) == 1
    assert not driven.rollout.failed


def test_growth_is_recorded_first_and_going_back_is_published_first() -> None:
    driven = Driven()
    driven.reach(State.SHADOWING)
    grown = driven.tick(diverge=OneArm(2_000, 1))
    assert [type(action).__name__ for action in grown] == ["Record", "Publish", "Shadow"]
    back = driven.tick(errors=BAD)
    assert [type(action).__name__ for action in back] == ["Publish", "Record"]


def test_records_say_who_why_and_on_what_evidence() -> None:
    driven = Driven().reach(State.STEP)
    record = records(driven.tick(errors=BAD))[0]
    assert (record.origin, record.state, record.actor, record.weight) == (
        State.STEP,
        State.ROLLING_BACK,
        "automatic",
        0,
    )
    assert record.reason == "worse by errors"
    said = json.loads(json.dumps(record.to_dict()))
    errors = next(verdict for verdict in said["evidence"] if verdict["gate"] == "errors")
    assert errors["worse"] is True
    assert errors["log_e"] > errors["bar"]
    assert errors["low"] > 10
    assert "high" not in errors
    assert errors["estimate"] == pytest.approx(125)
    assert errors["candidate"] == [500, 250]


def test_without_a_shadow_phase_loading_leads_to_the_first_step() -> None:
    driven = Driven(rollout_spec(shadow=None))
    driven.tell(Accepted())
    assert published(driven.tell(Loaded())) == [Publish(1, "7", 100)]
    assert Shadow(True) not in driven.log


# --- hold -------------------------------------------------------------------------------------------------------------


def test_a_hold_may_take_the_traffic_away_and_gives_it_back() -> None:
    driven = Driven(rollout_spec(hold_weight="zero")).reach(State.HOLD)
    assert driven.rollout.weight == 0
    actions = driven.order(Order.RESUME)
    assert driven.state is State.STEP
    assert published(actions)[0].weight == 100


# --- back and out -----------------------------------------------------------------------------------------------------


def test_a_rollback_repeats_its_table_until_it_is_published() -> None:
    driven = Driven().reach(State.STEP)
    first = published(driven.tick(errors=BAD))
    assert published(driven.tick()) == published(driven.tick()) == first
    driven.tell(Published(first[0].serial - 1))
    assert driven.state is State.ROLLING_BACK
    driven.tell(Published(first[0].serial))
    assert driven.state is State.ROLLED_BACK
    assert driven.tick(errors=BAD) == ()


@pytest.mark.parametrize("state", [State.PENDING, State.LOADING])
def test_a_candidate_that_cannot_be_loaded_fails_and_touches_nothing(state: State) -> None:
    driven = Driven().reach(state)
    actions = driven.tell(CandidateFailed("golden request 2 differs"))
    assert (driven.state, driven.rollout.reason) == (State.FAILED, "golden request 2 differs")
    assert published(actions) == []
    assert Release("8") in actions
    assert driven.rollout.failed


def test_removing_the_configuration_aborts() -> None:
    driven = Driven().reach(State.STEP)
    driven.tell(SpecRemoved("config"))
    confirm(driven)
    assert (driven.state, driven.rollout.reason) == (State.ABORTED, "removed from the configuration")


def test_a_specification_without_sense_starts_nothing() -> None:
    with pytest.raises(BadRollout, match="wanted at least one step"):
        Rollout(rollout_spec(steps=()), "ada")


# --- the champion alias -----------------------------------------------------------------------------------------------


def test_someone_else_moved_the_champion() -> None:
    driven = Driven().reach(State.PROMOTING)
    actions = driven.tell(AliasRefused("champion is 9"))
    assert published(actions) == [Publish(driven.rollout.serial, "", 0)]
    confirm(driven)
    assert driven.state is State.ABORTED
    assert not driven.rollout.failed


@pytest.mark.parametrize("state", [state for state in OPEN if state is not State.PROMOTED])
def test_an_override_ends_the_rollout_and_leaves_stable_to_it(state: State) -> None:
    driven = Driven().reach(state)
    actions = driven.tell(Overridden("eve"))
    assert published(actions)[-1].stable == ""
    assert records(actions)[0].actor == "eve"
    assert not any(isinstance(action, MoveAlias) for action in actions)
    confirm(driven)
    assert driven.state is State.ABORTED


def test_an_override_during_a_rollback_does_not_hide_that_it_failed() -> None:
    driven = Driven().reach(State.STEP)
    driven.tick(errors=BAD)
    assert published(driven.tell(Overridden("eve")))[-1].stable == ""
    confirm(driven)
    assert driven.state is State.ROLLED_BACK


def test_after_promotion_an_override_or_a_cleaned_configuration_just_closes() -> None:
    for event in (Overridden("eve"), SpecRemoved("eve")):
        driven = Driven().reach(State.PROMOTED)
        actions = driven.tell(event)
        assert (driven.state, driven.rollout.ended) == (State.PROMOTED, True)
        assert Release("7") in actions
        assert published(actions) == []


def test_a_promotion_that_its_rollback_overtook_is_taken_back() -> None:
    driven = Driven().reach(State.PROMOTING)
    driven.tick(errors=BAD)
    assert driven.tell(AliasMoved("8")) == (MoveAlias("8", "7"),)
    assert driven.tell(AliasMoved("7")) == ()
    assert records(driven.tell(AliasRefused("9 is")))[0].reason == "the champion was left alone: 9 is"


@pytest.mark.parametrize("state", [State.PROMOTING, State.PROMOTED])
def test_a_rollback_of_a_promotion_ends_only_when_the_champion_is_back(state: State) -> None:
    """Or a restart, which takes the champion for stable, would bring the candidate back."""
    driven = Driven().reach(state)
    driven.tick(ceiling=OneArm(500, 250))
    driven.tell(Published(driven.rollout.serial))
    assert driven.state is State.ROLLING_BACK
    assert driven.tick() == (MoveAlias("8", "7"),)
    again = restarted(driven)
    assert again.log == [Publish(driven.rollout.serial, "7", 0), MoveAlias("8", "7")]
    again.tell(AliasRefused("champion is 9"))
    assert again.state is State.ROLLING_BACK
    again.tell(Published(driven.rollout.serial))
    assert again.state is State.ROLLED_BACK


# --- restarts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", RUNNING)
def test_a_crash_while_the_candidate_serves_rolls_back(state: State) -> None:
    again = restarted(Driven().reach(state))
    assert again.state is State.ROLLING_BACK
    assert published(again.log)[-1].weight == 0
    assert "process died" in again.rollout.reason


@pytest.mark.parametrize("crashed", [True, False])
@pytest.mark.parametrize("state", RUNNING)
def test_it_goes_on_where_it_was(state: State, crashed: bool) -> None:
    driven = Driven(rollout_spec(on_crash="resume" if crashed else "rollback")).reach(state)
    before, weight = driven.rollout.to_dict(), driven.rollout.weight
    again = restarted(driven, crashed)
    if state is not State.PROMOTED:
        assert again.state is State.LOADING
        assert again.rollout.weight == 0
        again.tell(Loaded())
    assert again.state is state
    assert (again.rollout.step, again.rollout.weight) == (driven.rollout.step, weight)
    after = again.rollout.to_dict()
    assert after["gates"] == before["gates"]
    assert after["step_ns"] == before["step_ns"]


def test_a_restart_in_the_middle_of_a_restart() -> None:
    driven = Driven(rollout_spec(on_crash="resume")).reach(State.AWAITING)
    again = restarted(restarted(driven))
    assert again.log == [Load()]
    again.tell(Loaded())
    assert again.state is State.AWAITING


def test_a_candidate_that_cannot_be_loaded_again_is_rolled_back() -> None:
    again = restarted(Driven().reach(State.PROMOTING), crashed=False)
    actions = again.tell(CandidateFailed("gone"))
    assert again.state is State.ROLLING_BACK
    assert MoveAlias("8", "7") in actions


def test_a_crash_before_the_candidate_serves_or_while_going_back_changes_nothing() -> None:
    assert restarted(Driven()).log == []
    assert restarted(Driven().reach(State.LOADING)).log == [Load()]
    back = Driven().reach(State.STEP)
    back.tick(errors=BAD)
    again = restarted(back)
    assert again.log == [Publish(back.rollout.serial, "7", 0)]
    confirm(again)
    assert again.state is State.ROLLED_BACK


def test_approvals_survive_a_restart() -> None:
    driven = Driven(rollout_spec(approvals=2)).reach(State.AWAITING)
    driven.order(Order.APPROVE, "bob")
    again = restarted(driven, crashed=False)
    again.tell(Loaded())
    assert again.rollout.approvals == ("bob",)
    again.order(Order.APPROVE, "eve")
    assert again.state is State.PROMOTING
