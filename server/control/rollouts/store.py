"""Rollouts on disk: one row for each that ever began, with all that its machine remembers.

A row is ``open`` while a process works on it. Who finds one open at the start knows that the last process died.
Everything here blocks.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import structlog

from router.rollout.events import State
from router.rollout.plan import FailedAttempt
from server.audit import AuditEvent, AuditLog
from server.errors import NotFound
from server.store.base import Store

log = structlog.get_logger("rollout")

#: id, name, template, digest, began_ns, state, failed_ns, cooldown_ns, cleared, open, document
_Columns: TypeAlias = tuple[str, str, str, str, int, str, int | None, int, int, int, str]
_ROWS = (
    "SELECT id, name, template, digest, began_ns, state, failed_ns, cooldown_ns, cleared, open, document "
    "FROM rollout_state"
)
_WRITE = """
    INSERT INTO rollout_state VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET
        state = excluded.state, failed_ns = excluded.failed_ns, open = excluded.open, document = excluded.document
"""


#: Who moved an alias last: by itself, or with a promotion, whose subject is the version that it made champion.
_SETTER: Final = """
    SELECT actor FROM audit WHERE (action = 'registry.alias' AND subject = :model || '@' || :alias)
        OR (action = 'registry.promote' AND substr(subject, 1, length(:model) + 1) = :model || ':'
            AND json_extract(detail, '$."' || :alias || '"') IS NOT NULL)
    ORDER BY seq DESC LIMIT 1
"""
_STATES: Final = frozenset(state.value for state in State)


@dataclass(slots=True, frozen=True)
class Standing:
    """How a rollout stands: of which models entry and candidate, in which state and why, and whether it is over."""

    entry: str
    candidate: str
    state: State
    reason: str
    ended: bool


@dataclass(slots=True, frozen=True)
class StoredRollout:
    """A rollout as it was written down. ``failed_ns``: when it was rolled back or failed, if it was.

    ``template`` is the fingerprint of the section that asked for it, ``name`` the models entry. ``document`` is plain
    JSON: the machine, the counts that a restart needs, and how often it has changed; empty where that is damaged.
    """

    id: str
    name: str
    template: str
    digest: str
    began_ns: int
    state: str
    failed_ns: int | None
    cooldown_ns: int
    cleared: bool
    open: bool
    document: Mapping[str, Any]

    def failed_attempt(self) -> FailedAttempt | None:
        """For the rule that a digest which failed is not tried again at once."""
        if self.failed_ns is None:
            return None
        return FailedAttempt(self.id, self.digest, self.failed_ns, self.cooldown_ns, self.cleared)

    def standing(self) -> Standing:
        """How it ended. Nobody works on it any more."""
        machine = self.document.get("machine", {})
        candidate = str(machine.get("spec", {}).get("candidate", ""))
        return Standing(self.name, candidate, State(self.state), str(machine.get("reason", "")), True)


class RolloutStore:
    """The rollouts of one state folder. Methods raise StoreError, and then nothing was written."""

    def __init__(self, store: Store, audit: AuditLog) -> None:
        self._store = store
        self._audit = audit

    def all(self) -> list[StoredRollout]:
        """Every rollout, oldest first. Of one that is damaged the rest is known, and the others are not concerned."""
        with self._store.reading() as connection:
            return [_parsed(row) for row in connection.execute(_ROWS + " ORDER BY began_ns, id")]

    def save(self, rollout: StoredRollout, events: Sequence[AuditEvent] = ()) -> None:
        """Write a rollout down, and with it what is to be said of it in the audit: both or neither."""
        with self._store.transaction() as connection:
            connection.execute(_WRITE, _columns(rollout))
            for event in events:
                self._audit.append(connection, event)

    def note(self, event: AuditEvent) -> None:
        """Say something in the audit that changes no rollout."""
        with self._store.transaction() as connection:
            self._audit.append(connection, event)

    def clear(self, rollout_id: str, actor: str, reason: str) -> None:
        """Let what was tried in a rollout that has ended be tried again. Raises NotFound."""
        with self._store.transaction() as connection:
            changed = connection.execute(
                "UPDATE rollout_state SET cleared = 1 WHERE id = ? AND NOT open", (rollout_id,)
            )
            if not changed.rowcount:
                raise NotFound(f"there is no rollout '{rollout_id[:128]}' that has ended")
            self._audit.append(connection, AuditEvent(actor, "rollout.cleared", rollout_id, {"reason": reason}))

    def setter(self, model: str, alias: str) -> str:
        """Who pointed an alias of the registry where it is, by the audit; "" when that cannot be told."""
        with self._store.reading() as connection:
            row = connection.execute(_SETTER, {"model": model, "alias": alias}).fetchone()
        return "" if row is None else str(row[0])


def _columns(rollout: StoredRollout) -> _Columns:
    document = json.dumps(dict(rollout.document), separators=(",", ":"))
    return (
        rollout.id, rollout.name, rollout.template, rollout.digest, rollout.began_ns, rollout.state, rollout.failed_ns,
        rollout.cooldown_ns, int(rollout.cleared), int(rollout.open), document,
    )  # fmt: skip


def _parsed(row: Sequence[Any] | sqlite3.Row) -> StoredRollout:
    id_, name, template, digest, began_ns, state, failed_ns, cooldown_ns, cleared, open_, text = row
    document = _document(text)
    if not document or state not in _STATES:
        log.error("rollout_damaged", id=id_, name=name, state=state)
        state, document = state if state in _STATES else State.ABORTED.value, {}
    return StoredRollout(
        id_, name, template, digest, began_ns, state, failed_ns, cooldown_ns, bool(cleared), bool(open_), document
    )


def _document(text: Any) -> Mapping[str, Any]:
    """A document with a machine's state in it; nothing when that is not what it is."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return {}
    machine = found.get("machine") if isinstance(found, dict) else None
    sound = isinstance(machine, dict) and isinstance(machine.get("spec", {}), dict)
    return found if sound else {}
