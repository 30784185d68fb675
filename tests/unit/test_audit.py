"""The audit trail: chained, guarded, verified row by row; deferred events wait for the disk and keep their order."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest

from server.audit import AuditEvent, AuditHead, AuditLog, Broken, DeferredAudit, Verified
from server.errors import InvalidArgument
from server.store.base import StoreError
from server.store.sqlite import SqliteStore, put_meta


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with closing(SqliteStore(tmp_path / "tidegate.db")) as store:
        yield store


@pytest.fixture
def audit(store: SqliteStore) -> AuditLog:
    return AuditLog(store)


def event(number: int) -> AuditEvent:
    return AuditEvent("alice", "test.act", f"m:{number}", {"number": number})


def tamper(store: SqliteStore, *statements: str) -> None:
    """Change rows behind the triggers' backs."""
    with closing(sqlite3.connect(store.path)) as raw:
        for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            raw.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            raw.execute(statement)
        raw.commit()


def test_empty_trail(audit: AuditLog) -> None:
    assert audit.verify() == Verified(AuditHead(0, ""))
    assert audit.tail(10) == []


def test_rows_come_back_in_order(audit: AuditLog) -> None:
    events = [event(number) for number in range(1, 8)]
    heads = [audit.record(each) for each in events]
    assert [head.seq for head in heads] == [1, 2, 3, 4, 5, 6, 7]
    assert [row.event for row in audit.tail(100)] == events
    assert [row.seq for row in audit.tail(3)] == [5, 6, 7]
    assert [row.seq for row in audit.tail(3, after=2)] == [3, 4, 5]
    assert [row.seq for row in audit.tail(3, after=7)] == []
    assert audit.tail(1)[0].hash == heads[-1].hash
    assert audit.head() == heads[-1]
    assert audit.verify() == Verified(heads[-1])


def test_the_hash_is_the_documented_one(audit: AuditLog) -> None:
    first = audit.record(AuditEvent("al", "do", "it", {"b": 1, "a": "é"}, "2026-01-02T03:04:05.000006Z"))
    detail = '{"a":"é","b":1}'
    row = {"seq": 1, "ts": "2026-01-02T03:04:05.000006Z", "actor": "al", "action": "do", "subject": "it"}
    text = json.dumps({**row, "detail": detail}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert first.hash == hashlib.sha256(text.encode()).hexdigest()


def append_and_fail(store: SqliteStore, audit: AuditLog) -> None:
    with store.transaction() as connection:
        audit.append(connection, event(1))
        raise KeyError


def test_an_event_goes_with_its_transaction(store: SqliteStore, audit: AuditLog) -> None:
    with pytest.raises(KeyError):
        append_and_fail(store, audit)
    with store.transaction() as connection:
        put_meta(connection, "k", "v")
        audit.journal(connection, "test.act", "m:2", {"x": [1]}, "bob")
        audit.append(connection, event(3))
    assert [(row.seq, row.event.subject) for row in audit.tail(9)] == [(1, "m:2"), (2, "m:3")]
    assert isinstance(audit.verify(), Verified)


@pytest.mark.parametrize("detail", [{"x": float("nan")}, {"x": object()}, {"x": float("inf")}, {"x": b""}])
def test_a_detail_that_is_no_json_is_refused(detail: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match="detail of an audit event"):
        AuditEvent("a", "b", "c", detail)


def test_text_that_is_no_utf8_is_kept_readable(audit: AuditLog) -> None:
    audit.record(AuditEvent("a\udcff", "b", "c", {"path": "x\ud800"}))
    (row,) = audit.tail(1)
    assert row.event.actor == "a\\udcff"
    assert isinstance(audit.verify(), Verified)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET actor = 'eve' WHERE seq = 2",
        "DELETE FROM audit WHERE seq = 3",
        "DELETE FROM audit",
        "INSERT OR REPLACE INTO audit SELECT 2, ts, 'eve', action, '', '{}', prev_hash, hash FROM audit WHERE seq = 2",
        "INSERT INTO audit SELECT 9, ts, actor, action, subject, detail, hash, hash FROM audit WHERE seq = 3",
        "INSERT INTO audit SELECT 4, ts, actor, action, subject, detail, prev_hash, hash FROM audit WHERE seq = 3",
        "UPDATE audit_head SET seq = 2",
        "UPDATE audit_head SET seq = 4",
        "DELETE FROM audit_head",
        "INSERT OR REPLACE INTO audit_head VALUES (1, 0, '')",
    ],
)
def test_the_database_itself_refuses_changes(store: SqliteStore, audit: AuditLog, statement: str) -> None:
    for number in (1, 2, 3):
        audit.record(event(number))
    with closing(sqlite3.connect(store.path)) as raw, pytest.raises(sqlite3.IntegrityError):
        raw.execute(statement)
    assert audit.verify() == Verified(audit.head())


@pytest.mark.parametrize(
    ("statement", "seq", "reason"),
    [
        ("UPDATE audit SET actor = 'eve' WHERE seq = 3", 3, "was changed"),
        ("UPDATE audit SET detail = '{}' WHERE seq = 1", 1, "was changed"),
        ("UPDATE audit SET ts = x'00' WHERE seq = 4", 4, "no text"),
        ("UPDATE audit SET hash = prev_hash WHERE seq = 2", 2, "was changed"),
        ("DELETE FROM audit WHERE seq = 2", 2, "missing"),
        ("DELETE FROM audit WHERE seq IN (1, 2)", 1, "missing"),
        ("DELETE FROM audit WHERE seq > 3", 4, "missing; the chain once went up to row 5"),
        ("DELETE FROM audit", 1, "missing"),
        (
            "UPDATE audit SET seq = -seq WHERE seq > 3; UPDATE audit SET seq = 9 + seq WHERE seq < 0",
            4,
            "does not follow",
        ),
        ("DELETE FROM audit_head", 6, "head of the chain is missing"),
        ("UPDATE audit_head SET seq = 4", 5, "after the head"),
        ("UPDATE audit_head SET hash = 'x'", 5, "another hash"),
    ],
)
def test_the_first_broken_row_is_named(
    store: SqliteStore, audit: AuditLog, statement: str, seq: int, reason: str
) -> None:
    for number in range(1, 6):
        audit.record(event(number))
    tamper(store, *statement.split("; "))
    found = audit.verify()
    assert isinstance(found, Broken)
    assert found.seq == seq
    assert reason in found.reason


def test_a_whole_chain_that_was_forged_is_found_by_a_known_head(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "a.db")) as store:
        audit = AuditLog(store)
        heads = [audit.record(event(number)) for number in range(1, 6)]
        assert audit.verify(heads[2]) == Verified(heads[4])
    with closing(SqliteStore(tmp_path / "b.db")) as store:
        forged = AuditLog(store)
        for number in (1, 2):
            forged.record(event(number))
        assert forged.verify(heads[2]) == Broken(3, "the row is missing; the chain once went up to row 3")
        forged.record(event(4))
        found = forged.verify(heads[2])
        assert isinstance(found, Broken)
        assert (found.seq, "not the one" in found.reason) == (3, True)


@pytest.mark.parametrize("detail", ["not json", "[1]", '{"x": NaN}', "[" * 100_000])
def test_a_damaged_row_can_still_be_shown(store: SqliteStore, audit: AuditLog, detail: str) -> None:
    audit.record(event(1))
    tamper(store, "UPDATE audit SET detail = '" + detail + "'")  # noqa: S608  the texts stand above
    (row,) = audit.tail(5)
    assert row.event.detail == {"damaged": detail}


def test_a_trail_without_head_is_not_written_on(store: SqliteStore, audit: AuditLog) -> None:
    tamper(store, "DELETE FROM audit_head")
    with pytest.raises(StoreError, match="lost its head"):
        audit.record(event(1))


# --- deferred ---


class Valve:
    """A store whose transactions fail while it is shut, as those of a full disk do, or wait while it is held."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self.shut = False
        self.tried = threading.Semaphore(0)
        self.free = threading.Event()
        self.free.set()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        self.tried.release()
        assert self.free.wait(20)
        if self.shut:
            raise StoreError("no space is left on the disk")
        with self._store.transaction() as connection:
            yield connection

    def reading(self) -> AbstractContextManager[sqlite3.Connection]:
        return self._store.reading()

    def close(self) -> None:
        self._store.close()


Deferred = Callable[..., DeferredAudit]


@pytest.fixture
def valve(store: SqliteStore) -> Valve:
    return Valve(store)


@pytest.fixture
def deferred(valve: Valve, audit: AuditLog) -> Iterator[Deferred]:
    made: list[DeferredAudit] = []

    def make(**options: int) -> DeferredAudit:
        made.append(DeferredAudit(audit, valve, **options))
        return made[-1]

    yield make
    valve.shut = False
    valve.free.set()
    for each in made:
        each.close()


def subjects(audit: AuditLog) -> list[str]:
    return [row.event.subject for row in audit.tail(10_000)]


def test_deferred_events_are_written_in_order(deferred: Deferred, audit: AuditLog) -> None:
    queue = deferred()
    for number in range(700):  # more than go into one transaction
        queue.record(event(number))
    assert queue.flush(20)
    assert queue.pending == 0
    assert subjects(audit) == [f"m:{number}" for number in range(700)]
    assert isinstance(audit.verify(), Verified)


def test_a_disk_that_refuses_is_waited_for(deferred: Deferred, valve: Valve, audit: AuditLog) -> None:
    queue = deferred()
    valve.shut = True
    queue.record(event(1))
    assert valve.tried.acquire(timeout=20)
    assert valve.tried.acquire(timeout=20)
    queue.record(event(2))
    assert queue.pending == 2
    assert subjects(audit) == []
    valve.shut = False
    assert queue.flush(20)
    assert subjects(audit) == ["m:1", "m:2"]
    assert [row.event.ts for row in audit.tail(9)] == sorted(row.event.ts for row in audit.tail(9))


def test_a_hanging_disk_holds_nobody_up(deferred: Deferred, valve: Valve) -> None:
    queue = deferred()
    valve.free.clear()
    queue.record(event(1))
    assert valve.tried.acquire(timeout=20)
    queue.record(event(2))  # returns, though the writer hangs
    assert queue.pending == 2
    assert not queue.flush(0.01)


def test_a_full_queue_drops_the_newest_and_the_trail_says_so(deferred: Deferred, valve: Valve, audit: AuditLog) -> None:
    queue = deferred(capacity=3)
    valve.shut = True
    for number in range(1, 8):
        queue.record(event(number))
    assert (queue.pending, queue.dropped) == (3, 4)
    valve.shut = False
    assert queue.flush(20)
    queue.record(event(8))
    assert queue.flush(20)
    assert subjects(audit) == ["m:1", "m:2", "m:3", "", "m:8"]
    (gap,) = [row.event for row in audit.tail(9) if row.event.action == "audit.dropped"]
    assert gap.detail == {"events": 4}
    assert queue.dropped == 4


def test_closing_writes_what_waits(deferred: Deferred, audit: AuditLog) -> None:
    queue = deferred()
    for number in range(300):
        queue.record(event(number))
    assert queue.close() == 0
    assert len(subjects(audit)) == 300
    queue.record(event(301))
    assert queue.dropped == 1


def test_closing_on_a_dead_disk_ends_and_counts_what_is_lost(deferred: Deferred, valve: Valve) -> None:
    queue = deferred()
    valve.shut = True
    queue.record(event(1))
    queue.record(event(2))
    assert queue.close(timeout_s=0.2) == 2
