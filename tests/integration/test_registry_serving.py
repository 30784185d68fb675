"""Serving by alias from the embedded registry: commands in their own processes beside a live server."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.cli import cli, quickly
from tests.support.server import Server, serving
from tests.support.v2 import call, infer, tensor

X = [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])]


class Place:
    """A state folder, and a folder to make models in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = str(root / "state")

    def publish(self, scale: float, *more: str, model: str = "m", shift: float = 0.0) -> dict[str, Any]:
        path = models.affine(self.root / f"{model}-{scale}-{shift}.onnx", scale, shift)
        told = quickly("registry", "publish", model, str(path), "--state-dir", self.state, "--json", *more)
        return dict(json.loads(told))

    def alias(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return cli("registry", "alias", *args, "--state-dir", self.state, check=check)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def server(place: Place) -> Iterator[Server]:
    place.publish(2, "--alias", "champion")
    with serving("--state-dir", place.state) as running:
        yield running


def answer(server: Server, version: str = "", model: str = "m") -> tuple[int, str, list[float]]:
    """(status, version that answered, its data) of one request."""
    status, body = infer(server.http, model, X, version)
    if status != 200:
        return status, "", []
    return status, body["model_version"], body["outputs"][0]["data"]


def last_came_from(seen: list[tuple[int, str, list[float]]], version: str) -> bool:
    return seen[-1][1] == version


def eventually(check: Callable[[], bool], seconds: float = 60) -> None:
    """Ask again until the live server has seen the change; its poll is a second."""
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, "the server did not follow"
        time.sleep(0.05)


def test_promotion_moves_traffic_and_keeps_the_way_back(server: Server, place: Place) -> None:
    assert answer(server) == (200, "1", [2.0, 4.0, 6.0, 8.0])
    assert place.publish(3)["version"] == 2
    assert answer(server, "2")[0] == 404
    place.alias("m", "challenger", "2")
    eventually(lambda: answer(server, "2")[0] == 200)
    assert answer(server)[1] == "1"
    place.alias("m", "champion", "2")
    eventually(lambda: answer(server)[1] == "2")
    assert answer(server, "1") == (200, "1", [2.0, 4.0, 6.0, 8.0])
    aliases = json.loads(place.alias("m", "--json").stdout)
    assert {row["alias"]: row["version"] for row in aliases if row["version"]} == {"champion": 2, "previous": 1}
    place.alias("m", "champion", "1")
    eventually(lambda: answer(server)[1] == "1")


def test_no_request_fails_while_versions_come_go_and_fail(server: Server, place: Place) -> None:
    seen: list[tuple[int, str, list[float]]] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            seen.append(answer(server))

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for thread in callers:
        thread.start()
    try:
        for scale in (3.0, 4.0):
            version = str(place.publish(scale, "--alias", "champion")["version"])
            eventually(partial(last_came_from, seen, version))
        bad = place.root / "bad.onnx"
        bad.write_bytes(b"not a model at all")
        quickly("registry", "publish", "m", str(bad), "--alias", "champion", "--state-dir", place.state)
        server.wait_for("model_load_failed", model="m", version="4")
        before = len(seen)
        eventually(lambda: len(seen) > before + 50)
    finally:
        done.set()
        for thread in callers:
            thread.join(30)
    wanted = {"1": 2.0, "2": 3.0, "3": 4.0}
    for status, version, data in seen:
        assert status == 200
        assert data == [wanted[version] * x for x in (1, 2, 3, 4)]
    assert seen[-1][1] == "3"


def test_publishing_is_idempotent_and_versions_are_contiguous(place: Place) -> None:
    first, again, second = place.publish(2), place.publish(2), place.publish(5)
    assert (first["version"], again["version"], second["version"]) == (1, 1, 2)
    assert (first["created"], again["created"]) == (True, False)
    rows = json.loads(quickly("registry", "list", "m", "--state-dir", place.state, "--json"))
    assert [row["version"] for row in rows] == [1, 2]


def test_two_operators_race_for_one_alias(place: Place) -> None:
    for scale in (1, 2, 3):
        place.publish(scale)
    results: list[int] = []

    def move(version: int) -> None:
        results.append(place.alias("m", "challenger", str(version), "--expect", "0", check=False).returncode)

    threads = [threading.Thread(target=move, args=(version,)) for version in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 1]


def test_a_tampered_blob_is_refused_and_audited(place: Place) -> None:
    place.publish(2, "--alias", "champion")
    place.publish(3)
    manifest = json.loads(quickly("registry", "show", "m:2", "--state-dir", place.state))
    sha = manifest["files"][0]["sha256"]
    (blob,) = Path(place.state).rglob(sha)
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert cli("registry", "verify", "--state-dir", place.state, check=False).returncode == 1
    with serving("--state-dir", place.state) as server:
        place.alias("m", "champion", "2")
        failed = server.wait_for("model_load_failed", model="m", version="2")
        assert failed["error"]
        assert answer(server)[1] == "1"
        server.terminate()
        assert server.wait() == 0
    rows = json.loads(cli("audit", "tail", "--state-dir", place.state, "--json").stdout)
    assert ("model.refused", "m:2") in {(row["action"], row["subject"]) for row in rows}
    assert cli("audit", "verify", "--state-dir", place.state).returncode == 0


def test_audit_names_the_first_broken_row(place: Place) -> None:
    for scale in (1, 2, 3):
        place.publish(scale)
    database = sqlite3.connect(Path(place.state) / "tidegate.db")
    with database:
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {name}")
        database.execute("UPDATE audit SET actor = 'somebody else' WHERE seq = 2")
    database.close()
    done = cli("audit", "verify", "--state-dir", place.state, "--json", check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["broken"]["seq"] == 2


def test_fetch_gc_retire_and_unknown_things(place: Place, tmp_path: Path) -> None:
    place.publish(2, "--alias", "champion")
    place.publish(3)
    quickly("registry", "fetch", "m@champion", str(tmp_path / "out"), "--state-dir", place.state)
    assert (tmp_path / "out").is_dir()
    assert cli("registry", "retire", "m:1", "--state-dir", place.state, check=False).returncode == 1
    quickly("registry", "retire", "m:2", "--state-dir", place.state)
    quickly("registry", "gc", "--state-dir", place.state)
    quickly("registry", "verify", "--state-dir", place.state)
    for args in (["show", "nobody"], ["show", "m:9"], ["alias", "m", "champion", "9"], ["fetch", "m@nothing", "x"]):
        done = cli("registry", *args, "--state-dir", place.state, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


def test_nothing_published_is_said(tmp_path: Path) -> None:
    server = Server("--state-dir", str(tmp_path / "state"))
    try:
        assert server.wait() == 2
        assert any("registry publish" in line for line in server.raw)
    finally:
        server.kill()


def test_explicit_control_over_a_registry(place: Place) -> None:
    place.publish(2, "--alias", "champion")
    with serving("--state-dir", place.state, "--model-control", "explicit") as server:
        assert answer(server)[0] == 503
        assert call(server.http, "POST", "/v2/repository/models/m/load", {})[0] == 200
        assert answer(server)[1] == "1"


def test_a_version_that_does_not_fit_the_champion_is_refused(server: Server, place: Place) -> None:
    wide = models.affine(place.root / "wide.onnx", width=5)
    quickly("registry", "publish", "m", str(wide), "--alias", "challenger", "--state-dir", place.state)
    failed = server.wait_for("model_load_failed", model="m", version="2")
    assert "'x'" in failed["error"]
    assert answer(server)[1] == "1"


def test_a_version_that_is_not_what_was_declared_is_refused(server: Server, place: Place) -> None:
    about = place.root / "about.json"
    tensors = [{"name": "x", "datatype": "FP64", "shape": [-1, 4]}]
    about.write_text(json.dumps({"signature": {"inputs": tensors, "outputs": tensors}}))
    place.publish(9, "--alias", "champion", "--description", str(about))
    failed = server.wait_for("model_load_failed", model="m", version="2")
    assert failed["error"]
    assert answer(server)[1] == "1"
