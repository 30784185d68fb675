"""Several servers over one state folder: one of them works on its rollouts, and the others leave them alone."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from tests.support.climbing import STANDING, audited, defaults, order, reaches, section, status_of, traffic, write
from tests.support.routed import Place, ask
from tests.support.server import Server, serving

TAKEN = "another process works on the rollouts of this state folder"


def test_a_rollout_has_one_process(tmp_path: Path) -> None:
    place = Place(tmp_path)
    without = place.text("")
    text = place.text(section(STANDING)).replace("models:", defaults() + "models:", 1)
    place.path.write_text(text)
    bystander = tmp_path / "bystander.yaml"
    bystander.write_text(without)
    with place.serve() as server, traffic(server) as callers:
        reaches(place, server, "step")
        with serving(str(bystander), "--state-dir", str(place.state)) as other:
            status, answer, _ = place.admin(other, "POST", "config", text.encode())
            assert status == 400
            assert TAKEN in answer["error"]
            assert status_of(place, server)["state"] == "step"
        second = Server(str(place.path), "--state-dir", str(place.state))
        try:
            assert second.wait() == 2
        finally:
            second.kill()
        assert status_of(place, server)["state"] == "step"
        assert "rollout.aborted" not in {event["action"] for event in audited(place, server)}
        server.kill()
    assert callers.versions["2"]
    with place.serve() as again:
        assert status_of(place, again)["state"] != "aborted"


def test_a_plan_keeps_no_other_server_from_its_rollouts(tmp_path: Path) -> None:
    """A server without rollouts is asked what a configuration with some would do, and is refused another."""
    place = Place(tmp_path)
    place.path.write_text(place.text(""))
    text = place.text(section(STANDING)).replace("models:", defaults() + "models:", 1)
    with place.serve() as bystander:
        status, found, _ = place.admin(bystander, "POST", "config?dry_run=1", text.encode())
        assert status == 200, found
        assert place.admin(bystander, "POST", "config", text.replace("v2.onnx", "none.onnx").encode())[0] >= 400
        climbing = tmp_path / "climbing.yaml"
        climbing.write_text(text)
        with serving(str(climbing), "--state-dir", str(place.state)) as server, traffic(server):
            reaches(place, server, "step")


def test_what_is_damaged_on_disk_concerns_nothing_else(tmp_path: Path) -> None:
    """Another rollout's row takes no promotion back; and one that cannot be read is not begun over under its id."""
    place = Place(tmp_path)
    write(place, section("[{weight: 50%, approve: true}]", more="keep_warm: 0s"))
    with place.serve() as server, traffic(server):
        reaches(place, server, "awaiting")
        assert order(place, server, "approve", x_tidegate_actor="ada")[0] == 200
        reaches(place, server, "promoted")
        server.terminate()
        assert server.wait() == 0
    on_disk(place, "INSERT INTO rollout_state VALUES ('old', 'n', 't', 'd', 1, 'aborted', NULL, 0, 0, 0, '{\"mach')")
    with place.serve() as server:
        assert ask(server, "anybody")[0] == "2"
        status, found, _ = place.admin(server, "GET", "rollouts")
        assert status == 200
        assert {row["id"]: row["state"] for row in found["rollouts"]} == {"r1": "promoted", "old": "aborted"}
        assert order(place, server, "clear", "old", x_tidegate_actor="ada")[0] == 200
    on_disk(place, "UPDATE rollout_state SET document = '[]' WHERE id = 'r1'")
    with place.serve() as server:
        found = reaches(place, server, "waiting")
        assert found["reason"] == (
            "what was written down of rollout 'r1' (promoted) cannot be read; give the new one an id of its own"
        )
        assert ask(server, "anybody")[0] == "1"
        assert place.apply(server, place.path.read_text().replace("id: r1", "id: r2"))["generation"] > 1
        assert reaches(place, server, "step", rollout="r2")["weight"] == 50


def on_disk(place: Place, statement: str) -> None:
    with closing(sqlite3.connect(place.state / "tidegate.db")) as connection, connection:
        connection.execute(statement)
