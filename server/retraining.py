"""The closed loop's outgoing half: tells triggers what happens, and writes what they decide in one transaction.

What a trigger remembers, the rows of the audit and the event for the trainers are committed together or not at all, so
a process that is killed at any moment neither forgets a request nor makes one twice. The decisions themselves are
``monitor.retrain.trigger``'s; sending is ``delivery``'s.

**Who calls.** ``alarm`` is for threads that must not wait: it only queues, at most ``MAX_QUEUED`` changes (what finds
no place is counted; ``sync`` brings what is in alarm up to date again). Everything else waits for the disk, so it is
called off the event loop, from any thread, and raises StoreError; then nothing has happened. ``tick`` is to be called
every second or so: it takes the queue, what serves, what was delivered and the time to the triggers.

Any number of processes may share a store; each step reads what the others wrote.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import structlog

from monitor.errors import StateError
from monitor.retrain.jobs import Job
from monitor.retrain.rules import Champion, Kind, Reason, RetrainRules, Value
from monitor.retrain.state import TriggerState
from monitor.retrain.trigger import (
    Asked,
    Cleared,
    Decision,
    Delivered,
    Event,
    Fire,
    Gated,
    JobChanged,
    Observed,
    Promoted,
    Raised,
    Registered,
    Rejected,
    Retried,
    Suppressed,
    Tick,
    Undelivered,
    open_job,
    step,
)
from server import outbox as events
from server.audit import AuditEvent, AuditLog
from server.errors import FailedPrecondition, InvalidArgument, NotFound
from server.outbox import Clock, Outbox, OutboxFull, rfc3339
from server.store.base import Store
from server.telemetry.snapshot import FamilySnapshot

log = structlog.get_logger("retraining")

EVENT_TYPE: Final = "io.tidegate.retrain.requested.v1"
ACTOR: Final = "tidegate"
MAX_QUEUED: Final = 4096
MAX_TEXT_CHARS: Final = 500
#: Of an event's 64 KiB: what reasons may take, and how many files of captured requests and metrics are named.
_REASON_BYTES: Final = 32 * 1024
_MAX_PATHS: Final = 32
_MAX_METRICS: Final = 50
#: The monitor's word for an alarm -> the kind of reason it is.
_KINDS: Final[Mapping[str, Kind]] = {"drift": "drift", "performance": "labels", "calibration": "calibration"}
_STABLE: Final = "stable"
#: What an alarm's event says of where it comes from, which the reason says in its own words.
_NAMING: Final = frozenset(
    {"event", "key", "model", "version", "profile", "arm", "segment", "slice", "feature", "name"}
)
#: Alarms named in one row of the audit.
_MAX_NAMES: Final = 50


@dataclass(slots=True, frozen=True)
class RetrainSpec:
    """What the configuration says of one model: when, and which sinks train."""

    rules: RetrainRules
    sinks: tuple[str, ...]


@dataclass(slots=True, frozen=True)
class Facts:
    """What is true of a model now. ``capture``: files or patterns of captured requests; none: it is off."""

    champion: Champion | None = None
    rollout: bool = False
    capture: tuple[str, ...] = ()


class Lineage(Protocol):
    """Of a manifest's lineage what is read here."""

    @property
    def trigger_id(self) -> str: ...


@dataclass(slots=True)
class _Counts:
    """In the life of one object. ``jobs``: by state; ``suppressed``: by (model, kind, cause)."""

    jobs: Counter[str] = field(default_factory=Counter)
    suppressed: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    lost_alarms: int = 0


class Retraining:
    """The triggers of all models. ``facts(model)`` is asked at every tick and must not wait for long.

    ``specs`` may be replaced whole at any time, as by a reload.
    """

    def __init__(
        self,
        store: Store,
        audit: AuditLog,
        outbox: Outbox,
        specs: Mapping[str, RetrainSpec],
        facts: Callable[[str], Facts],
        *,
        clock: Clock = time.time_ns,
    ) -> None:
        self.specs = specs
        self._store = store
        self._audit = audit
        self._outbox = outbox
        self._facts = facts
        self._clock = clock
        self._queue: deque[tuple[str, Raised | Cleared]] = deque()
        self._untold: dict[str, list[Raised | Cleared]] = {}  # taken from the queue, not written yet
        self._ticking = threading.Lock()
        self._counts = _Counts()
        self._full: set[str] = set()  # models of which it was said that the outbox has no room for their event

    # -- told without waiting -------------------------------------------------------------------------------------

    def on_alarm(self, event: Mapping[str, Any]) -> None:
        """Take an alarm's event as the monitor tells it (``server.monitoring.events``). Never waits.

        Only the stable arm counts. Alarms of data quality are no reason: training on broken data makes it worse.
        """
        told, _, change = str(event["event"]).partition(".")
        kind = _KINDS.get(told)
        if kind is None or event["arm"] != _STABLE:
            return
        part = event.get("segment") or event.get("slice")
        name = f"{event.get('feature') or event['name']}{f'[{part}]' if part else ''}"
        numbers = {key: value for key, value in event.items() if key not in _NAMING}
        self.alarm(event["model"], kind, name, event["version"], raised=change == "raised", numbers=numbers)

    def alarm(
        self,
        model: str,
        kind: Kind,
        name: str,
        version: str,
        *,
        raised: bool,
        numbers: Mapping[str, Value] | None = None,
    ) -> None:
        """An alarm of a version's stable arm was raised or cleared. ``numbers`` go into the event. Never waits."""
        if model not in self.specs:
            return
        if len(self._queue) >= MAX_QUEUED:
            self._counts.lost_alarms += 1
            return
        change = Raised(kind, name, version, dict(numbers or {})) if raised else Cleared(kind, name, version)
        self._queue.append((model, change))

    def sync(self, model: str, kind: Kind, version: str, active: Mapping[str, Mapping[str, Value]]) -> None:
        """All alarms of a kind that a version has now, name -> numbers: what the trigger missed is made good.

        While the outbox is full, what would be asked for waits, and this with it.
        """
        if model not in self.specs:
            return
        known = {one.name for one in self._state(model).conditions if (one.kind, one.version) == (kind, version)}
        told: list[Event] = [Raised(kind, name, version, dict(numbers)) for name, numbers in active.items()]
        told += [Cleared(kind, name, version) for name in known - active.keys()]
        self._told(model, told)

    # -- the clock ------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Take everything to the triggers. A full outbox is logged and tried again by the next tick."""
        with self._ticking:
            self._sort_queue()
            self._full.intersection_update(self.specs)
            for model in self.specs:
                if self._told(model, [*self._untold.get(model, ()), Tick()]) is not None:
                    self._untold.pop(model, None)

    def _sort_queue(self) -> None:
        """Put the changes with those of their model that were not written yet; the bound is on both together."""
        self._untold = {model: changes for model, changes in self._untold.items() if model in self.specs}
        room = MAX_QUEUED - sum(map(len, self._untold.values()))
        for _ in range(min(room, len(self._queue))):
            model, change = self._queue.popleft()
            self._untold.setdefault(model, []).append(change)

    def _told(self, model: str, told: Sequence[Event]) -> Sequence[Decision] | None:
        """``_take`` of what nobody waits for. None: the outbox has no room for what follows; nothing has happened.

        That is said once, until nothing of the model waits for room any more.
        """
        try:
            decisions = self._take(model, told)
        except OutboxFull as error:
            if model not in self._full:
                log.error("retrain_not_requested", model=model, reason=str(error))
            self._full.add(model)
            return None
        self._full.discard(model)
        return decisions

    def _deliveries(self, state: TriggerState) -> Iterator[Event]:
        """What became of the events whose jobs are only requested, or lost and tried again by a person since."""
        for job in state.jobs:
            if job.state not in ("requested", "lost") or job.version:
                continue
            found = self._outbox.list(100, event_id=job.trigger_id)
            if job.state == "lost":
                if not any(one.retried_ns > job.state_ns for one in found):
                    continue
                yield Retried(job.trigger_id)
            taken = next((one.sink for one in found if one.state == "delivered"), None)
            if taken is not None:
                yield Delivered(job.trigger_id, taken)
            elif found and all(one.state == "dead" for one in found):
                yield Undelivered(job.trigger_id, "no sink took the event: " + found[0].error)

    # -- told, and written ----------------------------------------------------------------------------------------

    def fire(self, model: str, *, actor: str, reason: str) -> dict[str, Any]:
        """A person wants a training of ``model`` now. Returns the job.

        Raises NotFound when the model has no retraining, FailedPrecondition while a rollout or another job is open,
        InvalidArgument for a reason that is too long, OutboxFull.
        """
        if not reason.strip() or len(reason) > MAX_TEXT_CHARS:
            raise InvalidArgument(f"a reason of 1 to {MAX_TEXT_CHARS} characters is wanted, got {len(reason)}")
        self._spec(model)
        decisions = self._take(model, [Asked(actor, reason)])
        for decision in decisions:
            if isinstance(decision, Fire):
                return next(job for job in self.list(model) if job["trigger_id"] == decision.trigger_id)
        job = open_job(self._state(model))
        why = "a rollout of it is open" if job is None else f"its job {job.trigger_id} is {job.state}"
        raise FailedPrecondition(f"no training of model '{model}' is asked for: {why}")

    def version_registered(self, model: str, version: str, lineage: Lineage) -> bool:
        """A version came. True when a job waited for it; a manifest's ``description.lineage`` is what is wanted."""
        return bool(lineage.trigger_id) and self._changes(model, Registered(lineage.trigger_id, version))

    def gate(self, model: str, version: str, passed: bool | None, detail: str = "") -> bool:
        """The gates' verdict on a version (None: they could not decide). True when a job moved."""
        return self._changes(model, Gated(version, passed, detail[:MAX_TEXT_CHARS]))

    def promoted(self, model: str, version: str) -> bool:
        """A version became the champion. True when it was a job's."""
        return self._changes(model, Promoted(version))

    def rejected(self, model: str, version: str, reason: str) -> bool:
        """A version was refused, aborted or rolled back. True when it was a job's."""
        return self._changes(model, Rejected(version, reason[:MAX_TEXT_CHARS]))

    def _changes(self, model: str, event: Event) -> bool:
        if model not in self.specs:
            return False
        return any(isinstance(decision, JobChanged) for decision in self._told(model, [event]) or ())

    # -- reading --------------------------------------------------------------------------------------------------

    def list(self, model: str | None = None) -> list[dict[str, Any]]:
        """Every job that is remembered, of one model or all, the newest first, as plain JSON values."""
        with self._store.reading() as connection:
            names = self.specs if model is None else [model]
            found = [(name, job) for name in names for job in _load(connection, name).jobs]
        found.sort(key=lambda pair: pair[1].requested_ns, reverse=True)
        return [_job(name, job) for name, job in found]

    def status(self, model: str) -> dict[str, Any]:
        """What the trigger of a model knows: its champion, what is in alarm, its job. Raises NotFound."""
        spec, state = self._spec(model), self._state(model)
        job = open_job(state)
        return {
            "model": model,
            "sinks": list(spec.sinks),
            "rules": spec.rules.digest(),
            "champion": None if state.champion is None else state.champion.version,
            "rollout": state.rollout,
            "alarms": [
                {
                    "kind": one.kind,
                    "name": one.name,
                    "version": one.version,
                    "since": rfc3339(one.since_ns),
                    "cleared": None if one.cleared_ns is None else rfc3339(one.cleared_ns),
                    "trigger_id": one.spent or None,
                }
                for one in state.conditions
            ],
            "requested": [rfc3339(at) for at in state.fired_ns],
            "job": None if job is None else _job(model, job),
        }

    def families(self) -> Iterator[FamilySnapshot]:
        """A collector of metrics, from memory."""
        counts = self._counts
        yield FamilySnapshot(
            "tidegate_retrain_events_total", "Jobs of retraining that came to a state.", "counter", ("state",),
            {(state,): count for state, count in tuple(counts.jobs.items())},
        )  # fmt: skip
        yield FamilySnapshot(
            "tidegate_retrain_suppressed_total", "Reasons to retrain that were held back.", "counter",
            ("model", "kind", "cause"), dict(tuple(counts.suppressed.items())),
        )  # fmt: skip
        yield FamilySnapshot(
            "tidegate_retrain_alarms_lost_total", "Alarms that found no place in the queue.", "counter", (),
            {(): counts.lost_alarms},
        )  # fmt: skip

    # -- one step -------------------------------------------------------------------------------------------------

    def _take(self, model: str, told: Sequence[Event]) -> Sequence[Decision]:
        """Tell the trigger what is true and what happened; write what follows, if anything does."""
        spec, facts, now = self._spec(model), self._facts(model), self._clock()
        known: Event = Observed(facts.champion, facts.rollout)
        before = self._state(model)
        told = [known, *self._deliveries(before), *told]
        if _steps(spec.rules, before, told, now) == (before, []):
            return ()
        with self._store.transaction() as connection:
            state, decisions = _steps(spec.rules, _load(connection, model), told, now)
            for decision in decisions:
                self._carry_out(connection, model, spec, facts, decision)
            connection.execute("INSERT OR REPLACE INTO retrain_trigger VALUES (?, ?, ?)", (model, _text(state), now))
        self._count(model, decisions)
        return decisions

    def _carry_out(
        self, connection: sqlite3.Connection, model: str, spec: RetrainSpec, facts: Facts, decision: Decision
    ) -> None:
        match decision:
            case Fire():
                event = _event(model, decision, facts)
                self._outbox.put(connection, event, spec.sinks)
                self._journal(connection, _actor(decision), "retrain.requested", event.subject, event.data)
            case Suppressed(kind, cause, names):
                detail: dict[str, object] = {"kind": kind, "cause": cause, "names": names[:_MAX_NAMES]}
                self._journal(connection, ACTOR, "retrain.suppressed", model, detail)
            case JobChanged(job, was) if was:
                detail = {"trigger_id": job.trigger_id, "was": was, "version": job.version, "detail": job.detail}
                self._journal(connection, ACTOR, f"retrain.{job.state}", model, detail)

    def _journal(
        self, connection: sqlite3.Connection, actor: str, action: str, subject: str, detail: Mapping[str, object]
    ) -> None:
        self._audit.append(connection, AuditEvent(actor, action, subject, detail))

    def _count(self, model: str, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Suppressed(kind, cause, names):
                    self._counts.suppressed[model, kind, cause] += 1
                    log.info("retrain_suppressed", model=model, kind=kind, cause=cause, names=names)
                case JobChanged(job, was):
                    self._counts.jobs[job.state] += 1
                    log.info(
                        "retrain_job", model=model, trigger_id=job.trigger_id, state=job.state, was=was,
                        version=job.version, detail=job.detail, kinds=job.kinds,
                    )  # fmt: skip

    def _state(self, model: str) -> TriggerState:
        with self._store.reading() as connection:
            return _load(connection, model)

    def _spec(self, model: str) -> RetrainSpec:
        spec = self.specs.get(model)
        if spec is None:
            raise NotFound(f"model '{model[:128]}' has no retraining configured")
        return spec


def retry_refusal(connection: sqlite3.Connection, event_id: str) -> str:
    """Why an event of the outbox is not to be tried again, for ``Outbox.retry``; "" when nothing speaks against it.

    A job that was given up would be open again with it, beside one that something is still expected of.
    """
    for (model,) in connection.execute("SELECT model FROM retrain_trigger ORDER BY model").fetchall():
        jobs = _load(connection, model).jobs
        if all(job.trigger_id != event_id for job in jobs):
            continue
        for job in jobs:
            if job.trigger_id != event_id and (job.open or events.is_under_way(connection, job.trigger_id)):
                state = job.state if job.open else "being tried again"
                return f"a training of model '{model}' is asked for already: job {job.trigger_id} is {state}"
    return ""


def _steps(
    rules: RetrainRules, state: TriggerState, told: Iterable[Event], now_ns: int
) -> tuple[TriggerState, list[Decision]]:
    decisions: list[Decision] = []
    for event in told:
        state, more = step(rules, state, event, now_ns)
        decisions += more
    return state, decisions


def _load(connection: sqlite3.Connection, model: str) -> TriggerState:
    """What is remembered of a model. What is damaged is logged, and the trigger begins anew."""
    row = connection.execute("SELECT state FROM retrain_trigger WHERE model = ?", (model,)).fetchone()
    if row is None:
        return TriggerState()
    try:
        return TriggerState.from_dict(json.loads(row[0]))
    except (StateError, ValueError, TypeError, RecursionError) as error:
        log.error("retrain_state_damaged", model=model, error=str(error))
        return TriggerState()


def _text(state: TriggerState) -> str:
    return json.dumps(state.to_dict(), separators=(",", ":"))


# --- the event -------------------------------------------------------------------------------------------------------


def _event(model: str, fire: Fire, facts: Facts) -> events.Event:
    """The CloudEvent. Its id and its key are the trigger's id, as which a version's lineage names it."""
    champion = fire.champion
    told, more = _told(fire.reasons)
    data = {
        "trigger_id": fire.trigger_id,
        "model": model,
        "reasons": told,
        "more_reasons": more,
        "window": {"start": rfc3339(fire.start_ns), "end": rfc3339(fire.end_ns)},
        "reference": "" if champion is None else champion.reference,
        "champion": None if champion is None else _champion(champion),
        "capture": _capture(champion, facts.capture, fire.end_ns),
        "rules": fire.rules,
    }
    subject = model if champion is None else f"{model}:{champion.version}"
    return events.Event(EVENT_TYPE, f"/models/{model}", subject, fire.trigger_id, data, id=fire.trigger_id)


def _told(reasons: Iterable[Reason]) -> tuple[list[dict[str, object]], int]:
    """Reasons as JSON, as many as there is room for, and how many there was none for."""
    told: list[dict[str, object]] = []
    room, more = _REASON_BYTES, 0
    for reason in reasons:
        one: dict[str, object] = {
            "kind": reason.kind,
            "name": reason.name,
            "since": rfc3339(reason.since_ns),
            "numbers": {name: _finite(value) for name, value in reason.numbers.items()},
        }
        size = len(json.dumps(one))
        if size <= room:
            told.append(one)
            room -= size
        else:
            more += 1
    return told, more


def _finite(value: Value) -> Value:
    """None for what JSON has no number for."""
    return None if isinstance(value, float) and value - value != 0.0 else value


def _champion(champion: Champion) -> dict[str, object]:
    metrics = list(champion.metrics.items())[:_MAX_METRICS]
    return {
        "version": champion.version,
        "digest": champion.digest,
        "created": rfc3339(champion.created_ns) if champion.created_ns else None,
        "metrics": {name[:128]: _finite(value) for name, value in metrics},
    }


def _capture(champion: Champion | None, paths: Sequence[str], end_ns: int) -> dict[str, object] | None:
    """What was captured since the champion's data end, or since it was made; None when nothing is captured."""
    if not paths:
        return None
    start_ns = 0 if champion is None else champion.data_until_ns or champion.created_ns
    return {"paths": list(paths)[:_MAX_PATHS], "start": rfc3339(start_ns), "end": rfc3339(end_ns)}


def _actor(fire: Fire) -> str:
    return next((reason.name for reason in fire.reasons if reason.kind == "manual"), ACTOR)


def _job(model: str, job: Job) -> dict[str, Any]:
    return {
        "model": model,
        "trigger_id": job.trigger_id,
        "state": job.state,
        "since": rfc3339(job.state_ns),
        "requested": rfc3339(job.requested_ns),
        "kinds": list(job.kinds),
        "champion": job.of,
        "version": job.version,
        "detail": job.detail,
    }
