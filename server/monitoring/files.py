"""What is kept of monitors and labels over a restart.

Counts of a version: ``FOLDER/MODEL/VERSION-PROFILE-SETTINGS.state``, the last two by their SHA-256. Labels of a model:
``FOLDER/MODEL/SETTINGS.labels``. Either is gone on from only under the same profile and the same settings. Files are
written whole or not at all; one that is damaged is logged and left aside: what cannot go on from where it was starts
anew. One process writes below a folder at a time: the counts of two would take each other's place.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from monitor.errors import MonitorError, StateError
from monitor.label_state import SavedLabels
from monitor.sealed import write_file
from monitor.state import MonitorState

if TYPE_CHECKING:
    from monitor.engine import Monitor
    from server.monitoring.labels import ModelLabels

log = structlog.get_logger("monitor")

#: Files kept of one model; the oldest go, as those of versions that were retired long ago.
_KEPT: Final = 16
#: The same of labels, whose files are one per settings.
_LABELS_KEPT: Final = 4
_SHA_CHARS: Final = 12
_TAKEN: Final = (errno.EACCES, errno.EAGAIN)


class _Hold:
    """The right to write files that end in ``suffix`` below a folder, which one process has until it ends."""

    def __init__(self, folder: Path, suffix: str) -> None:
        self._folder = folder
        self._suffix = suffix
        self._taken = False
        self._told = False

    def taken(self) -> bool:
        """Take it where nobody has it. Raises OSError when the folder cannot be written."""
        if self._taken:
            return True
        self._folder.mkdir(parents=True, exist_ok=True)
        file = os.open(self._folder / f"{self._suffix}.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                os.close(file)
                self._tell()
                return False  # a file system without locks, though, is written to
        self._taken = True
        weakref.finalize(self, os.close, file)
        self._clear_up()
        return True

    def _clear_up(self) -> None:
        """Remove what processes that were killed had not written to its end."""
        for left in self._folder.rglob(f".*{self._suffix}.*.tmp"):
            if not left.name.endswith(f".{os.getpid()}.tmp"):  # its own it writes anew
                with suppress(OSError):
                    left.unlink()

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            consequence = "what this one counts is not kept over a restart as long as the other runs"
            reason = "another process writes there: give each its own state folder"
            log.warning("monitor_folder_taken", folder=str(self._folder), reason=reason, consequence=consequence)


class StateFiles:
    """The folder of saved counts; ``folder`` None: nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._hold = None if folder is None else _Hold(folder, ".state")

    def restore(self, monitor: Monitor) -> None:
        """Have a new monitor go on from what was saved of it, if anything was."""
        path = self._path(monitor)
        if path is None:
            return
        try:
            state = MonitorState.from_bytes(path.read_bytes(), path.name)
            if (state.model, state.version.partition("+")[0]) != (monitor.model, _number(monitor)):
                raise StateError(f"{path.name}: the counts are of {state.model}:{state.version}")
            monitor.restore(state)
        except FileNotFoundError:
            if any(path.parent.glob(f"{_number(monitor)}-*.state")):
                self._anew(monitor, "the saved counts are of another profile or of other settings")
        except (MonitorError, OSError) as error:
            self._anew(monitor, str(error))

    def _anew(self, monitor: Monitor, reason: str) -> None:
        log.warning("monitor_starts_anew", model=monitor.model, version=_number(monitor), reason=reason)

    def save(self, monitor: Monitor) -> bool:
        """Write what a monitor has counted; False when that failed, which is logged: the next time may be better."""
        path = self._path(monitor)
        if path is None or self._hold is None:
            return True
        try:
            if not self._hold.taken():
                return False
            _write(path, monitor.snapshot(), _KEPT)
        except OSError as error:
            log.error("monitor_not_saved", model=monitor.model, version=monitor.version, error=str(error))
            return False
        return True

    def _path(self, monitor: Monitor) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / monitor.model / f"{_number(monitor)}-{self.mark(monitor)}.state"

    @staticmethod
    def mark(monitor: Monitor) -> str:
        """The same for monitors that go on from each other's counts."""
        settings = hashlib.sha256(repr(monitor.settings).encode()).hexdigest()
        return f"{monitor.sha256[:_SHA_CHARS]}-{settings[:_SHA_CHARS]}"


class LabelFiles:
    """The folder of saved labels; ``folder`` None: nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._hold = None if folder is None else _Hold(folder, ".labels")

    def restore(self, labels: ModelLabels) -> None:
        """Have new labels go on from what was saved of them, if anything was."""
        path = self._path(labels)
        if path is None:
            return
        try:
            saved = SavedLabels.from_bytes(path.read_bytes(), labels.watch.settings.exact_rows, path.name)
            if (saved.model, saved.mark) != (labels.model, labels.mark):
                raise StateError(f"{path.name}: the labels are of {saved.model} under the settings {saved.mark}")
            labels.restore(saved)
        except FileNotFoundError:
            if any(path.parent.glob("*.labels")):
                self._anew(labels, "the saved labels are of other settings")
        except (MonitorError, OSError) as error:
            self._anew(labels, str(error))

    @staticmethod
    def _anew(labels: ModelLabels, reason: str) -> None:
        log.warning("labels_start_anew", model=labels.model, reason=reason)

    def save(self, labels: ModelLabels) -> bool:
        """Write what labels have taught; False when that failed, which is logged: the next time may be better."""
        path = self._path(labels)
        if path is None or self._hold is None:
            return True
        try:
            if not self._hold.taken():
                return False
            _write(path, labels.snapshot(), _LABELS_KEPT)
        except OSError as error:
            log.error("labels_not_saved", model=labels.model, error=str(error))
            return False
        return True

    def _path(self, labels: ModelLabels) -> Path | None:
        return None if self._folder is None else self._folder / labels.model / f"{labels.mark}.labels"


def _write(path: Path, data: bytes, keep: int) -> None:
    """Write a file and let go of the oldest of its kind in its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data)
    files = list(path.parent.glob(f"*{path.suffix}"))
    if len(files) > keep:
        for old in sorted(files, key=lambda file: file.stat().st_mtime_ns)[:-keep]:
            with suppress(OSError):
                old.unlink()


def _number(monitor: Monitor) -> str:
    """The version's own number: one that is loaded twice has a mark behind it."""
    return monitor.version.partition("+")[0]
