"""What a store is to the rest of the server: transactions over one durable place. No database is opened here."""

from __future__ import annotations

import sqlite3
from contextlib import AbstractContextManager
from typing import Protocol

from server.errors import TidegateError


class StoreError(TidegateError):
    """The store could not be opened, read or written. The message says why and, where there is one, what to do."""

    code = "store_error"


class Store(Protocol):
    """Transactions from any thread of any process. What is committed survives the death of process and machine.

    The connection is sqlite3's; a store on another database hands out one that takes the same statements.
    """

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """One write transaction: committed when the block ends, undone when it raises. Does not nest.

        Raises StoreError; then nothing of the block has happened.
        """
        ...

    def reading(self) -> AbstractContextManager[sqlite3.Connection]:
        """One consistent view that no writer changes or waits for. Raises StoreError."""
        ...

    def close(self) -> None:
        """Let go of the store. Idempotent."""
        ...
