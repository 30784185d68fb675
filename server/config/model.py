"""The configuration file as pydantic models: strict, frozen, every unknown key an error. Nothing else sees these types.

What values may be is the business of ``kinds``; rules that span several keys live in ``consistency``.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from server.config import units
from server.config.capture import Capture
from server.config.gates import GatePolicy, PolicyName
from server.config.kinds import (
    OPTION_SCHEMA,
    VERSION_SCHEMA,
    ArmName,
    AttemptTime,
    BodySize,
    ConnectionAge,
    CopySize,
    Count,
    Datatype,
    Delay,
    FilePath,
    HeaderName,
    HeaderSecret,
    HeaderSize,
    IdSize,
    Interval,
    KeySource,
    ListenAddress,
    LoadName,
    Many,
    ModelName,
    ModelSource,
    Option,
    OutcomeWindow,
    OwnTarget,
    Percent,
    PositiveInt,
    RouteId,
    RuleTarget,
    Secret,
    Share,
    Source,
    Span,
    Target,
    Text,
    Timeout,
    UpstreamName,
    UpstreamUrl,
    ValueText,
    Version,
    VersionKey,
    VersionSource,
    WarmTime,
    Window,
    default,
    parse_share,
    scalar_text,
)
from server.config.mlflow import Mlflow
from server.config.monitor_kinds import (
    ExpectedRun,
    Persistence,
    ProfileChoice,
    RateFloor,
    RingSize,
    WatchedWindow,
    parse_expected_run,
    parse_persistence,
    parse_window,
)
from server.config.monitor_sections import LabelJoin, RowSample, SchemaRule, TrafficSegment
from server.config.retrain import Retrain
from server.config.rollout_section import GateRules, Rollout
from server.config.section import Section
from server.config.sinks import Alerts

API_VERSION: Final = "tidegate/v1"
MAX_PRIORITY_LEVELS: Final = 1024


# --- server -------------------------------------------------------------------------------------------------------


class Listeners(Section):
    """Where the server listens. Port 0 picks a free one."""

    http: ListenAddress = default("127.0.0.1:8000", units.parse_address)
    grpc: ListenAddress = default("127.0.0.1:8001", units.parse_address)
    metrics: ListenAddress = default("127.0.0.1:8002", units.parse_address)
    admin: ListenAddress = default("127.0.0.1:8003", units.parse_address)


class Tls(Section):
    """PEM files of the inference listeners. With ``client_ca`` clients must show a certificate it signed."""

    certificate: FilePath
    private_key: FilePath
    client_ca: FilePath | None = None


class Auth(Section):
    """Who may use the admin address: the bearer token it asks for."""

    admin_token: Secret = Field(repr=False)


class Limits(Section):
    """Bounds on requests and on what is in flight."""

    max_body: BodySize = default("64MiB", units.parse_size)
    max_headers: HeaderSize = default("64KiB", units.parse_size)
    max_id: IdSize = default("4KiB", units.parse_size)
    max_json_depth: Annotated[int, Field(ge=4, le=500)] = 100
    max_inputs: PositiveInt = 256
    max_outputs: PositiveInt = 256
    max_dims: Annotated[int, Field(ge=1, le=64)] = 32
    max_parameters: Count = 256
    max_chunks: PositiveInt = 65_536
    max_pending: PositiveInt = 4096
    max_connections: PositiveInt = 10_000
    max_concurrent_streams: PositiveInt = 1000
    #: What shedding answers over HTTP; 429 goes with RESOURCE_EXHAUSTED, 503 with UNAVAILABLE, on gRPC.
    overload_status: Literal[429, 503] = 503


class Connections(Section):
    """How long connections of the inference addresses live.

    ``idle``: HTTP/1.1 between two requests. HTTP/2 and gRPC: after a silence of ``ping_after`` the client is asked for
    a sign of life, and has ``ping_timeout`` to give one; a connection older than ``max_age`` (0: none is) is asked to
    end and opened anew by its client, so that load balancers come to see it.
    """

    idle: Span = default("75s", units.parse_duration)
    ping_after: Span = default("60s", units.parse_duration)
    ping_timeout: Span = default("20s", units.parse_duration)
    max_age: ConnectionAge = default("0s", units.parse_duration)


class Codec(Section):
    """Where large JSON is parsed and written. JSON up to ``offload_over`` is the event loop's own business.

    ``process``: in a process of its own, started when it is first wanted; else on threads, which hold up requests.
    """

    process: bool = True
    offload_over: BodySize = default("64KiB", units.parse_size)


class Server(Section):
    """The process: addresses, limits, and which models it loads when."""

    name: Annotated[Text, Field(min_length=1, max_length=255)] = "tidegate"
    listeners: Listeners = Field(default_factory=Listeners)
    transport: Literal["native", "reference"] = "native"
    #: Open the HTTP address only; the native transport answers gRPC on it too.
    single_port: bool = False
    #: Refuse to write NaN and infinities in JSON answers, which JSON proper cannot carry.
    strict_json: bool = False
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    in_process: bool = False
    tls: Tls | None = None
    auth: Auth | None = Field(default=None, repr=False)
    limits: Limits = Field(default_factory=Limits)
    connections: Connections = Field(default_factory=Connections)
    codec: Codec = Field(default_factory=Codec)
    drain: Timeout = default("30s", units.parse_duration)
    model_control: Literal["none", "poll", "explicit"] = "none"
    load_models: Many[LoadName] = ()
    poll_interval: Interval = default("15s", units.parse_duration)


# --- telemetry, state, registry -----------------------------------------------------------------------------------


class Logs(Section):
    """What is logged, and how."""

    format: Literal["json", "text"] = "json"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Traces(Section):
    """OpenTelemetry spans over OTLP/HTTP. ``headers`` carry secrets, such as a collector's token."""

    enabled: bool = False
    sampling: Percent = default("100%", units.parse_percent)
    endpoint: Annotated[Text, Field(pattern=r"^https?://[^\s/?#]+[^\s]*$")] | None = None
    service_name: Annotated[Text, Field(min_length=1, max_length=255)] = "tidegate"
    headers: dict[str, Secret] = Field(default_factory=dict, repr=False)


class Decisions(Section):
    """Log lines of routing decisions, each with its propensity, for a ``sample`` of the requests; 0% is off."""

    sample: Share = default("0%", parse_share)


class Telemetry(Section):
    """Logs and traces; metrics are always on at their own address."""

    logs: Logs = Field(default_factory=Logs)
    decisions: Decisions = Field(default_factory=Decisions)
    traces: Traces = Field(default_factory=Traces)


class State(Section):
    """Where the server keeps what must outlive it."""

    dir: FilePath | None = None


class Registry(Section):
    """Where models without a source of their own come from.

    ``directory``: a folder in Triton/KServe layout. ``embedded``: the registry in the state folder, served by alias
    and looked at every ``poll_interval``. ``mlflow``: the registered models of an MLflow server, served by alias.
    """

    directory: FilePath | None = None
    embedded: bool = False
    mlflow: Mlflow | None = None
    poll_interval: Interval = default("1s", units.parse_duration)

    @property
    def has_aliases(self) -> bool:
        """Whether it is a registry that calls versions by alias: the embedded one or MLflow's."""
        return self.embedded or self.mlflow is not None


# --- models -------------------------------------------------------------------------------------------------------


class ProviderChoice(Section):
    """An execution provider; its options are passed through."""

    name: Literal["cpu", "cuda", "tensorrt"]
    options: dict[str, Option] = Field(default_factory=dict)


class Threads(Section):
    """Threads of one session; 0 means one per core."""

    intra_op: Count = 1
    inter_op: Count = 1
    parallel: bool = False
    spinning: bool = False


def _provider(value: object) -> object:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"name": value}
    raise ValueError(f"wanted a provider's name or {{name: ..., options: ...}}, got {units.show(value)}")


_PROVIDER_NAMES: Final = ["cpu", "cuda", "tensorrt"]
Provider = Annotated[
    ProviderChoice,
    BeforeValidator(_provider),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": _PROVIDER_NAMES},
                {
                    "type": "object",
                    "properties": {
                        "name": {"enum": _PROVIDER_NAMES},
                        "options": {"type": "object", "additionalProperties": OPTION_SCHEMA},
                    },
                    "required": ["name"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


class RuntimeChoice(Section):
    """How sessions are made."""

    providers: Annotated[Many[Provider], Field(min_length=1, json_schema_extra={"default": ["cpu"]})] = (
        ProviderChoice(name="cpu"),
    )
    allow_fallback: bool = False
    device_ids: Many[Annotated[int, Field(ge=0, le=1023)]] = ()
    instances: Annotated[int, Field(ge=1, le=1024)] = 1
    graph_optimization: Literal["disable", "basic", "extended", "all"] = "all"
    threads: Threads = Field(default_factory=Threads)
    session_config: dict[str, Option] = Field(default_factory=dict)


class QueueRules(Section):
    """What happens to requests that wait: how long, what then, and how many may."""

    timeout: Timeout = default("0s", units.parse_duration)
    timeout_action: Literal["reject", "delay"] = "reject"
    allow_timeout_override: bool = False
    max_size: Count = 0


class Priority(Section):
    """Priority levels 1 (first) to ``levels``; ``default`` is for requests that name none."""

    levels: Annotated[int, Field(ge=1, le=MAX_PRIORITY_LEVELS)]
    default: Annotated[int, Field(ge=1, le=MAX_PRIORITY_LEVELS)]
    queue_policies: dict[str, QueueRules] = Field(default_factory=dict)


class Batching(Section):
    """How requests are gathered. ``max_batch_size`` is what one request may carry, ``max_rows`` what is gathered."""

    enabled: bool = True
    max_batch_size: Count | None = None
    max_rows: Count = 0
    preferred_batch_sizes: Many[PositiveInt] = ()
    max_queue_delay: Delay = default("0s", units.parse_duration)
    preserve_ordering: bool = False
    max_queue_size: PositiveInt = 1024
    queue_policy: QueueRules = Field(default_factory=QueueRules)
    priority: Priority | None = None
    buckets: dict[str, Annotated[Many[PositiveInt], Field(min_length=1)]] = Field(default_factory=dict)
    pad_values: dict[str, float] = Field(default_factory=dict)


class WarmupTensor(Section):
    """One input of a warm-up sample; dims without the batch axis. ``file`` names raw data in the warmup folder."""

    datatype: Datatype
    dims: Many[PositiveInt]
    source: Literal["zero", "random"] = "zero"
    file: Annotated[Text, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")] | None = None


class Warmup(Section):
    """A request sent to the model before it is ready, ``count`` times."""

    name: Annotated[Text, Field(min_length=1)] = "warmup"
    batch_size: Count = 0
    count: Annotated[int, Field(ge=1, le=10_000)] = 1
    inputs: Annotated[dict[str, WarmupTensor], Field(min_length=1)]


class VersionPolicy(Section):
    """Which versions of a directory are served; exactly one of the keys. In the file ``all`` is a plain word."""

    latest: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    specific: Annotated[Many[Version], Field(min_length=1)] | None = None
    all: Literal[True] | None = None


def _version_policy(value: object) -> object:
    if value == "all":
        return {"all": True}
    if not isinstance(value, dict) or "all" in value or not value:
        raise ValueError(f"wanted all, {{latest: N}} or {{specific: [VERSION, ...]}}, got {units.show(value)}")
    if len(value) > 1:
        raise ValueError(f"wanted one of latest and specific, got {' and '.join(map(str, value))}")
    return value


_POLICY_SCHEMA: Final = {
    "anyOf": [
        {"const": "all"},
        {
            "type": "object",
            "properties": {
                "latest": {"type": "integer", "minimum": 1, "maximum": 1_000_000},
                "specific": {"type": "array", "items": VERSION_SCHEMA, "minItems": 1},
            },
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": False,
        },
    ]
}
PolicyChoice = Annotated[VersionPolicy, BeforeValidator(_version_policy), WithJsonSchema(_POLICY_SCHEMA)]


class MinEffect(Section):
    """How large a difference must be, beside being real, to raise an alarm: PSI, or the KS distance.

    ``rate``: by how much the share of missing values, of values out of range or of new categories must exceed the
    reference's.
    """

    psi: Annotated[float, Field(ge=0, le=1000)] = 0.02
    ks: Annotated[float, Field(ge=0, le=1)] = 0.05
    rate: RateFloor = default("1%", units.parse_percent)


class Ring(Section):
    """What may wait to be counted, for each engine instance; over it batches are dropped and counted as dropped."""

    rows: Annotated[int, Field(ge=1, le=16_777_216)] = 65_536
    bytes: RingSize = default("64MiB", units.parse_size)


class DriftMetrics(Section):
    """How many columns of a version have series of their own: those in alarm first, then by strength of evidence."""

    top: Annotated[int, Field(ge=1, le=1000)] = 20


class Monitor(Section):
    """Drift of live traffic from a reference profile. Without a profile there is nothing to watch.

    ``profile``: a file for every version, or ``registry`` for the one that each version brings with it (a file of role
    ``profile`` in the registry, ``profile.tgp`` in a version's folder). Left out, versions that bring one are watched.
    ``profiles`` names files by version and goes first. ``windows``: whole numbers are rows, durations are time.
    ``expected_run``: how long, in time or rows, until chance alone raises one alarm. ``persistence``: of how many
    looks how many must be over. ``calibration``: a file that says how much rows depend on each other. ``history``: how
    many looks are kept for plots. ``labels`` are joined with or without a profile.
    """

    enabled: bool = True
    profile: ProfileChoice | None = None
    profiles: Annotated[dict[VersionKey, FilePath], Field(json_schema_extra={"additionalProperties": False})] = Field(
        default_factory=dict
    )
    windows: Annotated[
        Many[WatchedWindow], Field(min_length=1, max_length=8, json_schema_extra={"default": [1000, 10_000]})
    ] = (parse_window(1000), parse_window(10_000))
    expected_run: ExpectedRun = default("10M", parse_expected_run)
    min_effect: MinEffect = Field(default_factory=MinEffect)
    persistence: Persistence = default("2 of 3", parse_persistence)
    reference: Literal["profile", "trailing_week", "hour_of_week"] = "profile"
    ring: Ring = Field(default_factory=Ring)
    calibration: FilePath | None = None
    metrics: DriftMetrics = Field(default_factory=DriftMetrics)
    segment: TrafficSegment | None = None
    # pydantic has a method of this name.
    schema_: Annotated[Many[SchemaRule], Field(max_length=1000)] = Field(default=(), alias="schema")
    sample: RowSample = Field(default_factory=RowSample)
    history: Annotated[int, Field(ge=1, le=10_000)] = 512
    labels: LabelJoin | None = None


class Defaults(Section):
    """What models start from; a model's config.pbtxt and its own section override it key by key."""

    runtime: RuntimeChoice = Field(default_factory=RuntimeChoice)
    batching: Batching = Field(default_factory=Batching)
    version_policy: PolicyChoice = Field(default=VersionPolicy(latest=1), json_schema_extra={"default": {"latest": 1}})
    monitor: Monitor = Field(default_factory=Monitor)


class Reload(Section):
    """How a change of the configuration is noticed, and what becomes of the versions that it replaces.

    ``watch`` and ``debounce`` (how long a new content of the file must have stood) are read at the start; SIGHUP and
    the admin address work in any case. ``drain``: how long requests may hold a version that was replaced. For
    ``keep_warm`` it then stays loaded, so that going back loads nothing. ``history``: how many of the last
    generations can be rolled back to.
    """

    watch: bool = True
    debounce: Delay = default("200ms", units.parse_duration)
    drain: Timeout = default("30s", units.parse_duration)
    keep_warm: WarmTime = default("15m", units.parse_duration)
    history: Annotated[int, Field(ge=1, le=10_000)] = 20


class FileDefaults(Defaults):
    """``defaults`` of the file: what models start from, and what holds for all of them."""

    reload: Reload = Field(default_factory=Reload)
    gates: GateRules = Field(default_factory=GateRules)


# --- routing ------------------------------------------------------------------------------------------------------


class Upstream(Section):
    """Another V2 server that has the version. ``model`` and ``version`` are its names for it.

    Without them they are this model's name and the version that it chooses itself. ``timeout`` bounds one exchange,
    ``max_batch_rows`` the rows of one request (0: what the upstream takes). ``ca_file``: PEM file of the authorities
    that are trusted for https. ``headers`` carry secrets, such as a token.
    """

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
    upstream: Upstream | None = None

    @property
    def entry(self) -> Source | None:
        """The version of the registry that it is, if it is one."""
        return self.source if self.source is not None and self.source.path is None else None


class RoutingKey(Section):
    """Where the key of a request is found, the first present; and what becomes of requests without one."""

    from_: Annotated[Many[KeySource], Field(alias="from")] = ()
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

    version: VersionChoice | None = None
    header: dict[Text, ValueChoice] = Field(default_factory=dict)
    parameter: dict[Text, ValueChoice] = Field(default_factory=dict)
    tenant: ValueChoice | None = None


class RoutingRule(Section):
    """Requests that match go where it says, before any split, and enter no statistics."""

    name: RouteId
    match: RuleMatch
    to: RuleTarget


class ExperimentArm(Section):
    """One arm: the version it leads to, and its share of the keys covered."""

    to: Target
    share: Share


class Outcome(Section):
    """What is measured through feedback. ``silence``: whether units that nothing was heard of count as 0."""

    name: RouteId
    kind: Literal["binary", "number"]
    window: OutcomeWindow = default("24h", units.parse_duration)
    silence: Literal["zero", "skip"] = "zero"


class Experiment(Section):
    """Arms compared on a part of the keys, which may only grow; the others are stable's. A new arm is a new ``id``."""

    id: RouteId
    arms: Annotated[
        dict[ArmName, ExperimentArm], Field(min_length=2, json_schema_extra={"additionalProperties": False})
    ]
    coverage: Share = default("100%", parse_share)
    outcome: Outcome | None = None
    secret: Secret | None = Field(default=None, repr=False)


class ShadowLimits(Section):
    """What a shadow may cost. It stands back while the primary is over ``yield_above_load`` of what it can take."""

    rps: Annotated[float, Field(gt=0, le=1_000_000)] = 50.0
    in_flight: Annotated[int, Field(ge=1, le=1024)] = 4
    queue: Annotated[int, Field(ge=1, le=65_536)] = 256
    max_body: CopySize = default("1MiB", units.parse_size)
    timeout: AttemptTime = default("2s", units.parse_duration)
    yield_above_load: Annotated[float, Field(gt=0, le=1)] = 0.7


class Comparison(Section):
    """What is compared. ``outputs`` empty: all. Floats differ when ``|p - s| > abs_tol + rel_tol * |p|``."""

    outputs: Many[Text] = ()
    abs_tol: Annotated[float, Field(ge=0)] = 1e-6
    rel_tol: Annotated[float, Field(ge=0)] = 1e-5
    argmax: bool = True
    ks: bool = True
    keep_worst: Annotated[int, Field(ge=0, le=10_000)] = 100


class Shadow(Section):
    """A version that gets copies of a sample of the requests and whose answers nobody waits for."""

    to: Target
    sample: Share
    budget: ShadowLimits = Field(default_factory=ShadowLimits)
    compare: Comparison = Field(default_factory=Comparison)


class CircuitBreaker(Section):
    """Opens when ``open_at`` of ``min`` or more attempts in ``window`` failed; ``half_open`` try after ``open_for``."""

    window: Window = default("10s", units.parse_duration)
    min: PositiveInt = 20
    open_at: Share = default("50%", parse_share)
    half_open: Annotated[int, Field(ge=1, le=10_000)] = 5
    open_for: Window = default("10s", units.parse_duration)


class Retry(Section):
    """Another attempt at the same version, for errors that pass. ``budget``: a share of the requests."""

    on: Annotated[
        Many[
            Literal[
                "unavailable", "draining", "internal", "model_not_ready", "out_of_memory", "queue_full",
                "queue_timeout", "runtime_failure", "upstream_unavailable", "version_timeout",
            ]
        ],
        Field(min_length=1),
    ]  # fmt: skip
    max: Annotated[int, Field(ge=1, le=10)] = 1
    budget: Share = default("10%", parse_share)
    min_concurrency: Count = 3


class Resilience(Section):
    """What follows a failed attempt. ``timeout`` bounds each attempt; ``fallback``: who answers for a failed arm."""

    timeout: AttemptTime | None = None
    breaker: CircuitBreaker | None = None
    fallback: Literal["stable", "none"] = "stable"
    retry: Retry | None = None


# --- a model ------------------------------------------------------------------------------------------------------


def _one_or_many(value: object) -> object:
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        return [value]
    raise ValueError(f"wanted a path or a list of paths, got {units.show(value)}")


_PATH_SCHEMA: Final = {"type": "string", "minLength": 1}
#: One path or a list of them.
FilePaths = Annotated[
    Many[FilePath],
    BeforeValidator(_one_or_many),
    WithJsonSchema({"anyOf": [_PATH_SCHEMA, {"type": "array", "items": _PATH_SCHEMA}]}),
]


class Model(Defaults):
    """One public name: what it serves, and how requests are spread.

    It has one of ``source``, ``versions`` and ``model`` (another name's versions under this name). Without any it is
    the registry's entry of the same name; ``registry:NAME`` is another entry. ``aliases`` are further public names.
    """

    source: ModelSource | None = None
    versions: (
        Annotated[
            dict[VersionKey, ModelVersion], Field(min_length=1, json_schema_extra={"additionalProperties": False})
        ]
        | None
    ) = None
    model: ModelName | None = None
    aliases: Many[ModelName] = ()
    warmup: Many[Warmup] = ()
    #: Files of requests with known answers; a version that answers one otherwise is refused.
    golden: FilePaths = ()
    stable: OwnTarget | None = None
    key: RoutingKey = Field(default_factory=RoutingKey)
    tenant_header: Text = ""
    rules: Many[RoutingRule] = ()
    rollout: Rollout | None = None
    experiment: Experiment | None = None
    shadow: Many[Shadow] = ()
    resilience: Resilience = Field(default_factory=Resilience)
    #: The quality policy, of ``gates``, that a version must pass before a rollout begins.
    gate: PolicyName | None = None
    retrain: Retrain | None = None
    #: Allow a reload to take keys from an arm that goes on.
    reshuffle: bool = False


class Config(Section):
    """The whole file."""

    api_version: Annotated[Literal["tidegate/v1"], Field(alias="apiVersion")]
    server: Server = Field(default_factory=Server)
    telemetry: Telemetry = Field(default_factory=Telemetry)
    state: State = Field(default_factory=State)
    registry: Registry = Field(default_factory=Registry)
    defaults: FileDefaults = Field(default_factory=FileDefaults)
    alerts: Alerts = Field(default_factory=Alerts)
    capture: Capture | None = Field(default=None, repr=False)
    gates: dict[PolicyName, GatePolicy] = Field(default_factory=dict, json_schema_extra={"additionalProperties": False})
    models: dict[ModelName, Model] = Field(default_factory=dict, json_schema_extra={"additionalProperties": False})
