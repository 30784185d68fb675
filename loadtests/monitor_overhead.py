"""What the drift monitor adds to a served request: two servers, one with a profile and one without.

    python -m loadtests.monitor_overhead [--seconds 240] [--starts 48] [--callers 8] [--rows 1] [--output FILE.json]

Both serve the same model (30 floats in, 2 out) and are asked over gRPC by callers on other cores. What is compared is
the processor time of the whole server process per request, as the operating system counts it: drain thread, looks,
gauges and saves are in it.

**Rounds.** The servers are asked in turn, in rounds of a twentieth of a second whose order changes: a machine whose
speed wanders does so over longer times, and then for both alike. Before the first round each server has answered more
rows than the longest window holds, so that every look is made. Time is read before the first and after the last round,
when no row waits in the tap any more: rows that are counted, and saves that are made, while the other server is asked
are charged to the one whose they are.

**Starts.** Two processes of the same program differ by some percent as long as they live (where things lie in memory).
More rounds do not help against that; so both servers are started anew several times, each start gives one ratio, and
the result is the median over the starts, with its interval by order statistics.

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

from loadtests import machine, stats
from loadtests.lanes import INFER_PATH as INFER
from loadtests.models import FEATURES, MODEL, write_model
from loadtests.servers import serving
from monitor.profile import ReferenceProfile
from monitor.types import Settings
from server._pb import inference_pb2 as pb
from server.monitoring.service import Timing

REFERENCE_ROWS = 50_000
WARM_SECONDS = 1.0
ROUND_SECONDS = 0.05
#: Longer than rows wait to be counted.
SETTLE_SECONDS = Timing().drain_s + 0.1
#: Over the longest window by some panes.
WARM_ROWS = 6 * max(window.length for window in Settings().windows) // 5
#: Well over the longest window.
DISTINCT_ROWS = 40_000
NAMES = ("plain", "monitored")


@dataclass
class Server:
    """One of the two: its process, a channel to it, its processor time when it began to count, the requests since."""

    pid: int
    infer: Any
    began_s: float = 0.0
    requests: int = 0
    #: Which request is the next.
    places: Iterator[int] = field(default_factory=itertools.count)

    def begin(self) -> None:
        self.began_s, self.requests = machine.cpu_seconds(self.pid), 0

    def per_request_us(self) -> float:
        return (machine.cpu_seconds(self.pid) - self.began_s) / self.requests * 1e6


@dataclass
class Result:
    """Processor time per request in us, by start; the median ratio of monitored to plain with its interval.

    ``confidence``: what the interval really holds with. ``rounds``: of each server, over all starts.
    """

    plain_us: list[float]
    monitored_us: list[float]
    ratio: float
    low: float
    high: float
    confidence: float
    rounds: int


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


async def ask(server: Server, requests: Sequence[bytes], callers: int, seconds: float, least: int = 0) -> int:
    """Ask from ``callers`` at once, for a while and for ``least`` requests; how many were answered."""
    end = time.perf_counter() + seconds
    done = 0

    async def call() -> None:
        nonlocal done
        while done < least or time.perf_counter() < end:
            await server.infer(requests[next(server.places) % len(requests)])
            done += 1

    await asyncio.gather(*[call() for _ in range(callers)])
    return done


async def compare(
    pids: Sequence[int], addresses: Sequence[str], requests: Sequence[bytes], options: argparse.Namespace
) -> tuple[float, float, int]:
    """One start. ``pids`` and ``addresses``: of the plain server and of the monitored one.

    Processor time per request of each, us, and how many rounds each had: at least two.
    """
    async with grpc.aio.insecure_channel(addresses[0]) as first, grpc.aio.insecure_channel(addresses[1]) as second:
        plain, monitored = (
            Server(pid, channel.unary_unary(INFER)) for pid, channel in zip(pids, (first, second), strict=True)
        )
        for server in (plain, monitored):
            await ask(server, requests, options.callers, WARM_SECONDS, WARM_ROWS // options.rows)
        await asyncio.sleep(SETTLE_SECONDS)
        for server in (plain, monitored):
            server.begin()
        end = time.perf_counter() + options.seconds / options.starts
        rounds = 0
        while rounds % 2 or not rounds or time.perf_counter() < end:  # each is the first as often as the other
            for server in (plain, monitored) if rounds % 2 else (monitored, plain):
                server.requests += await ask(server, requests, options.callers, ROUND_SECONDS)
            rounds += 1
        await asyncio.sleep(SETTLE_SECONDS)
    return plain.per_request_us(), monitored.per_request_us(), rounds


def one_start(
    repositories: Sequence[Path], requests: Sequence[bytes], options: argparse.Namespace, *, turned: bool
) -> tuple[float, float, int]:
    """``compare`` of two new processes; ``turned``: the monitored one is started first."""
    cores, generator_cores = machine.split_cores()
    with ExitStack() as stack:
        order = reversed(repositories) if turned else repositories
        started = [stack.enter_context(serving(repository, cores=cores)) for repository in order]
        servers = started[::-1] if turned else started
        stack.enter_context(machine.pinned(generator_cores))
        addresses = [ready["grpc"] for _, ready in servers]
        return asyncio.run(compare([pid for pid, _ in servers], addresses, requests, options))


def measure(folder: Path, options: argparse.Namespace) -> Result:
    repositories = []
    for name in NAMES:
        repositories.append(folder / name / "repository")
        version = repositories[-1] / MODEL / "1"
        version.mkdir(parents=True)
        write_model(version / "model.onnx")
        if name == "monitored":
            write_profile(version / "profile.tgp")
    requests = bodies(options.rows)
    starts = [one_start(repositories, requests, options, turned=bool(start % 2)) for start in range(options.starts)]
    plain, monitored, rounds = zip(*starts, strict=True)
    found = stats.paired_ratio(monitored, plain)
    return Result(list(plain), list(monitored), found.value, found.low, found.high, found.confidence, sum(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240.0, help="of asking, over all starts")
    parser.add_argument("--starts", type=int, default=48)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if min(options.starts, options.callers, options.rows) < 1:
        parser.error("--starts, --callers and --rows must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options)
    print("server processor time per request of each start, us")
    for plain, monitored in zip(result.plain_us, result.monitored_us, strict=True):
        print(f"  plain {plain:6.2f}, monitored {monitored:6.2f}, ratio {monitored / plain:.3f}")
    medians = [statistics.median(values) for values in (result.plain_us, result.monitored_us)]
    print(f"medians: plain {medians[0]:.1f} us, monitored {medians[1]:.1f} us")
    interval = f"{result.confidence:.1%} interval {result.low:.3f} to {result.high:.3f}"
    print(f"ratio {result.ratio:.3f}, {interval}, {options.starts} starts, {result.rounds} rounds of each")
    if options.output:
        options.output.write_text(json.dumps(asdict(result), indent=1))


if __name__ == "__main__":
    main()
