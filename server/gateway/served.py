"""One loaded version as the gateway uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from router.breaker import Breaker
from router.decision import RouteDecision
from server.batching.batcher import Batcher, BatchRecord
from server.gateway.ends import NO_ERROR, NOTHING
from server.runtime.base import ModelOptions
from server.telemetry.instruments import Instruments, ModelTelemetry
from server.telemetry.metrics import Counter, Family
from server.types import Decision, ModelSpec, Tensor


class RequestRules(Protocol):
    """Rules beyond the signature that requests must keep."""

    def refusal(self, inputs: Sequence[Tensor]) -> str | None:
        """What is wrong with a request that fits the signature, or None."""
        ...


class Labels(Protocol):
    """Where the answers of a version wait for their labels. Nothing here waits or raises."""

    @property
    def labels(self) -> object:
        """What all versions of the model share."""
        ...

    def answered(
        self,
        ids: Sequence[str],
        arm: str,
        rows: int,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        unit: int,
        now_ns: int,
    ) -> None:
        """Remember one answered request by ``ids``; empty ones are passed over. ``now_ns``: wall time."""
        ...

    def wants(self, name: str) -> bool:
        """Whether an outcome of this name is this model's label."""
        ...

    def takes(self, text: str, name: str) -> bool:
        """Whether an outcome that is text and no number is a class of this model's labels."""
        ...

    def label(
        self,
        request_id: str,
        row: int,
        value: float | None,
        text: str,
        name: str,
        now_ns: int,
        time_ns: int | None = None,
    ) -> bool:
        """Take one outcome for the request's row: its number and its text; False when it is none of this model's.

        ``now_ns``, and when the outcome was (None: not said), in wall time.
        """
        ...


class CapturePort(Protocol):
    """Who records requests that are over. Called after the caller has the answer; neither waits nor raises."""

    def offer(
        self,
        model: str,
        client_id: str,
        tidegate_id: str,
        decision: Decision,
        spec: ModelSpec,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor] | None,
        status: str,
        latency_ns: int,
    ) -> None:
        """``model``: the models entry. No ``inputs``: the request was refused. ``status``: "ok" or the error's code."""
        ...


class _Count:
    """A counter with what it counts: an arm, and why a request came to it or how it ended there."""

    __slots__ = ("arm", "counter", "what")

    def __init__(self, arm: str, what: str, counter: Counter) -> None:
        self.arm = arm
        self.what = what
        self.counter = counter


class BatchCounts:
    """Counts the good runs of one version's engine."""

    __slots__ = ("_telemetry",)

    def __init__(self, telemetry: ModelTelemetry) -> None:
        self._telemetry = telemetry

    def count(self, record: BatchRecord) -> None:
        if record.error is None:
            self._telemetry.batch_done(record.rows or 1, record.assemble_ns, record.compute_ns, record.split_ns)


@dataclass(slots=True, eq=False)
class Served:
    """One loaded version as the gateway uses it. ``calls`` counts the requests that hold it.

    ``rules`` and ``labels`` are None for versions that have none.
    """

    spec: ModelSpec
    batcher: Batcher
    options: ModelOptions
    telemetry: ModelTelemetry
    instruments: Instruments
    rules: RequestRules | None = None
    labels: Labels | None = None
    calls: int = 0
    on_idle: Callable[[], None] | None = None
    #: Breakers of the names that lead here, by whatever keeps their policy (``server.gateway.policy.Breakers``).
    breakers: dict[object, Breaker] = field(default_factory=dict)
    _told: Decision | None = None
    _routes: dict[tuple[str, str], Counter] = field(default_factory=dict)
    _attempts: dict[tuple[str, str], Counter] = field(default_factory=dict)
    #: What was counted last: most often the next request is counted as the same.
    _route: _Count | None = None
    _attempt: _Count | None = None

    def decision(self, route: RouteDecision[Served]) -> Decision:
        """What answers say of a decision: the same object as long as they say the same."""
        told = self._told
        if (
            told is None
            or told.generation != route.generation
            or told.arm != route.arm
            or told.reason != route.reason
            or told.version != route.version
            or told.model != route.model
        ):
            told = self._told = Decision(route.model, route.version, route.arm, route.generation, route.reason)
        return told

    def routed(self, arm: str, reason: str) -> None:
        """Count one routing decision for this version."""
        count = self._route
        if count is None or count.arm is not arm or count.what is not reason:
            count = self._route = self._found(self._routes, self.instruments.route, arm, reason)
        count.counter.inc()

    def attempted(self, arm: str, code: str) -> None:
        """Count one attempt by how it ended, before any retry or fallback."""
        count = self._attempt
        if count is None or count.arm is not arm or count.what is not code:
            count = self._attempt = self._found(self._attempts, self.instruments.attempts, arm, code)
        count.counter.inc()

    def _found(self, counters: dict[tuple[str, str], Counter], family: Family[Counter], arm: str, what: str) -> _Count:
        counter = counters.get((arm, what))
        if counter is None:
            counter = counters[arm, what] = family.labels(self.spec.name, self.spec.version, arm, what)
        return _Count(arm, what, counter)

    def attempts(self) -> tuple[int, int]:
        """How many attempts have ended, and how many of them in an error of the version, as gates of rollouts count."""
        ended = [(code, int(counter.value)) for (_, code), counter in self._attempts.items() if code not in NOTHING]
        return sum(count for _, count in ended), sum(count for code, count in ended if code not in NO_ERROR)

    def release(self) -> None:
        """One request less; tells whoever waits for the last one."""
        self.calls -= 1
        if self.calls == 0 and self.on_idle is not None:
            on_idle, self.on_idle = self.on_idle, None
            on_idle()
