"""server.control.publishing: what surrounds the decisions of each public name, and what of it outlives a swap."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from router.breaker import Outcome, State
from router.decision import RouteQuery
from server.batching.batcher import Batcher
from server.config.load import load_config
from server.config.routing import compile_routing
from server.control.publishing import Loaded, Publisher
from server.gateway import AdmissionLimits, Gateway, ModelPolicy, Served
from server.runtime.base import LoadRequest, ModelOptions
from server.runtime.fake import FakeRuntime, Script
from server.telemetry.instruments import Telemetry
from server.types import RequestLimits

BREAKER = "breaker: {window: 10s, min: 1, open_at: 50%, open_for: 60s}"
BOTH = 'versions: {"1": {source: a.onnx}, "2": {source: b.onnx}}'
ROLLOUT = 'rollout: {id: r1, candidate: "2", weight: 50%}'
EXPERIMENT = 'experiment: {id: e1, coverage: 50%, arms: {control: {to: "1", share: 50%}, b: {to: "2", share: 50%}}}'


class Rig:
    """A gateway with both versions of ``m`` loaded, and who publishes to it."""

    def __init__(self, folder: Path) -> None:
        self.loop = asyncio.get_running_loop()
        self.telemetry = Telemetry.create("test")
        self.path = folder / "config.yaml"
        self.gateway = Gateway(
            limits=RequestLimits(),
            admission=AdmissionLimits(),
            telemetry=self.telemetry,
            clock=time.monotonic_ns,
            call_soon=self.loop.call_soon,
            call_later=self.loop.call_later,
        )
        self.publisher = Publisher(self.gateway, lambda: None)
        self.versions = {version: self.load(version) for version in "12"}
        self.generation = 0

    def load(self, version: str) -> Served:
        options = ModelOptions()
        engine = FakeRuntime(Script()).load(LoadRequest("m", version, Path("none"), options))
        batcher = Batcher(
            engine,
            options.batching,
            clock=time.monotonic_ns,
            call_soon=self.loop.call_soon,
            call_soon_threadsafe=self.loop.call_soon_threadsafe,
            call_later=self.loop.call_later,
        )
        counted = self.telemetry.model("m", version)
        return Served(engine.spec, batcher, options, counted, self.telemetry.instruments)

    def apply(self, m: str, more: str = "") -> None:
        """Put a configuration in force: the rest of ``m``, and more models."""
        self.path.write_text(f"apiVersion: tidegate/v1\nmodels:\n  m: {{{BOTH}, stable: '1', {m}}}\n{more}")
        self.generation += 1
        specs = compile_routing(load_config(self.path))
        self.publisher.replace(specs, {"m": Loaded(self.versions, "1")}, self.generation)

    def reload(self, version: str) -> None:
        """Another instance in the place of a version."""
        self.versions[version] = self.load(version)
        self.publisher.update("m", Loaded(self.versions, "1"))

    def policy(self, name: str = "m") -> ModelPolicy:
        return self.gateway.policies[name]

    def open(self, name: str, version: str) -> None:
        """Let a name's breaker of a version open."""
        breaker = self.policy(name).breaker(self.versions[version])
        assert breaker is not None
        assert breaker.settle(breaker.admit(1), Outcome.FAILED, 1)

    def states(self, name: str = "m") -> list[State | None]:
        """Of the breakers of versions 1 and 2."""
        breakers = [self.policy(name).breaker(served) for served in self.versions.values()]
        return [None if breaker is None else breaker.state for breaker in breakers]


def run(folder: Path, body: Callable[[Rig], Coroutine[Any, Any, None]]) -> None:
    async def within() -> None:
        await body(Rig(folder))

    asyncio.run(asyncio.wait_for(within(), 30))


def test_aliases_have_the_very_policy_of_their_model(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.apply(f"aliases: [also, too], {EXPERIMENT}, resilience: {{{BREAKER}}}", "  other: {model: m}\n")
        assert rig.policy("also") is rig.policy("too") is rig.policy("m")
        assert rig.policy("m").experiment is not None
        assert (rig.policy("m").entry, rig.policy("other").entry) == ("m", "other")
        assert rig.policy("other").experiment is None
        assert rig.policy("other").budget is not rig.policy("m").budget

    run(tmp_path, body)


def test_feedback_by_one_name_reaches_what_was_answered_under_another(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        clicks = EXPERIMENT.replace("arms", "outcome: {name: click, kind: binary, window: 24h}, arms")
        rig.apply(f"aliases: [also], key: {{from: [header:x-user]}}, {clicks}", "  other: {model: m}\n")
        gateway, books = rig.gateway, rig.policy().experiment
        assert books is not None
        queries = [RouteQuery("also", "", {"x-user": f"u{n}"}, {}, "") for n in range(20)]
        routes = [gateway.table.resolve(query, 0) for query in queries]
        route = next(route for route in routes if route.arm == "b")
        gateway.expose(books, route, "t1", "id1")
        assert gateway.hear("m", "id1", "click", 1)
        assert gateway.hear("also", "t1", "click", 1)
        assert not gateway.hear("other", "id1", "click", 1)
        assert sum(arm.units for arm in books.counts) == 1

    run(tmp_path, body)


def test_each_name_has_breakers_of_its_own_by_its_own_policy(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        others = f"  with: {{model: m, resilience: {{{BREAKER.replace('60s', '9s')}}}}}\n  without: {{model: m}}\n"
        rig.apply(f"{ROLLOUT}, resilience: {{{BREAKER}}}", others)
        rig.open("m", "2")
        for _ in range(2):
            assert rig.states() == [State.CLOSED, State.OPEN]
            assert rig.states("with") == [State.CLOSED, State.CLOSED]
            assert rig.states("without") == [None, None]
            rig.apply(f"{ROLLOUT}, resilience: {{{BREAKER}}}", others)
        rig.open("with", "1")
        assert rig.states() == [State.CLOSED, State.OPEN]

    run(tmp_path, body)


def test_what_was_counted_stays_as_long_as_its_section_does(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.apply(f"{EXPERIMENT}, resilience: {{{BREAKER}}}")
        rig.open("m", "2")
        before = rig.policy()
        rig.apply(f"{EXPERIMENT}, resilience: {{{BREAKER}, timeout: 1s}}", "  other: {model: m}\n")
        after = rig.policy()
        assert (after.budget, after.experiment, after.breakers) == (before.budget, before.experiment, before.breakers)
        assert rig.states() == [State.CLOSED, State.OPEN]
        retry = "retry: {on: [unavailable], max: 2}"
        rig.apply(f"{EXPERIMENT.replace('e1', 'e2')}, resilience: {{{BREAKER.replace('60s', '9s')}, {retry}}}")
        after = rig.policy()
        assert after.budget is not before.budget
        assert after.experiment is not before.experiment
        assert rig.states() == [State.CLOSED, State.CLOSED]
        rig.apply(ROLLOUT)
        assert (rig.policy().experiment, rig.policy().breakers) == (None, None)

    run(tmp_path, body)


def alive() -> int:
    return sum(isinstance(found, Served) for found in gc.get_objects())


def test_a_version_loaded_anew_begins_with_a_closed_breaker_and_the_old_one_goes(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.apply(f"{ROLLOUT}, resilience: {{{BREAKER}}}")
        rig.open("m", "2")
        gc.collect()
        before = alive()
        rig.reload("2")
        assert rig.states() == [State.CLOSED, State.CLOSED]
        gc.collect()
        assert alive() == before

    run(tmp_path, body)
