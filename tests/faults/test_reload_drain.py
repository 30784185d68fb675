"""Reloads of a live server over versions that hang: the drain ends, nobody waits for them, going back loads nothing.

The version that hangs is a second real server, stopped by a signal while it has requests.
"""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.metrics import samples, total
from tests.support.routed import Place, X, ask, canary, eventually
from tests.support.server import Server, serving
from tests.support.v2 import call

RELOAD = "defaults: {reload: {drain: 300ms, keep_warm: 0s}}\n"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """The process takes connections and does nothing."""
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


def with_upstream(place: Place, address: str) -> str:
    """Version 2 is another server's, and half of the users are its."""
    upstream = f'      "2": {{upstream: {{url: "http://{address}", model: v2}}}}\n    stable'
    return RELOAD + place.text(canary("50%"), versions="1").replace("    stable", upstream, 1)


def test_a_replaced_version_that_hangs_is_given_up(place: Place) -> None:
    with serving(str(place.root / "v2.onnx"), "--state-dir", str(place.root / "other")) as upstream:
        place.path.write_text(with_upstream(place, upstream.http))
        with place.serve() as server, ThreadPoolExecutor(8) as threads:
            users = [f"u{n}" for n in range(60)]
            candidates = [user for user in users if ask(server, user)[0] == "2"][:3]
            with stopped(upstream):
                named = threads.submit(call, server.http, "POST", "/v2/models/m/versions/2/infer", {"inputs": X}, {})
                split: list[Future[Any]] = [threads.submit(ask, server, user) for user in candidates]
                eventually(lambda: total(server, "tidegate_requests_in_flight") >= 4)
                place.apply(server, RELOAD + place.text("", versions="1"))
                status, body, headers = named.result(20)
                assert status == 503
                assert "'m' version 2 was replaced, and 0.3 s later, the limit of its drain" in body["error"]
                assert int(headers["retry-after"]) >= 1
                # What fell to the candidate is answered by stable, of the table that it was routed with.
                first = {future.result(20) for future in split}
                assert {(version, arm) for version, arm, _ in first} == {("1", "stable")}
                assert {generation for *_, generation in first} == {1}
                assert samples(server, "tidegate_drain_cancelled_total") == {'{model="m"}': 4}
                place.apply(server, RELOAD + place.text("", versions="13", stable="3"))
                assert ask(server, "anybody")[0] == "3"
                server.terminate()
                assert server.wait(20) == 0


def test_going_back_a_generation_loads_nothing(place: Place) -> None:
    place.write(canary("50%"), versions="12")
    with place.serve() as server:
        before = {user: ask(server, user)[0] for user in ("a", "b", "c", "d", "e")}
        place.apply(server, place.text("", versions="3", stable="3"))
        assert ask(server, "a")[0] == "3"
        rows = {row["version"]: row for row in call(server.http, "POST", "/v2/repository/index", {})[1]}
        assert rows["3"]["state"] == "READY"
        for version in ("1", "2"):
            assert rows[version]["state"] == "UNAVAILABLE"
            assert "kept warm until" in rows[version]["reason"]
        assert call(server.http, "GET", "/v2/models/m/versions/1/ready")[0] != 200
        loads = Counter(line["event"] for line in server.lines)["model_loading"]
        status, answer, _ = place.admin(server, "POST", "config:rollback?to=1")
        assert status == 200, answer
        assert {user: ask(server, user)[0] for user in before} == before
        for version in ("1", "2"):
            server.wait_for("model_ready", version=version, kept_warm=True)
        assert Counter(line["event"] for line in server.lines)["model_loading"] == loads
        place.apply(server, "defaults: {reload: {history: 2}}\n" + place.text("", versions="3", stable="3"))
        status, answer, _ = place.admin(server, "POST", "config:rollback?to=1")
        assert status == 400
        assert "generation 1 is too old" in answer["error"]
        server.terminate()
        assert server.wait(20) == 0


def test_a_load_that_hangs_does_not_hold_up_the_end(place: Place) -> None:
    """Its upstream takes the connection and says nothing, for longer than this test waits for the process."""
    place.path.write_text(place.text("", versions="1"))
    with socket.create_server(("127.0.0.1", 0)) as silent, place.serve() as server:
        silent.settimeout(20)
        place.path.write_text(with_upstream(place, "{}:{}".format(*silent.getsockname())))
        asked, _ = silent.accept()
        with asked:
            server.terminate()
            assert server.wait(10) == 0
        assert server.lines[-1]["event"] == "stopped"
