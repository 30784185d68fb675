"""What a rollout is asked to do: steps, gates and policies, as plain frozen values.

Weights are hundredths of a percent (10,000 is everything), times are nanoseconds, rates and ratios plain numbers. What
is wrong with a specification `router.rollout.plan` says. It never changes while its rollout runs; ``fingerprint`` is
how a change is noticed.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from router.errors import BadRolloutState

NS_PER_S: Final = 1_000_000_000
MINUTE_NS: Final = 60 * NS_PER_S

#: Events of attempts that gates may look at, by ``source``. SLOW: slower than stable's 99th percentile, taken from
#: earlier data. Any other source is an outcome that callers report.
ERROR: Final = "error"
TIMEOUT: Final = "timeout"
SLOW: Final = "latency > stable.p99"
EVENTS: Final = (ERROR, TIMEOUT, SLOW)


class Reaction(enum.Enum):
    """What a gate does when it speaks."""

    ROLLBACK = "rollback"
    HOLD = "hold"


@dataclass(slots=True, frozen=True)
class RatioGate:
    """The candidate's rate of an event may be at most ``worse_than`` times stable's.

    ``source`` names the event (``error``, ``timeout``, SLOW, a drift flag) or the binary feedback that is counted.
    """

    source: str
    worse_than: float = 1.2
    reaction: Reaction = Reaction.ROLLBACK


@dataclass(slots=True, frozen=True)
class RateGate:
    """The candidate's own rate may be at most ``max_rate``. ``paired``: of shadow pairs that disagree, known while
    shadowing; otherwise of attempts with the event ``source``."""

    source: str
    max_rate: float
    reaction: Reaction = Reaction.ROLLBACK
    paired: bool = False


@dataclass(slots=True, frozen=True)
class MeanGate:
    """The mean of numeric feedback may be at most ``worse_by`` worse than stable's, in the feedback's own unit."""

    source: str
    worse_by: float = 0.0
    higher_is_better: bool = True
    reaction: Reaction = Reaction.HOLD


@dataclass(slots=True, frozen=True)
class LevelGate:
    """A number that something else computes (drift) may not be over ``over`` in ``looks`` looks running."""

    source: str
    over: float
    looks: int = 3
    reaction: Reaction = Reaction.HOLD


@dataclass(slots=True, frozen=True)
class MismatchGate:
    """Distinct keys must fall on the arms by their weights (sample ratio mismatch), tested at a level of its own."""

    alpha: float = 0.001
    reaction: Reaction = Reaction.HOLD


GateSpec: TypeAlias = RatioGate | RateGate | MeanGate | LevelGate | MismatchGate

_KINDS: Final[dict[str, type[GateSpec]]] = {
    "ratio": RatioGate,
    "rate": RateGate,
    "mean": MeanGate,
    "level": LevelGate,
    "mismatch": MismatchGate,
}


@dataclass(slots=True, frozen=True)
class StepSpec:
    """One step: how much, at least how long, and what must be shown before the next.

    ``certify`` holds (gate, margin): a ratio for a RatioGate, a rate for a RateGate, a difference for a MeanGate. With
    ``approve`` a person has the last word.
    """

    weight: int
    min_ns: int = 0
    certify: tuple[tuple[str, float], ...] = ()
    approve: bool = False

    @property
    def is_promotion(self) -> bool:
        """A last step of everything that asks for nothing is the promotion itself."""
        return self.weight == 10_000 and not self.certify and not self.approve


@dataclass(slots=True, frozen=True)
class ShadowPhase:
    """A phase before the first step in which the candidate sees copies only; its paired gates must be certified."""

    min_pairs: int = 2_000
    min_ns: int = 0


@dataclass(slots=True, frozen=True)
class RolloutSpec:
    """A rollout of ``candidate`` beside ``stable`` (version names). ``digest`` is the candidate's content.

    ``alpha`` is the chance, over the whole rollout, that a candidate which is within its tolerances is rolled back.
    ``hold_weight`` says whether a held candidate keeps its traffic. ``approvals`` different people must approve; with
    ``two_person`` none of them may be who started the rollout. In the first ``ignore_first_ns`` of serving, latency is
    not judged: caches are cold.
    """

    id: str
    model: str
    stable: str
    candidate: str
    digest: str
    steps: tuple[StepSpec, ...]
    gates: tuple[tuple[str, GateSpec], ...]
    shadow: ShadowPhase | None = None
    alpha: float = 0.05
    inconclusive_after_ns: int = 120 * MINUTE_NS
    inconclusive_then: Literal["hold", "rollback"] = "hold"
    on_crash: Literal["rollback", "resume"] = "rollback"
    hold_weight: Literal["keep", "zero"] = "keep"
    cooldown_ns: int = 30 * MINUTE_NS
    keep_warm_ns: int = 15 * MINUTE_NS
    load_timeout_ns: int = 10 * MINUTE_NS
    ignore_first_ns: int = 10 * NS_PER_S
    approvals: int = 1
    two_person: bool = False

    @property
    def serving_steps(self) -> tuple[StepSpec, ...]:
        """The steps in which both arms serve: all but a promotion at the end."""
        return self.steps[:-1] if self.steps and self.steps[-1].is_promotion else self.steps

    def fingerprint(self) -> str:
        """SHA-256 of everything in it, as hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["steps"] = [dataclasses.asdict(step) | {"certify": [*map(list, step.certify)]} for step in self.steps]
        values["gates"] = [[name, _gate_to_dict(gate)] for name, gate in self.gates]
        values["shadow"] = dataclasses.asdict(self.shadow) if self.shadow else None
        return values


def _gate_to_dict(gate: GateSpec) -> dict[str, Any]:
    kind = next(name for name, known in _KINDS.items() if type(gate) is known)
    return dataclasses.asdict(gate) | {"reaction": gate.reaction.value, "kind": kind}


def _gate_from_dict(values: Mapping[str, Any]) -> GateSpec:
    rest = {name: value for name, value in values.items() if name != "kind"}
    return _KINDS[values["kind"]](**rest | {"reaction": Reaction(rest["reaction"])})


def _step_from_dict(values: Mapping[str, Any]) -> StepSpec:
    return StepSpec(**{**values, "certify": tuple((name, margin) for name, margin in values["certify"])})


def spec_from_dict(values: Mapping[str, Any]) -> RolloutSpec:
    """The specification that ``to_dict`` wrote down. Raises BadRolloutState when that is not what ``values`` are."""
    try:
        return RolloutSpec(
            **{
                **values,
                "steps": tuple(map(_step_from_dict, values["steps"])),
                "gates": tuple((name, _gate_from_dict(gate)) for name, gate in values["gates"]),
                "shadow": ShadowPhase(**values["shadow"]) if values["shadow"] else None,
            }
        )
    except (AttributeError, KeyError, TypeError, ValueError) as failure:
        raise BadRolloutState(f"the stored specification is damaged ({type(failure).__name__}: {failure})") from None
