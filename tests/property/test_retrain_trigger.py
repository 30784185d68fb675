"""Properties of the trigger under any order of alarms, hints, clocks and people."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.retrain.rules import DAY_NS, HOUR_NS, SECOND_NS, Champion, RetrainRules, Schedule, SignalRule
from monitor.retrain.state import TriggerState
from monitor.retrain.trigger import (
    MAX_CONDITIONS,
    MAX_JOBS,
    Asked,
    Cleared,
    Delivered,
    Event,
    Fire,
    Gated,
    JobChanged,
    Observed,
    Promoted,
    Raised,
    Registered,
    Rejected,
    Suppressed,
    Tick,
    Undelivered,
    step,
)

START = 1_800_000_000 * SECOND_NS
KINDS = st.sampled_from(["drift", "labels", "calibration"])
NAMES = st.sampled_from(["a", "b"])
VERSIONS = st.sampled_from(["7", "8"])
#: "last" stands for the trigger that fired last.
TRIGGERS = st.sampled_from(["last", "unknown"])
CHAMPIONS = st.sampled_from([None, Champion("7", "d7", START - DAY_NS), Champion("8", "d8", START)])

EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.just(Tick()),
    st.builds(Observed, CHAMPIONS, st.booleans()),
    st.builds(Raised, KINDS, NAMES, VERSIONS),
    st.builds(Cleared, KINDS, NAMES, VERSIONS),
    st.just(Asked("ana", "now")),
    st.builds(Delivered, TRIGGERS, st.just("train")),
    st.builds(Undelivered, TRIGGERS, st.just("dead")),
    st.builds(Registered, TRIGGERS, VERSIONS),
    st.builds(Gated, VERSIONS, st.sampled_from([True, False, None])),
    st.builds(Promoted, VERSIONS),
    st.builds(Rejected, VERSIONS),
)
WAITS = st.sampled_from([0, 1, 30 * SECOND_NS, 60 * SECOND_NS, HOUR_NS, 6 * HOUR_NS, DAY_NS, 3 * DAY_NS])
STORIES = st.lists(st.tuples(WAITS, EVENTS), max_size=60)
RULES = st.builds(
    RetrainRules,
    st.just("m"),
    drift=st.none() | st.builds(SignalRule, at_least=st.sampled_from([1, 2]), hold_ns=st.sampled_from([0, HOUR_NS])),
    labels=st.none() | st.just(SignalRule(("a",))),
    calibration=st.none() | st.just(SignalRule()),
    age_ns=st.none() | st.just(2 * DAY_NS),
    schedule=st.none() | st.just(Schedule(DAY_NS, HOUR_NS)),
    coalesce_ns=st.sampled_from([0, 60 * SECOND_NS]),
    cooldown_ns=st.sampled_from([0, HOUR_NS, 6 * HOUR_NS]),
    budget=st.sampled_from([1, 2, 5]),
    clear_after_ns=st.sampled_from([0, 300 * SECOND_NS]),
)


class Log:
    """A story told to a trigger: (time, state after, decisions) of each step."""

    def __init__(self, rules: RetrainRules, story: list[tuple[int, Event]], *, through_json: bool = False) -> None:
        self.steps: list[tuple[int, TriggerState, tuple[object, ...]]] = []
        self.fires: list[tuple[int, Fire]] = []
        state, now, last = TriggerState(), START, "none"
        for wait, event in story:
            now += wait
            if isinstance(event, Delivered | Undelivered | Registered) and event.trigger_id == "last":
                event = type(event)(last, *[getattr(event, name) for name in event.__slots__[1:]])
            state, decisions = step(rules, state, event, now)
            if through_json:
                state = TriggerState.from_dict(json.loads(json.dumps(state.to_dict())))
            self.steps.append((now, state, decisions))
            for decision in decisions:
                if isinstance(decision, Fire):
                    self.fires.append((now, decision))
                    last = decision.trigger_id


@given(RULES, STORIES)
@settings(deadline=None)
def test_what_is_remembered_survives_the_disk(rules: RetrainRules, story: list[tuple[int, Event]]) -> None:
    assert Log(rules, story, through_json=True).steps == Log(rules, story).steps


@given(RULES, STORIES)
@settings(deadline=None)
def test_cooldown_budget_and_keys_hold(rules: RetrainRules, story: list[tuple[int, Event]]) -> None:
    log = Log(rules, story)
    keys = [fire.trigger_id for _, fire in log.fires]
    assert len(set(keys)) == len(keys)
    for index, (now, fire) in enumerate(log.fires):
        if any(reason.kind == "manual" for reason in fire.reasons):
            continue
        before = [at for at, _ in log.fires[:index]]
        assert all(now - at >= rules.cooldown_ns for at in before)
        assert sum(now - at < DAY_NS for at in before) < rules.budget
        assert fire.champion is not None


@given(RULES, STORIES)
@settings(deadline=None)
def test_nothing_is_asked_for_while_a_rollout_or_a_job_is_open(
    rules: RetrainRules, story: list[tuple[int, Event]]
) -> None:
    log = Log(rules, story)
    for (_, before, _), (_, after, decisions) in pairwise([(START, TriggerState(), ()), *log.steps]):
        fired = [one for one in decisions if isinstance(one, Fire)]
        assert len(fired) <= 1
        if fired:
            assert not after.rollout
            still = {job.trigger_id for job in after.jobs if job.open} - {fired[0].trigger_id}
            assert not still & {job.trigger_id for job in before.jobs if job.open}


@given(RULES, STORIES)
@settings(deadline=None)
def test_jobs_are_accounted_for(rules: RetrainRules, story: list[tuple[int, Event]]) -> None:
    """Every change starts where the one before ended, each fire begins a job, and the bounds hold."""
    log = Log(rules, story)
    states: dict[str, str] = {}
    for _, state, decisions in log.steps:
        for decision in decisions:
            if isinstance(decision, JobChanged):
                assert states.get(decision.job.trigger_id, "") == decision.was
                states[decision.job.trigger_id] = decision.job.state
        assert {job.trigger_id: job.state for job in state.jobs} == states
        assert len(state.jobs) <= MAX_JOBS
        assert len(state.conditions) <= MAX_CONDITIONS
    assert set(states) == {fire.trigger_id for _, fire in log.fires}


@given(RULES, STORIES)
@settings(deadline=None)
def test_reports_are_bounded(rules: RetrainRules, story: list[tuple[int, Event]]) -> None:
    log = Log(rules, story)
    told: dict[tuple[str, str], int] = {}
    for now, _, decisions in log.steps:
        for decision in decisions:
            if isinstance(decision, Suppressed) and decision.kind != "manual":
                key = (decision.kind, decision.cause)
                assert key not in told or now - told[key] >= max(rules.cooldown_ns, 60 * SECOND_NS)
                told[key] = now


@given(st.lists(st.tuples(st.integers(1, 299), st.booleans()), max_size=200))
@settings(deadline=None)
def test_a_flapping_signal_is_one_event(flaps: list[tuple[int, bool]]) -> None:
    """Whatever it does, as long as it is never away for ``clear_after``."""
    rules = RetrainRules("m", drift=SignalRule(), cooldown_ns=0, budget=1000, lost_after_ns=10**18)
    champion = Champion("7", "d7")
    story: list[tuple[int, Event]] = [(0, Observed(champion, False)), (0, Raised("drift", "a", "7"))]
    story += [(60 * SECOND_NS, Tick()), (0, Registered("last", "8")), (0, Rejected("8"))]
    for wait_s, raised in flaps:
        kind = Raised if raised else Cleared
        story += [(wait_s * SECOND_NS, kind("drift", "a", "7")), (0, Raised("drift", "a", "7"))]
    story.append((120 * SECOND_NS, Tick()))
    assert len(Log(rules, story).fires) == 1


@given(STORIES)
@settings(deadline=None)
def test_an_alarm_that_lasts_is_told_in_the_end(story: list[tuple[int, Event]]) -> None:
    """However the story went: with everything open settled, a day later the event is there."""
    rules = RetrainRules("m", drift=SignalRule(), budget=1000)
    champion = Champion("9", "d9")
    end: list[tuple[int, Event]] = [
        (0, Observed(champion, False)),
        (0, Raised("drift", "a", "9")),
        (2 * DAY_NS, Tick()),
    ]
    end += [(60 * SECOND_NS, Tick())]
    log = Log(rules, story + end)
    told = [fire for _, fire in log.fires if fire.champion == champion]
    assert len(told) == 1
    assert [reason.name for reason in told[0].reasons if reason.kind == "drift"] == ["a"]
