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
    #: For so long the candidate's latency is not judged.
    ignore_first: WarmTime = default("10s", units.parse_duration)


class RolloutShadow(Section):
    """A phase before the first step in which the candidate gets copies only, judged by the paired gates."""

    #: The share of the requests that is copied.
    sample: Share = default("100%", parse_share)
    #: Compared pairs that are wanted at least.
    pairs: PositiveInt = 2000
    #: How long it lasts at least.
    min: WarmTime = default("0s", units.parse_duration)
    #: The most copies a second.
    rps: Annotated[float, Field(gt=0, le=1_000_000)] = 200.0


class RolloutStep(Section):
    """One step: the candidate's share, how long at least, what must be certified before the next, and by whom."""

    #: The candidate's share.
    weight: Share
    #: How long it lasts at least.
    min: WarmTime = default("0s", units.parse_duration)
    #: Gates by name, and what they must show: a ratio where the gate has ``worse_than``, a percentage where it has
    #: ``max_rate``.
    certify: dict[Text, Level] = Field(default_factory=dict)
    #: Whether people must agree before it ends.
    approve: bool = False


class RolloutGate(Section):
    """One gate; it says what it looks at by one of ``event``, ``paired``, ``monitor`` and ``feedback``.

    Gates on ``event`` (``error``, ``timeout``, ``latency > stable.p99``) and binary ``feedback`` take ``worse_than``
    (times stable's rate) or ``max_rate``; ``paired`` takes ``max_rate``; ``monitor`` takes ``over`` and ``for`` (looks
    running); numeric ``feedback`` takes ``worse_by`` and ``better``. A gate with none of them but ``alpha`` tests that
    keys fall on the arms by their weights.
    """

    #: An event whose rate is looked at.
    event: Literal["error", "timeout", "latency > stable.p99"] | None = None
    #: Disagreement of shadow pairs: in the largest element, or any.
    paired: Literal["argmax_disagree", "disagree"] | None = None
    #: The highest drift statistic.
    monitor: Literal["psi", "ks"] | None = None
    #: An outcome that callers report.
    feedback: RouteId | None = None
    #: Alone: the level of the test that keys fall on the arms by their weights.
    alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    #: Worse when the rate is over so many times stable's.
    worse_than: Annotated[float, Field(ge=1, le=1000)] | None = None
    #: Worse when the mean is worse by so much.
    worse_by: Annotated[float, Field(ge=0)] | None = None
    #: Which way a number is better; left out: higher.
    better: Literal["higher", "lower"] | None = None
    #: Worse when its own rate is over this.
    max_rate: Level | None = None
    #: Worse when the statistic is over this.
    over: Annotated[float, Field(ge=0)] | None = None
    #: So many looks running; left out: 3.
    for_: PositiveInt | None = Field(default=None, alias="for")
    #: Take the candidate's traffic away, or stop where it is.
    action: Literal["rollback", "hold"] = "rollback"


class Inconclusive(Section):
    """When a step has shown neither good nor bad for ``after``: wait for people, or go back. Never forward."""

    #: How long a step may show nothing.
    after: StepTime = default("2h", units.parse_duration)
    #: What happens then.
    then: Literal["hold", "rollback"] = "hold"


class Rollout(Section):
    """A candidate beside stable. ``id`` is also the salt: the same id draws the same users.

    With ``weight`` the share is what the file says. With ``steps`` it grows step by step as gates certify the
    candidate, and goes back by itself. ``hold: zero`` takes a held candidate's traffic away.
    """

    id: RouteId
    #: The version that is brought in; with an alias, every version that it comes to name.
    candidate: Target
    #: The candidate's share, by hand.
    weight: Share | None = None
    #: Compare with a slice of stable as large as the candidate and batched by itself, or with all of stable.
    control: Literal["matched", "all"] = "matched"
    #: Makes it impossible to compute one's arm from one's key.
    secret: Secret | None = Field(default=None, repr=False)
    start: RolloutStart = Field(default_factory=RolloutStart)
    shadow: RolloutShadow | None = None
    steps: Many[RolloutStep] = ()
    #: The gates, by a name of your own.
    gates: dict[Text, RolloutGate] = Field(default_factory=dict)
    inconclusive: Inconclusive = Field(default_factory=Inconclusive)
    #: What a process does that died while the candidate served.
    on_crash: Literal["rollback", "resume"] = "rollback"
    #: Whether a held candidate keeps its share.
    hold: Literal["keep", "zero"] = "keep"
    #: How long a version that was rolled back or failed is not tried again.
    cooldown: WarmTime = default("30m", units.parse_duration)
    #: How long the version before stays loaded after the promotion.
    keep_warm: WarmTime = default("15m", units.parse_duration)
    #: How long loading the candidate may take.
    load_timeout: StepTime = default("10m", units.parse_duration)
    #: How many different people a step with ``approve`` needs.
    approvals: Annotated[int, Field(ge=1, le=16)] = 1
    #: Whether none of them may be who started the rollout.
    two_person: bool = False


class GateRules(Section):
    """What holds for the gates of every rollout: their level, shared by those that react alike, and how often."""

    #: The chance of taking back a candidate that is within its tolerances.
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    #: How often gates are looked at.
    evaluate_every: StepTime = default("1s", units.parse_duration)
