"""A log line for a sample of the routing decisions, each with the probability that its arm had.

With propensities, what another split would have done can be estimated later from what this one did. What is logged is
the router's decision: an answer that came from elsewhere (a fallback, an open breaker) bears the same id.
"""

from __future__ import annotations

from random import getrandbits
from typing import Any

import structlog

from router.decision import RouteDecision
from router.types import FULL_SHARE
from server.gateway.served import Served

log: Any = structlog.get_logger("gateway")


class DecisionLog:
    """Logs ``sample`` (in 1/10,000, over 0) of the decisions it is told of, drawn one by one."""

    __slots__ = ("_edge", "_share")

    def __init__(self, sample: int) -> None:
        self._share = sample / FULL_SHARE
        self._edge = (sample << 64) // FULL_SHARE

    def note(self, route: RouteDecision[Served], tidegate_id: str, unit: int) -> None:
        """One decision about the request ``tidegate_id``; ``unit``: the key's hash, or the request's."""
        if getrandbits(64) >= self._edge:
            return
        log.info(
            "decision",
            model=route.public_name,
            version=route.version,
            arm=route.arm,
            reason=route.reason,
            generation=route.generation,
            id=tidegate_id,
            unit=f"{unit:016x}",
            propensity=route.propensity,
            sample=self._share,
        )
