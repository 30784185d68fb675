"""What the gateway does around the decisions of a public name: time limits, breakers, retries, shadows, experiments.

The routing table says who answers; this says what happens when that goes wrong, and who else is to hear of it. It is
swapped together with the table. Aliases of a name have the very same policy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from router.breaker import Breaker, BreakerPolicy, Outcome
from router.decision import RouteDecision
from router.experiment import ExperimentBooks
from router.retry import Failure, Next, RetryBudget, RetryPolicy, next_attempt
from router.types import ShadowRoute
from server.gateway.rollouts import RolloutBooks
from server.gateway.served import Served
from server.shadowing import ShadowLane

#: Errors that are the request's own, whichever version answers.
OWN_FAULT = frozenset({"invalid_argument", "cancelled", "deadline_exceeded", "draining"})
#: Errors that say nothing of a version's health: its own bound.
NO_VERDICT = OWN_FAULT | {"queue_full", "queue_timeout"}

_NO_RETRY = RetryPolicy()

#: Kept for one version; one more takes the place of the oldest, whose name then starts with clean counts.
_MAX_BREAKERS: Final = 256


class Breakers:
    """The breakers of one public name: one for each version that it leads to, as long as that is loaded.

    Another name that leads to the same version has others, by a policy of its own, or none.
    """

    __slots__ = ("policy",)

    def __init__(self, policy: BreakerPolicy) -> None:
        self.policy = policy

    def of(self, served: Served) -> Breaker:
        """The breaker of one version. It is kept with the version, and goes with it."""
        breaker = served.breakers.get(self)
        if breaker is None:
            if len(served.breakers) >= _MAX_BREAKERS:  # of names and policies that are gone, most likely
                del served.breakers[next(iter(served.breakers))]
            breaker = served.breakers[self] = Breaker(self.policy)
        return breaker


@dataclass(slots=True)
class ModelPolicy:
    """Of one models entry, under all its public names. ``entry`` "": of one name, which is not said.

    ``lanes``: shadow lanes by the id of their route. ``timeout_ns`` 0: no limit of its own. ``breakers`` None: every
    version is always tried.
    """

    retry: RetryPolicy = _NO_RETRY
    budget: RetryBudget = field(default_factory=lambda: RetryBudget(_NO_RETRY))
    timeout_ns: int = 0
    experiment: ExperimentBooks | None = None
    lanes: Mapping[str, ShadowLane] = field(default_factory=dict)
    breakers: Breakers | None = None
    entry: str = ""
    #: The counts of the rollout that runs, if one does.
    rollout: RolloutBooks | None = None

    def next(self, route: RouteDecision[Served], code: str, retries: int, now: int) -> Next:
        """What follows an attempt that ended with ``code``."""
        final = code in OWN_FAULT or _refused_by_stable(code, route)
        return next_attempt(self.retry, self.budget, Failure(code, final, retries, route.fallback is not None), now)

    def breaker(self, served: Served) -> Breaker | None:
        """The breaker that watches a version for this name."""
        return None if self.breakers is None else self.breakers.of(served)

    def lane(self, shadow: ShadowRoute[Served]) -> ShadowLane | None:
        """The lane of one sampled shadow."""
        return self.lanes.get(shadow.id)


def outcome_of(code: str, route: RouteDecision[Served]) -> Outcome:
    """How an attempt's end looks to a breaker."""
    if code == "ok":
        return Outcome.OK
    return Outcome.UNKNOWN if code in NO_VERDICT or _refused_by_stable(code, route) else Outcome.FAILED


def _refused_by_stable(code: str, route: RouteDecision[Served]) -> bool:
    """A graph that refuses an input is the caller's fault on stable; a candidate may be the one that is wrong."""
    return code == "input_rejected" and route.fallback is None


@dataclass(slots=True)
class Answered:
    """What is kept of an answered request, for feedback to be joined to."""

    experiment: ExperimentBooks
    unit: int


class FeedbackIndex:
    """Request ids -> what was answered, the newest ``capacity`` of them; older ones are forgotten."""

    def __init__(self, capacity: int = 200_000) -> None:
        self._capacity = capacity
        self._answered: OrderedDict[tuple[str, str], Answered] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answered)

    def add(self, model: str, request_id: str, answered: Answered) -> None:
        """Remember one id of a request of a models entry; a repeated id means its newest request."""
        self._answered[model, request_id] = answered
        self._answered.move_to_end((model, request_id))
        if len(self._answered) > self._capacity:
            self._answered.popitem(last=False)

    def find(self, model: str, request_id: str) -> Answered | None:
        """What was answered under this id, if it is still remembered."""
        return self._answered.get((model, request_id))
