"""The router's nouns: what is asked, what is decided, and the routes of one model.

The router knows versions by name and hands back an opaque ``target`` that its owner put there; it never looks inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

STABLE_ARM = "stable"
PINNED_ARM = "pinned"


@dataclass(slots=True)
class RouteQuery:
    """What a decision may look at. ``version`` is "" when the caller named none; header names are lower case."""

    model: str
    version: str
    metadata: Mapping[str, str]
    parameters: Mapping[str, bool | int | float | str]
    request_id: str


@dataclass(slots=True)
class RouteDecision(Generic[T]):
    """Which version answers, as which arm, why, and under which generation of the table."""

    model: str
    version: str
    arm: str
    reason: str
    generation: int
    target: T


@dataclass(slots=True, frozen=True)
class ModelRoutes(Generic[T]):
    """The served versions of one model and the one that answers when the caller names none."""

    versions: Mapping[str, T]
    stable: str

    def ordered(self) -> tuple[str, ...]:
        """Served versions, lowest number first."""
        return tuple(sorted(self.versions, key=int))
