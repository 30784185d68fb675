"""The state file: transactions, migrations, refusals, many threads and processes."""

from __future__ import annotations

import fcntl
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from server.store.base import StoreError
from server.store.schema import APPLICATION_ID, MIGRATIONS
from server.store.sqlite import SqliteStore, get_meta, put_meta

ADDED = ("CREATE TABLE later (x INTEGER)",)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tidegate.db"


def pragma(path: Path, name: str) -> object:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]


def test_a_new_file_is_ours_and_durable(path: Path) -> None:
    store = SqliteStore(path)
    assert pragma(path, "application_id") == APPLICATION_ID
    assert pragma(path, "user_version") == len(MIGRATIONS)
    assert pragma(path, "journal_mode") == "wal"
    with store.reading() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
    assert store.problems() == []
    store.close()


def test_folders_are_made_and_odd_names_are_fine(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "a b" / "50%?#" / "tidegate.db")
    with store.transaction() as connection:
        put_meta(connection, "k", "v")
    store.close()
    assert (tmp_path / "a b" / "50%?#" / "tidegate.db").stat().st_size > 0


def test_what_is_committed_is_there_for_the_next_one(path: Path) -> None:
    with closing(SqliteStore(path)) as store, store.transaction() as connection:
        put_meta(connection, "k", "1")
        put_meta(connection, "k", "2")
    with closing(SqliteStore(path)) as store, store.reading() as connection:
        assert get_meta(connection, "k") == "2"
        assert get_meta(connection, "other") is None


def write_and_fail(store: SqliteStore) -> None:
    with store.transaction() as connection:
        put_meta(connection, "k", "v")
        raise KeyError


def test_a_block_that_raises_leaves_nothing(path: Path) -> None:
    store = SqliteStore(path)
    with pytest.raises(KeyError):
        write_and_fail(store)
    with store.reading() as connection:
        assert get_meta(connection, "k") is None
    with store.transaction() as connection:
        put_meta(connection, "k", "w")
    store.close()


def test_a_view_stands_still_while_others_write(path: Path) -> None:
    store, other = SqliteStore(path), SqliteStore(path)
    with store.reading() as view:
        assert get_meta(view, "k") is None
        with other.transaction() as connection:
            put_meta(connection, "k", "v")
        assert get_meta(view, "k") is None
    with store.reading() as view:
        assert get_meta(view, "k") == "v"
    store.close()
    other.close()


def test_transactions_do_not_nest(path: Path) -> None:
    store = SqliteStore(path)
    with store.transaction(), pytest.raises(RuntimeError, match="inside another"), store.transaction():
        pytest.fail("nested")
    with store.transaction():
        pass
    store.close()


def test_a_broken_rule_is_a_store_error(path: Path) -> None:
    store = SqliteStore(path)
    with pytest.raises(StoreError, match=r"refused the change: .*NOT NULL"), store.transaction() as connection:
        connection.execute("INSERT INTO meta VALUES ('k', NULL)")
    with pytest.raises(StoreError, match="no such table"), store.reading() as connection:
        connection.execute("SELECT * FROM nowhere")
    store.close()


def test_a_misuse_stays_what_it_is(path: Path) -> None:
    with (
        closing(SqliteStore(path)) as store,
        pytest.raises(sqlite3.ProgrammingError),
        store.reading() as connection,
    ):
        connection.execute("SELECT ?", ())


def test_closed_is_closed(path: Path) -> None:
    store = SqliteStore(path)
    with store.reading() as connection:
        store.close()
    with pytest.raises(sqlite3.ProgrammingError):
        connection.execute("SELECT 1")
    with pytest.raises(StoreError, match="closed"), store.transaction():
        pytest.fail("opened")
    store.close()


def test_threads_take_turns_and_lose_nothing(path: Path) -> None:
    store = SqliteStore(path)
    with store.transaction() as connection:
        put_meta(connection, "n", "0")

    def count() -> None:
        for _ in range(25):
            with store.transaction() as connection:
                put_meta(connection, "n", str(int(get_meta(connection, "n") or "") + 1))
            with store.reading() as connection:
                assert int(get_meta(connection, "n") or "") > 0

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.reading() as connection:
        assert get_meta(connection, "n") == "200"
    store.close()


COUNTER = """
import sys
from pathlib import Path
from server.store.sqlite import SqliteStore, get_meta, put_meta
store = SqliteStore(Path(sys.argv[1]))
for _ in range(30):
    with store.transaction() as connection:
        put_meta(connection, "n", str(int(get_meta(connection, "n") or "0") + 1))
store.close()
"""


def test_processes_create_and_write_one_file_at_once(path: Path) -> None:
    command = [sys.executable, "-c", COUNTER, str(path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    assert [process.communicate(timeout=50)[1] for process in running] == [""] * 6
    with closing(SqliteStore(path)) as store, store.reading() as connection:
        assert get_meta(connection, "n") == "180"


def test_waiting_for_another_process_has_an_end(path: Path) -> None:
    holder, waiter = SqliteStore(path), SqliteStore(path, busy_timeout_s=0.1)
    with (
        holder.transaction(),
        pytest.raises(StoreError, match=r"another process .* for more than 0\.1 s"),
        waiter.transaction(),
    ):
        pytest.fail("two writers")
    with waiter.transaction():
        pass
    holder.close()
    waiter.close()


def test_waiting_for_a_foreign_writer_has_an_end(path: Path) -> None:
    store = SqliteStore(path, busy_timeout_s=0.1)
    with closing(sqlite3.connect(path, isolation_level=None)) as foreign:
        foreign.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="held by another process"), store.transaction():
            pytest.fail("two writers")
        with store.reading() as connection:
            assert get_meta(connection, "k") is None
    store.close()


def is_locked(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_who_writes_again_lines_up_behind_who_waits(path: Path) -> None:
    greedy, patient = SqliteStore(path), SqliteStore(path)
    order: list[str] = []

    def write(store: SqliteStore, name: str) -> None:
        with store.transaction():
            order.append(name)

    waiting = threading.Thread(target=write, args=(patient, "patient"))
    with greedy.transaction():
        waiting.start()
        while not is_locked(path.with_name("tidegate.db.next")):
            pass
    write(greedy, "greedy")
    waiting.join()
    assert order == ["patient", "greedy"]
    greedy.close()
    patient.close()


def test_waiting_for_another_thread_has_an_end(path: Path) -> None:
    store = SqliteStore(path, busy_timeout_s=0.1)
    errors: list[StoreError] = []

    def write() -> None:
        try:
            with store.transaction():
                pass
        except StoreError as error:
            errors.append(error)

    with store.transaction():
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert "another thread" in errors[0].message
    store.close()


# --- schema ---


def test_an_older_file_is_backed_up_and_migrated(path: Path) -> None:
    with closing(SqliteStore(path)) as store, store.transaction() as connection:
        put_meta(connection, "k", "kept")
    longer = (*MIGRATIONS, ADDED, ("DROP TABLE later",))
    with closing(SqliteStore(path, longer)) as store, store.reading() as connection:
        assert get_meta(connection, "k") == "kept"
    assert pragma(path, "user_version") == len(MIGRATIONS) + 2
    backup = path.with_name(f"tidegate.db.v{len(MIGRATIONS)}.bak")
    assert {file.name for file in path.parent.glob("*.bak*")} == {backup.name}
    assert pragma(backup, "user_version") == len(MIGRATIONS)
    with closing(SqliteStore(backup)) as store, store.reading() as connection:
        assert get_meta(connection, "k") == "kept"


def test_a_migration_that_fails_leaves_the_schema_before_it(path: Path) -> None:
    SqliteStore(path).close()
    with pytest.raises(StoreError, match="nowhere"):
        SqliteStore(path, (*MIGRATIONS, ADDED, ("CREATE TABLE half (x)", "INSERT INTO nowhere VALUES (1)")))
    assert pragma(path, "user_version") == len(MIGRATIONS) + 1
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone() == (0,)


def test_a_newer_file_is_refused_untouched(path: Path) -> None:
    SqliteStore(path, (*MIGRATIONS, ADDED)).close()
    before = path.read_bytes()
    newer, known = len(MIGRATIONS) + 1, len(MIGRATIONS)
    with pytest.raises(StoreError, match=rf"has schema {newer}, this one knows schemas up to {known}"):
        SqliteStore(path)
    assert path.read_bytes() == before


def test_a_file_migrated_under_an_open_store_is_not_written(path: Path) -> None:
    store = SqliteStore(path)
    SqliteStore(path, (*MIGRATIONS, ADDED)).close()
    with pytest.raises(StoreError, match="newer Tidegate"), store.transaction():
        pytest.fail("wrote with an old schema")
    store.close()


@pytest.mark.parametrize("application", [0, 77])
def test_another_programs_database_is_refused_untouched(path: Path, application: int) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA application_id = {application}")
        connection.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=rf"wanted application id {APPLICATION_ID:#x}, got {application:#x}"):
        SqliteStore(path)
    assert path.read_bytes() == before


def test_what_is_no_database_is_refused_untouched(path: Path) -> None:
    path.write_bytes(b"not a database, " * 100)
    with pytest.raises(StoreError, match="not a SQLite database"):
        SqliteStore(path)
    assert path.read_bytes() == b"not a database, " * 100


def test_damage_is_told(path: Path) -> None:
    store = SqliteStore(path)
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA foreign_keys = OFF")
        raw.execute("INSERT INTO registry_alias VALUES ('m', 'champion', 9, 1)")
        raw.commit()
    assert store.problems() == [
        "registry_alias refers to a missing registry_version",
        "registry_alias refers to a missing registry_model",
    ]
    store.close()


def test_a_folder_in_the_way_is_told(path: Path) -> None:
    path.mkdir()
    with pytest.raises(StoreError, match="cannot be used"):
        SqliteStore(path)
