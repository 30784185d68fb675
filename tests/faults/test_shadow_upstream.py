"""Shadows on another server that is down, hangs, breaks off, or answers garbage: live, and no caller notices.

And one that is merely wrong by a known amount: what is reported of it is what an offline recomputation finds.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.support import metrics, models
from tests.support.fast import Ask, ask_grpc_all, ask_http
from tests.support.routed import Place, ask, eventually, shadow_report
from tests.support.server import Server
from tests.support.upstream import Behave, refusing, scaled, tensor_answer, upstream
from tests.support.upstream import http as raw_http
from tests.support.v2 import tensor

MIB = 2**20
#: Of the large requests: 256 KiB.
WIDTH = 65_536


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def configured(place: Place, address: str, budget: str, timeout: str = "30s") -> str:
    return (
        "apiVersion: tidegate/v1\nmodels:\n  m:\n    versions:\n"
        f'      "1": {{source: {place.root}/v1.onnx}}\n'
        f'      "2": {{upstream: {{url: "http://{address}", timeout: {timeout}}}}}\n'
        '    stable: "1"\n'
        f'    shadow:\n      - {{to: "2", sample: 100%, budget: {{{budget}}}}}\n'
    )


@contextmanager
def served(place: Place, text: str) -> Iterator[Server]:
    place.path.write_text(text)
    with place.serve() as server:
        yield server


def rss(server: Server) -> int:
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def all_answered(server: Server, requests: int = 400) -> None:
    """So many requests over both protocols; each was answered by version 1, rightly (the clients check)."""
    for went in (ask_http(server, [Ask()] * requests), ask_grpc_all(server, [Ask()] * requests)):
        assert {one.version for one in went} == {"1"}


def breaking_off(x: Any) -> bytes:
    """Half an answer, then nothing more."""
    return tensor_answer(x)[:-7]


GARBAGE: dict[str, Behave] = {
    "noise": lambda _: os.urandom(4096),
    "not HTTP": lambda _: b"SSH-2.0-OpenSSH_9.6\r\n",
    "broken JSON": lambda _: raw_http(200, b"{{{{", "Inference-Header-Content-Length: 4"),
    "no tensors": lambda _: raw_http(200, b"{}"),
    "a length beyond all": lambda _: b"HTTP/1.1 200 X\r\nContent-Length: 99999999999999\r\n\r\n" + bytes(1000),
    "another name": lambda x: tensor_answer(x, name="z"),
    "another datatype": lambda x: tensor_answer(x.astype("<f8"), "FP64"),
    "fewer columns": lambda x: tensor_answer(x[:, :2]),
    "more rows": lambda x: tensor_answer(np.concatenate([x, x])),
    "breaks off": breaking_off,
    "ends at once": lambda _: b"",
    "500": refusing(500),
    "503": refusing(503),
    "redirect": lambda _: raw_http(302, b"", "Location: http://127.0.0.1:1/"),
}


def test_garbage_from_a_shadow_reaches_no_caller(place: Place) -> None:
    budget = "rps: 100000, in_flight: 4, queue: 32, timeout: 1s, yield_above_load: 1.0"
    with upstream(scaled(2)) as shadow, served(place, configured(place, shadow.address, budget)) as server:
        server.wait_for("shadow_ready")
        for name, behave in GARBAGE.items():
            shadow.behave = behave
            all_answered(server, 60)
            assert server.process.poll() is None, name
        report = shadow_report(place, server)
        assert report["breaker"] == "open"
        assert sum(report["errors"].values()) > 0
        assert not [line for line in server.raw if "Traceback" in line]


@pytest.mark.slow  # a server for each
@pytest.mark.parametrize("name", sorted(GARBAGE))
def test_each_kind_of_garbage_is_counted_as_the_shadows_error(place: Place, name: str) -> None:
    """Or its lateness, or a pair that disagrees; every request that was sent has an end of its own, by reason."""
    budget = "rps: 100000, in_flight: 4, queue: 256, timeout: 2s, yield_above_load: 1.0"
    with upstream(GARBAGE[name]) as shadow, served(place, configured(place, shadow.address, budget)) as server:
        server.wait_for("shadow_ready")
        all_answered(server, 30)
        eventually(lambda: settled(shadow_report(place, server)))
        report = shadow_report(place, server)
        assert accounted(report) == 60, report
        found = report["comparison"]["disagreeing"]
        assert report["comparison"]["pairs"] == found
        assert sum(report["errors"].values()) + report["dropped"].get("timeout", 0) + found >= 5


def settled(report: dict[str, Any]) -> bool:
    return report["queued"] == report["in_flight"] == report["comparing"] == 0


def accounted(report: dict[str, Any]) -> int:
    """Requests whose end is known: compared, failed or dropped."""
    return int(sum(report["dropped"].values()) + sum(report["errors"].values()) + report["comparison"]["pairs"])


def test_a_shadow_that_goes_down_stays_a_shadow_through_a_reload(place: Place) -> None:
    budget = "rps: 100000, timeout: 1s"
    with upstream(scaled(2)) as shadow:
        text = configured(place, shadow.address, budget)
        with served(place, text) as server:
            server.wait_for("shadow_ready")
            all_answered(server, 100)
            eventually(lambda: shadow_report(place, server)["comparison"]["pairs"] > 0)
            shadow.close()
            all_answered(server)
            report = shadow_report(place, server)
            assert report["breaker"] == "open"
            assert report["errors"].keys() == {"upstream_unavailable"}
            assert report["comparison"]["disagreeing"] == 0
            place.apply(server, text + "    reshuffle: false\n")
            all_answered(server, 100)


def test_copies_that_wait_for_a_batch_do_not_keep_a_version_that_goes(place: Place) -> None:
    """Callers make up whole batches; the shadow gets half of one at a time, and waits for the other half."""
    text = place.text(
        "    batching: {max_queue_delay: 60s, preferred_batch_sizes: [8]}\n"
        '    shadow:\n      - {to: "2", sample: 100%, budget: {rps: 100000, in_flight: 4, timeout: 60s}}\n'
    )
    with served(place, text) as server, ThreadPoolExecutor(8) as callers:
        server.wait_for("shadow_ready")
        list(callers.map(lambda i: ask(server, str(i)), range(8)))
        eventually(lambda: shadow_report(place, server)["in_flight"] == 4)
        place.apply(server, text.replace("v2.onnx", "v3.onnx"))
        eventually(lambda: sum(line.get("event") == "shadow_ready" for line in server.lines) == 2)
        assert shadow_report(place, server)["dropped"] == {"no_model": 8}
        list(callers.map(lambda i: ask(server, str(i)), range(8)))
        eventually(lambda: shadow_report(place, server)["in_flight"] == 4)
        server.terminate()
        assert server.wait() == 0
    assert [line for line in server.lines if line.get("level") == "error"] == []


class Large:
    """A caller of 256-KiB requests on one connection."""

    def __init__(self, server: Server) -> None:
        host, _, port = server.http.rpartition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=30)
        values = np.arange(WIDTH, dtype="<f4").reshape(1, WIDTH)
        entry = {
            "name": "x",
            "datatype": "FP32",
            "shape": [1, WIDTH],
            "parameters": {"binary_data_size": values.nbytes},
        }
        head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
        self._body, self._head = head + values.tobytes(), len(head)
        self._wanted = (values * np.float32(2)).tobytes()

    def ask(self) -> None:
        headers = {"Inference-Header-Content-Length": str(self._head), "Content-Type": "application/octet-stream"}
        self._connection.request("POST", "/v2/models/m/infer", self._body, headers)
        answer = self._connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body[:500]
        assert body[int(answer.headers["Inference-Header-Content-Length"]) :] == self._wanted

    def close(self) -> None:
        self._connection.close()


def test_a_hanging_shadow_holds_no_more_memory_than_its_budget(place: Place) -> None:
    """512 KiB a copy (input and answer), queue 16, in flight 2: 9 MiB and what runs hold, of 300 MiB asked for."""
    go = threading.Event()

    def hang(x: Any) -> bytes:
        go.wait(60)
        return tensor_answer(x)

    budget = "rps: 100000, in_flight: 2, queue: 16, max_body: 1MiB, timeout: 60s, yield_above_load: 1.0"
    models.affine(place.root / "v1.onnx", 2, 0, WIDTH)
    with upstream(hang, width=WIDTH) as shadow, served(place, configured(place, shadow.address, budget)) as server:
        server.wait_for("shadow_ready")
        with closing(Large(server)) as caller:
            for _ in range(60):
                caller.ask()
            before = rss(server)
            for _ in range(600):
                caller.ask()
        report = shadow_report(place, server)
        assert report["in_flight"] == 2
        assert report["queued"] == 16
        assert report["dropped"] == {"queue": 660 - 18}
        assert rss(server) - before < 24 * MIB
        go.set()


def test_bodies_over_the_budget_are_dropped_by_that_name(place: Place) -> None:
    budget = "rps: 100000, max_body: 64KiB, yield_above_load: 1.0"
    models.affine(place.root / "v1.onnx", 2, 0, WIDTH)
    with upstream(scaled(2), width=WIDTH) as shadow, served(place, configured(place, shadow.address, budget)) as server:
        server.wait_for("shadow_ready")
        with closing(Large(server)) as caller:
            for _ in range(20):
                caller.ask()
        eventually(lambda: shadow_report(place, server)["dropped"] == {"body": 20})
        assert not shadow.asked
        page = metrics.samples(server, "tidegate_shadow_dropped_total")
        assert {labels.partition('reason="')[2].partition('"')[0]: n for labels, n in page.items()} == {"body": 20}


# -- what is reported is what is ------------------------------------------------------------------------------------

WEIGHTS = np.float32([[0.9, -0.4, 0.1], [0.3, 0.8, -0.2], [-0.5, 0.6, 0.7], [0.2, -0.1, 0.4]])
EPSILON = 1e-2


def linear(path: Path, weights: np.ndarray[Any, Any]) -> Path:
    """``y = x W`` for FP32 [n, 4]."""
    kind = TensorProto.FLOAT
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return models.save(path, [node], [("x", kind, ["n", 4])], [("y", kind, ["n", 3])], {"w": weights})


def lead(outputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """By how much the largest of each row is larger than the next."""
    ordered = np.sort(outputs, axis=1)
    return np.asarray(ordered[:, -1] - ordered[:, -2])


def flipped_and_steady(random: np.random.Generator, changed: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """Rows whose argmax the changed weights surely move, and rows where they surely do not: no rounding decides it."""
    x = random.normal(size=(50_000, 4)).astype(np.float32)
    first, second = x @ WEIGHTS, x @ changed
    clear = np.minimum(lead(first), lead(second)) > 1e-3
    seen = np.abs(first - second).max(axis=1) > 4e-3
    flips = first.argmax(axis=1) != second.argmax(axis=1)
    return x[clear & seen & flips], x[clear & seen & ~flips]


def test_a_perturbed_shadow_is_reported_as_an_offline_recomputation_finds_it(place: Place) -> None:
    """A sample of 500 requests of 1 to 5 rows; the report names each pair (all differ), the test has each input.

    Which are drawn is chance, by ids that the server makes; every second one has a row whose argmax moves.
    """
    random = np.random.default_rng(11)
    noise = np.float32(random.choice([-EPSILON, EPSILON], WEIGHTS.shape))
    flipped, steady = flipped_and_steady(random, WEIGHTS + noise)
    linear(place.root / "v1.onnx", WEIGHTS)
    linear(place.root / "v2.onnx", WEIGHTS + noise)
    budget = "rps: 100000, in_flight: 64, queue: 4096, timeout: 20s, yield_above_load: 1.0"
    compare = "abs_tol: 0, rel_tol: 0, keep_worst: 10000"
    place.write(
        f'    shadow:\n      - {{to: "2", sample: 40%, budget: {{{budget}}}, compare: {{{compare}}}}}\n', versions="12"
    )
    asked: dict[str, np.ndarray[Any, Any]] = {}
    with place.serve() as server:
        server.wait_for("shadow_ready")
        host, _, port = server.http.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        for number in range(500):
            x = random.choice(steady, int(random.integers(1, 6)))
            if number % 2:
                x[random.integers(len(x))] = random.choice(flipped)
            body = {"inputs": [tensor("x", "FP32", list(x.shape), x.ravel().tolist())]}
            connection.request("POST", "/v2/models/m/infer", json.dumps(body))
            answer = connection.getresponse()
            given = json.loads(answer.read())
            assert answer.status == 200, given
            np.testing.assert_allclose(given["outputs"][0]["data"], (x @ WEIGHTS).ravel(), rtol=1e-4, atol=1e-5)
            asked[str(answer.getheader("x-tidegate-id"))] = x
        connection.close()
        eventually(lambda: settled(shadow_report(place, server)))
        report = shadow_report(place, server)
        page = metrics.samples(server, "tidegate_shadow_max_abs_diff")
    comparison = report["comparison"]
    told = {entry["id"]: entry for entry in comparison["worst"]}
    assert report["dropped"] == report["errors"] == {}
    assert 125 < comparison["pairs"] < 275, "about 40 % of 500: chance leaves this once in 10^11"
    assert len(told) == comparison["pairs"] == comparison["disagreeing"]
    sampled = {id_: asked[id_] for id_ in told}
    pairs = {id_: (x @ WEIGHTS, x @ (WEIGHTS + noise)) for id_, x in sampled.items()}
    for id_, (first, second) in pairs.items():
        assert told[id_]["max_abs_diff"] == pytest.approx(largest(first, second), rel=1e-3)
        agree = bool((first.argmax(1) == second.argmax(1)).all())
        assert ("argmax" not in told[id_]["disagreements"]) == agree
    output = comparison["outputs"]["y"]
    wanted = max(largest(first, second) for first, second in pairs.values())
    assert output["max_abs_diff"] == pytest.approx(wanted, rel=1e-3)
    assert list(page.values()) == [pytest.approx(wanted, rel=1e-3)]
    agreeing = sum(int((first.argmax(1) == second.argmax(1)).sum()) for first, second in pairs.values())
    rows = sum(len(x) for x in sampled.values())
    assert (output["argmax_rows"], output["argmax_agreeing"]) == (rows, agreeing)
    assert output["argmax_agreement"] == agreeing / rows < 1
    assert comparison["worst"][0]["max_abs_diff"] == output["max_abs_diff"]


def largest(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    return float(np.abs(first.astype(np.float64) - second).max())
