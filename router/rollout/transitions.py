"""Where a rollout is, and the ways from there: each transition enters a state and asks for what this takes.

Which of them is due is decided in ``router.rollout.machine``, where the states and their rules are told. Nothing asks
for an action or writes a record but what is here: the order of the two is looked after in one place.
"""

from __future__ import annotations

from typing import Final

from router.rollout import plan
from router.rollout.events import (
    AUTOMATIC,
    Action,
    KeepWarm,
    Load,
    MoveAlias,
    Publish,
    Record,
    Release,
    Shadow,
    State,
)
from router.rollout.gates import GateBook, Verdict
from router.rollout.spec import RateGate, RolloutSpec, StepSpec
from router.types import FULL_SHARE

#: The number of the step before the first, in which nothing but copies reaches the candidate.
SHADOW_STEP: Final = -1

_ENDED: Final = frozenset({State.ROLLED_BACK, State.ABORTED, State.FAILED})
#: States in which requests or copies reach the candidate.
_RUNNING: Final = frozenset(
    {State.SHADOWING, State.STEP, State.AWAITING, State.HOLD, State.PROMOTING, State.PROMOTED},
)


class Transitions:
    """The state of one rollout and the ways to change it. What a transition asks for is added to ``_actions``, in the
    order in which it is to be carried out; its caller has seen that it is due."""

    __slots__ = (
        "_actions", "_approvals", "_asked", "_gates", "_ground", "_held_by", "_in_force", "_last_ns", "_owed",
        "_promoters", "_resume", "_served_ns", "_state_ns", "_step_ns", "outcome", "paused", "reason", "serial", "spec",
        "starter", "state", "step", "weight",
    )  # fmt: skip

    def __init__(self, spec: RolloutSpec, starter: str) -> None:
        """A rollout that ``starter`` asked for. Raises BadRollout when the specification makes no sense."""
        plan.check(spec)
        self.spec = spec
        self.starter = starter
        self.state = State.PENDING
        #: Which step, -1 before the first; ``weight`` is the candidate's share in the table asked for last.
        self.step = SHADOW_STEP
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

    # -- any transition -----------------------------------------------------------------------------------------

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

    # -- forward ------------------------------------------------------------------------------------------------

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
        shadowed = self.step == SHADOW_STEP and self.spec.shadow is not None
        self.step = number
        self._step_ns = 0
        self._gates.enter(steps[number].certify)
        self._go(State.STEP, actor, reason, steps[number].weight)
        if shadowed:
            self._actions.append(Shadow(False))

    def _advance(self) -> None:
        if self.state is State.STEP and self._this_step.approve:
            self._go(State.AWAITING, AUTOMATIC, "waits for approval", self.weight)
        else:
            self._begin_step(self.step + 1, AUTOMATIC, "certified")

    def _promote(self, actor: str, reason: str) -> None:
        self._go(State.PROMOTING, actor, reason, FULL_SHARE)
        self._actions += [KeepWarm(self.spec.stable), MoveAlias(self.spec.stable, self.spec.candidate)]

    def _close(self, actor: str, reason: str) -> None:
        """Promoted, and that is that."""
        self._state_ns = max(self._state_ns, self.spec.keep_warm_ns)
        self._note(actor, f"closed: {reason}")
        self._actions.append(Release(self.spec.stable))

    # -- hold ---------------------------------------------------------------------------------------------------

    def _hold(self, reason: str, held_by: tuple[str, ...]) -> None:
        self._held_by = held_by
        weight = self._weight_in(State.HOLD)
        self._go(State.HOLD, AUTOMATIC, reason, weight, back=weight < self.weight)

    def _unhold(self, actor: str, reason: str) -> None:
        self._held_by = ()
        self._step_ns = min(self._step_ns, self._least_ns)
        state = State.SHADOWING if self.step == SHADOW_STEP else State.STEP
        self._go(state, actor, reason, self._weight_in(state))

    # -- back and out -------------------------------------------------------------------------------------------

    def _roll_back(self, actor: str, reason: str, outcome: State = State.ROLLED_BACK) -> None:
        self._owed = bool({self.state, self._resume} & {State.PROMOTING, State.PROMOTED})
        self._in_force = False
        self._resume = None
        self.outcome = outcome
        self._stop_shadow()
        self._go(State.ROLLING_BACK, actor, reason, back=True)
        if self._owed:
            self._actions.append(MoveAlias(self.spec.candidate, self.spec.stable))

    def _go_back_on(self) -> None:
        """Ask again for what a rollback has not heard the end of."""
        if not self._in_force:
            self._actions.append(Publish(self.serial, self._ground, 0))
        if self._owed:
            self._actions.append(MoveAlias(self.spec.candidate, self.spec.stable))

    def _settle(self) -> None:
        """The rollback has ended when nothing of it is open."""
        if self._in_force and not self._owed:
            self._finish(self.outcome, AUTOMATIC, self.reason)

    def _abort(self, actor: str, reason: str) -> None:
        if self.state in {State.PENDING, State.LOADING} and self._resume is None:
            self._finish(State.ABORTED, actor, reason)
        else:
            self._roll_back(actor, reason, State.ABORTED)

    def _remove(self, actor: str) -> None:
        reason = "removed from the configuration"
        if self.state is State.PROMOTED:
            self._close(actor, reason)
        elif self.state is not State.ROLLING_BACK:
            self._abort(actor, reason)

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
        if self.spec.shadow is not None and self.step == SHADOW_STEP:
            self._actions.append(Shadow(False))

    # -- the champion alias -------------------------------------------------------------------------------------

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
        if self.step == SHADOW_STEP:
            self._actions.append(Shadow(True))

    # -- the step it is in --------------------------------------------------------------------------------------

    def _weight_in(self, state: State) -> int:
        held = state is State.HOLD and self.spec.hold_weight == "zero"
        return 0 if self.step == SHADOW_STEP or held else self._this_step.weight

    @property
    def _this_step(self) -> StepSpec:
        return self.spec.serving_steps[self.step]

    @property
    def _least_ns(self) -> int:
        if self.step != SHADOW_STEP:
            return self._this_step.min_ns
        return self.spec.shadow.min_ns if self.spec.shadow is not None else 0
