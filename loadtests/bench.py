"""What one served request costs, against ONNX Runtime called in this process: ``make bench``.

A small model (30 floats in, 2 out) is served by ``tidegate serve`` and asked over HTTP JSON, HTTP binary tensors and
gRPC, one row a request. Rounds of all ways are interleaved, so that a slow spell of the machine hits all alike; ratios
and their spread are what to read. The clients are plain Python on the same machine: **their own cost limits the rate**,
so requests per second understate the server, and the client's CPU time stands beside the server's. The server's CPU
time is read from the operating system and does not contain the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from server._pb import inference_pb2 as pb

ROOT = Path(__file__).resolve().parent.parent
FEATURES = 30
MODEL = "bench"
INFER = "/inference.GRPCInferenceService/ModelInfer"
START_SECONDS = 60.0
FLOOR = "in-process ONNX Runtime"

#: Sends one request and raises when the answer is not the right one.
Call = Callable[[], Awaitable[None]]


@dataclass
class Sample:
    """One round of one way to ask."""

    requests: int
    seconds: float
    server_cpu_seconds: float
    client_cpu_seconds: float


@dataclass
class Way:
    """One way to ask: its callers, one per connection, and what was measured."""

    name: str
    calls: list[Call]
    samples: list[Sample] = field(default_factory=list)


def write_model(path: Path) -> None:
    """A two-layer network with fixed weights: FP32 [batch, 30] -> FP32 [batch, 2]."""
    random = np.random.default_rng(7)
    weights = {
        "w1": random.normal(size=(FEATURES, 64)).astype(np.float32),
        "w2": random.normal(size=(64, 2)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h1"]),
        helper.make_node("Relu", ["h1"], ["h2"]),
        helper.make_node("MatMul", ["h2", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        MODEL,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def measure_floor(model: ort.InferenceSession, row: np.ndarray[Any, Any], seconds: float) -> Sample:
    """One row at a time, no server: the CPU time that no gateway can go below without batching."""
    started, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(100):
            model.run(None, {"x": row})
        count += 100
    return Sample(count, time.perf_counter() - started, time.process_time() - cpu, 0.0)


@contextmanager
def serving(model: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """A gateway on free loopback ports: its process id and its ``ready`` event."""
    flags = [part for name in ("--http", "--grpc", "--metrics", "--admin") for part in (name, "127.0.0.1:0")]
    command = [sys.executable, "-m", "server", "serve", str(model), *flags, "--state-dir", str(model.parent / "state")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    log = model.parent / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--log-format", "json"], stderr=file, env=environment)
    try:
        yield process.pid, wait_ready(process, log)
    finally:
        process.terminate()
        process.wait(60)


def wait_ready(process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        for line in log.read_text().splitlines():
            event = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
            if event.get("event") == "ready":
                return dict(event)
        time.sleep(0.1)
    raise RuntimeError(f"the server did not become ready:\n{log.read_text()[-4000:]}")


def cpu_seconds(pid: int) -> float:
    """User and system time of one process, from the operating system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def http_call(address: str, head: dict[str, str], body: bytes, expect: Callable[[bytes], bool]) -> Call:
    """A keep-alive connection that sends the same bytes each time. Closed with the event loop."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    fields = {"host": address, "content-length": str(len(body)), **head}
    lines = [f"POST /v2/models/{MODEL}/infer HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    request = "\r\n".join([*lines, "", ""]).encode() + body

    async def call() -> None:
        writer.write(request)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        _, _, rest = answer.partition(b"\r\ncontent-length: ")
        content = await reader.readexactly(int(rest.partition(b"\r\n")[0]))
        if not answer.startswith(b"http/1.1 200") or not expect(content):
            raise RuntimeError(f"wrong answer: {answer!r} {content[:400]!r}")

    return call


def grpc_call(channel: grpc.aio.Channel, request: bytes, expect: Callable[[bytes], bool]) -> Call:
    """Bytes in, bytes out: no protobuf object is made by the client."""
    method = channel.unary_unary(INFER)

    async def call() -> None:
        answer = await method(request)
        if not expect(answer):
            raise RuntimeError(f"wrong answer: {answer[:400]!r}")

    return call


async def all_ways(ready: dict[str, Any], row: np.ndarray[Any, Any], want: bytes, width: int) -> list[Way]:
    """The three ways to ask, each with ``width`` requests in flight."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, FEATURES]}
    text = json.dumps({"inputs": [{**tensor, "data": row.ravel().tolist()}]}).encode()
    sized = {**tensor, "parameters": {"binary_data_size": row.nbytes}}
    head = json.dumps({"inputs": [sized], "parameters": {"binary_data_output": True}}).encode()
    lengths = {"inference-header-content-length": str(len(head))}
    message = pb.ModelInferRequest(
        model_name=MODEL,
        inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, FEATURES])],
        raw_input_contents=[row.tobytes()],
    ).SerializeToString()
    wanted = struct.unpack("<2f", want)

    def close(got: Sequence[float]) -> bool:
        return all(abs(a - b) <= 1e-4 * max(1.0, abs(b)) for a, b in zip(got, wanted, strict=True))

    def json_close(body: bytes) -> bool:
        return close(json.loads(body)["outputs"][0]["data"])

    def tail_close(body: bytes) -> bool:
        return close(struct.unpack("<2f", body[-len(want) :]))

    address = str(ready["http"])
    channels = [grpc.aio.insecure_channel(ready["grpc"], [("grpc.use_local_subchannel_pool", 1)]) for _ in range(width)]
    return [
        Way("HTTP JSON", [await http_call(address, {}, text, json_close) for _ in range(width)]),
        Way("HTTP binary", [await http_call(address, lengths, head + row.tobytes(), tail_close) for _ in range(width)]),
        Way("gRPC", [grpc_call(channel, message, tail_close) for channel in channels]),
    ]


async def measure(way: Way, pid: int, seconds: float) -> Sample:
    """Every connection asks again as soon as it is answered, for ``seconds``."""
    end = time.perf_counter() + seconds

    async def repeat(call: Call) -> int:
        count = 0
        while time.perf_counter() < end:
            await call()
            count += 1
        return count

    started, server, client = time.perf_counter(), cpu_seconds(pid), time.process_time()
    counts = await asyncio.gather(*(repeat(call) for call in way.calls))
    return Sample(sum(counts), time.perf_counter() - started, cpu_seconds(pid) - server, time.process_time() - client)


async def run(rounds: int, seconds: float, width: int) -> dict[str, list[Sample]]:
    row = np.random.default_rng(1).normal(size=(1, FEATURES)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / f"{MODEL}.onnx"
        write_model(model)
        local = session(model)
        want = np.asarray(local.run(None, {"x": row})[0]).tobytes()
        floor: list[Sample] = []
        with serving(model) as (pid, ready):
            ways = await all_ways(ready, row, want, width)
            for way in ways:
                await measure(way, pid, 1.0)  # warm connections, code and learned plans; not counted
            for number in range(rounds):
                print(f"  round {number + 1} of {rounds}", flush=True)
                floor.append(measure_floor(local, row, seconds / 2))
                for way in ways[number % 3 :] + ways[: number % 3]:
                    way.samples.append(await measure(way, pid, seconds))
        return {FLOOR: floor, **{way.name: way.samples for way in ways}}


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def report(results: dict[str, list[Sample]], width: int) -> None:
    floors = [1e6 * sample.server_cpu_seconds / sample.requests for sample in results[FLOOR]]
    print(
        f"\nOne row of {FEATURES} floats a request, {width} in flight; median (lowest-highest) of {len(floors)} rounds."
    )
    print(f"{'way':<26}{'requests/s':>24}{'server CPU us/request':>28}{'ratio to floor':>24}{'client CPU us':>16}")
    for name, samples in results.items():
        rates = [sample.requests / sample.seconds for sample in samples]
        costs = [1e6 * sample.server_cpu_seconds / sample.requests for sample in samples]
        ratios = [cost / floor for cost, floor in zip(costs, floors, strict=True)]
        client = statistics.median(1e6 * sample.client_cpu_seconds / sample.requests for sample in samples)
        print(f"{name:<26}{spread(rates, 0):>24}{spread(costs, 1):>28}{spread(ratios, 1):>24}{client:>16.1f}")
    print(
        "The client is Python on the same cores: requests/s is a lower bound, CPU per request is the figure to compare."
    )


def save(results: dict[str, list[Sample]], width: int, folder: Path) -> Path:
    """Raw samples with the facts of the machine, so that runs can be compared later."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "grpcio": grpc.__version__,
        "in_flight": width,
    }
    content = {"facts": facts, "samples": {name: [asdict(s) for s in samples] for name, samples in results.items()}}
    path = folder / f"bench-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    path.write_text(json.dumps(content, indent=1))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description="CPU time and rate of served requests against in-process ONNX Runtime."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one way's turn in a round")
    parser.add_argument("--in-flight", type=int, default=16, help="connections, one request on each")
    parser.add_argument("--output", type=Path, default=ROOT / "loadtests" / "results", help="folder for raw samples")
    options = parser.parse_args()
    if min(options.rounds, options.seconds, options.in_flight) <= 0:
        parser.error("rounds, seconds and in-flight must be positive")
    results = asyncio.run(run(options.rounds, options.seconds, options.in_flight))
    report(results, options.in_flight)
    print(f"Raw samples: {save(results, options.in_flight, options.output)}")


if __name__ == "__main__":
    main()
