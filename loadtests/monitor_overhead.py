"""What the drift monitor adds to a served request: two servers, one with a profile and one without.

    python -m loadtests.monitor_overhead [--seconds 120] [--callers 8] [--rows 1] [--output FILE.json]

Both serve the same model (30 floats in, 2 out) and are asked in turn over gRPC, in short rounds whose order changes,
so that a slow spell of the machine hits both alike. What is compared is the processor time of the whole server
process per request, as the operating system counts it: drain thread, looks and gauges are in it. The ratio is the
median over pairs of neighbouring rounds, with a 95 % interval of it by order statistics; on a busy machine the interval
is wide, and says so.

Target: the processor time per request grows by less than 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from loadtests.lanes import INFER_PATH as INFER
from loadtests.machine import cpu_seconds
from loadtests.models import FEATURES, MODEL, write_model
from loadtests.servers import serving
from monitor.profile import ReferenceProfile
from server._pb import inference_pb2 as pb

REFERENCE_ROWS = 50_000
#: Long against the hundredth of a second in which the operating system counts.
ROUND_SECONDS = 2.0
WARM_ROUNDS = 1
#: Well over the longest window.
DISTINCT_ROWS = 40_000


@dataclass
class Server:
    """One of the two: its process and a channel to it."""

    pid: int
    infer: Any
    per_request_us: list[float]
    #: Which request is the next.
    places: Iterator[int] = field(default_factory=itertools.count)


@dataclass
class Result:
    """Processor time per request in us, and the ratio of monitored to plain with its interval."""

    plain_us: float
    monitored_us: float
    ratio: float
    low: float
    high: float
    pairs: int


def write_profile(path: Path, seed: int = 1) -> None:
    rows = np.random.default_rng(seed).standard_normal((REFERENCE_ROWS, FEATURES)).astype("f4")
    ReferenceProfile.from_arrays({"x": rows}).save(path)


def bodies(rows: int) -> list[bytes]:
    """Requests of the reference's own distribution, so that no alarm is part of what is measured.

    Of so many different rows that no window of the defaults sees one twice: a few that come again and again are another
    distribution, and drift.
    """
    stream = np.random.default_rng(2)
    made = []
    for _ in range(math.ceil(DISTINCT_ROWS / rows)):
        request = pb.ModelInferRequest(model_name=MODEL)
        request.inputs.add(name="x", datatype="FP32", shape=[rows, FEATURES])
        request.raw_input_contents.append(stream.standard_normal((rows, FEATURES)).astype("f4").tobytes())
        made.append(request.SerializeToString())
    return made


async def one_round(server: Server, requests: Sequence[bytes], callers: int) -> float:
    """Ask for a while from ``callers`` at once; processor time of the server per request, us."""
    end = time.perf_counter() + ROUND_SECONDS
    done = 0

    async def ask() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await server.infer(requests[next(server.places) % len(requests)])
            done += 1

    before = cpu_seconds(server.pid)
    await asyncio.gather(*[ask() for _ in range(callers)])
    return (cpu_seconds(server.pid) - before) / done * 1e6


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median by order statistics; the whole range where there are too few values."""
    ordered = sorted(values)
    reach = 0.98 * math.sqrt(len(ordered))
    low, high = math.floor(len(ordered) / 2 - reach), math.ceil(len(ordered) / 2 + reach)
    return ordered[max(0, low)], ordered[min(len(ordered) - 1, high)]


async def compare(pids: tuple[int, int], addresses: tuple[str, str], options: argparse.Namespace) -> Result:
    """``pids`` and ``addresses``: of the plain server and of the monitored one."""
    requests = bodies(options.rows)
    async with grpc.aio.insecure_channel(addresses[0]) as first, grpc.aio.insecure_channel(addresses[1]) as second:
        plain, monitored = (
            Server(pid, channel.unary_unary(INFER), []) for pid, channel in zip(pids, (first, second), strict=True)
        )
        for _ in range(WARM_ROUNDS):
            for server in (plain, monitored):
                await one_round(server, requests, options.callers)
        end = time.perf_counter() + options.seconds
        while time.perf_counter() < end or len(plain.per_request_us) < 3:
            order = (plain, monitored) if len(plain.per_request_us) % 2 else (monitored, plain)
            for server in order:
                server.per_request_us.append(await one_round(server, requests, options.callers))
    ratios = [
        with_us / without for with_us, without in zip(monitored.per_request_us, plain.per_request_us, strict=True)
    ]
    return Result(
        statistics.median(plain.per_request_us),
        statistics.median(monitored.per_request_us),
        statistics.median(ratios),
        *interval(ratios),
        len(ratios),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = []
        for name in ("plain", "monitored"):
            repository = folder / name / "repository"
            version = repository / MODEL / "1"
            version.mkdir(parents=True)
            write_model(version / "model.onnx")
            if name == "monitored":
                write_profile(version / "profile.tgp")
            servers.append(stack.enter_context(serving(repository)))
        (plain_pid, plain), (monitored_pid, monitored) = servers
        result = asyncio.run(compare((plain_pid, monitored_pid), (plain["grpc"], monitored["grpc"]), options))
    print(f"server processor time per request: plain {result.plain_us:.1f} us, monitored {result.monitored_us:.1f} us")
    print(f"ratio {result.ratio:.3f}, 95 % interval {result.low:.3f} to {result.high:.3f}, {result.pairs} pairs")
    if options.output:
        options.output.write_text(json.dumps(asdict(result), indent=1))


if __name__ == "__main__":
    main()
