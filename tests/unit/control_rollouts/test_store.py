"""Rollouts on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from router.rollout.plan import FailedAttempt
from server.audit import AuditEvent, Verified
from server.control.rollouts.store import RolloutStore, StoredRollout
from server.errors import NotFound
from server.state import State, open_state

ROW = StoredRollout("r1", "m", "t", "d", 1, "step", None, 60, False, True, {"machine": {"x": [1.5]}, "revision": 3})


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    opened = open_state(tmp_path)
    yield opened
    opened.close()


def test_what_is_written_is_read_and_its_audit_with_it(state: State) -> None:
    store = RolloutStore(state.store, state.audit)
    store.save(ROW, (AuditEvent("ada", "rollout.step", "m:2", {"id": "r1"}),))
    store.save(replace(ROW, id="r0", began_ns=0))
    later = replace(ROW, state="rolled_back", failed_ns=9, open=False, document={"machine": {}})
    store.save(later)
    assert [row.id for row in store.all()] == ["r0", "r1"]
    assert store.all()[1] == later
    assert [row.event.action for row in state.audit.tail(10)] == ["rollout.step"]
    assert isinstance(state.audit.verify(), Verified)


def test_what_has_ended_is_cleared_by_name(state: State) -> None:
    store = RolloutStore(state.store, state.audit)
    store.save(ROW)
    assert ROW.failed_attempt() is None
    with pytest.raises(NotFound, match="no rollout 'r1' that has ended"):
        store.clear("r1", "ada", "")
    store.save(replace(ROW, state="aborted", open=False))  # of an alias, it is not tried again before that
    store.clear("r1", "ada", "a mistake")
    assert store.all()[0].cleared
    store.save(replace(ROW, failed_ns=9, open=False))
    store.clear("r1", "ada", "looked into it")
    (row,) = store.all()
    assert row.failed_attempt() == FailedAttempt("r1", "d", 9, 60, cleared=True)
    store.save(replace(ROW, failed_ns=9))  # a process that does not know of it takes nothing back
    assert store.all()[0].cleared


def test_who_set_an_alias_is_known_by_the_audit(state: State) -> None:
    store = RolloutStore(state.store, state.audit)
    assert store.setter("m", "challenger") == ""
    for actor in ("ada", "bob"):
        state.audit.record(AuditEvent(actor, "registry.alias", "m@challenger"))
    assert store.setter("m", "challenger") == "bob"
