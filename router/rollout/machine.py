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

Time comes with every event, in nanoseconds of any clock; only differences count, and of a difference at most
``LONGEST_NS``: what nobody watched is no time in which anything was shown. ``to_dict`` holds everything, so a process
that is killed goes on where it was. Not thread-safe; one owner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from router.errors import BadRollout, BadRolloutState, RolloutRefused
from router.rollout import plan
from router.rollout.events import (
    Accepted,
    Action,
    AliasMoved,
    AliasRefused,
    CandidateFailed,
    ConsentWanted,
    Event,
    KeepWarm,
    Load,
    Loaded,
    MoveAlias,
    Order,
    Ordered,
    Overridden,
    Publish,
    Published,
    Record,
    Recovered,
    Release,
    Shadow,
    SpecRemoved,
    State,
    Tick,
)
from router.rollout.gates import GateBook, Verdict
from router.rollout.spec import NS_PER_S, RateGate, Reaction, RolloutSpec, StepSpec, spec_from_dict
from router.types import FULL_SHARE

#: The longest time that one event may claim to have passed since the one before.
LONGEST_NS: Final = 60 * NS_PER_S
#: Who acts when no person does.
AUTOMATIC: Final = "automatic"
_VERSION: Final = 1

_ENDED: Final = frozenset({State.ROLLED_BACK, State.ABORTED, State.FAILED})
#: States in which a gate that holds can hold.
_HOLDABLE: Final = frozenset({State.SHADOWING, State.STEP, State.AWAITING})
#: States in which requests or copies reach the candidate.
_RUNNING: Final = frozenset(
    {State.SHADOWING, State.STEP, State.AWAITING, State.HOLD, State.PROMOTING, State.PROMOTED},
)
_SHADOW_STEP: Final = -1


# --- the machine ------------------------------------------------------------------------------------------------------


class Rollout:
    """One rollout of one model. ``handle`` raises RolloutRefused for what is not possible or not allowed now, and
    ValueError for evidence that no gate takes; the state is then as it was."""

    __slots__ = (
        "_actions", "_approvals", "_asked", "_gates", "_ground", "_held_by", "_in_force", "_last_ns", "_owed",
        "_promoters", "_resume",
        "_served_ns", "_state_ns", "_step_ns", "outcome", "paused", "reason", "serial", "spec", "starter", "state",
        "step", "weight",
    )  # fmt: skip

    def __init__(self, spec: RolloutSpec, starter: str) -> None:
        """A rollout that ``starter`` asked for. Raises BadRollout when the specification makes no sense."""
        plan.check(spec)
        self.spec = spec
        self.starter = starter
        self.state = State.PENDING
        #: Which step, -1 before the first; ``weight`` is the candidate's share in the table asked for last.
        self.step = _SHADOW_STEP
        self.weight = 0
        self.paused = False
        #: Why it is where it is, and where a rollback will end.
        self.reason = ""
        self.outcome = State.ROLLED_BACK
        self.serial = 0
        #: People are asked whether to begin at all.
        self._asked = False
        self._resume: State | None = None
        self._held_by: tuple[str, ...] = ()
        self._approvals: tuple[str, ...] = ()
        self._promoters: tuple[str, ...] = ()
        #: What is stable in the tables of this rollout; "" when someone else decides.
        self._ground = spec.stable
        #: Of a rollback: its table is published; the champion alias has still to be moved back.
        self._in_force = False
        self._owed = False
        #: When the last tick was; None before the first event.
        self._last_ns: int | None = None
        self._state_ns = 0
        self._step_ns = 0
        self._served_ns = 0
        self._gates = GateBook(spec)
        self._actions: list[Action] = []

    # -- asked --------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Nothing will happen any more: terminal, or promoted and no longer kept warm."""
        return self.state in _ENDED or (self.state is State.PROMOTED and self._state_ns >= self.spec.keep_warm_ns)

    @property
    def failed(self) -> bool:
        """Whether the candidate's digest is not to be tried again before it is cleared or cooled down."""
        return self.state in {State.ROLLED_BACK, State.FAILED}

    @property
    def approvals(self) -> tuple[str, ...]:
        """Who has approved what is waiting for approval."""
        return self._approvals

    @property
    def state_ns(self) -> int:
        """Watched time in this state."""
        return self._state_ns

    @property
    def step_ns(self) -> int:
        """Watched time in this step, pauses left out."""
        return self._step_ns

    def verdicts(self) -> tuple[Verdict, ...]:
        """What every gate says now."""
        return self._gates.verdicts()

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

    # -- transitions --------------------------------------------------------------------------------------------

    def _go(self, state: State, actor: str, reason: str, weight: int = 0, *, back: bool = False) -> None:
        """Enter a state. A table goes out where its weight differs; ``back``: before the record."""
        record_at = len(self._actions)
        origin, self.state, self.reason = self.state, state, reason
        self._state_ns = 0
        self._approvals = self._promoters = ()
        if weight != self.weight or back:
            self._publish(weight)
        record = Record(origin, state, self.step, self.weight, actor, reason, self._gates.verdicts())
        self._actions.insert(len(self._actions) if back else record_at, record)

    def _publish(self, weight: int, stable: str | None = None) -> None:
        self.serial += 1
        self.weight = weight
        self._actions.append(Publish(self.serial, self._ground if stable is None else stable, weight))

    def _note(self, actor: str, reason: str) -> None:
        """Record something that changes no state."""
        step, weight = self.step, self.weight
        self._actions.append(Record(self.state, self.state, step, weight, actor, reason, self._gates.verdicts()))

    def _load(self, actor: str, reason: str) -> None:
        self._go(State.LOADING, actor, reason)
        self._actions.append(Load())

    def _loaded(self) -> None:
        resumed, self._resume = self._resume, None
        if resumed is not None:
            self._resumed(resumed)
        elif self.spec.shadow is not None:
            self._begin_shadow()
        else:
            self._begin_step(0, AUTOMATIC, "loaded")

    def _begin_shadow(self) -> None:
        paired = [(name, gate.max_rate) for name, gate in self.spec.gates if isinstance(gate, RateGate) and gate.paired]
        self._gates.enter(paired)
        self._step_ns = 0
        self._go(State.SHADOWING, AUTOMATIC, "loaded")
        self._actions.append(Shadow(True))

    def _begin_step(self, number: int, actor: str, reason: str) -> None:
        """Enter a step, or promote after the last."""
        steps = self.spec.serving_steps
        if number == len(steps):
            self._promote(actor, reason)
            return
        shadowed = self.step == _SHADOW_STEP and self.spec.shadow is not None
        self.step = number
        self._step_ns = 0
        self._gates.enter(steps[number].certify)
        self._go(State.STEP, actor, reason, steps[number].weight)
        if shadowed:
            self._actions.append(Shadow(False))

    def _promote(self, actor: str, reason: str) -> None:
        self._go(State.PROMOTING, actor, reason, FULL_SHARE)
        self._actions += [KeepWarm(self.spec.stable), MoveAlias(self.spec.stable, self.spec.candidate)]

    def _alias_moved(self, to: str) -> None:
        if to != self.spec.candidate:
            self._alias_settled()
        elif self.state is State.PROMOTING:
            self._go(State.PROMOTED, AUTOMATIC, "the champion is the candidate", self.weight)
            self._publish(0, self.spec.candidate)
        elif self.state in {State.ROLLING_BACK, *_ENDED} and self._ground:
            # A promotion that was overtaken by its rollback: what it has done is taken back.
            self._owed = self.state is State.ROLLING_BACK
            self._actions.append(MoveAlias(self.spec.candidate, self.spec.stable))

    def _alias_refused(self, reason: str) -> None:
        if self.state is State.PROMOTING:
            self._give_way(AUTOMATIC, f"the champion was moved by someone else: {reason}")
        elif not self.ended:
            self._note(AUTOMATIC, f"the champion was left alone: {reason}")
            self._alias_settled()

    def _alias_settled(self) -> None:
        if self.state is State.ROLLING_BACK:
            self._owed = False
            self._settle()

    def _settle(self) -> None:
        """The rollback has ended when nothing of it is open."""
        if self._in_force and not self._owed:
            self._finish(self.outcome, AUTOMATIC, self.reason)

    def _go_back_on(self) -> None:
        """Ask again for what a rollback has not heard the end of."""
        if not self._in_force:
            self._actions.append(Publish(self.serial, self._ground, 0))
        if self._owed:
            self._actions.append(MoveAlias(self.spec.candidate, self.spec.stable))

    def _give_way(self, actor: str, reason: str) -> None:
        """Someone else decides what is stable: the candidate gets nothing from this rollout any more."""
        if self.state is State.PROMOTED:
            self._close(actor, reason)
            return
        if self.state is not State.ROLLING_BACK:
            self.outcome = State.ABORTED
            self._stop_shadow()
            self._go(State.ROLLING_BACK, actor, reason, self.weight)
        self._resume = None
        self._in_force = self._owed = False
        self._ground = ""
        self._publish(0)

    def _close(self, actor: str, reason: str) -> None:
        """Promoted, and that is that."""
        self._state_ns = max(self._state_ns, self.spec.keep_warm_ns)
        self._note(actor, f"closed: {reason}")
        self._actions.append(Release(self.spec.stable))

    def _roll_back(self, actor: str, reason: str, outcome: State = State.ROLLED_BACK) -> None:
        self._owed = bool({self.state, self._resume} & {State.PROMOTING, State.PROMOTED})
        self._in_force = False
        self._resume = None
        self.outcome = outcome
        self._stop_shadow()
        self._go(State.ROLLING_BACK, actor, reason, back=True)
        if self._owed:
            self._actions.append(MoveAlias(self.spec.candidate, self.spec.stable))

    def _remove(self, actor: str) -> None:
        reason = "removed from the configuration"
        if self.state is State.PROMOTED:
            self._close(actor, reason)
        elif self.state is not State.ROLLING_BACK:
            self._abort(actor, reason)

    def _abort(self, actor: str, reason: str) -> None:
        if self.state in {State.PENDING, State.LOADING} and self._resume is None:
            self._finish(State.ABORTED, actor, reason)
        else:
            self._roll_back(actor, reason, State.ABORTED)

    def _fail(self, reason: str) -> None:
        """Stable was never touched, unless the candidate had traffic before a restart."""
        if self._resume is None:
            self._finish(State.FAILED, AUTOMATIC, reason)
        else:
            self._roll_back(AUTOMATIC, reason)

    def _finish(self, state: State, actor: str, reason: str) -> None:
        self._go(state, actor, reason)
        self._actions.append(Release(self.spec.candidate))

    def _stop_shadow(self) -> None:
        if self.spec.shadow is not None and self.step == _SHADOW_STEP:
            self._actions.append(Shadow(False))

    # -- restarts -----------------------------------------------------------------------------------------------

    def _recover(self, crashed: bool) -> None:
        """The tables, engines and copies of before are gone; ask for what the state needs."""
        reached = self.state in _RUNNING and (self.weight > 0 or self.state in {State.SHADOWING, State.PROMOTED})
        if self.state is State.ROLLING_BACK:
            self._in_force = False
            self._go_back_on()
        elif crashed and self.spec.on_crash == "rollback" and (reached or self._resume is not None):
            self._roll_back(AUTOMATIC, "the process died while the candidate was serving")
        elif self.state is State.LOADING:
            self._actions.append(Load())
        elif self.state is State.PROMOTED:
            self._note(AUTOMATIC, "restarted")
            self._publish(0, self.spec.candidate)
            self._actions.append(KeepWarm(self.spec.stable))
        elif self.state in _RUNNING:
            self._reload()

    def _reload(self) -> None:
        resume, reason, approvals = self.state, self.reason, self._approvals
        self._go(State.LOADING, AUTOMATIC, f"restarted in {resume.value}")
        self._resume, self.reason, self._approvals = resume, reason, approvals
        self._actions.append(Load())

    def _resumed(self, state: State) -> None:
        """Loaded again after a restart: back to where it was, with all evidence. Caches are cold again."""
        self._served_ns = 0
        if state is State.PROMOTING:
            self._promote(AUTOMATIC, "resumed")
            return
        reason, approvals = self.reason, self._approvals
        self._go(state, AUTOMATIC, f"resumed: {reason}", self._weight_in(state))
        self.reason, self._approvals = reason, approvals
        if self.step == _SHADOW_STEP:
            self._actions.append(Shadow(True))

    def _weight_in(self, state: State) -> int:
        held = state is State.HOLD and self.spec.hold_weight == "zero"
        return 0 if self.step == _SHADOW_STEP or held else self._this_step.weight

    @property
    def _this_step(self) -> StepSpec:
        return self.spec.serving_steps[self.step]

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

    def _hold(self, reason: str, held_by: tuple[str, ...]) -> None:
        self._held_by = held_by
        weight = self._weight_in(State.HOLD)
        self._go(State.HOLD, AUTOMATIC, reason, weight, back=weight < self.weight)

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
        enough = (
            self.step != _SHADOW_STEP or self.spec.shadow is None or self._gates.pairs >= self.spec.shadow.min_pairs
        )
        return enough and all(verdict.certified for verdict in verdicts if verdict.margin is not None)

    @property
    def _long_enough(self) -> bool:
        return self._step_ns >= self._least_ns

    def _advance(self) -> None:
        if self.state is State.STEP and self._this_step.approve:
            self._go(State.AWAITING, AUTOMATIC, "waits for approval", self.weight)
        else:
            self._begin_step(self.step + 1, AUTOMATIC, "certified")

    def _held(self, tick: Tick, verdicts: tuple[Verdict, ...]) -> None:
        if self._held_by:
            calm = all(verdict.calm for verdict in verdicts if verdict.gate in self._held_by)
        else:
            calm = self._shown(verdicts) and self._long_enough and tick.attempts > 0
        if calm:
            self._unhold(AUTOMATIC, "evidence has returned")
        elif self._state_ns >= self.spec.inconclusive_after_ns and self.spec.inconclusive_then == "rollback":
            self._roll_back(AUTOMATIC, f"inconclusive: {self.reason}")

    def _unhold(self, actor: str, reason: str) -> None:
        self._held_by = ()
        self._step_ns = min(self._step_ns, self._least_ns)
        state = State.SHADOWING if self.step == _SHADOW_STEP else State.STEP
        self._go(state, actor, reason, self._weight_in(state))

    @property
    def _least_ns(self) -> int:
        if self.step != _SHADOW_STEP:
            return self._this_step.min_ns
        return self.spec.shadow.min_ns if self.spec.shadow is not None else 0

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
        if self.state not in {State.STEP, State.AWAITING, State.HOLD} or self.step == _SHADOW_STEP:
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
        if not _SHADOW_STEP <= rollout.step < len(rollout.spec.serving_steps):
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
