"""Rollouts on a live server: climbing, coming back, orders of people, restarts."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest

from server.control.rollouts.store import RolloutStore
from server.state import open_state
from tests.support import models
from tests.support.cli import cli, quickly
from tests.support.climbing import (
    GATES,
    STANDING,
    audited,
    defaults,
    order,
    reaches,
    section,
    status_of,
    traffic,
    write,
    write_with_upstream,
)
from tests.support.routed import Place, X, ask, eventually
from tests.support.server import Server
from tests.support.upstream import refusing, scaled, upstream
from tests.support.v2 import call


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_good_candidate_climbs_and_stays_promoted_over_a_restart(place: Place) -> None:
    text = write(place, section())
    with place.serve() as server:
        with traffic(server) as callers:
            found = reaches(place, server, "promoted")
            eventually(lambda: ask(server, "anybody")[:2] == ("2", "stable"))
        assert not callers.failures
        assert found["candidate"] == "2"
        states = [event["action"] for event in audited(place, server)]
        wanted = ["begun", "gated", "loading", "step", "step", "promoting", "promoted"]
        assert states == [f"rollout.{state}" for state in wanted]
        assert place.apply(server, text + "# the same\n")["generation"]
        assert ask(server, "anybody")[0] == "2"
        server.terminate()
        assert server.wait() == 0
    with place.serve() as again:
        assert ask(again, "anybody")[0] == "2"
        assert status_of(place, again)["state"] == "promoted"


def test_orders_of_people(place: Place) -> None:
    write(place, section(STANDING))
    with place.serve() as server, traffic(server) as callers:
        reaches(place, server, "step")
        status, found = order(place, server, "pause", x_tidegate_actor="ada")
        assert (status, found["paused"]) == (200, True)
        status, refused = order(place, server, "pause")
        assert (status, "paused already" in refused["error"]) == (409, True)
        revision = found["revision"]
        assert order(place, server, "resume", If_Match="1")[0] == 412
        assert order(place, server, "resume", If_Match=str(revision))[0] == 200
        assert order(place, server, "fly")[0] == 404
        assert order(place, server, "pause", rollout="nobody")[0] == 404
        before = callers.versions["2"]
        status, found = order(place, server, "abort", x_tidegate_actor="ada", x_tidegate_reason="enough")
        assert (status, found["state"], found["weight"]) == (200, "aborted", 0)
        assert {ask(server, f"v{n}")[0] for n in range(50)} == {"1"}
        # A fraction of a second, on a machine that has nothing else to do; the disk may take longer than that.
        assert callers.versions["2"] - before < 100
        assert order(place, server, "abort")[0] == 409
        eventually(lambda: audited(place, server)[-1]["action"] == "rollout.aborted")
        last = next(event for event in reversed(audited(place, server)) if event["actor"] == "ada")
        assert last["detail"]["evidence"]
        assert last["detail"]["generation"] >= 1
    assert not callers.failures


def test_without_traffic_nothing_moves(place: Place) -> None:
    write(place, section())
    with place.serve() as server:
        reaches(place, server, "step")
        time.sleep(1)
        found = status_of(place, server)
        assert (found["state"], found["step"], found["weight"]) == ("step", 0, 30)


@pytest.mark.parametrize("first", ["step", "paused", "awaiting"])
def test_a_candidate_that_breaks_is_taken_back_at_once(place: Place, first: str) -> None:
    """From one request to the next everything that reaches it fails; callers see nothing, for stable answers.

    What it may fail is counted: about a dozen are evidence, and more come until the gates look again, ten times a
    second. With half of the traffic that is ten times as many as with its twentieth.
    """
    standing = STANDING.replace("50%", "5%")
    steps = "[{weight: 50%, certify: {ceiling: 5%}, approve: true}]" if first == "awaiting" else standing
    with upstream(scaled(3.0), 64) as other:
        write_with_upstream(place, other, section(steps) + "    resilience: {fallback: stable}\n")
        with place.serve() as server, traffic(server) as callers:
            reaches(place, server, "awaiting" if first == "awaiting" else "step")
            if first == "paused":
                assert order(place, server, "pause")[0] == 200
            eventually(lambda: callers.versions["2"] > 20)
            other.behave = refusing(500)
            before = len(other.asked)
            found = reaches(place, server, "rolled_back")
            assert {ask(server, f"w{n}")[0] for n in range(50)} == {"1"}
            assert 0 < len(other.asked) - before < (300 if first == "awaiting" else 60)
        assert not callers.failures
        assert found["reason"].startswith("worse by")


def test_outcomes_that_callers_report_take_a_candidate_back(place: Place) -> None:
    gates = GATES.replace("{errors", "{chargeback: {feedback: chargeback, worse_than: 1.1}, errors")
    write(place, section(STANDING, gates))
    with place.serve() as server:
        reaches(place, server, "step")
        ids: dict[str, list[str]] = {"1": [], "2": []}
        for number in range(200):
            _, _, headers = call(server.http, "POST", "/v2/models/m/infer", {"inputs": X}, {"x-user": f"u{number}"})
            ids[headers["x-tidegate-version"]].append(headers["x-tidegate-id"])
        bad = [{"id": id_, "outcome": 1} for id_ in ids["2"][:50]] + [
            {"id": id_, "outcome": 0} for id_ in ids["1"][:50]
        ]
        status, answer, _ = call(server.http, "POST", "/v2/models/m/feedback", bad)
        assert (status, answer["joined"]) == (200, 100)
        found = reaches(place, server, "rolled_back")
        assert found["reason"] == "worse by chargeback"


def test_a_digest_that_failed_is_not_tried_again_until_it_is_cleared(place: Place) -> None:
    write(place, section(STANDING))
    with place.serve() as server:
        reaches(place, server, "step")
        assert order(place, server, "clear")[0] == 404
        assert order(place, server, "rollback", x_tidegate_actor="ada")[0] == 200
        reaches(place, server, "rolled_back")
        text = place.text(section(STANDING, name="r2")).replace("models:", defaults() + "models:", 1)
        place.apply(server, text)
        found = reaches(place, server, "waiting", rollout="r2")
        assert "failed in rollout 'r1'" in found["reason"]
        assert order(place, server, "clear", x_tidegate_actor="ada")[0] == 200
        reaches(place, server, "step", rollout="r2")


def test_a_process_that_is_killed_goes_on_or_goes_back(place: Place) -> None:
    """With evidence and step as they were, or, where the candidate may be what killed it, without the candidate."""
    write(place, section(STANDING, more="on_crash: resume"))
    with place.serve() as server, traffic(server):
        reaches(place, server, "step")
        eventually(lambda: on_disk(place) > 200)
        server.kill()
    stored = on_disk(place)
    with place.serve() as again:
        found = reaches(place, again, "step")
        assert (found["step"], found["weight"]) == (0, 50)
        assert attempts_of(place, again) >= stored > 200
        again.kill()
    write(place, section(STANDING, name="r2"))
    with place.serve() as third:
        reaches(place, third, "step", rollout="r2")
        assert status_of(place, third)["state"] == "aborted"
        time.sleep(0.5)
        third.kill()
    place.path.write_text("nonsense: [")
    with place.serve() as fourth:
        found = reaches(place, fourth, "rolled_back", rollout="r2")
        assert "died" in found["reason"]
        assert {ask(fourth, f"v{n}")[0] for n in range(50)} == {"1"}
        assert any("last good" in line for line in fourth.raw)


def attempts_of(place: Place, server: Server) -> float:
    """What the candidate's ceiling has judged."""
    gates = {gate["gate"]: gate for gate in status_of(place, server)["gates"]}
    return float(gates["ceiling"]["candidate"][0])


def on_disk(place: Place) -> float:
    state = open_state(place.state)
    try:
        (stored,) = [row for row in RolloutStore(state.store, state.audit).all() if row.id == "r1"]
    finally:
        state.close()
    return float(stored.document["machine"]["gates"]["ceiling"]["units"])


def test_what_runs_is_changed_by_nobody_and_ends_with_its_section(place: Place) -> None:
    text = write(place, section(STANDING))
    with place.serve() as server:
        reaches(place, server, "step")
        softer = text.replace("max_rate: 10%", "max_rate: 90%")
        status, answer, _ = place.admin(server, "POST", "config", softer.encode())
        assert status == 400
        assert "gates cannot change while it runs" in answer["error"]
        status, answer, _ = place.admin(server, "POST", "config?dry_run=1", softer.encode())
        assert (status, answer["plan"]["allowed"]) == (200, False)
        place.apply(server, text + "telemetry: {logs: {level: warning}}\n")
        assert status_of(place, server)["state"] == "step"
        place.apply(server, place.text(""))
        found = reaches(place, server, "aborted")
        assert found["ended"]
        assert {ask(server, f"v{n}")[0] for n in range(50)} == {"1"}
        status, answer, _ = place.admin(server, "POST", "config", softer.encode())
        assert status == 400
        assert "give the new one an id of its own" in answer["error"]
        status, answer, _ = place.admin(server, "POST", "config?dry_run=1", text.replace("id: r1", "id: r9").encode())
        assert [step["weight"] for step in answer["plan"]["rollouts"]["m"]] == [50]


def test_two_people_approve_and_the_trail_holds(place: Place) -> None:
    steps = "[{weight: 50%, certify: {ceiling: 5%}, approve: true}]"
    write(place, section(steps, more="approvals: 2, two_person: true"))
    with place.serve() as server, traffic(server) as callers:
        place.apply(server, place.text(""))
        text = place.text(section(steps, more="approvals: 2, two_person: true", name="r2"))
        text = text.replace("models:", defaults() + "models:", 1)
        status, answer, _ = place.admin(server, "POST", "config", text.encode(), x_tidegate_actor="ada")
        assert status == 200, answer
        reaches(place, server, "awaiting", rollout="r2")
        status, refused = order(place, server, "approve", "r2", x_tidegate_actor="ada")
        assert (status, "another person must" in refused["error"]) == (409, True)
        assert order(place, server, "approve", "r2", x_tidegate_actor="bob")[0] == 200
        assert status_of(place, server, "r2")["state"] == "awaiting"
        assert order(place, server, "approve", "r2", x_tidegate_actor="bob")[0] == 409
        done = rollout_command(place, server, "approve", "r2", "--actor", "cleo", "--json")
        assert json.loads(done)["state"] in {"promoting", "promoted"}
        reaches(place, server, "promoted", rollout="r2")
        done = rollout_command(place, server, "rollback", "r2", "--actor", "cleo", "--reason", "cold feet")
        assert "0% of requests" in done
        reaches(place, server, "rolled_back", rollout="r2")
        assert {ask(server, f"v{n}")[0] for n in range(50)} == {"1"}
        assert "r2" in cli("rollout", "list", "--url", server.admin).stdout
        assert "ceiling" in cli("rollout", "status", "r2", "--url", server.admin).stdout
        page = call(server.metrics, "GET", "/metrics")[1].decode()
        assert 'tidegate_rollout_state{model="m",id="r2",state="rolled_back"} 1' in page
        eventually(lambda: audited(place, server)[-1]["action"] == "rollout.rolled_back")
        actors = {event["actor"] for event in audited(place, server)}
        assert {"ada", "bob", "cleo", "tidegate"} <= actors
    assert not callers.failures
    assert cli("audit", "verify", "--state-dir", str(place.state)).returncode == 0


def rollout_command(place: Place, server: Server, *words: str) -> str:
    return cli("rollout", *words, "--url", server.admin, "--state-dir", str(place.state)).stdout


def test_a_challenger_climbs_to_champion_and_a_person_goes_first(tmp_path: Path) -> None:
    place = Registered(tmp_path)
    place.publish(2.0, "champion")
    place.write(
        section(candidate='"@challenger"', more="keep_warm: 1s, shadow: {pairs: 50, rps: 1000}", gates=SHADOWED)
    )
    with place.serve() as server, traffic(server) as callers:
        place.publish(2.0, "challenger", shift=1e-9)
        reaches(place, server, "promoted", rollout="r1-2", seconds=40)
        eventually(lambda: place.aliases() == {"champion": 2, "previous": 1})
        eventually(lambda: version_of(server) == "2")
        states = [event["action"].removeprefix("rollout.") for event in audited(place, server)]
        assert states[:5] == ["begun", "gated", "loading", "shadowing", "step"]
        place.publish(3.0, "challenger")
        found = reaches(place, server, "hold", rollout="r1-3", seconds=40)
        assert "diverge" in found["reason"]
        assert status_of(place, server, "r1-2")["state"] == "promoted"
        place.alias("champion", "1")
        found = reaches(place, server, "aborted", rollout="r1-3")
        assert "champion was moved" in found["reason"]
        eventually(lambda: version_of(server) == "1")
    assert not callers.failures


@pytest.mark.parametrize("keep_warm", ["10m", "0s"])
def test_what_was_stable_is_kept_no_longer_than_the_rollout_needs_it(tmp_path: Path, keep_warm: str) -> None:
    """Promoted and taken back, or promoted for good at once: what nobody names any more goes as it always does.

    For good at once, the champion also moves on faster than versions are loaded: what answers stays until another does.
    """
    place = Registered(tmp_path)
    place.publish(2.0, "champion")
    steps = "[{weight: 50%, approve: true}]"
    place.write(section(steps, candidate='"@challenger"', more=f"keep_warm: {keep_warm}"))
    with place.serve() as server, traffic(server) as callers:
        place.publish(2.0, "challenger", shift=1e-9)
        reaches(place, server, "awaiting", rollout="r1-2")
        assert order(place, server, "approve", "r1-2", x_tidegate_actor="ada")[0] == 200
        reaches(place, server, "promoted", rollout="r1-2")
        if keep_warm != "0s":
            assert order(place, server, "rollback", "r1-2", x_tidegate_actor="ada")[0] == 200
            reaches(place, server, "rolled_back", rollout="r1-2")
        for version in ("3", "4", "5"):
            place.publish(float(version), "champion")
            if keep_warm != "0s":
                eventually(partial(is_served, server, version))
        eventually(partial(is_served, server, "5"))
        eventually(lambda: ready_versions(server) == {"4", "5"})
    assert not callers.failures


def ready_versions(server: Server) -> set[str]:
    _, rows, _ = call(server.http, "POST", "/v2/repository/index", {"ready": True})
    return {row["version"] for row in rows}


SHADOWED = (
    "{errors: {event: error, worse_than: 1.2}, ceiling: {event: error, max_rate: 10%}, "
    "diverge: {paired: disagree, max_rate: 20%, action: hold}}"
)


class Registered(Place):
    """A place whose model is the embedded registry's."""

    def text(self, more: str, versions: str = "", stable: str = "") -> str:
        registry = "registry: {embedded: true, poll_interval: 200ms}\n"
        return f"apiVersion: tidegate/v1\n{registry}{defaults()}models:\n  m:\n{more}"

    def publish(self, scale: float, alias: str, shift: float = 0.0) -> None:
        path = models.affine(self.root / f"{scale}-{shift}.onnx", scale, shift)
        quickly("registry", "publish", "m", str(path), "--state-dir", str(self.state), "--alias", alias)

    def alias(self, alias: str, version: str) -> None:
        quickly("registry", "alias", "m", alias, version, "--state-dir", str(self.state))

    def aliases(self) -> dict[str, int]:
        state = open_state(self.state)
        try:
            return dict(state.registry.aliases("m"))
        finally:
            state.close()


def is_served(server: Server, version: str) -> bool:
    return version_of(server) == version


def version_of(server: Server) -> str:
    status, _, headers = call(server.http, "POST", "/v2/models/m/infer", {"inputs": X}, {"x-user": "somebody"})
    assert status == 200
    return headers["x-tidegate-version"]
