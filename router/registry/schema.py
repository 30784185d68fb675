"""Tables of the embedded registry. Whoever owns the database runs these statements in one of its migrations.

The rules that must hold whoever writes are the database's: version numbers are contiguous, versions never change or
go, an alias moves by one generation at a time. They hold against ``INSERT OR REPLACE`` too, which deletes the row it
replaces without asking the delete triggers.
"""

from __future__ import annotations

from typing import Final

#: Statements that lead from nothing to the first form of the registry.
REGISTRY_1: Final = (
    # Grows with every change: what a server polls.
    """
    CREATE TABLE registry_state (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        generation INTEGER NOT NULL
    )
    """,
    "INSERT INTO registry_state VALUES (1, 0)",
    # Under which generation the model last changed.
    """
    CREATE TABLE registry_model (
        name TEXT PRIMARY KEY NOT NULL,
        generation INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE registry_version (
        model TEXT NOT NULL REFERENCES registry_model (name),
        version INTEGER NOT NULL CHECK (version > 0),
        digest TEXT NOT NULL CHECK (length(digest) = 64),
        manifest TEXT NOT NULL,
        created TEXT NOT NULL,
        PRIMARY KEY (model, version),
        UNIQUE (model, digest)
    ) WITHOUT ROWID
    """,
    # An alias that was taken away keeps its row: its generation must not start again.
    """
    CREATE TABLE registry_alias (
        model TEXT NOT NULL REFERENCES registry_model (name),
        alias TEXT NOT NULL,
        version INTEGER,
        generation INTEGER NOT NULL,
        PRIMARY KEY (model, alias),
        FOREIGN KEY (model, version) REFERENCES registry_version
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE registry_retired (
        model TEXT NOT NULL,
        version INTEGER NOT NULL,
        retired TEXT NOT NULL,
        PRIMARY KEY (model, version),
        FOREIGN KEY (model, version) REFERENCES registry_version
    ) WITHOUT ROWID
    """,
    """
    CREATE TRIGGER registry_state_grows BEFORE UPDATE ON registry_state WHEN NEW.generation <= OLD.generation
    BEGIN SELECT RAISE(ABORT, 'the generation of the registry only grows'); END
    """,
    """
    CREATE TRIGGER registry_version_is_next BEFORE INSERT ON registry_version
    WHEN NEW.version IS NOT (SELECT 1 + ifnull(max(version), 0) FROM registry_version WHERE model = NEW.model)
        OR EXISTS (SELECT 1 FROM registry_version WHERE model = NEW.model AND digest = NEW.digest)
    BEGIN SELECT RAISE(ABORT, 'a version is new and has the next number'); END
    """,
    """
    CREATE TRIGGER registry_version_no_update BEFORE UPDATE ON registry_version
    BEGIN SELECT RAISE(ABORT, 'versions are never changed'); END
    """,
    """
    CREATE TRIGGER registry_version_no_delete BEFORE DELETE ON registry_version
    BEGIN SELECT RAISE(ABORT, 'versions are never deleted'); END
    """,
    """
    CREATE TRIGGER registry_alias_starts BEFORE INSERT ON registry_alias
    WHEN NEW.generation <> 1
        OR EXISTS (SELECT 1 FROM registry_alias WHERE model = NEW.model AND alias = NEW.alias)
    BEGIN SELECT RAISE(ABORT, 'an alias starts at generation 1'); END
    """,
    """
    CREATE TRIGGER registry_alias_moves BEFORE UPDATE ON registry_alias
    WHEN NEW.generation <> OLD.generation + 1 OR NEW.model <> OLD.model OR NEW.alias <> OLD.alias
    BEGIN SELECT RAISE(ABORT, 'an alias moves by one generation'); END
    """,
    """
    CREATE TRIGGER registry_alias_stays BEFORE DELETE ON registry_alias
    BEGIN SELECT RAISE(ABORT, 'aliases are emptied, never deleted'); END
    """,
    """
    CREATE TRIGGER registry_retired_has_no_alias BEFORE INSERT ON registry_retired
    WHEN EXISTS (SELECT 1 FROM registry_alias WHERE model = NEW.model AND version = NEW.version)
    BEGIN SELECT RAISE(ABORT, 'a version with an alias is never retired'); END
    """,
)
