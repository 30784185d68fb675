"""The outbox: events for other systems, written in the transaction of what they tell of, and who has them already.

An event is a CloudEvent 1.0 whose JSON never changes once it is written. Each sink it goes to has a delivery, which is
``pending``, ``leased`` to a dispatcher that is trying, ``delivered``, or ``dead`` after the last attempt. A lease ends
by itself, so the death of a dispatcher loses nothing: another one tries again. Hence **at least once**: a receiver may
see an event twice, always with the same id and the same idempotency key. Sending is the business of ``delivery``.

**Bounds.** At most ``max_pending`` events wait. A new one is then refused (``OutboxFull``) and counted: those that
wait were promised, and who is refused can still act. Settled events go when they are older than ``keep_delivered_s`` or
``keep_dead_s``, and in any case once ``max_kept`` newer ones were written. A key is known as long as its event is kept.

Times are Unix time, as leases outlive processes. A clock that was set back holds up no delivery for longer than its
sink's horizon: what is due later than that from now cannot have been planned by this clock, and is due.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal, TypeAlias

from server.audit import AuditEvent, AuditLog, utc_now
from server.errors import FailedPrecondition, InvalidArgument, NotFound, QueueFull
from server.store.base import Store

NS_PER_S: Final = 1_000_000_000
#: No delay and no lease may be longer.
HORIZON_S: Final = 24 * 3600.0
#: What every intermediary of CloudEvents has to forward; the bytes of the JSON.
MAX_EVENT_BYTES: Final = 64 * 1024
MAX_ERROR_CHARS: Final = 300

_SPEC_VERSION: Final = "1.0"
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
#: The key is also sent as the value of a header.
_KEY: Final = re.compile(r"[!-~]{1,255}", re.ASCII)
_TYPE: Final = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*", re.ASCII)
_EXTENSION: Final = re.compile(r"[a-z0-9]{1,20}", re.ASCII)
_UNPRINTED: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_OWN_ATTRIBUTES: Final = frozenset(
    {
        "specversion",
        "id",
        "source",
        "type",
        "subject",
        "time",
        "datacontenttype",
        "dataschema",
        "data",
        "idempotencykey",
    }
)

State: TypeAlias = Literal["pending", "leased", "delivered", "dead"]
STATES: Final[tuple[State, ...]] = ("pending", "leased", "delivered", "dead")


class OutboxFull(QueueFull):
    """As many events wait as may; this one was not written, and nothing else was."""


@dataclass(slots=True, frozen=True)
class Event:
    """Something that other systems may want to know of. Raises InvalidArgument for what no CloudEvent can be.

    ``type``: ``io.tidegate.alert.drift.raised``. ``source``: a URI reference to who says so, ``/models/fraud``.
    ``subject``: what it is about, ``fraud:7``. ``data``: any JSON object. ``key``: the idempotency key, ASCII without
    spaces; an event whose key is known is not written again. ``extensions``: further attributes, all text. ``time``:
    of what happened, RFC 3339.
    """

    type: str
    source: str
    subject: str
    key: str
    data: Mapping[str, object] = field(default_factory=dict)
    extensions: Mapping[str, str] = field(default_factory=dict)
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    time: str = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        _matching("type", self.type, _TYPE, "lower-case words with dots between, such as io.tidegate.rollout.promoted")
        _matching("key", self.key, _KEY, "1 to 255 ASCII characters without spaces")
        _matching("id", self.id, _ID, "1 to 64 letters, digits, '_' or '-'")
        for name, value in (("source", self.source), ("subject", self.subject), *self.extensions.items()):
            _attribute(name, value)
        for name in self.extensions:
            if not _EXTENSION.fullmatch(name) or name in _OWN_ATTRIBUTES:
                raise InvalidArgument(
                    f"an extension attribute of an event must be named by 1 to 20 lower-case letters or digits and "
                    f"not be one of CloudEvents' own, got {name[:64]!r}"
                )
        _timestamp(self.time)

    def body(self) -> str:
        """The event in CloudEvents' structured JSON. Raises InvalidArgument when ``data`` is no JSON or too much."""
        envelope = {
            "specversion": _SPEC_VERSION,
            "id": self.id,
            "source": self.source,
            "type": self.type,
            "subject": self.subject,
            "time": self.time,
            "datacontenttype": "application/json",
            "idempotencykey": self.key,
            **self.extensions,
            "data": dict(self.data),
        }
        try:
            text = json.dumps(envelope, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            size = len(text.encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidArgument(f"the data of event {self.type} is no JSON: {error}") from None
        if size > MAX_EVENT_BYTES:
            raise InvalidArgument(f"event {self.type} has {size} bytes, more than the {MAX_EVENT_BYTES} one may have")
        return text


@dataclass(slots=True, frozen=True)
class Message:
    """An event as it is sent. ``body``: its structured JSON in UTF-8, the same at every attempt.

    ``since_ns``: since when it is tried, which is since it was written or since an operator had it tried again.
    """

    id: str
    key: str
    type: str
    subject: str
    since_ns: int
    body: bytes


@dataclass(slots=True, frozen=True)
class Lease:
    """The right to try one delivery until ``until_ns``. ``attempts`` counts this one."""

    seq: int
    sink: str
    owner: str
    attempts: int
    until_ns: int
    message: Message


@dataclass(slots=True, frozen=True)
class Delivery:
    """One event on its way to one sink, for people. ``due_ns``: its next attempt, or the end of its lease.

    ``retried_ns``: when an operator had it tried again, 0 for never.
    """

    event_id: str
    sink: str
    state: State
    attempts: int
    due_ns: int
    lease_owner: str | None
    error: str
    key: str
    type: str
    subject: str
    created_ns: int
    retried_ns: int

    def as_dict(self) -> dict[str, object]:
        """The delivery as plain JSON values."""
        settled = self.state in ("delivered", "dead")
        return {
            "id": self.event_id,
            "sink": self.sink,
            "state": self.state,
            "attempts": self.attempts,
            "type": self.type,
            "subject": self.subject,
            "idempotency_key": self.key,
            "created": rfc3339(self.created_ns),
            "due": None if settled else rfc3339(self.due_ns),
            "lease_owner": self.lease_owner,
            "error": self.error,
        }


@dataclass(slots=True, frozen=True)
class Limits:
    """How much is kept, in events and seconds; the module says what happens at the end of it."""

    max_pending: int = 1000
    max_kept: int = 10_000
    keep_delivered_s: float = 7 * 24 * 3600.0
    keep_dead_s: float = 30 * 24 * 3600.0


#: The clock: Unix nanoseconds.
Clock: TypeAlias = Callable[[], int]
#: ``refusal(connection, event_id)``: why an event is not to be tried again, "" for no reason.
Refusal: TypeAlias = Callable[[sqlite3.Connection, str], str]

_OPEN: Final = "state IN ('pending', 'leased')"
_SETTLED: Final = f"NOT EXISTS (SELECT 1 FROM outbox_delivery d WHERE d.seq = outbox_event.seq AND d.{_OPEN})"  # noqa: S608
_JOINED: Final = "FROM outbox_delivery d JOIN outbox_event e USING (seq)"
_INSERT: Final = """
    INSERT INTO outbox_event (id, idempotency_key, type, subject, body, created_ns) VALUES (?, ?, ?, ?, ?, ?)
"""
_FORGET: Final = f"DELETE FROM outbox_event WHERE seq <= ? AND {_SETTLED}"  # noqa: S608
_FORGET_OLD: Final = f"""
    DELETE FROM outbox_event WHERE created_ns < ? AND {_SETTLED} AND NOT EXISTS (
        SELECT 1 FROM outbox_delivery d WHERE d.seq = outbox_event.seq
            AND d.settled_ns >= CASE d.state WHEN 'dead' THEN ? ELSE ? END)
"""  # noqa: S608
_WAITING: Final = f"SELECT count(DISTINCT seq) FROM outbox_delivery WHERE {_OPEN}"  # noqa: S608
_DUE: Final = f"""
    SELECT d.seq, d.attempts, e.id, e.idempotency_key, e.type, e.subject, coalesce(d.retried_ns, e.created_ns), e.body,
        d.error {_JOINED}
    WHERE d.sink = :sink AND d.{_OPEN} AND (d.due_ns <= :now OR d.due_ns > :horizon) ORDER BY d.due_ns LIMIT 1
"""
_NEXT_DUE: Final = f"SELECT min(due_ns), max(due_ns) FROM outbox_delivery WHERE sink = ? AND {_OPEN}"  # noqa: S608
_LIST: Final = f"""
    SELECT e.id, d.sink, d.state, d.attempts, d.due_ns, d.lease_owner, d.error, e.idempotency_key, e.type, e.subject,
        e.created_ns, coalesce(d.retried_ns, 0) {_JOINED}
"""
_CENSUS: Final = f"""
    SELECT sink, state, count(*) FROM outbox_delivery WHERE {_OPEN} GROUP BY sink, state
    UNION ALL SELECT sink, 'dead', count(*) FROM outbox_delivery WHERE state = 'dead' GROUP BY sink
"""  # noqa: S608
_HELD: Final = "seq = ? AND sink = ? AND lease_owner = ? AND attempts = ?"
_PUT_BACK: Final = f"""
    UPDATE outbox_delivery SET state = 'pending', due_ns = ?, lease_owner = NULL, error = ? WHERE {_HELD}
"""  # noqa: S608


class Outbox:
    """The events of one store. ``sinks``: where an event goes that says nothing else. Safe from any thread.

    Every method but ``put`` waits for the disk, so it is called off the event loop, and raises StoreError; then
    nothing was written.
    """

    def __init__(
        self,
        store: Store,
        audit: AuditLog,
        *,
        sinks: Sequence[str] = (),
        limits: Limits | None = None,
        clock: Clock = time.time_ns,
    ) -> None:
        self._store = store
        self._audit = audit
        self._sinks = tuple(sinks)
        self._limits = limits or Limits()
        self._clock = clock
        self._watchers: dict[object, Callable[[], None]] = {}
        #: Events refused because the outbox was full, in the life of this object.
        self.refused = 0

    # -- events come in -------------------------------------------------------------------------------------------

    def put(self, connection: sqlite3.Connection, event: Event, sinks: Sequence[str] | None = None) -> bool:
        """Write ``event`` in the caller's write transaction, to be sent to ``sinks``; False when its key is known.

        Raises OutboxFull, with nothing written: the caller may catch it inside the transaction and go on.
        """
        names = self._sinks if sinks is None else tuple(dict.fromkeys(sinks))
        if not names:
            raise InvalidArgument(f"event {event.type} names no sink to go to")
        body, now = event.body(), self._clock()
        if _known(connection, event.key):
            return False
        self._check_room(connection)
        row = (event.id, event.key, event.type, event.subject, body, now)
        seq = connection.execute(_INSERT, row).lastrowid or 0
        connection.executemany(
            "INSERT INTO outbox_delivery (seq, sink, state, due_ns) VALUES (?, ?, 'pending', ?)",
            [(seq, name, now) for name in names],
        )
        connection.execute(_FORGET, (seq - self._limits.max_kept,))
        self._tell()
        return True

    def publish(self, event: Event, sinks: Sequence[str] | None = None) -> bool:
        """``put`` in a transaction of its own."""
        with self._store.transaction() as connection:
            return self.put(connection, event, sinks)

    def watch(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` whenever an event is put; returns the way out.

        The call comes before the commit, on the putting thread. Who then asks for a lease waits for that thread's
        turn to write to end, and so sees the event if it was committed.
        """
        ticket = object()
        self._watchers[ticket] = callback

        def leave() -> None:
            self._watchers.pop(ticket, None)

        return leave

    def _tell(self) -> None:
        for callback in tuple(self._watchers.values()):
            callback()

    def _check_room(self, connection: sqlite3.Connection) -> None:
        waiting = int(connection.execute(_WAITING).fetchone()[0])
        if waiting >= self._limits.max_pending:
            self.refused += 1
            raise OutboxFull(f"{waiting} events wait to be delivered, as many as may; no more is taken")

    # -- deliveries -----------------------------------------------------------------------------------------------

    def claim(
        self, sink: str, owner: str, lease_s: float, *, max_attempts: int, horizon_s: float = HORIZON_S
    ) -> Lease | None:
        """The delivery to ``sink`` that has been due longest, leased to ``owner``; None when none is due.

        ``horizon_s``: longer than any lease and any delay of this sink, by as much as a clock may be set back without
        a lease looking foreign.

        The attempt counts from now on, so that an event that kills whoever sends it comes to its end too: a delivery
        that has had its last attempt without an outcome is dead.
        """
        with self._store.transaction() as connection:
            now = self._clock()
            until = _after(now, lease_s)
            due = {"sink": sink, "now": now, "horizon": _after(now, horizon_s)}
            while (row := connection.execute(_DUE, due).fetchone()) is not None:
                seq, attempts, event_id, key, kind, subject, since_ns, body, error = row
                if attempts >= max_attempts:
                    self._bury(connection, seq, sink, f"no attempt is left; the last one: {error or 'no outcome'}", now)
                    continue
                connection.execute(
                    "UPDATE outbox_delivery SET state = 'leased', attempts = ?, due_ns = ?, lease_owner = ? "
                    "WHERE seq = ? AND sink = ?",
                    (attempts + 1, until, owner, seq, sink),
                )
                message = Message(event_id, key, kind, subject, since_ns, body.encode())
                return Lease(seq, sink, owner, attempts + 1, until, message)
        return None

    def next_due_s(self, sink: str, *, horizon_s: float = HORIZON_S) -> float | None:
        """Seconds until something for ``sink`` is due, 0 when something is; None when nothing waits. Never writes."""
        with self._store.reading() as connection:
            first, last = connection.execute(_NEXT_DUE, (sink,)).fetchone()
        if first is None:
            return None
        now = self._clock()
        return 0.0 if last > _after(now, horizon_s) else max(0.0, (first - now) / NS_PER_S)

    def lease_owners(self) -> list[str]:
        """Who holds leases. Never writes."""
        with self._store.reading() as connection:
            query = "SELECT DISTINCT lease_owner FROM outbox_delivery WHERE state = 'leased'"
            return [owner for (owner,) in connection.execute(query)]

    def end_leases(self, owner: str) -> None:
        """What ``owner`` has leased is due now: it has died. The attempts stay counted."""
        with self._store.transaction() as connection:
            connection.execute(
                "UPDATE outbox_delivery SET state = 'pending', due_ns = ?, lease_owner = NULL "
                "WHERE state = 'leased' AND lease_owner = ?",
                (self._clock(), owner),
            )

    def delivered(self, lease: Lease) -> None:
        """The sink has it. True of the event whoever holds the lease by now."""
        with self._store.transaction() as connection:
            connection.execute(
                "UPDATE outbox_delivery SET state = 'delivered', settled_ns = ?, lease_owner = NULL, error = '' "
                "WHERE seq = ? AND sink = ? AND state <> 'delivered'",
                (self._clock(), lease.seq, lease.sink),
            )

    def failed(self, lease: Lease, error: str, delay_s: float) -> None:
        """The attempt failed; the next one is due after ``delay_s``. Nothing happens when the lease was lost."""
        with self._store.transaction() as connection:
            due = _after(self._clock(), min(delay_s, HORIZON_S))
            connection.execute(_PUT_BACK, (due, _brief(error), *_held(lease)))

    def dead(self, lease: Lease, error: str) -> bool:
        """No further attempt (audited as ``hook.dead``). False, and nothing happens, when the lease was lost."""
        query = f"SELECT 1 FROM outbox_delivery WHERE {_HELD}"  # noqa: S608
        with self._store.transaction() as connection:
            held = connection.execute(query, _held(lease)).fetchone() is not None
            if held:
                self._bury(connection, lease.seq, lease.sink, _brief(error), self._clock())
        return held

    def retry(self, event_id: str | None, *, actor: str, refusal: Refusal = lambda _connection, _event_id: "") -> int:
        """Make the deliveries of one event, or of all events that have dead ones, due now; attempts count anew.

        Of one event those in back-off are meant too; what is leased or delivered stays as it is. Audited as
        ``hook.retried``. Returns how many there were; raises NotFound when there is no such event.

        ``refusal`` is asked of each event whose dead deliveries are meant, in the transaction: of one event it is
        raised as FailedPrecondition, of all events those are left out.
        """
        wanted = "d.state = 'dead'" if event_id is None else "e.id = ? AND d.state IN ('dead', 'pending')"
        query = f"SELECT d.seq, d.sink, e.id, d.state {_JOINED} WHERE {wanted} ORDER BY d.seq DESC, d.sink"
        with self._store.transaction() as connection:
            if event_id is not None:
                _check_known(connection, event_id)
            found = connection.execute(query, () if event_id is None else (event_id,)).fetchall()
            count = 0
            for seq, sink, known_id, state in found:
                if state == "dead" and (why := refusal(connection, known_id)):
                    if event_id is not None:
                        raise FailedPrecondition(f"event {known_id} is not tried again: {why}")
                    continue
                count += 1
                self._revive(connection, seq, sink)
                self._audit.append(connection, AuditEvent(actor, "hook.retried", f"hook:{known_id}", {"sink": sink}))
        return count

    def list(self, limit: int, *, state: State | None = None, event_id: str | None = None) -> list[Delivery]:
        """The newest ``limit`` deliveries, newest first, of one state or event where one is given."""
        tests = {"d.state = ?": state, "e.id = ?": event_id}
        given = {test: value for test, value in tests.items() if value is not None}
        where = f" WHERE {' AND '.join(given)}" if given else ""
        with self._store.reading() as connection:
            query = f"{_LIST}{where} ORDER BY d.seq DESC, d.sink LIMIT ?"
            return [Delivery(*row) for row in connection.execute(query, (*given.values(), limit))]

    def census(self) -> dict[tuple[str, State], int]:
        """(sink, state) -> deliveries, for those that are pending, leased or dead. Never writes."""
        with self._store.reading() as connection:
            return {(sink, state): count for sink, state, count in connection.execute(_CENSUS)}

    def tidy(self, sinks: Sequence[str]) -> None:
        """Let settled events go that are old enough, and bury what has been due for a day to none of ``sinks``.

        What is due to a sink that the configuration no longer has would otherwise fill the outbox for ever.
        """
        marks = ", ".join("?" * len(sinks))
        orphans = f"SELECT seq, sink FROM outbox_delivery WHERE {_OPEN} AND sink NOT IN ({marks}) AND due_ns < ?"  # noqa: S608
        with self._store.transaction() as connection:
            now = self._clock()
            abandoned = connection.execute(orphans, (*sinks, now - int(HORIZON_S * NS_PER_S))).fetchall()
            for seq, sink in abandoned:
                self._bury(connection, seq, sink, "nobody has a sink of this name", now)
            delivered = now - int(self._limits.keep_delivered_s * NS_PER_S)
            dead = now - int(self._limits.keep_dead_s * NS_PER_S)
            connection.execute(_FORGET_OLD, (max(delivered, dead), dead, delivered))

    # -- within a transaction -------------------------------------------------------------------------------------

    def _bury(self, connection: sqlite3.Connection, seq: int, sink: str, error: str, now: int) -> None:
        connection.execute(
            "UPDATE outbox_delivery SET state = 'dead', settled_ns = ?, lease_owner = NULL, error = ? "
            "WHERE seq = ? AND sink = ?",
            (now, error, seq, sink),
        )
        query = f"SELECT e.id, e.type, e.subject, d.attempts {_JOINED} WHERE d.seq = ? AND d.sink = ?"
        row = connection.execute(query, (seq, sink)).fetchone()
        event_id, kind, subject, attempts = row
        detail = {"sink": sink, "type": kind, "subject": subject, "attempts": attempts, "error": error}
        self._audit.append(connection, AuditEvent("tidegate", "hook.dead", f"hook:{event_id}", detail))

    def _revive(self, connection: sqlite3.Connection, seq: int, sink: str) -> None:
        now = self._clock()
        connection.execute(
            "UPDATE outbox_delivery SET state = 'pending', attempts = 0, due_ns = ?, retried_ns = ?, settled_ns = NULL "
            "WHERE seq = ? AND sink = ?",
            (now, now, seq, sink),
        )


def is_under_way(connection: sqlite3.Connection, event_id: str) -> bool:
    """Whether an event is still to come to a sink."""
    query = f"SELECT 1 {_JOINED} WHERE e.id = ? AND d.{_OPEN}"
    return connection.execute(query, (event_id,)).fetchone() is not None


def rfc3339(unix_ns: int) -> str:
    """A Unix time as RFC 3339 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_ns // NS_PER_S))


def _known(connection: sqlite3.Connection, key: str) -> bool:
    query = "SELECT 1 FROM outbox_event WHERE idempotency_key = ?"
    return connection.execute(query, (key,)).fetchone() is not None


def _check_known(connection: sqlite3.Connection, event_id: str) -> None:
    if connection.execute("SELECT 1 FROM outbox_event WHERE id = ?", (event_id,)).fetchone() is None:
        raise NotFound(f"there is no event {event_id[:64]!r} in the outbox")


def _after(now: int, delay_s: float) -> int:
    return now + int(delay_s * NS_PER_S)


def _held(lease: Lease) -> tuple[int, str, str, int]:
    return lease.seq, lease.sink, lease.owner, lease.attempts


def _brief(error: str) -> str:
    """An error on one line, short, and fit for a UTF-8 file."""
    return _UNPRINTED.sub(" ", error)[:MAX_ERROR_CHARS]


def _matching(name: str, value: object, pattern: re.Pattern[str], wanted: str) -> None:
    if not isinstance(value, str) or len(value) > 255 or not pattern.fullmatch(value):
        raise InvalidArgument(f"the {name} of an event must be {wanted}; got {str(value)[:64]!r}")


def _attribute(name: str, value: object) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= 1024 or _UNPRINTED.search(value):
        raise InvalidArgument(
            f"attribute {name[:64]} of an event must be 1 to 1024 printable characters, got {str(value)[:64]!r}"
        )


def _timestamp(value: object) -> None:
    try:
        aware = isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        aware = False
    if not aware:
        raise InvalidArgument(f"the time of an event must be RFC 3339 with an offset, got {str(value)[:64]!r}")
