"""The configuration file as pydantic models: strict, frozen, every unknown key an error. Nothing else sees these types.

What values may be is the business of ``kinds``; rules that span several keys live in ``consistency``.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.config import units
from server.config.capture import Capture
from server.config.gates import GatePolicy, PolicyName
from server.config.kinds import (
    OPTION_SCHEMA,
    VERSION_SCHEMA,
    BodySize,
    ConnectionAge,
    Count,
    Datatype,
    Delay,
    FilePath,
    HeaderSize,
    IdSize,
    Interval,
    ListenAddress,
    LoadName,
    Many,
    ModelName,
    ModelSource,
    Option,
    OwnTarget,
    Percent,
    PollTime,
    PositiveInt,
    Secret,
    Share,
    Span,
    Text,
    Timeout,
    Version,
    VersionKey,
    WarmTime,
    default,
    parse_share,
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
from server.config.routing_sections import Experiment, ModelVersion, Resilience, RoutingKey, RoutingRule, Shadow
from server.config.section import Section
from server.config.sinks import Alerts

API_VERSION: Final = "tidegate/v1"
MAX_PRIORITY_LEVELS: Final = 1024


# --- server -------------------------------------------------------------------------------------------------------


class Listeners(Section):
    """Where the server listens. Port 0 picks a free one."""

    #: Inference over HTTP.
    http: ListenAddress = default("127.0.0.1:8000", units.parse_address)
    #: Inference over gRPC.
    grpc: ListenAddress = default("127.0.0.1:8001", units.parse_address)
    #: ``/metrics``.
    metrics: ListenAddress = default("127.0.0.1:8002", units.parse_address)
    #: Configuration, history, audit, rollouts.
    admin: ListenAddress = default("127.0.0.1:8003", units.parse_address)


class Tls(Section):
    """PEM files of the inference listeners. With ``client_ca`` clients must show a certificate it signed."""

    #: The server's certificate, with its chain.
    certificate: FilePath
    #: The key of the certificate, not encrypted.
    private_key: FilePath
    #: The authority that clients' certificates must be signed by; left out, none is asked for.
    client_ca: FilePath | None = None


class Auth(Section):
    """Who may use the admin address. Without it, who has the token in ``<state-dir>/admin-token``."""

    #: The bearer token that changes need.
    admin_token: Secret = Field(repr=False)


class Limits(Section):
    """Bounds on requests and on what is in flight."""

    #: A request's body, as it comes and decompressed.
    max_body: BodySize = default("64MiB", units.parse_size)
    #: All headers of a request.
    max_headers: HeaderSize = default("64KiB", units.parse_size)
    #: The id of a request.
    max_id: IdSize = default("4KiB", units.parse_size)
    #: How deep JSON may be nested.
    max_json_depth: Annotated[int, Field(ge=4, le=500)] = 100
    #: Inputs of one request.
    max_inputs: PositiveInt = 256
    #: Outputs that one request asks for.
    max_outputs: PositiveInt = 256
    #: Dimensions of one tensor.
    max_dims: Annotated[int, Field(ge=1, le=64)] = 32
    #: Parameters of one request.
    max_parameters: Count = 256
    #: Chunks that a body may come in.
    max_chunks: PositiveInt = 65_536
    #: Requests in flight, of all models.
    max_pending: PositiveInt = 4096
    #: Answers that wait for their readers, over all connections; over it requests are refused.
    max_unsent: BodySize = default("256MiB", units.parse_size)
    #: Open connections.
    max_connections: PositiveInt = 10_000
    #: HTTP/2 streams of one connection.
    max_concurrent_streams: PositiveInt = 1000
    #: What shedding answers over HTTP; 429 goes with RESOURCE_EXHAUSTED, 503 with UNAVAILABLE, on gRPC.
    overload_status: Literal[429, 503] = 503


class Connections(Section):
    """How long connections of the inference addresses live.

    ``idle``: HTTP/1.1 between two requests. ``ping_after``: HTTP/2 and gRPC, the silence after which the client is
    asked for a sign of life. ``ping_timeout``: how long it has to give one. ``max_age``: HTTP/2 and gRPC, the age (0:
    none) at which a connection is asked to end; its client opens another, which load balancers come to see.
    """

    idle: Span = default("75s", units.parse_duration)
    ping_after: Span = default("60s", units.parse_duration)
    ping_timeout: Span = default("20s", units.parse_duration)
    max_age: ConnectionAge = default("0s", units.parse_duration)


class Codec(Section):
    """Where large JSON is parsed and written.

    ``process``: in a process of its own, started when it is first wanted; else on threads, which hold up requests.
    ``offload_over``: what is large; JSON up to that is the event loop's own business.
    """

    process: bool = True
    offload_over: BodySize = default("64KiB", units.parse_size)


class Server(Section):
    """The process: addresses, limits, and which models it loads when."""

    #: The server's name in its metadata, ``GET /v2``.
    name: Annotated[Text, Field(min_length=1, max_length=255)] = "tidegate"
    listeners: Listeners = Field(default_factory=Listeners)
    #: The protocol stack; ``reference`` (uvicorn and grpcio) answers the same, more slowly.
    transport: Literal["native", "reference"] = "native"
    #: Open the HTTP address only; the native transport answers gRPC on it too.
    single_port: bool = False
    #: Refuse to write NaN and infinities in JSON answers, which JSON proper cannot carry.
    strict_json: bool = False
    #: Serving processes. This version serves from one and refuses to start with more.
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    #: How long the event loop stays awake for the next request of a caller that has one in flight (0s: never). It does
    #: so only after several of them came alone and at once, and burns processor time to halve their latency.
    busy_poll: PollTime = default("200us", units.parse_duration)
    #: Serve without a supervisor, as this version always does.
    in_process: bool = False
    tls: Tls | None = None
    auth: Auth | None = Field(default=None, repr=False)
    limits: Limits = Field(default_factory=Limits)
    connections: Connections = Field(default_factory=Connections)
    codec: Codec = Field(default_factory=Codec)
    #: How long SIGTERM waits for requests in flight.
    drain: Timeout = default("30s", units.parse_duration)
    #: ``none`` loads at the start, ``poll`` looks again every ``poll_interval``, ``explicit`` loads on request.
    model_control: Literal["none", "poll", "explicit"] = "none"
    #: What ``explicit`` loads at the start; ``*``: every model.
    load_models: Many[LoadName] = ()
    #: How often ``poll`` looks for changed models.
    poll_interval: Interval = default("15s", units.parse_duration)


# --- telemetry, state, registry -----------------------------------------------------------------------------------


class Logs(Section):
    """What is logged, and how."""

    #: One JSON object per line, or ``text`` for people.
    format: Literal["json", "text"] = "json"
    #: The least that is logged.
    level: Literal["debug", "info", "warning", "error"] = "info"


class Traces(Section):
    """OpenTelemetry spans over OTLP/HTTP. ``headers``: sent along, such as a collector's token."""

    #: Whether spans are made and sent.
    enabled: bool = False
    #: The share of requests without a trace context of their own that is traced.
    sampling: Percent = default("100%", units.parse_percent)
    #: The receiver's base URL.
    endpoint: Annotated[Text, Field(pattern=r"^https?://[^\s/?#]+[^\s]*$")] | None = None
    #: The name that the spans bear.
    service_name: Annotated[Text, Field(min_length=1, max_length=255)] = "tidegate"
    headers: dict[str, Secret] = Field(default_factory=dict, repr=False)


class Decisions(Section):
    """Log lines of routing decisions, each with its propensity. ``sample``: of which requests; 0% is off."""

    sample: Share = default("0%", parse_share)


class Telemetry(Section):
    """Logs and traces; metrics are always on at their own address."""

    logs: Logs = Field(default_factory=Logs)
    decisions: Decisions = Field(default_factory=Decisions)
    traces: Traces = Field(default_factory=Traces)


class State(Section):
    """Where the server keeps what must outlive it."""

    #: The state folder; left out, ``tidegate-state`` in the working directory.
    dir: FilePath | None = None


class Registry(Section):
    """Where models without a source of their own come from.

    ``directory``: a folder in Triton/KServe layout. ``embedded``: the registry in the state folder, served by alias.
    ``poll_interval``: how often that is looked at. ``mlflow``: the registered models of an MLflow server, served by
    alias.
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

    #: Threads within one operator.
    intra_op: Count = 1
    #: Threads over operators, when ``parallel``.
    inter_op: Count = 1
    #: Run independent operators side by side.
    parallel: bool = False
    #: Let idle threads spin, which costs a core and saves microseconds.
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

    #: Execution providers, the most wanted first.
    providers: Annotated[Many[Provider], Field(min_length=1, json_schema_extra={"default": ["cpu"]})] = (
        ProviderChoice(name="cpu"),
    )
    #: Go on without a provider that does not work, instead of refusing the model.
    allow_fallback: bool = False
    #: Devices that the instances are spread over; left out, the default one.
    device_ids: Many[Annotated[int, Field(ge=0, le=1023)]] = ()
    #: Batches that run at a time; on the CPU instances share one session.
    instances: Annotated[int, Field(ge=1, le=1024)] = 1
    #: How far ONNX Runtime rewrites the graph.
    graph_optimization: Literal["disable", "basic", "extended", "all"] = "all"
    threads: Threads = Field(default_factory=Threads)
    #: Further entries of ONNX Runtime's session configuration, passed through.
    session_config: dict[str, Option] = Field(default_factory=dict)


class QueueRules(Section):
    """What happens to requests that wait: how long, what then, and how many may."""

    #: How long a request may wait; 0s: as long as its deadline allows.
    timeout: Timeout = default("0s", units.parse_duration)
    #: Whether it is then refused, or put behind the others of its level.
    timeout_action: Literal["reject", "delay"] = "reject"
    #: Whether a request may shorten its wait by its ``timeout`` parameter.
    allow_timeout_override: bool = False
    #: Requests of one level that may wait; 0: ``max_queue_size`` alone bounds them.
    max_size: Count = 0


class Priority(Section):
    """Priority levels 1 (first) to ``levels``; ``default`` is for requests that name none."""

    #: How many levels there are.
    levels: Annotated[int, Field(ge=1, le=MAX_PRIORITY_LEVELS)]
    #: The level of requests that name none.
    default: Annotated[int, Field(ge=1, le=MAX_PRIORITY_LEVELS)]
    #: Rules of single levels, by their number; the others have ``batching.queue_policy``.
    queue_policies: dict[str, QueueRules] = Field(default_factory=dict)


class Batching(Section):
    """How requests are gathered into batches."""

    #: Whether requests are joined at all.
    enabled: bool = True
    #: Rows that one request may carry; left out: what config.pbtxt says, else 64 where the graph batches; 0: no
    #: batching.
    max_batch_size: Count | None = None
    #: Rows that are gathered at most, never over ``max_batch_size``; 0: measured at warm-up.
    max_rows: Count = 0
    #: Sizes at which a batch that waits is sent without waiting further.
    preferred_batch_sizes: Many[PositiveInt] = ()
    #: How long a batch that is not full waits for more, to some ten microseconds (up to the next whole millisecond
    #: where the system is not Linux, and from 10ms on); 0s sends what there is as soon as the engine is free.
    max_queue_delay: Delay = default("0s", units.parse_duration)
    #: Answer requests in the order in which they came.
    preserve_ordering: bool = False
    #: Requests of one version that may wait, of all levels; over it they are refused.
    max_queue_size: PositiveInt = 1024
    queue_policy: QueueRules = Field(default_factory=QueueRules)
    priority: Priority | None = None
    #: For each input, sizes of its variable axis (not the batch's) that shorter rows are padded up to.
    buckets: dict[str, Annotated[Many[PositiveInt], Field(min_length=1)]] = Field(default_factory=dict)
    #: For each input with buckets, the value to pad with; left out, 0.
    pad_values: dict[str, float] = Field(default_factory=dict)


class WarmupTensor(Section):
    """One input of a warm-up sample; dims without the batch axis. ``file`` names raw data in the warmup folder."""

    #: Its datatype.
    datatype: Datatype
    #: Its shape, without the batch axis.
    dims: Many[PositiveInt]
    #: What it is filled with.
    source: Literal["zero", "random"] = "zero"
    file: Annotated[Text, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")] | None = None


class Warmup(Section):
    """A request sent to the model before it is ready, ``count`` times."""

    #: What it is called in messages.
    name: Annotated[Text, Field(min_length=1)] = "warmup"
    #: Rows of the request; 0: one.
    batch_size: Count = 0
    #: How often it is sent.
    count: Annotated[int, Field(ge=1, le=10_000)] = 1
    #: Its inputs, by name.
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

    #: Least PSI.
    psi: Annotated[float, Field(ge=0, le=1000)] = 0.02
    #: Least KS distance.
    ks: Annotated[float, Field(ge=0, le=1)] = 0.05
    rate: RateFloor = default("1%", units.parse_percent)


class Ring(Section):
    """What may wait to be counted, for each engine instance; over it batches are dropped and counted as dropped."""

    #: Rows that may wait.
    rows: Annotated[int, Field(ge=1, le=16_777_216)] = 65_536
    #: Their bytes.
    bytes: RingSize = default("64MiB", units.parse_size)


class DriftMetrics(Section):
    """How many columns of a version have series of their own: those in alarm first, then by strength of evidence."""

    #: How many columns.
    top: Annotated[int, Field(ge=1, le=1000)] = 20


class Monitor(Section):
    """Drift of live traffic from a reference profile. Without a profile there is nothing to watch.

    ``profile``: a file for every version, or ``registry`` for the one that each version brings with it (a file of role
    ``profile`` in the registry, ``profile.tgp`` in a version's folder of a model repository; versions that ``versions``
    names by path bring none). Left out, versions that bring one are watched.
    ``profiles`` names files by version and goes first. ``windows``: whole numbers are rows, durations are time.
    ``expected_run``: how long, in time or rows, until chance alone raises one alarm. ``persistence``: of how many
    looks how many must be over. ``calibration``: a file that says how much rows depend on each other. ``history``: how
    many looks are kept for plots. ``labels`` are joined with or without a profile.
    """

    #: Whether the model is watched.
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
    #: What windows are held against: the profile, or the version's own traffic of the last week, or of the same hour in
    #: weeks before.
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
    #: Which versions of a folder are served.
    version_policy: PolicyChoice = Field(default=VersionPolicy(latest=1), json_schema_extra={"default": {"latest": 1}})
    monitor: Monitor = Field(default_factory=Monitor)


class Reload(Section):
    """How a change of the configuration is noticed, and what becomes of the versions that it replaces.

    ``watch``: look at the file; SIGHUP and the admin address work in any case. ``debounce``: how long a new content of
    the file must have stood. Both are read at the start only. ``drain``: how long requests may hold a version that was
    replaced. ``keep_warm``: how long it then stays loaded, so that going back loads nothing. ``history``: how many of
    the last generations can be rolled back to.
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

    #: A model file, a folder of versions, or ``registry:NAME``.
    source: ModelSource | None = None
    #: The versions one by one, by number.
    versions: (
        Annotated[
            dict[VersionKey, ModelVersion], Field(min_length=1, json_schema_extra={"additionalProperties": False})
        ]
        | None
    ) = None
    #: Another model, whose versions are served under this name, too.
    model: ModelName | None = None
    aliases: Many[ModelName] = ()
    warmup: Many[Warmup] = ()
    #: Files of requests with known answers; a version that answers one otherwise is refused.
    golden: FilePaths = ()
    #: What answers where nothing else decides. Left out: ``@champion`` in a registry with aliases, else the highest.
    stable: OwnTarget | None = None
    key: RoutingKey = Field(default_factory=RoutingKey)
    #: The header that names the tenant, for rules.
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

    #: The form of the file.
    api_version: Annotated[Literal["tidegate/v1"], Field(alias="apiVersion")]
    server: Server = Field(default_factory=Server)
    telemetry: Telemetry = Field(default_factory=Telemetry)
    state: State = Field(default_factory=State)
    registry: Registry = Field(default_factory=Registry)
    defaults: FileDefaults = Field(default_factory=FileDefaults)
    alerts: Alerts = Field(default_factory=Alerts)
    capture: Capture | None = Field(default=None, repr=False)
    #: Quality policies, by a name of your own.
    gates: dict[PolicyName, GatePolicy] = Field(default_factory=dict, json_schema_extra={"additionalProperties": False})
    #: The models, by public name.
    models: dict[ModelName, Model] = Field(default_factory=dict, json_schema_extra={"additionalProperties": False})
