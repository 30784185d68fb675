"""The drift monitor on live traffic: real servers, real sockets, profiles from files and from the registry."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitor.profile import ReferenceProfile
from monitor.types import Array
from tests.support import models
from tests.support.cli import quickly
from tests.support.metrics import samples, total
from tests.support.server import Server, serving
from tests.support.v2 import call, infer, tensor

WIDTH = 4
DROPPED = "tidegate_monitor_rows_dropped_total"


def normal(rows: int, seed: int, shift: float = 0.0) -> Array:
    """Rows of standard normal values; column 2 is moved by ``shift``."""
    values = np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype("f4")
    values[:, 2] += shift
    return values


def save_profile(path: Path, scale: float = 2.0, seed: int = 1) -> ReferenceProfile:
    """The profile of ``models.affine`` with this scale and no shift."""
    rows = normal(20_000, seed)
    profile = ReferenceProfile.from_arrays({"x": rows}, {"y": scale * rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.save(path)
    return profile


def send(server: Server, rows: Array, model: str = "m", version: str = "", chunk: int = 50) -> str:
    """Every row once; the version that answered the last."""
    answered = ""
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        status, body = infer(
            server.http, model, [tensor("x", "FP32", list(part.shape), part.ravel().tolist())], version
        )
        assert status == 200, body
        answered = body["model_version"]
    return answered


def eventually(check: Callable[[], bool], what: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def counted(server: Server, wanted: int) -> None:
    """Wait until the monitor has counted all rows that were offered, and there are so many of them."""

    def settled() -> bool:
        return total(server, "tidegate_monitor_rows_total") == wanted and not total(server, "tidegate_monitor_lag_rows")

    eventually(settled, f"{total(server, 'tidegate_monitor_rows_total')} rows were offered, not {wanted}")


class Place:
    """A folder with versions of ``m`` (x times 2, 3), their profiles, a configuration file and a state folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.state, self.path = root, root / "state", root / "config.yaml"
        for version, scale in (("1", 2.0), ("2", 3.0)):
            models.affine(root / f"v{version}.onnx", scale, 0.0)
            save_profile(root / f"p{version}.tgp", scale)

    def text(self, monitor: str = "", more: str = "", stable: str = "1") -> str:
        versions = ", ".join(f'"{v}": {{source: {self.root}/v{v}.onnx}}' for v in "12")
        profiles = ", ".join(f'"{v}": {self.root}/p{v}.tgp' for v in "12")
        return (
            f'apiVersion: tidegate/v1\nmodels:\n  m:\n    versions: {{{versions}}}\n    stable: "{stable}"\n'
            f"    monitor: {{profiles: {{{profiles}}}{monitor}}}\n{more}"
        )

    def serve(self, text: str) -> Any:
        self.path.write_text(text)
        return serving(str(self.path), "--state-dir", str(self.state))

    def admin(self, server: Server, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {(self.state / 'admin-token').read_text().strip()}"}
        status, answer, _ = call(server.admin, method, f"/admin/v1/{path}", body, headers)
        return status, answer

    def apply(self, server: Server, text: str) -> dict[str, Any]:
        status, answer = self.admin(server, "POST", "config", text.encode())
        assert status == 200, answer
        return dict(answer["plan"])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def rows_of(server: Server, version: str, name: str = "tidegate_monitor_rows_total") -> float:
    return samples(server, name).get(f'{{model="m",version="{version}"}}', 0)


def arms_of(server: Server, version: str) -> set[str]:
    """The arms that a version has gauges of."""
    found = samples(server, "tidegate_drift_psi_max")
    return {key.split('arm="')[1].split('"')[0] for key in found if f'version="{version}"' in key}


def page(server: Server) -> dict[str, float]:
    """Every sample of one page, by its name and labels: gauges that belong together move from page to page."""
    _, text, _ = call(server.metrics, "GET", "/metrics")
    lines = [line.rpartition(" ") for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_shifted_traffic_raises_an_alarm_with_the_right_feature_first(tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "m" / "1"
    models.affine(folder / "model.onnx", 2, 0)
    ReferenceProfile.from_arrays({"x": normal(20_000, 1)}).save(folder / "profile.tgp")
    state = tmp_path / "state"
    with serving("--model-repository", str(tmp_path / "repository"), "--state-dir", str(state)) as server:
        send(server, normal(2000, 2))
        counted(server, 2000)
        send(server, normal(2000, 3, shift=0.5))
        raised = server.wait_for("drift_raised")
        assert (raised["model"], raised["version"], raised["arm"], raised["feature"]) == ("m", "1", "stable", "x[2]")
        assert raised["psi"] > 0.02
        label = '{model="m",version="1",arm="stable",feature="x[2]"}'
        eventually(lambda: samples(server, "tidegate_drift_alarm").get(label) == 1, "the gauge does not show the alarm")
        alarms = samples(server, "tidegate_drift_alarm")
        assert sum(alarms.values()) == 1
        assert len(alarms) == WIDTH
        told = page(server)
        for window in ("1000rows", "10000rows"):
            column = f'{{model="m",version="1",arm="stable",feature="x[2]",window="{window}"}}'
            largest = f'{{model="m",version="1",arm="stable",window="{window}"}}'
            assert told[f"tidegate_drift_psi{column}"] == told[f"tidegate_drift_psi_max{largest}"]

        def audited() -> bool:
            token = (state / "admin-token").read_text().strip()
            _, trail, _ = call(server.admin, "GET", "/admin/v1/audit", None, {"Authorization": f"Bearer {token}"})
            return any(row["action"] == "drift.raised" and row["subject"] == "m:1" for row in trail["events"])

        eventually(audited, "the alarm is not in the audit trail")


def shown(place: Place, server: Server) -> dict[str, Any]:
    """What the admin address tells of version 1."""
    status, document = place.admin(server, "GET", "monitors/m/1")
    assert status == 200, document
    return dict(document)


def test_windows_survive_a_restart_and_damage_only_starts_anew(place: Place) -> None:
    with place.serve(place.text()) as server:
        send(server, normal(2000, 2, shift=0.5))
        counted(server, 2000)
        server.wait_for("drift_raised")
        eventually(lambda: shown(place, server)["report"]["counted"] == {"stable": 2000}, "not all rows were counted")
        before = shown(place, server)
        assert {(row["column"], row["state"]) for row in before["alarms"]} >= {("x[2]", "raised")}
        assert before["history"]["windows"]
        eventually(lambda: 'window="10000rows"' in str(samples(server, "tidegate_drift_psi")), "no gauges")
        server.terminate()
        assert server.wait() == 0
    with place.serve(place.text()) as server:
        eventually(lambda: bool(samples(server, "tidegate_drift_alarm")), "nothing was restored")
        alarms = samples(server, "tidegate_drift_alarm")
        assert alarms['{model="m",version="1",arm="stable",feature="x[2]"}'] == 1
        assert not [line for line in server.lines if line.get("event") in ("monitor_starts_anew", "drift_raised")]
        after = shown(place, server)
        assert {part: after[part] for part in ("alarms", "history")} == {
            part: before[part] for part in ("alarms", "history")
        }
        quickly("monitor", "report", "--model", "m:1", "--url", server.admin, "--html", str(place.root / "p.html"))
        listed = (place.root / "p.html").read_text().partition("<h2>Alarm history</h2>")[2].partition("</section>")[0]
        assert ("raised" in listed, "x[2]" in listed) == (True, True)
        server.terminate()
        assert server.wait() == 0
    files = list((place.state / "monitors" / "m").glob("1-*.state"))
    assert len(files) == 1
    files[0].write_bytes(files[0].read_bytes()[:-7])
    with place.serve(place.text()) as server:
        assert server.wait_for("monitor_starts_anew")["version"] == "1"
        assert shown(place, server)["alarms"] == []
        assert send(server, normal(100, 4)) == "1"
        counted(server, 100)


def test_a_reload_keeps_counts_unless_the_monitor_changes(place: Place) -> None:
    with place.serve(place.text()) as server:
        send(server, normal(1000, 2))
        counted(server, 1000)
        plan = place.apply(server, place.text(more="    tenant_header: x-tenant\n"))
        assert plan["recounts"] == []
        send(server, normal(500, 3))
        counted(server, 1500)
        plan = place.apply(server, place.text(", min_effect: {psi: 0.5}"))
        assert (plan["changed"]["m"], plan["recounts"]) == (["monitor", "routing"], ["m"])
        assert total(server, "tidegate_monitor_rows_total") == 0
        send(server, normal(500, 4))
        counted(server, 500)
        status, answer = place.admin(
            server, "POST", "config", place.text(", profile: absent.tgp, profiles: {}").encode()
        )
        assert status == 400, answer
        place.apply(server, place.text(", enabled: false"))
        send(server, normal(500, 5))
        assert total(server, "tidegate_monitor_rows_total") == 0


def test_a_swap_counts_no_row_against_the_wrong_profile(place: Place) -> None:
    """Callers ask while stable goes to and fro; every row is counted for the version that answered it, and once."""
    answered: Counter[str] = Counter()
    done = threading.Event()

    def ask(seed: int) -> None:
        stream = np.random.default_rng(seed)
        while not done.is_set():
            version = send(server, stream.standard_normal((40, WIDTH)).astype("f4"), chunk=40)
            with lock:
                answered[version] += 40

    lock = threading.Lock()
    with place.serve(place.text()) as server:
        callers = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
        for thread in callers:
            thread.start()
        try:
            for stable in "2121":
                before = answered[stable]
                place.apply(server, place.text(stable=stable))
                eventually(lambda v=stable, n=before: answered[v] > n + 800, "the swap is not seen")  # type: ignore[misc]
        finally:
            done.set()
            for thread in callers:
                thread.join(30)
        counted(server, sum(answered.values()))
        assert {version: rows_of(server, version) for version in "12"} == answered
        assert not total(server, "tidegate_monitor_rows_dropped_total")
        # The versions' outputs differ by half: any row under the other's profile would show as drift.
        assert not [line for line in server.lines if line.get("event") == "drift_raised" and "y" in line["feature"]]


def test_a_canary_and_a_shadow_are_arms_of_their_own(place: Place) -> None:
    more = (
        '    key: {from: [header:x-user]}\n    rollout: {id: r1, candidate: "2", weight: 50%}\n'
        '    shadow: [{to: "1", sample: 100%, budget: {rps: 100000, queue: 4096, yield_above_load: 1.0}}]\n'
    )
    with place.serve(place.text(more=more)) as server:
        server.wait_for("shadow_ready")
        body = {"inputs": [tensor("x", "FP32", [50, WIDTH], normal(50, 7).ravel().tolist())]}
        for user in range(120):
            status, _, _ = call(server.http, "POST", "/v2/models/m/infer", body, {"x-user": f"u{user}"})
            assert status == 200
        eventually(lambda: len(arms_of(server, "1")) == 3, f"arms of stable's profile: {arms_of(server, '1')}")
        assert arms_of(server, "1") == {"stable", "shadow", "candidate"}
        eventually(lambda: bool(arms_of(server, "2")), "no arms of the candidate's profile")
        assert arms_of(server, "2") == {"candidate"}


def test_profiles_of_the_registry_follow_the_champion(tmp_path: Path) -> None:
    state = tmp_path / "state"

    def publish(scale: float) -> None:
        folder = tmp_path / f"v{scale}"
        models.affine(folder / "model.onnx", scale, 0.0)
        save_profile(folder / "profile.tgp", scale)
        quickly("registry", "publish", "m", str(folder), "--state-dir", str(state), "--alias", "champion")

    publish(2.0)
    with serving("--state-dir", str(state)) as server:
        send(server, normal(1000, 2))
        counted(server, 1000)
        publish(3.0)
        asking = iter(normal(10_000, 3).reshape(-1, 1, WIDTH))  # no row twice: that would be a drift
        eventually(lambda: send(server, next(asking)) == "2", "the promotion was not followed")
        before = rows_of(server, "1")
        send(server, normal(1000, 4))
        eventually(lambda: rows_of(server, "2") >= 1000, "the new champion is not counted")
        assert rows_of(server, "1") == before
        assert {line["version"] for line in server.lines if line.get("event") == "monitor_attached"} == {"1", "2"}
        assert not [line for line in server.lines if line.get("event") == "drift_raised"]


def test_a_profile_that_does_not_fit_refuses_the_version(tmp_path: Path) -> None:
    for version in "12":
        folder = tmp_path / "repository" / "m" / version
        models.affine(folder / "model.onnx", 2, 0)
        if version == "2":
            ReferenceProfile.from_arrays({"other": normal(1000, 1)}).save(folder / "profile.tgp")
    (tmp_path / "repository" / "m" / "config.pbtxt").write_text("version_policy: { all {} }\n")
    options = ("--model-repository", str(tmp_path / "repository"), "--state-dir", str(tmp_path / "state"))
    with serving(*options) as server:
        refused = server.wait_for("model_load_failed", version="2")
        assert "profile.tgp" in refused["error"]
        assert "other" in refused["error"]
        assert send(server, normal(10, 1)) == "1"


class HungDisk:
    """Has the monitor's next save hang, as on a disk that does not answer: the file it writes to is a pipe.

    The drain thread, which saves, stands still until ``answer`` reads the pipe to its end.
    """

    def __init__(self, server: Server, saved: Path) -> None:
        self.path = saved.with_name(f".{saved.name}.{server.process.pid}.tmp")
        os.mkfifo(self.path)

    def answer(self) -> None:
        with self.path.open("rb") as pipe:
            while pipe.read(65536):
                pass


def resident(server: Server) -> int:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(180)
def test_a_drain_thread_that_hangs_costs_rows_of_the_monitor_and_nothing_else(place: Place) -> None:
    """Under load from three callers: all are answered, memory stays, drops are exact and said, and counting resumes."""
    labels = ", ring: {rows: 5000}, labels: {task: regression, output: y, capacity: 5000}"
    with place.serve(place.text(labels)) as server:
        send(server, normal(1000, 2))
        counted(server, 1000)
        server.terminate()
        assert server.wait() == 0
    (saved,) = (place.state / "monitors" / "m").glob("1-*.state")
    with place.serve(place.text(labels)) as server:
        disk = HungDisk(server, saved)
        send(server, normal(3000, 3, shift=1.0))
        server.wait_for("drift_raised")  # which is told of right before it is saved: nothing is drained from here on
        sent = 3000
        bodies = [
            {"inputs": [tensor("x", "FP32", [64, WIDTH], np.round(normal(64, seed), 2).ravel().tolist())]}
            for seed in range(3)
        ]

        def load(seed: int, requests: int) -> None:
            for _ in range(requests):
                status, _, _ = call(server.http, "POST", "/v2/models/m/infer", bodies[seed])
                answered.append(status)

        answered: list[int] = []
        sizes = []
        for _ in range(4):
            callers = [threading.Thread(target=load, args=(seed, 90)) for seed in range(3)]
            for thread in callers:
                thread.start()
            for thread in callers:
                thread.join(60)
            sizes.append(resident(server))
        assert answered == [200] * 1080
        sent += 1080 * 64
        waiting, dropped = total(server, "tidegate_monitor_lag_rows"), rows_of(server, "1", DROPPED)
        assert 0 < waiting <= 5000
        assert dropped == total(server, "tidegate_monitor_rows_total") - waiting - counted_by_now(place, server) > 0
        assert sizes[-1] - sizes[1] < 16_000_000  # the queues are full by then

        disk.answer()
        assert "Errno" in server.wait_for("monitor_not_saved")["error"]  # a pipe cannot be flushed to a disk
        counted(server, sent)
        sent += 1000
        send(server, normal(1000, 8))  # closes the panes in which rows were lost
        counted(server, sent)
        _, document = place.admin(server, "GET", "monitors/m/1")
        report = document["report"]
        assert report["counted"]["stable"] + dropped == sent + 1000
        assert report["dropped"] == {"stable": dropped}
        assert all(window["sampled"] for window in report["windows"] if window["arm"] == "stable")
        (group,) = document["performance"]["join"]["groups"]
        assert group["predicted"] + document["performance"]["join"]["dropped_rows"] == sent + 1000
        assert document["performance"]["join"]["dropped_rows"] > 0

        for seed in range(12):  # as much as the longest window holds, and never more than the ring
            send(server, normal(1000, 20 + seed))
            sent += 1000
            counted(server, sent)
        _, document = place.admin(server, "GET", "monitors/m/1")
        assert document["report"]["counted"]["stable"] == report["counted"]["stable"] + 12_000
        windows = [window for window in document["report"]["windows"] if window["arm"] == "stable"]
        assert windows
        assert not any(window["sampled"] for window in windows)
        server.terminate()
        assert server.wait() == 0
    assert not disk.path.exists()


def counted_by_now(place: Place, server: Server) -> int:
    _, document = place.admin(server, "GET", "monitors/m/1")
    return int(document["report"]["counted"]["stable"]) - 1000
