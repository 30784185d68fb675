"""Two operators at once, on a live server: one of them is obeyed, the other is told why not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import pytest

from tests.support.climbing import GATES, audited, defaults, order, reaches, section, status_of, write
from tests.support.routed import Place, ask, eventually
from tests.support.server import Server

T = TypeVar("T")

#: Waits for a person at once, and asks for no traffic.
AWAITING = "[{weight: 50%, approve: true}, {weight: 100%}]"
ROUNDS = 4


def at_once(*calls: Callable[[], T]) -> list[T]:
    """What each call gives, all of them begun at the same moment."""
    barrier = threading.Barrier(len(calls))

    def one(call: Callable[[], T]) -> T:
        barrier.wait(10)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result(30) for done in [pool.submit(one, call) for call in calls]]


def text_of(place: Place, name: str) -> str:
    text = place.text(section(AWAITING, GATES, name=name))
    return text.replace("models:", defaults() + "models:", 1)


def start(place: Place, server: Server, name: str, **headers: str) -> tuple[int, Any]:
    status, answer, _ = place.admin(server, "POST", "config", text_of(place, name).encode(), **headers)
    return status, answer


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Place, Server]]:
    place = Place(tmp_path_factory.mktemp("operators"))
    write(place, "")
    with place.serve() as server:
        yield place, server


def awaiting(place: Place, server: Server, name: str) -> str:
    """Begin a rollout and bring it to where people are waited for; its revision."""
    place.apply(server, text_of(place, name))
    until = 0
    while status_of(place, server, name)["state"] != "awaiting":
        ask(server, f"{name}-{until}")  # a step ends on a look with traffic
        until += 1
        assert until < 5_000
    reaches(place, server, "awaiting", rollout=name)
    return str(status_of(place, server, name)["revision"])


@pytest.mark.parametrize(
    ("words", "states"),
    [(("abort", "approve"), {"aborted", "promoted"}), (("approve", "approve"), {"promoted"}),
     (("abort", "abort"), {"aborted"}), (("pause", "approve"), {"awaiting", "promoted"}),
     (("rollback", "promote"), {"rolled_back", "promoted"})],
)  # fmt: skip
def test_of_two_orders_for_one_revision_one_is_obeyed(
    running: tuple[Place, Server], words: tuple[str, str], states: set[str]
) -> None:
    place, server = running
    for number in range(ROUNDS):
        name = f"{'-'.join(words)}-{number}"
        revision = awaiting(place, server, name)

        orders = [
            partial(order, place, server, word, name, If_Match=revision, x_tidegate_actor=who)
            for word, who in zip(words, ("ada", "bob"), strict=True)
        ]
        answers = at_once(*orders)
        assert sorted(status for status, _ in answers) == [200, 412], answers
        won = [status for status, _ in answers].index(200)
        assert "the order was given for revision" in answers[1 - won][1]["error"]
        found = reaches(place, server, *states, rollout=name)
        assert found["revision"] > int(revision)
        # What takes traffic away is written down a little later.
        eventually(partial(named_in_the_audit, place, server, name))
        assert named_in_the_audit(place, server, name) == {("ada", "bob")[won]}
        clear(place, server, name)


def named_in_the_audit(place: Place, server: Server, name: str) -> set[str]:
    """Whose orders to a rollout the audit has."""
    events = [event for event in audited(place, server) if event["detail"].get("id") == name]
    return {event["actor"] for event in events} & {"ada", "bob"}


def clear(place: Place, server: Server, name: str) -> None:
    """Let the candidate be tried again, if it was taken back; and leave no section behind."""
    order(place, server, "clear", name)
    place.apply(server, place.text(""))


def test_without_a_revision_the_second_order_meets_what_the_first_has_made(running: tuple[Place, Server]) -> None:
    place, server = running
    for number in range(ROUNDS):
        name = f"free-{number}"
        awaiting(place, server, name)
        answers = at_once(
            partial(order, place, server, "abort", name, x_tidegate_actor="ada"),
            partial(order, place, server, "abort", name, x_tidegate_actor="bob"),
        )
        assert sorted(status for status, _ in answers) == [200, 409], answers
        refused = next(answer["error"] for status, answer in answers if status == 409)
        assert "being rolled back already" in refused or "it has ended (aborted)" in refused
        place.apply(server, place.text(""))


def test_an_abort_is_never_lost_to_an_approval(running: tuple[Place, Server]) -> None:
    """Whoever is first: when the abort is obeyed the candidate has nothing, and when it is not it says what to do."""
    place, server = running
    for number in range(ROUNDS):
        name = f"lost-{number}"
        awaiting(place, server, name)
        aborted, approved = at_once(
            partial(order, place, server, "abort", name, x_tidegate_actor="ada"),
            partial(order, place, server, "approve", name, x_tidegate_actor="bob"),
        )
        if aborted[0] == 200:
            reaches(place, server, "aborted", rollout=name)
            assert {ask(server, f"v{user}")[0] for user in range(30)} == {"1"}
            assert approved[0] in {200, 409}
        else:
            assert (aborted[0], approved[0]) == (409, 200)
            assert "it is promoted; roll it back" in aborted[1]["error"]
            assert order(place, server, "rollback", name, x_tidegate_actor="ada")[0] == 200
            reaches(place, server, "rolled_back", rollout=name)
        clear(place, server, name)


def test_of_two_who_start_a_rollout_one_does(running: tuple[Place, Server]) -> None:
    place, server = running
    for number in range(ROUNDS):
        generation = place.apply(server, place.text("") + f"# round {number}\n")["generation"]
        names = [f"mine-{number}", f"yours-{number}"]

        answers = at_once(*[partial(start, place, server, name, If_Match=str(generation)) for name in names])
        assert sorted(status for status, _ in answers) == [200, 412], answers
        won = [status for status, _ in answers].index(200)
        assert f"generation {generation}" in answers[1 - won][1]["error"]
        reaches(place, server, "step", "awaiting", rollout=names[won])
        assert status_of(place, server, names[1 - won])["state"] == ""


def test_the_same_start_twice_is_one_rollout(running: tuple[Place, Server]) -> None:
    place, server = running
    answers = at_once(*[partial(start, place, server, "same")] * 2)
    assert [status for status, _ in answers] == [200, 200]
    assert answers[0][1]["generation"] == answers[1][1]["generation"]
    reaches(place, server, "step", "awaiting", rollout="same")
    begun = [event for event in audited(place, server) if event["action"] == "rollout.begun"]
    assert sum(event["detail"]["spec"]["id"] == "same" for event in begun) == 1
