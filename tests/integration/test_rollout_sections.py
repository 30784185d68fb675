"""What a rollout's section asks for, on a live server: the start, the control, drift, keys, and the plan beforehand."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitor.profile import ReferenceProfile
from tests.support.cli import cli
from tests.support.climbing import (
    GATES,
    STANDING,
    STEPS,
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
from tests.support.v2 import call, tensor


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def gate(place: Place, server: Server, name: str) -> dict[str, Any]:
    return next(found for found in status_of(place, server)["gates"] if found["gate"] == name)


# --- control: all -----------------------------------------------------------------------------------------------------


def test_with_control_all_the_candidate_is_compared_with_all_of_stable(place: Place) -> None:
    """At 10 % stable has nine tenths of the keys that are compared; by the spread of keys that is as it should be."""
    steps = STANDING.replace("50%", "10%")
    gates = GATES.replace("{errors", "{srm: {alpha: 0.001, action: hold}, errors")
    with upstream(scaled(3.0), 64) as other:
        write_with_upstream(place, other, section(steps, gates, "control: all"))
        with place.serve() as server:
            reaches(place, server, "step")
            arms = Counter(ask(server, f"u{number}")[1] for number in range(400))
            assert set(arms) == {"candidate", "stable"}
            eventually(lambda: sum(gate(place, server, "srm")[side][0] for side in ("candidate", "stable")) == 400)
            srm = gate(place, server, "srm")
            assert (srm["candidate"][0], srm["stable"][0]) == (arms["candidate"], arms["stable"])
            assert status_of(place, server)["state"] == "step"
            with traffic(server) as callers:
                other.behave = refusing(500)
                found = reaches(place, server, "rolled_back")
            assert found["reason"].startswith("worse by")
            # Stable answered the others, without an error.
            assert callers.versions["1"] > 0
            errors = next(one for one in found["gates"] if one["gate"] == "errors")
            assert errors["stable"][1] == 0
            assert errors["candidate"][1] > 0


@pytest.mark.slow
def test_with_control_all_a_good_candidate_climbs(place: Place) -> None:
    write(place, section(more="control: all"))
    with place.serve() as server, traffic(server) as callers:
        reaches(place, server, "promoted")
    assert not callers.failures


# --- start ------------------------------------------------------------------------------------------------------------


def test_a_candidate_is_warmed_with_batches_of_the_sizes_asked_for(place: Place) -> None:
    with upstream(scaled(3.0), 64) as other:
        write_with_upstream(place, other, section(STANDING, more="start: {warm: [3, 17, 200]}"))
        with place.serve() as server:
            reaches(place, server, "step")
            warmed = [rows for _, rows in other.asked if not rows.any()]
            assert [len(rows) for rows in warmed][-3:] == [3, 17, 64]  # no more than a batch may have


def test_a_candidate_that_fails_while_it_is_warmed_gets_no_request(place: Place) -> None:
    def breaks_at_eight(x: Any) -> bytes:
        return refusing(500)(x) if len(x) == 8 else scaled(3.0)(x)

    with upstream(breaks_at_eight, 64) as other:
        write_with_upstream(place, other, section(STANDING, more="start: {warm: [1, 8]}"))
        with place.serve() as server, traffic(server) as callers:
            found = reaches(place, server, "failed")
            assert found["reason"].startswith("warm-up with 8 rows: ")
            assert found["weight"] == 0
            assert {ask(server, f"v{n}")[0] for n in range(50)} == {"1"}
        assert not callers.failures
        assert set(callers.versions) == {"1"}


@pytest.mark.parametrize(("scale", "state"), [(3.0, "step"), (2.0, "failed")])
def test_golden_requests_decide_whether_a_candidate_begins(place: Place, scale: float, state: str) -> None:
    answers = [tensor("y", "FP32", [1, 4], [scale * x for x in (1, 2, 3, 4)])]
    (place.root / "golden.json").write_text(json.dumps({"requests": [{"inputs": X, "outputs": answers}]}))
    write(place, section(STANDING, more="start: {golden: golden.json}"))
    with place.serve() as server:
        found = reaches(place, server, state)
        assert ("golden.json" in found["reason"]) == (state == "failed")
        versions = {ask(server, f"v{n}")[0] for n in range(50)}
        assert versions == ({"1"} if state == "failed" else {"1", "2"})


# --- drift ------------------------------------------------------------------------------------------------------------


def watched(place: Place, action: str, window: int, more: str = "", steps: str = STANDING) -> str:
    """Version 2 has a profile of normal values, which the callers' requests are not like. The text that is written."""
    rows = np.random.default_rng(1).standard_normal((5_000, 4)).astype("f4")
    ReferenceProfile.from_arrays({"x": rows}, {"y": 3 * rows}).save(place.root / "p2.tgp")
    gates = GATES.replace("{errors", f"{{drift: {{monitor: psi, over: 0.25, for: 3, action: {action}}}, errors")
    monitor = f'    monitor: {{profiles: {{"2": {place.root}/p2.tgp}}, windows: [{window}]}}\n'
    return write(place, section(steps, gates, more) + monitor)


@pytest.mark.parametrize(("action", "state"), [("rollback", "rolled_back"), ("hold", "hold")])
def test_drift_of_the_candidates_traffic_speaks(place: Place, action: str, state: str) -> None:
    watched(place, action, 200)
    with place.serve() as server:
        reaches(place, server, "step")
        with traffic(server) as callers:
            found = reaches(place, server, state)
            if action == "hold":
                assert order(place, server, "resume")[0] == 200  # the gate begins anew, and hears the same
                reaches(place, server, "hold")
        assert found["reason"] == ("held by drift" if action == "hold" else "worse by drift")
        drift = next(one for one in found["gates"] if one["gate"] == "drift")
        assert drift["candidate"][0] >= 3
        assert drift["estimate"] > 0.25
        assert not callers.failures
        if action == "hold":
            assert order(place, server, "resume")[0] == 200
            time.sleep(1)
            assert status_of(place, server)["state"] == "step"  # without new rows there is nothing to look at


@pytest.mark.slow
def test_drift_takes_back_what_is_promoted_while_the_version_before_is_warm(place: Place) -> None:
    """Drift of before says nothing: not what came under a version's own number, and not what it was warmed with."""
    text = watched(place, "rollback", 200, "start: {warm: [64, 64, 64, 64]}", "[{weight: 50%, approve: true}]")
    place.path.write_text("".join(line for line in text.splitlines(keepends=True) if "rollout:" not in line))
    with place.serve() as server:
        infer = "/v2/models/m/versions/2/infer"
        assert {call(server.http, "POST", infer, {"inputs": X})[0] for _ in range(300)} == {200}
        place.apply(server, text)
        eventually(lambda: "2" in [ask(server, f"w{number}")[0] for number in range(20)])
        reaches(place, server, "awaiting")
        assert order(place, server, "approve")[0] == 200
        reaches(place, server, "promoted")
        time.sleep(1)
        found = next(one for one in status_of(place, server)["gates"] if one["gate"] == "drift")
        assert (found["verdict"], found["candidate"][0]) == ("unknown", 0)
        with traffic(server) as callers:
            found = reaches(place, server, "rolled_back")
        assert found["reason"] == "worse by drift"
        assert not callers.failures
        eventually(lambda: ask(server, "anybody")[0] == "1")


def test_drift_says_nothing_before_its_window_is_full(place: Place) -> None:
    """Neither worse nor good enough: the rollout stays, and after a while waits for people."""
    watched(place, "rollback", 100_000, "inconclusive: {after: 2s}")
    with place.serve() as server:
        reaches(place, server, "step")
        with traffic(server) as callers:
            found = reaches(place, server, "hold")
        assert found["reason"].startswith("inconclusive: not shown: ceiling under")
        assert callers.versions["2"] > 0
        drift = next(one for one in found["gates"] if one["gate"] == "drift")
        assert (drift["verdict"], drift["candidate"][0]) == ("unknown", 0)
        assert "estimate" not in drift


# --- outcomes ---------------------------------------------------------------------------------------------------------


def test_one_sticky_user_takes_no_candidate_back_but_many_do(place: Place) -> None:
    """Outcomes of a user share that user's luck: however many there are, they count once."""
    gates = GATES.replace("{errors", "{chargeback: {feedback: chargeback, worse_than: 1.1}, errors")
    write(place, section(STANDING, gates))
    with place.serve() as server:
        reaches(place, server, "step")
        ours = [user for user in (f"u{number}" for number in range(300)) if ask(server, user)[1] == "candidate"]
        report(server, [ours[0]] * 100)
        eventually(lambda: gate(place, server, "chargeback")["candidate"][1] > 0)
        found = gate(place, server, "chargeback")
        assert (found["candidate"][1], found["verdict"]) == (1, "unknown")
        assert status_of(place, server)["state"] == "step"
        report(server, ours)
        assert reaches(place, server, "rolled_back")["reason"] == "worse by chargeback"


def report(server: Server, users: list[str]) -> None:
    """One more request of each user, each with a bad outcome."""
    ids = [
        call(server.http, "POST", "/v2/models/m/infer", {"inputs": X}, {"x-user": user})[2]["x-tidegate-id"]
        for user in users
    ]
    bad = [{"id": id_, "outcome": 1} for id_ in ids]
    status, answer, _ = call(server.http, "POST", "/v2/models/m/feedback", bad)
    assert (status, answer["joined"]) == (200, len(users))


# --- the plan ---------------------------------------------------------------------------------------------------------


def planned(place: Place, server: Server, new: Path) -> list[dict[str, Any]]:
    """The steps of ``m`` with what is expected of them, by a dry run of a file."""
    _, answer, _ = place.admin(server, "POST", "config?dry_run=1", new.read_bytes())
    return list(answer["plan"]["rollouts"]["m"])


def test_the_plan_of_a_first_rollout_reckons_with_the_traffic_of_now(place: Place, tmp_path: Path) -> None:
    """By the dry run, by check-config, and by the rollout itself once it runs: the same."""
    place.path.write_text(place.text(""))
    new = tmp_path / "new.yaml"
    new.write_text(place.text(section(STEPS)).replace("models:", defaults() + "models:", 1))
    against = ("check-config", str(new), "--against")
    with place.serve() as server:
        with traffic(server):
            # Far within what is asserted, so that it still is when it is asked for again.
            eventually(lambda: all((step["p90_s"] or 100) < 50 for step in planned(place, server, new)))
            steps = planned(place, server, new)
            assert [(step["weight"], step["gate"]) for step in steps] == [(30, "ceiling"), (60, "ceiling")]
            assert 0 < steps[0]["median_s"] <= steps[0]["p90_s"] < 100
            assert steps[1]["p90_s"] < steps[0]["p90_s"]
            told = json.loads(cli(*against, server.admin, "--token", place.token(), "--json").stdout)
            assert [step["gate"] for step in told["rollouts"]["m"]] == ["ceiling", "ceiling"]
            assert 0 < told["rollouts"]["m"][0]["p90_s"] < 100
            assert (told["allowed"], told["changed"]) == (True, {"m": ["routing"]})
            text = cli(*against, server.admin, "--token", place.token()).stdout
            row = next(line for line in text.splitlines() if line.startswith("m ") and "30%" in line)
            assert "not known" not in row
            place.apply(server, new.read_text())
            found = reaches(place, server, "step")
            assert [step["weight"] for step in found["plan"]] == [30, 60]
        text = cli(*against, server.admin).stdout
        assert "answers 401" in text
        softer = new.read_text().replace("max_rate: 10%", "max_rate: 90%")
        new.write_text(softer)
        done = cli(*against, server.admin, "--token", place.token(), check=False)
        assert done.returncode == 2
        assert "gates cannot change while it runs" in done.stdout or "has been used" in done.stdout
