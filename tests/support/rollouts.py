"""Rollouts for tests: a specification with one gate of each kind, machines brought into a state, ticks of traffic."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from router.rollout.events import (
    Accepted,
    Action,
    AliasMoved,
    Loaded,
    MoveAlias,
    Order,
    Ordered,
    Publish,
    Published,
    Record,
    Recovered,
    State,
    Tick,
)
from router.rollout.evidence import OneArm, TwoArms
from router.rollout.gates import Evidence, Level
from router.rollout.machine import Rollout
from router.rollout.spec import (
    NS_PER_S,
    GateSpec,
    LevelGate,
    MismatchGate,
    RateGate,
    RatioGate,
    Reaction,
    RolloutSpec,
    ShadowPhase,
    StepSpec,
)

GATES: tuple[tuple[str, GateSpec], ...] = (
    ("errors", RatioGate("error")),
    ("ceiling", RateGate("error", 0.02)),
    ("diverge", RateGate("argmax_disagree", 0.03, Reaction.HOLD, paired=True)),
    ("drift", LevelGate("psi", 0.25, 3)),
    ("srm", MismatchGate()),
)
STEPS = (
    StepSpec(100, 10 * NS_PER_S, (("errors", 4.0),)),
    StepSpec(500, 10 * NS_PER_S, (("errors", 2.0),), approve=True),
    StepSpec(10_000),
)

RUNNING = [State.SHADOWING, State.STEP, State.AWAITING, State.HOLD, State.PROMOTING, State.PROMOTED]
OPEN = [State.PENDING, State.LOADING, *RUNNING]


def rollout_spec(**changes: Any) -> RolloutSpec:
    values: dict[str, Any] = {
        "id": "r-1", "model": "fraud", "stable": "7", "candidate": "8", "digest": "sha256:8", "steps": STEPS,
        "gates": GATES, "shadow": ShadowPhase(1_000),
    }  # fmt: skip
    return RolloutSpec(**values | changes)


#: Evidence of one second at which every gate is content, and evidence by which one gate at once is not.
GOOD = TwoArms(500, 2, 500, 4)
BAD = TwoArms(500, 250, 500, 2)
AGREE, DISAGREE = OneArm(2_000, 2), OneArm(2_000, 1_000)


class Driven:
    """A machine with a clock of its own, and everything that it ever answered."""

    def __init__(self, spec: RolloutSpec | None = None, rollout: Rollout | None = None) -> None:
        self.rollout = rollout or Rollout(spec or rollout_spec(), "ada")
        self.now_ns = 0
        self.log: list[Action] = []

    @property
    def state(self) -> State:
        return self.rollout.state

    def tell(self, event: Any) -> tuple[Action, ...]:
        actions = self.rollout.handle(event, self.now_ns)
        self.log += actions
        return actions

    def order(self, order: Order, actor: str = "bob") -> tuple[Action, ...]:
        return self.tell(Ordered(order, actor))

    def tick(self, seconds: float = 1.0, attempts: int = 500, **evidence: Evidence) -> tuple[Action, ...]:
        self.now_ns += int(seconds * NS_PER_S)
        return self.tell(Tick(evidence, attempts))

    def silence(self, seconds: int) -> None:
        for _ in range(seconds // 10):
            self.tick(10, 0)

    def good(self, looks: int = 12) -> None:
        for _ in range(looks):
            self.tick(errors=GOOD, ceiling=OneArm(500, 2))

    def reach(self, state: State) -> Driven:
        """Bring it to a state by good traffic and the people it needs."""
        path: dict[State, Callable[[], object]] = {
            State.LOADING: lambda: self.tell(Accepted()),
            State.SHADOWING: lambda: self.tell(Loaded()),
            State.STEP: lambda: self.tick(diverge=AGREE),
            State.AWAITING: lambda: self.good(30),
            State.PROMOTING: lambda: self.order(Order.APPROVE),
            State.PROMOTED: lambda: self.tell(AliasMoved(self.rollout.spec.candidate)),
        }
        if state is State.HOLD:
            self.reach(State.STEP)
            for _ in range(3):
                self.tick(drift=Level(0.9))
        else:
            for go in path.values():
                if self.state is state:
                    break
                go()
        assert self.state is state, (self.state, self.rollout.reason)
        return self


def restarted(driven: Driven, crashed: bool = True) -> Driven:
    """The same rollout as it was stored, after the process has ended."""
    stored = json.loads(json.dumps(driven.rollout.to_dict(), allow_nan=False))
    again = Driven(rollout=Rollout.from_dict(stored))
    again.tell(Recovered(crashed))
    return again


def published(actions: tuple[Action, ...] | list[Action]) -> list[Publish]:
    return [action for action in actions if isinstance(action, Publish)]


def records(actions: tuple[Action, ...] | list[Action]) -> list[Record]:
    return [action for action in actions if isinstance(action, Record)]


def confirm(driven: Driven) -> None:
    """The last table asked for is in force, and the champion is back where it was."""
    driven.tell(Published(driven.rollout.serial))
    if MoveAlias("8", "7") in driven.log:
        assert driven.state is State.ROLLING_BACK
        driven.tell(AliasMoved("7"))
