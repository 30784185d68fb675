"""The gatekeeper as rollouts ask it: before a candidate gets a request, what do its quality gates say?"""

from __future__ import annotations

from router.rollout.quality import Status
from server.control.rollouts.actions import Admission, Quality
from server.gates.keeper import Gatekeeper


def kept_by(keeper: Gatekeeper) -> Quality:
    """Asks a gatekeeper; models without a policy pass."""

    async def quality(model: str, candidate: str, stable: str) -> Admission:
        if not keeper.covers(model):
            return Admission()
        outcome = await keeper.check(model, candidate, stable)
        evidence = outcome.to_json()["findings"]
        match outcome.status:
            case Status.PASSED:
                return Admission("passed", evidence=evidence)
            case Status.FAILED:
                return Admission("failed", outcome.reason, evidence)
            case _:
                return Admission("undecidable", outcome.reason, evidence)

    return quality
