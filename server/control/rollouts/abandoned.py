"""Rollouts that no section asks for when a process starts: each gets the end that the removal of its section has.

Whoever worked on one died or was stopped, and its section went meanwhile, or right before. What had been promoted
stays so; anything else is aborted, and a champion that it had moved goes back to where it was. Its machine decides, as
it would have in the process that is gone, and all of it is in the audit.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final

from router.registry.origin import Unreachable
from router.rollout.events import (
    Action,
    AliasMoved,
    AliasRefused,
    Event,
    MoveAlias,
    Publish,
    Published,
    Record,
    SpecRemoved,
    State,
    Tick,
)
from router.rollout.machine import Rollout
from server.audit import AuditEvent
from server.control.rollouts.actions import Mover
from server.control.rollouts.run import GATEWAY, event_of
from server.control.rollouts.store import StoredRollout

_OVER: Final = frozenset({State.PROMOTED, State.ROLLED_BACK, State.ABORTED, State.FAILED})


@dataclass(slots=True)
class Ending:
    """How one ended: its row, what is to be said of it in the audit, and whether an alias was asked to be moved."""

    row: StoredRollout
    events: list[AuditEvent] = field(default_factory=list)
    moved: bool = False


def is_abandoned(row: StoredRollout) -> bool:
    """Whether something is open of a rollout that nobody works on."""
    return row.open or (bool(row.document) and State(row.state) not in _OVER)


def ending_of(row: StoredRollout, mover: Mover | None, generation: int) -> Ending:
    """Bring a rollout to its end; to be written down by the caller. Blocks.

    Raises BadRolloutState, ValueError, KeyError or TypeError for a row of which no machine can be made, and StoreError
    when an alias could not be moved: then it is to be asked again, which does no harm.
    """
    machine, revision = Rollout.from_dict(row.document["machine"]), int(row.document.get("revision", 0))
    ending = Ending(row)
    # A way back that was under way does not hear of the removal: it is asked for what it waits for.
    todo: deque[Action] = deque(machine.handle(SpecRemoved(GATEWAY), 0) or machine.handle(Tick(), 0))
    while todo:
        match todo.popleft():
            case Record() as record:
                ending.events.append(event_of(record, machine.spec, machine.spec.model, generation))
            case Publish(serial):  # no table of its own is in force any more
                todo.extend(machine.handle(Published(serial), 0))
            case MoveAlias(was, to):
                ending.moved = True
                todo.extend(machine.handle(_moved(row, mover, was, to), 0))
            case _:
                pass  # nothing is loaded for it, and nothing copied
    failed_ns = time.time_ns() if machine.failed and row.failed_ns is None else row.failed_ns
    document = {"machine": machine.to_dict(), "revision": revision + len(ending.events)}
    ending.row = replace(row, state=machine.state.value, failed_ns=failed_ns, open=False, document=document)
    return ending


def _moved(row: StoredRollout, mover: Mover | None, was: str, to: str) -> Event:
    alias = row.document.get("alias")
    if mover is None or not alias:
        return AliasMoved(to)
    try:
        refused = mover.move(str(alias["of"]), str(alias["name"]), was, to)
    except Unreachable as error:  # a start waits for no registry that is elsewhere
        refused = str(error)
    return AliasRefused(refused) if refused else AliasMoved(to)
