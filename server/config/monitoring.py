"""``monitor`` sections -> how versions are watched; and the rules that span several of their keys.

``defaults.monitor`` is what a model's own section goes on top of, key by key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from monitor.outcomes import LabelSettings
from monitor.types import AlarmRules, Settings
from server.config.model import Config, Model, Monitor
from server.config.monitor_sections import (
    label_contradictions,
    labels_of,
    rule_contradictions,
    rule_of,
    segment_contradictions,
    segment_of,
)
from server.config.problems import Contradiction
from server.config.tree import KeyPath

_NESTED: Final = ("min_effect", "ring", "metrics", "sample")


@dataclass(slots=True, frozen=True)
class MonitorSpec:
    """How the versions of one model are watched.

    ``profiles`` by version go first, then ``profile``: a file, ``registry`` (the version must bring a profile), or None
    (a version that brings one is watched, others are not). ``top``: columns that have metrics of their own. ``labels``:
    how labels are joined, with or without a profile; ``label_slice``: the input that metrics are cut by.
    """

    enabled: bool = True
    profile: Path | Literal["registry"] | None = None
    profiles: Mapping[str, Path] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)
    calibration: Path | None = None
    top: int = 20
    labels: LabelSettings | None = None
    label_slice: str = ""


@dataclass(slots=True, frozen=True)
class Monitoring:
    """Of every model: what its section says, or for a model without one what ``defaults`` say."""

    defaults: MonitorSpec = field(default_factory=MonitorSpec)
    models: Mapping[str, MonitorSpec] = field(default_factory=dict)

    def of(self, model: str) -> MonitorSpec:
        return self.models.get(model, self.defaults)


def compile_monitoring(config: Config | None) -> Monitoring:
    """How every model is watched; a file of nothing watches what brings a profile."""
    if config is None:
        return Monitoring()
    base = _given(config.defaults.monitor)
    return Monitoring(
        _spec(_section(base)),
        {name: _spec(_section(_over(base, _given(model.monitor)))) for name, model in config.models.items()},
    )


def _given(section: Monitor) -> dict[str, Any]:
    """What the file says, nested sections by their keys."""
    given: dict[str, Any] = {}
    for key in section.model_fields_set:
        value = getattr(section, key)
        given[key] = {name: getattr(value, name) for name in value.model_fields_set} if key in _NESTED else value
    return given


def _over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**base, **own}
    for key in _NESTED:
        if key in merged:
            merged[key] = {**base.get(key, {}), **own.get(key, {})}
    return merged


def _section(given: Mapping[str, Any]) -> Monitor:
    """A section of values that were checked one by one."""
    nested = {key: type(getattr(Monitor(), key)).model_construct(**given.get(key, {})) for key in _NESTED}
    return Monitor.model_construct(**{**given, **nested})


def _spec(section: Monitor) -> MonitorSpec:
    k, m = section.persistence
    rules = AlarmRules(
        ert_rows=section.expected_run.rows,
        ert_hours=section.expected_run.hours,
        min_psi=section.min_effect.psi,
        min_ks=section.min_effect.ks,
        min_rate=section.min_effect.rate,
        k=k,
        m=m,
    )
    settings = Settings(
        windows=section.windows,
        rules=rules,
        reference=section.reference,
        ring_rows=section.ring.rows,
        ring_bytes=section.ring.bytes,
        segment=segment_of(section.segment),
        schema=tuple([rule_of(rule) for rule in section.schema_]),
        keep_rows=section.sample.rows,
        keep_bytes=section.sample.bytes,
        history_looks=section.history,
    )
    return MonitorSpec(
        section.enabled,
        section.profile,
        section.profiles,
        settings,
        section.calibration,
        section.metrics.top,
        labels_of(section.labels),
        "" if section.labels is None else section.labels.slice,
    )


# --- rules -----------------------------------------------------------------------------------------------------------


def monitor_contradictions(config: Config) -> Iterator[Contradiction]:
    """Every broken rule of the ``monitor`` sections."""
    yield from _within(config.defaults.monitor, ("defaults", "monitor"))
    if config.defaults.monitor.profiles:
        text = "profiles belong to the versions of one model: name them in its own section"
        yield Contradiction(("defaults", "monitor", "profiles"), text)
    for name, model in config.models.items():
        path = ("models", name, "monitor")
        yield from _within(model.monitor, path)
        yield from _profiles(model, path)
        if model.model is not None and "monitor" in model.model_fields_set:
            text = f"the versions are model '{model.model}'s, and watched as its section says"
            yield Contradiction(path, text, (("models", name, "model"),))


def _within(section: Monitor, path: KeyPath) -> Iterator[Contradiction]:
    yield from _windows(section, path)
    yield from segment_contradictions(section.segment, (*path, "segment"))
    for index, rule in enumerate(section.schema_):
        yield from rule_contradictions(rule, (*path, "schema", index))
    yield from label_contradictions(section.labels, (*path, "labels"))


def _windows(section: Monitor, path: KeyPath) -> Iterator[Contradiction]:
    for index, window in enumerate(section.windows):
        if window in section.windows[:index]:
            yield Contradiction((*path, "windows", index), f"window {window.name} is named twice")


def _profiles(model: Model, path: KeyPath) -> Iterator[Contradiction]:
    if model.versions is None:
        return
    for version in model.monitor.profiles:
        if version not in model.versions:
            text = f"version {version} is none of the model's versions: {', '.join(model.versions)}"
            yield Contradiction((*path, "profiles", version), text, (("models", path[1], "versions"),))
