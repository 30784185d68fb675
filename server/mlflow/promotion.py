"""Promotions written back to MLflow, which has no compare and set on aliases.

So one gateway writes (``promotes`` in its options, and a lock in its state folder among its own processes), and looks
before and after: an alias that is not where it should be was moved by somebody else, who is right. Nothing is undone
then and nothing tried again; it is reported. What stays is the moment between the look and the write, of one request's
length, in which a move of somebody else's is overwritten without a trace.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from router.registry.base import CHALLENGER, CHAMPION, PREVIOUS, Database, Journal, RegistryError
from router.registry.blobs import storage
from router.registry.origin import Unreachable
from server.mlflow.client import MlflowOrigin

_ACTOR: Final = "tidegate"


class MlflowAliases:
    """Moves aliases for rollouts, as ``server.control.rollouts`` asks its mover. Blocks; one move at a time."""

    def __init__(
        self, origin: MlflowOrigin, database: Database, journal: Journal, lock: Path, *, promotes: bool
    ) -> None:
        self._origin = origin
        self._database = database
        self._journal = journal
        self._lock = lock
        self._promotes = promotes

    def move(self, entry: str, alias: str, was: str, to: str) -> str:
        """Point an alias at ``to`` if it is at ``was``; why not, or "". Raises StoreError when it cannot be audited.

        Raises Unreachable, too: nobody knows then what has been done, and to ask again does no harm.

        The champion is promoted: what was champion is previous, and ``to`` no longer challenges it. An alias that is
        at ``to`` already, perhaps from a try whose answer was lost, is brought to its end.
        """
        if not self._promotes:
            return "this gateway does not write to MLflow (registry.mlflow.promotes)"
        try:
            with self._alone() as alone:
                if not alone:
                    return "another process of this gateway is writing to MLflow"
                refused = self._move(entry, alias, int(was), int(to))
        except Unreachable:
            raise
        except RegistryError as error:
            return str(error)
        action = "registry.override" if refused else "registry.promote" if alias == CHAMPION else "registry.alias"
        detail = {"alias": alias, "from": int(was), "to": int(to), "origin": self._origin.name}
        with self._database.transaction() as connection:
            self._journal(connection, action, f"{entry}:{to}", {**detail, "reason": refused}, _ACTOR)
        return refused

    def _move(self, entry: str, alias: str, was: int, to: int) -> str:
        before = self._origin.aliases(entry)
        if before.get(alias) not in (was, to):
            return _elsewhere(entry, alias, was, before.get(alias))
        displaces = alias == CHAMPION and before.get(PREVIOUS) != was and was != to
        # Whichever is written first, ``to`` has an alias after it, and so is loaded by a process that starts then.
        back = before.get(PREVIOUS) == to
        if displaces and not back:
            self._set(entry, PREVIOUS, was)
        if before.get(alias) != to:
            # Looked at again: writing the other alias took time.
            now = self._origin.aliases(entry).get(alias)
            if now not in (was, to):
                return _elsewhere(entry, alias, was, now)
            self._set(entry, alias, to)
        if displaces and back:
            self._set(entry, PREVIOUS, was)
        if alias == CHAMPION and before.get(CHALLENGER) == to == self._origin.aliases(entry).get(CHALLENGER):
            self._origin.drop_alias(entry, CHALLENGER)
        return self._settled(entry, alias, to)

    def _set(self, entry: str, alias: str, version: int) -> None:
        """A write whose answer was lost may have been done: the look afterwards tells."""
        try:
            self._origin.set_alias(entry, alias, version)
        except Unreachable:
            if self._origin.aliases(entry).get(alias) != version:
                raise

    def _settled(self, entry: str, alias: str, to: int) -> str:
        after = self._origin.aliases(entry)
        return "" if after.get(alias) == to else _elsewhere(entry, alias, to, after.get(alias))

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no other process of this state folder writes."""
        with storage("the lock for writing to MLflow could not be taken"):
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            yield _try_lock(file)
        finally:
            os.close(file)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _elsewhere(entry: str, alias: str, wanted: int, found: int | None) -> str:
    return f"{alias} of {entry} was expected to be {wanted} and is {found}: somebody moved it in MLflow"
