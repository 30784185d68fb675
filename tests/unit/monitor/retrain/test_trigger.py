"""The trigger: each kind of reason, what holds it back, one event per episode, keys, and jobs to their end."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from monitor.retrain.rules import DAY_NS, HOUR_NS, SECOND_NS, Champion, RetrainRules, Schedule, SignalRule
from monitor.retrain.state import TriggerState
from monitor.retrain.trigger import (
    MAX_CONDITIONS,
    MAX_JOBS,
    Asked,
    Cleared,
    Decision,
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
    open_job,
    step,
)

START = 1_800_000_000 * SECOND_NS
MINUTE = 60 * SECOND_NS
ANY = SignalRule()
RULES = RetrainRules("fraud", drift=ANY, labels=ANY, calibration=ANY)
SEVEN = Champion("7", "d7", created_ns=START - DAY_NS, data_until_ns=START - 2 * DAY_NS, reference="p7")
EIGHT = Champion("8", "d8", created_ns=START)


class Driver:
    """A trigger under a clock that the test moves; what is remembered goes through JSON at every step."""

    def __init__(self, rules: RetrainRules = RULES, champion: Champion | None = SEVEN) -> None:
        self.rules = rules
        self.now = START
        self.state = TriggerState()
        self.decisions: list[Decision] = []
        self.tell(Observed(champion, rollout=False))

    def tell(self, *events: Event) -> list[Decision]:
        made: list[Decision] = []
        for event in events:
            self.state, more = step(self.rules, self.state, event, self.now)
            made += more
            self.state = TriggerState.from_dict(json.loads(json.dumps(self.state.to_dict())))
        self.decisions += made
        return made

    def after(self, ns: int, *events: Event) -> list[Decision]:
        self.now += ns
        return self.tell(*events or (Tick(),))

    def drift(self, name: str = "amount", version: str = "7", **numbers: Any) -> list[Decision]:
        return self.tell(Raised("drift", name, version, numbers))

    @property
    def fires(self) -> list[Fire]:
        return [one for one in self.decisions if isinstance(one, Fire)]

    @property
    def suppressed(self) -> list[Suppressed]:
        return [one for one in self.decisions if isinstance(one, Suppressed)]

    def fired(self) -> Fire:
        """Raise drift, wait for the event."""
        self.drift(psi=0.3)
        self.after(MINUTE)
        return self.fires[-1]

    def finish(self, version: str = "8") -> None:
        """Have the open job rejected."""
        job = open_job(self.state)
        assert job is not None
        self.tell(Registered(job.trigger_id, version), Rejected(version, "no better"))


# --- reasons ---


def test_an_alarm_becomes_one_event_after_the_window() -> None:
    driver = Driver()
    assert driver.drift(psi=0.3) == []
    assert driver.after(MINUTE - 1) == []
    fire, changed = driver.after(1)
    assert isinstance(fire, Fire)
    (reason,) = fire.reasons
    assert (reason.kind, reason.name, reason.since_ns, reason.numbers) == ("drift", "amount", START, {"psi": 0.3})
    assert (fire.champion, fire.start_ns, fire.end_ns) == (SEVEN, START, driver.now)
    assert fire.rules == RULES.digest()
    assert isinstance(changed, JobChanged)
    assert (changed.job.trigger_id, changed.job.state, changed.job.of) == (fire.trigger_id, "requested", "7")


def test_reasons_of_one_window_become_one_event_that_names_all() -> None:
    driver = Driver()
    driver.drift("amount")
    driver.after(20 * SECOND_NS, Raised("labels", "auc", "7", {"value": 0.8}))
    driver.after(20 * SECOND_NS, Raised("calibration", "calibration", "7"))
    driver.after(20 * SECOND_NS)
    (fire,) = driver.fires
    assert [(one.kind, one.name) for one in fire.reasons] == [
        ("drift", "amount"),
        ("labels", "auc"),
        ("calibration", "calibration"),
    ]
    assert fire.start_ns == START


def test_a_reason_that_ends_within_the_window_is_still_told() -> None:
    driver = Driver()
    driver.drift()
    driver.after(SECOND_NS, Cleared("drift", "amount", "7"))
    driver.after(MINUTE)
    assert len(driver.fires) == 1


def test_kinds_without_a_rule_are_no_reason() -> None:
    driver = Driver(RetrainRules("fraud", labels=ANY))
    driver.drift()
    driver.after(DAY_NS)
    assert driver.decisions == []


def test_alarms_of_other_versions_wait_until_these_are_the_champion() -> None:
    driver = Driver()
    driver.drift(version="8")
    driver.after(HOUR_NS)
    assert driver.decisions == []
    driver.tell(Observed(EIGHT, rollout=False))
    driver.after(MINUTE)
    (fire,) = driver.fires
    assert fire.champion == EIGHT


def test_alarms_of_the_version_before_are_no_reason_after_a_promotion() -> None:
    driver = Driver()
    driver.drift()
    driver.after(30 * SECOND_NS, Observed(EIGHT, rollout=False))
    driver.after(HOUR_NS)
    assert driver.decisions == []


def test_only_the_names_that_count_and_only_enough_of_them() -> None:
    driver = Driver(replace(RULES, drift=SignalRule(("a", "b", "c"), at_least=2)))
    driver.drift("a")
    driver.drift("z")
    driver.after(HOUR_NS)
    assert driver.fires == []
    driver.drift("c")
    driver.after(MINUTE)
    assert [one.name for one in driver.fires[0].reasons] == ["a", "c"]


def test_an_alarm_has_to_last() -> None:
    driver = Driver(replace(RULES, drift=SignalRule(hold_ns=HOUR_NS), coalesce_ns=0))
    driver.drift()
    driver.after(HOUR_NS - 1, Cleared("drift", "amount", "7"))
    driver.after(HOUR_NS)
    driver.drift()
    driver.after(HOUR_NS - 1)
    assert driver.fires == []
    driver.after(1)
    assert len(driver.fires) == 1


def test_age_of_the_version_and_of_its_data() -> None:
    driver = Driver(RetrainRules("fraud", age_ns=10 * DAY_NS, data_age_ns=10 * DAY_NS, coalesce_ns=0))
    driver.after(8 * DAY_NS - 1)
    assert driver.fires == []
    driver.after(1)
    (reason,) = driver.fires[0].reasons
    assert (reason.kind, reason.name) == ("age", "data")
    assert reason.numbers == {"age_s": 10 * 86_400, "limit_s": 10 * 86_400}
    driver.finish()
    driver.after(10 * DAY_NS - 1)
    assert len(driver.fires) == 1
    driver.after(1)
    assert [one.name for one in driver.fires[1].reasons] == ["model", "data"]


def test_an_unknown_age_is_no_reason() -> None:
    driver = Driver(RetrainRules("fraud", age_ns=DAY_NS, data_age_ns=DAY_NS), Champion("7"))
    driver.after(100 * DAY_NS)
    assert driver.decisions == []


def test_a_schedule_fires_at_its_moments_and_not_at_the_start() -> None:
    every, offset = DAY_NS, 3 * HOUR_NS
    driver = Driver(RetrainRules("fraud", schedule=Schedule(every, offset), coalesce_ns=0))
    driver.tell(Tick())
    moment = (START - offset) // every * every + offset + every
    driver.after(moment - START - 1)
    assert driver.decisions == []
    driver.after(1)
    (fire,) = driver.fires
    assert [(one.kind, one.since_ns) for one in fire.reasons] == [("schedule", moment)]
    driver.finish()
    driver.after(3 * every)  # several moments at once are one
    assert len(driver.fires) == 2


def test_a_moment_of_the_schedule_that_is_held_back_passes() -> None:
    driver = Driver(RetrainRules("fraud", schedule=Schedule(DAY_NS), coalesce_ns=0))
    driver.tell(Observed(SEVEN, rollout=True))
    driver.after(DAY_NS)
    assert [one.cause for one in driver.suppressed] == ["rollout"]
    driver.tell(Observed(SEVEN, rollout=False))
    assert driver.fires == []
    driver.after(DAY_NS)
    assert len(driver.fires) == 1


def test_a_person_is_heard_at_once_and_takes_along_what_waits() -> None:
    driver = Driver()
    driver.drift()
    fire, _ = driver.after(SECOND_NS, Asked("ana@host", "new labels"))
    assert isinstance(fire, Fire)
    assert [(one.kind, one.name) for one in fire.reasons] == [("drift", "amount"), ("manual", "ana@host")]
    assert fire.reasons[1].numbers == {"text": "new labels"}
    assert driver.after(HOUR_NS) == []


def test_a_person_needs_no_champion_no_patience_and_no_budget() -> None:
    driver = Driver(replace(RULES, budget=1), champion=None)
    for number in range(3):
        driver.after(SECOND_NS, Asked("ana", "again"))
        driver.finish(str(number))
    assert len(driver.fires) == 3
    assert len({one.trigger_id for one in driver.fires}) == 3


# --- suppression ---


def test_a_storm_in_the_cooldown_is_one_event() -> None:
    driver = Driver()
    driver.fired()
    driver.finish()
    for number in range(300):
        driver.after(MINUTE, Raised("drift", f"f{number % 50}", "7"), Raised("labels", "auc", "7"))
    assert len(driver.fires) == 1
    assert [(one.kind, one.cause) for one in driver.suppressed] == [("drift", "cooldown"), ("labels", "cooldown")]
    driver.after(HOUR_NS)
    driver.after(MINUTE)
    assert len(driver.fires) == 2
    assert len(driver.fires[1].reasons) == 51


def test_an_alarm_that_lasts_is_told_when_nothing_holds_it_back() -> None:
    driver = Driver()
    driver.tell(Observed(SEVEN, rollout=True))
    driver.drift()
    driver.after(DAY_NS)
    assert driver.fires == []
    assert {one.cause for one in driver.suppressed} == {"rollout"}
    driver.tell(Observed(SEVEN, rollout=False))
    driver.after(MINUTE)
    assert len(driver.fires) == 1


def test_a_rollout_that_begins_within_the_window_holds_the_event_back() -> None:
    driver = Driver()
    driver.drift()
    driver.after(30 * SECOND_NS, Observed(SEVEN, rollout=True))
    driver.after(HOUR_NS)
    assert driver.fires == []
    driver.after(SECOND_NS, Observed(SEVEN, rollout=False))
    assert driver.fires == []  # a window of its own
    driver.after(MINUTE)
    assert len(driver.fires) == 1


def test_an_open_job_holds_everything_back_and_a_person_too() -> None:
    driver = Driver()
    driver.fired()
    driver.after(7 * HOUR_NS, Raised("labels", "auc", "7"))
    assert [one.cause for one in driver.suppressed] == ["job"]
    assert driver.tell(Asked("ana", "please")) == [Suppressed("manual", "job", ("ana",))]
    assert driver.tell(Asked("ana", "please!")) == [Suppressed("manual", "job", ("ana",))]
    assert len(driver.fires) == 1


def test_no_champion_is_reported_where_something_is_due() -> None:
    driver = Driver(RetrainRules("fraud", schedule=Schedule(DAY_NS), coalesce_ns=0), champion=None)
    driver.tell(Tick())
    driver.after(DAY_NS)
    assert driver.suppressed == [Suppressed("schedule", "no champion", ("time",))]


def test_the_budget_of_a_day() -> None:
    driver = Driver(replace(RULES, cooldown_ns=HOUR_NS, budget=2, clear_after_ns=0))
    for number in range(20):
        driver.drift(f"f{number}")
        driver.after(MINUTE)
        if open_job(driver.state):
            driver.finish(str(number))
        driver.after(HOUR_NS)
    assert len(driver.fires) == 2
    assert "budget" in {one.cause for one in driver.suppressed}
    driver.after(5 * HOUR_NS)
    driver.after(MINUTE)
    assert len(driver.fires) == 3


def test_suppressed_reasons_are_reported_once_per_cooldown() -> None:
    driver = Driver(replace(RULES, cooldown_ns=HOUR_NS))
    driver.tell(Observed(SEVEN, rollout=True))
    driver.drift()
    for _ in range(150):
        driver.after(MINUTE)
    assert len(driver.suppressed) == 3


# --- episodes ---


def test_an_alarm_is_told_of_once_however_long_it_lasts() -> None:
    driver = Driver()
    driver.fired()
    driver.finish()
    for _ in range(10):
        driver.after(DAY_NS, Raised("drift", "amount", "7"))
    assert len(driver.fires) == 1


def test_a_flapping_alarm_is_one_episode() -> None:
    driver = Driver()
    driver.fired()
    driver.finish()
    for _ in range(500):
        driver.after(MINUTE, Cleared("drift", "amount", "7"))
        driver.after(MINUTE, Raised("drift", "amount", "7"))
    assert len(driver.fires) == 1


@pytest.mark.parametrize("looked_between", [True, False])
def test_an_alarm_that_comes_back_later_is_another_episode(looked_between: bool) -> None:
    driver = Driver()
    driver.fired()
    driver.finish()
    driver.tell(Cleared("drift", "amount", "7"))
    driver.now += DAY_NS
    if looked_between:
        driver.tell(Tick())
    driver.drift()
    driver.after(MINUTE)
    assert [fire.reasons[0].since_ns for fire in driver.fires] == [START, START + MINUTE + DAY_NS]


# --- keys ---


def test_gateways_that_see_the_same_ask_for_the_same() -> None:
    first, second = Driver(), Driver()
    second.now += 10 * MINUTE
    assert first.fired().trigger_id == second.fired().trigger_id
    assert len(first.fires[0].trigger_id) == 32


@pytest.mark.parametrize(
    ("rules", "champion", "later"),
    [
        (replace(RULES, model="other"), SEVEN, 0),
        (replace(RULES, budget=4), SEVEN, 0),
        (RULES, Champion("7", "another"), 0),
        (RULES, SEVEN, 6 * HOUR_NS),
    ],
)
def test_another_model_rule_champion_or_window_is_another_key(
    rules: RetrainRules, champion: Champion, later: int
) -> None:
    known, other = Driver(), Driver(rules, champion)
    other.now += later
    assert known.fired().trigger_id != other.fired().trigger_id


# --- jobs ---


def test_a_job_on_its_way() -> None:
    driver = Driver()
    trigger_id = driver.fired().trigger_id
    told: list[Event] = [Delivered(trigger_id, "train"), Registered(trigger_id, "8"), Gated("8", True), Promoted("8")]
    for event in told:
        driver.after(MINUTE, event)
    changes = [one for one in driver.decisions if isinstance(one, JobChanged)]
    assert [(one.was, one.job.state) for one in changes] == [
        ("", "requested"),
        ("requested", "accepted"),
        ("accepted", "registered"),
        ("registered", "gated"),
        ("gated", "promoted"),
    ]
    assert changes[1].job.detail == "train"
    assert changes[-1].job.version == "8"
    assert open_job(driver.state) is None


def test_a_lost_job_gives_its_reasons_back_within_the_budget() -> None:
    driver = Driver()
    driver.fired()
    for _ in range(10):
        driver.after(DAY_NS)
        driver.after(MINUTE)
    assert 5 <= len(driver.fires) <= 11
    assert len({one.trigger_id for one in driver.fires}) == len(driver.fires)
    assert {job.state for job in driver.state.jobs[:-1]} == {"lost"}


def test_an_event_that_no_sink_took_is_a_lost_job() -> None:
    driver = Driver()
    fire = driver.fired()
    changed, held_back = driver.after(HOUR_NS, Undelivered(fire.trigger_id, "dead"))
    assert isinstance(changed, JobChanged)
    assert held_back == Suppressed("drift", "cooldown", ("amount",))
    assert (changed.job.state, changed.job.detail) == ("lost", "dead")


def test_age_that_led_to_a_lost_job_is_a_reason_again() -> None:
    driver = Driver(RetrainRules("fraud", age_ns=DAY_NS, coalesce_ns=0, cooldown_ns=0, lost_after_ns=HOUR_NS))
    driver.tell(Tick())
    assert len(driver.fires) == 1
    driver.after(HOUR_NS)
    assert len(driver.fires) == 2


def test_hints_about_what_nobody_knows_change_nothing() -> None:
    driver = Driver()
    before = driver.state
    told: list[Event] = [Delivered("x", "s"), Undelivered("x", ""), Registered("x", "9"), Gated("9", True)]
    assert driver.tell(*told, Promoted("9"), Rejected("9", "")) == []
    assert driver.state == before


# --- bounds and clocks ---


def test_a_clock_that_was_set_back_freezes_nothing() -> None:
    driver = Driver()
    driver.now += 10 * 365 * DAY_NS
    driver.fired()
    driver.finish()
    driver.now = START
    driver.tell(Raised("labels", "auc", "7"))
    driver.after(6 * HOUR_NS)
    driver.after(MINUTE)
    assert len(driver.fires) == 2
    assert driver.fires[0].trigger_id != driver.fires[1].trigger_id


def test_alarms_are_bounded_and_what_finds_no_place_is_counted() -> None:
    driver = Driver()
    for number in range(MAX_CONDITIONS):
        driver.state, _ = step(RULES, driver.state, Raised("drift", f"f{number}", "6"), START)
    driver.drift("one more")
    assert len(driver.state.conditions) == MAX_CONDITIONS
    assert [one.name for one in driver.state.conditions if one.version == "7"] == ["one more"]
    for number in range(MAX_CONDITIONS + 5):
        driver.state, _ = step(RULES, driver.state, Raised("drift", f"f{number}", "7"), START)
    assert len(driver.state.conditions) == MAX_CONDITIONS
    assert driver.state.dropped == 6


def test_jobs_are_bounded_and_the_oldest_that_ended_goes() -> None:
    driver = Driver()
    for number in range(MAX_JOBS + 10):
        driver.after(SECOND_NS, Asked("ana", str(number)))
        driver.finish(str(number))
    assert len(driver.state.jobs) == MAX_JOBS
    assert driver.state.jobs[-1].version == str(MAX_JOBS + 9)
