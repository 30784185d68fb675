"""The shell of triggers over a real store: one transaction, the event, jobs to their end, trouble with the disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from monitor.retrain.rules import DAY_NS, HOUR_NS, SECOND_NS, Champion, RetrainRules, SignalRule
from router.registry.manifest import Lineage
from server.audit import AuditLog, Verified
from server.delivery.base import Delivered, Outcome, Refused
from server.delivery.dispatcher import Dispatcher
from server.errors import FailedPrecondition, InvalidArgument, NotFound
from server.outbox import Event, Limits, Message, Outbox, OutboxFull
from server.retraining import EVENT_TYPE, MAX_QUEUED, Facts, Retraining, RetrainSpec, retry_refusal
from server.store.base import StoreError
from server.store.sqlite import SqliteStore

START = 1_800_000_000 * SECOND_NS
RULES = RetrainRules("fraud", drift=SignalRule(), labels=SignalRule(), calibration=SignalRule())
SEVEN = Champion("7", "d7", START - DAY_NS, START - 2 * DAY_NS, "p7", {"holdout/auc": 0.9})
DRIFT = {
    "event": "drift.raised",
    "key": "k",
    "model": "fraud",
    "version": "7",
    "profile": "p7",
    "arm": "stable",
    "segment": "",
    "feature": "amount",
    "window": "1h",
    "psi": 0.31,
    "ks": float("nan"),
    "start_ns": 5,
}


class House:
    """A store with everything on it, and a clock."""

    def __init__(self, store: SqliteStore, **limits: int) -> None:
        self.store = store
        self.now = START
        self.facts = {"fraud": Facts(SEVEN, capture=("/data/fraud/*.parquet",))}
        self.audit = AuditLog(store)
        self.outbox = Outbox(store, self.audit, limits=Limits(**limits), clock=lambda: self.now)
        self.retraining = self.another()

    def another(self) -> Retraining:
        """As after a restart, or in another process."""
        specs = {
            "fraud": RetrainSpec(RULES, ("train", "log")),
            "spam": RetrainSpec(replace(RULES, model="spam"), ("log",)),
        }
        ask = lambda model: self.facts.get(model, Facts())  # noqa: E731
        return Retraining(self.store, self.audit, self.outbox, specs, ask, clock=lambda: self.now)

    def after(self, ns: int) -> None:
        self.now += ns
        self.retraining.tick()

    def drifted(self) -> str:
        """Have drift lead to an event; the trigger's id."""
        self.retraining.on_alarm(DRIFT)
        self.after(0)
        self.after(60 * SECOND_NS)
        (job,) = self.retraining.list("fraud")[:1]
        return str(job["trigger_id"])

    def jobs(self) -> list[tuple[str, str]]:
        return [(job["state"], job["version"]) for job in self.retraining.list()]

    def actions(self) -> list[str]:
        return [row.event.action for row in self.audit.tail(100) if row.event.action.startswith("retrain")]

    def event(self, sink: str = "train") -> Any:
        lease = self.outbox.claim(sink, "me", 30, max_attempts=9)
        assert lease is not None
        return json.loads(lease.message.body)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with closing(SqliteStore(tmp_path / "tidegate.db")) as store:
        yield store


@pytest.fixture
def house(store: SqliteStore) -> House:
    return House(store)


# --- the event ---


def test_drift_becomes_an_event_with_everything_a_trainer_needs(house: House) -> None:
    trigger_id = house.drifted()
    event = house.event()
    assert event["type"] == EVENT_TYPE
    assert (event["id"], event["idempotencykey"]) == (trigger_id, trigger_id)
    assert (event["source"], event["subject"]) == ("/models/fraud", "fraud:7")
    data = event["data"]
    (reason,) = data.pop("reasons")
    assert reason == {
        "kind": "drift",
        "name": "amount",
        "since": "2027-01-15T08:00:00Z",
        "numbers": {"window": "1h", "psi": 0.31, "ks": None, "start_ns": 5},
    }
    assert data == {
        "trigger_id": trigger_id,
        "model": "fraud",
        "more_reasons": 0,
        "window": {"start": "2027-01-15T08:00:00Z", "end": "2027-01-15T08:01:00Z"},
        "reference": "p7",
        "champion": {
            "version": "7",
            "digest": "d7",
            "created": "2027-01-14T08:00:00Z",
            "metrics": {"holdout/auc": 0.9},
        },
        "capture": {
            "paths": ["/data/fraud/*.parquet"],
            "start": "2027-01-13T08:00:00Z",
            "end": "2027-01-15T08:01:00Z",
        },
        "rules": RULES.digest(),
    }
    assert {one.sink for one in house.outbox.list(10)} == {"train", "log"}


def test_the_audit_says_why(house: House) -> None:
    trigger_id = house.drifted()
    (row,) = [row for row in house.audit.tail(10) if row.event.action == "retrain.requested"]
    assert (row.event.actor, row.event.subject) == ("tidegate", "fraud:7")
    assert row.event.detail["trigger_id"] == trigger_id
    assert isinstance(house.audit.verify(), Verified)


def test_many_wordy_reasons_fit_into_an_event(house: House) -> None:
    for number in range(200):
        alarm = {**DRIFT, "feature": f"{number}-" + '"\u0416' * 100, "leading_bin": '"\n' * 500}
        house.retraining.on_alarm(alarm)
    house.after(0)
    house.after(60 * SECOND_NS)
    data = house.event()["data"]
    assert data["reasons"]
    assert len(data["reasons"]) + data["more_reasons"] == 200


def test_a_first_training_knows_no_champion(house: House) -> None:
    house.retraining.fire("spam", actor="ana", reason="the first one")
    event = house.event("log")
    assert event["subject"] == "spam"
    assert (event["data"]["champion"], event["data"]["capture"]) == (None, None)


# --- alarms ---


@pytest.mark.parametrize(
    "other",
    [
        {"arm": "canary"},
        {"event": "quality.raised"},
        {"model": "unknown"},
        {"version": "6"},
        {"event": "drift.cleared"},
    ],
)
def test_alarms_that_are_no_reason(house: House, other: dict[str, str]) -> None:
    house.retraining.on_alarm({**DRIFT, **other})
    house.after(0)
    house.after(HOUR_NS)
    assert house.jobs() == []


def test_alarms_of_labels_and_of_segments(house: House) -> None:
    label = {"model": "fraud", "version": "7", "arm": "stable", "slice": "EWR", "name": "auc", "value": 0.8, "key": "k"}
    house.retraining.on_alarm({**label, "event": "performance.raised"})
    house.retraining.on_alarm({**label, "event": "calibration.raised", "slice": "", "name": "bias"})
    house.retraining.on_alarm({**DRIFT, "segment": "JFK"})
    house.after(0)
    house.after(60 * SECOND_NS)
    told = [(one["kind"], one["name"], one["numbers"].get("value")) for one in house.event()["data"]["reasons"]]
    assert told == [("drift", "amount[JFK]", None), ("labels", "auc[EWR]", 0.8), ("calibration", "bias", 0.8)]


def test_what_was_missed_is_made_good(house: House) -> None:
    house.retraining.sync("fraud", "drift", "7", {"amount": {"psi": 0.3}, "hour": {}})
    house.retraining.sync("fraud", "drift", "7", {"amount": {"psi": 0.4}})
    alarms = {one["name"]: one["cleared"] for one in house.retraining.status("fraud")["alarms"]}
    assert alarms == {"amount": None, "hour": "2027-01-15T08:00:00Z"}
    house.retraining.sync("nobody", "drift", "7", {"amount": {}})


def test_the_queue_of_alarms_is_bounded_and_what_is_lost_is_counted(house: House) -> None:
    for _ in range(MAX_QUEUED + 3):
        house.retraining.on_alarm(DRIFT)
    lost = {family.name: family.points for family in house.retraining.families()}["tidegate_retrain_alarms_lost_total"]
    assert lost == {(): 3}


# --- jobs ---


def test_a_job_to_its_end(house: House) -> None:
    trigger_id = house.drifted()
    lease = house.outbox.claim("train", "me", 30, max_attempts=9)
    assert lease is not None
    house.outbox.delivered(lease)
    house.after(SECOND_NS)
    assert house.jobs() == [("accepted", "")]
    told = house.retraining
    assert told.version_registered("fraud", "8", Lineage(trigger_id=trigger_id))
    assert told.gate("fraud", "8", None, "no labels yet")
    assert told.gate("fraud", "8", True, "5 of 5 rules")
    assert told.promoted("fraud", "8")
    assert house.jobs() == [("promoted", "8")]
    assert told.rejected("fraud", "8", "rolled back: latency")
    assert house.actions() == [
        "retrain.requested",
        "retrain.accepted",
        "retrain.registered",
        "retrain.registered",
        "retrain.gated",
        "retrain.promoted",
        "retrain.rejected",
    ]
    states = {family.name: family.points for family in told.families()}["tidegate_retrain_events_total"]
    assert states[("requested",)] == states[("promoted",)] == 1


def test_what_is_nobodys_job_changes_nothing(house: House) -> None:
    told = house.retraining
    assert not told.version_registered("fraud", "8", Lineage())
    assert not told.version_registered("fraud", "8", Lineage(trigger_id="x"))
    assert not told.gate("fraud", "8", True)
    assert not told.promoted("nobody", "8")
    assert house.actions() == []


def test_an_event_that_every_sink_gave_up_is_a_lost_job(house: House) -> None:
    house.drifted()
    for sink in ("train", "log"):
        lease = house.outbox.claim(sink, "me", 30, max_attempts=9)
        assert lease is not None
        assert house.outbox.dead(lease, "exit code 1")
    house.after(SECOND_NS)
    (job,) = house.retraining.list()
    assert job["state"] == "lost"
    assert "exit code 1" in job["detail"]


def test_a_lost_job_whose_event_a_person_has_tried_again_is_a_job_again(house: House) -> None:
    """No second training is asked for while the first is on its way after all; and given up again it is lost again."""
    trigger_id = house.drifted()
    for outcome, state in (("dead", "lost"), ("dead", "lost"), ("delivered", "accepted")):
        for sink in ("train", "log"):
            lease = house.outbox.claim(sink, "me", 30, max_attempts=9)
            assert lease is not None
            if outcome == "dead":
                house.outbox.dead(lease, "exit code 1")
            else:
                house.outbox.delivered(lease)
        house.after(SECOND_NS)
        assert house.jobs() == [(state, "")]
        house.after(SECOND_NS)
        assert house.jobs() == [(state, "")]
        if state == "lost":
            house.outbox.retry(trigger_id, actor="ana")
            house.after(SECOND_NS)
            assert house.jobs() == [("requested", "")]
            house.after(RULES.cooldown_ns)
            assert house.jobs() == [("requested", "")]
    house.after(RULES.cooldown_ns)
    assert house.jobs() == [("accepted", "")]


def given_up(house: House) -> None:
    """No sink takes what waits."""
    for sink in ("train", "log"):
        while (lease := house.outbox.claim(sink, "me", 30, max_attempts=9)) is not None:
            house.outbox.dead(lease, "exit code 1")
    house.after(SECOND_NS)
    house.now += 1


def two_lost(house: House) -> tuple[str, str]:
    """Of one model: the older job, the newer one."""
    found = []
    for text in ("once", "twice"):
        found.append(str(house.retraining.fire("fraud", actor="ana", reason=text)["trigger_id"]))
        given_up(house)
    assert house.jobs() == [("lost", ""), ("lost", "")]
    return found[0], found[1]


def test_a_lost_job_is_not_tried_again_beside_an_open_one(house: House) -> None:
    """Two trainings of one model at once were asked for by nobody. Once the open one has ended, it is possible."""
    house.retraining.fire("fraud", actor="ana", reason="first")
    given_up(house)
    (lost,) = house.retraining.list("fraud")
    other = house.retraining.fire("fraud", actor="bob", reason="second")
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match=f"'fraud' is asked for already: job {other['trigger_id']} is req"):
            house.outbox.retry(lost["trigger_id"], actor="ana", refusal=retry_refusal)
        assert house.outbox.retry(None, actor="ana", refusal=retry_refusal) == 0
        house.after(SECOND_NS)
        assert house.jobs() == [("requested", ""), ("lost", "")]
    given_up(house)
    assert house.outbox.retry(lost["trigger_id"], actor="ana", refusal=retry_refusal) == 2
    house.after(SECOND_NS)
    assert house.jobs() == [("lost", ""), ("requested", "")]


def test_of_two_lost_jobs_one_is_tried_again(house: House) -> None:
    older, newer = two_lost(house)
    assert house.outbox.retry(None, actor="ana", refusal=retry_refusal) == 2
    with pytest.raises(FailedPrecondition, match=f"job {newer} is being tried again"):
        house.outbox.retry(older, actor="ana", refusal=retry_refusal)
    house.after(SECOND_NS)
    assert house.jobs() == [("requested", ""), ("lost", "")]


def test_who_asks_right_after_a_retry_meets_the_job_that_is_open_again(house: House) -> None:
    """Before any tick has seen the retry."""
    older, _ = two_lost(house)
    house.outbox.retry(older, actor="ana", refusal=retry_refusal)
    with pytest.raises(FailedPrecondition, match=f"its job {older} is requested"):
        house.retraining.fire("fraud", actor="bob", reason="third")
    assert house.jobs() == [("lost", ""), ("requested", "")]


def test_a_retry_that_nobody_refused_waits_for_the_open_job(house: House) -> None:
    """Never two open jobs, however the event came to be tried again: the lost one is a job again after the other."""
    older, newer = two_lost(house)
    for trigger_id in (newer, older):
        house.outbox.retry(trigger_id, actor="ana")
        house.after(SECOND_NS)
    assert house.jobs() == [("requested", ""), ("lost", "")]
    assert house.retraining.version_registered("fraud", "8", Lineage(trigger_id=newer))
    assert house.retraining.rejected("fraud", "8", "worse")
    house.after(SECOND_NS)
    assert house.jobs() == [("rejected", "8"), ("requested", "")]


def test_an_event_that_is_no_training_is_tried_again(house: House) -> None:
    house.retraining.fire("fraud", actor="ana", reason="open")
    alarm = Event("io.tidegate.alert.drift.raised", "/models/fraud", "fraud:7", "k")
    house.outbox.publish(alarm, ["log"])
    with house.store.reading() as connection:
        assert retry_refusal(connection, alarm.id) == ""


def test_a_sink_that_took_it_is_enough(house: House) -> None:
    house.drifted()
    lease = house.outbox.claim("train", "me", 30, max_attempts=9)
    assert lease is not None
    house.outbox.dead(lease, "exit code 1")
    house.after(SECOND_NS)
    assert house.jobs() == [("requested", "")]


def test_delivery_by_a_dispatcher_is_noticed(house: House) -> None:
    class Sink:
        timeout_s = 1.0

        def __init__(self, name: str, outcome: Outcome) -> None:
            self.name, self.outcome, self.done = name, outcome, threading.Event()

        def send(self, _: Message) -> Outcome:
            self.done.set()
            return self.outcome

    sinks = Sink("train", Delivered()), Sink("log", Refused("never"))
    dispatcher = Dispatcher(house.outbox, sinks, poll_s=0.01)
    house.drifted()
    dispatcher.start()
    assert all(sink.done.wait(10) for sink in sinks)
    assert dispatcher.stop()
    house.after(SECOND_NS)
    assert house.jobs() == [("accepted", "")]


# --- people ---


def test_a_person_asks(house: House) -> None:
    job = house.retraining.fire("fraud", actor="ana@host", reason="new labels")
    assert (job["state"], job["kinds"], job["champion"]) == ("requested", ["manual"], "7")
    assert house.audit.tail(1)[0].event.actor == "ana@host"
    with pytest.raises(FailedPrecondition, match=job["trigger_id"]):
        house.retraining.fire("fraud", actor="bob", reason="me too")
    assert house.actions() == ["retrain.requested", "retrain.suppressed"]


def test_a_person_does_not_disturb_a_rollout(house: House) -> None:
    house.facts["fraud"] = Facts(SEVEN, rollout=True)
    with pytest.raises(FailedPrecondition, match="rollout"):
        house.retraining.fire("fraud", actor="ana", reason="now")


def test_a_person_asks_for_the_impossible(house: House) -> None:
    with pytest.raises(NotFound, match="no retraining"):
        house.retraining.fire("nobody", actor="ana", reason="now")
    for text in ("", " ", "x" * 501):
        with pytest.raises(InvalidArgument, match="reason"):
            house.retraining.fire("fraud", actor="ana", reason=text)
    with pytest.raises(NotFound):
        house.retraining.status("nobody")


# --- one transaction ---


def test_a_full_outbox_undoes_all_of_it_and_the_next_tick_tries_again(store: SqliteStore) -> None:
    house = House(store, max_pending=1)
    house.retraining.fire("spam", actor="ana", reason="fills the outbox")
    with capture_logs() as logs:
        house.retraining.on_alarm(DRIFT)
        for _ in range(3):
            house.after(60 * SECOND_NS)
    assert [entry["event"] for entry in logs].count("retrain_not_requested") == 1
    assert house.retraining.list("fraud") == []
    with pytest.raises(OutboxFull):
        house.retraining.fire("fraud", actor="ana", reason="no room")
    assert house.actions() == ["retrain.requested"]
    lease = house.outbox.claim("log", "me", 30, max_attempts=9)
    assert lease is not None
    house.outbox.delivered(lease)
    house.after(SECOND_NS)
    assert [job["state"] for job in house.retraining.list("fraud")] == ["requested"]


def test_a_full_outbox_is_said_again_after_an_end(store: SqliteStore) -> None:
    """While a rollout is open nothing is to be asked for, so nothing waits for room."""
    house = House(store, max_pending=1)
    house.retraining.fire("spam", actor="ana", reason="fills the outbox")
    house.retraining.on_alarm(DRIFT)

    def said(*, rollout: bool) -> list[str]:
        house.facts["fraud"] = Facts(SEVEN, rollout=rollout)
        with capture_logs() as logs:
            for _ in range(3):
                house.after(RULES.coalesce_ns)
        return [entry["model"] for entry in logs if entry["event"] == "retrain_not_requested"]

    assert said(rollout=False) == ["fraud"]
    assert said(rollout=False) == []
    assert said(rollout=True) == []
    assert said(rollout=False) == ["fraud"]


def test_a_store_that_fails_loses_no_alarm(house: House) -> None:
    def rename(old: str, new: str) -> None:
        with house.store.transaction() as connection:
            connection.execute(f"ALTER TABLE {old} RENAME TO {new}")

    house.retraining.on_alarm(DRIFT)
    rename("retrain_trigger", "elsewhere")
    for _ in range(2):
        with pytest.raises(StoreError):
            house.after(0)
    rename("elsewhere", "retrain_trigger")
    house.after(0)
    house.after(60 * SECOND_NS)
    assert house.jobs() == [("requested", "")]


def test_a_tick_that_changes_nothing_writes_nothing(house: House) -> None:
    house.after(0)
    with house.store.reading() as connection:
        before = connection.execute("SELECT model, updated_ns FROM retrain_trigger").fetchall()
    for _ in range(3):
        house.after(SECOND_NS)
    with house.store.reading() as connection:
        assert connection.execute("SELECT model, updated_ns FROM retrain_trigger").fetchall() == before


def test_another_process_goes_on_where_this_one_was(house: House) -> None:
    house.retraining.on_alarm(DRIFT)
    house.after(0)
    house.retraining = house.another()
    house.after(60 * SECOND_NS)
    trigger_id = house.retraining.list()[0]["trigger_id"]
    house.retraining = house.another()
    assert house.retraining.version_registered("fraud", "8", Lineage(trigger_id=trigger_id))
    assert house.jobs() == [("registered", "8")]


def test_processes_that_share_a_store_ask_once(house: House) -> None:
    gateways = [house.another() for _ in range(6)]
    for gateway in gateways:
        gateway.on_alarm(DRIFT)
        gateway.tick()
    house.now += 60 * SECOND_NS
    barrier = threading.Barrier(len(gateways))

    def tick(gateway: Retraining) -> None:
        barrier.wait()
        gateway.tick()

    threads = [threading.Thread(target=tick, args=(gateway,)) for gateway in gateways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(house.outbox.list(100)) == 2  # one event, two sinks
    assert house.actions() == ["retrain.requested"]


def test_a_damaged_state_is_logged_and_begun_anew(house: House) -> None:
    house.drifted()
    with house.store.transaction() as connection:
        connection.execute("UPDATE retrain_trigger SET state = '{'")
    with capture_logs() as logs:
        house.after(SECOND_NS)
    assert logs[0]["event"] == "retrain_state_damaged"
    assert house.jobs() == []


def test_a_reload_replaces_what_the_configuration_says(house: House) -> None:
    house.retraining.on_alarm(DRIFT)
    house.retraining.specs = {}
    house.after(0)
    house.after(HOUR_NS)
    assert house.retraining.list() == []
