"""Retraining in a live server: what triggers must know, told each second, and what became of what they asked for.

Nobody reports to a job. Each look compares jobs with what is true (the registry, the rollouts, the version that
answers) and tells what follows, so a process that was killed at any moment catches up after its next start:

* a version whose lineage names the trigger: registered, the highest such version;
* its rollout is past admission: gated; in it: the gates' question; failed, aborted or rolled back: rejected;
* it is the version that answers: promoted, whoever saw to that. Once the champion of before answers again: rejected.

What is the loop's (the table, the rollouts) is copied on the loop; everything else happens off it, one look at a time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import structlog

from monitor.outcomes import CALIBRATION_SIGNALS
from monitor.retrain.rules import Champion, Kind, Value
from router.registry.base import RegistryBackend, RegistryError, Version
from router.registry.manifest import Lineage, Manifest
from router.rollout.events import State
from server.audit import AuditLog
from server.control.quality import Lookup
from server.control.registry import published_as
from server.control.rollouts.store import Standing
from server.control.sources import ModelPlan, VersionPlan
from server.errors import NotFound, TidegateError
from server.monitoring.service import MonitorService
from server.outbox import Outbox
from server.retraining import Facts, Retraining, RetrainSpec
from server.store.base import Store
from server.telemetry.snapshot import FamilySnapshot

log = structlog.get_logger("retraining")

_EVERY_S: Final = 1.0
#: How often the triggers are told of all alarms there are.
_SYNC_S: Final = 60.0
_STABLE_ARM: Final = "stable"
#: Alarms of a column's distribution, which are counted by version; those of labels are by what a request asked for.
_DRIFT: Final = "drift."
_REFUSED: Final = frozenset({State.FAILED, State.ABORTED, State.ROLLED_BACK})
_UNDER_WAY: Final = frozenset({State.LOADING, State.SHADOWING, State.STEP, State.AWAITING, State.HOLD, State.PROMOTING})
#: What goes into an event of a column's scores, and of a signal: its name there -> here.
_SCORES: Final = {"psi": "psi", "psi_p": "psi_p", "ks": "ks_low", "ks_p": "ks_p", "rows": "rows"}
_SIGNAL: Final = {"value": "value", "reference": "reference", "effect": "effect", "p": "p"}


@dataclass(slots=True, frozen=True)
class _Seen:
    """What the loop knew of a models entry.

    ``model``: whose versions it serves, its own or, with ``model: NAME``, that name's. ``stable``: (number, digest) of
    the one that answers, or None; ``arm``: what rows of that one are counted as, which is not "stable" where another
    one answers under the model's own name. ``planned``: the model's versions by number.
    """

    model: str
    stable: tuple[str, str] | None
    arm: str
    planned: Mapping[str, VersionPlan]
    rollouts: Sequence[Standing]

    def is_meant(self, event: Mapping[str, Any]) -> bool:
        """Is an alarm about what answers under this name?"""
        arm = self.arm if str(event["event"]).startswith(_DRIFT) else _STABLE_ARM
        number = "" if self.stable is None else self.stable[0]
        return (event["model"], event["version"], event["arm"]) == (self.model, number, arm)


@dataclass(slots=True, frozen=True)
class World:
    """What retraining looks at. ``plan``, ``served`` and ``rollouts`` are asked on the loop.

    ``captured``: where the captured requests of a models entry lie. ``sinks``: those that this process has.
    """

    plan: Callable[[str], ModelPlan]
    served: Lookup
    rollouts: Callable[[], Sequence[Standing]]
    monitors: MonitorService
    registry: RegistryBackend
    captured: Callable[[str], tuple[str, ...]]
    sinks: frozenset[str]


class RetrainControl:
    """The retraining of one process; ``retraining`` is what decides and remembers."""

    def __init__(
        self, store: Store, audit: AuditLog, outbox: Outbox, world: World, specs: Mapping[str, RetrainSpec]
    ) -> None:
        self._world = world
        self._facts: Mapping[str, Facts] = {}
        #: Entries that serve another name's versions, as they were last seen.
        self._borrowing: Mapping[str, _Seen] = {}
        #: Why the versions of a registry's entry could not be read when that was last told.
        self._unreadable: dict[str, str] = {}
        self._turn = threading.Lock()
        self._sync_at = 0.0
        self._closed = False
        self._failing = False
        self.retraining = Retraining(store, audit, outbox, {}, lambda model: self._facts.get(model, Facts()))
        self.replace_specs(specs)

    def on_alarm(self, event: Mapping[str, Any]) -> None:
        """Take an alarm's event, for every name that its version answers under. Never waits."""
        self.retraining.on_alarm(event)
        for name, seen in self._borrowing.items():
            if seen.is_meant(event):
                self.retraining.on_alarm({**event, "model": name, "arm": _STABLE_ARM})

    def replace_specs(self, specs: Mapping[str, RetrainSpec]) -> None:
        """Those of a configuration. One that needs sinks of the next start has to wait for it."""
        known = {name: spec for name, spec in specs.items() if self._world.sinks.issuperset(spec.sinks)}
        for name in specs.keys() - known.keys():
            log.warning("retrain_waits_for_restart", model=name, reason="sinks are read at the start")
        self.retraining.specs = known

    def families(self) -> Iterator[FamilySnapshot]:
        """A collector of metrics."""
        return self.retraining.families()

    # -- the clock ------------------------------------------------------------------------------------------------

    async def run(self, every_s: float = _EVERY_S) -> None:
        """Look each second until cancelled. What goes wrong is logged once until it works again."""
        while True:
            try:
                await self.look()
                self._failing = False
            except Exception as error:  # the boundary of one look: the next one makes it good
                if not self._failing:
                    log.error("retrain_look_failed", error=str(error), exc_info=not isinstance(error, TidegateError))
                self._failing = True
            await asyncio.sleep(every_s)

    async def look(self) -> None:
        """Tell the triggers and the jobs what is true now. Raises TidegateError when the disk refuses."""
        if self.retraining.specs:
            await asyncio.to_thread(self._look, self._observed())

    def close(self) -> None:
        """Look no more, and wait for the look that is going on. Blocks."""
        self._closed = True
        with self._turn:
            return

    # -- people ---------------------------------------------------------------------------------------------------

    async def fire(self, model: str, reason: str, actor: str) -> dict[str, Any]:
        """A person wants a training; the job. Raises what ``Retraining.fire`` raises."""
        return await asyncio.to_thread(self._fire, self._observed(), model, reason, actor)

    def _fire(self, seen: Mapping[str, _Seen], model: str, reason: str, actor: str) -> dict[str, Any]:
        with self._turn:
            self._facts = self._learn(seen)
            return self.retraining.fire(model, actor=actor, reason=reason)

    # -- on the loop ----------------------------------------------------------------------------------------------

    def _observed(self) -> dict[str, _Seen]:
        standing = self._world.rollouts()
        return {model: self._see(model, standing) for model in self.retraining.specs}

    def _see(self, model: str, standing: Iterable[Standing]) -> _Seen:
        try:
            served = self._world.served(model, "")
            spec, arm = served.spec, served.batcher.arm
            plan, stable = self._world.plan(spec.name), (spec.version, spec.digest)
        except TidegateError:
            plan, stable, arm = ModelPlan(model), None, _STABLE_ARM
        planned = {version.version: version for version in plan.versions}
        # A rollout under the model's own name moves what its other names lead to; an entry's own goes first.
        rollouts = [found for name in dict.fromkeys((model, plan.name)) for found in standing if found.entry == name]
        return _Seen(plan.name, stable, arm, planned, rollouts)

    # -- off the loop ---------------------------------------------------------------------------------------------

    def _look(self, seen: Mapping[str, _Seen]) -> None:
        with self._turn:
            if self._closed:
                return
            self._facts = self._learn(seen)
            if time.monotonic() >= self._sync_at:
                self._sync(seen)
                self._sync_at = time.monotonic() + _SYNC_S
            self.retraining.tick()
            for model, found in seen.items():
                self._follow(model, found)

    def _learn(self, seen: Mapping[str, _Seen]) -> dict[str, Facts]:
        self._borrowing = {name: found for name, found in seen.items() if found.model != name}
        return {
            model: Facts(
                self._champion(found),
                any(not rollout.ended for rollout in found.rollouts),
                self._world.captured(model),
            )
            for model, found in seen.items()
        }

    def _champion(self, seen: _Seen) -> Champion | None:
        if seen.stable is None:
            return None
        number, digest = seen.stable
        plan = seen.planned.get(number)
        published = None if plan is None else published_as(plan)
        return champion_of(number, digest, published, self._profile(seen.model, number))

    def _profile(self, model: str, number: str) -> str:
        try:
            return self._world.monitors.monitor(model, number).sha256
        except NotFound:
            return ""

    # -- alarms ---------------------------------------------------------------------------------------------------

    def _sync(self, seen: Mapping[str, _Seen]) -> None:
        """All alarms that there are of what answers now."""
        for model, found in seen.items():
            if found.stable is not None:
                number = found.stable[0]
                self.retraining.sync(model, "drift", number, self._drifted(found.model, number, found.arm))
                for kind, active in self._signals(found.model, number).items():
                    self.retraining.sync(model, kind, number, active)

    def _drifted(self, model: str, number: str, arm: str) -> dict[str, Mapping[str, Value]]:
        try:
            report = self._world.monitors.report(model, number)
        except NotFound:
            return {}
        return drift_alarms(report, arm)

    def _signals(self, model: str, number: str) -> dict[Kind, dict[str, Mapping[str, Value]]]:
        report = self._world.monitors.labels.report_of(model, number)
        return label_alarms([] if report is None else report["windows"])

    # -- jobs -----------------------------------------------------------------------------------------------------

    def _follow(self, model: str, seen: _Seen) -> None:
        jobs = self.retraining.list(model)
        came = self._came(model, seen) if any(job["state"] != "promoted" for job in jobs) else {}
        for job in jobs:
            version, trigger_id = came.get(job["trigger_id"], 0), job["trigger_id"]
            if job["state"] != "promoted" and version > int(job["version"] or 0):
                self.retraining.version_registered(model, str(version), Lineage(trigger_id=trigger_id))
                job = {**job, "version": str(version), "state": "registered"}  # noqa: PLW2901 - as it is now
            if job["version"]:
                self._judge(model, job, seen)

    def _judge(self, model: str, job: Mapping[str, Any], seen: _Seen) -> None:
        """What became of the version of a job, by its rollout and by which version answers."""
        version, state = str(job["version"]), job["state"]
        answers = "" if seen.stable is None else seen.stable[0]
        rollout = next((found for found in seen.rollouts if found.candidate == version), None)
        if answers == version:
            if state == "registered" and rollout is not None and rollout.state not in {State.PENDING, *_REFUSED}:
                self.retraining.gate(model, version, True)  # it has climbed between two looks
            if state != "promoted":
                self.retraining.promoted(model, version)
        elif state == "promoted":
            if rollout is not None and rollout.state in _REFUSED and answers == job["champion"]:
                self.retraining.rejected(model, version, rollout.reason or rollout.state.value)
        elif rollout is not None and state in ("registered", "gated"):
            self._judge_rollout(model, version, rollout)

    def _judge_rollout(self, model: str, version: str, rollout: Standing) -> None:
        if rollout.state in _REFUSED:
            self.retraining.rejected(model, version, rollout.reason or rollout.state.value)
        elif rollout.state in _UNDER_WAY:
            self.retraining.gate(model, version, True)
        elif rollout.state is State.PENDING and rollout.reason:
            self.retraining.gate(model, version, None, rollout.reason)

    def _came(self, model: str, seen: _Seen) -> dict[str, int]:
        """trigger_id -> the highest version that names it: of those that are planned, and of the registry's entry."""
        found: dict[str, int] = {}
        for number, plan in seen.planned.items():
            published = published_as(plan)
            if published is not None and published.manifest is not None:
                _note(found, published.manifest, int(number))
        for entry in {published.model for plan in seen.planned.values() if (published := published_as(plan))}:
            for trigger_id, version in self._of_entry(entry, seen.planned).items():
                found[trigger_id] = max(version, found.get(trigger_id, 0))
        return found

    def _of_entry(self, entry: str, planned: Mapping[str, VersionPlan]) -> Mapping[str, int]:
        """Of all versions of an entry that is served under the registry's own numbers."""
        if any((found := published_as(plan)) and str(found.version) != number for number, plan in planned.items()):
            return {}
        try:
            triggered = self._world.registry.triggered(entry)
        except RegistryError as error:  # another registry's, or damaged: what is planned is known all the same
            if self._unreadable.get(entry) != str(error):
                self._unreadable[entry] = str(error)
                log.info("versions_unreadable", entry=entry, error=str(error))
            return {}
        self._unreadable.pop(entry, None)
        return triggered


def _note(found: dict[str, int], manifest: Manifest, number: int) -> None:
    trigger_id = manifest.description.lineage.trigger_id
    if trigger_id:
        found[trigger_id] = max(number, found.get(trigger_id, 0))


def champion_of(number: str, digest: str, published: Version | None, profile: str) -> Champion:
    """What is known of the version that answers; of one that is no registry's, only which it is."""
    if published is None or published.manifest is None:
        return Champion(number, digest, reference=profile)
    about = published.manifest.description
    until = about.lineage.data.time_range
    return Champion(
        number,
        published.digest,
        unix_ns(published.created),
        0 if until is None else unix_ns(until[1]),
        profile,
        {f"{metric.dataset}/{metric.name}": metric.value for metric in about.metrics},
    )


def unix_ns(text: str) -> int:
    """Nanoseconds since the epoch of an RFC 3339 time; 0 for what is none."""
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1e6) * 1000
    except (ValueError, OverflowError):
        return 0


def drift_alarms(report: Mapping[str, Any], arm: str = _STABLE_ARM) -> dict[str, Mapping[str, Value]]:
    """Columns of an arm in alarm, named as their events name them, with the scores of the widest window."""
    found: dict[str, Mapping[str, Value]] = {}
    for window in sorted(report["windows"], key=lambda window: int(window["rows"])):
        if window["arm"] == arm:
            scores = {score["column"]: score for score in window["scores"]}
            found |= {name: _numbers(scores.get(name, {}), _SCORES, window["window"]) for name in window["in_alarm"]}
    for part in report.get("segments", ()):
        if part["arm"] == arm:
            found |= {f"{name}[{part['segment']}]": {"window": part["window"]} for name in part["in_alarm"]}
    return found


def label_alarms(windows: Iterable[Mapping[str, Any]]) -> dict[Kind, dict[str, Mapping[str, Value]]]:
    """Signals of the stable arm in alarm, by the kind of reason that they are."""
    found: dict[Kind, dict[str, Mapping[str, Value]]] = {"labels": {}, "calibration": {}}
    for window in windows:
        if window["arm"] != _STABLE_ARM:
            continue
        signals = {signal["name"]: signal for signal in window.get("signals", ())}
        part = f"[{window['slice']}]" if window["slice"] else ""
        for name in window.get("in_alarm", ()):
            kind: Kind = "calibration" if name in CALIBRATION_SIGNALS else "labels"
            found[kind][f"{name}{part}"] = _numbers(signals.get(name, {}), _SIGNAL, window["window"])
    return found


def _numbers(scores: Mapping[str, Any], names: Mapping[str, str], window: str) -> Mapping[str, Value]:
    return {"window": window} | {name: scores[source] for name, source in names.items() if source in scores}
