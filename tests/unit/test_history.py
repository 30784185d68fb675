"""Generations of the configuration in a real store, the last good text on a real disk."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.audit import AuditLog, Verified
from server.errors import NotFound
from server.history import ConfigHistory, Generation, LastGood, Stale
from server.store.base import StoreError
from server.store.schema import MIGRATIONS
from server.store.sqlite import SqliteStore

DIGESTS = {"fraud:7": "a" * 64, "fraud:8": "b" * 64}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "tidegate.db")
    yield opened
    opened.close()


@pytest.fixture
def audit(store: SqliteStore) -> AuditLog:
    return AuditLog(store)


@pytest.fixture
def history(store: SqliteStore, audit: AuditLog) -> ConfigHistory:
    return ConfigHistory(store, audit, keep_texts=3)


def put(history: ConfigHistory, text: bytes = b"a: 1\n", **more: Any) -> Generation:
    return history.append(text, **{"models": DIGESTS, "actor": "al", "reason": "because", **more})


def test_nothing_was_applied_yet(history: ConfigHistory) -> None:
    assert history.latest() is None
    assert history.list(10) == ()
    with pytest.raises(NotFound, match="no generation 1 "):
        history.get(1)


def test_a_generation_comes_back_as_it_was_applied(history: ConfigHistory) -> None:
    text = b"# \xff is no UTF-8\r\na: 1\n"
    made = put(history, text)
    assert (made.number, made.actor, made.reason, made.restores) == (1, "al", "because", None)
    assert (made.sha256, made.text, made.models) == (hashlib.sha256(text).hexdigest(), text, DIGESTS)
    assert made.ts.endswith("Z")
    assert history.get(1) == history.latest() == made
    assert history.list(10) == (made,)
    assert made.as_dict() == {
        "generation": 1, "time": made.ts, "actor": "al", "reason": "because", "restores": None,
        "sha256": made.sha256, "models": DIGESTS, "can_roll_back": True,
    }  # fmt: skip


def test_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        store = SqliteStore(tmp_path / "tidegate.db")
        assert put(ConfigHistory(store, AuditLog(store))).number == number
        store.close()


def test_a_rollback_is_a_new_generation(history: ConfigHistory) -> None:
    first = put(history)
    put(history, b"a: 2\n", models={})
    assert first.text is not None
    again = put(history, first.text, models=first.models, restores=1)
    assert (again.number, again.restores, again.text, again.models) == (3, 1, first.text, first.models)
    assert [entry.number for entry in history.list(2)] == [3, 2]


def test_the_audit_tells_who_what_and_which_digests_changed(history: ConfigHistory, audit: AuditLog) -> None:
    put(history)
    put(history, b"a: 2\n", models={"fraud:8": "c" * 64, "spam:1": "d" * 64}, actor="bo", reason="")
    first, second = (row.event for row in audit.tail(10))
    assert (first.actor, first.action, first.subject) == ("al", "config.applied", "config:1")
    assert first.detail["models"] == DIGESTS
    assert (second.actor, second.subject, second.ts) == ("bo", "config:2", history.get(2).ts)
    assert second.detail == {
        "generation": 2, "sha256": hashlib.sha256(b"a: 2\n").hexdigest(), "reason": "", "restores": None,
        "models": {"fraud:8": "c" * 64, "spam:1": "d" * 64}, "removed": ["fraud:7"],
    }  # fmt: skip
    assert isinstance(audit.verify(), Verified)


def test_generation_and_audit_are_written_together_or_not_at_all(
    history: ConfigHistory, audit: AuditLog, store: SqliteStore
) -> None:
    with store.transaction() as connection:
        connection.execute("CREATE TRIGGER no_more BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'full'); END")
    with pytest.raises(StoreError, match="full"):
        put(history)
    assert history.latest() is None
    with store.transaction() as connection:
        connection.execute("DROP TRIGGER no_more")
    assert put(history).number == 1
    assert len(audit.tail(10)) == 1


def test_old_texts_go_and_their_rows_stay(history: ConfigHistory, store: SqliteStore) -> None:
    texts = [b"n: %d\n" % number for number in range(1, 8)]
    for text in texts:
        put(history, text)
    entries = history.list(100)
    assert [entry.number for entry in entries] == [7, 6, 5, 4, 3, 2, 1]
    assert [entry.text for entry in entries] == [texts[6], texts[5], texts[4], None, None, None, None]
    assert [entry.models is None for entry in entries] == [False] * 3 + [True] * 4
    assert [entry.as_dict()["can_roll_back"] for entry in entries] == [True] * 3 + [False] * 4
    assert [entry.sha256 for entry in reversed(entries)] == [hashlib.sha256(text).hexdigest() for text in texts]
    assert store.problems() == []


def test_a_stale_expectation_writes_nothing(history: ConfigHistory, audit: AuditLog) -> None:
    assert put(history, expected=0).number == 1
    with pytest.raises(Stale, match="made for generation 0, but generation 1 is applied") as caught:
        put(history, expected=0)
    assert (caught.value.expected, caught.value.actual) == (0, 1)
    assert len(history.list(10)) == len(audit.tail(10)) == 1


def test_of_threads_with_one_expectation_one_wins(history: ConfigHistory) -> None:
    put(history)
    start = threading.Barrier(8)
    outcomes: list[str] = []

    def change() -> None:
        start.wait()
        try:
            put(history, expected=1)
            outcomes.append("made")
        except Stale as stale:
            outcomes.append(f"stale {stale.actual}")

    threads = [threading.Thread(target=change) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["made"] + ["stale 2"] * 7


APPENDER = """
import sys
from pathlib import Path
from server.audit import AuditLog
from server.history import ConfigHistory
from server.store.sqlite import SqliteStore
store = SqliteStore(Path(sys.argv[1]))
history = ConfigHistory(store, AuditLog(store), keep_texts=5)
for _ in range(10):
    history.append(b"x", models={}, actor=sys.argv[2], reason="")
"""


def test_processes_give_each_number_once(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.db"
    command = [sys.executable, "-c", APPENDER, str(path)]
    running = [subprocess.Popen([*command, name]) for name in ("al", "bo")]
    assert [process.wait(60) for process in running] == [0, 0]
    store = SqliteStore(path)
    history = ConfigHistory(store, AuditLog(store))
    assert [entry.number for entry in history.list(100)] == list(range(20, 0, -1))
    assert sum(entry.text is not None for entry in history.list(100)) == 5
    assert isinstance(AuditLog(store).verify(), Verified)
    store.close()


def test_a_rejected_text_is_audited_with_its_problems(history: ConfigHistory, audit: AuditLog) -> None:
    problems = [{"line": number, "column": 3, "key": "models.x", "message": "wrong"} for number in range(1, 81)]
    history.reject(b"bad", problems, actor="al", reason="try")
    event = audit.tail(1)[0].event
    assert (event.actor, event.action, event.subject) == ("al", "config.rejected", "config")
    assert event.detail == {
        "sha256": hashlib.sha256(b"bad").hexdigest(), "reason": "try",
        "problems": problems[:50], "problem_count": 80,
    }  # fmt: skip
    assert history.latest() is None


def test_texts_that_no_file_can_hold_are_shown_by_their_code(history: ConfigHistory) -> None:
    assert put(history, actor="a\udcff", reason="\ud800") == history.get(1)
    assert (history.get(1).actor, history.get(1).reason) == ("a\\udcff", "\\ud800")


def copied(number: int, *, verb: str = "INSERT", restores: int = 1, kept: str = "text, models") -> str:
    """A statement that puts generation 2 in once more, as ``number``."""
    columns = f"{number}, ts, actor, reason, {restores}, sha256, {kept}"
    return f"{verb} INTO config_generation SELECT {columns} FROM config_generation WHERE generation = 2"  # noqa: S608


@pytest.mark.parametrize(
    ("statement", "refusal"),
    [
        ("DELETE FROM config_generation WHERE generation = 2", "never deleted"),
        ("UPDATE config_generation SET reason = 'other'", "only let go of its text"),
        ("UPDATE config_generation SET text = NULL, models = NULL, actor = 'me'", "only let go of its text"),
        ("UPDATE config_generation SET text = x'00'", "only let go of its text"),
        ("UPDATE config_generation SET text = NULL", "CHECK constraint"),
        ("UPDATE config_generation SET generation = 9 WHERE generation = 2", "only let go of its text"),
        (copied(4), "follows the one before"),
        (copied(2, verb="INSERT OR REPLACE"), "follows the one before"),
        (copied(3, kept="NULL, NULL"), "starts with its text"),
        (copied(3, restores=77), "FOREIGN KEY"),
    ],
)
def test_the_database_itself_guards_the_history(
    history: ConfigHistory, store: SqliteStore, statement: str, refusal: str
) -> None:
    put(history)
    put(history)
    before = history.list(10)
    with pytest.raises(StoreError, match=refusal), store.transaction() as connection:
        connection.execute(statement)
    assert history.list(10) == before


def test_a_state_file_without_history_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.db"
    old = SqliteStore(path, MIGRATIONS[:1])
    with pytest.raises(StoreError, match="no such table"):
        ConfigHistory(old, AuditLog(old)).latest()
    old.close()
    store = SqliteStore(path)
    assert put(ConfigHistory(store, AuditLog(store))).number == 1
    store.close()


# --- last good text ---


def test_last_good_is_replaced_whole(tmp_path: Path) -> None:
    last_good = LastGood(tmp_path)
    assert last_good.read() is None
    for text in (b"a: 1\n" * 1000, b"", b"\xff"):
        last_good.write(text)
        assert LastGood(tmp_path).read() == (tmp_path / "last-good.yaml").read_bytes() == text
    assert [file.name for file in tmp_path.iterdir()] == ["last-good.yaml"]
    assert last_good.path.stat().st_mode & 0o777 == 0o600


def test_last_good_stays_when_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    last_good = LastGood(folder)
    last_good.write(b"good")
    # In a process of its own, since the limit on the size of files cannot be lifted again.
    program = (
        "import resource, signal, sys; from pathlib import Path; from server.history import LastGood\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try: LastGood(Path(sys.argv[1])).write(b'x' * 100)\n"
        "except OSError: sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(folder)], check=False, timeout=60).returncode == 7
    assert last_good.read() == b"good"
    assert [file.name for file in folder.iterdir()] == ["last-good.yaml"]


def test_last_good_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LastGood(tmp_path / "none").write(b"x")
    assert LastGood(tmp_path / "none").read() is None


def test_the_index_of_kept_texts_is_used(store: SqliteStore) -> None:
    query = "EXPLAIN QUERY PLAN UPDATE config_generation SET text = NULL WHERE generation <= 5 AND text IS NOT NULL"
    with store.reading() as connection:
        plan: list[sqlite3.Row] = connection.execute(query).fetchall()
    assert "config_generation_kept" in str(plan)
