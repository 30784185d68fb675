"""What a dead process left of rollouts that nobody asks for any more: states, aliases and audit agree afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from router.errors import BadRolloutState
from router.registry.base import CHALLENGER, CHAMPION, PREVIOUS
from router.registry.origin import Unreachable
from router.rollout.events import Order, SpecRemoved, State
from server import state as states
from server.control.rollouts.abandoned import ending_of, is_abandoned
from server.control.rollouts.aliases import Aliases
from server.control.rollouts.control import RolloutControl
from server.control.rollouts.store import RolloutStore, StoredRollout
from server.control.rollouts.tenure import Tenure
from tests.support import models
from tests.support.rollouts import Driven, rollout_spec
from tests.unit.control_rollouts.test_actions import Rig

SPEC = rollout_spec(model="m", stable="1", candidate="2", keep_warm_ns=10**12)
ALIAS = {"of": "m", "name": CHAMPION}
#: Where a machine stood when its process died, and whether the champion had been moved by then; what becomes of both.
ENDINGS = [
    ("pending", False, "aborted", 1),
    ("step", False, "aborted", 1),
    ("hold", False, "aborted", 1),
    ("promoting", False, "aborted", 1),
    ("promoting", True, "aborted", 1),
    ("removed", False, "aborted", 1),
    ("removed", True, "aborted", 1),
    ("rolling_back", True, "rolled_back", 1),
    ("promoted", True, "promoted", 2),
]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[states.State]:
    """A registry with two versions of a model, the first of which is champion and the second challenger."""
    opened = states.open_state(tmp_path)
    for number in (1, 2, 3):
        models.affine(tmp_path / str(number) / "model.onnx", scale=number)
        opened.registry.publish("m", tmp_path / str(number), actor="al")
    opened.registry.set_alias("m", CHAMPION, 1, actor="al")
    opened.registry.set_alias("m", CHALLENGER, 2, actor="al")
    yield opened
    opened.close()


def machine_in(wanted: str) -> dict[str, Any]:
    """As it was written down. ``removed``: its section went while it was promoting."""
    driven = Driven(SPEC)
    if wanted in ("removed", "rolling_back"):
        driven.reach(State.PROMOTING if wanted == "removed" else State.PROMOTED)
        driven.tell(SpecRemoved("ada")) if wanted == "removed" else driven.order(Order.ROLLBACK)
        assert driven.state is State.ROLLING_BACK
    else:
        driven.reach(State(wanted)) if wanted != "pending" else None
    return driven.rollout.to_dict()


def row_in(wanted: str, *, is_open: bool = True, alias: dict[str, str] | None = ALIAS) -> StoredRollout:
    machine = machine_in(wanted)
    document = {"machine": machine, "revision": 4, "alias": alias}
    return StoredRollout("r-1", "m", "gone", "d", 1, machine["state"], None, 60, False, is_open, document)


def champion(state: states.State) -> int | None:
    return state.registry.alias("m", CHAMPION).version


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize(("wanted", "moved", "end", "serving"), ENDINGS)
def test_each_comes_to_its_end(
    state: states.State, wanted: str, moved: bool, end: str, serving: int, is_open: bool
) -> None:
    """Whether its process was killed or stopped: nothing stays half-way."""
    if moved:
        state.registry.promote("m", 2, expected_champion=1, actor="tidegate")
    row = row_in(wanted, is_open=is_open)
    assert is_abandoned(row) == (is_open or wanted != "promoted")
    ending = ending_of(row, Aliases(state.registry), 7)
    assert (ending.row.state, ending.row.open) == (end, False)
    assert not is_abandoned(ending.row)
    assert (champion(state), ending.moved) == (serving, wanted in ("promoting", "removed", "rolling_back"))
    assert ending.events[-1].action == f"rollout.{end}"
    assert ending.events[-1].detail["reason"]
    assert (ending.row.failed_ns is not None) == (end == "rolled_back")
    assert ending.row.document["revision"] == 4 + len(ending.events)
    again = ending_of(row, Aliases(state.registry), 7)  # it died before that was written down
    assert (again.row.state, champion(state)) == (end, serving)


def test_a_champion_that_somebody_moved_meanwhile_is_left_alone(state: states.State) -> None:
    state.registry.promote("m", 2, expected_champion=1, actor="tidegate")
    state.registry.promote("m", 3, expected_champion=2, actor="bob")
    ending = ending_of(row_in("promoting"), Aliases(state.registry), 7)
    assert (ending.row.state, champion(state)) == ("aborted", 3)
    assert any("left alone" in str(event.detail["reason"]) for event in ending.events)


def test_where_no_alias_was_moved_none_is(state: states.State) -> None:
    """Of a rollout whose stable version is the file's, and of one that an older gateway has written down."""
    state.registry.promote("m", 2, expected_champion=1, actor="al")
    without = row_in("promoting", alias=None)
    older = replace(without, document={name: part for name, part in without.document.items() if name != "alias"})
    for row in (without, older):
        assert ending_of(row, Aliases(state.registry), 7).row.state == "aborted"
    assert ending_of(row_in("promoting"), None, 7).row.state == "aborted"
    assert champion(state) == 2


def test_a_registry_that_cannot_be_reached_is_told_of_and_not_waited_for() -> None:
    class Away:
        def move(self, entry: str, alias: str, was: str, to: str) -> str:
            raise Unreachable("MLflow cannot be reached")

    ending = ending_of(row_in("rolling_back"), Away(), 7)
    assert ending.row.state == "rolled_back"
    told = [str(event.detail["reason"]) for event in ending.events]
    assert "the champion was left alone: MLflow cannot be reached" in told


@pytest.mark.parametrize("document", [{}, {"machine": {}}, {"machine": {"version": 1, "spec": 3}}])
def test_what_cannot_be_read_is_said(document: dict[str, Any]) -> None:
    row = replace(row_in("step"), document=document)
    with pytest.raises((BadRolloutState, KeyError)):
        ending_of(row, None, 7)


def test_a_start_without_the_section_ends_it_on_disk(tmp_path: Path, state: states.State) -> None:
    """A promotion that had moved the champion is undone, once, and the chain of the audit says so."""

    async def body() -> None:
        rig = Rig(tmp_path, working=False)
        rig.hands.mover = Aliases(state.registry)
        store = RolloutStore(rig.store, rig.audit)
        store.save(row_in("promoting"))
        store.save(replace(row_in("promoted"), id="r-0", open=False))
        store.save(replace(row_in("step"), id="r-2", document={"machine": {"version": 9}}))
        control = RolloutControl(rig.hands, Tenure(tmp_path))
        assert await control.start({}, "ada")
        rows = {row.id: (row.state, row.open) for row in store.all()}
        assert rows == {"r-1": ("aborted", False), "r-0": ("promoted", False), "r-2": ("aborted", False)}
        assert {one["id"]: one["state"] for one in control.all()} == {id_: row[0] for id_, row in rows.items()}
        told = [row.event for row in rig.audit.tail(20) if row.event.action.startswith("rollout.")]
        assert [event.action for event in told] == ["rollout.rolling_back", "rollout.aborted", "rollout.aborted"]
        assert "cannot be read" in str(told[-1].detail["reason"])
        assert [state.registry.alias("m", alias).version for alias in (CHAMPION, PREVIOUS)] == [1, 2]
        await control.close()
        assert not await RolloutControl(rig.hands, Tenure(tmp_path)).start({}, "ada")
        await rig.close()

    state.registry.promote("m", 2, expected_champion=1, actor="tidegate")
    asyncio.run(asyncio.wait_for(body(), 30))
