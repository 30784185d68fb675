"""Routing in the configuration file: where versions come from, rules, splits, shadows, and what follows a failure."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from server.config import units
from server.config.kinds import (
    ArmName,
    AttemptTime,
    CopySize,
    Count,
    FilePath,
    HeaderName,
    HeaderSecret,
    KeySource,
    Many,
    OutcomeWindow,
    PositiveInt,
    RouteId,
    RuleTarget,
    Secret,
    Share,
    Source,
    Target,
    Text,
    UpstreamName,
    UpstreamUrl,
    ValueText,
    VersionSource,
    Window,
    default,
    parse_share,
    scalar_text,
)
from server.config.section import Section


class Upstream(Section):
    """Another V2 server that has the version.

    ``model`` and ``version``: its names for it; left out, this model's name and the version that it chooses itself.
    ``timeout``: of one exchange. ``max_batch_rows``: of one request (0: what the upstream takes). ``ca_file``: PEM file
    of the authorities that are trusted for https. ``headers``: sent along, such as a token.
    """

    #: Where the server is; a path is a prefix.
    url: UpstreamUrl = Field(repr=False)
    model: UpstreamName | None = None
    version: UpstreamName | None = None
    timeout: AttemptTime = default("30s", units.parse_duration)
    max_batch_rows: Count = 0
    ca_file: FilePath | None = None
    headers: Annotated[dict[HeaderName, HeaderSecret], Field(json_schema_extra={"additionalProperties": False})] = (
        Field(default_factory=dict, repr=False)
    )


class ModelVersion(Section):
    """One version; exactly one of the keys.

    ``source``: a model file, a folder of one version, ``registry:NAME/VERSION`` or ``registry:NAME@ALIAS``.
    """

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    source: VersionSource | None = None
    #: Another server that has the version.
    upstream: Upstream | None = None

    @property
    def entry(self) -> Source | None:
        """The version of the registry that it is, if it is one."""
        return self.source if self.source is not None and self.source.path is None else None


class RoutingKey(Section):
    """Where the key of a request is found, the first present; and what becomes of requests without one."""

    #: Where the key is looked for, in this order.
    from_: Annotated[Many[KeySource], Field(alias="from")] = ()
    #: Requests without a key: spread by chance, sent to stable, or refused.
    missing: Literal["random", "stable", "reject"] = "random"


class ValueTest(Section):
    """What a value must be; exactly one of the keys. In the file a plain value means ``exact``."""

    exact: ValueText | None = None
    in_: Annotated[Many[ValueText], Field(min_length=1)] | None = Field(default=None, alias="in")
    prefix: Annotated[Text, Field(min_length=1)] | None = None
    present: Literal[True] | None = None


def _value_test(value: object) -> object:
    if isinstance(value, list):
        raise ValueError("wanted a value or a mapping; a list of values is written {in: [...]}")
    test = value if isinstance(value, dict) else {"exact": scalar_text(value)}
    if len(test) != 1:
        raise ValueError(
            f"wanted exactly one of exact, in, prefix and present, got {', '.join(map(str, test)) or 'none'}"
        )
    return test


def _version_test(value: object) -> object:
    return {"present": True} if value == "any" else _value_test(value)


_SCALAR_SCHEMA: Final = {"type": ["string", "number", "boolean"]}
_VALUE_TEST_SCHEMA: Final = {
    "anyOf": [
        _SCALAR_SCHEMA,
        {
            "type": "object",
            "properties": {
                "exact": _SCALAR_SCHEMA,
                "in": {"type": "array", "items": _SCALAR_SCHEMA, "minItems": 1},
                "prefix": {"type": "string", "minLength": 1},
                "present": {"const": True},
            },
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": False,
        },
    ]
}
ValueChoice = Annotated[ValueTest, BeforeValidator(_value_test), WithJsonSchema(_VALUE_TEST_SCHEMA)]
#: ``any``, a version, or a test of it.
VersionChoice = Annotated[ValueTest, BeforeValidator(_version_test), WithJsonSchema(_VALUE_TEST_SCHEMA)]


class RuleMatch(Section):
    """Conditions that must all hold. Without ``version``, a request that names a version never matches."""

    #: ``any``, or a test of the version that the request names.
    version: VersionChoice | None = None
    #: Tests of headers (gRPC: metadata), by name.
    header: dict[Text, ValueChoice] = Field(default_factory=dict)
    #: Tests of request parameters, by name.
    parameter: dict[Text, ValueChoice] = Field(default_factory=dict)
    #: A test of the value of ``tenant_header``.
    tenant: ValueChoice | None = None


class RoutingRule(Section):
    """Requests that match go where it says, before any split, and enter no statistics."""

    #: Its name, the ``reason`` in logged decisions.
    name: RouteId
    match: RuleMatch
    #: ``requested`` lets the version that was asked for through.
    to: RuleTarget


class ExperimentArm(Section):
    """One arm: the version it leads to, and its share of the keys covered."""

    #: The version that it leads to.
    to: Target
    #: Its share of the keys covered; all shares sum to 100%.
    share: Share


class Outcome(Section):
    """What is measured through feedback. ``silence``: whether units that nothing was heard of count as 0."""

    #: The name that feedback gives it.
    name: RouteId
    #: Whether it is 0 or 1, or any number.
    kind: Literal["binary", "number"]
    #: How long after the answer an outcome counts.
    window: OutcomeWindow = default("24h", units.parse_duration)
    silence: Literal["zero", "skip"] = "zero"


class Experiment(Section):
    """Arms compared on a part of the keys, which may only grow; the others are stable's. A new arm is a new ``id``."""

    #: Names the experiment and is its salt.
    id: RouteId
    #: The arms by name; others are compared with ``control``, else with the first.
    arms: Annotated[
        dict[ArmName, ExperimentArm], Field(min_length=2, json_schema_extra={"additionalProperties": False})
    ]
    #: The share of all keys that takes part.
    coverage: Share = default("100%", parse_share)
    #: What the arms are compared by.
    outcome: Outcome | None = None
    #: Makes it impossible to compute one's arm from one's key.
    secret: Secret | None = Field(default=None, repr=False)


class ShadowLimits(Section):
    """What a shadow may cost."""

    #: Copies a second.
    rps: Annotated[float, Field(gt=0, le=1_000_000)] = 50.0
    #: Copies that run at a time.
    in_flight: Annotated[int, Field(ge=1, le=1024)] = 4
    #: Copies that may wait; over it they are dropped and counted.
    queue: Annotated[int, Field(ge=1, le=65_536)] = 256
    #: Larger requests are not copied.
    max_body: CopySize = default("1MiB", units.parse_size)
    #: How long a copy may take.
    timeout: AttemptTime = default("2s", units.parse_duration)
    #: It stands back while the primary is over this share of what it can take.
    yield_above_load: Annotated[float, Field(gt=0, le=1)] = 0.7


class Comparison(Section):
    """What is compared. Floats differ when ``|p - s| > abs_tol + rel_tol * |p|``."""

    #: The outputs that are compared; left out: all.
    outputs: Many[Text] = ()
    #: The part of the tolerance that is the same for all values.
    abs_tol: Annotated[float, Field(ge=0)] = 1e-6
    #: The part that grows with the primary's value.
    rel_tol: Annotated[float, Field(ge=0)] = 1e-5
    #: Count rows whose largest element differs.
    argmax: bool = True
    #: Compare the distributions of the outputs by their KS distance.
    ks: bool = True
    #: How many of the worst pairs are kept to be looked at.
    keep_worst: Annotated[int, Field(ge=0, le=10_000)] = 100


class Shadow(Section):
    """A version that gets copies of a sample of the requests and whose answers nobody waits for."""

    #: The version that gets the copies.
    to: Target
    #: The share of the requests that is copied.
    sample: Share
    budget: ShadowLimits = Field(default_factory=ShadowLimits)
    compare: Comparison = Field(default_factory=Comparison)


class CircuitBreaker(Section):
    """Opens when ``open_at`` of ``min`` or more attempts in ``window`` failed; ``half_open`` try after ``open_for``."""

    #: How far back attempts are counted.
    window: Window = default("10s", units.parse_duration)
    #: Fewest attempts to judge by.
    min: PositiveInt = 20
    #: The share of failures that opens it.
    open_at: Share = default("50%", parse_share)
    #: Attempts that are then let through; when all succeed it closes, when one fails it opens again.
    half_open: Annotated[int, Field(ge=1, le=10_000)] = 5
    #: How long it stays open before that.
    open_for: Window = default("10s", units.parse_duration)


class Retry(Section):
    """Another attempt at the same version, for errors that pass."""

    #: Error codes that are worth another attempt; ``unavailable``: of a version that is not there or has no room just
    #: now.
    on: Annotated[
        Many[
            Literal[
                "unavailable", "draining", "internal", "model_not_ready", "out_of_memory", "queue_full",
                "queue_timeout", "runtime_failure", "upstream_unavailable", "version_timeout",
            ]
        ],
        Field(min_length=1),
    ]  # fmt: skip
    #: Further attempts for one request.
    max: Annotated[int, Field(ge=1, le=10)] = 1
    #: Retries as a share of the requests of the last 10 s.
    budget: Share = default("10%", parse_share)
    #: Retries in 10 s that are affordable whatever the traffic.
    min_concurrency: Count = 3


class Resilience(Section):
    """What follows a failed attempt. ``timeout`` bounds each attempt."""

    timeout: AttemptTime | None = None
    breaker: CircuitBreaker | None = None
    #: Who answers for a failed arm.
    fallback: Literal["stable", "none"] = "stable"
    retry: Retry | None = None
