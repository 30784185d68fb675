"""Routes and queries for tests of the router; targets are texts that name model and version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.decision import RouteQuery
from router.types import Arm, Destination, KeySpec, ModelRoutes, RolloutSplit, ValueTest

USER = KeySpec(("header:x-user",))
PRESENT = ValueTest(present=True)


def to(version: str, model: str = "m") -> Destination[str]:
    return Destination(model, version, f"{model}:{version}")


def one_of(*values: str) -> ValueTest:
    return ValueTest(one_of=frozenset(values))


def rollout(*weights: int, name: str = "r", control: bool = False, secret: bytes = b"") -> RolloutSplit[str]:
    """Arms a2, a3... serve versions 2, 3...; controls are c2, c3..."""
    arms = enumerate(weights, start=2)
    return RolloutSplit(name, tuple(Arm(f"a{n}", to(str(n)), w, f"c{n}" if control else "") for n, w in arms), secret)


def routes(**more: Any) -> ModelRoutes[str]:
    """Model m with versions 1 (stable) to 9."""
    versions = {str(n): f"m:{n}" for n in range(1, 10)}
    return ModelRoutes(**({"versions": versions, "stable": "1", "key": USER} | more))


def ask(
    user: str = "",
    version: str = "",
    *,
    model: str = "m",
    headers: Mapping[str, str] | None = None,
    parameters: Mapping[str, Any] | None = None,
    request_id: str = "",
) -> RouteQuery:
    metadata = dict(headers or {})
    if user:
        metadata["x-user"] = user
    return RouteQuery(model, version, metadata, parameters or {}, request_id)
