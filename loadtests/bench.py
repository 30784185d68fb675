"""Tidegate beside the usual stacks and beside its floors, in one interleaved run: ``make bench``.

    python -m loadtests.bench [--quick] [--only ROW] [--peer http=HOST:PORT,grpc=HOST:PORT,model=NAME,pid=PID,label=X]

All servers run at once, on one core; the generator has another one. Every round takes each cell once, in an order that
turns from round to round, so that a slow spell of the machine hits all alike: ratios and their intervals are what to
read. A neighbour on the machine widens the intervals and moves CPU time per request too, if less than rates.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop

from loadtests import bench_table, h2load, machine, models
from loadtests.bench_rows import (
    ALONE,
    FLOORS,
    HEAVY_ROW,
    OURS,
    ROWS,
    USUAL_GRPC,
    USUAL_HTTP,
    Row,
)
from loadtests.budget import Budget
from loadtests.crew import Crew, Pace, Sample, Way, checking
from loadtests.histogram import Histogram
from loadtests.models import HEAVY, MODEL, WIDE, bench_row
from loadtests.payloads import Payload, made_up
from loadtests.results import Result, check_folder
from loadtests.scenario import signature
from loadtests.servers import ROOT, Target, check_reachable, floor, parse_target, serving
from server.errors import InvalidArgument, TidegateError

_HEAVY_BATCH_S: Final = 0.005
_RAMP_S: Final = 0.15
_FIND_S: Final = 0.2
#: No round begins that would end later than this after the start, and the run ends by itself where one does.
LIMIT_S: Final = 570.0
#: Tails of an open loop and large JSON tensors need some seconds to show.
_OPEN_FACTOR: Final = 3.0
_LARGE_RATE: Final = 1.0


@dataclass(slots=True)
class Plan:
    rows: tuple[Row, ...]
    rounds: int
    seconds: float
    peers: tuple[Target, ...] = ()


@dataclass(slots=True)
class Bench:
    """All servers, the models, and what each is asked."""

    plan: Plan
    folder: Path
    result: Result
    targets: dict[str, Target] = field(default_factory=dict)
    payloads: dict[str, Payload] = field(default_factory=dict)
    wanted: dict[str, Payload] = field(default_factory=dict)
    budget: Budget = field(default_factory=lambda: Budget(LIMIT_S))
    server_cores: set[int] = field(default_factory=lambda: machine.split_cores()[0])
    generator_cores: set[int] = field(default_factory=lambda: machine.split_cores()[1])

    # --- set-up ----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Write the models and know their answers."""
        folder = self.folder / "models"
        folder.mkdir()
        models.write_model(folder / f"{MODEL}.onnx")
        models.write_wide(folder / f"{WIDE}.onnx")
        if self._has(HEAVY_ROW):
            with machine.pinned(self.server_cores):
                took = models.write_heavy_for(folder / f"{HEAVY}.onnx", _HEAVY_BATCH_S)
            self._note(f"heavy model: a batch of {models.HEAVY_ROWS} rows takes {1000 * took:.1f} ms alone.")
        random = np.random.default_rng(2)
        self.payloads = {
            MODEL: {"x": bench_row()},
            WIDE: {"x": (random.standard_normal((1, models.WIDE_FEATURES)) * 32).round().astype(np.float32) / 32},
            HEAVY: {"x": random.standard_normal((1, models.HEAVY_FEATURES)).astype(np.float32)},
        }
        for path in folder.glob("*.onnx"):
            answer = models.session(path).run(None, dict(self.payloads[path.stem]))[0]
            self.wanted[path.stem] = {"y": np.asarray(answer)}
        if h2load.path() is None:
            self._note("h2load is not installed: its rows are left out; all others are asked by our own generator.")
        elif any(row.external for row in self.plan.rows):
            self._note(
                "Rows of h2load are asked by it (C, the same headers each time), all others by our own generator."
            )

    def config(self) -> Path:
        """The gateway's configuration: these models, batches of the heavy one as it was measured alone."""
        lines = ["apiVersion: tidegate/v1", "models:"]
        for path in sorted((self.folder / "models").glob("*.onnx")):
            batching = f", batching: {{max_rows: {models.HEAVY_ROWS}}}" if path.stem == HEAVY else ""
            lines.append(f"  {path.stem}: {{source: {path}{batching}}}")
        config = self.folder / "config.yaml"
        config.write_text("\n".join([*lines, ""]))
        return config

    def start(self, stack: ExitStack) -> None:
        """Every server that the rows name."""
        named = {column for row in self.plan.rows for column in row.columns}
        for transport in OURS:
            if transport in named:
                print(f"  starting {transport}", flush=True)
                pid, ready = stack.enter_context(serving(self.config(), transport, self.server_cores))
                self.targets[transport] = Target(transport, ready["http"], ready["grpc"], pid=pid)
        for name in (*FLOORS, USUAL_GRPC, USUAL_HTTP):
            if name in named:
                print(f"  starting {name}", flush=True)
                models_of = self.folder / "models"
                self.targets[name] = stack.enter_context(floor(name, models_of, self.server_cores))
        for peer in self.plan.peers:
            self.targets[peer.label] = peer

    def _has(self, row: str) -> bool:
        return any(one.name == row for one in self.plan.rows)

    def _note(self, text: str) -> None:
        self.result.settings.setdefault("notes", []).append(text)

    # --- rounds ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Raises TimeoutError when the time is over before the first round has ended."""
        cells = [(row, column) for row in self.plan.rows for column in self._columns(row)]
        try:
            async with asyncio.timeout(self.budget.left_s()):
                print("  warming up", flush=True)
                for row, column in cells:
                    await self._cell(row, column, self.plan.seconds / 4)
                for number in self.budget.rounds(self.plan.rounds):
                    print(f"  round {number + 1} of {self.plan.rounds}", flush=True)
                    turn = (number + 1) * 7 % max(1, len(cells))
                    for row, column in cells[turn:] + cells[:turn]:
                        self.result.add(row.name, column, await self._cell(row, column, self.plan.seconds))
                    self.result.settings["rounds"] = number + 1
        except TimeoutError:
            if self.budget.left_s() or not self.result.settings["rounds"]:
                raise
        if self.result.settings["rounds"] < self.plan.rounds:
            self._note(f"Time was up after {self.result.settings['rounds']} of {self.plan.rounds} rounds.")

    def _columns(self, row: Row) -> list[str]:
        """Who is asked: those that the row names, and peers that speak its protocol, in closed loops over one model."""
        peers = [
            peer.label
            for peer in self.plan.peers
            if (peer.grpc if row.way.protocol.startswith("grpc") else peer.http)
            and row.model == MODEL
            and not row.pace.rate
        ]
        if row.external and h2load.path() is None:
            return []
        alone = [ALONE] if row.name == HEAVY_ROW else []
        return [*row.columns, *alone, *peers]

    async def _cell(self, row: Row, column: str, seconds: float) -> Sample:
        if column == ALONE:
            return self._alone(seconds)
        target = self.targets[column]
        payload, check = self._asked(row, column)
        if row.external:
            return await h2load.measure(target, row.model, row.way, payload, seconds)
        crew = Crew(target, row.model, row.way, payload, check)
        try:
            if row.pace.rate:
                return await self._paced(crew, row, target, seconds * _OPEN_FACTOR)
            if row.model_apart:
                await self._set_model_apart(crew)
            return await crew.measure(seconds, ramp_s=_RAMP_S)
        finally:
            await crew.close()
            if row.model_apart:
                machine.pin_tree(target.pid, self.server_cores)

    async def _set_model_apart(self, crew: Crew) -> None:
        """Leave the server's core to the thread that works most: the one that runs the model."""
        pid = crew.target.pid
        before = machine.thread_seconds(pid)
        await crew.measure(_FIND_S)
        after = machine.thread_seconds(pid)
        busiest = max(after, key=lambda thread: after[thread] - before.get(thread, 0.0))
        machine.pin_tree(pid, self.generator_cores)
        os.sched_setaffinity(busiest, self.server_cores)

    def _asked(self, row: Row, column: str) -> tuple[Payload, Any]:
        """What is sent, and how the answer is checked: floors have one answer only, and a peer's model is its own."""
        peer = next((one for one in self.plan.peers if one.label == column), None)
        if peer is not None and peer.model:
            return made_up(signature(peer.http, peer.grpc, peer.model), 1), None
        payload = self.payloads[row.model]
        if column in FLOORS and row.model != MODEL:
            return payload, None
        return payload, checking(row.way.protocol, self.wanted[row.model])

    async def _paced(self, crew: Crew, row: Row, target: Target, seconds: float) -> Sample:
        if not row.beside_large:
            return await crew.measure(seconds, row.pace, ramp_s=_RAMP_S)
        large = Crew(target, WIDE, Way("http-json", 2), self.payloads[WIDE], checking("http-json", self.wanted[WIDE]))
        try:
            small, _ = await asyncio.gather(
                crew.measure(seconds, row.pace, ramp_s=_RAMP_S),
                large.measure(seconds, Pace(_LARGE_RATE, "constant")),
            )
        finally:
            await large.close()
        return small

    def _alone(self, seconds: float) -> Sample:
        """The heavy model without a server, at the number of rows that gives most rows a second."""
        path = self.folder / "models" / f"{HEAVY}.onnx"
        with machine.pinned(self.server_cores):
            model = models.session(path)
            sizes = (1, models.HEAVY_ROWS // 2, models.HEAVY_ROWS)
            took = {rows: models.batch_seconds(model, rows, models.HEAVY_FEATURES, 3) for rows in sizes}
            best = max(sizes, key=lambda rows: rows / took[rows])
            batch = np.repeat(self.payloads[HEAVY]["x"], best, axis=0)
            cpu, started, done, latency = time.process_time(), time.perf_counter(), 0, Histogram()
            while time.perf_counter() - started < seconds:
                model.run(None, {"x": batch})
                done += best
            took_s = time.perf_counter() - started
        return Sample(took_s, done, {"ok": done}, latency, server_cpu_s=time.process_time() - cpu)


def chosen(names: list[str] | None) -> tuple[Row, ...]:
    """Rows by name. Raises InvalidArgument for one that is not there."""
    known = {row.name: row for row in ROWS}
    for name in names or ():
        if name not in known:
            raise InvalidArgument(f"--only takes one of {', '.join(known)}; got {name!r}")
    rows = tuple(row for row in ROWS if not names or row.name in names)
    return rows if h2load.path() else tuple(row for row in rows if not row.external)


def check_labels(peers: tuple[Target, ...]) -> None:
    """Raises InvalidArgument when a peer's label is that of another column."""
    taken = {ALONE, *(column for row in ROWS for column in row.columns)}
    for peer in peers:
        if peer.label in taken:
            raise InvalidArgument(f"a peer needs a label of its own, got {peer.label!r}")
        taken.add(peer.label)


def measure(plan: Plan) -> Result:
    """Start everything, measure, stop everything."""
    result = Result("bench", {"rounds": 0, "seconds": plan.seconds, "peers": [p.label for p in plan.peers]})
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        bench = Bench(plan, Path(name), result)
        bench.prepare()
        bench.start(stack)
        with machine.pinned(bench.generator_cores):
            uvloop.run(bench.run())
    return result


def main() -> int:
    # Its handlers log a line whenever a process is started beside a channel, and do nothing here.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="under 2 minutes: shorter and fewer rounds, wide intervals"
    )
    parser.add_argument("--rounds", type=int, help="6, or 2 with --quick")
    parser.add_argument("--seconds", type=float, help="length of a cell in a round: 1, or 0.3 with --quick")
    parser.add_argument("--only", action="append", metavar="ROW", help="only this row; may be repeated")
    parser.add_argument("--peer", action="append", default=[], metavar="KEY=VALUE,...", help="a V2 server beside ours")
    parser.add_argument("--output", type=Path, default=ROOT / "loadtests" / "results", help="folder for the result")
    options = parser.parse_args()
    # SIGTERM ends the servers as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The generator's gRPC library would speak of every process that is started beside it.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    rounds = (2 if options.quick else 6) if options.rounds is None else options.rounds
    seconds = (0.3 if options.quick else 1.0) if options.seconds is None else options.seconds
    if rounds < 1 or not 0.05 <= seconds <= 600:
        parser.error("rounds must be positive, and seconds from 0.05 to 600")
    try:
        peers = tuple(parse_target(text) for text in options.peer)
        check_labels(peers)
        for peer in peers:
            check_reachable(peer)
        check_folder(options.output)
        plan = Plan(chosen(options.only), rounds, seconds, peers)
        result = measure(plan)
    except (TidegateError, OSError, RuntimeError) as error:
        print(f"bench: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: ended early; every server is stopped", file=sys.stderr)
        return 130
    path = options.output / f"bench-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    result.save(path)
    print("\n" + bench_table.text(result, plan.rows))
    print(f"\nResult: {path}\nFor people: python -m loadtests plot {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
