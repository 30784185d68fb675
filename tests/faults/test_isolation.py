"""Nobody pays for a neighbour: bad rows, slow models, slow clients, floods, clients that leave, idle crowds."""

from __future__ import annotations

import json
import resource
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from server._pb import inference_pb2 as pb
from tests.support import models
from tests.support.metrics import samples, total, wait_total
from tests.support.server import Server, serving
from tests.support.upstream import Rows, Upstream, scaled, upstream
from tests.support.v2 import call, get, infer, tensor
from tests.support.wire import Steady, Wire, post

STREAM_MIB = 320  # what one unread stream may leave behind in the allocators
BOUND = 8  # requests that may wait for the bounded model
WIDTHS = {"affine": 4, "far": 4}
CONFIG = """
apiVersion: tidegate/v1
server:
  limits: {{ max_pending: 256, max_connections: 2500 }}
models:
  far: {{ versions: {{ "1": {{ upstream: {{ url: "http://{far}", model: m, timeout: 60s }} }} }} }}
"""
BOUNDED = f"""
name: "bounded"
max_batch_size: 1
dynamic_batching {{ default_queue_policy {{ max_queue_size: {BOUND} }} }}
"""


@pytest.fixture(scope="module")
def far() -> Iterator[Upstream]:
    """Another server, which has the model ``far``: its runs take as long as a test says. One goes there at a time."""
    with upstream(scaled(1)) as serving_far:
        yield serving_far


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, far: Upstream) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("repository")
    models.affine(root / "affine" / "1" / "model.onnx")
    models.lookup(root / "lookup" / "1" / "model.onnx")
    models.identity(root / "wide" / "1" / "model.onnx", "FP32", width=1 << 20)
    for name, text in (("slow", 'name: "slow"\nmax_batch_size: 1\n'), ("bounded", BOUNDED)):
        models.slow_scalar(root / name / "1" / "model.onnx", size=512, layers=8)
        (root / name / "config.pbtxt").write_text(text)
    config = tmp_path_factory.mktemp("config") / "tidegate.yaml"
    config.write_text(CONFIG.format(far=far.address))
    state = str(tmp_path_factory.mktemp("state"))
    with serving(str(config), "--model-repository", str(root), "--state-dir", state) as running:
        yield running


@pytest.fixture(autouse=True)
def sane_after(server: Server) -> Iterator[None]:
    """After each storm nothing waits any more and all places are free: 256 calls at once are admitted."""
    yield
    wait_total(server, "tidegate_pending_requests", 0)
    status, body = affine(server, 3.0)
    assert (status, body["outputs"][0]["data"]) == (200, [7.0] * 4)
    assert not [line for line in server.lines if line.get("event") == "request_failed"]


def affine(server: Server, value: float) -> tuple[int, Any]:
    return infer(server.http, "affine", [tensor("x", "FP32", [1, 4], [value] * 4)])


def body_of(model: str, value: float) -> bytes:
    width = WIDTHS.get(model, 1)
    return json.dumps({"inputs": [tensor("x", "FP32", [1, width], [value] * width)]}).encode()


def one(server: Server, model: str, value: float, **headers: str) -> tuple[int, Any, dict[str, str]]:
    return call(server.http, "POST", f"/v2/models/{model}/infer", body_of(model, value), headers)


def message(model: str, value: float) -> bytes:
    request = pb.ModelInferRequest(model_name=model)
    width = WIDTHS.get(model, 1)
    request.inputs.add(name="x", datatype="FP32", shape=[1, width])
    request.raw_input_contents.append(np.full(width, value, "<f4").tobytes())
    return request.SerializeToString()


def executed(server: Server, model: str) -> int:
    return int(get(server.http, f"/v2/models/{model}/stats")[1]["model_stats"][0]["inference_count"])


def test_bad_rows_fail_alone(server: Server) -> None:
    """One request of five names a row that the table does not have; batches of both kinds form."""

    def ask(i: int) -> None:
        index = 8 + i if i % 5 == 0 else i % 8
        status, body = infer(server.http, "lookup", [tensor("x", "INT64", [1, 1], [index])])
        if i % 5 == 0:
            assert status == 400, body
            assert "onnxruntime" not in body["error"]
        else:
            assert (status, body["outputs"][0]["data"]) == (200, [index * 10.0])

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(ask, range(400)))


def fast_latency_ms(server: Server, calls: int) -> float:
    """Median time of a call of the fast model."""
    steady, times = Steady(server.http), []
    for i in range(calls):
        started = time.perf_counter()
        answer = steady.exchange("/v2/models/affine/infer", body_of("affine", i))
        times.append((time.perf_counter() - started) * 1000)
        assert answer.body["outputs"][0]["data"] == [2.0 * i + 1] * 4
    steady.close()
    return statistics.median(times)


def test_a_slow_model_does_not_slow_its_neighbour(server: Server) -> None:
    """Were calls to wait for a run of the slow model, there would be a run for every call."""
    over, calls = threading.Event(), 150

    def occupy() -> None:
        steady = Steady(server.http)
        while not over.is_set():
            assert steady.exchange("/v2/models/slow/infer", body_of("slow", 1)).status == 200
        steady.close()

    threads = [threading.Thread(target=occupy, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    while total(server, "tidegate_pending_requests") < 1:
        pass
    before = executed(server, "slow")
    fast_latency_ms(server, calls)
    meanwhile = executed(server, "slow") - before
    over.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert meanwhile < calls / 2


def test_clients_that_send_byte_by_byte(server: Server) -> None:
    """A hundred of them hold a connection each and nothing else; in the end they are answered too."""
    with ExitStack() as stack:
        data = post("/v2/models/affine/infer", body_of("affine", 5))
        wires = [stack.enter_context(Wire(server.http)) for _ in range(100)]
        for i in range(len(data) - 1):
            for wire in wires[:20] if i % 40 else wires[:21]:
                wire.send(data[i : i + 1])
            if i % 40 == 0:
                assert affine(server, i)[0] == 200
        for wire in wires[:20]:
            wire.send(data[-1:])
        for wire in wires[:20]:
            answer = wire.answer()
            assert answer is not None
            assert answer.body["outputs"][0]["data"] == [11.0] * 4


def resident_mib(server: Server) -> float:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def wide_request() -> tuple[str, bytes, dict[str, str]]:
    """A call that sends 4 MiB and is answered with 4 MiB: path, body, headers."""
    x = {"name": "x", "datatype": "FP32", "shape": [1, 1 << 20], "parameters": {"binary_data_size": 4 << 20}}
    head = json.dumps({"inputs": [x], "parameters": {"binary_data_output": True}}).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    return "/v2/models/wide/infer", head + b"\0" * (4 << 20), length


def test_tensors_go_with_their_request(server: Server) -> None:
    """Memory of large tensors is given back at the end of each request, not when the collector next comes by."""
    steady, (path, body, headers) = Steady(server.http), wide_request()
    for _ in range(3):
        assert steady.exchange(path, body, headers).status == 200
    before, most = resident_mib(server), 0.0
    for _ in range(60):
        assert steady.exchange(path, body, headers).status == 200
        most = max(most, resident_mib(server))
    steady.close()
    assert most - before < 48


def test_clients_that_never_read(server: Server) -> None:
    """Each asks for 4 MiB again and again and takes none of it: the server stops reading from it."""
    data, most_ms = post(*wide_request()), 100 + 20 * fast_latency_ms(server, 50)
    before = resident_mib(server)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.http, receive_buffer=4096)) for _ in range(6)]
        for wire in wires:
            wire.socket.settimeout(1)
            try:
                for _ in range(20):
                    wire.socket.sendall(data)
            except TimeoutError:
                continue
        assert fast_latency_ms(server, 50) < most_ms
        # Each may hold one answer being written and what was read ahead of it, not twenty.
        assert resident_mib(server) - before < 6 * 10 * 4
    assert fast_latency_ms(server, 50) < most_ms


def test_a_stream_that_is_not_read_is_bounded_and_its_memory_returns(server: Server) -> None:
    """Each round sends 4 MiB messages that nobody reads answers of, then cancels."""
    shape = (1, 1 << 20)
    request = pb.ModelInferRequest(model_name="wide")
    request.inputs.add(name="x", datatype="FP32", shape=shape)
    request.raw_input_contents.append(np.ones(shape, np.float32).tobytes())
    raw = request.SerializeToString()
    before = resident_mib(server)
    peaks, rests = [], []
    for _ in range(4):
        sent = threading.Semaphore(0)
        enough = threading.Event()

        def messages(sent: threading.Semaphore = sent, enough: threading.Event = enough) -> Iterator[bytes]:
            for _ in range(64):
                if enough.is_set():
                    return
                sent.release()
                yield raw

        with grpc.insecure_channel(server.grpc) as channel:
            stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(messages())
            while sent.acquire(timeout=1.0):  # until flow control holds the sender back
                pass
            peaks.append(resident_mib(server))
            enough.set()
            stream.cancel()
        until = time.monotonic() + 20
        while resident_mib(server) > before + STREAM_MIB and time.monotonic() < until:
            time.sleep(0.05)
        rests.append(resident_mib(server))
    assert max(peaks) < before + 2 * STREAM_MIB, (before, peaks)
    assert max(rests) < before + STREAM_MIB, (before, rests)


def test_overload_is_refused_with_advice_and_passes(server: Server) -> None:
    def ask(i: int) -> tuple[int, str]:
        status, body, headers = one(server, "bounded", float(i))
        if status == 503:
            assert int(headers["retry-after"]) >= 1
            return status, body["error"]
        assert body["outputs"][0]["data"] == [float(i)]
        return status, ""

    with ThreadPoolExecutor(40) as pool:
        seen = Counter(pool.map(ask, range(120)))
    assert seen[200, ""] >= BOUND
    (refusal,) = [text for status, text in seen if status == 503]
    assert "Exceeds maximum queue size" in refusal
    assert sum(seen.values()) == 120
    assert total(server, "tidegate_rejected_total") > 0
    assert '{reason="queue_full"}' in samples(server, "tidegate_rejected_total")
    with grpc.insecure_channel(server.grpc) as channel:
        method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        futures = [method.future(message("bounded", i), timeout=30) for i in range(60)]
        codes = Counter(future.code() for future in futures)
        texts = {future.details() for future in futures if future.code() is grpc.StatusCode.UNAVAILABLE}
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert codes[grpc.StatusCode.OK] >= BOUND
    assert all("Exceeds maximum queue size" in text for text in texts)
    assert one(server, "bounded", 4.0)[0] == 200


def test_admission_recovers_from_a_flood(server: Server) -> None:
    """Over 256 in flight are refused before their bodies are read; every place comes back."""
    for _ in range(2):
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(server.http)) for _ in range(300)]
            for wire in wires:  # the head and half the body: holds a place
                wire.send(post("/v2/models/affine/infer", body_of("affine", 1))[:-20])
            until = time.monotonic() + 20
            while (refusal := affine(server, 1))[0] == 200:
                assert time.monotonic() < until, "nothing was refused"
            assert refusal[0] == 503
            assert "256" in refusal[1]["error"]
        until = time.monotonic() + 20
        while affine(server, 1)[0] != 200:
            assert time.monotonic() < until, "places were lost"
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.http)) for _ in range(256)]
        data = post("/v2/models/affine/infer", body_of("affine", 1))
        for wire in wires:
            wire.send(data[:-20])
        for wire in wires:
            wire.send(data[-20:])
        answers = [wire.answer() for wire in wires]
        assert {answer and answer.status for answer in answers} == {200}


@contextmanager
def standing_still(server: Server, far: Upstream) -> Iterator[None]:
    """One request is on its way to ``far``, which answers nobody until the end: whatever comes now has to wait.

    At the end nothing is left to be done, and nothing was but that one request and the one that finds this out.
    """
    go, first = threading.Event(), threading.Event()

    def held(x: Rows) -> bytes:
        first.set()
        go.wait(60)
        return scaled(1)(x)

    before, far.behave = len(far.asked), held
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(one, server, "far", 1.0)
        try:
            assert first.wait(20)
            yield
        finally:
            go.set()
        assert running.result()[0] == 200
    assert one(server, "far", 2.0)[0] == 200  # goes last
    assert [rows[0, 0] for _, rows in far.asked[before:]] == [1.0, 2.0]


def test_clients_that_leave_take_their_queued_work_along(server: Server, far: Upstream) -> None:
    with standing_still(server, far):
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(server.http)) for _ in range(60)]
            for wire in wires:
                wire.send(post("/v2/models/far/infer", body_of("far", 3.0)))
            wait_total(server, "tidegate_pending_requests", 60)
        wait_total(server, "tidegate_pending_requests", 0)


def test_deadlines_over_http(server: Server, far: Upstream) -> None:
    with standing_still(server, far):
        with ThreadPoolExecutor(30) as pool:
            timeout = {"x-tidegate-timeout-ms": "60"}
            answers = list(pool.map(lambda _: one(server, "far", 3.0, **timeout), range(60)))
        assert {status for status, _, _ in answers} == {504}
        assert all("deadline" in body["error"] for _, body, _ in answers)
        wait_total(server, "tidegate_pending_requests", 0)


def test_memory_does_not_grow(server: Server) -> None:
    """20,000 requests over both protocols, a fifth of them refused."""

    def http(count: int) -> None:
        steady = Steady(server.http)
        good, bad = body_of("affine", 2), b'{"inputs":[{"name":"x"}]}'
        for i in range(count):
            answer = steady.exchange("/v2/models/affine/infer", bad if i % 5 == 0 else good)
            assert answer.status == (400 if i % 5 == 0 else 200)
        steady.close()

    def rpc(count: int) -> None:
        with grpc.insecure_channel(server.grpc) as channel:
            method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            for _ in range(count):
                method(message("affine", 2), timeout=30)

    def rounds(count: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(work, count) for work in (http, http, http, rpc)]:
                done.result()

    rounds(500)
    before = resident_mib(server)
    rounds(4500)
    assert resident_mib(server) - before < 24


def test_a_crowd_of_idle_connections(server: Server) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2000
    if hard != resource.RLIM_INFINITY and hard < wanted + 200:
        pytest.skip(f"this system allows {hard} open files")
    before, most_ms = resident_mib(server), 50 + 20 * fast_latency_ms(server, 50)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted + 200), hard))
    try:
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(server.http)) for _ in range(wanted)]
            assert fast_latency_ms(server, 50) < most_ms
            assert resident_mib(server) - before < 200
            for wire in wires[::100]:
                wire.send(post("/v2/models/affine/infer", body_of("affine", 5)))
                answer = wire.answer()
                assert answer is not None
                assert answer.status == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_end_comes_in_spite_of_everyone(tmp_path: Path) -> None:
    """SIGTERM with idle, half-sent, unread and streaming clients: out within the drain's time, code 0."""
    models.affine(tmp_path / "models" / "affine" / "1" / "model.onnx")
    config = tmp_path / "tidegate.yaml"
    config.write_text("apiVersion: tidegate/v1\nserver:\n  drain: 3s\n")
    arguments = (str(config), "--model-repository", str(tmp_path / "models"), "--state-dir", str(tmp_path / "state"))
    with serving(*arguments) as server, ExitStack() as stack:
        data = post("/v2/models/affine/infer", body_of("affine", 5))
        for cut in (0, 20, len(data) - 3):
            stack.enter_context(Wire(server.http)).send(data[:cut])
        channel = stack.enter_context(grpc.insecure_channel(server.grpc))
        over = threading.Event()
        stack.callback(over.set)

        def messages() -> Iterator[bytes]:
            yield message("affine", 1)
            over.wait(60)

        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(messages(), timeout=60)
        next(stream)
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=60)
        next(watch)
        started = time.monotonic()
        server.terminate()
        assert server.wait(30) == 0
        assert time.monotonic() - started < 20  # its clients would stay for 60
