"""The state folder of one gateway: the store, the audit trail in it, and the embedded registry."""

from __future__ import annotations

import getpass
import socket
from dataclasses import dataclass
from pathlib import Path

from router.registry.embedded import EmbeddedRegistry
from server.audit import AuditLog, DeferredAudit
from server.errors import NotFound
from server.store.sqlite import SqliteStore

DATABASE = "tidegate.db"


@dataclass(slots=True)
class State:
    """What lives in a state folder. Safe to open in any number of processes at once."""

    store: SqliteStore
    audit: AuditLog
    registry: EmbeddedRegistry

    def deferred(self) -> DeferredAudit:
        """An audit that never waits for the disk; whoever asks for it closes it."""
        return DeferredAudit(self.audit, self.store)

    def close(self) -> None:
        """Let go of the store."""
        self.registry.close()
        self.store.close()


def open_existing(folder: Path) -> State:
    """Open the state of ``folder``. Raises NotFound where there is none, and makes none; or StoreError."""
    if not (folder / DATABASE).is_file():
        raise NotFound(f"there is no gateway's state in {folder}; name its folder with --state-dir")
    return open_state(folder)


def open_state(folder: Path) -> State:
    """Open or make the state of ``folder``. Raises StoreError."""
    store = SqliteStore(folder / DATABASE)
    audit = AuditLog(store)
    return State(store, audit, EmbeddedRegistry(store, folder / "blobs", audit.journal))


def operator() -> str:
    """Who is at the command line, for the audit: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
