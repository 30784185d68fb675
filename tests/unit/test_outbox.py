"""The outbox: events in, leases out, bounds, and what the audit says of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.audit import AuditLog, Verified
from server.errors import InvalidArgument, NotFound
from server.outbox import HORIZON_S, MAX_EVENT_BYTES, Delivery, Event, Lease, Limits, Outbox, OutboxFull
from server.store.base import StoreError
from server.store.schema import MIGRATIONS
from server.store.sqlite import SqliteStore, get_meta, put_meta

NS = 1_000_000_000
DAY = 24 * 3600


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000 * NS

    def __call__(self) -> int:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += int(seconds * NS)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with closing(SqliteStore(tmp_path / "tidegate.db")) as store:
        yield store


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outbox(store: SqliteStore, clock: Clock) -> Outbox:
    return make(store, clock)


def make(store: SqliteStore, clock: Clock, *sinks: str, **limits: float) -> Outbox:
    return Outbox(store, AuditLog(store), sinks=sinks or ("ops",), limits=Limits(**limits), clock=clock)


def event(key: str = "k", **data: object) -> Event:
    return Event("io.tidegate.alert.drift.raised", "/models/fraud", "fraud:7", key, data)


def claim(outbox: Outbox, sink: str = "ops", owner: str = "me", attempts: int = 3) -> Lease | None:
    return outbox.claim(sink, owner, 30.0, max_attempts=attempts)


def claimed(outbox: Outbox, sink: str = "ops", owner: str = "me") -> Lease:
    lease = claim(outbox, sink, owner)
    assert lease is not None
    return lease


def only(outbox: Outbox) -> Delivery:
    (delivery,) = outbox.list(10)
    return delivery


def actions(store: SqliteStore) -> list[str]:
    return [row.event.action for row in AuditLog(store).tail(100)]


# --- events ---


def test_an_event_is_a_cloud_event() -> None:
    made = replace(event("k1", psi=0.3), extensions={"triggerid": "t-1"}, id="e1", time="2026-01-02T03:04:05Z")
    assert json.loads(made.body()) == {
        "specversion": "1.0",
        "id": "e1",
        "source": "/models/fraud",
        "type": "io.tidegate.alert.drift.raised",
        "subject": "fraud:7",
        "time": "2026-01-02T03:04:05Z",
        "datacontenttype": "application/json",
        "idempotencykey": "k1",
        "triggerid": "t-1",
        "data": {"psi": 0.3},
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": ""},
        {"type": "No Spaces"},
        {"type": "a..b"},
        {"type": "a" * 256},
        {"key": ""},
        {"key": "a b"},
        {"key": "ключ"},
        {"key": "k" * 256},
        {"key": "k\r\nx: y"},
        {"id": "a.b"},
        {"id": ""},
        {"source": ""},
        {"subject": "a\nb"},
        {"subject": "\ud800"},
        {"subject": 7},
        {"time": "yesterday"},
        {"time": "2026-01-02T03:04:05"},
        {"extensions": {"Big": "x"}},
        {"extensions": {"id": "x"}},
        {"extensions": {"a": ""}},
        {"extensions": {"a": 1}},
    ],
)
def test_what_no_cloud_event_can_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="event"):
        replace(event(), **wrong)


@pytest.mark.parametrize("data", [{"a": math.nan}, {"a": object()}, {"a": {1, 2}}, {"a": "\ud800"}, {"a": b"x"}])
def test_data_that_is_no_json_is_refused_and_nothing_is_written(outbox: Outbox, data: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match="no JSON"):
        outbox.publish(event(**data))
    assert outbox.list(10) == []


def test_an_event_has_a_largest_size(outbox: Outbox) -> None:
    room = MAX_EVENT_BYTES - len(event(text="").body())
    assert outbox.publish(event("fits", text="x" * (room - len("fits") + 1)))
    with pytest.raises(InvalidArgument, match="more than the 65536"):
        outbox.publish(event("over", text="x" * room + "xx"))


def test_data_that_holds_itself_is_refused(outbox: Outbox) -> None:
    data: dict[str, object] = {}
    data["self"] = data
    with pytest.raises(InvalidArgument):
        outbox.publish(event(**data))


# --- writing ---


def test_an_event_is_written_with_what_it_tells_of_or_not_at_all(store: SqliteStore, outbox: Outbox) -> None:
    with suppress(KeyError), store.transaction() as connection:
        put_meta(connection, "rollout", "promoted")
        outbox.put(connection, event())
        raise KeyError
    assert outbox.list(10) == []
    with store.transaction() as connection:
        put_meta(connection, "rollout", "promoted")
        assert outbox.put(connection, event())
    with store.reading() as connection:
        assert get_meta(connection, "rollout") == "promoted"
    assert only(outbox).state == "pending"


def test_a_known_key_is_written_once_and_stays_what_it_was(outbox: Outbox) -> None:
    first = event("same", psi=1)
    assert outbox.publish(first) is True
    assert outbox.publish(event("same", psi=2)) is False
    assert only(outbox).event_id == first.id
    assert claimed(outbox).message.body == first.body().encode()


def test_an_event_goes_to_the_sinks_it_names_else_to_all(store: SqliteStore, clock: Clock) -> None:
    outbox = make(store, clock, "ops", "log")
    outbox.publish(event("a"))
    outbox.publish(event("b"), sinks=["train", "train"])
    assert [(d.key, d.sink) for d in outbox.list(10)] == [("b", "train"), ("a", "log"), ("a", "ops")]


def test_an_event_for_nobody_is_refused(store: SqliteStore) -> None:
    with pytest.raises(InvalidArgument, match="names no sink"):
        Outbox(store, AuditLog(store)).publish(event())


def test_a_full_outbox_refuses_counts_and_leaves_the_transaction_usable(store: SqliteStore, clock: Clock) -> None:
    outbox = make(store, clock, "ops", "log", max_pending=2)
    outbox.publish(event("a"))
    outbox.publish(event("b"))
    with store.transaction() as connection:
        put_meta(connection, "kept", "yes")
        with pytest.raises(OutboxFull, match="2 events wait"):
            outbox.put(connection, event("c"))
        assert outbox.put(connection, event("a")) is False  # what is known is no news, full or not
    with store.reading() as connection:
        assert get_meta(connection, "kept") == "yes"
    assert outbox.refused == 1
    for sink in ("ops", "log"):
        outbox.delivered(claimed(outbox, sink))
    assert outbox.publish(event("c"))


def test_watchers_hear_of_new_events_only(outbox: Outbox) -> None:
    heard: list[str] = []
    leave = outbox.watch(lambda: heard.append("put"))
    outbox.publish(event("a"))
    outbox.publish(event("a"))
    assert heard == ["put"]
    leave()
    outbox.publish(event("b"))
    assert heard == ["put"]


def test_an_event_never_changes(store: SqliteStore, outbox: Outbox) -> None:
    outbox.publish(event())
    with pytest.raises(StoreError, match="never changed"), store.transaction() as connection:
        connection.execute("UPDATE outbox_event SET body = '{}'")
    outbox.delivered(claimed(outbox))
    with pytest.raises(StoreError, match="stays delivered"), store.transaction() as connection:
        connection.execute("UPDATE outbox_delivery SET state = 'pending', settled_ns = NULL")


# --- leases ---


def test_a_lease_is_one_owners_until_it_ends(outbox: Outbox, clock: Clock) -> None:
    outbox.publish(event())
    first = claimed(outbox)
    assert (first.attempts, first.until_ns) == (1, clock.now + 30 * NS)
    assert claim(outbox, owner="other") is None
    assert outbox.next_due_s("ops") == 30.0
    clock.pass_s(30)
    second = claimed(outbox, owner="other")
    assert (second.owner, second.attempts, second.message) == ("other", 2, first.message)


def test_deliveries_are_claimed_in_the_order_they_are_due(outbox: Outbox, clock: Clock) -> None:
    for key in "abc":
        outbox.publish(event(key))
        clock.pass_s(1)
    assert [claimed(outbox).message.key for _ in "abc"] == ["a", "b", "c"]
    assert claim(outbox) is None


def test_a_failure_is_due_again_after_its_delay(outbox: Outbox, clock: Clock) -> None:
    outbox.publish(event())
    outbox.failed(claimed(outbox), "answered 500\nwith more", 10.0)
    assert only(outbox).error == "answered 500 with more"
    assert claim(outbox) is None
    assert outbox.next_due_s("ops") == 10.0
    clock.pass_s(10)
    assert outbox.next_due_s("ops") == 0.0
    assert claimed(outbox).attempts == 2


def test_only_the_holder_of_a_lease_tells_of_failure(outbox: Outbox, clock: Clock) -> None:
    outbox.publish(event())
    lost = claimed(outbox)
    clock.pass_s(31)
    held = claimed(outbox, owner="other")
    outbox.failed(lost, "late", 1000.0)
    assert outbox.dead(lost, "late") is False
    assert only(outbox).state == "leased"
    assert outbox.dead(held, "in time") is True
    assert only(outbox).state == "dead"


def test_success_counts_whoever_holds_the_lease(outbox: Outbox, clock: Clock) -> None:
    outbox.publish(event())
    lost = claimed(outbox)
    clock.pass_s(31)
    held = claimed(outbox, owner="other")
    outbox.delivered(lost)
    outbox.failed(held, "a duplicate was refused", 0.0)
    outbox.delivered(held)
    assert only(outbox).state == "delivered"
    assert only(outbox).error == ""
    assert claim(outbox) is None


def test_the_leases_of_one_that_died_are_due_at_once_and_counted(outbox: Outbox, clock: Clock) -> None:
    for key in ("a", "b", "c"):
        outbox.publish(event(key))
    lost, kept = claimed(outbox, owner="one that died"), claimed(outbox, owner="one that lives")
    assert sorted(outbox.lease_owners()) == ["one that died", "one that lives"]
    outbox.end_leases("one that died")
    assert outbox.lease_owners() == ["one that lives"]
    outbox.failed(lost, "too late to say", 60.0)
    again = [claimed(outbox), claimed(outbox)]
    assert {lease.message.key: lease.attempts for lease in again} == {lost.message.key: 2, "c": 1}
    assert claim(outbox) is None
    outbox.delivered(kept)


def test_an_event_that_kills_its_senders_comes_to_its_end(store: SqliteStore, outbox: Outbox, clock: Clock) -> None:
    outbox.publish(event("poison"))
    outbox.publish(event("good"))
    assert claimed(outbox).message.key == "poison"
    outbox.delivered(claimed(outbox))
    for attempt in (2, 3):
        clock.pass_s(31)
        assert claimed(outbox).attempts == attempt
    clock.pass_s(31)
    assert claim(outbox) is None
    states = {delivery.key: delivery.state for delivery in outbox.list(10)}
    assert states == {"poison": "dead", "good": "delivered"}
    assert outbox.list(1, state="dead")[0].error == "no attempt is left; the last one: no outcome"
    assert "hook.dead" in actions(store)


def test_a_clock_set_back_holds_nothing_up(outbox: Outbox, clock: Clock) -> None:
    outbox.publish(event())
    outbox.failed(claimed(outbox), "no", 60.0)
    clock.pass_s(-30 * DAY)
    assert outbox.next_due_s("ops") == 0.0
    assert claimed(outbox).attempts == 2
    clock.pass_s(-30 * DAY)
    assert claimed(outbox, owner="other").attempts == 3


def test_a_clock_set_back_a_few_hours_holds_nothing_up_either(outbox: Outbox, clock: Clock) -> None:
    outbox.publish(event())
    outbox.failed(claimed(outbox), "no", 60.0)
    clock.pass_s(-5 * 3600)
    assert outbox.next_due_s("ops") == 60.0 + 5 * 3600
    assert outbox.next_due_s("ops", horizon_s=600.0) == 0.0
    lease = outbox.claim("ops", "me", 30.0, max_attempts=9, horizon_s=600.0)
    assert lease is not None
    clock.pass_s(-500)  # less than the horizon: the lease is still a lease
    assert outbox.claim("ops", "other", 30.0, max_attempts=9, horizon_s=600.0) is None
    clock.pass_s(531)
    assert outbox.claim("ops", "other", 30.0, max_attempts=9, horizon_s=600.0) is not None


def test_no_delay_is_over_the_horizon(outbox: Outbox) -> None:
    outbox.publish(event())
    outbox.failed(claimed(outbox), "no", math.inf)
    assert outbox.next_due_s("ops") == HORIZON_S


def test_nothing_is_due_where_nothing_is(outbox: Outbox) -> None:
    outbox.publish(event())
    assert outbox.next_due_s("other") is None
    assert claim(outbox, "other") is None


# --- the dead, the old and the orphaned ---


def test_the_dead_are_audited_and_can_be_tried_again(store: SqliteStore, outbox: Outbox) -> None:
    sent = event()
    outbox.publish(sent)
    outbox.dead(claimed(outbox), "answered 410")
    (row,) = AuditLog(store).tail(1)
    assert (row.event.action, row.event.subject) == ("hook.dead", f"hook:{sent.id}")
    assert row.event.detail == {
        "sink": "ops", "type": sent.type, "subject": "fraud:7", "attempts": 1, "error": "answered 410",
    }  # fmt: skip
    assert outbox.retry(sent.id, actor="ann@host") == 1
    assert (only(outbox).state, only(outbox).attempts) == ("pending", 0)
    (row,) = AuditLog(store).tail(1)
    assert (row.event.actor, row.event.action, row.event.detail) == ("ann@host", "hook.retried", {"sink": "ops"})
    assert claimed(outbox).message.id == sent.id
    assert isinstance(AuditLog(store).verify(), Verified)


def test_a_retry_takes_what_is_in_back_off_and_leaves_the_rest(store: SqliteStore, clock: Clock) -> None:
    outbox = make(store, clock, "dead", "delivered", "leased", "waiting")
    sent = event()
    outbox.publish(sent)
    leases = {sink: claimed(outbox, sink) for sink in ("dead", "delivered", "leased", "waiting")}
    outbox.dead(leases["dead"], "x")
    outbox.delivered(leases["delivered"])
    outbox.failed(leases["waiting"], "x", 100.0)
    assert outbox.retry(sent.id, actor="a") == 2
    assert {d.sink: d.state for d in outbox.list(10)} == {
        "dead": "pending", "delivered": "delivered", "leased": "leased", "waiting": "pending",
    }  # fmt: skip
    assert outbox.next_due_s("waiting") == 0.0


def test_an_event_is_tried_since_it_was_written_or_since_somebody_had_it_tried_again(
    store: SqliteStore, clock: Clock
) -> None:
    outbox = make(store, clock, "ops", "other")
    outbox.publish(event())
    written = clock.now
    clock.pass_s(HORIZON_S / 2)
    first = claimed(outbox)
    outbox.failed(first, "x", 0.0)
    second = claimed(outbox)
    outbox.dead(second, "x")
    assert first.message.since_ns == second.message.since_ns == written
    clock.pass_s(10 * HORIZON_S)
    outbox.retry(None, actor="a")
    retried = clock.now
    third = claimed(outbox)
    outbox.failed(third, "x", 5.0)
    clock.pass_s(5)
    assert third.message.since_ns == claimed(outbox).message.since_ns == retried
    assert claimed(outbox, "other").message.since_ns == written  # it was never given up
    assert {d.created_ns for d in outbox.list(10)} == {written}


def test_the_events_of_an_older_file_are_tried_since_they_were_written(tmp_path: Path, clock: Clock) -> None:
    place = tmp_path / "older.db"
    before = next(n for n, steps in enumerate(MIGRATIONS) if any("retried_ns" in step for step in steps))
    with closing(SqliteStore(place, MIGRATIONS[:before])) as older, older.transaction() as connection:
        make(older, clock).put(connection, event())
    written = clock.now
    clock.pass_s(60)
    with closing(SqliteStore(place)) as newer:
        assert claimed(make(newer, clock)).message.since_ns == written


def test_all_the_dead_can_be_tried_again_at_once(outbox: Outbox) -> None:
    for key in "abc":
        outbox.publish(event(key))
        outbox.dead(claimed(outbox), "x")
    outbox.publish(event("d"))
    assert outbox.retry(None, actor="a") == 3
    assert outbox.retry(None, actor="a") == 0


def test_an_unknown_event_cannot_be_tried_again(outbox: Outbox) -> None:
    with pytest.raises(NotFound, match="no event 'nope'"):
        outbox.retry("nope", actor="a")


def test_settled_events_go_when_they_are_old_enough(store: SqliteStore, clock: Clock) -> None:
    outbox = make(store, clock, keep_delivered_s=7 * DAY, keep_dead_s=30 * DAY)
    for key, settle in {"delivered": outbox.delivered, "dead": lambda x: outbox.dead(x, "x"), "open": None}.items():
        outbox.publish(event(key))
        lease = claimed(outbox)
        if settle is not None:
            settle(lease)
    seen = {}
    for days in (6, 8, 29, 31, 400):
        clock.now = 1_800_000_000 * NS + days * DAY * NS
        outbox.tidy(["ops"])
        seen[days] = sorted(delivery.key for delivery in outbox.list(10))
    assert seen == {
        6: ["dead", "delivered", "open"],
        8: ["dead", "open"],
        29: ["dead", "open"],
        31: ["open"],
        400: ["open"],
    }


def test_settled_events_go_when_too_many_newer_ones_came(store: SqliteStore, clock: Clock) -> None:
    outbox = make(store, clock, max_kept=5)
    outbox.publish(event("open"))
    claimed(outbox)
    for number in range(20):
        outbox.publish(event(str(number)))
        outbox.delivered(claimed(outbox))
    assert [delivery.key for delivery in outbox.list(100)] == ["19", "18", "17", "16", "15", "open"]
    with store.reading() as connection:
        assert connection.execute("SELECT count(*) FROM outbox_delivery").fetchone() == (6,)


def test_what_goes_to_a_sink_that_nobody_has_is_buried_after_a_day(store: SqliteStore, clock: Clock) -> None:
    outbox = make(store, clock, "gone", "ops")
    outbox.publish(event())
    clock.pass_s(DAY - 1)
    outbox.tidy(["ops"])
    assert outbox.census() == {("gone", "pending"): 1, ("ops", "pending"): 1}
    clock.pass_s(2)
    outbox.tidy(["ops"])
    assert outbox.census() == {("gone", "dead"): 1, ("ops", "pending"): 1}
    outbox.tidy([])
    assert outbox.census() == {("gone", "dead"): 1, ("ops", "dead"): 1}


def test_the_census_counts_what_is_not_delivered(outbox: Outbox) -> None:
    for key in "abcde":
        outbox.publish(event(key))
    outbox.delivered(claimed(outbox))
    outbox.dead(claimed(outbox), "x")
    claimed(outbox)
    assert outbox.census() == {("ops", "pending"): 2, ("ops", "leased"): 1, ("ops", "dead"): 1}


def test_the_list_can_be_narrowed(outbox: Outbox) -> None:
    events = [event(key) for key in "abc"]
    for each in events:
        outbox.publish(each)
    outbox.dead(claimed(outbox), "x")
    assert [d.key for d in outbox.list(2)] == ["c", "b"]
    assert [d.key for d in outbox.list(10, state="dead")] == ["a"]
    assert [d.key for d in outbox.list(10, event_id=events[1].id)] == ["b"]
    assert outbox.list(10, state="pending", event_id=events[0].id) == []
    shown = outbox.list(10, state="dead")[0].as_dict()
    assert shown["due"] is None
    assert shown["created"] == "2027-01-15T08:00:00Z"
    json.dumps(shown)


def test_the_schema_holds_its_own(store: SqliteStore, outbox: Outbox) -> None:
    outbox.publish(event())
    for wrong in ("state = 'lost'", "state = 'leased'", "lease_owner = 'x'", "settled_ns = 1", "attempts = -1"):
        with pytest.raises(StoreError, match="refused the change"), store.transaction() as connection:
            connection.execute(f"UPDATE outbox_delivery SET {wrong}")  # noqa: S608
    assert store.problems() == []
