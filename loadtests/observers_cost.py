"""What is spent on watching requests: the statistics, the trace gate and the drift monitor, of the whole.

    python -m loadtests.observers_cost [--starts 12] [--rounds 2] [--seconds 1] [--output RESULT.json]

Four servers of the same model run at once on one core, each with one more of them than the one before:

    none        nothing is counted, traced or watched
    statistics  the counters and histograms behind the metrics page and Triton's statistics, as every server has them
    gate        traces are on: the gate decides about each request, 1 % are sampled and their records made
    all         the model has a drift profile: each batch is offered to the tap, and its rows are counted beside

The first is a copy of the product in which the functions that count are empty (``loadtests.unobserved``), compiled as
the product is; the others are the product. Rounds ask each once, in one order and then in the other. A cost is the
difference of the processor time per request (of the whole process: threads of the monitor are in it) between two
neighbours, as a share of that of ``all`` in the same round: the shares of a round add up to the last line. They are
shares of real requests over sockets, with the caches as cold as requests leave them; a loop over the same calls alone
would be more exact, and of something else.

The price is noise: a share of 1 % needs a quiet machine. Two processes of one program differ by some percent as long as
they live, which no number of rounds takes away, so all servers are started anew many times, in one order and then in
the other, and asked in few rounds: the median of the rounds stands for each start, and the interval is that of the
starts. Of six it would be the whole range; of twelve, that of the middle eight. Two builds differ too, if less: that
stays.

gRPC is asked by our own generator, on 8 connections with 8 calls each; one ``traceparent`` in a hundred says that it is
sampled. HTTP is asked by h2load where it is installed, without one, so that the gate draws. The receiver of the spans
never answers: what exporting sampled requests costs goes with their number, and is not in these shares.

Goal: the three together take at most 10 % of the whole.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import uvloop

from loadtests import bench_table, h2load, machine, product, stats, unobserved
from loadtests.bench_rows import Goal, Row
from loadtests.crew import Crew, Sample, Way, checking
from loadtests.models import MODEL, bench_row, session, write_model
from loadtests.monitor_overhead import write_profile
from loadtests.payloads import Payload
from loadtests.results import Result, check_folder
from loadtests.servers import ROOT, Target, serving
from loadtests.stats import Estimate
from scripts.compiling import CannotCompile
from server.errors import TidegateError

GOAL: Final = 0.10
#: Of requests without a trace context, and of traceparents that we send.
SAMPLED: Final = 0.01
_RAMP_S: Final = 0.15
_IN_FLIGHT: Final = 64
#: Whose cost it is that a server takes more than the one before it.
COSTS: Final = {
    "statistics": "statistics",
    "gate": "trace gate",
    "all": "drift monitor: tap, counting, looks",
}
SERVERS: Final = ("none", *COSTS)


@dataclass(slots=True, frozen=True)
class Plan:
    """``rounds`` after each of the ``starts``. ``compiled``: the product and its copy, or their source."""

    starts: int
    rounds: int
    seconds: float
    compiled: bool = field(default_factory=product.compiled)


def rows() -> tuple[Row, Row]:
    """Ways to ask."""
    return (
        Row("gRPC 8x8", "8 connections, 8 calls each", MODEL, Way("grpc", 8, 8), SERVERS),
        Row("HTTP binary 64", "64 connections", MODEL, Way("http-binary", 64), SERVERS, external=bool(h2load.path())),
    )


# --- servers ---------------------------------------------------------------------------------------------------------


@contextmanager
def running(copies: Copies, files: Path, receiver: int, *, turned: bool = False) -> Iterator[dict[str, Target]]:
    """All four, by name. ``files``: where model and profile are; ``receiver``: the port that spans are sent to.

    ``turned``: the last is started first.
    """
    cores, _ = machine.split_cores()
    targets = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name in reversed(SERVERS) if turned else SERVERS:
            config = write_config(Path(folder, name), name, files, receiver)
            copy = copies.uncounted if name == "none" else copies.counted
            pid, ready = stack.enter_context(serving(config, cores=cores, copy=copy))
            targets[name] = Target(name, ready["http"], ready["grpc"], pid=pid)
        yield targets


class Copies(NamedTuple):
    """Where the product is, and where its copy is that counts nothing."""

    counted: Path
    uncounted: Path


def _copies(plan: Plan, folder: Path) -> Copies:
    """Raises LookupError or CannotCompile when there is no copy that counts nothing."""
    if plan.compiled:
        print("  the copy that counts nothing (compiling takes two minutes, once)", flush=True)
        return Copies(product.COMPILED, unobserved.compiled_copy())
    copy = folder / "unobserved"
    unobserved.copy_source(copy)
    return Copies(ROOT, copy)


def write_config(folder: Path, name: str, files: Path, receiver: int) -> Path:
    """The configuration of one of ``SERVERS``, in a new folder of its own.

    The size of batches is given: what a server finds out about it when it starts is not the same for each.
    """
    monitor = f", monitor: {{profile: {files / 'profile.tgp'}}}" if name == "all" else ""
    model = f"{{source: {files / MODEL}.onnx, batching: {{max_rows: {_IN_FLIGHT}}}{monitor}}}"
    lines = ["apiVersion: tidegate/v1", f"models: {{{MODEL}: {model}}}"]
    if name in ("gate", "all"):
        traces = f"{{enabled: true, sampling: {SAMPLED:.0%}, endpoint: 'http://127.0.0.1:{receiver}'}}"
        lines.append(f"telemetry: {{traces: {traces}}}")
    folder.mkdir()
    config = folder / "config.yaml"
    config.write_text("\n".join([*lines, ""]))
    return config


# --- rounds ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Rounds:
    """Asks. ``apart[row][server]``: the share of threads beside the loop's, by round."""

    plan: Plan
    wanted: Payload
    result: Result
    apart: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    async def run(self, targets: Mapping[str, Target]) -> None:
        """All rounds with one start. Raises RuntimeError when a request ends in an error, or in a wrong answer."""
        cells = [(row, name) for row in rows() for name in SERVERS]
        for row, name in cells:  # warm
            await self._ask(row, targets[name], self.plan.seconds / 4)
        for number in range(self.plan.rounds):
            for row, name in reversed(cells) if number % 2 else cells:
                await self._cell(row, targets[name])

    async def _cell(self, row: Row, target: Target) -> None:
        before = machine.thread_seconds(target.pid)
        sample = await self._ask(row, target, self.plan.seconds)
        took = {thread: time - before.get(thread, 0.0) for thread, time in machine.thread_seconds(target.pid).items()}
        self.result.add(row.name, target.label, sample)
        apart = self.apart.setdefault(row.name, {}).setdefault(target.label, [])
        apart.append(1 - took[target.pid] / sum(took.values()))

    async def _ask(self, row: Row, target: Target, seconds: float) -> Sample:
        payload = {"x": bench_row()}
        if row.external:
            sample = await h2load.measure(target, MODEL, row.way, payload, seconds)
        else:
            crew = Crew(target, MODEL, row.way, payload, checking(row.way.protocol, self.wanted), sampled=SAMPLED)
            try:
                sample = await crew.measure(seconds, ramp_s=_RAMP_S)
            finally:
                await crew.close()
        if sample.errors:
            raise RuntimeError(f"{row.name}, {target.label}: of {sample.latency.count} requests {sample.outcomes}")
        return sample


def measure(plan: Plan) -> Result:
    """Start everything, measure, stop everything, as often as it is planned."""
    result = Result("observers", asdict(plan))
    _, generator_cores = machine.split_cores()
    # The receiver takes connections and never reads them.
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as receiver:
        files = Path(name)
        write_model(files / f"{MODEL}.onnx")
        write_profile(files / "profile.tgp")
        answer = session(files / f"{MODEL}.onnx").run(None, {"x": bench_row()})[0]
        rounds, copies = Rounds(plan, {"y": np.asarray(answer)}, result), _copies(plan, files)
        for number in range(plan.starts):
            print(f"  start {number + 1} of {plan.starts}", flush=True)
            started = running(copies, files, receiver.getsockname()[1], turned=bool(number % 2))
            with started as targets, machine.pinned(generator_cores):
                uvloop.run(rounds.run(targets))
    result.settings["apart"] = rounds.apart
    result.load_end = machine.load_average()
    return result


# --- what is to be read ----------------------------------------------------------------------------------------------


def shares(result: Result, row: str) -> dict[str, Estimate]:
    """What each of ``COSTS`` takes of ``all``, and ``total`` what they take together: medians over the starts."""
    every = list(zip(*(result.values(row, name, "cpu_us") for name in SERVERS), strict=True))
    steps = {name: [(r[i] - r[i - 1]) / r[-1] for r in every] for i, name in enumerate(SERVERS) if i}
    steps["total"] = [(r[-1] - r[0]) / r[-1] for r in every]
    return {name: stats.median(_by_start(values, result.settings["rounds"])) for name, values in steps.items()}


def _by_start(values: Sequence[float], rounds: int) -> list[float]:
    """The median of the rounds of each start. A round counts when all its servers got to answer in it."""
    starts = [[value for value in values[i : i + rounds] if isfinite(value)] for i in range(0, len(values), rounds)]
    return [stats.median(start).value for start in starts if start]


def text(result: Result) -> str:
    """Everything that is to be read."""
    lines = [*bench_table.heading(result), ""]
    lines.append(f"{'us CPU per request':<24}" + "".join(f"{name:>12}" for name in SERVERS))
    for row in result.cells:
        values = [result.values(row, name, "cpu_us") for name in SERVERS]
        cells = [stats.median([value for value in one if isfinite(value)]).value for one in values]
        lines.append(f"{row:<24}" + "".join(f"{value:>12.2f}" for value in cells))
    lines += ["", f"{'share of all':<62}{'goal':>10}  {'median [interval]':<28}"]
    for row in result.cells:
        found = shares(result, row)
        lines += [f"{f'{row}: {what}':<62}{'':>10}  {found[name].text(3)}" for name, what in COSTS.items()]
        goal = Goal(row, "all", row, "none", "cpu_us", GOAL)
        verdict = bench_table.reached(goal, found["total"])
        lines.append(
            f"{f'{row}: all three':<62}{bench_table.limit_of(goal):>10}  {found['total'].text(3):<28}{verdict}"
        )
    return "\n".join([*lines, "", *_notes(result)])


def _notes(result: Result) -> Iterator[str]:
    for row, columns in result.settings["apart"].items():
        parts = [f"{name} {stats.median(values).value:.1%}" for name, values in columns.items()]
        yield f"{row}: of the processor time, threads beside the loop's took: {', '.join(parts)}."
    yield "us CPU: user and system time of the server's process tree per good answer. Medians of the rounds."
    yield "Intervals of medians over the starts by order statistics (95 %, or the whole range where there are few)."
    if not result.settings["compiled"]:
        yield "NOT COMPILED: these are shares of interpreted source, which no wheel is; `make compiled` before."
    yield from bench_table.generator_was_the_limit(result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=12, help="how often all servers are started anew")
    parser.add_argument("--rounds", type=int, default=2, help="after each start")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="length of a cell in a round (h2load: whole seconds)"
    )
    parser.add_argument("--output", type=Path, metavar="RESULT.json", help="keep the samples of the rounds")
    options = parser.parse_args()
    if options.starts < 1 or options.rounds < 1 or not 0.05 <= options.seconds <= 600:
        parser.error("starts and rounds must be positive, and seconds from 0.05 to 600")
    # SIGTERM ends the servers as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.output is not None:
            check_folder(options.output.parent)
        result = measure(Plan(options.starts, options.rounds, options.seconds))
    except (TidegateError, OSError, RuntimeError, LookupError, CannotCompile) as error:
        print(f"observers_cost: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("observers_cost: ended early; every server is stopped", file=sys.stderr)
        return 130
    if options.output is not None:
        result.save(options.output)
    print("\n" + text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
