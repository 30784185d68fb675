"""The monitor's nouns: columns, windows, settings, scores and reports. stdlib + numpy only.

Times are ns since the epoch (``wall``) unless a name says otherwise; shares are in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np

from monitor.errors import SettingsError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Buffer: TypeAlias = bytes | bytearray | memoryview
#: The contents of one tensor of a batch, in pieces: raw little-endian buffers, or lists of ``bytes`` for BYTES.
Parts: TypeAlias = Sequence[Buffer | list[bytes]]

Source: TypeAlias = Literal["input", "output"]
Kind: TypeAlias = Literal["numeric", "integer", "boolean", "categorical", "bytes"]
KINDS: Final[tuple[Kind, ...]] = ("numeric", "integer", "boolean", "categorical", "bytes")
#: Kinds whose values have no order that means anything: each known value is a category of its own.
DISCRETE: Final = frozenset({"boolean", "categorical", "bytes"})

BYTES: Final = "BYTES"
#: V2 datatype -> (numpy dtype of its buffer, dtype that its values are compared in). BF16's buffer is read as uint16.
#: Integers of 64 bits are compared as doubles: beyond 2^53 neighbours may fall together.
DATATYPES: Final[dict[str, tuple[np.dtype[Any], np.dtype[Any]]]] = {
    "BOOL": (np.dtype("?"), np.dtype("f4")),
    "UINT8": (np.dtype("u1"), np.dtype("f4")),
    "UINT16": (np.dtype("<u2"), np.dtype("f4")),
    "UINT32": (np.dtype("<u4"), np.dtype("f8")),
    "UINT64": (np.dtype("<u8"), np.dtype("f8")),
    "INT8": (np.dtype("i1"), np.dtype("f4")),
    "INT16": (np.dtype("<i2"), np.dtype("f4")),
    "INT32": (np.dtype("<i4"), np.dtype("f8")),
    "INT64": (np.dtype("<i8"), np.dtype("f8")),
    "FP16": (np.dtype("<f2"), np.dtype("f4")),
    "BF16": (np.dtype("<u2"), np.dtype("f4")),
    "FP32": (np.dtype("<f4"), np.dtype("f4")),
    "FP64": (np.dtype("<f8"), np.dtype("f8")),
    BYTES: (np.dtype("O"), np.dtype("f4")),
}

STABLE: Final = "stable"
CANARY: Final = "canary"
SHADOW: Final = "shadow"

SECOND_NS: Final = 1_000_000_000
HOUR_NS: Final = 3600 * SECOND_NS


class HasData(Protocol):
    """An output of a batch: a raw buffer, or a list of ``bytes``."""

    @property
    def data(self) -> Buffer | list[bytes]: ...


@dataclass(slots=True, frozen=True)
class Column:
    """One monitored value per row: element ``index`` of the ``width`` elements that a row of the tensor has."""

    name: str
    tensor: str
    source: Source = "input"
    index: int = 0
    width: int = 1
    datatype: str = "FP32"
    kind: Kind = "numeric"

    @property
    def discrete(self) -> bool:
        return self.kind in DISCRETE

    @property
    def carrier(self) -> np.dtype[Any]:
        """The float type that values are compared in."""
        return DATATYPES[self.datatype][1]


@dataclass(slots=True, frozen=True)
class Window:
    """The last ``length`` rows or ns of traffic, moving by one pane at a time. ``pane`` divides ``length``."""

    unit: Literal["rows", "time"]
    length: int
    pane: int

    @property
    def name(self) -> str:
        return f"{self.length}rows" if self.unit == "rows" else _duration(self.length)

    @property
    def panes(self) -> int:
        return self.length // self.pane


def rows_window(length: int, pane: int = 0) -> Window:
    """A window of rows; by default it moves by half of itself, and by 500 rows at most."""
    return Window("rows", length, pane or min(500, max(1, length // 2)))


def time_window(seconds: float, pane_seconds: float = 0.0) -> Window:
    """A window of time; by default it moves by a tenth of itself."""
    length = round(seconds * SECOND_NS)
    return Window("time", length, round(pane_seconds * SECOND_NS) or max(1, length // 10))


def _duration(ns: int) -> str:
    for unit, size in (("h", HOUR_NS), ("m", 60 * SECOND_NS), ("s", SECOND_NS)):
        if ns % size == 0:
            return f"{ns // size}{unit}"
    return f"{ns / SECOND_NS:g}s"


@dataclass(slots=True, frozen=True)
class AlarmRules:
    """When a column is in alarm. See ``monitor.calibration`` for the level and ``monitor.alarms`` for the states.

    One false alarm is expected per ``ert_rows`` rows, or per ``ert_hours`` hours when that is set. ``k`` of the last
    ``m`` looks of one window must be over; ``clear_looks`` looks in a row must be under, with the effect below
    ``clear_ratio`` of its floor or p over the level, before the alarm ends.
    """

    ert_rows: int = 10_000_000
    ert_hours: float = 0.0
    min_psi: float = 0.02
    min_ks: float = 0.05
    k: int = 2
    m: int = 3
    clear_looks: int = 6
    clear_ratio: float = 0.8
    #: Fewest rows that a window of time is judged on, and a seasonal reference is used with.
    min_rows: int = 200

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.m <= 64:
            raise SettingsError(f"persistence needs 1 <= k <= m <= 64, got k={self.k}, m={self.m}")
        if self.clear_looks < 1 or not 0 <= self.clear_ratio <= 1:
            raise SettingsError("clear_looks must be at least 1 and clear_ratio within 0..1")
        if self.ert_rows < 1 or self.ert_hours < 0 or self.min_psi < 0 or self.min_ks < 0 or self.min_rows < 1:
            raise SettingsError("ert_rows and min_rows must be positive; ert_hours and floors must not be negative")


@dataclass(slots=True, frozen=True)
class Settings:
    """How one profile is watched. ``reference``: what windows are held against (see ``monitor.panes.Seasonal``)."""

    windows: tuple[Window, ...] = (rows_window(1000), rows_window(10_000))
    rules: AlarmRules = AlarmRules()
    reference: Literal["profile", "trailing_week", "hour_of_week"] = "profile"
    #: Bounds of the tap: rows and bytes that may wait for the drain thread.
    ring_rows: int = 65_536
    ring_bytes: int = 64 * 1024 * 1024
    #: Arms counted apart at most; rows of further arms are refused and counted.
    max_arms: int = 8

    def __post_init__(self) -> None:
        if not self.windows:
            raise SettingsError("a monitor needs at least one window")
        for window in self.windows:
            if window.pane < 1 or window.length < window.pane or window.length % window.pane:
                raise SettingsError(
                    f"a window's pane must divide its length, got pane {window.pane} and length {window.length}"
                )
        if len(set(self.windows)) != len(self.windows):
            raise SettingsError("two windows are the same")
        if self.ring_rows < 1 or self.ring_bytes < 1 or self.max_arms < 1:
            raise SettingsError("ring_rows, ring_bytes and max_arms must be positive")


@dataclass(slots=True, frozen=True)
class WindowCounts:
    """What a window holds. ``cells`` are counts per cell of the layout; ``dropped`` rows were offered but not counted.

    ``full`` says that the window has its whole length; ``look`` numbers the panes closed so far.
    """

    window: str
    rows: int
    dropped: int
    start_ns: int
    end_ns: int
    look: int
    full: bool
    cells: Array

    @property
    def sampled(self) -> bool:
        return self.dropped > 0


@dataclass(slots=True, frozen=True)
class ColumnScore:
    """One column's window against its reference. Undefined statistics (no rows, no order) are NaN, their p is 1.

    ``ks_low <= D <= ks_high`` is certain; the test uses ``ks_low``. ``psi`` counts missing values and new categories
    as bins of their own, ``psi_present`` leaves out missing values. ``wasserstein`` (and its bounds) is over the
    reference's range, in the column's own unit; ``wasserstein_sd`` in reference standard deviations.
    """

    column: str
    reference_rows: int
    rows: int
    ks_low: float
    ks_high: float
    ks_p: float
    psi: float
    psi_p: float
    psi_present: float
    js: float
    l_infinity: float
    chi_square: float
    chi_square_df: int
    chi_square_p: float
    wasserstein: float
    wasserstein_low: float
    wasserstein_high: float
    wasserstein_sd: float
    missing: float
    missing_reference: float
    below: float
    above: float
    new_category: float
    #: The folk label of this PSI: "none" below 0.1, "moderate" below 0.25, else "major". It decides nothing.
    severity: str
    #: The bin that adds most to the PSI, and its share of it.
    leading_bin: str
    leading_share: float
    #: How much more the counts vary than those of independent rows would; 1 when nothing is known.
    inflation: float


@dataclass(slots=True, frozen=True)
class Verdict:
    """A score held against the rules. ``over``: one test is both real (p under ``level``) and large (its effect).

    ``ratio`` is ln p / ln level of the stronger test (``test``): over 1 is real.
    """

    column: str
    over: bool
    real: bool
    large: bool
    quiet: bool
    ratio: float
    test: str
    level: float


@dataclass(slots=True, frozen=True)
class Alarm:
    """A change of a column's alarm. ``episode`` is unique per column and arm, and the same for raise and end."""

    state: Literal["raised", "cleared"]
    arm: str
    column: str
    window: str
    episode: int
    look: int
    start_ns: int
    end_ns: int
    verdict: Verdict
    score: ColumnScore


@dataclass(slots=True, frozen=True)
class WindowReport:
    """All columns of one window, the strongest evidence first."""

    arm: str
    window: str
    rows: int
    dropped: int
    sampled: bool
    full: bool
    start_ns: int
    end_ns: int
    level: float
    scores: tuple[ColumnScore, ...]
    verdicts: tuple[Verdict, ...]
    in_alarm: tuple[str, ...] = ()


@dataclass(slots=True, frozen=True)
class DriftReport:
    """Everything the monitor of one profile knows. ``warnings`` are sentences to be shown beside the numbers."""

    model: str
    version: str
    profile: str
    windows: tuple[WindowReport, ...]
    #: arm -> rows: offered and counted, dropped by the full ring, refused for their shape.
    counted: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    calibrated: bool = True
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN and infinities stay floats."""
        return asdict(self)
