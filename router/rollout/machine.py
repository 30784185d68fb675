"""One rollout: a pure state machine. It is told what happened and when, and answers with what is to be done.

    PENDING -> LOADING -> (SHADOWING ->) STEP 0 -> STEP 1 -> ... -> PROMOTING -> PROMOTED
                                           |^        |^
                                  AWAITING/HOLD ...  every state -> ROLLING_BACK -> ROLLED_BACK | ABORTED | FAILED

* The candidate gets traffic in STEP, AWAITING and (by policy) HOLD, all of it in PROMOTING, copies in SHADOWING.
* A step ends when its certificates are earned, its least time has passed, and this very look brought traffic. Then the
  next begins, or, where a person is to approve, the rollout is AWAITING. Nothing else advances: not silence, not time.
* Gates are evaluated in every state that is not terminal, paused and awaiting approval included. One that rolls back
  does so at once. One that holds leads to HOLD, which ends when its evidence no longer speaks against the candidate,
  when a person resumes, or by the policy for what stays inconclusive.
* PENDING waits for admission and quality gates, and for people where a gate had no data to decide by.
* A pause is a flag: nothing advances and no clock of indecision runs, while gates go on.
* PROMOTING publishes everything to the candidate, then moves the champion alias. The alias is moved by compare and set
  outside; when someone else has moved it, the rollout ends and leaves the field to them.
* PROMOTED is open for ``keep_warm``: gates and people may still roll back, without loading anything. Then it is closed.
* ROLLING_BACK repeats with every tick what it has not heard the end of: its table, and the way back of a champion
  alias that had been moved, so that no restart brings the candidate back. It needs nothing else.
* Growth is recorded before it is published, going back is published before it is recorded: the order of the actions
  is the order in which they are to be carried out.

Here is decided which transition is due, by events, evidence, time and people's orders. What each of them does and asks
for is in ``router.rollout.transitions``.

Time comes with every event, in nanoseconds of any clock; only differences count, and of a difference at most
``LONGEST_NS``: what nobody watched is no time in which anything was shown. ``to_dict`` holds everything, so a process
that is killed goes on where it was. Not thread-safe; one owner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from router.errors import BadRollout, BadRolloutState, RolloutRefused
from router.rollout.events import (
    AUTOMATIC,
    Accepted,
    Action,
    AliasMoved,
    AliasRefused,
    CandidateFailed,
    ConsentWanted,
    Event,
    Loaded,
    Order,
    Ordered,
    Overridden,
    Published,
    Recovered,
    SpecRemoved,
    State,
    Tick,
)
from router.rollout.gates import Verdict
from router.rollout.spec import NS_PER_S, Reaction, RolloutSpec, spec_from_dict
from router.rollout.transitions import SHADOW_STEP, Transitions

#: The longest time that one event may claim to have passed since the one before.
LONGEST_NS: Final = 60 * NS_PER_S
_VERSION: Final = 1

#: States in which a gate that holds can hold.
_HOLDABLE: Final = frozenset({State.SHADOWING, State.STEP, State.AWAITING})


class Rollout(Transitions):
    """One rollout of one model. ``handle`` raises RolloutRefused for what is not possible or not allowed now, and
    ValueError for evidence that no gate takes; the state is then as it was."""

    __slots__ = ()

    # -- told ---------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now_ns: int) -> tuple[Action, ...]:
        """Take an event in; what is to be done now, in this order."""
        if self._last_ns is None or isinstance(event, Recovered):
            self._last_ns = now_ns
        self._actions = []
        if not isinstance(event, Tick):
            self._told(event)
        elif not self.ended:
            self._tick(event, min(max(now_ns - self._last_ns, 0), LONGEST_NS))
            self._last_ns = now_ns
        return tuple(self._actions)

    def check_unchanged(self, spec: RolloutSpec) -> None:
        """RolloutRefused when the configuration has changed this rollout under its id while it runs."""
        if spec.fingerprint() == self.spec.fingerprint() or self.ended:
            return
        ours, theirs = self.spec.to_dict(), spec.to_dict()
        changed = ", ".join(name for name in ours if ours[name] != theirs[name])
        raise RolloutRefused(self.spec.id, f"{changed} cannot change while it runs; give the new rollout a new id")

    def _told(self, event: Event) -> None:
        match event:
            case Accepted() if self.state is State.PENDING:
                self._load(AUTOMATIC, "accepted")
            case ConsentWanted(reason) if self.state is State.PENDING:
                self._asked, self.reason = True, reason
                self._note(AUTOMATIC, f"waits for approval: {reason}")
            case Loaded() if self.state is State.LOADING:
                self._loaded()
            case CandidateFailed(reason) if self.state in {State.PENDING, State.LOADING}:
                self._fail(reason)
            case Published(serial) if self.state is State.ROLLING_BACK and serial == self.serial:
                self._in_force = True
                self._settle()
            case AliasMoved(to):
                self._alias_moved(to)
            case AliasRefused(reason):
                self._alias_refused(reason)
            case Overridden(actor, reason) if not self.ended:
                self._give_way(actor, reason)
            case SpecRemoved(actor) if not self.ended:
                self._remove(actor)
            case Recovered(crashed) if not self.ended:
                self._recover(crashed)
            case Ordered():
                self._ordered(event)

    # -- time and evidence --------------------------------------------------------------------------------------

    def _tick(self, tick: Tick, elapsed: int) -> None:
        self._gates.take(tick.evidence, elapsed, warming=self._served_ns < self.spec.ignore_first_ns)
        self._pass_time(tick, elapsed)
        if self.state is State.ROLLING_BACK:
            self._go_back_on()
            return
        verdicts = self._gates.verdicts()
        if not self._breached(verdicts):
            self._timed(tick, verdicts)

    def _pass_time(self, tick: Tick, elapsed: int) -> None:
        self._state_ns += elapsed
        if self.weight and tick.attempts:
            self._served_ns += elapsed
        if not self.paused and self.state in {State.SHADOWING, State.STEP}:
            self._step_ns += elapsed

    def _breached(self, verdicts: tuple[Verdict, ...]) -> bool:
        worse = [verdict for verdict in verdicts if verdict.worse]
        backward = [verdict.gate for verdict in worse if verdict.reaction is Reaction.ROLLBACK]
        holding = tuple(verdict.gate for verdict in worse if verdict.reaction is Reaction.HOLD)
        if backward:
            self._roll_back(AUTOMATIC, f"worse by {', '.join(backward)}")
            return True
        if holding and self.state in _HOLDABLE:
            self._hold(f"held by {', '.join(holding)}", holding)
            return True
        if holding and self.state is State.HOLD:
            self._held_by = tuple(dict.fromkeys((*self._held_by, *holding)))
        return False

    def _timed(self, tick: Tick, verdicts: tuple[Verdict, ...]) -> None:
        late = self._state_ns >= self.spec.load_timeout_ns
        match self.state:
            case State.LOADING if late:
                self._fail("loading did not end in time")
            case State.PROMOTING if late:
                self._roll_back(AUTOMATIC, "the promotion did not end in time")
            case State.PROMOTED if self.ended:
                self._close(AUTOMATIC, "the version before is no longer kept warm")
            case State.SHADOWING | State.STEP if not self.paused:
                self._proceed(tick, verdicts)
            case State.HOLD if not self.paused:
                self._held(tick, verdicts)

    def _proceed(self, tick: Tick, verdicts: tuple[Verdict, ...]) -> None:
        if self._shown(verdicts) and self._long_enough and (tick.attempts or self.state is State.SHADOWING):
            self._advance()
        elif self._step_ns >= self.spec.inconclusive_after_ns:
            reason = f"inconclusive: {_missing(verdicts)}"
            if self.spec.inconclusive_then == "rollback":
                self._roll_back(AUTOMATIC, reason)
            else:
                self._hold(reason, ())

    def _shown(self, verdicts: tuple[Verdict, ...]) -> bool:
        """Whether everything that this step asks for is certified."""
        enough = self.step != SHADOW_STEP or self.spec.shadow is None or self._gates.pairs >= self.spec.shadow.min_pairs
        return enough and all(verdict.certified for verdict in verdicts if verdict.margin is not None)

    @property
    def _long_enough(self) -> bool:
        return self._step_ns >= self._least_ns

    def _held(self, tick: Tick, verdicts: tuple[Verdict, ...]) -> None:
        if self._held_by:
            calm = all(verdict.calm for verdict in verdicts if verdict.gate in self._held_by)
        else:
            calm = self._shown(verdicts) and self._long_enough and tick.attempts > 0
        if calm:
            self._unhold(AUTOMATIC, "evidence has returned")
        elif self._state_ns >= self.spec.inconclusive_after_ns and self.spec.inconclusive_then == "rollback":
            self._roll_back(AUTOMATIC, f"inconclusive: {self.reason}")

    # -- people -------------------------------------------------------------------------------------------------

    def _ordered(self, event: Ordered) -> None:
        if not event.actor or event.actor == AUTOMATIC:
            raise self._refusal(f"{event.order.value} wants the name of a person, got {event.actor!r}")
        if self.ended:
            hint = "; the version before is no longer kept warm" if self.state is State.PROMOTED else ""
            raise self._refusal(f"cannot {event.order.value}: it has ended ({self.state.value}){hint}")
        if self.state is State.ROLLING_BACK:
            raise self._refusal(f"cannot {event.order.value}: it is being rolled back already")
        match event.order:
            case Order.PAUSE:
                self._pause(event)
            case Order.RESUME:
                self._go_on(event)
            case Order.ABORT if self.state is State.PROMOTED:
                raise self._refusal("cannot abort: it is promoted; roll it back")
            case Order.ABORT:
                self._abort(event.actor, _said("aborted", event))
            case Order.ROLLBACK:
                self._roll_back(event.actor, _said("rolled back", event))
            case Order.APPROVE:
                self._approve(event)
            case Order.PROMOTE:
                self._promote_now(event)

    def _refusal(self, reason: str) -> RolloutRefused:
        return RolloutRefused(self.spec.id, reason)

    def _pause(self, event: Ordered) -> None:
        if self.paused:
            raise self._refusal("cannot pause: it is paused already")
        if self.state in {State.PROMOTING, State.PROMOTED}:
            raise self._refusal(f"cannot pause: it is {self.state.value}; roll it back, or let it be")
        self.paused = True
        self._note(event.actor, _said("paused", event))

    def _go_on(self, event: Ordered) -> None:
        """End a pause and a hold. Who ends a hold has looked at the gates that hold: they begin anew."""
        if not self.paused and self.state is not State.HOLD:
            raise self._refusal(f"cannot resume: it is neither paused nor held, but {self.state.value}")
        self.paused = False
        if self.state is State.HOLD:
            acknowledged = self._held_by
            self._unhold(event.actor, _said("resumed", event))
            self._gates.acknowledge(acknowledged)
        else:
            self._note(event.actor, _said("resumed", event))

    def _approve(self, event: Ordered) -> None:
        if self.state is not State.AWAITING and not (self.state is State.PENDING and self._asked):
            raise self._refusal(f"cannot approve: nothing waits for approval, it is {self.state.value}")
        if self.paused:
            raise self._refusal("cannot approve: it is paused; resume it first")
        self._approvals = self._with_consent(self._approvals, event)
        approved = _said(f"approved by {', '.join(self._approvals)}", event)
        if len(self._approvals) < self.spec.approvals:
            self._note(event.actor, _said(f"approval {len(self._approvals)} of {self.spec.approvals}", event))
        elif self.state is State.PENDING:
            self._load(event.actor, approved)
        else:
            self._begin_step(self.step + 1, event.actor, approved)

    def _promote_now(self, event: Ordered) -> None:
        """Before its time, and over what the gates have not shown yet; never over what they have."""
        if self.state not in {State.STEP, State.AWAITING, State.HOLD} or self.step == SHADOW_STEP:
            raise self._refusal(f"cannot promote a candidate that serves no traffic: it is {self.state.value}")
        worse = [verdict.gate for verdict in self._gates.verdicts() if verdict.worse]
        if worse:
            raise self._refusal(f"cannot promote: {', '.join(worse)} says that the candidate is worse")
        self._promoters = self._with_consent(self._promoters, event)
        if len(self._promoters) >= self.spec.approvals:
            self.paused = False
            self._promote(event.actor, _said(f"promoted by {', '.join(self._promoters)}", event))
        else:
            self._note(event.actor, _said(f"promotion {len(self._promoters)} of {self.spec.approvals}", event))

    def _with_consent(self, given: tuple[str, ...], event: Ordered) -> tuple[str, ...]:
        if self.spec.two_person and event.actor == self.starter:
            raise self._refusal(f"cannot {event.order.value}: {event.actor} started it; another person must")
        if event.actor in given:
            raise self._refusal(f"cannot {event.order.value}: {event.actor} has done so; another person must")
        return (*given, event.actor)

    # -- stored -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values that JSON can hold."""
        return {
            "version": _VERSION,
            "spec": self.spec.to_dict(),
            "starter": self.starter,
            "state": self.state.value,
            "outcome": self.outcome.value,
            "resume": self._resume.value if self._resume else None,
            "gates": self._gates.to_dict(),
        } | {name: _plain(getattr(self, attribute)) for name, attribute in _STORED.items()}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Rollout:
        """The rollout that ``to_dict`` wrote down. Raises BadRolloutState when ``found`` is something else."""
        version = found.get("version")
        if version != _VERSION:
            raise BadRolloutState(f"wanted a rollout's state of version {_VERSION}, got {version!r}")
        try:
            rollout = cls(spec_from_dict(found["spec"]), str(found["starter"]))
            rollout.state, rollout.outcome = State(found["state"]), State(found["outcome"])
            rollout._resume = State(found["resume"]) if found["resume"] is not None else None
            for name, attribute in _STORED.items():
                setattr(rollout, attribute, _like(getattr(rollout, attribute), found[name]))
            rollout._gates.restore(found["gates"])
        except (AttributeError, BadRollout, KeyError, TypeError, ValueError) as failure:
            raise BadRolloutState(f"the stored rollout is damaged ({type(failure).__name__}: {failure})") from None
        if not SHADOW_STEP <= rollout.step < len(rollout.spec.serving_steps):
            raise BadRolloutState(f"the stored rollout is damaged: it has no step {rollout.step}")
        return rollout


_STORED: Final = {
    "step": "step", "weight": "weight", "paused": "paused", "asked": "_asked", "reason": "reason", "serial": "serial",
    "in_force": "_in_force", "owed": "_owed", "ground": "_ground", "held_by": "_held_by", "approvals": "_approvals",
    "promoters": "_promoters", "last_ns": "_last_ns", "state_ns": "_state_ns", "step_ns": "_step_ns",
    "served_ns": "_served_ns",
}  # fmt: skip


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _like(now: Any, found: Any) -> Any:
    """``found`` as the type of the value that is there now; ValueError when it is not of it."""
    if isinstance(now, tuple):
        return tuple(str(item) for item in found)
    if now is None:
        return None if found is None else int(found)
    if type(found) is not type(now):
        raise ValueError(f"wanted {type(now).__name__}, got {found!r}")
    return found


def _said(what: str, event: Ordered) -> str:
    return f"{what}: {event.reason}" if event.reason else what


def _missing(verdicts: tuple[Verdict, ...]) -> str:
    """What is not shown, for people."""
    open_ = [
        f"{item.gate} under {item.margin:g}" for item in verdicts if item.margin is not None and not item.certified
    ]
    return f"not shown: {', '.join(open_)}" if open_ else "no traffic"
