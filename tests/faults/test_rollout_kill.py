"""A process that is killed while a rollout stands anywhere: it goes on there, or goes back, and nothing is lost."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from server.control.rollouts.store import RolloutStore
from server.state import open_state
from tests.integration.test_rollout_serving import Registered, version_of
from tests.support.cli import cli
from tests.support.climbing import (
    GATES,
    STANDING,
    audited,
    order,
    reaches,
    recorded,
    section,
    status_of,
    traffic,
    write,
)
from tests.support.routed import Place, ask, eventually
from tests.support.server import Server

pytestmark = pytest.mark.slow

#: No pairs or traffic of a test are enough to leave these by.
SHADOWED = GATES.replace("{errors", "{diverge: {paired: disagree, max_rate: 99%, action: hold}, errors")
AWAITING = "[{weight: 50%, approve: true}]"
PLACES: dict[str, tuple[str, dict[str, str]]] = {
    "shadowing": ("shadowing", {"gates": SHADOWED, "more": "shadow: {pairs: 1000000, rps: 1000}"}),
    "step": ("step", {}),
    "paused": ("step", {}),
    "awaiting": ("awaiting", {"steps": AWAITING, "more": "approvals: 2"}),
    "hold": ("hold", {"more": "inconclusive: {after: 1s}"}),
    "promoted": ("promoted", {"steps": AWAITING}),
}


#: A way back is on disk when it is acknowledged, unless the disk takes longer than this.
ACKNOWLEDGED_S = 0.5


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def texts(wanted: str, on_crash: str) -> str:
    fields = {"steps": STANDING, "gates": GATES, "more": ""} | PLACES[wanted][1]
    more = ", ".join(filter(None, [fields["more"], f"on_crash: {on_crash}"]))
    return section(fields["steps"], fields["gates"], more)


def brought(place: Place, server: Server, wanted: str) -> dict[str, Any]:
    """The status where a kill is to find it; all of it is on disk."""
    if wanted == "promoted":
        reaches(place, server, "awaiting")
        assert order(place, server, "approve", x_tidegate_actor="ada")[0] == 200
    found = reaches(place, server, PLACES[wanted][0])
    recorded(place, server, PLACES[wanted][0])
    if wanted == "paused":
        status, found = order(place, server, "pause", x_tidegate_actor="ada")
        assert status == 200
    if wanted == "awaiting":
        status, found = order(place, server, "approve", x_tidegate_actor="ada")
        assert (status, found["approvals"]) == (200, ["ada"])
    return found


@pytest.mark.parametrize("wanted", PLACES)
def test_it_goes_on_where_it_was_killed(place: Place, wanted: str) -> None:
    write(place, texts(wanted, "resume"))
    with place.serve() as server, traffic(server):
        before = brought(place, server, wanted)
        server.kill()
    with place.serve() as again:
        found = reaches(place, again, PLACES[wanted][0])
        for field in ("step", "weight", "paused", "approvals", "starter"):
            assert found[field] == before[field], field
        versions = {ask(again, f"u{number}")[0] for number in range(60)}
        assert versions == {"shadowing": {"1"}, "promoted": {"2"}}.get(wanted, {"1", "2"})
        if wanted == "awaiting":
            assert order(place, again, "approve", x_tidegate_actor="ada")[0] == 409
            assert order(place, again, "approve", x_tidegate_actor="bob")[0] == 200
            reaches(place, again, "promoted")
        if wanted == "paused":
            assert order(place, again, "resume", x_tidegate_actor="ada")[0] == 200
        again.terminate()
        assert again.wait() == 0
    assert cli("audit", "verify", "--state-dir", str(place.state)).returncode == 0


@pytest.mark.parametrize("wanted", PLACES)
def test_it_goes_back_where_the_candidate_may_have_been_what_killed_it(place: Place, wanted: str) -> None:
    write(place, texts(wanted, "rollback"))
    with place.serve() as server, traffic(server):
        brought(place, server, wanted)
        server.kill()
    with place.serve() as again:
        found = reaches(place, again, "rolled_back")
        assert "the process died" in found["reason"]
        assert found["weight"] == 0
        assert {ask(again, f"u{number}")[0] for number in range(60)} == {"1"}
        recorded(place, again, "rolled_back")
        assert audited(place, again)[-1]["action"] == "rollout.rolled_back"


def on_disk(place: Place) -> str:
    """The state that a restart would find."""
    opened = open_state(place.state)
    try:
        (stored,) = RolloutStore(opened.store, opened.audit).all()
    finally:
        opened.close()
    return stored.state


@pytest.mark.parametrize(("word", "state"), [("abort", "aborted"), ("rollback", "rolled_back")])
def test_a_way_back_that_was_acknowledged_is_not_undone(place: Place, word: str, state: str) -> None:
    """Killed at once after the answer: what would have gone on otherwise does not."""
    write(place, texts("step", "resume"))
    with place.serve() as server, traffic(server):
        brought(place, server, "step")
        ordered = time.monotonic()
        status, found = order(place, server, word, x_tidegate_actor="ada")
        if time.monotonic() - ordered >= ACKNOWLEDGED_S:
            eventually(lambda: on_disk(place) == state)
        server.kill()
        assert (status, found["state"], found["weight"]) == (200, state, 0)
    with place.serve() as again:
        assert reaches(place, again, state)["weight"] == 0
        assert {ask(again, f"u{number}")[0] for number in range(60)} == {"1"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seconds", [None, 0.03])
def test_a_section_that_goes_with_the_process_leaves_nothing_half_way(tmp_path: Path, seconds: float | None) -> None:
    """Killed so long after the last approval was sent (None: once it is answered), and started without its section."""
    place = Registered(tmp_path)
    place.publish(2.0, "champion")
    place.write(section(AWAITING, candidate='"@challenger"', more="on_crash: resume"))
    with place.serve() as server, traffic(server):
        place.publish(3.0, "challenger")
        reaches(place, server, "awaiting", rollout="r1-2")
        with ThreadPoolExecutor(1) as pool:  # the answer comes when it is promoted, or not at all
            asked = pool.submit(order, place, server, "approve", "r1-2", x_tidegate_actor="ada")
            wait([asked], seconds)
            server.kill()
    place.write("    key: {from: [header:x-user]}\n")
    with place.serve() as again:
        found = status_of(place, again, "r1-2")
        ends = {"aborted": 1, "promoted": 2}
        assert found["state"] in (ends if seconds is not None else {"promoted"})
        assert place.aliases()["champion"] == ends[found["state"]]
        assert version_of(again) == str(ends[found["state"]])
        assert audited(place, again)[-1]["action"] == f"rollout.{found['state']}"
    assert cli("audit", "verify", "--state-dir", str(place.state)).returncode == 0


@pytest.mark.timeout(360)
def test_a_climb_with_a_kill_in_every_step_ends_where_it_would_have(place: Place) -> None:
    """Killed as soon as it has begun the next step, again and again: no step is skipped, repeated or gone back to."""
    steps = ", ".join(f"{{weight: {weight}%, certify: {{ceiling: 5%}}}}" for weight in (10, 30, 60))
    write(place, section(f"[{steps}]", more="on_crash: resume"))
    reached: list[int] = []
    for wanted in range(3):
        with place.serve() as server, traffic(server):
            reached.append(until_step(place, server, wanted))
            server.kill()
    with place.serve() as last:
        with traffic(last):
            reaches(place, last, "promoted")
        assert ask(last, "anybody")[0] == "2"
        entered = [
            event["detail"]["step"]
            for event in audited(place, last)
            if event["action"] == "rollout.step" and not event["detail"]["reason"].startswith("resumed")
        ]
    assert entered == [0, 1, 2], (entered, reached)


def until_step(place: Place, server: Server, wanted: int, seconds: float = 60) -> int:
    until = time.monotonic() + seconds
    while True:
        found = status_of(place, server)
        if found["state"] in {"promoting", "promoted"} or (found["state"] == "step" and found["step"] >= wanted):
            return int(found["step"])
        assert time.monotonic() < until, json.dumps(found)
        time.sleep(0.01)
