"""The state file: one SQLite database that a server and any number of command lines share.

Writers take turns, in this process by a lock and between processes by lock files, for the whole transaction with its
checkpoint. That spares them SQLite's busy polling, and keeps checkpoint and commit of different connections apart:
SQLite up to 3.51.2 can damage a WAL file in that meeting (https://sqlite.org/wal.html#walresetbug). Readers never wait.

Not for network file systems: WAL needs memory shared by all users of the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from server.store.base import StoreError
from server.store.schema import APPLICATION_ID, MIGRATIONS, Migration

#: Between looks at a lock file that another process holds: the system offers no wait for one that has an end.
_LOCK_POLL_S: Final = 0.002

_REASONS: Final[dict[int, str]] = {
    sqlite3.SQLITE_FULL: "no space is left on the disk",
    sqlite3.SQLITE_READONLY: "the disk or the file is read-only",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened or its folder cannot be written",
    sqlite3.SQLITE_IOERR: "the disk reported an error",
    sqlite3.SQLITE_PERM: "permission is denied",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; restore it from a backup",
    sqlite3.SQLITE_NOTADB: "the file is not a SQLite database",
}


class SqliteStore:
    """Implements ``server.store.base.Store`` on one file, which is created or migrated when opened.

    ``busy_timeout_s``: how long a writer waits for its turn before StoreError. The migrations are the product's own;
    another sequence serves tests of migrating.
    """

    def __init__(
        self, path: Path, migrations: Sequence[Migration] = MIGRATIONS, *, busy_timeout_s: float = 10.0
    ) -> None:
        self.path = path.absolute()
        self._busy_timeout_s = busy_timeout_s
        self._turn = _Turn(self.path, busy_timeout_s)
        self._idle: list[sqlite3.Connection] = []
        self._idle_lock = threading.Lock()
        self._closed = False
        self._newest = len(migrations)
        try:
            with self._translated():
                self._prepare(migrations)
        except BaseException:
            self.close()  # nobody else will
            raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """BEGIN IMMEDIATE .. COMMIT, on disk when the block ends; undone when it raises. Does not nest."""
        with self._translated(), self._turn, self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            with _undone_on_error(connection):
                # A newer Tidegate may have migrated the file since it was opened.
                _schema_number(connection, self._newest)
                yield connection
                connection.execute("COMMIT")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view of what is committed; also works on a read-only disk."""
        with self._translated(), self._connection() as connection:
            connection.execute("BEGIN")
            with _undone_on_error(connection):
                yield connection
                connection.execute("COMMIT")

    def problems(self) -> list[str]:
        """What SQLite's full integrity check and foreign key check complain about; empty when all is well."""
        with self.reading() as connection:
            found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check")]
            orphans = [
                f"{row[0]} refers to a missing {row[2]}" for row in connection.execute("PRAGMA foreign_key_check")
            ]
        return [line for line in found if line != "ok"] + orphans

    def close(self) -> None:
        """Close what is idle now, and each connection in use when its block ends. Idempotent."""
        with self._idle_lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    # -- connections ----------------------------------------------------------------------------------------------

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """An idle connection or a new one. It goes back to the idle ones unless SQLite complained about it."""
        with self._idle_lock:
            if self._closed:
                raise StoreError("the state store is closed")
            connection = self._idle.pop() if self._idle else None
        connection = connection or self._open()
        try:
            yield connection
        except sqlite3.Error:
            connection.close()
            raise
        finally:
            self._give_back(connection)

    def _give_back(self, connection: sqlite3.Connection) -> None:
        with self._idle_lock:
            keep = not self._closed and _usable(connection) and not isinstance(connection, _FrozenView)
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()

    def _open(self) -> sqlite3.Connection:
        """A connection to the existing file; one that only reads when nothing can be written."""
        try:
            return self._connect("mode=rw")
        except sqlite3.OperationalError as error:
            if _primary(error) not in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY} or self._unmerged():
                raise
        # Without writing, SQLite cannot join the other users of a WAL file; on a read-only disk there are none.
        return self._connect("mode=ro&immutable=1", _FrozenView)

    def _unmerged(self) -> bool:
        """Are there commits beside the file that an immutable view would miss?"""
        with suppress(OSError):
            return self.path.with_name(self.path.name + "-wal").stat().st_size > 0
        return False

    def _connect(self, mode: str, factory: type[sqlite3.Connection] = sqlite3.Connection) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?{mode}",
            uri=True,
            timeout=self._busy_timeout_s,
            isolation_level=None,
            check_same_thread=False,
            factory=factory,
        )
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    # -- schema ---------------------------------------------------------------------------------------------------

    def _prepare(self, migrations: Sequence[Migration]) -> None:
        """Leave the file with the schema of ``migrations``, or raise StoreError with the file as it was."""
        if self.path.exists() and self._schema() == self._newest:
            return
        _make_folder(self.path.parent)
        with self._turn:
            connection = self._connect("mode=rwc")
            try:
                self._migrate(connection, migrations)
            finally:
                connection.close()

    def _schema(self) -> int:
        """The file's schema number, 0 for a file that was only just made; StoreError for one that is not ours."""
        # One view: a file that another process is making would else look like a stranger's between two questions.
        with self.reading() as connection:
            return _schema_number(connection, self._newest)

    def _migrate(self, connection: sqlite3.Connection, migrations: Sequence[Migration]) -> None:
        start = _schema_number(connection, self._newest)
        connection.execute("PRAGMA journal_mode = WAL")
        if 0 < start < self._newest:
            self._back_up(connection, start)
        for number, statements in enumerate(migrations[start:], start + 1):
            connection.execute("BEGIN IMMEDIATE")
            with _undone_on_error(connection):
                for statement in statements:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {number}")
                connection.execute("COMMIT")
        _sync_folder(self.path.parent)

    def _back_up(self, connection: sqlite3.Connection, schema: int) -> None:
        """A copy named after the schema it has, whole or not there at all."""
        target = self.path.with_name(f"{self.path.name}.v{schema}.bak")
        partial = target.with_name(target.name + ".part")
        partial.unlink(missing_ok=True)
        copy = sqlite3.connect(partial, isolation_level=None)
        try:
            connection.backup(copy)
            # A copy in WAL mode would be two files.
            copy.execute("PRAGMA journal_mode = DELETE")
        finally:
            copy.close()
        partial.replace(target)
        _sync_folder(target.parent)

    # -- errors ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """What SQLite and the system complain about becomes StoreError; a misuse of sqlite3 stays what it is."""
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.NotSupportedError):
            raise
        except sqlite3.Error as error:
            raise StoreError(f"the state store {self.path.name} {self._complaint(error)}") from error

    def _complaint(self, error: sqlite3.Error) -> str:
        primary = _primary(error)
        if primary in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return f"was held by another process for more than {self._busy_timeout_s:g} s"
        if primary == sqlite3.SQLITE_CONSTRAINT:
            return f"refused the change: {error}"
        return f"cannot be used: {_REASONS.get(primary, str(error))}"


class _FrozenView(sqlite3.Connection):
    """A view of a read-only disk, good for one use: the disk may become writable, and this would not see it."""


class _Turn:
    """The right to write: one thread of one process at a time. Locks die with the process that holds them.

    Who wants to write first becomes the next in line, by a lock of its own, and only then tries for the turn. So a
    process that writes again and again must line up behind those who wait; trying for one lock, it would win nearly
    always, being awake when it becomes free.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._next = path.with_name(path.name + ".next")
        self._lock = path.with_name(path.name + ".lock")
        self._timeout_s = timeout_s
        self._thread_lock = threading.Lock()
        self._owner: int | None = None
        self._file = -1

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise RuntimeError("a write transaction was begun inside another one")
        deadline = time.monotonic() + self._timeout_s
        if not self._thread_lock.acquire(timeout=self._timeout_s):
            raise self._timeout("thread")
        try:
            next_in_line = self._locked(self._next, deadline)
            try:
                self._file = self._locked(self._lock, deadline)
            finally:
                os.close(next_in_line)
        except BaseException:
            self._thread_lock.release()
            raise
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = None
        os.close(self._file)
        self._thread_lock.release()

    def _locked(self, path: Path, deadline: float) -> int:
        """A descriptor that holds the lock; closing it gives the lock back."""
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(f"the state store cannot be written: {_os_reason(error)}") from error
        try:
            while not _try_lock(file):
                if time.monotonic() > deadline:
                    raise self._timeout("process")
                time.sleep(_LOCK_POLL_S)
        except BaseException:
            os.close(file)
            raise
        return file

    def _timeout(self, who: str) -> StoreError:
        return StoreError(f"another {who} has been writing the state store for more than {self._timeout_s:g} s")


def _try_lock(file: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the folder of the state store cannot be made: {_os_reason(error)}") from error


def _os_reason(error: OSError) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return _REASONS[sqlite3.SQLITE_FULL]
    if error.errno == errno.EROFS:
        return _REASONS[sqlite3.SQLITE_READONLY]
    return error.strerror or str(error)


def _primary(error: sqlite3.Error) -> int:
    """SQLite's primary result code; SQLITE_ERROR for what the Python module raises by itself."""
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF


def _usable(connection: sqlite3.Connection) -> bool:
    try:
        return not connection.in_transaction
    except sqlite3.ProgrammingError:  # closed
        return False


@contextmanager
def _undone_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # SQLite itself has undone it after some errors of the disk.
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _schema_number(connection: sqlite3.Connection, newest: int) -> int:
    """The schema number of our file or of an empty one; StoreError for a foreign or newer file."""
    application = int(connection.execute("PRAGMA application_id").fetchone()[0])
    schema = int(connection.execute("PRAGMA user_version").fetchone()[0])
    tables = int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    if application == 0 and schema == 0 and tables == 0:
        return 0
    if application != APPLICATION_ID:
        raise StoreError(
            f"the state store is another program's database: wanted application id {APPLICATION_ID:#x}, "
            f"got {application:#x}"
        )
    if schema > newest:
        raise StoreError(
            f"the state store was written by a newer Tidegate: it has schema {schema}, this one knows schemas up to "
            f"{newest}; upgrade, or restore the backup made before"
        )
    return schema


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def get_meta(connection: sqlite3.Connection, key: str) -> str | None:
    """The value kept under ``key``, None when there is none."""
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def put_meta(connection: sqlite3.Connection, key: str, value: str) -> None:
    """Keep ``value`` under ``key``, in the caller's transaction."""
    connection.execute(
        "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value)
    )
