"""What is kept of monitors and labels over a restart.

Counts of a version: ``FOLDER/MODEL/VERSION-PROFILE-SETTINGS.state``, the last two by their SHA-256. Labels of a model:
``FOLDER/MODEL/SETTINGS.labels``. Either is gone on from only under the same profile and the same settings. Files are
written whole or not at all; one that is damaged is logged and left aside: what cannot go on from where it was starts
anew.
"""

from __future__ import annotations

import hashlib
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


class StateFiles:
    """The folder of saved counts; ``folder`` None: nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def restore(self, monitor: Monitor) -> None:
        """Have a new monitor go on from what was saved of it, if anything was."""
        path = self._path(monitor)
        if path is None:
            return
        try:
            monitor.restore(MonitorState.from_bytes(path.read_bytes(), path.name))
        except FileNotFoundError:
            if any(path.parent.glob(f"{_number(monitor)}-*.state")):
                self._anew(monitor, "the saved counts are of another profile or of other settings")
        except (MonitorError, OSError) as error:
            self._anew(monitor, str(error))

    def _anew(self, monitor: Monitor, reason: str) -> None:
        log.warning("monitor_starts_anew", model=monitor.model, version=_number(monitor), reason=reason)

    def save(self, monitor: Monitor) -> None:
        """Write what a monitor has counted. What goes wrong is logged: the next time may be better."""
        path = self._path(monitor)
        if path is None:
            return
        try:
            _write(path, monitor.snapshot(), _KEPT)
        except OSError as error:
            log.error("monitor_not_saved", model=monitor.model, version=monitor.version, error=str(error))

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
        if path is None:
            return True
        try:
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
