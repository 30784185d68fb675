"""What is asked for of one version's monitor, and the runtime that makes it together with the engine.

``MonitoredRuntime`` is where a monitor begins and ends: it is made when the version is loaded, before it may serve, and
given back when the engine is closed, whatever the way there was. So a version is watched exactly as long as it is
loaded, the profile always is the version's own, and a promotion or a rollback switches profiles by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from monitor.tap import Tap
from monitor.types import Settings
from server.errors import TidegateError
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
    """A version to be loaded and watched."""

    watch: Watch | None = None

    @classmethod
    def of(cls, request: LoadRequest, watch: Watch) -> WatchedRequest:
        return cls(**{known.name: getattr(request, known.name) for known in fields(LoadRequest)}, watch=watch)


class Lease(Protocol):
    """One engine's part in a monitor: a tap for each of its instances."""

    @property
    def taps(self) -> Sequence[Tap]: ...

    def release(self) -> None:
        """The engine runs no more batches. Never waits; twice is harmless."""
        ...


class Monitors(Protocol):
    """Who watches. ``lease`` blocks, compiles, and raises ModelLoadError when the profile cannot be used."""

    def lease(self, watch: Watch, spec: ModelSpec, instances: int) -> Lease: ...


class WatchedEngine:
    """Implements ``Engine``: the one it was given, and its part in a monitor, which ends when it is closed."""

    def __init__(self, engine: Engine, lease: Lease) -> None:
        self._engine = engine
        self._lease = lease
        self.spec = engine.spec
        self.instances = engine.instances
        self.run_ns = engine.run_ns
        self.memory_bytes = engine.memory_bytes
        self._run = engine.run

    @property
    def taps(self) -> Sequence[Tap]:
        """One for each instance."""
        return self._lease.taps

    def run(self, instance: int, batch: Batch) -> list[Tensor]:
        return self._run(instance, batch)

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
        watch = request.watch if isinstance(request, WatchedRequest) else None
        if watch is None:
            return engine
        try:
            return WatchedEngine(engine, self._monitors.lease(watch, engine.spec, engine.instances))
        except TidegateError:
            engine.close()
            raise

    def describe(self) -> Mapping[str, object]:
        """Facts about the runtime that loads."""
        return self._runtime.describe()


def taps_of(engine: Engine) -> Sequence[Tap] | None:
    """What a batcher of this engine offers its batches to; None: nobody watches."""
    return engine.taps if isinstance(engine, WatchedEngine) else None
