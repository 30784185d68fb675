"""What is asked of the router, and what it decides. Made for every request: compiled where a wheel is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from router.types import Choice, ParameterValue, ShadowRoute, Unit

T = TypeVar("T")


@dataclass(slots=True, init=False)
class RouteQuery:
    """What a decision may look at. ``version`` is "" when the caller named none; header names are lower case."""

    model: str
    version: str
    metadata: Mapping[str, str]
    parameters: Mapping[str, ParameterValue]
    request_id: str

    def __init__(
        self,
        model: str,
        version: str,
        metadata: Mapping[str, str],
        parameters: Mapping[str, ParameterValue],
        request_id: str,
    ) -> None:
        self.model = model
        self.version = version
        self.metadata = metadata
        self.parameters = parameters
        self.request_id = request_id


class RouteDecision(Generic[T]):
    """Which version answers, as which arm, why, and under which generation of the table.

    ``model`` is the real model, ``public_name`` what the caller asked for. ``reason`` is the name of the rule that
    matched, or one of ``version``, ``default``, ``split``, ``keyless``, ``fallback``. Only ``counted`` decisions may
    enter the statistics of an arm. ``unit`` says what was drawn, the key or the single request; ``key_hash`` is the
    key's position in the split, 0 for ``request``. ``shadows`` are to get a copy after the answer. Never changed:
    routes where nothing is to be decided give one decision to all their requests.
    """

    __slots__ = (
        "arm", "counted", "fallback", "generation", "key_hash", "model", "propensity", "public_name", "reason",
        "shadows", "target", "unit", "version",
    )  # fmt: skip

    def __init__(
        self,
        model: str,
        version: str,
        arm: str,
        reason: str,
        generation: int,
        target: T,
        public_name: str,
        counted: bool,
        propensity: float,
        unit: Unit,
        key_hash: int,
        fallback: Choice[T] | None,
        shadows: tuple[ShadowRoute[T], ...],
    ) -> None:
        self.model = model
        self.version = version
        self.arm = arm
        self.reason = reason
        self.generation = generation
        self.target = target
        self.public_name = public_name
        self.counted = counted
        self.propensity = propensity
        self.unit = unit
        self.key_hash = key_hash
        self.fallback = fallback
        self.shadows = shadows

    def fall_back(self) -> RouteDecision[T] | None:
        """The same request on stable, from the same table; None when there is nowhere to fall back to.

        Not counted: what the arm did was counted by the attempt that failed. No second shadow copy is asked for.
        """
        choice = self.fallback
        if choice is None:
            return None
        return RouteDecision(
            choice.model, choice.version, choice.arm, "fallback", self.generation, choice.target,
            self.public_name, False, self.propensity, self.unit, self.key_hash, None, (),
        )  # fmt: skip
