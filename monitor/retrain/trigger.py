"""When a model is to be trained again: a pure function of what is remembered, what happened, and the time.

* **Reasons.** Alarms (drift, labels, calibration) are raised and cleared by others, who see to it that they persisted;
  here they are conditions of one version, and count while that version is the champion. Age and schedule follow from
  the clock; a person's request is a reason of its own.
* **One event per episode.** A condition that was told of is spent until it ends; one that comes back within
  ``clear_after`` has not ended. So a signal that flaps is one event. A job that is lost gives its reasons back.
* **Coalescing.** The first reason opens a window; what is a reason by its end goes into one event.
* **Suppression.** No champion, a rollout, an open job, the cool-down or the budget hold everything back but a person,
  whom only a rollout and an open job stop. Alarms that last wait until nothing holds them back; a moment of the
  schedule that is held back passes. Each kind and cause is reported once per cool-down.
* **Key.** SHA-256 over model, champion, rules and the start of the window of ``cooldown`` that the event falls in, so
  that gateways which see the same ask for the same. Two events of one trigger never share a key: the second one's
  window starts a second later than the first one's if it would be the same.

Everything remembered is bounded: ``MAX_CONDITIONS`` alarms (of other versions than the champion the oldest goes first;
when all are the champion's a new one is dropped and counted) and ``MAX_JOBS`` jobs (the oldest that ended goes).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias

from monitor.retrain import jobs
from monitor.retrain.jobs import Job
from monitor.retrain.rules import DAY_NS, MAX_BUDGET, SECOND_NS, SIGNALS, Champion, Kind, Reason, RetrainRules, Value
from monitor.retrain.state import Condition, Report, TriggerState

MAX_CONDITIONS: Final = 256
MAX_JOBS: Final = 50
#: Suppressed reasons are told of no more often than this, however short the cool-down.
_LEAST_REPORT_NS: Final = 60 * SECOND_NS

Cause: TypeAlias = Literal["no champion", "rollout", "job", "cooldown", "budget"]
#: What stops a person too.
_HARD: Final[frozenset[Cause]] = frozenset({"rollout", "job"})


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Tick:
    """Time has passed."""


@dataclass(slots=True, frozen=True)
class Observed:
    """What serves now, and whether a rollout of the model is open."""

    champion: Champion | None
    rollout: bool


@dataclass(slots=True, frozen=True)
class Raised:
    """An alarm of ``version`` began, or is still there."""

    kind: Kind
    name: str
    version: str
    numbers: Mapping[str, Value] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Cleared:
    """An alarm ended."""

    kind: Kind
    name: str
    version: str


@dataclass(slots=True, frozen=True)
class Asked:
    """A person wants a training."""

    actor: str
    text: str


@dataclass(slots=True, frozen=True)
class Delivered:
    """A sink has the event."""

    trigger_id: str
    sink: str


@dataclass(slots=True, frozen=True)
class Undelivered:
    """No sink will have the event."""

    trigger_id: str
    reason: str


@dataclass(slots=True, frozen=True)
class Retried:
    """A person has the event of a lost job tried again. It stays lost while another job is open: told again later."""

    trigger_id: str


@dataclass(slots=True, frozen=True)
class Registered:
    """A version names the trigger in its lineage."""

    trigger_id: str
    version: str


@dataclass(slots=True, frozen=True)
class Gated:
    """The gates' verdict on a version; ``passed`` None: they could not decide."""

    version: str
    passed: bool | None
    detail: str = ""


@dataclass(slots=True, frozen=True)
class Promoted:
    """A version became the champion."""

    version: str


@dataclass(slots=True, frozen=True)
class Rejected:
    """A version was refused, aborted or rolled back."""

    version: str
    reason: str = ""


Event: TypeAlias = (
    Tick | Observed | Raised | Cleared | Asked | Delivered | Undelivered | Retried | Registered | Gated | Promoted
    | Rejected
)  # fmt: skip


# --- decisions -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Fire:
    """Ask for a training. ``trigger_id`` is also the idempotency key. Times: of the first reason, and now."""

    trigger_id: str
    reasons: tuple[Reason, ...]
    champion: Champion | None
    rules: str
    start_ns: int
    end_ns: int


@dataclass(slots=True, frozen=True)
class Suppressed:
    """There was a reason, and ``cause`` not to act on it."""

    kind: Kind
    cause: Cause
    names: tuple[str, ...]


@dataclass(slots=True, frozen=True)
class JobChanged:
    """A job is in another state than before, or has another version or detail. ``was``: its state before."""

    job: Job
    was: str


Decision: TypeAlias = Fire | Suppressed | JobChanged


def step(
    rules: RetrainRules, state: TriggerState, event: Event, now_ns: int
) -> tuple[TriggerState, tuple[Decision, ...]]:
    """What is remembered after ``event``, and what is to be done, in this order."""
    turn = _Turn(rules, state.not_after(now_ns), now_ns)
    turn.take(event)
    turn.settle()
    return turn.state, tuple(turn.decisions)


def open_job(state: TriggerState) -> Job | None:
    """The job that something is still expected of; the newest when there are several."""
    return next((job for job in reversed(state.jobs) if job.open), None)


class _Turn:
    """One step. ``state`` is replaced as the step goes on."""

    def __init__(self, rules: RetrainRules, state: TriggerState, now_ns: int) -> None:
        self.rules = rules
        self.state = state
        self.now = now_ns
        self.decisions: list[Decision] = []

    # -- what happened --------------------------------------------------------------------------------------------

    def take(self, event: Event) -> None:
        now = self.now
        match event:
            case Tick():
                pass
            case Observed(champion, rollout):
                self._observe(champion, rollout)
            case Raised():
                self._raise(event)
            case Cleared(kind, name, version):
                self._clear((kind, name, version))
            case Asked(actor, text):
                self._ask(actor, text)
            case Delivered(trigger_id, sink):
                self._move(lambda job: job.trigger_id == trigger_id, lambda job: jobs.accepted(job, sink, now))
            case Undelivered(trigger_id, reason):
                self._move(lambda job: job.trigger_id == trigger_id, lambda job: jobs.undelivered(job, reason, now))
            case Retried(trigger_id) if open_job(self.state) is None:
                self._move(lambda job: job.trigger_id == trigger_id, lambda job: jobs.retried(job, now))
            case Registered(trigger_id, version):
                self._move(lambda job: job.trigger_id == trigger_id, lambda job: jobs.registered(job, version, now))
            case Gated(version, passed, detail):
                self._move(lambda job: job.version == version, lambda job: jobs.gated(job, passed, detail, now))
            case Promoted(version):
                self._move(lambda job: job.version == version, lambda job: jobs.promoted(job, now))
            case Rejected(version, reason):
                self._move(lambda job: job.version == version, lambda job: jobs.rejected(job, reason, now))

    def _observe(self, champion: Champion | None, rollout: bool) -> None:
        before = self.state.champion
        self.state = replace(self.state, champion=champion, rollout=rollout)
        if before is not None and (champion is None or (before.version, before.digest) != _identity(champion)):
            self._close_window()
            self.state = replace(self.state, aged_ns=0, scheduled=False)

    def _raise(self, event: Raised) -> None:
        identity = (event.kind, event.name, event.version)
        known = next((one for one in self.state.conditions if one.identity == identity), None)
        if known is not None:
            since_ns = self.now if self._over(known) else known.since_ns
            spent = "" if self._over(known) else known.spent
            self._put(replace(known, numbers=event.numbers, cleared_ns=None, since_ns=since_ns, spent=spent))
        elif self._make_room():
            made = Condition(event.kind, event.name, event.version, self.now, event.numbers)
            self.state = replace(self.state, conditions=(*self.state.conditions, made))
        else:
            self.state = replace(self.state, dropped=self.state.dropped + 1)

    def _make_room(self) -> bool:
        """A place for one more alarm, the oldest of another version's if need be."""
        if len(self.state.conditions) < MAX_CONDITIONS:
            return True
        version = self._version
        others = [one for one in self.state.conditions if one.version != version]
        if not others:
            return False
        oldest = min(others, key=lambda one: one.since_ns)
        left = tuple(one for one in self.state.conditions if one is not oldest)
        self.state = replace(self.state, conditions=left)
        return True

    def _clear(self, identity: tuple[str, str, str]) -> None:
        for one in self.state.conditions:
            if one.identity == identity and one.cleared_ns is None:
                self._put(replace(one, cleared_ns=self.now))

    def _ask(self, actor: str, text: str) -> None:
        cause = self._held_back()
        if cause in _HARD:
            self.decisions.append(Suppressed("manual", cause, (actor,)))
        else:
            self._fire([*self._reasons(), Reason("manual", actor, self.now, {"text": text})])

    # -- what follows from it, and from the time ------------------------------------------------------------------

    def settle(self) -> None:
        lost_after, rollout, now = self.rules.lost_after_ns, self.state.rollout, self.now
        self._move(lambda job: job.open, lambda job: jobs.overdue(job, rollout, lost_after, now))
        self._forget()
        self._look_at_schedule()
        reasons = self._reasons()
        cause = self._held_back()
        if cause is not None:
            self._hold_back(reasons, cause)
        elif reasons:
            self._collect(reasons)

    def _forget(self) -> None:
        """Conditions that have ended, events and reports that matter no more."""
        rules, now, state = self.rules, self.now, self.state
        kept = tuple(one for one in state.conditions if one.waiting or not self._over(one))
        fired = tuple(at for at in state.fired_ns if now - at < max(DAY_NS, rules.cooldown_ns))
        reports = tuple(one for one in state.reports if now - one.at_ns < self._report_ns)
        self.state = replace(state, conditions=kept, fired_ns=fired, reports=reports)

    def _over(self, one: Condition) -> bool:
        return one.cleared_ns is not None and self.now - one.cleared_ns >= self.rules.clear_after_ns

    def _look_at_schedule(self) -> None:
        schedule = self.rules.schedule
        slot = None if schedule is None else schedule.slot(self.now)
        before = self.state.slot
        due = slot is not None and before is not None and slot > before
        self.state = replace(self.state, slot=slot, scheduled=slot is not None and (self.state.scheduled or due))

    def _hold_back(self, reasons: list[Reason], cause: Cause) -> None:
        self._close_window()
        self.state = replace(self.state, scheduled=False)
        for kind in dict.fromkeys(reason.kind for reason in reasons):
            if not any((one.kind, one.cause) == (kind, cause) for one in self.state.reports):
                names = tuple(reason.name for reason in reasons if reason.kind == kind)
                self.decisions.append(Suppressed(kind, cause, names))
                self.state = replace(self.state, reports=(*self.state.reports, Report(kind, cause, self.now)))

    def _collect(self, reasons: list[Reason]) -> None:
        opened = self.now if self.state.opened_ns is None else self.state.opened_ns
        if self.now - opened >= self.rules.coalesce_ns:
            self._fire(reasons)
            return
        told = {(reason.kind, reason.name, self._version) for reason in reasons}
        marked = tuple(
            replace(one, waiting=True) if one.identity in told and not one.waiting else one
            for one in self.state.conditions
        )
        self.state = replace(self.state, conditions=marked, opened_ns=opened)

    def _close_window(self) -> None:
        if self.state.opened_ns is not None:
            calm = tuple(replace(one, waiting=False) if one.waiting else one for one in self.state.conditions)
            self.state = replace(self.state, opened_ns=None, conditions=calm)

    # -- reasons --------------------------------------------------------------------------------------------------

    def _reasons(self) -> list[Reason]:
        found = [reason for kind in SIGNALS for reason in self._alarms(kind)]
        return [*found, *self._ages(), *self._moments()]

    def _alarms(self, kind: Kind) -> list[Reason]:
        rule = self.rules.signal(kind)
        if rule is None:
            return []
        of_kind = [
            one
            for one in self.state.conditions
            if one.kind == kind and one.version == self._version and (not rule.names or one.name in rule.names)
        ]
        lasting = [one for one in of_kind if one.waiting or self._lasts(one, rule.hold_ns)]
        fresh = [one for one in lasting if not one.spent]
        if len(lasting) < rule.at_least:
            fresh = [one for one in fresh if one.waiting]
        return [Reason(kind, one.name, one.since_ns, one.numbers) for one in fresh]

    def _lasts(self, one: Condition, hold_ns: int) -> bool:
        return one.cleared_ns is None and self.now - one.since_ns >= hold_ns

    def _ages(self) -> list[Reason]:
        champion, rules = self.state.champion, self.rules
        if champion is None:
            return []
        ages = (("model", champion.created_ns, rules.age_ns), ("data", champion.data_until_ns, rules.data_age_ns))
        return [
            Reason(
                "age", name, start + limit, {"age_s": (self.now - start) // SECOND_NS, "limit_s": limit // SECOND_NS}
            )
            for name, start, limit in ages
            if limit is not None and start and self.now - max(start, self.state.aged_ns) >= limit
        ]

    def _moments(self) -> list[Reason]:
        schedule, slot = self.rules.schedule, self.state.slot
        if schedule is None or slot is None or not self.state.scheduled:
            return []
        since_ns = slot * schedule.every_ns + schedule.offset_ns
        return [Reason("schedule", "time", since_ns, {"every_s": schedule.every_ns // SECOND_NS})]

    def _held_back(self) -> Cause | None:
        """Why no retraining may be asked for; None when one may."""
        state, rules = self.state, self.rules
        if state.rollout:
            return "rollout"
        if open_job(state) is not None:
            return "job"
        if state.champion is None:
            return "no champion"
        if state.fired_ns and self.now - state.fired_ns[-1] < rules.cooldown_ns:
            return "cooldown"
        if sum(self.now - at < DAY_NS for at in state.fired_ns) >= rules.budget:
            return "budget"
        return None

    # -- acting ---------------------------------------------------------------------------------------------------

    def _fire(self, reasons: list[Reason]) -> None:
        state, rules, now = self.state, self.rules, self.now
        window_s = max(rules.cooldown_ns // SECOND_NS, 1)
        bucket_s = max(now // SECOND_NS // window_s * window_s, state.bucket_s + 1)
        digest = rules.digest()
        trigger_id = _key(rules.model, state.champion, digest, bucket_s)
        told = {(reason.kind, reason.name, self._version) for reason in reasons}
        spent = tuple(
            replace(one, waiting=False, spent=trigger_id) if one.identity in told else one for one in state.conditions
        )
        kinds = tuple(dict.fromkeys(reason.kind for reason in reasons))
        job = Job(trigger_id, self._version, kinds, now, "requested", now)
        self.state = replace(
            state,
            conditions=spent,
            opened_ns=None,
            fired_ns=(*state.fired_ns, now)[-MAX_BUDGET:],
            bucket_s=bucket_s,
            scheduled=False,
            aged_ns=now if "age" in kinds else state.aged_ns,
            jobs=_bounded((*state.jobs, job)),
        )
        start_ns = min(reason.since_ns for reason in reasons)
        self.decisions.append(Fire(trigger_id, tuple(reasons), state.champion, digest, start_ns, now))
        self.decisions.append(JobChanged(job, ""))

    def _move(self, which: Callable[[Job], bool], move: Callable[[Job], Job]) -> None:
        moved = tuple(move(job) if which(job) else job for job in self.state.jobs)
        changes = [JobChanged(now, was.state) for was, now in zip(self.state.jobs, moved, strict=True) if now != was]
        self.state = replace(self.state, jobs=moved)
        self.decisions += changes
        for change in changes:
            if change.job.state == "lost":
                self._give_back(change.job)

    def _give_back(self, job: Job) -> None:
        """Nobody acted on the reasons of a lost job: they are reasons again."""
        again = tuple(replace(one, spent="") if one.spent == job.trigger_id else one for one in self.state.conditions)
        aged_ns = 0 if "age" in job.kinds else self.state.aged_ns
        self.state = replace(self.state, conditions=again, aged_ns=aged_ns)

    def _put(self, condition: Condition) -> None:
        changed = tuple(condition if one.identity == condition.identity else one for one in self.state.conditions)
        self.state = replace(self.state, conditions=changed)

    @property
    def _version(self) -> str:
        return "" if self.state.champion is None else self.state.champion.version

    @property
    def _report_ns(self) -> int:
        return max(self.rules.cooldown_ns, _LEAST_REPORT_NS)


def _identity(champion: Champion) -> tuple[str, str]:
    return champion.version, champion.digest


def _key(model: str, champion: Champion | None, rules: str, bucket_s: int) -> str:
    """32 hexadecimal digits; the texts are joined by what none of them holds."""
    parts = (model, "" if champion is None else champion.digest or champion.version, rules, str(bucket_s))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _bounded(found: tuple[Job, ...]) -> tuple[Job, ...]:
    """The jobs without the oldest that ended, when there are too many."""
    if len(found) <= MAX_JOBS:
        return found
    oldest = next((job for job in found if not job.open), found[0])
    return tuple(job for job in found if job is not oldest)
