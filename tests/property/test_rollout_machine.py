"""Rollouts under any order of events: what must hold in every state, and that a stored one has the same future."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import RolloutRefused
from router.rollout.events import (
    AUTOMATIC,
    Accepted,
    AliasMoved,
    AliasRefused,
    CandidateFailed,
    ConsentWanted,
    Load,
    Loaded,
    Order,
    Ordered,
    Overridden,
    Publish,
    Published,
    Record,
    Recovered,
    SpecRemoved,
    State,
    Tick,
)
from router.rollout.evidence import OneArm, TwoArms, label_increments
from router.rollout.gates import Keys, Level
from router.rollout.machine import Rollout
from router.rollout.spec import NS_PER_S
from tests.support.rollouts import AGREE, BAD, DISAGREE, GOOD, rollout_spec

TERMINAL = {State.ROLLED_BACK, State.ABORTED, State.FAILED}

evidence = st.fixed_dictionaries(
    {},
    optional={
        "errors": st.sampled_from([GOOD, GOOD, GOOD, TwoArms(5, 0, 9, 0), BAD, (TwoArms(0, 1, 0, 3, 0.2),)]),
        "ceiling": st.sampled_from([OneArm(500, 1), OneArm(500, 2), OneArm(500, 400)]),
        "diverge": st.sampled_from([AGREE, AGREE, DISAGREE]),
        "drift": st.builds(Level, st.sampled_from([0.0, 0.0, 0.9, math.nan])),
        "srm": st.sampled_from([Keys(10, 990, 0.01), Keys(0, 40_000, 0.05)]),
    },
)
ticks = st.builds(Tick, evidence, st.sampled_from([0, 500]))
orders = st.builds(Ordered, st.sampled_from(Order), st.sampled_from(["ada", "bob", "eve"]))
others = st.sampled_from(
    [
        Accepted(), ConsentWanted("x"), Loaded(), Loaded(), CandidateFailed("x"), AliasMoved("8"), AliasMoved("7"),
        AliasRefused("x"), Overridden("eve"), SpecRemoved("cfg"), Recovered(True), Recovered(False),
    ]
)  # fmt: skip
PUBLISHED = "published"
events = st.lists(
    st.tuples(st.one_of(ticks, ticks, ticks, orders, others, st.just(PUBLISHED)), st.integers(-5, 700)), max_size=40
)
beginnings = st.sampled_from([[], [Accepted(), Loaded()], [Accepted(), Loaded(), Tick({"diverge": AGREE}, 0)]])
specs = st.builds(
    rollout_spec,
    on_crash=st.sampled_from(["rollback", "resume"]),
    hold_weight=st.sampled_from(["keep", "zero"]),
    inconclusive_then=st.sampled_from(["hold", "rollback"]),
    approvals=st.sampled_from([1, 2]),
    two_person=st.booleans(),
)


def told(rollout: Rollout, event: Any, now_ns: int) -> tuple[Any, ...] | str:
    """The answer to an event, or the refusal."""
    try:
        return rollout.handle(Published(rollout.serial) if event == PUBLISHED else event, now_ns)
    except RolloutRefused as refusal:
        return str(refusal)


@settings(deadline=None, max_examples=150)
@given(specs, beginnings, events)
def test_what_holds_in_every_state(spec: Any, beginning: list[Any], rest: list[tuple[Any, int]]) -> None:
    rollout, now, weight = Rollout(spec, "ada"), 0, 0
    for event, seconds in [(event, 1) for event in beginning] + rest:
        now += seconds * NS_PER_S
        before, ended = rollout.state, rollout.ended
        answer = told(rollout, event, now)
        actions = () if isinstance(answer, str) else answer
        for action in actions:
            if isinstance(action, Publish):
                weight = action.weight
        assert weight == rollout.weight
        check_step(rollout, before, ended, event, actions)


def check_step(rollout: Rollout, before: State, ended: bool, event: Any, actions: tuple[Any, ...]) -> None:
    records = [action for action in actions if isinstance(action, Record)]
    # Every change of state is recorded, in a chain; what has ended stays so and is not published any more.
    if rollout.state is not before:
        assert records
        assert (records[0].origin, records[-1].state) == (before, rollout.state)
    if ended:
        assert rollout.state is before
        assert not any(isinstance(action, Publish | Load) for action in actions)
    # The candidate gets traffic only where it may.
    if rollout.state in {State.PENDING, State.LOADING, State.SHADOWING, State.ROLLING_BACK, *TERMINAL}:
        assert rollout.weight == 0
    # A gate that says worse and rolls back leaves nothing in place.
    if isinstance(event, Tick) and not ended and before is not State.ROLLING_BACK:
        backward = [one for one in rollout.verdicts() if one.worse and one.gate in {"errors", "ceiling"}]
        if backward:
            assert rollout.state in {State.ROLLING_BACK, State.FAILED}
    # Nobody but a person gets past a step that asks for approval, and nobody alone where two are asked for.
    for record in records:
        if record.state is State.PROMOTING and record.origin is not State.LOADING:
            assert record.actor != AUTOMATIC
            if rollout.spec.two_person:
                assert record.actor != rollout.starter


@settings(deadline=None, max_examples=100)
@given(specs, beginnings, events, st.integers(0, 40))
def test_a_stored_rollout_has_the_same_future(
    spec: Any, beginning: list[Any], rest: list[tuple[Any, int]], cut: int
) -> None:
    ours = Rollout(spec, "ada")
    now = 0
    for event in beginning:
        told(ours, event, now)
    for event, seconds in rest[:cut]:
        now += seconds * NS_PER_S
        told(ours, event, now)
    theirs = Rollout.from_dict(json.loads(json.dumps(ours.to_dict(), allow_nan=False)))
    assert theirs.to_dict() == ours.to_dict()
    for event, seconds in rest[cut:]:
        now += seconds * NS_PER_S
        assert told(theirs, event, now) == told(ours, event, now)
    assert theirs.to_dict() == ours.to_dict()


@settings(deadline=None)
@given(specs, st.lists(st.tuples(st.integers(1, 100), st.booleans()), max_size=60))
def test_silence_advances_nothing(spec: Any, looks: list[tuple[int, bool]]) -> None:
    """Without evidence a rollout stays in its step, is held, or (where that is asked for) is rolled back."""
    rollout = Rollout(spec, "ada")
    for event in (Accepted(), Loaded(), Tick({"diverge": AGREE}, 0)):
        rollout.handle(event, 0)
    now = 0
    for seconds, reached in looks:
        now += seconds * 1_000 * NS_PER_S
        rollout.handle(Tick({}, 500 if reached else 0), now)
        assert rollout.step == 0
        assert rollout.state in {State.STEP, State.HOLD, State.ROLLING_BACK}
        assert rollout.state is not State.ROLLING_BACK or spec.inconclusive_then == "rollback"


counts = st.integers(0, 10**9)


@given(counts, counts, counts, counts, st.one_of(st.none(), st.floats(0, 1)), st.floats(1, 100))
def test_increments_are_finite_for_all_counts(
    n: int, k: int, m: int, j: int, share: float | None, bound: float
) -> None:
    row = TwoArms(max(n, k), min(n, k), max(m, j), min(m, j), share)
    found = label_increments(row, bound, (0.2, 1.25, 20.0))
    assert all(map(math.isfinite, found))
    assert found[1] >= 0 or row.candidate_events * math.log(1.25) <= (
        row.candidate_events + row.stable_events
    ) * math.log(1.25)
