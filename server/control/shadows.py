"""Shadow lanes of the configuration: each has an engine and a batcher of its own, apart from those that answer callers.

Lanes follow the publisher: when the version that a shadow leads to comes, changes or goes, its engine is loaded or
closed in the background. Until it is there, copies are counted as dropped (``no_model``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from server.batching.offloop import OffLoopBatcher
from server.config.routing import RoutingSpec, ShadowSpec
from server.control.publishing import Publisher
from server.errors import TidegateError
from server.gateway import Served
from server.runtime.base import Engine
from server.shadowing import ShadowLane
from server.types import ModelSpec

log = structlog.get_logger("shadow")

LaneKey = tuple[str, str]


@dataclass(slots=True)
class Target:
    """A version loaded for a shadow alone."""

    spec: ModelSpec
    batcher: OffLoopBatcher
    engine: Engine
    origin: Served  # the version that it is a copy of


class ShadowLoader:
    """Keeps the lanes true to the configuration and to what is loaded; aliases share them. On the loop only.

    ``load(served)`` loads the version of ``served`` once more, off the loop; ``lane(spec, shadow)`` makes a lane
    without a target; ``batcher(engine, served)`` makes its batcher.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        load: Callable[[Served], Any],
        lane: Callable[[RoutingSpec, ShadowSpec], ShadowLane],
        batcher: Callable[[Engine, Served], OffLoopBatcher],
    ) -> None:
        self._publisher = publisher
        self._load = load
        self._lane = lane
        self._batcher = batcher
        self._specs: dict[LaneKey, ShadowSpec] = {}
        self._tasks: dict[LaneKey, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def follow(self) -> None:
        """The table changed: make, point or drop lanes. Called after each publication, and quick."""
        wanted = {
            (spec.entry, shadow.id): (spec, shadow)
            for name, spec in self._publisher.specs.items()
            if name == spec.entry
            for shadow in spec.shadows
        }
        lanes = self._publisher.lanes
        for key in [key for key in lanes if key not in wanted or self._specs[key] != wanted[key][1]]:
            self._drop(key)
        for key, (spec, shadow) in wanted.items():
            if key not in lanes:
                lanes[key] = self._lane(spec, shadow)
                self._specs[key] = shadow
            self._point(key, shadow)

    def report(self) -> list[dict[str, Any]]:
        """Every lane with what it has seen."""
        return [{"name": name, "to": to, **lane.report()} for (name, to), lane in self._publisher.lanes.items()]

    async def close(self) -> None:
        """Drop every lane and wait for its engine."""
        for key in tuple(self._publisher.lanes):
            self._drop(key)
        pending = {*self._tasks.values(), *self._closing}
        if pending:
            await asyncio.wait(pending)

    def _point(self, key: LaneKey, shadow: ShadowSpec) -> None:
        lane = self._publisher.lanes[key]
        found = self._publisher.find(shadow.to)
        served = None if found is None else found[1]
        current = lane.target
        if (current.origin if isinstance(current, Target) else None) is served or key in self._tasks:
            return
        self._tasks[key] = task = asyncio.get_running_loop().create_task(self._switch(key, lane, served))
        task.add_done_callback(lambda _: self._switched(key, lane, served))

    def _switched(self, key: LaneKey, lane: ShadowLane, served: Served | None) -> None:
        """What was wanted may have changed under the switch: if so, point again. A failure is not tried again."""
        self._tasks.pop(key, None)
        shadow = self._specs.get(key)
        if shadow is None:
            return
        found = self._publisher.find(shadow.to)
        if self._publisher.lanes[key] is not lane or (None if found is None else found[1]) is not served:
            self._point(key, shadow)

    async def _switch(self, key: LaneKey, lane: ShadowLane, served: Served | None) -> None:
        """Give a lane its new target, and close the old one."""
        old = lane.detach()
        if isinstance(old, Target):
            await self._close_target(old)
        if served is None:
            return
        try:
            engine = await self._load(served)
        except TidegateError as error:
            log.error("shadow_load_failed", name=key[0], to=key[1], error=error.message)
            return
        target = Target(engine.spec, self._batcher(engine, served), engine, served)
        if self._publisher.lanes.get(key) is lane:
            lane.target = target
            log.info("shadow_ready", name=key[0], to=key[1], version=engine.spec.version)
        else:
            await self._close_target(target)

    def _drop(self, key: LaneKey) -> None:
        lane = self._publisher.lanes.pop(key)
        del self._specs[key]
        target, lane.target = lane.target, None
        lane.close()
        if isinstance(target, Target):
            task = asyncio.get_running_loop().create_task(self._close_target(target))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close_target(self, target: Target) -> None:
        await asyncio.to_thread(_shut, target)


def _shut(target: Target) -> None:
    target.batcher.close()
    if not target.batcher.hung():
        target.engine.close()
