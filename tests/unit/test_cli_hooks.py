"""``tidegate hook``: what is shown, what is tried again, and that a live dispatcher sees it."""

from __future__ import annotations

import json
import subprocess
import sys
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


def test_nothing_yet(tmp_path: Path, state: State) -> None:
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
    assert (result.exit_code, result.output) == (0, "1 delivery is due now\n")
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


@pytest.mark.parametrize("arguments", [("retry", "nope"), ("list", "--event", "nope")])
def test_an_unknown_event_is_an_error(tmp_path: Path, outbox: Outbox, arguments: tuple[str, ...]) -> None:
    put(outbox, "a")
    result = hook(tmp_path, *arguments)
    assert isinstance(result.exception, NotFound)
    assert "no event 'nope'" in str(result.exception)


def test_a_known_event_without_deliveries_in_a_state_is_no_error(tmp_path: Path, outbox: Outbox) -> None:
    waiting = put(outbox, "a")
    result = hook(tmp_path, "list", "--event", waiting, "--state", "dead", "--json")
    assert (result.exit_code, json.loads(result.output)) == (0, [])


@pytest.mark.parametrize("arguments", [("list",), ("retry", "some-id"), ("retry", "--dead")])
def test_a_folder_without_a_gateways_state_is_an_error_and_stays_as_it_is(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    result = hook(tmp_path / "typo", *arguments)
    assert isinstance(result.exception, NotFound)
    assert "--state-dir" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_retry_of_what_was_delivered_says_so(tmp_path: Path, outbox: Outbox) -> None:
    event_id = put(outbox, "a")
    lease = outbox.claim("ops", "me", 30, max_attempts=9)
    assert lease is not None
    wanted = (0, f"nothing to try again: each sink has event {event_id} or is just being sent it\n")
    result = hook(tmp_path, "retry", event_id)
    assert (result.exit_code, result.output) == wanted
    outbox.delivered(lease)
    result = hook(tmp_path, "retry", event_id)
    assert (result.exit_code, result.output) == wanted
    assert hook(tmp_path, "retry", "--dead").output == "nothing to try again: no delivery was given up\n"
    assert outbox.list(1)[0].state == "delivered"


def test_two_operators_at_once_make_one_delivery_of_it(tmp_path: Path, state: State, outbox: Outbox) -> None:
    dead = [put(outbox, str(number), dead=True) for number in range(8)]
    command = [sys.executable, "-m", "server", "hook", "retry", "--dead", "--state-dir", str(tmp_path)]
    both = [subprocess.Popen([*command, "--actor", actor], stdout=subprocess.PIPE, text=True) for actor in ("a", "b")]
    said = sorted(process.communicate(timeout=30)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said == ["8 deliveries are due now\n", "nothing to try again: no delivery was given up\n"]
    retried = [row.event for row in state.audit.tail(99) if row.event.action == "hook.retried"]
    assert sorted(event.subject for event in retried) == sorted(f"hook:{one}" for one in dead)
    assert len({event.actor for event in retried}) == 1
    while lease := outbox.claim("ops", "me", 30, max_attempts=9):
        assert lease.attempts == 1
        outbox.delivered(lease)
    assert {delivery.state for delivery in outbox.list(99)} == {"delivered"}
