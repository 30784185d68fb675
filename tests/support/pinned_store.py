"""A state file with the tables of pinned versions, whether or not the product's migrations have them already."""

from __future__ import annotations

from pathlib import Path

from router.registry.pins import PINS_1
from server.store.schema import MIGRATIONS
from server.store.sqlite import SqliteStore


def pinned_store(folder: Path) -> SqliteStore:
    known = any("registry_pin (" in statement for migration in MIGRATIONS for statement in migration)
    return SqliteStore(folder / "state" / "tidegate.db", MIGRATIONS if known else (*MIGRATIONS, PINS_1))
