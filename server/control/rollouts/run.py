"""One rollout at work: its machine, its counts, and what the machine has asked for and is not done yet."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from router.rollout.events import AUTOMATIC, Action, Record, State
from router.rollout.machine import Rollout
from router.rollout.spec import EVENTS, MeanGate, RateGate, RatioGate, RolloutSpec
from server.audit import AuditEvent
from server.config.rollouts import RolloutTemplate, Steering
from server.config.routing import CANDIDATE_ARM, CONTROL_ARM
from server.control.rollouts.evidence import PairCounts
from server.control.rollouts.store import StoredRollout
from server.gateway import RolloutBooks

#: Who acts when no person does, in the audit.
GATEWAY: Final = "tidegate"
#: States in which everything is done at once: what takes traffic away waits for no disk.
BACKWARD: Final = frozenset(
    {State.HOLD, State.ROLLING_BACK, State.ROLLED_BACK, State.ABORTED, State.FAILED},
)


@dataclass(slots=True, eq=False)
class Run:
    """``revision`` counts what was recorded of it; ``queue`` holds what is to be done, in order.

    ``seen_moved``: the registry has been seen to say what a promotion made of it. ``wall_ns``: when it failed, by the
    clock of the wall. ``serving_ns``: since when the candidate has served in this process, by the same clock; 0 before.
    ``levels_until``: up to when the rows came that levels were read from, by statistic. ``kept``: the version that
    stays loaded for it, "" for none.
    """

    template: RolloutTemplate
    machine: Rollout
    books: RolloutBooks
    began_ns: int
    revision: int = 0
    failed_ns: int | None = None
    cleared: bool = False
    pairs: PairCounts = field(default_factory=PairCounts)
    queue: deque[Action] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    loading: asyncio.Task[None] | None = None
    admitting: asyncio.Task[None] | None = None
    #: The record that is being written.
    writing: Record | None = None
    dirty: bool = True
    saved_at_ns: int = 0
    seen_moved: bool = False
    shadowing: bool = False
    #: Its section is gone: the routing of its entry is no longer its to say.
    left: bool = False
    #: The request path counts for it.
    counting: bool = True
    weight: int = 0
    stable: str = ""
    serving_ns: int = 0
    kept: str = ""
    levels_until: dict[str, int] = field(default_factory=dict)
    #: The registry could not be reached to move its alias back.
    unreached: bool = False

    @property
    def id(self) -> str:
        return self.machine.spec.id

    def steering(self) -> Steering:
        """What this rollout makes of the routing now."""
        shadow = None
        if self.shadowing and self.template.shadow is not None:
            candidate = self.machine.spec.candidate
            to = type(self.template.candidate)(self.template.model, candidate)
            shadow = self.template.shadow.apply(self.id, to)
        return Steering(self.machine.spec.candidate, self.stable, self.weight, self.id, shadow)

    def sides(self, weight: int, stable: str) -> tuple[str, str]:
        """The arms of candidate and stable under a weight; "" for a side that gets nothing."""
        if stable == self.machine.spec.candidate:
            return "stable", ""
        if not weight:
            return "", "stable"
        if weight == 10_000:
            return CANDIDATE_ARM, ""
        return CANDIDATE_ARM, CONTROL_ARM if self.template.matched else "stable"

    def event(self, record: Record, generation: int) -> AuditEvent:
        """One record for the audit."""
        return event_of(record, self.machine.spec, self.template.model, generation)

    def stored(self, *, is_open: bool) -> StoredRollout:
        """As it is written down."""
        machine = self.machine
        if machine.failed and self.failed_ns is None:
            self.failed_ns = time.time_ns()
        document = {"machine": machine.to_dict(), "revision": self.revision, "alias": self._alias()}
        if not machine.ended:
            document["books"] = self.books.to_dict()
        return StoredRollout(
            self.id, self.template.entry, self.template.fingerprint(), machine.spec.digest, self.began_ns,
            machine.state.value, self.failed_ns, machine.spec.cooldown_ns, self.cleared, is_open and not machine.ended,
            document,
        )  # fmt: skip

    def _alias(self) -> dict[str, str] | None:
        """The alias that its promotion moves, for a process that has to move it back without the section."""
        stable = self.template.stable
        return {"of": self.template.registered, "name": stable.version.removeprefix("@")} if stable.is_alias else None


def event_of(record: Record, spec: RolloutSpec, model: str, generation: int) -> AuditEvent:
    """One record of a rollout of a model's version for the audit."""
    detail = plain(record.to_dict()) | {
        "id": spec.id,
        "stable": spec.stable,
        "candidate": spec.candidate,
        "digest": spec.digest,
        "generation": generation,
        "spec": spec.fingerprint(),
    }
    actor = GATEWAY if record.actor == AUTOMATIC else record.actor
    return AuditEvent(actor, f"rollout.{record.state.value}", f"{model}:{spec.candidate}", detail)


def books_for(template: RolloutTemplate) -> RolloutBooks:
    """Empty counts for a rollout, with the outcomes that its gates look at."""
    judged = [gate for _, gate in template.base.gates if isinstance(gate, MeanGate | RateGate | RatioGate)]
    sources = {gate.source for gate in judged if not (isinstance(gate, RateGate) and gate.paired)}
    return RolloutBooks(CONTROL_ARM if template.matched else "", sources - set(EVENTS))


def revived(template: RolloutTemplate, stored: StoredRollout) -> Run:
    """A rollout as it was written down. Raises BadRolloutState."""
    machine = Rollout.from_dict(stored.document["machine"])
    books = books_for(template)
    books.restore(stored.document.get("books", {}))
    revision = int(stored.document.get("revision", 0))
    return Run(template, machine, books, stored.began_ns, revision, stored.failed_ns, stored.cleared)


def plain(value: Any) -> Any:
    """JSON proper: numbers that are none or have no end as text."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
