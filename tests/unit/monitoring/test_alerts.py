"""Alarms on their way to a real outbox: once per episode, in order, and never lost without a word."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog

from server.errors import InvalidArgument
from server.monitoring.alerts import AlertQueue, alert
from server.outbox import Event, Limits, Outbox
from server.state import State, open_state
from server.store.base import StoreError


def event(name: str = "drift.raised", key: str = "m:1/ab/stable//x/drift/1") -> dict[str, Any]:
    return {"event": name, "key": key, "model": "m", "version": "1", "psi": 0.5}


class Audit:
    def __init__(self) -> None:
        self.rows: list[tuple[str, str, Mapping[str, object]]] = []
        self.changed = threading.Event()

    def __call__(self, action: str, subject: str, detail: Mapping[str, object]) -> None:
        self.rows.append((action, subject, detail))
        self.changed.set()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    made = open_state(tmp_path)
    yield made
    made.close()


@pytest.fixture
def audit() -> Audit:
    return Audit()


def test_an_episode_is_one_alert_and_one_end(state: State, audit: Audit) -> None:
    outbox = Outbox(state.store, state.audit, sinks=["ops"])
    queue = AlertQueue(outbox.publish, audit)
    odd = event(key="m:1/ab/stable/a segment/Größe\ud800/drift/1")
    for name in ("drift.raised", "drift.raised", "drift.cleared", "drift.raised"):
        queue.put(event(name))
    queue.put(odd)
    queue.close()
    found = outbox.list(10)[::-1]
    assert [row.type for row in found] == [
        "io.tidegate.alert.drift.raised",
        "io.tidegate.alert.drift.cleared",
    ]
    assert {row.subject for row in found} == {"m:1"}
    ((action, _, detail),) = audit.rows  # no CloudEvent can hold half a surrogate pair
    assert (action, detail["key"]) == ("alert.lost", odd["key"])


def test_a_full_outbox_loses_nothing_silently(state: State, audit: Audit) -> None:
    outbox = Outbox(state.store, state.audit, sinks=["ops"], limits=Limits(max_pending=1))
    queue = AlertQueue(outbox.publish, audit, pauses_s=(0.01, 0.01))
    with structlog.testing.capture_logs() as logs:
        queue.put(event())
        queue.put(event(key="another"))
        assert audit.changed.wait(10)
        queue.close()
    assert [row.state for row in outbox.list(10)] == ["pending"]
    assert queue.lost == 1
    assert [(action, subject) for action, subject, _ in audit.rows] == [("alert.lost", "m:1")]
    assert [line["event"] for line in logs].count("alert_not_written") == 2


def test_a_store_that_recovers_costs_nothing(audit: Audit) -> None:
    tries: list[Event] = []

    def publish(made: Event) -> bool:
        tries.append(made)
        if len(tries) < 3:
            raise StoreError("the disk is full")
        return True

    queue = AlertQueue(publish, audit, pauses_s=(0.01, 0.01))
    queue.put(event())
    queue.close()
    assert (len(tries), queue.lost) == (3, 0)  # closing cuts pauses short, never tries
    assert audit.rows == []


def test_the_queue_is_bounded_and_put_never_waits(audit: Audit) -> None:
    held, go = threading.Event(), threading.Event()

    def publish(_: Event) -> bool:
        held.set()
        return go.wait(20)

    queue = AlertQueue(publish, audit, capacity=2)
    queue.put(event(key="0"))
    assert held.wait(20)
    for number in range(1, 5):
        queue.put(event(key=str(number)))
    assert [detail["key"] for _, _, detail in audit.rows] == ["3", "4"]
    assert queue.lost == 2
    go.set()
    queue.close()
    assert queue.lost == 2
    queue.put(event(key="5"))
    assert queue.lost == 3


def test_an_alert_is_a_cloud_event() -> None:
    made = alert(event("quality.cleared"))
    assert (made.type, made.source, made.subject) == ("io.tidegate.alert.quality.cleared", "/models/m", "m:1")
    assert made.key == alert(event("quality.cleared")).key != alert(event("quality.raised")).key
    assert "event" not in made.data
    with pytest.raises(InvalidArgument):
        alert(event("No Words"))
