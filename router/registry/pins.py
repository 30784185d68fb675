"""Rows of pinned versions: what the bytes of a foreign registry's versions were when they were first taken.

Whoever owns the database runs ``PINS_1`` in one of its migrations. A pin is never changed; it can be forgotten, which
is journalled by whoever does it. Rows are kept apart by origin: another server may have other bytes under one name.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from router.registry.base import Damaged, Version
from router.registry.manifest import Manifest, ManifestError, parse

PINS_1: Final = (
    # ``identity``: a digest of what the origin said of the files. ``manifest`` holds their own digests.
    """
    CREATE TABLE registry_pin (
        origin TEXT NOT NULL,
        model TEXT NOT NULL,
        version INTEGER NOT NULL CHECK (version > 0),
        digest TEXT NOT NULL CHECK (length(digest) = 64),
        identity TEXT NOT NULL,
        manifest TEXT NOT NULL,
        created TEXT NOT NULL,
        PRIMARY KEY (origin, model, version)
    ) WITHOUT ROWID
    """,
    """
    CREATE TRIGGER registry_pin_no_update BEFORE UPDATE ON registry_pin
    BEGIN SELECT RAISE(ABORT, 'a pin is never changed'); END
    """,
    """
    CREATE TRIGGER registry_pin_is_first BEFORE INSERT ON registry_pin
    WHEN EXISTS (
        SELECT 1 FROM registry_pin WHERE origin = NEW.origin AND model = NEW.model AND version = NEW.version
    )
    BEGIN SELECT RAISE(ABORT, 'a version is pinned once'); END
    """,
    # Versions whose bytes were found changed, and why that is known.
    """
    CREATE TABLE registry_pin_broken (
        origin TEXT NOT NULL,
        model TEXT NOT NULL,
        version INTEGER NOT NULL,
        reason TEXT NOT NULL,
        PRIMARY KEY (origin, model, version),
        FOREIGN KEY (origin, model, version) REFERENCES registry_pin ON DELETE CASCADE
    ) WITHOUT ROWID
    """,
    # The aliases that were last followed, as JSON: what is served while the origin cannot be reached.
    """
    CREATE TABLE registry_followed (
        origin TEXT NOT NULL,
        model TEXT NOT NULL,
        aliases TEXT NOT NULL,
        PRIMARY KEY (origin, model)
    ) WITHOUT ROWID
    """,
)

_KEY: Final = "origin = ? AND model = ? AND version = ?"


@dataclass(slots=True, frozen=True)
class Pin:
    """A version as it was first taken."""

    version: Version
    manifest: Manifest
    identity: str


class Pins:
    """The rows of one origin. Every method works within a transaction or view of the caller's."""

    def __init__(self, origin: str) -> None:
        self._origin = origin

    def get(self, connection: sqlite3.Connection, model: str, version: int) -> Pin | None:
        """Raises Damaged when the row is not what was written."""
        query = f"SELECT digest, identity, manifest, created FROM registry_pin WHERE {_KEY}"  # noqa: S608
        row = connection.execute(query, (self._origin, model, version)).fetchone()
        return None if row is None else _pin(model, version, *row)

    def numbers(self, connection: sqlite3.Connection, model: str) -> dict[int, str]:
        """Version -> digest, of every version of a model that is pinned."""
        query = "SELECT version, digest FROM registry_pin WHERE origin = ? AND model = ?"
        return dict(connection.execute(query, (self._origin, model)).fetchall())

    def add(self, connection: sqlite3.Connection, pin: Pin) -> None:
        """Write a new pin."""
        of = pin.version
        text = pin.manifest.canonical().decode()
        row = (self._origin, of.model, of.version, of.digest, pin.identity, text, of.created)
        connection.execute("INSERT INTO registry_pin VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def forget(self, connection: sqlite3.Connection, model: str, version: int) -> bool:
        """Delete a pin; False when there is none."""
        query = f"DELETE FROM registry_pin WHERE {_KEY}"  # noqa: S608
        return connection.execute(query, (self._origin, model, version)).rowcount == 1

    # -- what was found changed -----------------------------------------------------------------------------------

    def broken(self, connection: sqlite3.Connection) -> dict[tuple[str, int], str]:
        """(model, version) -> why, of those whose bytes were found changed."""
        query = "SELECT model, version, reason FROM registry_pin_broken WHERE origin = ?"
        return {(model, version): reason for model, version, reason in connection.execute(query, (self._origin,))}

    def mark_broken(self, connection: sqlite3.Connection, model: str, version: int, reason: str) -> None:
        row = (self._origin, model, version, reason)
        connection.execute("INSERT OR REPLACE INTO registry_pin_broken VALUES (?, ?, ?, ?)", row)

    def mark_whole(self, connection: sqlite3.Connection, model: str, version: int) -> None:
        query = f"DELETE FROM registry_pin_broken WHERE {_KEY}"  # noqa: S608
        connection.execute(query, (self._origin, model, version))

    # -- what was followed ----------------------------------------------------------------------------------------

    def followed(self, connection: sqlite3.Connection) -> dict[str, dict[str, int]]:
        """Model -> alias -> version, as last followed. Raises Damaged."""
        query = "SELECT model, aliases FROM registry_followed WHERE origin = ?"
        return {model: _aliases(text) for model, text in connection.execute(query, (self._origin,))}

    def follow(self, connection: sqlite3.Connection, model: str, aliases: Mapping[str, int] | None) -> None:
        """Keep where a model's aliases point; None: there is no such model any more."""
        if aliases is None:
            query = "DELETE FROM registry_followed WHERE origin = ? AND model = ?"
            connection.execute(query, (self._origin, model))
            return
        row = (self._origin, model, json.dumps(dict(aliases), sort_keys=True))
        connection.execute("INSERT OR REPLACE INTO registry_followed VALUES (?, ?, ?)", row)


def _pin(model: str, version: int, digest: str, identity: str, text: str, created: str) -> Pin:
    try:
        manifest = parse(text)
        found = hashlib.sha256(text.encode()).hexdigest()
    except (ManifestError, AttributeError, TypeError) as error:
        raise Damaged(f"the pin of {model}:{version} was changed: {error}") from error
    if found != digest:
        raise Damaged(f"the pin of {model}:{version} was changed: its SHA-256 is {found}, the version's {digest}")
    return Pin(Version(model, version, digest, created, manifest=manifest), manifest, identity)


def _aliases(text: str) -> dict[str, int]:
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise Damaged(f"the aliases last followed cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(type(version) is int for version in found.values()):
        raise Damaged("the aliases last followed cannot be read: wanted versions by alias")
    return found
