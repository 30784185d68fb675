"""The schema of the state file, as ordered migrations: number N leads from schema N - 1 to schema N.

A migration that has been released never changes; what comes later is a new one at the end. Triggers guard what must
never change, against ``INSERT OR REPLACE`` too, which deletes rows without asking the delete triggers.
"""

from __future__ import annotations

from typing import Final

from router.registry.schema import REGISTRY_1

#: "TGAT": tells our file from any other SQLite database.
APPLICATION_ID: Final = 0x54474154

_META_1: Final = ("CREATE TABLE meta (key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL) WITHOUT ROWID",)

_AUDIT_1: Final = (
    """
    CREATE TABLE audit (
        seq INTEGER PRIMARY KEY,
        ts TEXT NOT NULL,
        actor TEXT NOT NULL,
        action TEXT NOT NULL,
        subject TEXT NOT NULL,
        detail TEXT NOT NULL,
        prev_hash TEXT NOT NULL,
        hash TEXT NOT NULL
    )
    """,
    # Rows cut off the end of the chain leave no gap: how far it once went is written down apart.
    """
    CREATE TABLE audit_head (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        seq INTEGER NOT NULL,
        hash TEXT NOT NULL
    )
    """,
    "INSERT INTO audit_head VALUES (1, 0, '')",
    """
    CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit
    BEGIN SELECT RAISE(ABORT, 'audit rows are never changed'); END
    """,
    """
    CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit
    BEGIN SELECT RAISE(ABORT, 'audit rows are never deleted'); END
    """,
    """
    CREATE TRIGGER audit_appends BEFORE INSERT ON audit
    WHEN NEW.seq IS NOT (SELECT seq + 1 FROM audit_head) OR NEW.prev_hash IS NOT (SELECT hash FROM audit_head)
    BEGIN SELECT RAISE(ABORT, 'audit rows are only appended, each to the one before'); END
    """,
    """
    CREATE TRIGGER audit_head_follows BEFORE UPDATE ON audit_head
    WHEN NOT EXISTS (SELECT 1 FROM audit WHERE seq = NEW.seq AND hash = NEW.hash) OR NEW.seq <> OLD.seq + 1
    BEGIN SELECT RAISE(ABORT, 'the head of the audit only follows its last row'); END
    """,
    """
    CREATE TRIGGER audit_head_stays BEFORE DELETE ON audit_head
    BEGIN SELECT RAISE(ABORT, 'the head of the audit is never deleted'); END
    """,
    """
    CREATE TRIGGER audit_head_is_one BEFORE INSERT ON audit_head
    BEGIN SELECT RAISE(ABORT, 'the audit has one head'); END
    """,
)

Migration = tuple[str, ...]

#: Each is one transaction, statement by statement.
MIGRATIONS: Final[tuple[Migration, ...]] = ((*_META_1, *_AUDIT_1, *REGISTRY_1),)
