"""One loaded version as the gateway uses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from server.batching.batcher import Batcher
from server.runtime.base import ModelOptions
from server.telemetry.instruments import Instruments, ModelTelemetry
from server.telemetry.metrics import Counter
from server.types import ModelSpec


@dataclass(slots=True, eq=False, weakref_slot=True)
class Served:
    """One loaded version as the gateway uses it. ``calls`` counts the requests that hold it."""

    spec: ModelSpec
    batcher: Batcher
    options: ModelOptions
    telemetry: ModelTelemetry
    instruments: Instruments
    calls: int = 0
    on_idle: Callable[[], None] | None = None
    _routes: dict[tuple[str, str], Counter] = field(default_factory=dict)
    _attempts: dict[tuple[str, str], Counter] = field(default_factory=dict)

    def routed(self, arm: str, reason: str) -> None:
        """Count one routing decision for this version."""
        counter = self._routes.get((arm, reason))
        if counter is None:
            labels = (self.spec.name, self.spec.version, arm, reason)
            counter = self._routes[arm, reason] = self.instruments.route.labels(*labels)
        counter.inc()

    def attempted(self, arm: str, code: str) -> None:
        """Count one attempt by how it ended, before any retry or fallback."""
        counter = self._attempts.get((arm, code))
        if counter is None:
            labels = (self.spec.name, self.spec.version, arm, code)
            counter = self._attempts[arm, code] = self.instruments.attempts.labels(*labels)
        counter.inc()

    def release(self) -> None:
        """One request less; tells whoever waits for the last one."""
        self.calls -= 1
        if self.calls == 0 and self.on_idle is not None:
            on_idle, self.on_idle = self.on_idle, None
            on_idle()
