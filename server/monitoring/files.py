"""Saved counts of monitors: ``FOLDER/MODEL/VERSION-PROFILE-SETTINGS.state``, the last two by their SHA-256.

Counts are gone on from only under the same profile and the same settings. Files are written whole or not at all; one
that is damaged is logged and left aside: a monitor that cannot go on from where it was starts anew.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from monitor.errors import MonitorError
from monitor.sealed import write_file
from monitor.state import MonitorState

if TYPE_CHECKING:
    from monitor.engine import Monitor

log = structlog.get_logger("monitor")

#: Files kept of one model; the oldest go, as those of versions that were retired long ago.
_KEPT: Final = 16
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
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, monitor.snapshot())
            self._prune(path.parent)
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

    def _prune(self, folder: Path) -> None:
        files = list(folder.glob("*.state"))
        if len(files) > _KEPT:
            for path in sorted(files, key=lambda file: file.stat().st_mtime_ns)[:-_KEPT]:
                with suppress(OSError):
                    path.unlink()


def _number(monitor: Monitor) -> str:
    """The version's own number: one that is loaded twice has a mark behind it."""
    return monitor.version.partition("+")[0]
