"""Every rollout of the configuration: begun, looked at each second, ordered about by people, and ended.

A rollout belongs to a models entry whose section has steps. It begins when stable and candidate are loaded; where the
candidate is an alias, each version that the alias comes to name gets a rollout of its own. How it ended stays in force
until the section changes, over restarts and reloads of an unchanged file. On the loop only; what blocks is done off it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

import structlog

from router.errors import BadRollout, BadRolloutState, RolloutRefused
from router.rollout import plan
from router.rollout.events import Order, Ordered, Overridden, Recovered, SpecRemoved, State, Tick
from router.rollout.machine import Rollout
from router.rollout.spec import LevelGate, RolloutSpec
from server.audit import AuditEvent
from server.config.rollouts import RolloutTemplate, Steering
from server.config.routing import Reference
from server.control.rollouts.abandoned import Ending, ending_of, is_abandoned
from server.control.rollouts.actions import SAVE_EVERY_NS, Hands
from server.control.rollouts.evidence import Levels, Look
from server.control.rollouts.known import Known
from server.control.rollouts.run import GATEWAY, Run, books_for, revived
from server.control.rollouts.store import Standing, StoredRollout
from server.control.rollouts.tenure import Tenure
from server.control.rollouts.traffic import Meter
from server.control.rollouts.views import expected, families, past_shown, shown
from server.errors import ConfigError, FailedPrecondition, InvalidArgument, NotFound, TidegateError
from server.gateway import Served
from server.store.base import StoreError
from server.telemetry.snapshot import FamilySnapshot

log: Any = structlog.get_logger("rollout")

#: How long an order waits until it is on disk and in force; one that takes traffic away is in force before it waits.
_SETTLE_S: Final = 5.0
_SETTLE_BACK_S: Final = 0.5
_UNREADABLE: Final = "what was written down of it cannot be read"
_TAKEN: Final = "another process works on the rollouts of this state folder: give each server a --state-dir of its own"
#: States in which a champion that is elsewhere was not moved by the rollout itself.
_OURS_TO_MOVE: Final = frozenset({State.PROMOTING, State.ROLLING_BACK})


class RolloutMoved(FailedPrecondition):
    """The order was given for a revision that is no longer the rollout's; nothing was done."""

    def __init__(self, rollout: str, expected: int, actual: int) -> None:
        super().__init__(f"the order was given for revision {expected} of rollout '{rollout}', which is at {actual}")
        self.actual = actual


def no_levels(_model: str, _version: str, _statistic: str, _since_ns: int) -> None:
    """Where nothing is watched, no level is known."""


class RolloutControl:
    """All rollouts of one process. ``levels`` tells drift and may block; ``tenure`` keeps other processes away."""

    def __init__(self, hands: Hands, tenure: Tenure, *, levels: Levels = no_levels) -> None:
        self._hands = hands
        self._tenure = tenure
        self._levels = levels
        self._templates: Mapping[str, RolloutTemplate] = {}
        #: By models entry: what runs, or ran last.
        self._runs: dict[str, Run] = {}
        #: Rollouts whose section is gone, until all of them is written down.
        self._leaving: list[Run] = []
        self._known = Known()
        self._waiting: dict[str, str] = {}
        self._starter = GATEWAY
        self._meter = Meter()
        #: A configuration with rollouts is being put in force.
        self._claimed = False

    # -- the configuration --------------------------------------------------------------------------------------

    async def start(self, templates: Mapping[str, RolloutTemplate], actor: str) -> bool:
        """Take up what is on disk, before the first table of the configuration is swapped in.

        True when an alias was moved back for a rollout without a section: what serves is to be looked at again. Raises
        StoreError, and ConfigError when there is work to do and another process does it.
        """
        ours = self._tenure.take()
        if templates and not ours:
            raise ConfigError(_TAKEN)
        await self._read()
        self.follow(templates, actor)
        moved = await self._abandon() if ours else False
        self._rest()
        return moved

    async def _read(self) -> None:
        self._known.replace(await asyncio.to_thread(self._hands.store.all))

    @asynccontextmanager
    async def claimed(self, templates: Mapping[str, RolloutTemplate]) -> AsyncIterator[None]:
        """Keep other processes away while these sections are checked and put in force.

        What others have written down since this process last worked on rollouts is read. Raises StoreError, and
        FailedPrecondition when another process works on them.
        """
        fresh = bool(templates) and not self._tenure.held
        if fresh and not self._tenure.take():
            raise FailedPrecondition(_TAKEN)
        self._claimed = True
        try:
            if fresh:
                await self._read()
            yield
        finally:
            self._claimed = False
            self._rest()

    def _rest(self) -> None:
        """Leave rollouts to other processes while there are none here."""
        if not (self._claimed or self._templates or self._runs or self._leaving):
            self._tenure.give_up()

    async def _abandon(self) -> bool:
        """Bring to its end what is open on disk and asked for by no section any more; whether an alias was moved."""
        taken = {run.id for run in self._runs.values()}
        moved = False
        for row in tuple(self._known.stored.values()):
            if row.id not in taken and is_abandoned(row):
                ending = await asyncio.to_thread(self._ending, row)
                await asyncio.to_thread(self._hands.store.save, ending.row, ending.events)
                self._known.put(ending.row)
                moved = moved or ending.moved
                log.info("rollout_abandoned", id=row.id, was=row.state, state=ending.row.state)
        return moved

    def _ending(self, row: StoredRollout) -> Ending:
        try:
            return ending_of(row, self._hands.mover, self._hands.gateway.table.generation)
        except (BadRolloutState, ValueError, KeyError, TypeError) as error:
            log.error("rollout_unreadable", id=row.id, error=str(error))
            self._known.unreadable.add(row.id)
            event = AuditEvent(GATEWAY, "rollout.aborted", row.name, {"id": row.id, "reason": _UNREADABLE})
            return Ending(replace(row, state=State.ABORTED.value, open=False), [event])

    def check(self, templates: Mapping[str, RolloutTemplate]) -> list[str]:
        """Why these sections cannot be put in the place of those in force."""
        wrong = [_TAKEN] if templates and not self._tenure.free() else []
        for entry, template in templates.items():
            run = self._runs.get(entry)
            if run is not None and run.template.id == template.id and not run.machine.ended:
                wrong += [f"{entry}: {text}" for text in _changes(run, template)]
            elif not template.follows and (used := self._known.used(template)):
                wrong.append(f"{entry}: {used}")
        return wrong

    def follow(self, templates: Mapping[str, RolloutTemplate], actor: str) -> None:
        """Sections of a configuration that is about to be swapped in."""
        for entry, run in tuple(self._runs.items()):
            template = templates.get(entry)
            if template is None or template.fingerprint() != run.template.fingerprint():
                self._drop(entry, run, actor)
        self._templates, self._starter = templates, actor
        self._waiting.clear()
        for entry, template in templates.items():
            if entry not in self._runs and not self._restored(entry, template):
                # Until it begins, nothing leads to its candidate, rules included.
                self._hands.publisher.set_course(entry, Steering(template.candidate.version), None)

    def _drop(self, entry: str, run: Run, actor: str) -> None:
        if not run.machine.ended:
            self._hands.tell(run, SpecRemoved(actor))
        del self._runs[entry]
        self._leave(run)
        self._hands.publisher.set_course(entry, None, None)

    def _leave(self, run: Run) -> None:
        """Another is in its place, or none. What is known of it is how it stands now, and in the end how it ended."""
        run.left = True
        self._leaving.append(run)
        self._known.put(run.stored(is_open=False))

    def _restored(self, entry: str, template: RolloutTemplate) -> bool:
        stored = self._known.of(template)
        if stored is None:
            return False
        if self._taken_back(entry, stored.id):
            return True
        try:
            run = revived(template, stored)
        except (BadRolloutState, ValueError, KeyError, TypeError) as error:
            log.error("rollout_unreadable", id=stored.id, error=str(error))
            self._known.unreadable.add(stored.id)
            return False
        promoted = run.machine.state is State.PROMOTED
        run.stable = run.machine.spec.candidate if promoted and not template.stable.is_alias else ""
        run.books.enter("", "stable", 0.0)
        self._runs[entry] = run
        self._hands.publisher.set_course(entry, run.steering(), None if run.machine.ended else run.books)
        if not run.machine.ended:
            given_up = stored.state == State.ABORTED.value
            self._hands.tell(run, SpecRemoved(GATEWAY) if given_up else Recovered(stored.open))
            self._set_to_work(run)
        return True

    def _taken_back(self, entry: str, rollout_id: str) -> bool:
        """A section that is back before its rollout has ended goes on with that, to its end."""
        for run in self._leaving:
            if run.id == rollout_id and not run.machine.ended:
                self._leaving.remove(run)
                run.left = False
                self._runs[entry] = run
                self._hands.publisher.set_course(entry, run.steering(), run.books)
                # What it published while the routing was not its to say is in no table.
                self._hands.tell(run, Recovered(crashed=False))
                return True
        return False

    def _set_to_work(self, run: Run) -> None:
        run.task = asyncio.get_running_loop().create_task(self._hands.work(run))
        if run.machine.state is State.PENDING:
            run.admitting = asyncio.get_running_loop().create_task(self._hands.admit(run))

    # -- looking ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look at everything, again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s())
            looks: list[Callable[[], Awaitable[None]]] = [partial(self._look_at, entry) for entry in self._templates]
            for look in (self._note_traffic, *looks, self._bury):
                try:
                    await look()
                except TidegateError as error:  # of the disk, which will be tried again
                    log.error("rollout_look_failed", error=error.message)
                except Exception:  # the boundary: one rollout's fault must not end the others
                    log.exception("rollout_look_failed")

    async def _note_traffic(self) -> None:
        """Of every name, those without a rollout included: their first one is to be planned, too."""
        now = self._hands.clock()
        if not self._meter.due(now):
            return
        served = {}
        for name, routes in self._hands.gateway.table.models.items():
            run, stable = self._runs.get(name), routes.versions[routes.stable]
            candidate = routes.versions.get(run.machine.spec.candidate) if run is not None and run.weight else None
            served[name] = (stable,) if candidate in {None, stable} else (stable, candidate)
        self._meter.note(served, now)

    def _interval_s(self) -> float:
        return min((template.every_ns for template in self._templates.values()), default=10**9) / 1e9

    async def _bury(self) -> None:
        """Let go of rollouts whose section is gone and that are all done and written down."""
        for run in tuple(self._leaving):
            if run.machine.ended and run.idle.is_set():
                await _ended(run)
                self._leaving.remove(run)
                self._hands.release(run)
                self._known.put(run.stored(is_open=False))
            elif not run.machine.ended:
                self._hands.tell(run, Tick())
        self._rest()

    async def _look_at(self, entry: str) -> None:
        template, run = self._templates.get(entry), self._runs.get(entry)
        if template is None:  # a reload has taken it out while others were looked at
            return
        if run is not None and not run.machine.ended:
            await self._look(run)
        elif run is not None:
            self._settle(run)
        if run is None or (run.machine.ended and template.follows):
            await self._begin(entry, template)
        elif template.follows and run.machine.state is State.PROMOTED:
            following = self._named(template.candidate)
            if following not in {"", run.machine.spec.candidate}:
                self._wait(entry, f"version {following} waits until the promotion of '{run.id}' is closed (keep_warm)")

    async def _look(self, run: Run) -> None:
        await self._watch_aliases(run)
        if run.machine.ended:
            return
        self._hands.try_to_load(run)
        lane = self._hands.publisher.lanes.get((run.template.entry, f"rollout:{run.id}"))
        report = None if lane is None else lane.comparison.report()
        levels = await self._levels_of(run)
        taken = run.books.take()
        look = Look(run.machine.spec, taken, levels, run.pairs, report)
        self._hands.tell(run, Tick(look.evidence(), taken.attempts))
        if self._hands.clock() - run.saved_at_ns >= SAVE_EVERY_NS:
            run.dirty = True
            run.idle.clear()
            run.wake.set()

    async def _levels_of(self, run: Run) -> dict[str, float]:
        """Levels that say something new: looking at the same rows twice is one look."""
        spec, since_ns = run.machine.spec, run.serving_ns
        asked = {gate.source for _, gate in spec.gates if isinstance(gate, LevelGate)}
        if not asked or not since_ns:
            return {}
        model, version = run.template.model, spec.candidate
        read = await asyncio.to_thread(lambda: {name: self._levels(model, version, name, since_ns) for name in asked})
        news = {name: found for name, found in read.items() if found and run.levels_until.get(name) != found.until_ns}
        run.levels_until |= {name: found.until_ns for name, found in news.items()}
        return {name: found.value for name, found in news.items()}

    def _settle(self, run: Run) -> None:
        """After the end: nothing is counted any more, and an alias decides again once it has been seen to have moved.

        Until then the registry's last known word would take a promotion back. What was stable stays loaded as long as
        it answers by this rollout's word.
        """
        stable = run.template.stable
        free = bool(run.stable) and stable.is_alias and self._alias_of(stable) != run.machine.spec.stable
        if free:
            run.stable = ""
        if free or (run.counting and not run.queue):
            run.counting = False
            self._hands.publisher.steer(run.template.entry, run.steering(), None)
            if run.stable != run.machine.spec.stable:
                self._hands.release(run)

    # -- aliases ------------------------------------------------------------------------------------------------

    def _alias_of(self, reference: Reference) -> str:
        """The version that an alias leads to."""
        return self._hands.publisher.alias(reference.model, reference.version.removeprefix("@"))

    def _named(self, reference: Reference) -> str:
        """The version that an alias names, ready or not: that is what people want, wherever it leads until then."""
        return self._hands.publisher.named(reference.model, reference.version.removeprefix("@"))

    def _find(self, reference: Reference) -> tuple[str, Served] | None:
        """What a reference names, when that is loaded; not the version that its alias leads to until then."""
        named = Reference(reference.model, self._named(reference)) if reference.is_alias else reference
        return self._hands.publisher.find(named)

    async def _watch_aliases(self, run: Run) -> None:
        """People who move the champion decide; the candidate goes when it is challenger no more."""
        template, state = run.template, run.machine.state
        if template.stable.is_alias:
            now, spec = self._named(template.stable), run.machine.spec
            if state is State.PROMOTED:
                run.seen_moved = run.seen_moved or now == spec.candidate
                moved = run.seen_moved and now != spec.candidate
            else:
                moved = state not in _OURS_TO_MOVE and now not in {"", spec.stable}
            if moved:
                actor = await self._setter(template, template.stable)
                self._hands.tell(run, Overridden(actor, f"the champion was moved to {now or 'nowhere'}"))
        if template.follows and state not in {*_OURS_TO_MOVE, State.PROMOTED} and not run.machine.ended:
            now = self._named(template.candidate)
            if now != run.machine.spec.candidate:
                actor = await self._setter(template, template.candidate)
                self._hands.tell(run, SpecRemoved(actor))

    async def _setter(self, template: RolloutTemplate, reference: Reference) -> str:
        alias = reference.version.removeprefix("@")
        store = self._hands.store
        try:
            return await asyncio.to_thread(store.setter, template.registered, alias) or "registry"
        except StoreError:
            return "registry"

    # -- beginning ----------------------------------------------------------------------------------------------

    async def _begin(self, entry: str, template: RolloutTemplate) -> None:
        try:
            spec = self._wanted(template)
            if spec is None:
                return
            starter = await self._setter(template, template.candidate) if template.follows else self._starter
            machine = Rollout(spec, starter)
        except RolloutRefused as error:
            self._wait(entry, error.reason)
            return
        except BadRollout as error:
            self._wait(entry, str(error))
            return
        run = Run(template, machine, books_for(template), time.time_ns())
        event = AuditEvent(starter, "rollout.begun", f"{template.model}:{spec.candidate}", {"spec": spec.to_dict()})
        await asyncio.to_thread(self._hands.store.save, run.stored(is_open=True), (event,))
        now = self._templates.get(entry)
        before = self._runs.get(entry)
        if now is None or now.fingerprint() != template.fingerprint():  # a reload was faster
            self._hands.tell(run, SpecRemoved(starter))
            self._leave(run)
            self._set_to_work(run)
            return
        if before is not None:
            self._leave(before)
        self._known.put(run.stored(is_open=True))
        self._waiting.pop(entry, None)
        self._runs[entry] = run
        self._hands.publisher.steer(entry, run.steering(), run.books)
        run.books.enter("", "stable", 0.0)
        self._set_to_work(run)
        log.info("rollout_begun", id=run.id, stable=spec.stable, candidate=spec.candidate, starter=starter)

    def _wanted(self, template: RolloutTemplate) -> RolloutSpec | None:
        """What is to begin now; None when nothing is, or not yet. Raises RolloutRefused."""
        stable, candidate = self._find(template.stable), self._find(template.candidate)
        if template.follows and not self._named(template.candidate):
            self._wait(template.entry, f"no version is {template.candidate}")
            return None
        for reference, found in ((template.stable, stable), (template.candidate, candidate)):
            if found is None:
                self._wait(template.entry, f"{reference} is not loaded")
        if stable is None or candidate is None:
            return None
        (stable_number, _), (number, served) = stable, candidate
        if stable_number == number:
            self._wait(template.entry, f"{template.candidate} is stable itself")
            return None
        run_id = self._known.free_id(template, number)
        digest = served.spec.digest or f"{template.model}:{number}"
        spec = template.spec(run_id, stable_number, number, digest)
        plan.admit(spec, self._known.failed(), time.time_ns())
        return spec

    def _wait(self, entry: str, why: str) -> None:
        if self._waiting.get(entry) != why:
            self._waiting[entry] = why
            log.info("rollout_waits", name=entry, reason=why)

    # -- people -------------------------------------------------------------------------------------------------

    async def order(
        self, rollout_id: str, wanted: str, *, actor: str, reason: str, expected: int | None = None
    ) -> dict[str, Any]:
        """Do what a person wants: one of the orders, or ``clear``. Raises NotFound, FailedPrecondition, RolloutMoved.

        What takes traffic away is in force when this returns, whatever the disk does; everything is on disk, so that no
        crash undoes it, unless that takes very long.
        """
        if wanted == "clear":
            return await self._clear(rollout_id, actor, reason)
        try:
            order = Order(wanted)
        except ValueError:
            known = ", ".join([*(known.value for known in Order), "clear"])
            raise InvalidArgument(f"wanted one of {known}, got {wanted[:64]!r}") from None
        run = self._run(rollout_id)
        if expected is not None and expected != run.revision:
            raise RolloutMoved(run.id, expected, run.revision)
        try:
            self._hands.tell(run, Ordered(order, actor, reason))
        except RolloutRefused as error:
            raise FailedPrecondition(str(error)) from None
        log.info("rollout_ordered", id=run.id, order=wanted, actor=actor, state=run.machine.state.value)
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_BACK_S if order in {Order.ABORT, Order.ROLLBACK} else _SETTLE_S):
                await run.idle.wait()
        return self._shown(run)

    async def _clear(self, rollout_id: str, actor: str, reason: str) -> dict[str, Any]:
        await asyncio.to_thread(self._hands.store.clear, rollout_id, actor, reason)
        for row in await asyncio.to_thread(self._hands.store.all):
            if row.id == rollout_id:
                self._known.put(row)
        for run in (*self._runs.values(), *self._leaving):
            run.cleared = run.cleared or run.id == rollout_id
        return self.status(rollout_id)

    def _run(self, rollout_id: str) -> Run:
        for run in (*self._runs.values(), *self._leaving):
            if run.id == rollout_id:
                return run
        row = self._known.stored.get(rollout_id)
        if row is not None:
            raise FailedPrecondition(f"rollout '{rollout_id}' has ended ({row.state})")
        raise NotFound(f"there is no rollout '{rollout_id[:128]}'")

    # -- shown --------------------------------------------------------------------------------------------------

    def all(self) -> list[dict[str, Any]]:
        """Every rollout that is known, those of the configuration first; and sections that wait to begin."""
        running = [self._shown(run) for run in self._runs.values()]
        waiting = [
            {"id": self._templates[entry].id, "name": entry, "state": "waiting", "reason": why, "ended": False}
            for entry, why in self._waiting.items()
            if entry in self._templates
        ]
        ids = {row["id"] for row in running}
        return running + waiting + [past_shown(row) for row in self._known.newest() if row.id not in ids]

    def standing(self) -> list[Standing]:
        """How every rollout that began stands, those at work first and then the newest first. Cheap."""
        now = [
            Standing(
                run.template.entry, run.machine.spec.candidate, run.machine.state, run.machine.reason, run.machine.ended
            )
            for run in self._runs.values()
        ]
        ids = {run.id for run in self._runs.values()}
        return now + [row.standing() for row in self._known.newest() if row.id not in ids]

    def status(self, rollout_id: str) -> dict[str, Any]:
        """One rollout. Raises NotFound."""
        for row in self.all():
            if row["id"] == rollout_id:
                return row
        raise NotFound(f"there is no rollout '{rollout_id[:128]}'")

    def planned(self, templates: Mapping[str, RolloutTemplate]) -> dict[str, list[dict[str, Any]]]:
        """For each section that would begin: its steps with the seconds that they are expected to take.

        ``rollout status`` and ``check-config --against`` show the same.
        """
        found = {}
        for entry, template in templates.items():
            run = self._runs.get(entry)
            if run is None or run.template.fingerprint() != template.fingerprint():
                found[entry] = expected(template, template.base, *self._meter.read(entry))
        return found

    def _shown(self, run: Run) -> dict[str, Any]:
        return shown(run, expected(run.template, run.machine.spec, *self._meter.read(run.template.entry)))

    def families(self) -> Iterator[FamilySnapshot]:
        """The metrics."""
        return families(tuple(self._runs.values()))

    # -- the end ------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Write everything down as left in order."""
        for run in (*self._runs.values(), *self._leaving):
            await _ended(run)
            try:
                await asyncio.to_thread(self._hands.store.save, run.stored(is_open=False))
            except TidegateError as error:
                log.error("rollout_not_written", id=run.id, error=error.message)
        self._tenure.give_up()


async def _ended(run: Run) -> None:
    """Cancel and await what works on it."""
    tasks = [task for task in (run.task, run.loading, run.admitting) if task is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _changes(run: Run, template: RolloutTemplate) -> Iterator[str]:
    """Why a section cannot take the place of the one that a running rollout has begun by."""
    if template.fingerprint() == run.template.fingerprint():
        return
    spec = run.machine.spec
    stable = spec.stable if template.stable == run.template.stable else str(template.stable)
    candidate = spec.candidate if template.candidate == run.template.candidate else str(template.candidate)
    try:
        run.machine.check_unchanged(template.spec(run.id, stable, candidate, spec.digest))
    except RolloutRefused as error:
        yield str(error)
        return
    yield f"rollout '{run.id}': its section cannot change while it runs; give the new rollout a new id"
