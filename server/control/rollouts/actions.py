"""Carries out what machines ask for, in the order they ask: audit rows, tables, loads, aliases.

What takes traffic away from a candidate is done at once, on the spot, and is written down as soon as the disk allows.
Everything else waits its turn in the rollout's queue: a step is in the audit before its table is in force. Of what
waits there, a way back takes out whatever it overtakes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeAlias

import structlog

from router.errors import RolloutRefused
from router.registry.origin import Unreachable
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
    Publish,
    Published,
    Record,
    Release,
    Shadow,
    State,
)
from server.audit import AuditEvent
from server.config.routing import Reference
from server.control.publishing import Publisher
from server.control.rollouts.rehearsal import LoadAgain, rehearse
from server.control.rollouts.run import BACKWARD, Run
from server.control.rollouts.store import RolloutStore
from server.control.versions import UNAVAILABLE, IndexEntry
from server.errors import TidegateError
from server.gateway import Gateway
from server.store.base import StoreError

log: Any = structlog.get_logger("rollout")

#: Between tries of what did not work: the disk, the registry, a version that is not loaded.
_AGAIN_S: Final = 0.5
#: At last a registry that cannot be reached is asked so rarely to move its alias back.
_REACH_AGAIN_S: Final = 60.0
_SEE_LOG: Final = "see the server's log"
#: How often what has not changed is written down.
SAVE_EVERY_NS: Final = 5_000_000_000


@dataclass(slots=True, frozen=True)
class Admission:
    """What quality gates say of a candidate. ``undecidable``: a gate had no data, so people are asked."""

    status: Literal["passed", "failed", "undecidable"] = "passed"
    reason: str = ""
    evidence: Sequence[Any] = ()


#: (model, candidate, stable) -> what the model's quality gates say of the candidate. May take long.
Quality: TypeAlias = Callable[[str, str, str], Awaitable[Admission]]


class Mover(Protocol):
    """Moves an alias of the registry by compare and set. Blocks; raises StoreError, Unreachable if it is elsewhere."""

    def move(self, entry: str, alias: str, was: str, to: str) -> str: ...


class Keeper(Protocol):
    """Knows what is loaded, and can be told what must stay so."""

    def index(self, ready_only: bool) -> list[IndexEntry]: ...
    def hold(self, model: str, version: str) -> None: ...
    def let_go(self, model: str, version: str) -> None: ...


async def no_gates(_model: str, _candidate: str, _stable: str) -> Admission:
    """Where no policy asks for anything, everything passes."""
    return Admission()


@dataclass(slots=True)
class Hands:
    """Everything that a rollout may touch. On the loop only."""

    gateway: Gateway
    publisher: Publisher
    keeper: Keeper
    store: RolloutStore
    defer: Callable[[AuditEvent], None]
    load_again: LoadAgain
    mover: Mover | None = None
    quality: Quality = no_gates
    clock: Callable[[], int] = time.monotonic_ns

    # -- told ---------------------------------------------------------------------------------------------------

    def tell(self, run: Run, event: Event) -> None:
        """Tell the machine, and do or queue what it answers. Raises RolloutRefused for an order that it refuses."""
        actions = run.machine.handle(event, self.clock())
        if not actions:
            return
        run.revision += sum(isinstance(action, Record) for action in actions)
        run.dirty = True
        if run.machine.state in BACKWARD:
            self._overtake(run)
            self._at_once(run, actions)
        else:
            run.queue.extend(actions)
        if run.queue or run.dirty:
            run.idle.clear()
        run.wake.set()

    def _overtake(self, run: Run) -> None:
        """What waited will not be done; that it was to be is written down all the same."""
        for action in run.queue:
            if isinstance(action, Record) and action is not run.writing:
                self.defer(run.event(action, self.gateway.table.generation))
        run.queue.clear()

    def _at_once(self, run: Run, actions: Sequence[Action]) -> None:
        in_force: list[Publish] = []
        for action in actions:
            if isinstance(action, Record):
                self.defer(run.event(action, self.gateway.table.generation))
            elif isinstance(action, Publish):
                (in_force if self._publish(run, action) else run.queue).append(action)
            elif not self._small(run, action):
                run.queue.append(action)
        for action in in_force:
            self.tell(run, Published(action.serial))

    # -- done ---------------------------------------------------------------------------------------------------

    async def work(self, run: Run) -> None:
        """Do what is queued, one after the other, and write down what has changed. Until cancelled."""
        while True:
            try:
                done = await self._next(run)
            except Exception:  # the boundary of one action: what it asks for is tried again
                log.exception("rollout_action_failed", id=run.id)
                done = False
            if not done:
                await asyncio.sleep(_AGAIN_S)

    async def _next(self, run: Run) -> bool:
        """The next thing to do, or wait for one; False when it did not work and is to be tried again."""
        if run.queue:
            action = run.queue[0]
            if not await self._carried_out(run, action):
                return False
            if run.queue and run.queue[0] is action:
                run.queue.popleft()
            return True
        if run.dirty:
            return await self._saved(run, ())
        run.idle.set()
        await run.wake.wait()
        run.wake.clear()
        return True

    async def _carried_out(self, run: Run, action: Action) -> bool:
        match action:
            case Record():
                return await self._recorded(run, action)
            case Publish(serial):
                done = self._publish(run, action)
                if done:
                    self.tell(run, Published(serial))
                return done
            case MoveAlias(was, to):
                return await self._moved(run, was, to)
            case _:
                return self._small(run, action)

    def _small(self, run: Run, action: Action) -> bool:
        """What neither waits nor fails; False for anything else."""
        match action:
            case Load():
                self.try_to_load(run)
            case Shadow(on):
                run.shadowing = on
                if run.left:
                    return True
                self.publisher.steer(run.template.entry, run.steering(), run.books)
            case KeepWarm(version):
                if not run.kept:
                    self.keeper.hold(run.template.model, version)
                    run.kept = version
            case Release(version):
                if version == run.kept:
                    self.release(run)
            case _:
                return False
        return True

    def release(self, run: Run) -> None:
        """The version that a rollout has kept loaded may go, if there is one."""
        if run.kept:
            self.keeper.let_go(run.template.model, run.kept)
            run.kept = ""

    def _publish(self, run: Run, action: Publish) -> bool:
        """Put the table of an action in force; False when something that it leads to is not loaded."""
        if run.left:
            return True
        before = run.weight, run.stable
        run.weight, run.stable = action.weight, action.stable
        if action.stable == run.machine.spec.stable and not run.template.stable.is_alias:
            run.stable = ""  # the file's own
        books = None if run.machine.ended else run.books
        if not self.publisher.steer(run.template.entry, run.steering(), books):
            run.weight, run.stable = before
            log.error("rollout_leads_nowhere", id=run.id, stable=action.stable, weight=action.weight)
            return False
        if not run.serving_ns and (run.weight or run.stable == run.machine.spec.candidate):
            run.serving_ns = time.time_ns()
        self._compare(run)
        log.info("rollout_published", id=run.id, weight=run.weight / 100, stable=action.stable)
        return True

    def _compare(self, run: Run) -> None:
        """Count by the arms of the table that is in force now."""
        ours, theirs = run.sides(run.weight, run.stable)
        arms = self.gateway.table.compiled(run.template.entry).arms if run.weight else {}
        held, other = (arms[arm].propensity if arm in arms else 0.0 for arm in (ours, theirs))
        run.books.enter(ours, theirs, held / (held + other) if held + other else 0.0)

    # -- written ------------------------------------------------------------------------------------------------

    async def _recorded(self, run: Run, record: Record) -> bool:
        run.writing = record
        try:
            return await self._saved(run, (run.event(record, self.gateway.table.generation),))
        finally:
            run.writing = None

    async def _saved(self, run: Run, events: Sequence[AuditEvent]) -> bool:
        run.dirty = False
        stored = run.stored(is_open=True)
        try:
            await asyncio.to_thread(self.store.save, stored, events)
        except StoreError as error:
            run.dirty = True
            log.error("rollout_not_written", id=run.id, error=error.message)
            if run.queue or not events:
                return False
            for event in events:  # overtaken meanwhile: nobody tries again
                self.defer(event)
            return False
        run.saved_at_ns = self.clock()
        return True

    # -- aliases ------------------------------------------------------------------------------------------------

    async def _moved(self, run: Run, was: str, to: str) -> bool:
        stable = run.template.stable
        if not stable.is_alias or self.mover is None:
            self.tell(run, AliasMoved(to))
            return True
        try:
            refused = await asyncio.to_thread(
                self.mover.move, run.template.registered, stable.version.removeprefix("@"), was, to
            )
        except StoreError as error:
            log.error("alias_not_moved", id=run.id, to=to, error=error.message)
            return False
        except Unreachable as error:
            if to == run.machine.spec.stable and run.machine.state is State.ROLLING_BACK:
                await self._wait_for_registry(run, error)
                return False
            refused = str(error)
        run.seen_moved = False
        self.tell(run, AliasRefused(refused) if refused else AliasMoved(to))
        return True

    async def _wait_for_registry(self, run: Run, error: Unreachable) -> None:
        """Before its alias is asked to be moved back again: a quarter of the time that the way back has taken so far.

        However long it lasts, the rollout does not end before, for with its end the alias decides, and that would bring
        the candidate back. All else of the way back is done; it is written down, so that a restart goes on with it.
        """
        if not run.unreached:
            log.error("alias_waits", id=run.id, to=run.machine.spec.stable, error=str(error))
        run.unreached = True
        if run.dirty:
            await self._saved(run, ())
        await asyncio.sleep(min(_REACH_AGAIN_S, run.machine.state_ns / 4e9))

    # -- the candidate ------------------------------------------------------------------------------------------

    async def admit(self, run: Run) -> None:
        """Ask the quality gates, and tell the machine."""
        template, version = run.template, run.machine.spec.candidate
        try:
            found = await self.quality(template.model, version, run.machine.spec.stable)
        except TidegateError as error:
            found = Admission("failed", error.message)
        except Exception:  # the boundary of one judgement: that says nothing of the candidate, so people are asked
            log.exception("rollout_admission_crashed", id=run.id)
            found = Admission("undecidable", f"internal error in its quality gates, {_SEE_LOG}")
        detail = {"id": run.id, "status": found.status, "reason": found.reason, "evidence": list(found.evidence)}
        await self._noted(AuditEvent("tidegate", "rollout.gated", f"{template.model}:{version}", detail))
        match found.status:
            case "passed":
                self.tell(run, Accepted())
            case "failed":
                self.tell(run, CandidateFailed(found.reason or "its quality gates have failed"))
            case _:
                self.tell(run, ConsentWanted(found.reason or "a quality gate had no data"))

    async def _noted(self, event: AuditEvent) -> None:
        """Write down what comes before whatever follows from it; as soon as the disk allows if it does not now."""
        try:
            await asyncio.to_thread(self.store.note, event)
        except StoreError:
            self.defer(event)

    def try_to_load(self, run: Run) -> None:
        """While it is loading: let a candidate that is there rehearse, and fail one that cannot be had."""
        if run.machine.state is not State.LOADING or run.loading is not None:
            return
        model, version = run.template.model, run.machine.spec.candidate
        if self.publisher.find(Reference(model, version)) is not None:
            run.loading = asyncio.get_running_loop().create_task(self._rehearsed(run))
            return
        for row in self.keeper.index(ready_only=False):
            if (row.name, row.version, row.state) == (model, version, UNAVAILABLE) and row.reason:
                self.tell(run, CandidateFailed(row.reason))

    async def _rehearsed(self, run: Run) -> None:
        found = self.publisher.find(Reference(run.template.model, run.machine.spec.candidate))
        try:
            if found is None:
                return
            await rehearse(found[1], run.template, self.load_again)
            self.tell(run, Loaded())
        except TidegateError as error:
            self.tell(run, CandidateFailed(error.message))
        except RolloutRefused:
            return
        except Exception:  # the boundary of one rehearsal: what crashed would crash again
            log.exception("rollout_rehearsal_crashed", id=run.id)
            self.tell(run, CandidateFailed(f"internal error in its rehearsal, {_SEE_LOG}"))
        finally:
            run.loading = None
