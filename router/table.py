"""The immutable routing table. A reload builds a new one and swaps one reference; nothing here does I/O."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

from router.errors import BadVersion, UnknownModel, UnknownVersion
from router.types import PINNED_ARM, STABLE_ARM, ModelRoutes, RouteDecision, RouteQuery

T = TypeVar("T")


class RoutingTable(Generic[T]):
    """Model name -> routes, under one generation number. Never changed after it is built."""

    __slots__ = ("generation", "models")

    def __init__(self, models: Mapping[str, ModelRoutes[T]], generation: int) -> None:
        self.models: Mapping[str, ModelRoutes[T]] = MappingProxyType(dict(models))
        self.generation = generation

    def resolve(self, query: RouteQuery) -> RouteDecision[T]:
        """Choose the version for one request. Pure; raises UnknownModel, UnknownVersion or BadVersion."""
        routes = self.models.get(query.model)
        if routes is None:
            raise UnknownModel(query.model)
        if query.version:
            target = pinned(query.model, query.version, routes)
            return RouteDecision(query.model, query.version, PINNED_ARM, "version", self.generation, target)
        stable = routes.stable
        return RouteDecision(query.model, stable, STABLE_ARM, "default", self.generation, routes.versions[stable])

    def routes(self, model: str) -> ModelRoutes[T]:
        """Routes of one model, or UnknownModel."""
        routes = self.models.get(model)
        if routes is None:
            raise UnknownModel(model)
        return routes

    def with_model(self, model: str, routes: ModelRoutes[T] | None) -> RoutingTable[T]:
        """The next generation, with one model's routes replaced, or removed when None."""
        models = dict(self.models)
        models.pop(model, None)
        if routes is not None:
            models[model] = routes
        return RoutingTable(models, self.generation + 1)


def pinned(model: str, version: str, routes: ModelRoutes[T]) -> T:
    """The target of an explicitly named version."""
    target = routes.versions.get(version)
    if target is not None:
        return target
    if not is_version(version):
        raise BadVersion(model, version)
    raise UnknownVersion(model, version, routes.ordered())


def is_version(text: str) -> bool:
    """A version is a positive decimal integer without sign, spaces or leading zeros, of at most 18 digits."""
    return text.isascii() and text.isdigit() and len(text) <= 18 and text[0] != "0"
