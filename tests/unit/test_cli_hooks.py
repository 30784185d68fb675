"""``tidegate hook``: what is shown, what is tried again, and that a live dispatcher sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from server.cli.main import cli
from server.errors import NotFound
from server.outbox import Event, Outbox
from server.state import State, open_state


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = open_state(tmp_path)
    yield state
    state.close()


@pytest.fixture
def outbox(state: State) -> Outbox:
    return Outbox(state.store, state.audit, sinks=["ops"])


def hook(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["hook", *arguments, "--state-dir", str(folder)])


def put(outbox: Outbox, key: str, *, dead: bool = False) -> str:
    event = Event("io.tidegate.test", "/models/m", "m:1", key, {"secret": "in the data"})
    outbox.publish(event)
    if dead:
        lease = outbox.claim("ops", "me", 30, max_attempts=9)
        assert lease is not None
        assert outbox.dead(lease, "answered 410")
    return event.id


def test_nothing_yet(tmp_path: Path) -> None:
    assert hook(tmp_path, "list").output.split() == [
        "ID", "SINK", "STATE", "ATTEMPTS", "TYPE", "SUBJECT", "CREATED", "DUE", "ERROR",
    ]  # fmt: skip
    assert json.loads(hook(tmp_path, "list", "--json").output) == []


def test_list_for_people_and_programs(tmp_path: Path, outbox: Outbox) -> None:
    dead, waiting = put(outbox, "a", dead=True), put(outbox, "b")
    lines = hook(tmp_path, "list").output.splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [[waiting, "ops", "pending", "0"], [dead, "ops", "dead", "1"]]
    assert lines[2].endswith("answered 410")
    rows = json.loads(hook(tmp_path, "list", "--state", "dead", "--json").output)
    assert [(row["id"], row["state"], row["idempotency_key"], row["due"]) for row in rows] == [
        (dead, "dead", "a", None)
    ]
    rows = json.loads(hook(tmp_path, "list", "--event", waiting, "--json").output)
    assert [row["id"] for row in rows] == [waiting]
    assert len(json.loads(hook(tmp_path, "list", "-n", "1", "--json").output)) == 1
    assert hook(tmp_path, "list", "--state", "lost").exit_code == 2


def test_retry_of_one_event(tmp_path: Path, state: State, outbox: Outbox) -> None:
    dead = put(outbox, "a", dead=True)
    result = hook(tmp_path, "retry", dead, "--actor", "ann@host")
    assert (result.exit_code, result.output) == (0, "1 deliveries are due now\n")
    (row,) = state.audit.tail(1)
    assert (row.event.actor, row.event.action, row.event.subject) == ("ann@host", "hook.retried", f"hook:{dead}")
    assert outbox.claim("ops", "me", 30, max_attempts=9) is not None


def test_retry_of_all_the_dead(tmp_path: Path, outbox: Outbox) -> None:
    put(outbox, "a", dead=True)
    put(outbox, "b", dead=True)
    assert json.loads(hook(tmp_path, "retry", "--dead", "--json").output) == {"retried": 2}
    assert {delivery.state for delivery in outbox.list(9)} == {"pending"}


@pytest.mark.parametrize("arguments", [(), ("some-id", "--dead")])
def test_retry_wants_one_of_two(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert hook(tmp_path, "retry", *arguments).exit_code == 2


def test_retry_of_an_unknown_event_is_an_error(tmp_path: Path) -> None:
    result = hook(tmp_path, "retry", "nope")
    assert isinstance(result.exception, NotFound)
