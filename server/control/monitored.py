"""Which versions are watched, under which profile, and as what: the monitor's side of plans and of the routing table.

**Profiles.** A version is watched under the first of these that there is: the file that ``monitor.profiles`` names for
it, the one of ``monitor.profile``, and the profile that it brings: in the registry a file of role ``profile`` or with
the name ``profile.tgp``, in a directory ``profile.tgp`` in the version's folder. Versions that the configuration names
one by one by path, and those of other servers, bring none. How a version is watched is part of its fingerprint, so
changing it loads the version anew beside the one that serves, checks the profile, and swaps both at once, as every
other change does.

**Labels.** Models whose section says how labels are joined have them joined, with or without a profile.

**Arms.** A batch is counted as what its version was in the routing table when it ran: ``stable``, the name of the arm
of a split that leads to it, ``pinned`` when it is only asked for by number or by rule, or ``shadow`` for the copies
that a shadow gets. So all rows of a version count to its one part, also those that a rule or a caller sent there.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from router.registry.manifest import PROFILE
from router.types import PINNED_ARM, STABLE_ARM, ModelRoutes
from server.config.monitor_kinds import REGISTRY
from server.config.monitoring import Monitoring, MonitorSpec
from server.control.registry import manifest_of
from server.control.sources import ModelPlan, ModelSource, VersionPlan, golden_state
from server.errors import ModelLoadError
from server.gateway import Gateway, Served
from server.monitoring.labels import LabelWatch
from server.monitoring.service import Mirror, MonitorService
from server.monitoring.watch import Watch, WatchedRequest
from server.runtime.base import LoadRequest

#: The drift profile that a version brings, beside its model file.
PROFILE_FILENAME: Final = "profile.tgp"


class MonitoredSource:
    """Plans of another source, with the versions watched that have a profile."""

    def __init__(self, source: ModelSource, monitoring: Monitoring) -> None:
        self._source = source
        self._monitoring = monitoring

    def scan(self) -> dict[str, ModelPlan]:
        return {name: self._watched(plan) for name, plan in self._source.scan().items()}

    def _watched(self, plan: ModelPlan) -> ModelPlan:
        spec = self._monitoring.of(plan.name)
        if not spec.enabled or plan.error:
            return plan
        places = {version.version: profile_of(spec, plan, version) for version in plan.versions}
        return replace(
            plan,
            versions=tuple([_marked(version, spec, places[version.version]) for version in plan.versions]),
            request=partial(_request, plan, spec, places),
        )


def profile_of(spec: MonitorSpec, plan: ModelPlan, version: VersionPlan) -> Path | None:
    """Where the profile of a version lies; a relative path starts at the folder that the registry gives."""
    named = spec.profiles.get(version.version) or spec.profile
    return named.absolute() if isinstance(named, Path) else _brought(plan, version)


def _brought(plan: ModelPlan, version: VersionPlan) -> Path | None:
    manifest = manifest_of(version)
    if manifest is not None:
        listed = manifest.file(PROFILE) or next((e for e in manifest.files if e.path == PROFILE_FILENAME), None)
        return None if listed is None else Path(listed.path)
    beside = version.path.with_name(PROFILE_FILENAME) if plan.folder is not None else None
    return beside.absolute() if beside is not None and os.path.lexists(beside) else None


def _marked(version: VersionPlan, spec: MonitorSpec, profile: Path | None) -> VersionPlan:
    """A fingerprint that changes with how the version is watched and its labels are joined."""
    marks: tuple[Hashable, ...] = ()
    if profile is not None:
        files = golden_state(tuple([path for path in (profile, spec.calibration) if path is not None]))
        marks = (spec.settings, spec.top, files)
    if spec.labels is not None:
        marks = (*marks, repr(spec.labels), spec.label_slice)
    return replace(version, fingerprint=(version.fingerprint, *marks)) if marks else version


def _request(
    plan: ModelPlan, spec: MonitorSpec, places: Mapping[str, Path | None], version: VersionPlan
) -> LoadRequest:
    """The load request of a version, to be watched if it has a profile. Blocking; raises ModelLoadError."""
    request = plan.load_request(version)
    profile = places.get(version.version)
    if profile is None and spec.profile == REGISTRY:
        raise ModelLoadError("it brings no drift profile, and monitor.profile asks for one")
    watch = labels = None
    if profile is not None:
        watch = Watch((request.folder or Path()) / profile, spec.settings, spec.calibration, spec.top)
    if spec.labels is not None:
        labels = LabelWatch(spec.labels, spec.label_slice)
    return WatchedRequest.of(request, watch, labels) if watch is not None or labels is not None else request


class Arms:
    """Keeps what batches are counted as true to the gateway's table. On the loop only, and quick."""

    def __init__(self, gateway: Gateway, monitors: MonitorService) -> None:
        self._gateway = gateway
        self._monitors = monitors

    def follow(self) -> None:
        """The table changed."""
        models = self._gateway.table.models
        arms: dict[Served, str] = {}
        # A public name of a model's own says more of its versions than another name that leads to them.
        own_first = sorted(models, key=lambda name: models[name].model not in ("", name))
        for name in own_first:
            for served, arm in _arms(models[name]):
                arms.setdefault(served, arm)
        for served, arm in arms.items():
            served.batcher.arm = arm
        self._monitors.follow(
            [served.batcher.taps for served in arms if served.batcher.taps],
            [mirror for name, routes in models.items() for mirror in _mirrors(name, routes)],
        )


def _arms(routes: ModelRoutes[Served]) -> Iterator[tuple[Served, str]]:
    """What each version is to one public name; what it is first counts."""
    yield routes.versions[routes.stable], STABLE_ARM
    if routes.split is not None:
        yield from ((arm.to.target, arm.name) for arm in routes.split.arms)
    yield from ((served, PINNED_ARM) for served in routes.versions.values())


def _mirrors(name: str, routes: ModelRoutes[Served]) -> Iterator[Mirror]:
    """Arms of the same model are counted under stable's profile too: arm against stable is a two-sample test."""
    model = routes.model or name
    for arm in routes.split.arms if routes.split is not None else ():
        if arm.to.model == model and arm.to.version != routes.stable:
            yield Mirror(model, arm.to.version, routes.stable, arm.name)
