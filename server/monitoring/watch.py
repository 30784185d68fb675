"""What is asked for of one version's monitor, and the runtime that makes it together with the engine.

``MonitoredRuntime`` is where a monitor begins and ends: it is made when the version is loaded, before it may serve, and
given back when the engine is closed, whatever the way there was. So a version is watched exactly as long as it is
loaded, the profile always is the version's own, and a promotion or a rollback switches profiles by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from monitor.tap import Tap
from monitor.types import Settings
from server.errors import TidegateError
from server.monitoring.labels import LabelTap, LabelWatch
from server.monitoring.rules import RequestRules
from server.runtime.base import Batch, Engine, LoadRequest, Runtime
from server.types import ModelSpec, Tensor


@dataclass(slots=True, frozen=True)
class Watch:
    """How one version is watched. ``top``: columns that have metrics of their own."""

    profile: Path
    settings: Settings = field(default_factory=Settings)
    calibration: Path | None = None
    top: int = 20


@dataclass(slots=True, frozen=True)
class WatchedRequest(LoadRequest):
    """A version to be loaded and watched, or to have its labels joined."""

    watch: Watch | None = None
    labels: LabelWatch | None = None

    @classmethod
    def of(cls, request: LoadRequest, watch: Watch | None, labels: LabelWatch | None = None) -> WatchedRequest:
        known = {known.name: getattr(request, known.name) for known in fields(LoadRequest)}
        return cls(**known, watch=watch, labels=labels)


class Lease(Protocol):
    """One engine's part in a monitor: a tap for each of its instances, and what its requests pass by."""

    @property
    def taps(self) -> tuple[Tap, ...]: ...
    @property
    def rules(self) -> RequestRules | None: ...
    @property
    def labels(self) -> LabelTap | None: ...

    def release(self) -> None:
        """The engine runs no more batches. Never waits; twice is harmless."""
        ...


class Monitors(Protocol):
    """Who watches. ``lease`` blocks, compiles, and raises ModelLoadError when the profile cannot be used."""

    def lease(
        self, watch: Watch | None, spec: ModelSpec, instances: int, labels: LabelWatch | None = None
    ) -> Lease: ...


class WatchedEngine:
    """Implements ``Engine``: the one it was given, and its part in a monitor, which ends when it is closed."""

    def __init__(self, engine: Engine, lease: Lease) -> None:
        self._engine = engine
        self._lease = lease
        self.spec = engine.spec
        self.instances = engine.instances
        self.run_ns = engine.run_ns
        self.memory_bytes = engine.memory_bytes
        self.run: Callable[[int, Batch], list[Tensor]] = engine.run  # of each batch: nothing between

    @property
    def taps(self) -> tuple[Tap, ...]:
        """One for each instance; none when only labels are joined."""
        return self._lease.taps

    @property
    def rules(self) -> RequestRules | None:
        """What refuses requests."""
        return self._lease.rules

    @property
    def labels(self) -> LabelTap | None:
        """Where answers are remembered until their labels come."""
        return self._lease.labels

    def close(self) -> None:
        self._engine.close()
        self._lease.release()

    def __getattr__(self, name: str) -> Any:
        """What a runtime's own engines know beside the protocol, such as what inspection has found."""
        return getattr(self._engine, name)


class MonitoredRuntime:
    """Implements ``Runtime``: that of another, with versions watched that ask for it."""

    def __init__(self, runtime: Runtime, monitors: Monitors) -> None:
        self._runtime = runtime
        self._monitors = monitors

    def load(self, request: LoadRequest) -> Engine:
        """A warm engine with its kernels compiled, or ModelLoadError with one sentence saying why."""
        engine = self._runtime.load(request)
        if not isinstance(request, WatchedRequest) or (request.watch is None and request.labels is None):
            return engine
        try:
            lease = self._monitors.lease(request.watch, engine.spec, engine.instances, request.labels)
            return WatchedEngine(engine, lease)
        except TidegateError:
            engine.close()
            raise

    def describe(self) -> Mapping[str, object]:
        """Facts about the runtime that loads."""
        return self._runtime.describe()


def taps_of(engine: Engine) -> tuple[Tap, ...] | None:
    """What a batcher of this engine offers its batches to; None: nobody watches."""
    return (engine.taps or None) if isinstance(engine, WatchedEngine) else None


def rules_of(engine: Engine) -> RequestRules | None:
    """What the requests of this engine's version are held against; None: nothing."""
    return engine.rules if isinstance(engine, WatchedEngine) else None


def labels_of(engine: Engine) -> LabelTap | None:
    """Where the answers of this engine's version are remembered; None: nowhere."""
    return engine.labels if isinstance(engine, WatchedEngine) else None
