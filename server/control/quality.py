"""Quality gates as rollouts ask them: the model's policy, its candidate beside what is stable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from router.rollout.quality import Status
from server.control.registry import published_as
from server.control.rollouts.actions import Admission
from server.control.sources import ModelPlan, VersionPlan
from server.errors import ModelLoadError, VersionNotFound
from server.gates.keeper import Found, Gatekeeper
from server.gates.outcome import GateOutcome
from server.gateway import Served

#: ``served(model, version)``: a version that is loaded, "" for the one that answers. Raises TidegateError.
Lookup = Callable[[str, str], Served]

_WORDS: Final[dict[Status, Literal["passed", "failed", "undecidable"]]] = {
    Status.PASSED: "passed",
    Status.FAILED: "failed",
    Status.UNDECIDED: "undecidable",
}


class QualityGates:
    """What ``Hands.quality`` calls. On the loop; evaluations run on the keeper's thread."""

    def __init__(self, keeper: Gatekeeper) -> None:
        self._keeper = keeper

    async def __call__(self, model: str, candidate: str, stable: str) -> Admission:
        """What the model's policy says of a candidate beside stable; without a policy everything passes."""
        if not self._keeper.covers(model):
            return Admission()
        return _admission(await self._keeper.check(model, candidate, stable))


def _admission(outcome: GateOutcome) -> Admission:
    return Admission(_WORDS[outcome.status], outcome.reason, outcome.to_json()["findings"])


@dataclass(slots=True, frozen=True)
class LoadedVersions:
    """Versions as this process loads them: from wherever a plan says, with the options of their section.

    Implements ``server.gates.keeper.Versions``, on the keeper's thread.
    """

    plan: Callable[[str], ModelPlan]
    served: Lookup

    def find(self, model: str, reference: str) -> Found:
        """A version by its number. Raises VersionNotFound, or ModelLoadError for one that has no files of its own."""
        plan = self.plan(model)
        wanted = next((version for version in plan.versions if version.version == reference), None)
        if wanted is None:
            raise VersionNotFound(f"{model} has no version {reference}")
        request = plan.load_request(wanted)
        if request.upstream is not None:
            raise ModelLoadError(f"{model}:{reference} is another server's: what answers there cannot be pinned")
        declared = None if plan.declared is None else plan.declared(wanted)
        return Found(reference, self._digest(model, wanted), request, declared)

    def _digest(self, model: str, wanted: VersionPlan) -> str:
        """SHA-256 of what was published, else of the model's files as they were loaded."""
        found = published_as(wanted)
        return self.served(model, wanted.version).spec.digest if found is None else found.digest
