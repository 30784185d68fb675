"""From what is loaded and what the configuration says to the gateway's table: one swap for each change.

A model that the configuration says nothing about is routed by default: its stable version answers, the others by
number. A public name with a routing section is bound anew whenever a version that it may lead to comes or goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from router.breaker import BreakerPolicy
from router.errors import BadRoutes
from router.experiment import ExperimentBooks, ExperimentSpec
from router.retry import RetryBudget
from router.table import RoutingTable
from router.types import ModelRoutes
from server.config.rollouts import Steering, steered
from server.config.routing import LATEST, Reference, RoutingSpec, bind
from server.gateway import Breakers, Gateway, ModelPolicy, RolloutBooks, Served
from server.shadowing import ShadowLane

log = structlog.get_logger("control")

T = TypeVar("T")


@dataclass(slots=True, frozen=True)
class Loaded:
    """What of one real model is ready: versions by number, the one that answers ("": none), and aliases.

    ``moving``: the aliases that name a version which is not ready, and that version; until it is, they lead elsewhere.
    """

    versions: Mapping[str, Served] = field(default_factory=dict)
    stable: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    moving: Mapping[str, str] = field(default_factory=dict)


_NOTHING = Loaded()


class Publisher:
    """Keeps the gateway's table and policies true to what is loaded. On the loop only."""

    def __init__(self, gateway: Gateway, changed: Callable[[], None]) -> None:
        self._gateway = gateway
        self._changed = changed
        self._loaded: dict[str, Loaded] = {}
        #: As the configuration says, and as it is with what rollouts make of it.
        self._given: Mapping[str, RoutingSpec] = {}
        self._specs: Mapping[str, RoutingSpec] = {}
        #: By models entry: what its rollout makes of its routing, and what is counted for it.
        self._steerings: dict[str, Steering] = {}
        self._books: dict[str, RolloutBooks] = {}
        self._missing: dict[str, tuple[Reference, ...]] = {}
        #: Under a configuration the generation is its number; without one every change of the table counts.
        self._configured = False
        #: Shadow lanes by models entry and shadow; kept by whoever loads shadows.
        self.lanes: dict[tuple[str, str], ShadowLane] = {}
        self._following: Callable[[], None] = lambda: None

    @property
    def specs(self) -> Mapping[str, RoutingSpec]:
        """The routing sections in force, by public name."""
        return self._specs

    def update(self, model: str, loaded: Loaded | None) -> None:
        """Something of one model came or went (None: all of it); publish if any name is routed otherwise now."""
        if loaded is None:
            self._loaded.pop(model, None)
        else:
            self._loaded[model] = loaded
        self._swap(self._names_of(model), self._gateway.table.generation + (not self._configured))

    def replace(self, specs: Mapping[str, RoutingSpec], loaded: Mapping[str, Loaded], generation: int) -> None:
        """A new configuration: everything that is loaded and said, swapped in under ``generation``."""
        self._configured = True
        self._given = specs
        self._specs = {name: self._steer(spec) for name, spec in specs.items()}
        self._loaded = dict(loaded)
        self._missing.clear()
        names = {*self._gateway.table.models, *specs, *loaded}
        self._swap(names, generation, always=True)

    def set_course(self, entry: str, steering: Steering | None, books: RolloutBooks | None) -> None:
        """What the rollout of an entry makes of its routing, from the next swap on (None: nothing)."""
        _keep(self._steerings, entry, steering)
        _keep(self._books, entry, books)
        changed = {name: self._steer(spec) for name, spec in self._given.items() if spec.entry == entry}
        self._specs = {**self._specs, **changed}

    def steer(self, entry: str, steering: Steering | None, books: RolloutBooks | None) -> bool:
        """The same at once; False when something that the routing leads to is not loaded, and nothing has changed."""
        before = self._steerings.get(entry), self._books.get(entry)
        self.set_course(entry, steering, books)
        names = [name for name, spec in self._specs.items() if spec.entry == entry]
        if steering is not None and not self._leads(names):
            self.set_course(entry, *before)
            return False
        self._swap(names, self._gateway.table.generation + (not self._configured), always=True)
        return True

    def _steer(self, spec: RoutingSpec) -> RoutingSpec:
        steering = self._steerings.get(spec.entry)
        return spec if steering is None else steered(spec, steering)

    def _leads(self, names: Iterable[str]) -> bool:
        """Whether stable and every arm of these names are loaded."""
        specs = [self._specs[name] for name in names]
        ends = [spec.stable for spec in specs]
        ends += [arm.to.target for spec in specs if spec.routes.split is not None for arm in spec.routes.split.arms]
        return all(self.find(end) is not None for end in ends)

    def alias(self, model: str, alias: str) -> str:
        """The version that an alias of a model leads to, as far as is known; "" for none."""
        return self._loaded.get(model, _NOTHING).aliases.get(alias, "")

    def named(self, model: str, alias: str) -> str:
        """The version that an alias of a model names, ready or not, as far as is known; "" for none."""
        return self._loaded.get(model, _NOTHING).moving.get(alias, "") or self.alias(model, alias)

    def led_to(self, model: str) -> set[str]:
        """The versions of a model that answer by the word of a rollout, whatever aliases say."""
        found: set[str] = set()
        for entry, steering in self._steerings.items():
            spec = self._specs.get(entry)
            if spec is not None and spec.model == model:
                found |= {steering.stable, steering.candidate if steering.weight else ""}
        return found - {""}

    def follow_with(self, follow: Callable[[], None]) -> None:
        """Call ``follow`` whenever the table is about to change, so that shadow lanes are there when it does."""
        self._following = follow

    def _names_of(self, model: str) -> list[str]:
        """The public names that may lead to a model."""
        names = [name for name, spec in self._specs.items() if model in _models_of(spec)]
        return names if model in self._specs else [model, *names]

    def _swap(self, names: Iterable[str], generation: int, *, always: bool = False) -> None:
        models = dict(self._gateway.table.models)
        for name in names:
            routes = self._routes(name)
            models.pop(name, None)
            if routes is not None:
                models[name] = routes
                self._gateway.unready.pop(name, None)
            elif name in self._specs:
                self._gateway.unready[name] = f"{self._specs[name].stable} is not loaded"
        if not always and models == self._gateway.table.models:
            return
        self._following()
        self._gateway.publish(_table(self._gateway.table, models, generation), self._policies(models))
        self._changed()

    def _routes(self, name: str) -> ModelRoutes[Served] | None:
        spec = self._specs.get(name)
        if spec is None:
            found = self._loaded.get(name, _NOTHING)
            return ModelRoutes(found.versions, found.stable) if found.stable else None
        bound = bind(spec, self._loaded.get(spec.model, _NOTHING).versions, self.find)
        if bound.missing and bound.missing != self._missing.get(name):
            log.warning("routes_lead_nowhere", name=name, missing=[str(reference) for reference in bound.missing])
        self._missing[name] = bound.missing
        return bound.routes

    def find(self, reference: Reference) -> tuple[str, Served] | None:
        """The version that a reference means now, when it is loaded."""
        found = self._loaded.get(reference.model, _NOTHING)
        number = reference.version
        if number == LATEST:
            number = max(found.versions, key=int, default="")
        elif reference.is_alias:
            number = found.aliases.get(number[1:], "")
        served = found.versions.get(number)
        return None if served is None else (number, served)

    def _policies(self, models: Mapping[str, ModelRoutes[Served]]) -> dict[str, ModelPolicy]:
        """By public name; the names of one models entry share theirs."""
        specs = [spec for spec in self._specs.values() if spec.name in models]
        policies = {entry: self._policy(self._specs[entry]) for entry in {spec.entry for spec in specs}}
        return {spec.name: policies[spec.entry] for spec in specs}

    def _policy(self, spec: RoutingSpec) -> ModelPolicy:
        """The policy of one models entry; what it has counted stays while its section does."""
        before = self._gateway.policies.get(spec.entry) or ModelPolicy()
        resilience = spec.resilience
        return ModelPolicy(
            resilience.retry,
            before.budget if before.retry == resilience.retry else RetryBudget(resilience.retry),
            resilience.timeout_ns,
            _books(spec.experiment, before.experiment),
            {shadow.id: lane for shadow in spec.shadows if (lane := self.lanes.get((spec.entry, shadow.id)))},
            _breakers(resilience.breaker, before.breakers),
            spec.entry,
            self._books.get(spec.entry),
        )


def _keep(held: dict[str, T], entry: str, value: T | None) -> None:
    """``value`` under ``entry``, or nothing."""
    held.pop(entry, None)
    if value is not None:
        held[entry] = value


def _books(wanted: ExperimentSpec | None, before: ExperimentBooks | None) -> ExperimentBooks | None:
    if wanted is None:
        return None
    return before if before is not None and before.spec == wanted else ExperimentBooks(wanted)


def _breakers(wanted: BreakerPolicy | None, before: Breakers | None) -> Breakers | None:
    if wanted is None:
        return None
    return before if before is not None and before.policy == wanted else Breakers(wanted)


def _table(
    table: RoutingTable[Served], models: Mapping[str, ModelRoutes[Served]], generation: int
) -> RoutingTable[Served]:
    """The next table; names whose routes did not change are not compiled again. Bad routes keep what was there."""
    changed = {name for name in {*models, *table.models} if models.get(name) != table.models.get(name)}
    following = table
    for name in sorted(changed):
        try:
            following = following.with_model(name, models.get(name))
        except BadRoutes as error:
            log.error("routes_refused", name=name, error=str(error))
    return following.at(generation)


def _models_of(spec: RoutingSpec) -> set[str]:
    routes = spec.routes
    ends = [rule.to for rule in routes.rules if not isinstance(rule.to, str)]
    ends += [shadow.to for shadow in routes.shadows]
    ends += [arm.to for arm in routes.split.arms] if routes.split is not None else []
    return {spec.model, *(end.model for end in ends)}
