"""What a rollout is told and what it answers with: states, orders of people, events and actions. No behaviour."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from router.rollout.gates import Evidence, Verdict

#: Who acts when no person does.
AUTOMATIC: Final = "automatic"


class State(enum.Enum):
    PENDING = "pending"
    LOADING = "loading"
    SHADOWING = "shadowing"
    STEP = "step"
    AWAITING = "awaiting"
    HOLD = "hold"
    PROMOTING = "promoting"
    PROMOTED = "promoted"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"
    FAILED = "failed"


class Order(enum.Enum):
    """What a person may ask for."""

    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    APPROVE = "approve"
    PROMOTE = "promote"
    ROLLBACK = "rollback"


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Accepted:
    """Admission and quality gates let the candidate in."""


@dataclass(slots=True, frozen=True)
class ConsentWanted:
    """Nothing speaks against the candidate, but a quality gate had no data to decide by: people are asked."""

    reason: str


@dataclass(slots=True, frozen=True)
class Loaded:
    """The candidate is loaded, warm, and its golden requests were answered as they should be."""


@dataclass(slots=True, frozen=True)
class CandidateFailed:
    """The candidate could not be admitted, loaded, warmed, or did not answer its golden requests."""

    reason: str


@dataclass(slots=True, frozen=True)
class Tick:
    """Time passed. ``evidence`` since the last tick, by gate; ``attempts``: how many requests reached the candidate.

    No traffic is a tick with nothing in it.
    """

    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    attempts: int = 0


@dataclass(slots=True, frozen=True)
class Ordered:
    """A person asks for something."""

    order: Order
    actor: str
    reason: str = ""


@dataclass(slots=True, frozen=True)
class Published:
    """The table of a Publish is in force."""

    serial: int


@dataclass(slots=True, frozen=True)
class AliasMoved:
    """The champion alias was moved as asked, to this version."""

    to: str


@dataclass(slots=True, frozen=True)
class AliasRefused:
    """The champion alias is not what it was: someone else has moved it."""

    reason: str


@dataclass(slots=True, frozen=True)
class Overridden:
    """A person moved the champion alias, or another rollout's promotion did; this one has no ground left."""

    actor: str
    reason: str = "the champion was moved"


@dataclass(slots=True, frozen=True)
class SpecRemoved:
    """The rollout is no longer in the configuration."""

    actor: str


@dataclass(slots=True, frozen=True)
class Recovered:
    """The process is back. ``crashed``: it did not end in order."""

    crashed: bool


Event: TypeAlias = (
    Accepted | ConsentWanted | Loaded | CandidateFailed | Tick | Ordered | Published | AliasMoved | AliasRefused
    | Overridden | SpecRemoved | Recovered
)  # fmt: skip


# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Load:
    """Load and warm the candidate (stable is there), then say Loaded or CandidateFailed."""


@dataclass(slots=True, frozen=True)
class Publish:
    """Put a table in force: ``weight`` (1/10,000) for the candidate beside ``stable``. Then say Published.

    ``stable`` is "" where the champion alias, as somebody else has moved it, is to decide.
    """

    serial: int
    stable: str
    weight: int


@dataclass(slots=True, frozen=True)
class Shadow:
    """Send copies to the candidate, or no longer."""

    on: bool


@dataclass(slots=True, frozen=True)
class MoveAlias:
    """In one transaction, if champion is ``was``: previous := ``was``, champion := ``to``. Then say AliasMoved; else
    AliasRefused."""

    was: str
    to: str


@dataclass(slots=True, frozen=True)
class KeepWarm:
    """This version must stay loaded until it is released."""

    version: str


@dataclass(slots=True, frozen=True)
class Release:
    """This version is no longer needed by the rollout."""

    version: str


@dataclass(slots=True, frozen=True)
class Record:
    """For the audit: what changed, by whom, why, and what every gate said at that moment."""

    origin: State
    state: State
    step: int
    weight: int
    actor: str
    reason: str
    evidence: tuple[Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "from": self.origin.value, "to": self.state.value, "step": self.step, "weight": self.weight,
            "actor": self.actor, "reason": self.reason, "evidence": [verdict.to_dict() for verdict in self.evidence],
        }  # fmt: skip


Action: TypeAlias = Load | Publish | Shadow | MoveAlias | KeepWarm | Release | Record
