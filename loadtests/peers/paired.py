"""Tidegate and its peers in one interleaved run: every server is up, every round takes each cell once.

A cell is a server, a protocol, and the cores: on ``one core`` the server has the first and the generator the last; on
``all cores`` nothing is pinned. HTTP is asked by h2load (C: it takes about a tenth of its core), gRPC by our own
generator, whose ``traceparent`` differs from call to call as in real traffic; h2load would repeat it.

Before a server is measured its answer is compared with the model's own, alone and with as many in flight as later on.
A server that fails meanwhile is left out of further rounds, and that is said.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from loadtests import h2load, machine, models
from loadtests.bench_rows import USUAL_GRPC, USUAL_HTTP, Row
from loadtests.budget import Budget
from loadtests.crew import Crew, Protocol, Sample, Way, checking
from loadtests.lanes import OK, Check
from loadtests.models import MODEL, bench_row
from loadtests.payloads import Payload
from loadtests.peers.catalog import Peer
from loadtests.peers.environments import FOLDER, Unavailable, pins, python_of
from loadtests.peers.running import Running, running, until_right
from loadtests.peers.servers.served import DELAY_MS, MOST_ROWS
from loadtests.results import Result
from loadtests.servers import Target, floor, serving
from server.errors import TidegateError

OURS: Final = "tidegate"
_FLOORS: Final = {USUAL_HTTP: ("http-json", "http-binary"), USUAL_GRPC: ("grpc",)}
_IN_FLIGHT: Final = 64
_STREAMS: Final = 8
_RAMP_S: Final = 0.15
_PROVE_S: Final = 0.3
#: A process that was stopped needs a moment until it answers as before.
_AWAKE_S: Final = 0.1
_TITLES: Final[Mapping[Protocol, str]] = {"http-json": "HTTP JSON", "http-binary": "HTTP binary", "grpc": "gRPC"}
ONE_CORE: Final = "one core"
ALL_CORES: Final = "all cores"


def rows_of(generator: str | None) -> tuple[Row, ...]:
    """Ways to ask. ``generator`` is where h2load is; without it HTTP too is asked by our own generator."""
    return tuple(
        Row(
            f"{title}, {cores}",
            f"{_IN_FLIGHT} in flight on {way.connections} connections, asked by {'h2load' if c else 'our generator'}",
            MODEL,
            way,
            (),
            external=c,
            all_cores=cores == ALL_CORES,
        )
        for cores in (ONE_CORE, ALL_CORES)
        for protocol, title in _TITLES.items()
        for way in [Way(protocol, _IN_FLIGHT) if protocol != "grpc" else Way("grpc", _STREAMS, _IN_FLIGHT // _STREAMS)]
        for c in [protocol != "grpc" and generator is not None]
    )


@dataclass(slots=True)
class Plan:
    peers: tuple[Peer, ...]
    rows: tuple[Row, ...]
    rounds: int
    seconds: float
    limit_s: float
    environments: Path = FOLDER


@dataclass(slots=True)
class Asked:
    """A column: a server that is up, and what its answers must be."""

    target: Target
    checks: Mapping[Protocol, Check]
    polls: bool = False


@dataclass(slots=True)
class Paired:
    """One run. ``columns`` lose those that fail."""

    plan: Plan
    folder: Path
    result: Result
    budget: Budget
    #: Interpreters of those that are installed.
    pythons: Mapping[str, Path]
    columns: dict[str, Asked] = field(default_factory=dict)
    row: np.ndarray[Any, np.dtype[np.float32]] = field(default_factory=bench_row)
    server_cores: set[int] = field(default_factory=lambda: machine.split_cores()[0])
    generator_cores: set[int] = field(default_factory=lambda: machine.split_cores()[1])

    # --- set-up ----------------------------------------------------------------------------------------------

    async def start(self, stack: ExitStack) -> None:
        """Everything that can be had. Raises RuntimeError when ours does not start."""
        place = self.folder / "models"
        place.mkdir()
        models.write_model(place / f"{MODEL}.onnx")
        wanted = np.asarray(models.session(place / f"{MODEL}.onnx").run(None, {"x": self.row})[0])
        say(f"  starting {OURS}")
        pid, ready = stack.enter_context(serving(self._config(place), cores=self.server_cores))
        self._add(Target(OURS, ready["http"], ready["grpc"], pid=pid), tuple(_TITLES), wanted)
        for name, protocols in _FLOORS.items():
            say(f"  starting {name}")
            self._add(stack.enter_context(floor(name, place, self.server_cores)), protocols, wanted)
        up = {peer.name: one for peer in self.plan.peers if (one := self._start(peer, place, stack))}
        for peer in self.plan.peers:
            if peer.name in up:
                await self._join(peer, up[peer.name], wanted)

    def _config(self, place: Path) -> Path:
        """Batches as large as the peers' may be. What waits goes in at once, as it does where nothing else is said."""
        batching = f"batching: {{max_rows: {MOST_ROWS}}}"
        config = self.folder / "config.yaml"
        source = place / f"{MODEL}.onnx"
        config.write_text(f"apiVersion: tidegate/v1\nmodels:\n  {MODEL}: {{source: {source}, {batching}}}\n")
        return config

    def _add(self, target: Target, protocols: tuple[Any, ...], wanted: Any) -> None:
        self.columns[target.label] = Asked(target, {one: checking(one, {"y": wanted}) for one in protocols})

    def _start(self, peer: Peer, place: Path, stack: ExitStack) -> Running | None:
        if peer.name not in self.pythons:
            return None
        say(f"  starting {peer.name}")
        model = place / f"{MODEL}.onnx"
        return stack.enter_context(
            running(peer, self.pythons[peer.name], model, self.row, self.folder, self.server_cores)
        )

    async def _join(self, peer: Peer, one: Running, wanted: Any) -> None:
        try:
            await until_right(peer, one, self.row, wanted)
        except Unavailable as error:
            self._leave_out(peer.name, str(error))
            return
        checks = {protocol: peer.check(protocol, wanted) for protocol in peer.protocols}
        self.columns[peer.name] = Asked(one.target, checks, peer.polls)

    def _leave_out(self, column: str, why: str) -> None:
        self.columns.pop(column, None)
        say(f"  {column} is left out: {why}")
        self.result.settings["left_out"][column] = why

    # --- rounds ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Raises TimeoutError when the time is over before the first round has ended."""
        for asked in self.columns.values():
            if asked.polls:
                machine.signal_tree(asked.target.pid, signal.SIGSTOP)
        try:
            say("  answers under load")
            for row, column in self._cells():
                await self._guarded(self._prove, row, column)
            for number in self.budget.rounds(self.plan.rounds):
                say(f"  round {number + 1} of {self.plan.rounds}")
                await self._round(number)
                self.result.settings["rounds"] = number + 1
        except TimeoutError:
            if not self.result.settings["rounds"]:
                raise
        finally:
            for asked in self.columns.values():
                machine.signal_tree(asked.target.pid, signal.SIGCONT)

    async def _round(self, number: int) -> None:
        """Each cell once, in an order that turns from round to round."""
        cells = self._cells()
        turn = number * 7 % max(1, len(cells))
        for row, column in cells[turn:] + cells[:turn]:
            await self._guarded(self._measure, row, column)

    def _cells(self) -> list[tuple[Row, str]]:
        return [
            (row, column)
            for row in self.plan.rows
            for column, asked in self.columns.items()
            if row.way.protocol in asked.checks
        ]

    async def _guarded(self, ask: Any, row: Row, column: str) -> None:
        """One cell, with the server and the generator where the row wants them."""
        asked = self.columns.get(column)
        if asked is None:  # it failed since the round began
            return
        everything = machine.usable_cores()
        machine.pin_tree(asked.target.pid, everything if row.all_cores else self.server_cores)
        try:
            with machine.pinned(everything if row.all_cores else self.generator_cores):
                async with asyncio.timeout(self.budget.left_s()), _awake(asked):
                    await ask(row, column, asked)
        except (TidegateError, OSError, Unavailable) as error:
            if column == OURS or not self.budget.left_s():
                raise
            self._leave_out(column, f"{row.name}: {type(error).__name__}: {error}")

    async def _prove(self, row: Row, column: str, asked: Asked) -> None:
        """Right answers with as many in flight as later on. Raises Unavailable."""
        sample = await self._crew(row, asked, _PROVE_S, ramp_s=0.0)
        if set(sample.outcomes) != {OK}:
            raise Unavailable(f"{column} does not answer rightly under load: {sample.outcomes}")

    async def _measure(self, row: Row, column: str, asked: Asked) -> None:
        if row.external:
            payload: Payload = {"x": self.row}
            sample = await h2load.measure(asked.target, MODEL, row.way, payload, self.plan.seconds)
        else:
            sample = await self._crew(row, asked, self.plan.seconds, ramp_s=_RAMP_S)
        self.result.add(row.name, column, sample)

    async def _crew(self, row: Row, asked: Asked, seconds: float, *, ramp_s: float) -> Sample:
        crew = Crew(asked.target, MODEL, row.way, {"x": self.row}, asked.checks[row.way.protocol])
        try:
            return await crew.measure(seconds, ramp_s=ramp_s)
        finally:
            await crew.close()


@asynccontextmanager
async def _awake(asked: Asked) -> AsyncIterator[None]:
    """A server that is stopped while others are measured goes on meanwhile."""
    if not asked.polls:
        yield
        return
    machine.signal_tree(asked.target.pid, signal.SIGCONT)
    try:
        await asyncio.sleep(_AWAKE_S)
        yield
    finally:
        machine.signal_tree(asked.target.pid, signal.SIGSTOP)


async def measure(plan: Plan, folder: Path) -> Result:
    """Start everything, measure, stop everything. ``folder`` is for what the servers write."""
    settings = {
        "rounds": 0,
        "rounds_wanted": plan.rounds,
        "seconds": plan.seconds,
        "peers": {peer.name: peer.says for peer in plan.peers},
        "batch": {"max_rows": MOST_ROWS, "delay_ms": DELAY_MS},
        "requirements": {peer.name: pins(peer.name) for peer in plan.peers},
        "left_out": {},
    }
    result = Result("peers", settings)
    pythons = _installed(plan, result)  # before the time begins
    paired = Paired(plan, folder, result, Budget(plan.limit_s), pythons)
    with ExitStack() as stack:
        await paired.start(stack)
        await paired.run()
    return result


def _installed(plan: Plan, result: Result) -> dict[str, Path]:
    """The interpreters of all that can be had; why not, of the others."""
    pythons: dict[str, Path] = {}
    for peer in plan.peers:
        try:
            pythons[peer.name] = python_of(peer.name, plan.environments)
        except Unavailable as error:
            say(f"  {peer.name} is left out: {error}")
            result.settings["left_out"][peer.name] = str(error)
    return pythons


def say(text: str) -> None:
    print(text, flush=True)
