"""Start order, readiness, signals and drain. Signals are ours: no framework installs a handler.

Order up: listeners (live, not ready), models, ready. Order down on SIGTERM or SIGINT: readiness off, both protocols
drain at once, models close, telemetry is flushed, exit 0. A second signal ends the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from server.errors import ModelLoadError

log = structlog.get_logger("lifecycle")


class Listener(Protocol):
    """One bound address: start gives the real HOST:PORT, drain stops taking and finishes what is in flight."""

    name: str

    async def start(self) -> str: ...

    async def drain(self, timeout_s: float) -> None: ...


class Readiness:
    """Is the server ready, and who wants to know when that changes. Callbacks run on the loop thread."""

    def __init__(self) -> None:
        self._ready = False
        self._watchers: set[Callable[[], object]] = set()

    def __bool__(self) -> bool:
        return self._ready

    def set(self, ready: bool) -> None:
        """Change it and tell every watcher."""
        self._ready = ready
        self.changed()

    def changed(self) -> None:
        """Something that readiness answers speak of has changed (a model came or went)."""
        for watcher in tuple(self._watchers):
            watcher()

    def subscribe(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Call ``callback`` after each change; returns the way out."""
        self._watchers.add(callback)
        return lambda: self._watchers.discard(callback)


class Lifecycle:
    """Runs one server from start to exit code."""

    def __init__(
        self,
        *,
        readiness: Readiness,
        listeners: list[Listener],
        start_models: Callable[[], Awaitable[None]],
        close_models: Callable[[], Awaitable[None]],
        reload: Callable[[], Awaitable[None]],
        background: list[Callable[[], Awaitable[None]]],
        close: Callable[[], Awaitable[None]],
        drain_seconds: float,
    ) -> None:
        self._readiness = readiness
        self._listeners = listeners
        self._start_models = start_models
        self._close_models = close_models
        self._reload = reload
        self._background = background
        self._close = close
        self._drain_seconds = drain_seconds
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._reload_wanted = asyncio.Event()

    async def run(self) -> int:
        """Serve until a signal; the process's exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload_wanted.set)
        try:
            return await self._serve()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Begin the drain; a second call ends the wait for what is in flight."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _serve(self) -> int:
        addresses: dict[str, str] = {}
        code = 0
        tasks: list[asyncio.Task[None]] = []
        started: list[Listener] = []
        try:
            for listener in self._listeners:
                addresses[listener.name] = await listener.start()
                started.append(listener)
            code = await self._until_stopped(addresses, tasks)
        except OSError as error:
            log.error("start_failed", error=str(error))
            code = 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._drain(started)
        return code

    async def _until_stopped(self, addresses: dict[str, str], tasks: list[asyncio.Task[None]]) -> int:
        """Load models, announce ready, serve, until the stop event. A stop while models load ends the wait."""
        loading = asyncio.ensure_future(self._start_models())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                return 0
            try:
                loading.result()
            except ModelLoadError as error:
                log.error("start_failed", error=error.message)
                return 1
            tasks += [asyncio.ensure_future(_alone(work)) for work in (self._reload_on_signal, *self._background)]
            self._readiness.set(True)
            log.info("ready", **addresses)
            await stopping
            return 0
        finally:
            stopping.cancel()
            if not loading.done():
                loading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await loading

    async def _reload_on_signal(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            try:
                await self._reload()
            except Exception:  # the boundary of one signal: the next one is obeyed again
                log.exception("reload_failed")

    async def _drain(self, started: list[Listener]) -> None:
        self._readiness.set(False)
        log.info("draining", seconds=self._drain_seconds)
        drains = asyncio.gather(*(listener.drain(self._drain_seconds) for listener in started))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((drains, hurry), return_when=asyncio.FIRST_COMPLETED)
        if not drains.done():
            log.warning("drain_cut_short")
            drains.cancel()
        hurry.cancel()
        await asyncio.gather(drains, hurry, return_exceptions=True)
        await self._close_models()
        await self._close()
        log.info("stopped")


async def _alone(work: Callable[[], Awaitable[None]]) -> None:
    """Work in the background. What ends it before its time is logged at once, not at the end of the process."""
    try:
        await work()
    except Exception:
        log.exception("background_ended", work=getattr(work, "__qualname__", repr(work)))
