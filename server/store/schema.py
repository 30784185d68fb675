"""The schema of the state file, as ordered migrations: number N leads from schema N - 1 to schema N.

A migration that has been released never changes; what comes later is a new one at the end. Triggers guard what must
never change, against ``INSERT OR REPLACE`` too, which deletes rows without asking the delete triggers.
"""

from __future__ import annotations

from typing import Final

from router.registry.pins import PINS_1
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

_HISTORY_2: Final = (
    # A generation whose text was let go keeps its row: the number must not be given again.
    """
    CREATE TABLE config_generation (
        generation INTEGER PRIMARY KEY CHECK (generation > 0),
        ts TEXT NOT NULL,
        actor TEXT NOT NULL,
        reason TEXT NOT NULL,
        restores INTEGER REFERENCES config_generation (generation),
        sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
        text BLOB,
        models TEXT,
        CHECK ((text IS NULL) = (models IS NULL))
    )
    """,
    "CREATE INDEX config_generation_kept ON config_generation (generation) WHERE text IS NOT NULL",
    """
    CREATE TRIGGER config_generation_follows BEFORE INSERT ON config_generation
    WHEN NEW.generation IS NOT (SELECT coalesce(max(generation), 0) + 1 FROM config_generation)
    BEGIN SELECT RAISE(ABORT, 'a generation of the configuration follows the one before'); END
    """,
    """
    CREATE TRIGGER config_generation_starts_whole BEFORE INSERT ON config_generation WHEN NEW.text IS NULL
    BEGIN SELECT RAISE(ABORT, 'a generation of the configuration starts with its text'); END
    """,
    """
    CREATE TRIGGER config_generation_only_forgets BEFORE UPDATE ON config_generation
    WHEN NEW.text IS NOT NULL
        OR (NEW.generation, NEW.ts, NEW.actor, NEW.reason, NEW.sha256)
            IS NOT (OLD.generation, OLD.ts, OLD.actor, OLD.reason, OLD.sha256)
        OR NEW.restores IS NOT OLD.restores
    BEGIN SELECT RAISE(ABORT, 'a generation of the configuration can only let go of its text'); END
    """,
    """
    CREATE TRIGGER config_generation_stays BEFORE DELETE ON config_generation
    BEGIN SELECT RAISE(ABORT, 'generations of the configuration are never deleted'); END
    """,
)

_OUTBOX_3: Final = (
    # Times are Unix nanoseconds. ``body`` is the event as it is sent, and never another.
    """
    CREATE TABLE outbox_event (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        idempotency_key TEXT NOT NULL UNIQUE,
        type TEXT NOT NULL,
        subject TEXT NOT NULL,
        body TEXT NOT NULL,
        created_ns INTEGER NOT NULL
    )
    """,
    """
    CREATE TRIGGER outbox_event_never_changes BEFORE UPDATE ON outbox_event
    BEGIN SELECT RAISE(ABORT, 'an event is never changed'); END
    """,
    # ``due_ns``: when somebody may take it; the next attempt of a pending one, the end of the lease of a leased one.
    # ``settled_ns``: since when it is delivered or dead.
    """
    CREATE TABLE outbox_delivery (
        seq INTEGER NOT NULL REFERENCES outbox_event (seq) ON DELETE CASCADE,
        sink TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('pending', 'leased', 'delivered', 'dead')),
        attempts INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),
        due_ns INTEGER NOT NULL,
        lease_owner TEXT,
        settled_ns INTEGER,
        error TEXT NOT NULL DEFAULT '',
        PRIMARY KEY (seq, sink),
        CHECK ((state = 'leased') = (lease_owner IS NOT NULL)),
        CHECK ((state IN ('delivered', 'dead')) = (settled_ns IS NOT NULL))
    ) WITHOUT ROWID
    """,
    "CREATE INDEX outbox_delivery_due ON outbox_delivery (sink, due_ns) WHERE state IN ('pending', 'leased')",
    "CREATE INDEX outbox_delivery_dead ON outbox_delivery (sink) WHERE state = 'dead'",
    """
    CREATE TRIGGER outbox_delivery_is_final BEFORE UPDATE ON outbox_delivery WHEN OLD.state = 'delivered'
    BEGIN SELECT RAISE(ABORT, 'what was delivered stays delivered'); END
    """,
)

_RETRAIN_4: Final = (
    # ``state``: all that the trigger of a model's retraining remembers, as JSON.
    """
    CREATE TABLE retrain_trigger (
        model TEXT PRIMARY KEY NOT NULL,
        state TEXT NOT NULL,
        updated_ns INTEGER NOT NULL
    )
    """,
)

_ROLLOUTS_5: Final = (
    # One row for each rollout that ever began. ``template``: the SHA-256 of the section that asked for it. ``open``:
    # a process works on it; what finds it so at its start knows that the last one died. Times are Unix nanoseconds.
    """
    CREATE TABLE rollout_state (
        id TEXT PRIMARY KEY NOT NULL,
        name TEXT NOT NULL,
        template TEXT NOT NULL,
        digest TEXT NOT NULL,
        began_ns INTEGER NOT NULL,
        state TEXT NOT NULL,
        failed_ns INTEGER,
        cooldown_ns INTEGER NOT NULL,
        cleared INTEGER NOT NULL DEFAULT 0,
        open INTEGER NOT NULL,
        document TEXT NOT NULL
    )
    """,
    "CREATE INDEX rollout_state_by_name ON rollout_state (name, began_ns)",
    """
    CREATE TRIGGER rollout_state_stays BEFORE DELETE ON rollout_state
    BEGIN SELECT RAISE(ABORT, 'the id of a rollout is never used again'); END
    """,
)

_OUTBOX_7: Final = (
    # When an operator had it tried again: what a receiver may need time for is counted from there on.
    "ALTER TABLE outbox_delivery ADD COLUMN retried_ns INTEGER",
)

Migration = tuple[str, ...]

#: Each is one transaction, statement by statement.
MIGRATIONS: Final[tuple[Migration, ...]] = (
    (*_META_1, *_AUDIT_1, *REGISTRY_1),
    _HISTORY_2,
    _OUTBOX_3,
    _RETRAIN_4,
    _ROLLOUTS_5,
    PINS_1,
    _OUTBOX_7,
)
