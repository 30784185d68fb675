"""Which process works on the rollouts of a state folder: one at a time, by a lock that ends with its process.

Several servers may share a folder. Two that worked on one rollout would each see half of its evidence and overwrite
what the other has written down, and one that starts would take the other's work for what a dead process left.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

from server.store.base import StoreError

_LOCK: Final = "rollouts.lock"


class Tenure:
    """The right to work on the rollouts of one folder. One owner, on one thread."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _LOCK
        self._file: int | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def free(self) -> bool:
        """Whether this process has it or could take it now. Raises StoreError."""
        held = self.held
        found = self.take()
        if not held:
            self.give_up()
        return found

    def take(self) -> bool:
        """Whether this process has it, from now on if not before. Does not wait. Raises StoreError."""
        if self._file is None:
            try:
                self._file = _locked(self._path)
            except OSError as error:
                raise StoreError(f"the lock of the rollouts could not be taken: {error.strerror or error}") from error
        return self._file is not None

    def give_up(self) -> None:
        """Leave it to others."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _locked(path: Path) -> int | None:
    file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError:
        os.close(file)
        raise
    return file
