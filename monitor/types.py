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
#: What came so long after the present came before the clock was set back. Less is left alone: while rows are counted
#: the present grows old.
SET_BACK_NS: Final = 60 * SECOND_NS


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


#: Values of one column that traffic is cut by.
MAX_SEGMENTS: Final = 16


@dataclass(slots=True, frozen=True)
class Segment:
    """Traffic cut by the values of one column: the rows of each value are windows of their own; others are not cut out.

    Numbers are compared as the column's datatype holds them, strings byte for byte. Each value seen in an arm takes as
    much memory as an arm (``monitor.panes.store_bytes``); ``max_bytes`` bounds their sum in one monitor, and rows of
    values that come when it is used up are left out and counted.
    """

    column: str
    values: tuple[str | float, ...]
    max_bytes: int = 256 * 1024 * 1024

    def __post_init__(self) -> None:
        if not 1 <= len(self.values) <= MAX_SEGMENTS:
            raise SettingsError(f"a segment needs 1 to {MAX_SEGMENTS} values, got {len(self.values)}")
        if len(set(self.names)) != len(self.values):
            raise SettingsError(f"the values of segment '{self.column}' must differ, got {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The values as reports write them."""
        return tuple([value if isinstance(value, str) else f"{value:.12g}" for value in self.values])


@dataclass(slots=True, frozen=True)
class ColumnRule:
    """What the values of one column must be. A rule that is not given does not exist.

    ``min`` and ``max``: bounds, both allowed; NaN passes. ``categories``: the only values allowed, missing ones apart.
    ``finite``: neither NaN nor infinite. ``missing``: the largest share of missing values (NaN, the empty string), of a
    window or of a request. ``range`` "profile" takes bounds (of discrete columns: categories) that are not given from
    the reference.

    ``action`` "count": violations are counted per window, and more than the share ``tolerate`` is an alarm. "reject":
    requests that violate are refused (see ``monitor.schema.SchemaCheck``); outputs cannot be.
    """

    column: str
    min: float | None = None
    max: float | None = None
    missing: float | None = None
    categories: tuple[str | float, ...] | None = None
    finite: bool = False
    range: Literal["", "profile"] = ""
    action: Literal["count", "reject"] = "count"
    tolerate: float = 0.0

    def __post_init__(self) -> None:
        if self.min is not None and self.max is not None and not self.min <= self.max:
            raise SettingsError(f"rule of '{self.column}': wanted min <= max, got {self.min:g} and {self.max:g}")
        for name, share in (("missing", self.missing), ("tolerate", self.tolerate)):
            if share is not None and not 0 <= share <= 1:
                raise SettingsError(f"rule of '{self.column}': {name} must be a share in 0..1, got {share:g}")


@dataclass(slots=True, frozen=True)
class AlarmRules:
    """When a column is in alarm. See ``monitor.calibration`` for the level and ``monitor.alarms`` for the states.

    One false alarm is expected per ``ert_rows`` rows, or per ``ert_hours`` hours when that is set. ``k`` of the last
    ``m`` looks of one window must be over; ``clear_looks`` looks in a row must be under, with the effect below
    ``clear_ratio`` of its floor or p over the level, before the alarm ends.

    ``min_rate`` is the floor of the quality checks: by how much the share of missing values, of values outside the
    reference's range or of new categories must exceed the reference's. They may add a tenth to the false alarms.
    """

    ert_rows: int = 10_000_000
    ert_hours: float = 0.0
    min_psi: float = 0.02
    min_ks: float = 0.05
    min_rate: float = 0.01
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
        if not 0 < self.min_rate <= 1:
            raise SettingsError(f"min_rate must be a share over 0, at most 1, got {self.min_rate:g}")
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
    segment: Segment | None = None
    schema: tuple[ColumnRule, ...] = ()
    #: The newest rows that are kept as they came, for ``Monitor.sample``; 0 is off. Not in snapshots.
    keep_rows: int = 0
    keep_bytes: int = 64 * 1024 * 1024
    #: Looks kept for plots, per arm and window: 25 bytes per look and column.
    history_looks: int = 512

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
        if self.keep_rows < 0 or self.keep_bytes < 1 or self.history_looks < 1:
            raise SettingsError("keep_bytes and history_looks must be positive, keep_rows must not be negative")


def counts_of(running: Array, start: Array) -> Array:
    """Counts of cells from their running sums, of the same type; columns begin at ``start``, whose last is the end."""
    out = running.copy()
    out[1:] -= running[:-1]  # without a sign it wraps where a column begins: that is made good
    out[start[:-1]] = running[start[:-1]]
    return out


@dataclass(slots=True)
class WindowCounts:
    """What a window holds. ``dropped`` rows were offered but not counted.

    ``held`` has an entry per cell of the layout, and after those the violations of each counted rule of the schema.
    Of cells they are counts; or, where ``start`` says at which entries columns begin (marks are columns of their own,
    and the last is the end), running sums (``monitor.kernels.windows``). ``full`` says that the window has its whole
    length; ``look`` numbers the panes closed so far.
    """

    window: str
    rows: int
    dropped: int
    start_ns: int
    end_ns: int
    look: int
    full: bool
    held: Array
    start: Array | None = None

    @property
    def cells(self) -> Array:
        """Counts in either case; int64, made anew, where they are held as sums."""
        return self.held if self.start is None else counts_of(self.held, self.start).astype("i8")

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
class QualityScore:
    """One check of one column in one window: ``count`` of ``rows`` rows.

    ``check``: "missing", "below", "above", "new_category" (held against the reference's share), or "rule min", "rule
    max", "rule missing", "rule categories", "rule finite" (held against the share tolerated). ``allowed``: that share.
    ``p``: 1 where the share is too small for an alarm.
    """

    column: str
    check: str
    count: int
    rows: int
    share: float
    allowed: float
    p: float
    over: bool
    in_alarm: bool = False


@dataclass(slots=True, frozen=True)
class Alarm:
    """A change of an alarm. ``check`` is "drift", or the name of a quality check (``quality`` then has its numbers, and
    ``verdict.test`` its name). ``segment`` is empty for the whole arm.

    ``episode`` is unique per arm, segment, column and check, and the same for raise and end.
    """

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
    check: str = "drift"
    segment: str = ""
    quality: QualityScore | None = None


@dataclass(slots=True, frozen=True)
class MovedBin:
    """One PSI bin: its share of the reference and of the window, and its share of the column's PSI."""

    bin: str
    reference: float
    window: float
    share: float


@dataclass(slots=True, frozen=True)
class Contribution:
    """How much of a window's evidence of drift is this column's. ``rank`` 1 is the strongest.

    ``contribution`` is the column's share of the sum of ``max(0, -ln p - 1)`` over columns, p that of its stronger
    test: -ln p beyond its mean under no drift. 0 everywhere when no column has any. ``moved``: the bins that moved
    most.
    """

    column: str
    rank: int
    contribution: float
    moved: tuple[MovedBin, ...]


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
    #: In the order of ``scores`` and ``verdicts``.
    contributions: tuple[Contribution, ...] = ()
    #: Checks with something to say: a count over 0, a rule of the schema, or an alarm.
    quality: tuple[QualityScore, ...] = ()


@dataclass(slots=True, frozen=True, eq=False)
class WindowFigures:
    """The numbers of one window that are exported: float64 per column, in the order of ``columns``.

    As in ``ColumnScore``; ``evidence`` is ``Verdict.ratio``. ``in_alarm``: columns of the arm.
    """

    arm: str
    window: str
    in_alarm: tuple[str, ...]
    columns: tuple[str, ...]
    evidence: Array
    psi: Array
    ks_low: Array
    ks_p: Array
    missing: Array
    below: Array
    above: Array
    new_category: Array


@dataclass(slots=True, frozen=True)
class SegmentReport:
    """One window of one segment of an arm, held against the same segment of the reference.

    ``ratio`` is the strongest column's (see ``Verdict``); the columns of ``verdicts`` and ``contributions`` are the
    strongest few.
    """

    arm: str
    segment: str
    window: str
    rows: int
    full: bool
    start_ns: int
    end_ns: int
    level: float
    ratio: float
    in_alarm: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    contributions: tuple[Contribution, ...]


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
    #: The column that traffic is cut by, and its values' windows, the strongest evidence first.
    segment_column: str = ""
    segments: tuple[SegmentReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN and infinities stay floats."""
        return asdict(self)
