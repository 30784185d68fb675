"""Rules that span several keys of a valid configuration. Each mistake names its key path and the keys it rests on."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from itertools import combinations, pairwise

from router.registry.directory import is_version
from server.config.capture import capture_contradictions
from server.config.mlflow import mlflow_contradictions
from server.config.model import (
    Batching,
    Config,
    Defaults,
    Listeners,
    Model,
    QueueRules,
    RuntimeChoice,
    Warmup,
)
from server.config.monitoring import monitor_contradictions
from server.config.problems import Contradiction
from server.config.retrain import retrain_contradictions
from server.config.rollouts import rollout_contradictions
from server.config.routing_rules import routing_contradictions
from server.config.routing_sections import ModelVersion
from server.config.settings import Address
from server.config.sinks import alert_contradictions
from server.config.tree import KeyPath
from server.config.units import format_address


def contradictions(config: Config, *, repository_given: bool = False) -> Iterator[Contradiction]:
    """Every broken rule of the file, in no particular order.

    ``repository_given``: a flag names the model repository, so the file need not.
    """
    has_repository = repository_given or config.registry.directory is not None
    yield from _registry(config)
    yield from _listeners(config)
    yield from _model_control(config, has_repository)
    yield from _traces(config)
    yield from _behaviour(config.defaults, ("defaults",))
    for name, model in config.models.items():
        path = ("models", name)
        if not has_repository:
            yield from _source(name, model, config.registry.has_aliases)
        for version, entry in (model.versions or {}).items():
            yield from _version(entry, (*path, "versions", version))
        yield from _behaviour(model, path)
        yield from _warmups(model, path)
        if model.retrain is not None:
            yield from retrain_contradictions(model.retrain, (*path, "retrain"), config.alerts.sinks)
        if model.gate is not None and model.gate not in config.gates:
            text = f"there is no policy '{model.gate}' under gates: {', '.join(config.gates) or 'none'}"
            yield Contradiction((*path, "gate"), text)
    yield from routing_contradictions(config, repository_given=repository_given)
    yield from rollout_contradictions(config)
    yield from alert_contradictions(config.alerts)
    yield from capture_contradictions(config.capture, config.models)
    yield from monitor_contradictions(config)


# --- server -------------------------------------------------------------------------------------------------------


def _listeners(config: Config) -> Iterator[Contradiction]:
    listeners, root = config.server.listeners, ("server", "listeners")
    given = listeners.model_fields_set
    # What the file gives stands last in a pair, so that the mistake is shown there.
    names = sorted(Listeners.model_fields, key=lambda name: name in given)
    for first, second in combinations(names, 2):
        one, other = getattr(listeners, first), getattr(listeners, second)
        if overlap(one, other):
            default = "" if first in given else "the default of "
            text = f"{format_address(other)} is taken by {default}{first} ({format_address(one)})"
            yield Contradiction((*root, second), text, ((*root, first),))


def overlap(one: Address, other: Address) -> bool:
    """Would two listeners fight for one port? Port 0 never does, a wildcard host does with every host."""
    if one[1] != other[1] or not one[1]:
        return False
    return one[0] == other[0] or _is_wildcard(one[0]) or _is_wildcard(other[0])


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _model_control(config: Config, has_repository: bool) -> Iterator[Contradiction]:
    server = config.server
    mode: KeyPath = ("server", "model_control")
    if server.load_models and server.model_control != "explicit":
        text = f"load_models needs model_control: explicit, which is {server.model_control}"
        yield Contradiction(("server", "load_models"), text, (mode,))
    if "poll_interval" in server.model_fields_set and server.model_control != "poll":
        text = f"poll_interval needs model_control: poll, which is {server.model_control}"
        yield Contradiction(("server", "poll_interval"), text, (mode,))
    if has_repository:
        return
    for index, name in enumerate(server.load_models):
        if name != "*" and name not in config.models:
            text = f"model '{name}' is not in models, and there is no registry.directory to find it in"
            yield Contradiction(("server", "load_models", index), text, (("registry",), ("models",)))


def _registry(config: Config) -> Iterator[Contradiction]:
    mlflow, path = config.registry.mlflow, ("registry", "mlflow")
    if mlflow is None:
        return
    for other in ("directory", "embedded"):
        if getattr(config.registry, other):
            yield Contradiction(path, f"models come from MLflow or from registry.{other}", (("registry", other),))
    yield from mlflow_contradictions(mlflow, path)


def _traces(config: Config) -> Iterator[Contradiction]:
    traces, path = config.telemetry.traces, ("telemetry", "traces")
    if traces.enabled and traces.endpoint is None:
        text = "traces need an endpoint, such as http://127.0.0.1:4318/v1/traces"
        yield Contradiction((*path, "enabled"), text, ((*path, "endpoint"),))


# --- models -------------------------------------------------------------------------------------------------------


def _source(name: str, model: Model, embedded: bool) -> Iterator[Contradiction]:
    """What comes from a registry wants one: a directory, or the embedded one."""
    path: KeyPath = ("models", name)
    needs: KeyPath = ("registry", "directory")
    if embedded:
        return
    if not model.model_fields_set & {"source", "versions", "model"}:
        text = "the model has no source, and there is no registry.directory to find it in"
        yield Contradiction(path, text, (*((*path, key) for key in ("source", "versions", "model")), needs))
    sources = {} if model.source is None else {(*path, "source"): model.source}
    for version, entry in (model.versions or {}).items():
        if entry.entry is not None:
            sources[*path, "versions", version, "source"] = entry.entry
    for place, source in sources.items():
        if source.path is None:
            text = f"registry:{source.text} needs registry.directory or registry.embedded, which are not set"
            yield Contradiction(place, text, (needs, ("registry", "embedded")))


def _version(entry: ModelVersion, path: KeyPath) -> Iterator[Contradiction]:
    """A version lies in one place; trusted authorities belong to https."""
    source, upstream = (*path, "source"), (*path, "upstream")
    if entry.source is not None and entry.upstream is not None:
        yield Contradiction(upstream, "give either source or upstream, not both", (source,))
    if entry.source is None and entry.upstream is None:
        yield Contradiction(path, "the version has neither a source nor an upstream", (source, upstream))
    if entry.upstream is not None and entry.upstream.ca_file and not entry.upstream.url.startswith("https:"):
        yield Contradiction((*upstream, "ca_file"), "ca_file needs an https address", ((*upstream, "url"),))
    names = [] if entry.upstream is None else list(entry.upstream.headers)
    for name in names:
        if sum(other.lower() == name.lower() for other in names) > 1:
            yield Contradiction((*upstream, "headers", name), f"header {name.lower()} is named more than once")


def _behaviour(model: Defaults, path: KeyPath) -> Iterator[Contradiction]:
    yield from _runtime(model.runtime, (*path, "runtime"))
    yield from _batching(model.batching, (*path, "batching"))
    specific = model.version_policy.specific or ()
    for index, version in enumerate(specific):
        if version in specific[:index]:
            yield Contradiction((*path, "version_policy", "specific", index), f"version {version} is named twice")


def _runtime(runtime: RuntimeChoice, path: KeyPath) -> Iterator[Contradiction]:
    names = [provider.name for provider in runtime.providers]
    providers: KeyPath = (*path, "providers")
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Contradiction((*providers, index), f"provider {name} is named twice")
    if runtime.device_ids and set(names) == {"cpu"}:
        yield Contradiction((*path, "device_ids"), "device_ids need cuda or tensorrt among the providers", (providers,))
    if runtime.allow_fallback and len(names) == 1:
        text = "allow_fallback needs a second provider to fall back to"
        yield Contradiction((*path, "allow_fallback"), text, (providers,))


def _batching(batching: Batching, path: KeyPath) -> Iterator[Contradiction]:
    yield from _sizes(batching, path)
    yield from _buckets(batching, path)
    yield from _priorities(batching, path)
    yield from _queue(batching.queue_policy, (*path, "queue_policy"))


def _sizes(batching: Batching, path: KeyPath) -> Iterator[Contradiction]:
    limit, needs = batching.max_batch_size, ((*path, "max_batch_size"),)
    gathers = batching.model_fields_set & {"max_rows", "preferred_batch_sizes", "max_queue_delay", "buckets"}
    if limit == 0:
        for key in sorted(gathers):
            yield Contradiction((*path, key), f"{key} needs a model that batches, but max_batch_size is 0", needs)
        return
    if limit is not None and batching.max_rows > limit:
        text = f"max_rows {batching.max_rows} is over max_batch_size {limit}"
        yield Contradiction((*path, "max_rows"), text, needs)
    bounds = {"max_batch_size": limit or 0, "max_rows": batching.max_rows}
    for index, size in enumerate(batching.preferred_batch_sizes):
        for key, bound in bounds.items():
            if bound and size > bound:
                where = (*path, "preferred_batch_sizes", index)
                yield Contradiction(where, f"preferred batch size {size} is over {key} {bound}", ((*path, key),))


def _buckets(batching: Batching, path: KeyPath) -> Iterator[Contradiction]:
    for name, sizes in batching.buckets.items():
        for index, (before, size) in enumerate(pairwise(sizes), start=1):
            if size <= before:
                where = (*path, "buckets", name, index)
                yield Contradiction(where, f"bucket sizes ascend, but {size} follows {before}")
    for name in batching.pad_values:
        if name not in batching.buckets:
            where = (*path, "pad_values", name)
            yield Contradiction(where, f"input '{name}' has no buckets to pad to", ((*path, "buckets"),))


def _priorities(batching: Batching, path: KeyPath) -> Iterator[Contradiction]:
    priority, path = batching.priority, (*path, "priority")
    if priority is None:
        return
    needs = ((*path, "levels"),)
    if priority.default > priority.levels:
        text = f"default level {priority.default} is over levels {priority.levels}"
        yield Contradiction((*path, "default"), text, needs)
    for level, rules in priority.queue_policies.items():
        where = (*path, "queue_policies", level)
        if not is_version(level) or int(level) > priority.levels:
            yield Contradiction(where, f"wanted a level from 1 to {priority.levels}, got {level[:40]}", needs)
        yield from _queue(rules, where)


def _queue(rules: QueueRules, path: KeyPath) -> Iterator[Contradiction]:
    if rules.timeout_action == "delay" and not rules.timeout and not rules.allow_timeout_override:
        text = "timeout_action: delay needs a timeout, or allow_timeout_override"
        yield Contradiction((*path, "timeout_action"), text, ((*path, "timeout"), (*path, "allow_timeout_override")))


def _warmups(model: Model, path: KeyPath) -> Iterator[Contradiction]:
    limit, needs = model.batching.max_batch_size, ((*path, "batching", "max_batch_size"),)
    for index, sample in enumerate(model.warmup):
        where = (*path, "warmup", index)
        if limit is not None and sample.batch_size > limit:
            text = f"warm-up batch size {sample.batch_size} is over max_batch_size {limit}"
            yield Contradiction((*where, "batch_size"), text, needs)
        yield from _warmup_inputs(sample, where)


def _warmup_inputs(sample: Warmup, path: KeyPath) -> Iterator[Contradiction]:
    for name, tensor in sample.inputs.items():
        where = (*path, "inputs", name)
        if tensor.file is not None and "source" in tensor.model_fields_set:
            yield Contradiction((*where, "file"), "give either source or file, not both", ((*where, "source"),))
        if tensor.source == "random" and tensor.datatype == "BYTES":
            yield Contradiction((*where, "source"), "BYTES cannot be random", ((*where, "datatype"),))
