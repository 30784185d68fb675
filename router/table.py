"""The immutable routing table. A reload builds a new one and swaps one reference; nothing here does I/O."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

from router.compiled import CompiledRoutes, is_version
from router.decision import RouteDecision, RouteQuery
from router.errors import UnknownModel
from router.types import ModelRoutes

__all__ = ["RoutingTable", "is_version"]

T = TypeVar("T")


class RoutingTable(Generic[T]):
    """Public model name -> routes, under one generation number. Never changed after it is built."""

    __slots__ = ("_compiled", "generation", "models")

    def __init__(self, models: Mapping[str, ModelRoutes[T]], generation: int) -> None:
        """Compile every model's routes. Raises BadRoutes for the first model whose routes make no sense."""
        self._fill({name: CompiledRoutes(name, routes) for name, routes in models.items()}, generation)

    def _fill(self, compiled: dict[str, CompiledRoutes[T]], generation: int) -> None:
        self._compiled = compiled
        self.models: Mapping[str, ModelRoutes[T]] = MappingProxyType(
            {name: routes.routes for name, routes in compiled.items()}
        )
        self.generation = generation

    def resolve(self, query: RouteQuery, draw: int) -> RouteDecision[T]:
        """Choose the version for one request.

        ``draw`` is a fresh random number 0 <= draw < 2^64: requests without a key and samples for shadows go by it,
        so that the decision itself stays a pure function. Raises UnknownModel, UnknownVersion, BadVersion, KeyMissing.
        """
        routes = self._compiled.get(query.model)
        if routes is None:
            raise UnknownModel(query.model)
        return routes.decide(query, draw, self.generation)

    def plain(self, model: str) -> RouteDecision[T] | None:
        """What ``resolve`` says to requests that name no version, where nothing else of them matters; else None."""
        routes = self._compiled.get(model)
        return None if routes is None else routes.plain(self.generation)

    def lookup(self, model: str, version: str) -> T:
        """The target of one version, or of stable for "": for questions about a model, where nothing is routed.

        Raises UnknownModel, UnknownVersion or BadVersion.
        """
        routes = self.compiled(model)
        return routes.pinned(version or routes.routes.stable).target

    def check(self, model: str, version: str) -> None:
        """Refuse, before a request has been read, what no rule could save: the errors of ``lookup``."""
        routes = self.compiled(model)
        if version and not routes.spoken_of(version):
            routes.pinned(version)

    def routes(self, model: str) -> ModelRoutes[T]:
        """Routes of one model as configured, or UnknownModel."""
        return self.compiled(model).routes

    def compiled(self, model: str) -> CompiledRoutes[T]:
        """Routes of one model as decided by, or UnknownModel."""
        routes = self._compiled.get(model)
        if routes is None:
            raise UnknownModel(model)
        return routes

    def explain(self, query: RouteQuery, draw: int | None = None) -> tuple[str, ...]:
        """Why one request goes where it goes, a sentence a step. Raises what ``resolve`` raises."""
        return tuple(self.compiled(query.model).explain(query, draw))

    def at(self, generation: int) -> RoutingTable[T]:
        """The same routes under another generation number."""
        table: RoutingTable[T] = RoutingTable({}, generation)
        table._fill(self._compiled, generation)
        return table

    def with_model(self, model: str, routes: ModelRoutes[T] | None) -> RoutingTable[T]:
        """The next generation, with one model's routes replaced, or removed when None. Raises BadRoutes."""
        compiled = dict(self._compiled)
        compiled.pop(model, None)
        if routes is not None:
            compiled[model] = CompiledRoutes(model, routes)
        table: RoutingTable[T] = RoutingTable({}, self.generation + 1)
        table._fill(compiled, self.generation + 1)
        return table
