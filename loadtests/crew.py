"""A crew: the lanes that ask one server in one way, and one measured window of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from loadtests import machine, payloads
from loadtests.histogram import Histogram
from loadtests.lanes import Check, GrpcioLane, GrpcLane, HttpLane, Lane, http_request
from loadtests.load import LATE_NS, UNANSWERED, Arrivals, Closed, Open, Taken
from loadtests.payloads import Payload
from loadtests.requests import Request, v2_request
from loadtests.servers import Target
from server.errors import InvalidArgument

Protocol: TypeAlias = Literal["http-json", "http-binary", "grpc", "grpcio"]
PROTOCOLS: Final[tuple[Protocol, ...]] = ("http-json", "http-binary", "grpc", "grpcio")


@dataclass(slots=True, frozen=True)
class Way:
    """How to ask. HTTP/1.1 carries one request at a time, so that ``streams`` is 1 there."""

    protocol: Protocol
    connections: int
    streams: int = 1

    def __post_init__(self) -> None:
        if self.connections < 1 or self.streams < 1:
            raise InvalidArgument(f"connections and streams must be positive, got {self.connections}, {self.streams}")
        if self.protocol.startswith("http") and self.streams != 1:
            raise InvalidArgument(
                f"HTTP/1.1 carries one request at a time on a connection: streams must be 1, got {self.streams}"
            )

    @property
    def in_flight(self) -> int:
        return self.connections * self.streams


@dataclass(slots=True, frozen=True)
class Pace:
    """Closed loop when ``rate`` is 0."""

    rate: float = 0.0
    arrivals: Arrivals = "poisson"


@dataclass(slots=True)
class Sample:
    """One window: what the generator counted, and what the operating system did meanwhile. None: not known."""

    seconds: float
    completed: int
    outcomes: dict[str, int]
    latency: Histogram
    late: Histogram = field(default_factory=Histogram)
    server_cpu_s: float | None = None
    client_cpu_s: float = 0.0
    #: Processor time of everything else on the machine: high where a neighbour disturbed.
    foreign_cpu_s: float | None = None
    instructions: int | None = None

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.completed / self.seconds if self.seconds else 0.0

    @property
    def cpu_us(self) -> float:
        """Of the server's process tree, per good answer; NaN when it is not known."""
        return _per(self.server_cpu_s, self.completed) * 1e6

    @property
    def instructions_each(self) -> float:
        return _per(self.instructions, self.completed)

    @property
    def errors(self) -> int:
        return sum(count for outcome, count in self.outcomes.items() if outcome != "ok")

    @property
    def late_sends(self) -> int:
        """Open loop: requests that left over a millisecond after they were due."""
        return self.late.over(LATE_NS)


def _per(amount: float | None, count: int) -> float:
    return float("nan") if amount is None or not count else amount / count


class Crew:
    """Opened once, used for any number of windows, one at a time. ``sampled``: see ``lanes``, of gRPC requests."""

    def __init__(
        self,
        target: Target,
        model: str,
        way: Way,
        payload: Payload,
        check: Check | None = None,
        version: str = "",
        sampled: float = 1.0,
    ) -> None:
        self.target, self.way = target, way
        self._make = _maker(target, request_of(target, model, version, way, payload), way, check, sampled)
        self._lanes: list[Lane] = []

    async def open(self) -> None:
        """Raises OSError when the server does not listen."""
        self._lanes = [self._make() for _ in range(self.way.connections)]
        await asyncio.gather(*(lane.open() for lane in self._lanes))

    async def close(self) -> None:
        lanes, self._lanes = self._lanes, []
        await asyncio.gather(*(lane.close() for lane in lanes))

    async def measure(
        self,
        seconds: float,
        pace: Pace | None = None,
        *,
        ramp_s: float = 0.0,
        count_instructions: bool = False,
        seed: int = 1,
    ) -> Sample:
        """One window. Lanes that owe answers are replaced, by the next window: the server may be gone."""
        if not self._lanes:
            await self.open()
        meter = Meter(self.target.pid, count_instructions)
        taken = await _loop(self._lanes, pace or Pace(), meter, seed).run(ramp_s, seconds)
        if taken.outcomes[UNANSWERED]:
            await self.close()
        return meter.sample(taken)


def _loop(lanes: Sequence[Lane], pace: Pace, meter: Meter, seed: int) -> Closed | Open:
    if not pace.rate:
        return Closed(lanes, meter.begin, meter.end)
    server, client = machine.split_cores()
    own_core = server != client
    return Open(lanes, pace.rate, pace.arrivals, seed=seed, spin=own_core, on_begin=meter.begin, on_end=meter.end)


def _maker(target: Target, request: Request, way: Way, check: Check | None, sampled: float) -> Callable[[], Lane]:
    """Makes one lane after the other, all with the same request."""
    if way.protocol.startswith("grpc"):
        if not target.grpc:
            raise InvalidArgument(f"target {target.label!r} has no gRPC address")
        kind: Any = GrpcLane if way.protocol == "grpc" else GrpcioLane
        return lambda: kind(target.grpc, request.body, way.streams, check, sampled)
    if not target.http:
        raise InvalidArgument(f"target {target.label!r} has no HTTP address")
    content = http_request(target.http, request.path, request.body, request.headers)
    return lambda: HttpLane(target.http, content, check)


def request_of(target: Target, model: str, version: str, way: Way, payload: Payload) -> Request:
    """The target's own request where it has one, that of the V2 protocol otherwise."""
    own = target.requests.get(way.protocol)
    return own or v2_request(way.protocol, target.model or model, version, payload)


def checking(protocol: Protocol, wanted: Payload) -> Check:
    """A check that an answer of this protocol has these outputs."""
    read = {"http-json": payloads.read_json, "http-binary": payloads.read_binary}.get(protocol, payloads.read_grpc)
    return lambda body: payloads.agrees(read(body), wanted)


class Meter:
    """Reads the clocks of the operating system at both ends of a window. ``pid`` 0: no server of ours."""

    def __init__(self, pid: int, count_instructions: bool = False) -> None:
        self._pid = pid
        self._counter = machine.Instructions(machine.tree(pid)) if pid and count_instructions else None
        self._before = self._after = (0.0, 0.0, 0.0)
        self._instructions: int | None = None

    def begin(self) -> None:
        self._before = self._read()

    def end(self) -> None:
        self._after = self._read()
        if self._counter is not None:
            self._instructions = self._counter.stop()

    def _read(self) -> tuple[float, float, float]:
        server = machine.cpu_seconds(self._pid) if self._pid else 0.0
        return server, time.process_time(), machine.busy_seconds()

    def sample(self, taken: Taken) -> Sample:
        server, client, busy = (after - before for after, before in zip(self._after, self._before, strict=True))
        counted = bool(self._pid) and server >= 0  # what a process has used goes with it when it is gone
        return Sample(
            taken.seconds,
            taken.completed,
            dict(taken.outcomes),
            taken.latency,
            taken.late,
            server_cpu_s=server if counted else None,
            client_cpu_s=client,
            foreign_cpu_s=max(0.0, busy - server - client) if counted else None,
            instructions=self._instructions,
        )
