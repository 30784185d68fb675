"""The ``rollout`` section of a model: a canary by hand (``weight``), or steps that a machine climbs by its gates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.config import units
from server.config.kinds import (
    FilePath,
    Many,
    PositiveInt,
    RouteId,
    Secret,
    Share,
    StepTime,
    Target,
    Text,
    WarmTime,
    default,
    parse_share,
)
from server.config.section import Section

_NUMBER_OR_PERCENT = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": units.PERCENT_PATTERN}]}


def parse_level(value: object) -> float:
    """A plain number, or a percentage as a fraction: 1.5 -> 1.5, "3%" -> 0.03."""
    if isinstance(value, str):
        return units.parse_percent(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"wanted a number or a percentage, got {units.show(value)}")
    return float(value)


#: A ratio or difference (a number), or a rate (a percentage).
Level = Annotated[float, BeforeValidator(parse_level), WithJsonSchema(_NUMBER_OR_PERCENT)]


class RolloutStart(Section):
    """What a candidate must do before it gets a request. ``warm``: batch sizes that are run beforehand.

    ``golden``: a file of requests with known answers, tried on the candidate alone. For ``ignore_first`` of serving its
    latency is not judged.
    """

    warm: Annotated[Many[PositiveInt], Field(max_length=64)] = ()
    golden: FilePath | None = None
    ignore_first: WarmTime = default("10s", units.parse_duration)


class RolloutShadow(Section):
    """A phase before the first step in which the candidate gets copies only, judged by the paired gates."""

    sample: Share = default("100%", parse_share)
    pairs: PositiveInt = 2000
    min: WarmTime = default("0s", units.parse_duration)
    rps: Annotated[float, Field(gt=0, le=1_000_000)] = 200.0


class RolloutStep(Section):
    """One step: the candidate's share, how long at least, what must be certified before the next, and by whom."""

    weight: Share
    min: WarmTime = default("0s", units.parse_duration)
    certify: dict[Text, Level] = Field(default_factory=dict)
    approve: bool = False


class RolloutGate(Section):
    """One gate; it says what it looks at by one of ``event``, ``paired``, ``monitor`` and ``feedback``.

    ``event`` (``error``, ``timeout``, ``latency > stable.p99``) and binary ``feedback`` take ``worse_than`` (times
    stable's rate) or ``max_rate``; ``paired`` takes ``max_rate``; ``monitor`` takes ``over`` and ``for`` (looks
    running); numeric ``feedback`` takes ``worse_by`` and ``better``. A gate with none of them but ``alpha`` tests that
    keys fall on the arms by their weights.
    """

    event: Literal["error", "timeout", "latency > stable.p99"] | None = None
    paired: Literal["argmax_disagree", "disagree"] | None = None
    monitor: Literal["psi", "ks"] | None = None
    feedback: RouteId | None = None
    alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    worse_than: Annotated[float, Field(ge=1, le=1000)] | None = None
    worse_by: Annotated[float, Field(ge=0)] | None = None
    better: Literal["higher", "lower"] | None = None
    max_rate: Level | None = None
    over: Annotated[float, Field(ge=0)] | None = None
    for_: PositiveInt | None = Field(default=None, alias="for")
    action: Literal["rollback", "hold"] = "rollback"


class Inconclusive(Section):
    """When a step has shown neither good nor bad for ``after``: wait for people, or go back. Never forward."""

    after: StepTime = default("2h", units.parse_duration)
    then: Literal["hold", "rollback"] = "hold"


class Rollout(Section):
    """A candidate beside stable. ``id`` is also the salt: the same id draws the same users.

    With ``weight`` the share is what the file says. With ``steps`` it grows step by step as gates certify the
    candidate, and goes back by itself. ``hold: zero`` takes a held candidate's traffic away. ``approvals`` different
    people approve; with ``two_person`` none of them may be who started it.
    """

    id: RouteId
    candidate: Target
    weight: Share | None = None
    control: Literal["matched", "all"] = "matched"
    secret: Secret | None = Field(default=None, repr=False)
    start: RolloutStart = Field(default_factory=RolloutStart)
    shadow: RolloutShadow | None = None
    steps: Many[RolloutStep] = ()
    gates: dict[Text, RolloutGate] = Field(default_factory=dict)
    inconclusive: Inconclusive = Field(default_factory=Inconclusive)
    on_crash: Literal["rollback", "resume"] = "rollback"
    hold: Literal["keep", "zero"] = "keep"
    cooldown: WarmTime = default("30m", units.parse_duration)
    keep_warm: WarmTime = default("15m", units.parse_duration)
    load_timeout: StepTime = default("10m", units.parse_duration)
    approvals: Annotated[int, Field(ge=1, le=16)] = 1
    two_person: bool = False


class GateRules(Section):
    """What holds for the gates of every rollout: their level, shared by those that react alike, and how often."""

    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    evaluate_every: StepTime = default("1s", units.parse_duration)
