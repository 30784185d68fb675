"""What operators, disks, crashes and bad shadows do to routing: callers notice nothing, and no reload lands by half."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from server.config.load import MAX_BYTES
from tests.integration.test_registry_serving import Place as RegistryPlace
from tests.support import metrics, models
from tests.support.cli import cli
from tests.support.routed import Place, X, ask, canary, eventually, shadow_report
from tests.support.server import ROOT, Server, serving
from tests.support.v2 import call

MIB = 2**20


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@contextmanager
def asked(work: Callable[[int], Any], threads: int = 3) -> Iterator[list[Any]]:
    """``work(n)`` again and again in some threads until the block ends; its results. The first failure is raised."""
    seen: list[Any] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def run(thread: int) -> None:
        n = thread
        try:
            while not done.is_set():
                seen.append(work(n))
                n += threads
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for caller in callers:
        caller.start()
    try:
        yield seen
    finally:
        done.set()
        for caller in callers:
            caller.join(30)
    if failures:
        raise failures[0]


def rss(server: Server) -> int:
    """Resident bytes of a server."""
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(server: Server) -> float:
    """Seconds that a server has computed: what else the machine does is no part of them."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sluggish(path: Path, size: int = 512, layers: int = 24) -> Path:
    """``y = x`` for FP32 [n, 4], after tens of milliseconds of matrix products for each row."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Unsqueeze", ["mean", "last"], ["cube"]),
        helper.make_node("Mul", ["cube", "zeros"], ["h0"]),
        *(helper.make_node("MatMul", [f"h{n}", "w"], [f"h{n + 1}"]) for n in range(layers)),
        helper.make_node("ReduceMean", [f"h{layers}"], ["nothing"], axes=[1, 2], keepdims=0),
        helper.make_node("Unsqueeze", ["nothing", "one"], ["column"]),
        helper.make_node("Add", ["x", "column"], ["y"]),
    ]
    kind = TensorProto.FLOAT
    constants = {
        "last": np.array([2]),
        "one": np.array([1]),
        "zeros": np.zeros((1, size, size), np.float32),
        "w": np.eye(size, dtype=np.float32),
    }
    return models.save(path, nodes, [("x", kind, ["n", 4])], [("y", kind, ["n", 4])], constants)


def misshapen(path: Path) -> Path:
    """``y`` has two columns for the four of ``x``, and none of them is a number."""
    kind = TensorProto.FLOAT
    return models.save(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", kind, ["n", 4])],
        [("y", kind, ["n", 2])],
        {"w": np.full((4, 2), np.nan, np.float32)},
    )


def failing(path: Path) -> Path:
    """Refuses the inputs of these tests: its lookup table is too small."""
    kind = TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "i"], ["y"], axis=0),
    ]
    return models.save(
        path, nodes, [("x", kind, ["n", 4])], [("y", kind, ["n", 4])], {"table": np.zeros(1, np.float32)}
    )


def settled(report: dict[str, Any]) -> bool:
    return bool(report["queued"] == report["in_flight"] == report["comparing"] == 0)


def shadowed(budget: str) -> str:
    return f'    shadow:\n      - {{to: "3", sample: 100%, budget: {{{budget}}}}}\n'


# -- shadows ---------------------------------------------------------------------------------------------------------


def test_a_hanging_shadow_costs_callers_nothing_and_drops_with_reasons(place: Place) -> None:
    sluggish(place.root / "v3.onnx")
    place.write(shadowed("rps: 10000, in_flight: 2, queue: 8, timeout: 20ms, yield_above_load: 1.0"))
    with place.serve() as server:
        server.wait_for("shadow_ready")
        before = rss(server)
        with asked(lambda n: ask(server, f"u{n}")[0], threads=2) as seen:
            eventually(lambda: len(seen) >= 250)
        assert set(seen) == {"1"}
        assert shadow_report(place, server)["queued"] <= 8
        # What waited for its turn, or was under way, is counted yet.
        eventually(lambda: settled(shadow_report(place, server)))
        report = shadow_report(place, server)
        assert report["dropped"]["timeout"] > 0, report
        page = sum(metrics.samples(server, "tidegate_shadow_dropped_total").values())
        assert page == sum(report["dropped"].values()) > 100
        assert rss(server) - before < 64 * MIB


def test_a_shadow_of_another_shape_is_told_and_changes_nothing(place: Place) -> None:
    misshapen(place.root / "v3.onnx")
    place.write(shadowed("rps: 10000"))
    with place.serve() as server:
        server.wait_for("shadow_ready")
        with asked(lambda n: ask(server, f"u{n}")[0], threads=1) as seen:
            eventually(lambda: metrics.total(server, "tidegate_shadow_requests_total") >= 50)
        assert set(seen) == {"1"}
        report = json.dumps(shadow_report(place, server))
        assert "shape" in report, report


def test_a_shadow_that_fails_every_request_trips_its_breaker_only(place: Place) -> None:
    failing(place.root / "v3.onnx")
    place.write(shadowed("rps: 10000"))
    with place.serve() as server:
        server.wait_for("shadow_ready")
        with asked(lambda n: ask(server, f"u{n}")[0], threads=1) as seen:
            eventually(lambda: shadow_report(place, server)["dropped"].get("breaker", 0) >= 20)
        assert set(seen) == {"1"}
        assert shadow_report(place, server)["breaker"] == "open"
        eventually(lambda: (found := shadow_report(place, server))["errors"]["input_rejected"] == found["sent"])


def test_a_shadow_that_was_never_there_changes_nothing(place: Place) -> None:
    (place.root / "v3.onnx").write_bytes(b"not a model")
    place.write(shadowed("rps: 10000"))
    with place.serve() as server:
        with asked(lambda n: ask(server, f"u{n}")[0], threads=1) as seen:
            eventually(lambda: len(seen) >= 50)
        assert set(seen) == {"1"}


def test_a_shadow_changed_while_it_loads_gets_its_new_engine(place: Place) -> None:
    """Its section changes again and again, faster than engines load: the last one still gets pairs."""
    place.write(shadowed("rps: 1"))
    with place.serve() as server:
        for rps in range(1000, 1006):
            status, answer, _ = place.admin(server, "POST", "config", place.text(shadowed(f"rps: {rps}")).encode())
            assert status == 200, answer
        with asked(lambda n: ask(server, f"u{n}")[0], threads=1):
            eventually(lambda: shadow_report(place, server)["comparison"]["pairs"] >= 5)


# -- operators -------------------------------------------------------------------------------------------------------


def test_of_two_operators_at_once_one_wins(place: Place) -> None:
    place.write(canary("10%"))
    with place.serve() as server:
        for round_ in range(20):
            generation = place.admin(server, "GET", "config")[2]["etag"]
            texts = [place.text(canary(f"{11 + 2 * round_ + n}%")) for n in range(2)]
            start = threading.Barrier(2)
            results: dict[int, tuple[int, Any, dict[str, str]]] = {}

            def post(
                n: int,
                texts: list[str] = texts,
                generation: str = generation,
                start: threading.Barrier = start,
                results: dict[int, tuple[int, Any, dict[str, str]]] = results,
            ) -> None:
                start.wait(10)
                results[n] = place.admin(server, "POST", "config", texts[n].encode(), If_Match=generation)

            operators = [threading.Thread(target=post, args=(n,)) for n in range(2)]
            for operator in operators:
                operator.start()
            for operator in operators:
                operator.join(30)
            assert sorted(result[0] for result in results.values()) == [200, 412]
            winner = next(n for n, result in results.items() if result[0] == 200)
            loser = results[1 - winner]
            assert loser[1]["generation"] == results[winner][1]["generation"]
            assert place.admin(server, "GET", "config")[1] == texts[winner].encode()


WEIRD: dict[str, tuple[bytes, int]] = {
    "too large": (b"#" * (MAX_BYTES + MIB), 413),
    "not UTF-8": (b"apiVersion: tidegate/v1\nmodels: {m\xff: {}}\n", 400),
    "JSON of another thing": (b'{"hello": [1, 2, 3]}', 400),
    "a JSON list": (b"[1, 2]", 400),
    "empty": (b"", 400),
    "blanks": (b" \n\t\n", 400),
    "NUL": (b"apiVersion: tidegate/v1\x00", 400),
    "unknown keys": (b"apiVersion: tidegate/v1\nmodles: {}\nmodels: {m: {sauce: x}}\n", 400),
    "a bomb of anchors": (
        b"a: &a [x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 106)),
        400,
    ),
    "deep": (b"models: " + b"[" * 20_000, 400),
    "binary": (bytes(range(256)) * 20, 400),
}


def test_weird_configurations_are_refused_with_problems(place: Place) -> None:
    place.write(canary("10%"))
    with place.serve() as server:
        generation = place.admin(server, "GET", "config")[2]["etag"]
        for name, (body, wanted) in WEIRD.items():
            status, answer, _ = place.admin(server, "POST", "config", body)
            assert status == wanted, (name, answer)
            assert answer["error"], name
            if body.strip() and wanted == 400:
                assert answer["problems"], (name, answer)
                assert all(problem["message"] for problem in answer["problems"])
        assert place.admin(server, "GET", "config")[2]["etag"] == generation
        assert ask(server, "u")[0] in ("1", "2")
        assert not [line for line in server.raw if "Traceback" in line]


def test_a_configuration_as_json_is_one(place: Place) -> None:
    place.write(canary("10%"))
    sources = {version: {"source": f"{place.root}/v{version}.onnx"} for version in "123"}
    text = json.dumps({"apiVersion": "tidegate/v1", "models": {"m": {"versions": sources, "stable": "3"}}})
    with place.serve() as server:
        status, answer, _ = place.admin(server, "POST", "config", text.encode())
        assert status == 200, answer
        assert ask(server, "u")[0] == "3"


# -- models ----------------------------------------------------------------------------------------------------------


def test_a_corrupt_model_under_load_changes_nothing(place: Place) -> None:
    place.write(canary("50%"))
    good = (place.root / "v2.onnx").read_bytes()
    with place.serve() as server:
        generation = ask(server, "u")[2]
        with asked(lambda n: ask(server, f"u{n}")) as seen:
            for bad in (b"", good[: len(good) // 2], os.urandom(5000), b"\x00" * 300):
                place.root.joinpath("bad.onnx").write_bytes(bad)
                text = place.text(canary("60%")).replace("v2.onnx", "bad.onnx")
                status, answer, _ = place.admin(server, "POST", "config", text.encode())
                assert status == 400, answer
                assert "version 2" in answer["error"]
            eventually(lambda: len(seen) >= 100)
        assert {found[2] for found in seen} == {generation}
        assert {found[0] for found in seen} == {"1", "2"}
        assert place.admin(server, "GET", "config")[2]["etag"] == f'"{generation}"'


def test_an_alias_that_moves_rebinds_the_canary_without_a_failed_request(tmp_path: Path) -> None:
    place = RegistryPlace(tmp_path)
    place.publish(2, "--alias", "champion")
    place.publish(3, "--alias", "challenger")
    place.publish(5)
    config = tmp_path / "config.yaml"
    config.write_text(
        "apiVersion: tidegate/v1\nregistry: {embedded: true}\nmodels:\n  m:\n    key: {from: [header:x-user]}\n"
        '    rollout: {id: r1, candidate: "@challenger", weight: 50%}\n'
    )
    scales = {"1": 2.0, "2": 3.0, "3": 5.0}

    def one(n: int) -> str:
        status, body, headers = call(server.http, "POST", "/v2/models/m/infer", {"inputs": X}, {"x-user": f"u{n % 40}"})
        assert status == 200, body
        version = headers["x-tidegate-version"]
        assert body["outputs"][0]["data"] == [scales[version] * x for x in (1, 2, 3, 4)]
        return version

    with serving(str(config), "--state-dir", place.state) as server, asked(one, threads=2) as seen:
        eventually(lambda: set(seen[-30:]) == {"1", "2"})
        place.alias("m", "challenger", "3")
        eventually(lambda: set(seen[-30:]) == {"1", "3"})
        place.alias("m", "challenger", "--drop")
        eventually(lambda: len(seen) > 60 and set(seen[-60:]) == {"1"})
        place.alias("m", "challenger", "2")
        eventually(lambda: set(seen[-30:]) == {"1", "2"})
        place.alias("m", "champion", "2")
        eventually(lambda: set(seen[-30:]) == {"2"})


# -- crashes and disks -----------------------------------------------------------------------------------------------


def numbers(place: Place, server: Server) -> list[int]:
    return [row["generation"] for row in place.admin(server, "GET", "config/history?limit=1000")[1]["history"]]


def test_a_kill_during_reloads_leaves_whole_generations(place: Place) -> None:
    place.write(canary("1%"))
    acknowledged = b""
    sent: list[bytes] = []
    for round_ in range(3):
        with place.serve() as server:
            history = numbers(place, server)
            assert history == list(range(len(history), 0, -1))
            if round_:
                running = place.admin(server, "GET", "config")[1]
                assert running in sent[sent.index(acknowledged) :], (
                    "what was acknowledged is served, or what came after"
                )
            place.path.write_text("nonsense: [")
            timer = threading.Timer(0.1 + 0.2 * round_, os.kill, (server.process.pid, signal.SIGKILL))
            for n in range(1000):
                text = place.text(canary(f"{2 + 0.01 * (n + 1000 * round_):.2f}%")).encode()
                sent.append(text)
                try:
                    status, answer, _ = place.admin(server, "POST", "config", text)
                except (OSError, HTTPException):
                    break
                assert status == 200, answer
                acknowledged = text
                if n == 0:
                    timer.start()
            timer.join()
            assert server.wait() == -signal.SIGKILL
        done = cli("audit", "verify", "--state-dir", str(place.state), check=False)
        assert done.returncode == 0, done.stdout
    assert acknowledged


def test_a_kill_while_versions_come_and_go_leaves_one_text_whole(place: Place) -> None:
    """Each reload loads one version and unloads another; what a restart serves is all of one text and no other's."""

    def text(n: int) -> str:
        stable = "23"[n % 2]
        return place.text(f"    tenant_header: x-tenant-{n}\n", versions=f"1{stable}", stable=stable)

    place.path.write_text(text(0))
    acknowledged = sent = 0
    for round_ in range(3):
        with place.serve() as server:
            running = place.admin(server, "GET", "config")[1].decode()
            in_force = next(n for n in range(acknowledged, sent + 1) if text(n) == running)
            mine, others = "23"[in_force % 2], "32"[in_force % 2]
            assert ask(server, "u")[0] == mine
            assert call(server.http, "POST", f"/v2/models/m/versions/{mine}/infer", {"inputs": X})[0] == 200
            assert call(server.http, "POST", f"/v2/models/m/versions/{others}/infer", {"inputs": X})[0] == 404
            history = numbers(place, server)
            assert history == list(range(len(history), 0, -1))
            place.path.write_text("nonsense: [")
            timer = threading.Timer(0.05 + 0.17 * round_, os.kill, (server.process.pid, signal.SIGKILL))
            sent = in_force
            while True:
                sent += 1
                try:
                    status, answer, _ = place.admin(server, "POST", "config", text(sent).encode())
                except (OSError, HTTPException):
                    break
                assert status == 200, answer
                acknowledged = sent
                if sent == in_force + 2:
                    timer.start()
            timer.join()
            assert server.wait() == -signal.SIGKILL
        done = cli("audit", "verify", "--state-dir", str(place.state), check=False)
        assert done.returncode == 0, done.stdout
    assert acknowledged > 3


FULL_DISK = """
import sys
from pathlib import Path
from tests.support.routed import Place, ask, canary
place = Place(Path(sys.argv[2]))
place.state = Path(sys.argv[1]) / "state"
place.write(canary("10%"))
with place.serve() as server:
    generation = ask(server, "u")[2]
    with open(Path(sys.argv[1]) / "ballast", "wb", buffering=0) as file:
        for size in (65536, 512, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    refused = 0
    for n in range(40):
        padding = "# " + "x" * 50_000
        text = place.text(canary("20%")) + padding
        status, answer, _ = place.admin(server, "POST", "config", text.encode())
        if status != 200:
            refused += 1
            assert status >= 500, (status, answer)
            assert "no space is left" in answer["error"], answer
            assert ask(server, "u")[2] == generation
        else:
            generation = answer["generation"]
        if refused == 3:
            break
    assert refused == 3
    for n in range(50):
        ask(server, f"u{n}")
    (Path(sys.argv[1]) / "ballast").unlink()
    status, answer, _ = place.admin(server, "POST", "config", place.text(canary("30%")).encode())
    assert (status, answer["generation"]) == (200, generation + 1), answer
    assert ask(server, "u")[2] == generation + 1
"""


def test_a_full_state_disk_refuses_the_change_and_goes_on_serving(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting a file system in a namespace of one's own is not permitted here")
    mount = ["unshare", "--mount"]
    if subprocess.run([*mount, "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system in a namespace of one's own is not permitted here")
    disk, outside, script = tmp_path / "disk", tmp_path / "outside", tmp_path / "script.py"
    disk.mkdir()
    outside.mkdir()
    script.write_text(FULL_DISK)
    shell = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" "$3" "$1" "$4"'
    done = subprocess.run(
        [*mount, "sh", "-c", shell, "sh", str(disk), sys.executable, str(script), str(outside)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# -- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_many_models_and_reloads_do_not_grow_the_server(tmp_path: Path) -> None:
    """500 models, 50 reloads that change one model's routes each: none is loaded anew, and memory stays."""
    place = Place(tmp_path)
    more = "".join(f"  n{n}: {{source: {tmp_path}/v{n % 3 + 1}.onnx}}\n" for n in range(500))
    place.write(canary("1%") + more)
    with serving(str(place.path), "--state-dir", str(place.state), ready_seconds=150) as server:

        def reload(n: int) -> None:
            text = place.text("    reshuffle: true\n" + canary(f"{n + 2}%").replace("r1", f"r{n}") + more)
            status, answer, _ = place.admin(server, "POST", "config", text.encode())
            assert status == 200, answer

        for n in range(10):
            reload(n)
        loads = sum(line.get("event") == "model_loading" for line in server.lines)
        before, taken = rss(server), [cpu_s(server)]
        for n in range(10, 60):
            reload(n)
            ask(server, f"u{n}")
            taken.append(cpu_s(server))
        assert sum(line.get("event") == "model_loading" for line in server.lines) == loads
        assert rss(server) - before < 32 * MIB, f"{(rss(server) - before) / MIB:.1f} MiB"
        assert statistics.median(after - at for at, after in pairwise(taken)) < 2.0, taken
