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


def test_who_promoted_a_version_has_set_every_alias_that_moved_with_it(state: State, tmp_path: Path) -> None:
    store, registry = RolloutStore(state.store, state.audit), state.registry
    for number, alias in ((1, "champion"), (2, "challenger")):
        (tmp_path / "m.onnx").write_text(str(number))
        registry.publish("m", tmp_path / "m.onnx", alias=alias, actor="ada")
    (tmp_path / "m.onnx").write_text("of another model whose name begins alike")
    registry.publish("m2", tmp_path / "m.onnx", alias="champion", actor="eve")
    assert [store.setter("m", alias) for alias in ("champion", "challenger", "previous")] == ["ada", "ada", ""]
    registry.promote("m", 2, actor="bob")
    assert [store.setter("m", alias) for alias in ("champion", "challenger", "previous")] == ["bob", "bob", "bob"]
    registry.set_alias("m", "champion", 1, actor="cleo")
    assert [store.setter("m", alias) for alias in ("champion", "challenger")] == ["cleo", "bob"]


@pytest.mark.parametrize("text", ["", '{"machine": {"sp', "[]", "null", '{"machine": []}', '{"machine": {"spec": 1}}'])
def test_of_a_damaged_rollout_the_rest_is_known_and_the_others_are_whole(state: State, text: str) -> None:
    store = RolloutStore(state.store, state.audit)
    store.save(replace(ROW, id="r0", began_ns=0))
    store.save(replace(ROW, state="promoted"))
    with state.store.transaction() as connection:
        connection.execute("UPDATE rollout_state SET document = ? WHERE id = 'r1'", (text,))
    assert store.all() == [replace(ROW, id="r0", began_ns=0), replace(ROW, state="promoted", document={})]
    assert [row.standing().candidate for row in store.all()] == ["", ""]


def test_a_state_that_only_a_newer_tidegate_knows_is_damage_too(state: State) -> None:
    store = RolloutStore(state.store, state.audit)
    store.save(replace(ROW, state="levitating"))
    assert store.all() == [replace(ROW, state="aborted", document={})]
