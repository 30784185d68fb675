"""What becomes of loaded versions that left the routing table: drained, kept warm for a while, closed.

A version that was replaced answers the requests that hold it. When the last one has ended, or lost it at the end of
the drain, it is closed; or it stays loaded, ``warm``, and going back to it loads nothing. Of each model those stay
warm that its last change replaced: the next change closes them.

**A run that does not come back** blocks nobody. Its requests are cancelled at the end of the drain, and closing waits
for it on a thread of its own: an engine is never closed under a run.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Thread
from typing import Final

import structlog

from server.batching.offloop import OffLoopBatcher
from server.config.settings import ReloadSettings
from server.control.loading import FileState
from server.errors import ModelNotReady
from server.gateway import Served
from server.runtime.base import Engine

log = structlog.get_logger("control")

#: How long is waited for a run that goes on when everything else is done with its version.
CLOSE_SECONDS: Final = 5.0
_RETRY_AFTER_S: Final = 1.0


@dataclass(slots=True, frozen=True)
class LoadedVersion:
    """A loaded version: what serves it, the fingerprint of what it was made of, and the file (None: none of ours)."""

    served: Served
    engine: Engine
    fingerprint: object
    file: FileState | None

    @property
    def model(self) -> str:
        return self.served.spec.name

    @property
    def number(self) -> str:
        return self.served.spec.version


@dataclass(slots=True, eq=False)
class Retired:
    """A version on its way out. ``until``: up to when it is kept warm (``deadline`` by the loop); None: not at all."""

    version: LoadedVersion
    until: datetime | None = None
    deadline: float = 0.0
    cold: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Retirement:
    """Every version on its way out. On the loop only. ``closed(model, number)`` is told when one is gone."""

    def __init__(
        self, rules: ReloadSettings, closed: Callable[[str, str], None], *, close_seconds: float = CLOSE_SECONDS
    ) -> None:
        self.rules = rules
        self._closed = closed
        self._close_seconds = close_seconds
        self._warm: dict[str, list[Retired]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # -- in and out ---------------------------------------------------------------------------------------------

    def retire(self, versions: Iterable[LoadedVersion], *, warm: bool) -> None:
        """No table names these. Nobody waits for what follows.

        With ``warm`` they are what one change replaced: of their models, whatever was warm before is closed.
        """
        versions = list(versions)
        keep_s = self.rules.keep_warm_s if warm else 0.0
        until = datetime.now(UTC) + timedelta(seconds=keep_s) if keep_s else None
        deadline = asyncio.get_running_loop().time() + keep_s
        for model in {version.model for version in versions} if warm else ():
            self.cool(model)
        for version in versions:
            self._leave(Retired(version, until, deadline))

    def take_back(self, model: str, number: str, fingerprint: object) -> Retired | None:
        """A warm version that was made of the same, to be served again; None when there is none."""
        for retired in self._warm.get(model, ()):
            if retired.version.number == number and retired.version.fingerprint == fingerprint:
                self._forget_warm(retired)
                if retired.task is not None:
                    retired.task.cancel()
                retired.version.served.on_idle = None
                return retired
        return None

    def give_back(self, retired: Retired) -> None:
        """It was taken back, and is not served after all: it goes on as it was."""
        self._leave(Retired(retired.version, retired.until, retired.deadline))

    def cool(self, model: str | None = None) -> list[asyncio.Task[None]]:
        """Keep nothing warm of one model, or of any; the tasks at whose end those are closed."""
        models = list(self._warm) if model is None else [model]
        cooled = [retired for name in models for retired in self._warm.pop(name, ())]
        for retired in cooled:
            retired.cold.set()
        return [retired.task for retired in cooled if retired.task is not None]

    async def make_room(self) -> bool:
        """Give back the memory of everything that is kept warm; False when there is nothing."""
        tasks = self.cool()
        if tasks:
            await asyncio.wait(tasks, timeout=self.rules.drain_s + self._close_seconds)
        return bool(tasks)

    def warm(self) -> list[tuple[LoadedVersion, datetime]]:
        """What is loaded and not served, with the time (UTC) up to which it stays so."""
        kept = [retired for versions in self._warm.values() for retired in versions]
        return [(retired.version, retired.until) for retired in kept if retired.until is not None]

    def is_warm(self, model: str, number: str) -> bool:
        """Whether some version of this name and number is kept warm."""
        return any(retired.version.number == number for retired in self._warm.get(model, ()))

    async def close(self) -> None:
        """Keep nothing warm, and wait until all is closed: at most the drain, and a little for runs that go on."""
        self.cool()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # -- the way out --------------------------------------------------------------------------------------------

    def _leave(self, retired: Retired) -> None:
        if retired.until is not None:
            self._warm.setdefault(retired.version.model, []).append(retired)
        retired.task = task = asyncio.get_running_loop().create_task(self._way_out(retired))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _forget_warm(self, retired: Retired) -> None:
        model = retired.version.model
        kept = self._warm.get(model, [])
        if retired in kept:
            kept.remove(retired)
        if not kept:
            self._warm.pop(model, None)

    async def _way_out(self, retired: Retired) -> None:
        drained = await self._drain(retired.version.served)
        if drained and retired.until is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(retired.deadline):
                    await retired.cold.wait()
        self._forget_warm(retired)
        await self._close(retired.version)

    async def _drain(self, served: Served) -> bool:
        """Wait until no request holds this version; at the limit they lose it. False: then it cannot be used again.

        A request may let go of a version and take it again within one turn of the loop, for another try.
        """
        limit_s = self.rules.drain_s
        until = asyncio.get_running_loop().time() + limit_s
        while served.calls:
            idle = asyncio.Event()
            served.on_idle = idle.set
            try:
                async with asyncio.timeout_at(until):
                    await idle.wait()
            except TimeoutError:
                self._cancel_calls(served, limit_s)
                return False
        return True

    def _cancel_calls(self, served: Served, limit_s: float) -> None:
        spec = served.spec
        why = ModelNotReady(
            f"model '{spec.name}' version {spec.version} was replaced, and {limit_s:g} s later, the limit of its "
            f"drain, the request was not done",
            retry_after_s=_RETRY_AFTER_S,
        )
        cancelled = served.batcher.abandon(why)
        served.instruments.drain_cancelled.labels(spec.name).inc(cancelled)
        log.warning("drain_cancelled", model=spec.name, version=spec.version, requests=cancelled, limit_s=limit_s)

    async def _close(self, version: LoadedVersion) -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut() -> None:
            _shut(version.served, version.engine)
            with suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(done.set)

        # A daemon of its own: neither the next load nor the end of the process waits for a run that hangs.
        try:
            Thread(target=shut, name="tidegate-close", daemon=True).start()
            async with asyncio.timeout(self._close_seconds):
                await done.wait()
        except (TimeoutError, RuntimeError):  # its run goes on, or the system has no thread to spare
            log.warning("engine_left_open", model=version.model, version=version.number)
        self._closed(version.model, version.number)


def _shut(served: Served, engine: Engine) -> None:
    """Blocks until the last run has come back: closing an engine under a run is not safe."""
    batcher = served.batcher
    batcher.close()
    while isinstance(batcher, OffLoopBatcher) and batcher.hung():
        batcher.close()
    engine.close()
    _give_memory_back()


def _give_memory_back() -> None:
    """Collect cycles and hand freed heap pages to the system: an unloaded model's memory should show as free."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
