"""What can go wrong in the monitor. The caller turns these into its own errors; the request path never sees one."""

from __future__ import annotations


class MonitorError(Exception):
    """Base of all errors of this package. The message names what was wrong, wanted and got."""


class ProfileError(MonitorError):
    """A reference profile cannot be built from these data, or a profile file is damaged."""


class MissingReader(ProfileError):
    """The file's format needs a package that is not installed."""


class ProfileMismatch(MonitorError):
    """Counts of one profile were to be used with another: their cells mean different values."""


class NotCounted(MonitorError):
    """Some rows could not be counted, for an error that nobody expected (its cause); the others were."""

    def __init__(self, message: str, rows: int) -> None:
        super().__init__(message)
        self.rows = rows


class StateError(MonitorError):
    """A saved state is damaged, or was made with other windows than the ones configured."""


class CalibrationError(MonitorError):
    """The traffic given is too short to learn how much its rows depend on each other."""


class SettingsError(MonitorError):
    """A setting of the monitor is impossible."""
