"""Trace and logging settings of the protocol, kept in memory. No file can be named by a client.

Values live in the shapes that Triton's clients read: numbers of trace settings as text, ``trace_level`` as a list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from server.errors import InvalidArgument
from server.transport.port import SettingValue

_TRACE_INITIAL: Final[Mapping[str, SettingValue]] = {
    "trace_file": "",
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_mode": "opentelemetry",
}
_LOG_INITIAL: Final[Mapping[str, SettingValue]] = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}
_LEVELS: Final = ("OFF", "TIMESTAMPS", "TENSORS")
_LOG_FORMATS: Final = ("default", "ISO8601")
_INT32_MAX: Final = 2**31 - 1


def _refuse(name: str) -> SettingValue:
    raise InvalidArgument(f"setting {name!r} cannot be changed by a client")


def _single(name: str, value: object) -> object:
    """gRPC sends every trace value as a list; a list of one is its element."""
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise InvalidArgument(f"setting {name!r} takes one value, got {len(value)}")
    return value[0]


def _count(name: str, value: object, low: int) -> int:
    value = _single(name, value)
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 10 or not low <= int(text) <= _INT32_MAX:
        raise InvalidArgument(
            f"setting {name!r} must be an integer from {low} to {_INT32_MAX}, got {str(value)[:64]!r}"
        )
    return int(text)


def _level(name: str, value: object) -> list[str]:
    levels = value if isinstance(value, list) else [value]
    if not levels or any(level not in _LEVELS for level in levels):
        raise InvalidArgument(f"setting {name!r} must list levels out of {', '.join(_LEVELS)}, got {str(value)[:64]!r}")
    return [str(level) for level in levels]


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"setting {name!r} must be true or false, got {str(value)[:64]!r}")
    return value


def _log_format(name: str, value: object) -> str:
    if value not in _LOG_FORMATS:
        raise InvalidArgument(f"setting {name!r} must be one of {', '.join(_LOG_FORMATS)}, got {str(value)[:64]!r}")
    return str(value)


_Check = Callable[[str, object], SettingValue]

_TRACE_CHECKS: Final[Mapping[str, _Check]] = {
    "trace_file": lambda name, _: _refuse(name),
    "trace_mode": lambda name, _: _refuse(name),
    "trace_level": _level,
    "trace_rate": lambda name, value: str(_count(name, value, 0)),
    "trace_count": lambda name, value: str(_count(name, value, -1)),
    "log_frequency": lambda name, value: str(_count(name, value, 0)),
}
_LOG_CHECKS: Final[Mapping[str, _Check]] = {
    "log_file": lambda name, _: _refuse(name),
    "log_info": _flag,
    "log_warning": _flag,
    "log_error": _flag,
    "log_verbose_level": lambda name, value: _count(name, value, 0),
    "log_format": _log_format,
}


def _checked(
    kind: str, checks: Mapping[str, _Check], changes: Mapping[str, object]
) -> tuple[dict[str, SettingValue], list[str]]:
    """What to set and what to clear, or InvalidArgument with nothing changed."""
    unknown = sorted(set(changes) - set(checks))
    if unknown:
        raise InvalidArgument(f"unknown {kind} setting {unknown[0][:64]!r}; known: {', '.join(checks)}")
    updates = {name: checks[name](name, value) for name, value in changes.items() if value is not None}
    return updates, [name for name, value in changes.items() if value is None]


def _overlay(layer: dict[str, SettingValue], updates: Mapping[str, SettingValue], cleared: list[str]) -> None:
    layer.update(updates)
    for name in cleared:
        layer.pop(name, None)


class MemorySettings:
    """ProtocolSettings for one process; lost at restart. A model's settings lie over the global ones."""

    def __init__(self) -> None:
        self._global: dict[str, SettingValue] = {}
        self._models: dict[str, dict[str, SettingValue]] = {}
        self._log: dict[str, SettingValue] = {}

    def trace(self, model: str) -> dict[str, SettingValue]:
        return {**_TRACE_INITIAL, **self._global, **self._models.get(model, {})}

    def update_trace(self, model: str, changes: Mapping[str, object]) -> None:
        updates, cleared = _checked("trace", _TRACE_CHECKS, changes)
        _overlay(self._models.setdefault(model, {}) if model else self._global, updates, cleared)

    def logging(self) -> dict[str, SettingValue]:
        return {**_LOG_INITIAL, **self._log}

    def update_logging(self, changes: Mapping[str, object]) -> None:
        _overlay(self._log, *_checked("log", _LOG_CHECKS, changes))
