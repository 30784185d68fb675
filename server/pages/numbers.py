"""Numbers and times as people read them. What is no number, or NaN, is a dash."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Final

DASH: Final = "—"
_SECOND_NS: Final = 1_000_000_000
#: Last second that ``datetime`` knows.
_LAST_SECOND: Final = 253_402_300_799


def number(value: object) -> float:
    """A float; NaN for None, text and whatever else has no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def whole(value: object) -> int:
    """A count; 0 when there is none."""
    found = number(value)
    return int(found) if math.isfinite(found) else 0


def decimal(value: object) -> str:
    """Three or four significant digits."""
    found = number(value)
    if not math.isfinite(found):
        return DASH if math.isnan(found) else str(found)
    return f"{found + 0.0:.3f}" if found == 0 or 0.001 <= abs(found) < 100 else f"{found:.3g}"


def percent(value: object) -> str:
    """A share in percent; what is over zero never reads as zero."""
    found = number(value)
    if not math.isfinite(found):
        return DASH
    return "<0.01\u00a0%" if 0 < found < 0.0001 else f"{100 * found:.2f}".rstrip("0").rstrip(".") + "\u00a0%"


def p_value(value: object) -> str:
    found = number(value)
    if math.isnan(found):
        return DASH
    if found < 1e-300:
        return "<1e-300"
    return f"{found:.3f}" if found >= 0.001 else f"{found:.0e}"


def count(value: object) -> str:
    """Thousands apart by narrow spaces."""
    return f"{whole(value):,}".replace(",", "\u202f")


def moment(ns: object, pattern: str = "%Y-%m-%d %H:%M:%S") -> str:
    """A time in UTC; a dash for 0 and for what no calendar has."""
    seconds = whole(ns) // _SECOND_NS
    return datetime.fromtimestamp(seconds, UTC).strftime(pattern) if 0 < seconds <= _LAST_SECOND else DASH


def time_pattern(span_ns: int) -> str:
    """How ticks over a span are written."""
    if span_ns < 3600 * _SECOND_NS:
        return "%H:%M:%S"
    return "%m-%d %H:%M" if span_ns > 20 * 3600 * _SECOND_NS else "%H:%M"


def ticks(top: float, wanted: int = 4) -> list[float]:
    """Round numbers from 0 to ``top``, about ``wanted`` steps of 1, 2 or 5 times a power of ten."""
    if not (math.isfinite(top) and top > 0):
        return [0.0]
    rough = top / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    return [step * i for i in range(int(top / step * 1.0001) + 1)]
