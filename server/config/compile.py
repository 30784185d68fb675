"""``Config`` and command-line flags -> the plain values that the rest of the server takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Final, TypeAlias

from router.registry.directory import is_model_name
from server.config import units
from server.config.capture import compile_capture
from server.config.consistency import overlap
from server.config.gates import GatePolicy
from server.config.mlflow import compile_mlflow
from server.config.model import (
    Batching,
    Config,
    Defaults,
    Limits,
    Model,
    Priority,
    QueueRules,
    RuntimeChoice,
    Traces,
    VersionPolicy,
    Warmup,
    WarmupTensor,
)
from server.config.problems import InvalidConfig, Problem
from server.config.retrain import compile_retrain
from server.config.routing import real_model, serves_registry
from server.config.routing_sections import ModelVersion, Upstream
from server.config.settings import ReloadSettings, ServerSettings, TelemetrySettings, TlsSettings, TraceSettings
from server.config.sinks import compile_alerts
from server.errors import ConfigError
from server.retraining import RetrainSpec
from server.runtime.base import ModelOptions, Provider, QueuePolicy, WarmupInput, WarmupSample
from server.runtime.upstream_options import UpstreamOptions
from server.types import RequestLimits

_CHOICES: Final = {
    "transport": ("native", "reference"),
    "model_control": ("none", "poll", "explicit"),
    "log_format": ("json", "text"),
    "log_level": ("debug", "info", "warning", "error"),
}
_LISTENERS: Final = ("http", "grpc", "metrics", "admin")
_MAX_WORKERS: Final = 1024
_MAX_DRAIN_SECONDS: Final = 3600.0


# --- models -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Overlay:
    """What a section says of a model, and nothing of what it leaves open."""

    options: Mapping[str, Any] = field(default_factory=dict)
    batching: Mapping[str, Any] = field(default_factory=dict)

    def over(self, base: ModelOptions) -> ModelOptions:
        """``base`` with what the section says put over it."""
        return replace(base, **self.options, batching=replace(base.batching, **self.batching))


@dataclass(slots=True, frozen=True)
class CompiledModel:
    """One model of the file. Its options are, from weak to strong: ``defaults``, its config.pbtxt, its own section.

    ``source`` is a model file, or a folder that holds one model. ``golden``: files of golden requests.
    """

    name: str
    source: Path
    defaults: ModelOptions
    overlay: Overlay
    golden: tuple[Path, ...] = ()

    @property
    def options(self) -> ModelOptions:
        """The options when there is no config.pbtxt."""
        return self.overlay.over(self.defaults)


def compile_defaults(config: Config | None) -> ModelOptions:
    """What every model starts from before its config.pbtxt and its own section are read."""
    return ModelOptions() if config is None else _overlay(config.defaults).over(ModelOptions())


def compile_models(config: Config, *, repository: Path | None = None) -> dict[str, CompiledModel]:
    """The models of the file that lie in one place on disk, by name; ``compile_versions`` gives the others.

    ``repository`` (default: ``registry.directory``) is where models without a path of their own lie. Raises
    ConfigError when one needs it and there is none.
    """
    root, defaults = repository or config.registry.directory, compile_defaults(config)
    embedded = serves_registry(config, repository_given=repository is not None)
    return {
        name: CompiledModel(name, _source(name, model, root), defaults, _overlay(model), model.golden)
        for name, model in config.models.items()
        if _lies_in_one_place(model, embedded)
    }


def _lies_in_one_place(model: Model, embedded: bool) -> bool:
    if model.versions is not None or model.model is not None:
        return False
    return not embedded or (model.source is not None and model.source.path is not None)


def _source(name: str, model: Model, repository: Path | None) -> Path:
    if model.source is not None and model.source.path is not None:
        return model.source.path
    if repository is None:
        raise ConfigError(f"model '{name}' has no source, and there is no model repository to find it in")
    return repository / (name if model.source is None else model.source.entry)


@dataclass(slots=True, frozen=True)
class RegistryVersion:
    """A version in the embedded registry: by number ("7") or by alias ("@champion")."""

    model: str
    version: str


#: Where a version comes from.
VersionOrigin: TypeAlias = Path | RegistryVersion | UpstreamOptions


@dataclass(slots=True, frozen=True)
class VersionedModel:
    """A model whose versions the file names one by one, or (``entry``) one that the embedded registry serves.

    ``versions``: number -> a model file or a folder of one version, a version of the registry, or another server's.
    With ``entry``, the registry's entry of that name, by its aliases; ``versions`` is empty then.
    ``golden``: files of golden requests.
    """

    name: str
    versions: Mapping[str, VersionOrigin]
    entry: str
    defaults: ModelOptions
    overlay: Overlay
    golden: tuple[Path, ...] = ()

    @property
    def options(self) -> ModelOptions:
        """The options when there is no config.pbtxt."""
        return self.overlay.over(self.defaults)


def compile_versions(config: Config, *, repository: Path | None = None) -> dict[str, VersionedModel]:
    """The models of the file that ``compile_models`` leaves out, without those that are another name of one."""
    root, defaults = repository or config.registry.directory, compile_defaults(config)
    embedded = serves_registry(config, repository_given=repository is not None)
    return {
        name: _versioned(name, model, root, defaults)
        for name, model in config.models.items()
        if model.model is None and not _lies_in_one_place(model, embedded)
    }


def _versioned(name: str, model: Model, root: Path | None, defaults: ModelOptions) -> VersionedModel:
    overlay = _overlay(model)
    if model.versions is None:
        entry = name if model.source is None else model.source.entry
        return VersionedModel(name, {}, entry, defaults, overlay, model.golden)
    versions = {number: _version_origin(number, of, root) for number, of in model.versions.items()}
    return VersionedModel(name, versions, "", defaults, overlay, model.golden)


def _version_origin(number: str, of: ModelVersion, root: Path | None) -> VersionOrigin:
    if of.upstream is not None:
        return _upstream(of.upstream)
    source = of.source
    if source is None:
        raise ConfigError(f"version {number} has neither a source nor an upstream")
    if source.path is not None:
        return source.path
    if root is not None and source.version:
        return root / source.entry / source.version
    return RegistryVersion(source.entry, source.version or f"@{source.alias}")


def _upstream(upstream: Upstream) -> UpstreamOptions:
    return UpstreamOptions(
        upstream.url,
        upstream.model or "",
        upstream.version or "",
        timeout_s=upstream.timeout / units.NS_PER_S,
        max_batch_rows=upstream.max_batch_rows,
        headers=tuple(upstream.headers.items()),
        ca_file="" if upstream.ca_file is None else str(upstream.ca_file),
    )


def _overlay(model: Defaults) -> Overlay:
    options = _runtime(model.runtime)
    if "version_policy" in model.model_fields_set:
        options["version_policy"] = _version_policy(model.version_policy)
    if "max_batch_size" in model.batching.model_fields_set:
        options["max_batch_size"] = model.batching.max_batch_size
    if isinstance(model, Model) and model.warmup:
        options["warmup"] = tuple(map(_warmup, model.warmup))
    return Overlay(options, _batching(model.batching))


def _given(section: Any, **values: Any) -> dict[str, Any]:
    """Of ``values``, named like the section's keys, those that the file gives."""
    return {key: value for key, value in values.items() if key in section.model_fields_set}


def _runtime(runtime: RuntimeChoice) -> dict[str, Any]:
    threads = runtime.threads
    options = _given(
        runtime,
        providers=tuple(Provider(choice.name, tuple(choice.options.items())) for choice in runtime.providers),
        device_ids=runtime.device_ids,
        instances=runtime.instances,
        graph_optimization=runtime.graph_optimization,
        session_config=tuple(runtime.session_config.items()),
    )
    if "allow_fallback" in runtime.model_fields_set:
        options["allow_provider_fallback"] = runtime.allow_fallback
    given = _given(threads, intra_op=threads.intra_op, inter_op=threads.inter_op)
    options |= {f"{key}_threads": count for key, count in given.items()}
    if "parallel" in threads.model_fields_set:
        options["parallel_execution"] = threads.parallel
    if "spinning" in threads.model_fields_set:
        options["allow_spinning"] = threads.spinning
    return options


def _batching(batching: Batching) -> dict[str, Any]:
    options = _given(
        batching,
        enabled=batching.enabled,
        max_rows=batching.max_rows,
        preferred_batch_sizes=tuple(sorted(set(batching.preferred_batch_sizes))),
        preserve_ordering=batching.preserve_ordering,
        max_queue_size=batching.max_queue_size,
        buckets=batching.buckets,
        pad_values=batching.pad_values,
    )
    if "max_queue_delay" in batching.model_fields_set:
        options["max_queue_delay_us"] = batching.max_queue_delay // units.NS_PER_US
    if "queue_policy" in batching.model_fields_set:
        options["default_queue_policy"] = _queue_policy(batching.queue_policy)
    if batching.priority is not None:
        options |= _priorities(batching.priority)
    return options


def _priorities(priority: Priority) -> dict[str, Any]:
    policies = {int(level): _queue_policy(rules) for level, rules in priority.queue_policies.items()}
    return {
        "priority_levels": priority.levels,
        "default_priority_level": priority.default,
        "priority_queue_policy": policies,
    }


def _queue_policy(rules: QueueRules) -> QueuePolicy:
    return QueuePolicy(
        timeout_action=rules.timeout_action.upper(),
        default_timeout_us=rules.timeout // units.NS_PER_US,
        allow_timeout_override=rules.allow_timeout_override,
        max_queue_size=rules.max_size,
    )


def _version_policy(policy: VersionPolicy) -> tuple[str, ...]:
    if policy.latest is not None:
        return ("latest", str(policy.latest))
    return ("all",) if policy.specific is None else ("specific", *policy.specific)


def _warmup(sample: Warmup) -> WarmupSample:
    inputs = {name: _warmup_input(tensor) for name, tensor in sample.inputs.items()}
    return WarmupSample(sample.name, sample.batch_size, inputs, sample.count)


def _warmup_input(tensor: WarmupTensor) -> WarmupInput:
    return WarmupInput(tensor.datatype, tensor.dims, tensor.file or tensor.source)


# --- the server ---------------------------------------------------------------------------------------------------


def compile_settings(config: Config | None) -> ServerSettings:
    """What the file says of the server, with the defaults for the rest."""
    if config is None:
        return ServerSettings()
    server, listeners, tls = config.server, config.server.listeners, config.server.tls
    settings = ServerSettings(
        name=server.name,
        http=listeners.http,
        grpc=listeners.grpc,
        metrics=listeners.metrics,
        admin=listeners.admin,
        transport=server.transport,
        single_port=server.single_port,
        workers=server.workers,
        in_process=server.in_process,
        limits=_limits(server.limits),
        max_pending=server.limits.max_pending,
        max_unsent_bytes=server.limits.max_unsent,
        max_connections=server.limits.max_connections,
        max_concurrent_streams=server.limits.max_concurrent_streams,
        busy_poll_ns=server.busy_poll,
        idle_s=server.connections.idle / units.NS_PER_S,
        ping_after_s=server.connections.ping_after / units.NS_PER_S,
        ping_timeout_s=server.connections.ping_timeout / units.NS_PER_S,
        max_connection_age_s=server.connections.max_age / units.NS_PER_S,
        shed_as_429=server.limits.overload_status == 429,
        strict_json=server.strict_json,
        codec_process=server.codec.process,
        offload_bytes=server.codec.offload_over,
        drain_seconds=server.drain / units.NS_PER_S,
        model_control=server.model_control,
        load_models=server.load_models,
        poll_seconds=server.poll_interval / units.NS_PER_S,
        model_repository=config.registry.directory,
        embedded_registry=config.registry.embedded,
        registry_poll_seconds=config.registry.poll_interval / units.NS_PER_S,
        mlflow=None if config.registry.mlflow is None else compile_mlflow(config.registry.mlflow),
        reload=compile_reload(config),
        telemetry=TelemetrySettings(
            config.telemetry.logs.format,
            config.telemetry.logs.level,
            _traces(config.telemetry.traces),
            config.telemetry.decisions.sample,
        ),
        tls=None if tls is None else TlsSettings(tls.certificate, tls.private_key, tls.client_ca),
        admin_token=None if server.auth is None else server.auth.admin_token,
        delivery=compile_alerts(config.alerts),
        capture=compile_capture(config.capture),
    )
    return settings if config.state.dir is None else replace(settings, state_dir=config.state.dir)


def compile_reload(config: Config) -> ReloadSettings:
    """What the file says of its own changes."""
    reload = config.defaults.reload
    return ReloadSettings(
        watch=reload.watch,
        debounce_s=reload.debounce / units.NS_PER_S,
        drain_s=reload.drain / units.NS_PER_S,
        keep_warm_s=reload.keep_warm / units.NS_PER_S,
        history=reload.history,
    )


def compile_gates(config: Config) -> dict[str, GatePolicy]:
    """The quality policy of every model that has one. A model's own goes before that of a name that it has besides."""
    named = {name: config.gates[model.gate] for name, model in config.models.items() if model.gate is not None}
    return {real_model(config, name): policy for name, policy in named.items()} | named


def compile_retrains(config: Config) -> dict[str, RetrainSpec]:
    """When which models are to be trained again."""
    return {
        name: compile_retrain(name, model.retrain) for name, model in config.models.items() if model.retrain is not None
    }


def _limits(limits: Limits) -> RequestLimits:
    return RequestLimits(
        max_body_bytes=limits.max_body,
        max_json_depth=limits.max_json_depth,
        max_inputs=limits.max_inputs,
        max_outputs=limits.max_outputs,
        max_dims=limits.max_dims,
        max_parameters=limits.max_parameters,
        max_id_bytes=limits.max_id,
        max_chunks=limits.max_chunks,
        max_header_bytes=limits.max_headers,
    )


def _traces(traces: Traces) -> TraceSettings:
    return TraceSettings(
        traces.enabled, traces.sampling, traces.endpoint or "", traces.service_name, dict(traces.headers)
    )


# --- flags --------------------------------------------------------------------------------------------------------


def settings_from_flags(
    config: Config | None,
    *,
    http: str | None = None,
    grpc: str | None = None,
    metrics: str | None = None,
    admin: str | None = None,
    state_dir: Path | None = None,
    workers: int | None = None,
    in_process: bool | None = None,
    transport: str | None = None,
    single_port: bool | None = None,
    model_control: str | None = None,
    load_model: tuple[str, ...] | None = None,
    server_name: str | None = None,
    log_format: str | None = None,
    log_level: str | None = None,
    drain_seconds: float | None = None,
    model_repository: Path | None = None,
) -> ServerSettings:
    """The file's settings with every flag that is not None put over them. Raises InvalidConfig with all mistakes."""
    flags = _Flags(compile_settings(config))
    for name, text in zip(_LISTENERS, (http, grpc, metrics, admin), strict=True):
        flags.address(name, text)
    flags.choice("transport", transport)
    flags.choice("model_control", model_control)
    flags.choice("log_format", log_format)
    flags.choice("log_level", log_level)
    flags.number("workers", workers, 1, _MAX_WORKERS)
    flags.number("drain_seconds", drain_seconds, 0, _MAX_DRAIN_SECONDS)
    flags.text("server_name", server_name)
    flags.names("load_model", load_model)
    flags.take("state_dir", state_dir)
    flags.take("in_process", in_process)
    flags.take("single_port", single_port)
    flags.take("model_repository", model_repository)
    return flags.settings()


class _Flags:
    """Collects what flags change, and what is wrong with them."""

    def __init__(self, base: ServerSettings) -> None:
        self.base = base
        self.changes: dict[str, Any] = {}
        self.problems: list[Problem] = []

    def _refuse(self, flag: str, message: str) -> None:
        self.problems.append(Problem(f"--{flag.replace('_', '-')}", 0, 0, "", message))

    def take(self, flag: str, value: object) -> None:
        if value is not None:
            self.changes[flag] = value

    def address(self, flag: str, text: str | None) -> None:
        if text is not None:
            try:
                self.changes[flag] = units.parse_address(text)
            except ValueError as error:
                self._refuse(flag, str(error))

    def choice(self, flag: str, value: str | None) -> None:
        known = _CHOICES[flag]
        if value is not None and value not in known:
            self._refuse(flag, f"wanted {', '.join(known[:-1])} or {known[-1]}, got {units.show(value)}")
        self.take(flag, value)

    def number(self, flag: str, value: float | None, low: float, high: float) -> None:
        if value is not None and not low <= value <= high:
            self._refuse(flag, f"wanted {low:g} to {high:g}, got {value:g}")
        self.take(flag, value)

    def text(self, flag: str, value: str | None) -> None:
        if value is not None and not 0 < len(value) <= 255:
            self._refuse(flag, f"wanted 1 to 255 characters, got {len(value)}")
        self.take("name", value)

    def names(self, flag: str, values: tuple[str, ...] | None) -> None:
        for value in values or ():
            if value != "*" and not is_model_name(value):
                self._refuse(flag, f"wanted a model's name, got {units.show(value)}")
        self.take("load_models", values or None)

    def settings(self) -> ServerSettings:
        """The merged settings, when they hold together."""
        logs = {key: self.changes.pop(key) for key in ("log_format", "log_level") if key in self.changes}
        merged = replace(self.base, **self.changes, telemetry=replace(self.base.telemetry, **logs))
        self._check(merged)
        if self.problems:
            raise InvalidConfig(self.problems)
        return merged

    def _check(self, merged: ServerSettings) -> None:
        if merged.load_models and merged.model_control != "explicit":
            self._refuse("load_model", f"needs --model-control explicit, which is {merged.model_control}")
        addresses = merged.listeners()
        for one, other in combinations(sorted(_LISTENERS, key=self.changes.__contains__), 2):
            if overlap(addresses[one], addresses[other]):
                taken = units.format_address(addresses[other])
                self._refuse(other, f"{taken} is taken by {one} ({units.format_address(addresses[one])})")
