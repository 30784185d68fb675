"""What reloading one model costs the requests of another: ``python -m loadtests.reload_cost``.

One server has two models. Requests for the first come without a pause; in one half of each pair nothing else happens,
in the other half the second model is given other options by ``POST /admin/v1/config`` again and again, so that each
time it is loaded anew, warmed, swapped in, and the version before the last one is closed. Which half comes first is
drawn. Read from the operating system, per request of the first model and as the ratio of the halves of a pair:

* ``loop``: CPU time of the thread that serves (parsing, routing, batches of short models, answers);
* ``process``: that of all threads, the loading itself among them.

The interval holds the median ratio with at least 95%, whatever the distribution (order statistics of the pairs).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from loadtests.crew import Crew, Protocol, Way, checking
from loadtests.models import MODEL, bench_row, session, write_model
from loadtests.servers import Target, serving
from loadtests.stats import interval

WAYS: dict[str, Protocol] = {"HTTP JSON": "http-json", "HTTP binary": "http-binary", "gRPC": "grpc"}


@dataclass
class Half:
    """One half of a pair: microseconds of CPU per request, and how many reloads there were."""

    loop_us: float
    process_us: float
    requests: int
    reloads: int


@dataclass
class Pair:
    quiet: Half
    busy: Half


@dataclass
class Reloads:
    """Gives the second model other options, every ``every_s``."""

    admin: str
    token: str
    folder: Path
    every_s: float
    done: int = 0
    options: int = field(default=0)

    def text(self) -> str:
        """The configuration; each is new."""
        self.options += 1
        return (
            "apiVersion: tidegate/v1\nmodels:\n"
            f"  {MODEL}: {{source: {self.folder}/{MODEL}.onnx}}\n"
            f"  other: {{source: {self.folder}/other.onnx, batching: {{max_queue_delay: {self.options}us}}}}\n"
        )

    def post(self) -> None:
        """One reload. Raises HTTPError when it was refused."""
        head = {"authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"http://{self.admin}/admin/v1/config", self.text().encode(), head)
        with urllib.request.urlopen(request, timeout=60):  # noqa: S310 - our own address
            self.done += 1

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Reload at once, and then again and again, as long as the block lasts; the last one is waited for."""
        over = asyncio.Event()

        async def repeat() -> None:
            while not over.is_set():
                started = time.perf_counter()
                await asyncio.to_thread(self.post)
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, self.every_s - (time.perf_counter() - started))):
                        await over.wait()

        task = asyncio.ensure_future(repeat())
        try:
            yield
        finally:
            over.set()
            await task


def loop_seconds(pid: int) -> float:
    """User and system time of a process's first thread, on which its event loop runs."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def half(crew: Crew, seconds: float, reloads: Reloads | None) -> Half:
    pid = crew.target.pid
    before, done = loop_seconds(pid), 0 if reloads is None else reloads.done
    if reloads is None:
        sample = await crew.measure(seconds)
    else:
        async with reloads.going_on():
            sample = await crew.measure(seconds)
    if not sample.completed:
        raise RuntimeError(f"no request was answered within {seconds:g} s: {sample.outcomes}")
    loop_us = 1e6 * (loop_seconds(pid) - before) / sample.completed
    return Half(loop_us, sample.cpu_us, sample.completed, 0 if reloads is None else reloads.done - done)


async def pair(crew: Crew, seconds: float, reloads: Reloads) -> Pair:
    found: dict[bool, Half] = {}
    for busy in random.sample((False, True), 2):
        found[busy] = await half(crew, seconds, reloads if busy else None)
    return Pair(found[False], found[True])


async def run(pairs: int, seconds: float, every_s: float, width: int) -> dict[str, list[Pair]]:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for model in (MODEL, "other"):
            write_model(folder / f"{model}.onnx")
        payload = {"x": bench_row()}
        wanted = {"y": np.asarray(session(folder / f"{MODEL}.onnx").run(None, dict(payload))[0])}
        config = folder / "config.yaml"
        config.write_text(Reloads("", "", folder, every_s).text())
        with serving(config) as (pid, ready):
            token = (folder / "state-native" / "admin-token").read_text().strip()
            reloads = Reloads(ready["admin"], token, folder, every_s, options=1)
            target = Target("gateway", ready["http"], ready["grpc"], pid=pid)
            crews = {
                name: Crew(target, MODEL, Way(protocol, width), payload, checking(protocol, wanted))
                for name, protocol in WAYS.items()
            }
            for crew in crews.values():
                await half(crew, 1.0, reloads)  # warm connections, code and the first reloads; not counted
            found: dict[str, list[Pair]] = {name: [] for name in crews}
            for number in range(pairs):
                print(f"  pair {number + 1} of {pairs}", flush=True)
                for name, crew in crews.items():
                    found[name].append(await pair(crew, seconds, reloads))
            for crew in crews.values():
                await crew.close()
        return found


def report(found: dict[str, list[Pair]], every_s: float) -> None:
    print(f"\nCPU per request beside reloads every {every_s:g} s, over that of quiet stretches: median [95% interval]")
    print(f"{'way':<14}{'quiet loop us':>14}{'loop ratio':>26}{'process ratio':>26}{'reloads':>9}{'pairs':>7}")
    for name, pairs in found.items():
        quiet = statistics.median(one.quiet.loop_us for one in pairs)
        ratios = [
            [one.busy.loop_us / one.quiet.loop_us for one in pairs],
            [one.busy.process_us / one.quiet.process_us for one in pairs],
        ]
        shown = ["{:.3f} [{:.3f}, {:.3f}]".format(statistics.median(some), *interval(some)) for some in ratios]
        reloads = sum(one.busy.reloads for one in pairs)
        print(f"{name:<14}{quiet:>14.1f}{shown[0]:>26}{shown[1]:>26}{reloads:>9}{len(pairs):>7}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12, help="of a quiet and a busy half, for each way to ask")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a half")
    parser.add_argument("--every", type=float, default=1.0, help="seconds from one reload to the next")
    parser.add_argument("--in-flight", type=int, default=16, help="connections, one request on each")
    parser.add_argument("--output", type=Path, help="file for the raw pairs")
    options = parser.parse_args()
    if min(options.pairs, options.seconds, options.every, options.in_flight) <= 0:
        parser.error("pairs, seconds, every and in-flight must be positive")
    # SIGTERM ends the server as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        found = asyncio.run(run(options.pairs, options.seconds, options.every, options.in_flight))
    except (OSError, RuntimeError) as error:
        print(f"reload_cost: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    report(found, options.every)
    if options.output:
        options.output.write_text(json.dumps({name: [asdict(one) for one in pairs] for name, pairs in found.items()}))
        print(f"Raw pairs: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
