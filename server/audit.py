"""The audit trail: who did what to what, in rows that are only ever appended, each chained to the one before.

A row is written in the same transaction as what it records, so that neither exists without the other. Its hash covers
the hash before it, so that ``verify`` finds the first row that was changed, taken out or put in. The chain is no
secret: who can write the file *and* knows this module can forge a whole new one. Keep ``head()`` elsewhere (a log, a
ticket) and hand it to ``verify`` to notice that too.

Acts that must not wait for the disk (rollback, hold, abort) go through ``DeferredAudit``.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, TypeAlias

import structlog

from server.errors import InvalidArgument
from server.store.base import Store, StoreError

log = structlog.get_logger("audit")

#: Events written in one transaction by ``DeferredAudit``.
_BATCH: Final = 256
#: Waits of ``DeferredAudit`` after a failure: the first, doubled up to the last, in seconds.
_BACKOFF_S: Final = (0.1, 5.0)


def utc_now() -> str:
    """The time as RFC 3339 in UTC with microseconds: texts sort as the times do."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(slots=True, frozen=True)
class AuditEvent:
    """One thing that happened: ``actor`` did ``action`` (``registry.promote``) to ``subject`` (``fraud:7``).

    ``detail`` is any JSON object; raises InvalidArgument when it is none. ``ts`` is the time of the act, which for a
    deferred event is before the time of writing.
    """

    actor: str
    action: str
    subject: str
    detail: Mapping[str, object] = field(default_factory=dict)
    ts: str = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        _canonical(self.detail)


@dataclass(slots=True, frozen=True)
class AuditRow:
    """An event as it stands in the trail."""

    seq: int
    event: AuditEvent
    hash: str

    def as_dict(self) -> dict[str, object]:
        """The row as plain JSON values."""
        event = self.event
        return {
            "seq": self.seq,
            "ts": event.ts,
            "actor": event.actor,
            "action": event.action,
            "subject": event.subject,
            "detail": dict(event.detail),
            "hash": self.hash,
        }


@dataclass(slots=True, frozen=True)
class AuditHead:
    """The end of the chain: the number and hash of its last row (0 and "" when it is empty)."""

    seq: int
    hash: str


@dataclass(slots=True, frozen=True)
class Verified:
    """The whole chain holds."""

    head: AuditHead


@dataclass(slots=True, frozen=True)
class Broken:
    """The first row that is not what was written, and what is wrong with it."""

    seq: int
    reason: str


#: seq, ts, actor, action, subject, detail, prev_hash, hash
_Columns: TypeAlias = tuple[int, str, str, str, str, str, str, str]
_ROWS: Final = "SELECT seq, ts, actor, action, subject, detail, prev_hash, hash FROM audit"


class AuditLog:
    """The trail in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def append(self, connection: sqlite3.Connection, event: AuditEvent) -> AuditHead:
        """Write ``event`` as the next row, in the caller's transaction. Returns the new head."""
        head = _head(connection)
        seq, texts = head.seq + 1, _texts(event)
        row_hash = _row_hash(head.hash, seq, *texts)
        row = (seq, *texts, head.hash, row_hash)
        connection.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        connection.execute("UPDATE audit_head SET seq = ?, hash = ?", (seq, row_hash))
        return AuditHead(seq, row_hash)

    def journal(
        self, connection: sqlite3.Connection, action: str, subject: str, detail: Mapping[str, object], actor: str
    ) -> None:
        """``append`` in the form that the registry is handed: it knows no class of ours."""
        self.append(connection, AuditEvent(actor, action, subject, detail))

    def record(self, event: AuditEvent) -> AuditHead:
        """Write ``event`` in a transaction of its own. Raises StoreError."""
        with self._store.transaction() as connection:
            return self.append(connection, event)

    def tail(self, limit: int, *, after: int | None = None) -> list[AuditRow]:
        """The last ``limit`` rows, or the first ``limit`` rows after number ``after``; oldest first."""
        with self._store.reading() as connection:
            if after is None:
                query = _ROWS + " ORDER BY seq DESC LIMIT ?"
                return [_parsed(row) for row in reversed(connection.execute(query, (limit,)).fetchall())]
            query = _ROWS + " WHERE seq > ? ORDER BY seq LIMIT ?"
            return [_parsed(row) for row in connection.execute(query, (after, limit))]

    def head(self) -> AuditHead:
        """The end of the chain, to be kept elsewhere and handed to ``verify`` one day."""
        with self._store.reading() as connection:
            return _head(connection)

    def verify(self, known: AuditHead | None = None) -> Verified | Broken:
        """Check every row against the one before, the end against the head, and against a ``known`` earlier head."""
        with self._store.reading() as connection:
            rows = connection.execute(_ROWS + " ORDER BY seq")
            return _verify(rows, _stored_head(connection), known or AuditHead(0, ""))


def _verify(rows: Iterator[_Columns], head: AuditHead | None, known: AuditHead) -> Verified | Broken:
    last = AuditHead(0, "")
    for row in rows:
        reason = _fault(row, last)
        if reason:
            return Broken(last.seq + 1, reason)
        last = AuditHead(row[0], row[-1])
        if last.seq == known.seq and last != known:
            return Broken(last.seq, "the row is whole but not the one whose hash is known")
    if head is None:
        return Broken(last.seq + 1, "the head of the chain is missing, so rows may be missing at its end")
    if head.seq > last.seq or known.seq > last.seq:
        return Broken(last.seq + 1, f"the row is missing; the chain once went up to row {max(head.seq, known.seq)}")
    if head != last:
        return Broken(last.seq, f"the row lies after the head of the chain, row {head.seq}, or has another hash")
    return Verified(last)


def _fault(row: _Columns, last: AuditHead) -> str:
    """What is wrong with ``row`` as the successor of ``last``; "" when nothing is."""
    seq, *texts = row
    if seq != last.seq + 1:
        return f"the row is missing; the next one is row {seq}"
    if not all(isinstance(text, str) for text in texts):
        return "the row holds a value that is no text"
    if row[6] != last.hash:
        return "the row does not follow the one before: its prev_hash is another row's"
    if row[7] != _row_hash(*_chained(row)):
        return "the row was changed: its hash does not fit its contents"
    return ""


def _chained(row: _Columns) -> tuple[str, int, str, str, str, str, str]:
    seq, ts, actor, action, subject, detail, prev_hash, _ = row
    return prev_hash, seq, ts, actor, action, subject, detail


def _row_hash(prev_hash: str, seq: int, ts: str, actor: str, action: str, subject: str, detail: str) -> str:
    """SHA-256 (hex) over the hash before and the canonical JSON of the row, in which ``detail`` is a text."""
    row = {"seq": seq, "ts": ts, "actor": actor, "action": action, "subject": subject, "detail": detail}
    return hashlib.sha256((prev_hash + _canonical(row)).encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(value: Mapping[str, object]) -> str:
    try:
        return json.dumps(dict(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"the detail of an audit event must be a JSON object: {error}") from error


def _texts(event: AuditEvent) -> tuple[str, str, str, str, str]:
    detail = _canonical(event.detail)
    return (
        _storable(event.ts),
        _storable(event.actor),
        _storable(event.action),
        _storable(event.subject),
        _storable(detail),
    )


def _storable(text: str) -> str:
    """Lone surrogates, which no UTF-8 file can hold, are shown by their code: an event is never lost to its text."""
    return text.encode("utf-8", "backslashreplace").decode()


def _parsed(row: _Columns) -> AuditRow:
    """A row for showing. One whose detail was damaged is shown as it is: finding out is the task of ``verify``."""
    try:
        event = AuditEvent(row[2], row[3], row[4], json.loads(row[5]), row[1])
    except (InvalidArgument, ValueError, TypeError, RecursionError):
        event = AuditEvent(row[2], row[3], row[4], {"damaged": str(row[5])}, row[1])
    return AuditRow(row[0], event, row[7])


def _stored_head(connection: sqlite3.Connection) -> AuditHead | None:
    row = connection.execute("SELECT seq, hash FROM audit_head").fetchone()
    return None if row is None else AuditHead(row[0], row[1])


def _head(connection: sqlite3.Connection) -> AuditHead:
    head = _stored_head(connection)
    if head is None:
        raise StoreError("the audit trail has lost its head; see `tidegate audit verify`")
    return head


class DeferredAudit:
    """Takes events without waiting and has a thread write them, in order, however long the disk refuses.

    At most ``capacity`` events wait. When that many do, a new one is dropped, counted and logged, and once the disk
    is back the trail itself says how many are missing (``audit.dropped``): the first events of an incident tell more
    than the last. Events that wait are lost with the process, which is the price of not waiting.
    """

    def __init__(self, audit: AuditLog, store: Store, *, capacity: int = 10_000) -> None:
        self._audit = audit
        self._store = store
        self._capacity = capacity
        self._waiting: deque[AuditEvent] = deque()
        self._dropped = _Dropped()
        self._changed = threading.Condition()
        self._deadline: float | None = None  # of closing, by the monotonic clock
        self._thread = threading.Thread(target=self._run, name="tidegate-audit", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Events not on disk yet."""
        with self._changed:
            return len(self._waiting)

    @property
    def dropped(self) -> int:
        """Events that found no place, in the life of this object."""
        with self._changed:
            return self._dropped.total

    def record(self, event: AuditEvent) -> None:
        """Take ``event``. Never waits, never raises."""
        with self._changed:
            if self._deadline is None and len(self._waiting) < self._capacity:
                self._waiting.append(event)
                self._changed.notify_all()
                return
            self._dropped = self._dropped.and_one()
        log.error("audit_event_dropped", action=event.action, subject=event.subject, actor=event.actor, ts=event.ts)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is pending; False when the time was not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def close(self, timeout_s: float = 5.0) -> int:
        """Take nothing more and write what waits, for at most about ``timeout_s``. Returns how many were lost."""
        with self._changed:
            self._deadline = self._deadline or time.monotonic() + timeout_s
            self._changed.notify_all()
        self._thread.join(timeout_s)
        lost = self.pending
        if lost:
            log.error("audit_events_lost", events=lost)
        return lost

    def _run(self) -> None:
        pause, failing = _BACKOFF_S[0], False
        while self._wait_for_work():
            try:
                self._write()
            except Exception as error:
                if not failing:
                    log.error("audit_not_written", pending=self.pending, error=str(error), exc_info=error)
                failing = True
                self._sleep(pause)
                pause = min(2 * pause, _BACKOFF_S[1])
            else:
                if failing:
                    log.info("audit_written_again", pending=self.pending)
                pause, failing = _BACKOFF_S[0], False

    def _wait_for_work(self) -> bool:
        """True when there is something to write, False when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._dropped.unsaid or self._deadline is not None)
            has_work = bool(self._waiting or self._dropped.unsaid)
            return has_work and (self._deadline is None or time.monotonic() < self._deadline)

    def _sleep(self, pause_s: float) -> None:
        """Wait after a failure; closing cuts the wait short."""
        with self._changed:
            left_s = pause_s if self._deadline is None else min(pause_s, self._deadline - time.monotonic())
            closing = self._deadline is not None
            self._changed.wait_for(lambda: not closing and self._deadline is not None, max(0.0, left_s))

    def _write(self) -> None:
        """Write what waits, at most a batch, and then forget it: only this thread takes events out."""
        with self._changed:
            batch = [self._waiting[index] for index in range(min(_BATCH, len(self._waiting)))]
            whole = len(batch) == len(self._waiting)
            unsaid = self._dropped.unsaid if whole else 0
        with self._store.transaction() as connection:
            for event in batch:
                self._audit.append(connection, event)
            if unsaid:
                self._audit.append(connection, AuditEvent("tidegate", "audit.dropped", "", {"events": unsaid}))
        with self._changed:
            for _ in batch:
                self._waiting.popleft()
            self._dropped = self._dropped.said(unsaid)
            self._changed.notify_all()


@dataclass(slots=True, frozen=True)
class _Dropped:
    """How many events were dropped, and of how many the trail does not know yet."""

    total: int = 0
    unsaid: int = 0

    def and_one(self) -> _Dropped:
        return _Dropped(self.total + 1, self.unsaid + 1)

    def said(self, events: int) -> _Dropped:
        return _Dropped(self.total, self.unsaid - events)
