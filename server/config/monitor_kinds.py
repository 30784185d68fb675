"""Kinds of values in a ``monitor`` section: windows, expected runs, persistence, and where a profile comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BeforeValidator, PlainValidator, ValidationInfo, WithJsonSchema

from monitor.types import AlarmRules, Window, rows_window
from server.config import units
from server.config.kinds import Context

#: The profile that a version brings with it.
REGISTRY: Final = "registry"

_MIN_ROWS: Final = 20
_MAX_ROWS: Final = 10_000_000
#: Up to here a window of rows moves by 500 rows, or by half of itself; a longer one by a twentieth.
_FINE_ROWS: Final = 10_000
_STEP_ROWS: Final = 500
_LONG_PANES: Final = 20
_TIME_PANES: Final = 10
_MIN_TIME_NS: Final = units.parse_duration("10s")
_MAX_TIME_NS: Final = units.parse_duration("31d")
_MAX_RUN_NS: Final = units.parse_duration("3650d")
_MAX_RUN_ROWS: Final = 10**15
_MIN_RING: Final = units.parse_size("64KiB")
_MAX_RING: Final = units.parse_size("16GiB")
_MAX_LOOKS: Final = 64

_ROW_COUNT_PATTERN: Final = r"^[0-9]{1,15}[kMG]?$"
_ROW_COUNT: Final = re.compile(_ROW_COUNT_PATTERN, re.ASCII)
_ROW_UNITS: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_PERSISTENCE_PATTERN: Final = r"^[0-9]{1,2} of [0-9]{1,2}$"
_PERSISTENCE: Final = re.compile(_PERSISTENCE_PATTERN, re.ASCII)

_WINDOW_WANTED: Final = (
    f"wanted rows (an even number from {_MIN_ROWS} to 1000, a multiple of {_STEP_ROWS} up to {_FINE_ROWS}, or of "
    f"{_FINE_ROWS} up to {_MAX_ROWS}) or a duration from 10s to 31d"
)
_RUN_WANTED: Final = "wanted a duration from 1m to 3650d, or rows from 1000, such as 250k, 10M or 1G"


@dataclass(slots=True, frozen=True)
class Run:
    """How long until chance alone raises one alarm: ``hours``, or ``rows`` when that is 0."""

    rows: int
    hours: float = 0.0


def parse_window(value: object) -> Window:
    """A window of 10000 (rows) or "5m". How far it moves at a time follows from its length."""
    if isinstance(value, int) and not isinstance(value, bool):
        return _rows(value)
    try:
        length = units.parse_duration(value)
    except ValueError:
        raise ValueError(f"{_WINDOW_WANTED}, got {units.show(value)}") from None
    if not _MIN_TIME_NS <= length <= _MAX_TIME_NS:
        raise ValueError(f"{_WINDOW_WANTED}, got {units.show(value)}")
    return Window("time", length, length // _TIME_PANES)


def _rows(length: int) -> Window:
    step = 2 if length <= 2 * _STEP_ROWS else _STEP_ROWS if length <= _FINE_ROWS else _FINE_ROWS
    if not _MIN_ROWS <= length <= _MAX_ROWS or length % step:
        raise ValueError(f"{_WINDOW_WANTED}, got {units.show(length)}")
    return rows_window(length, 0 if length <= _FINE_ROWS else length // _LONG_PANES)


def parse_expected_run(value: object) -> Run:
    """The run of "7d" (hours) or of "10M" or 250000 (rows)."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and _ROW_COUNT.fullmatch(text):
        rows = int(text.rstrip("kMG")) * _ROW_UNITS[text.lstrip("0123456789")]
        if 1000 <= rows <= _MAX_RUN_ROWS:
            return Run(rows)
        raise ValueError(f"{_RUN_WANTED}, got {units.show(value)}")
    try:
        length = units.parse_duration(text)
    except ValueError:
        raise ValueError(f"{_RUN_WANTED}, got {units.show(value)}") from None
    if not 60 * units.NS_PER_S <= length <= _MAX_RUN_NS:
        raise ValueError(f"{_RUN_WANTED}, got {units.show(value)}")
    return Run(AlarmRules().ert_rows, length / (3600 * units.NS_PER_S))


def parse_persistence(value: object) -> tuple[int, int]:
    """(k, m) of "2 of 3"."""
    if isinstance(value, str) and _PERSISTENCE.fullmatch(value):
        least, _, looks = value.partition(" of ")
        if 1 <= int(least) <= int(looks) <= _MAX_LOOKS:
            return int(least), int(looks)
    raise ValueError(
        f"wanted K of M looks with K from 1 to M and M to {_MAX_LOOKS}, such as 2 of 3; got {units.show(value)}"
    )


def _profile(value: object, info: ValidationInfo) -> Path | str:
    if not isinstance(value, str) or not value or "\0" in value or "${" in value:
        raise ValueError(f"wanted registry or a path, got {units.show(value)}")
    folder = info.context.folder if isinstance(info.context, Context) else Path()
    return REGISTRY if value == REGISTRY else folder / value


def _ring_size(value: object) -> int:
    size = units.parse_size(value)
    if not _MIN_RING <= size <= _MAX_RING:
        raise ValueError(f"wanted 64KiB to 16GiB, got {units.show(value)}")
    return size


def _rate(value: object) -> float:
    found = units.parse_percent(value)
    if not found:
        raise ValueError(f"wanted a percentage over 0%, got {units.show(value)}")
    return found


def _column_value(value: object) -> str | float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"wanted text or a number, got {units.show(value)}; truth values are 0 and 1 here")
    try:
        return value if isinstance(value, str) else float(value)
    except OverflowError:
        raise ValueError(f"wanted a number that a column can hold, got {units.show(value)}") from None


def _schema(*choices: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(choices)} if len(choices) > 1 else choices[0])


_DURATION: Final = {"type": "string", "pattern": units.DURATION_PATTERN}

WatchedWindow = Annotated[
    Window, PlainValidator(parse_window), _schema({"type": "integer", "minimum": _MIN_ROWS}, _DURATION)
]
ExpectedRun = Annotated[
    Run,
    PlainValidator(parse_expected_run),
    _schema({"type": "integer", "minimum": 1000}, _DURATION, {"type": "string", "pattern": _ROW_COUNT_PATTERN}),
]
Persistence = Annotated[
    tuple[int, int], PlainValidator(parse_persistence), _schema({"type": "string", "pattern": _PERSISTENCE_PATTERN})
]
ProfileChoice: TypeAlias = Annotated[
    Path | Literal["registry"], PlainValidator(_profile), _schema({"type": "string", "minLength": 1})
]
ColumnValue: TypeAlias = Annotated[
    str | float, PlainValidator(_column_value), _schema({"type": "string"}, {"type": "number"})
]
RateFloor = Annotated[float, BeforeValidator(_rate), _schema({"type": "string", "pattern": units.PERCENT_PATTERN})]
RingSize = Annotated[int, BeforeValidator(_ring_size), _schema({"type": "string", "pattern": units.SIZE_PATTERN})]
