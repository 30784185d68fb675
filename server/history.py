"""The configurations that were applied: numbered generations in the store, and the last good text as a file.

A generation is the exact text, who applied it and why, and which digest each model version had. Numbers count up by
one over restarts and processes and are never given twice: rolling back to generation N makes a new one with N's text
and N's digests. The last ``keep_texts`` generations can be rolled back to; older ones keep who, when, why and the
SHA-256 of what they were. When to apply what is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from server.audit import AuditEvent, AuditLog, utc_now
from server.errors import FailedPrecondition, NotFound
from server.store.base import Store

#: Problems of one rejected text that its audit event lists; it counts them all.
_PROBLEMS_AUDITED: Final = 50

#: generation, ts, actor, reason, restores, sha256, text, models
_Columns: TypeAlias = tuple[int, str, str, str, int | None, str, bytes | None, str | None]
_ROWS: Final = "SELECT generation, ts, actor, reason, restores, sha256, text, models FROM config_generation"


class Stale(FailedPrecondition):
    """The change was made for a generation that is no longer the applied one; nothing was done."""

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(f"the change was made for generation {expected}, but generation {actual} is applied")
        self.expected = expected
        self.actual = actual


@dataclass(slots=True, frozen=True)
class Generation:
    """One applied configuration.

    ``models`` maps ``model:version`` to its digest. It and ``text`` are None when the generation is too old to be
    rolled back to. ``restores``: the generation that this one is a rollback to. ``ts``: RFC 3339, UTC.
    """

    number: int
    ts: str
    actor: str
    reason: str
    restores: int | None
    sha256: str
    text: bytes | None
    models: Mapping[str, str] | None

    def as_dict(self) -> dict[str, object]:
        """What is told of it, as JSON; the text itself is left out."""
        return {
            "generation": self.number,
            "time": self.ts,
            "actor": self.actor,
            "reason": self.reason,
            "restores": self.restores,
            "sha256": self.sha256,
            "models": self.models,
            "can_roll_back": self.text is not None,
        }


class ConfigHistory:
    """The generations in a store. All methods wait for the disk, so they are called off the event loop.

    They raise StoreError, and then nothing was written.
    """

    def __init__(self, store: Store, audit: AuditLog, *, keep_texts: int = 200) -> None:
        self._store = store
        self._audit = audit
        self._keep_texts = keep_texts

    def append(
        self,
        text: bytes,
        *,
        models: Mapping[str, str],
        actor: str,
        reason: str,
        restores: int | None = None,
        expected: int | None = None,
    ) -> Generation:
        """Write the next generation and its audit event (``config.applied``), both or neither.

        ``expected``: the latest generation by the caller's knowledge; Stale when another process was faster.
        """
        with self._store.transaction() as connection:
            before = _latest(connection)
            number = before.number if before is not None else 0
            if expected is not None and expected != number:
                raise Stale(expected, number)
            sha256 = hashlib.sha256(text).hexdigest()
            made = Generation(
                number + 1, utc_now(), _storable(actor), _storable(reason), restores, sha256, bytes(text), dict(models)
            )
            _insert(connection, made)
            self._forget(connection, made.number - self._keep_texts)
            self._audit.append(connection, _applied(made, before))
        return made

    def reject(self, text: bytes, problems: Sequence[Mapping[str, object]], *, actor: str, reason: str) -> None:
        """Audit a text that was not applied (``config.rejected``): ``problems`` are JSON objects, one per mistake."""
        detail = {
            "sha256": hashlib.sha256(text).hexdigest(),
            "reason": reason,
            "problems": [dict(problem) for problem in problems[:_PROBLEMS_AUDITED]],
            "problem_count": len(problems),
        }
        self._audit.record(AuditEvent(actor, "config.rejected", "config", detail))

    def get(self, number: int) -> Generation:
        """The generation of that number. Raises NotFound."""
        with self._store.reading() as connection:
            row = connection.execute(_ROWS + " WHERE generation = ?", (number,)).fetchone()
        if row is None:
            raise NotFound(f"there is no generation {number} of the configuration")
        return _parsed(row)

    def list(self, limit: int) -> tuple[Generation, ...]:
        """The last ``limit`` generations, newest first."""
        with self._store.reading() as connection:
            rows = connection.execute(_ROWS + " ORDER BY generation DESC LIMIT ?", (limit,))
            return tuple(_parsed(row) for row in rows)

    def latest(self) -> Generation | None:
        """The newest generation; None before the first one."""
        with self._store.reading() as connection:
            return _latest(connection)

    def _forget(self, connection: sqlite3.Connection, newest: int) -> None:
        """Let go of the texts up to the generation ``newest``, which by now is one generation in the usual case."""
        connection.execute(
            "UPDATE config_generation SET text = NULL, models = NULL WHERE generation <= ? AND text IS NOT NULL",
            (newest,),
        )


class LastGood:
    """The text applied last, as ``last-good.yaml`` in the state folder: what a start uses when the file is bad.

    Relative paths in it mean what they meant in the file it came from, whose folder the reader has to know.
    """

    NAME: Final = "last-good.yaml"

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / self.NAME

    def write(self, text: bytes) -> None:
        """Replace it, wholly and on disk, or raise OSError with the old text in place."""
        partial = self.path.with_name(f".{self.NAME}.{os.getpid()}.part")
        try:
            _write_through(partial, text)
            partial.replace(self.path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        _sync_folder(self.path.parent)

    def read(self) -> bytes | None:
        """The text, None when none was ever written. Raises OSError."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None


def _insert(connection: sqlite3.Connection, made: Generation) -> None:
    models = json.dumps(made.models, sort_keys=True, separators=(",", ":"))
    connection.execute(
        "INSERT INTO config_generation (generation, ts, actor, reason, restores, sha256, text, models) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (made.number, made.ts, made.actor, made.reason, made.restores, made.sha256, made.text, models),
    )


def _applied(made: Generation, before: Generation | None) -> AuditEvent:
    """The audit lists only digests that changed: with many models, most stay from one generation to the next."""
    old = (before.models if before is not None else None) or {}
    new = made.models or {}
    detail = {
        "generation": made.number,
        "sha256": made.sha256,
        "reason": made.reason,
        "restores": made.restores,
        "models": {name: digest for name, digest in new.items() if old.get(name) != digest},
        "removed": sorted(old.keys() - new.keys()),
    }
    return AuditEvent(made.actor, "config.applied", f"config:{made.number}", detail, made.ts)


def _latest(connection: sqlite3.Connection) -> Generation | None:
    row = connection.execute(_ROWS + " ORDER BY generation DESC LIMIT 1").fetchone()
    return None if row is None else _parsed(row)


def _parsed(row: _Columns) -> Generation:
    number, ts, actor, reason, restores, sha256, text, models = row
    digests = None if models is None else json.loads(models)
    return Generation(number, ts, actor, reason, restores, sha256, text, digests)


def _storable(text: str) -> str:
    """Lone surrogates, which no UTF-8 file can hold, are shown by their code."""
    return text.encode("utf-8", "backslashreplace").decode()


def _write_through(path: Path, text: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
