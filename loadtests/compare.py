"""Two results beside each other: for each cell that both have, how the second relates to the first, with intervals.

Runs are taken one after the other, so that their rounds are no pairs: a slow hour of the machine in one of them looks
like a change. Facts of the machine and settings that differ are named first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from loadtests import stats
from loadtests.results import METRICS, Result
from loadtests.stats import Estimate

_UNLIKE: Final = ("cpu", "cores", "usable_cores", "machine", "kernel", "python", "packages", "compiled")


@dataclass(slots=True, frozen=True)
class Compared:
    row: str
    column: str
    metric: str
    #: Second to first.
    ratio: Estimate

    @property
    def verdict(self) -> str:
        """``same`` when 1 lies within the interval; otherwise whether more or less of this metric is there."""
        if self.ratio.low <= 1.0 <= self.ratio.high:
            return "same"
        return "less" if self.ratio.high < 1.0 else "more"


def compare(first: Result, second: Result) -> list[Compared]:
    """All cells of both results. Two results with one cell each are compared whatever their names are."""
    return [
        Compared(row, column, metric, ratio)
        for row, column, a, b in _pairs(first, second)
        for metric in METRICS
        if (ratio := _ratio(first.values(*a, metric), second.values(*b, metric))) is not None
    ]


_Place = tuple[str, str]


def _places(result: Result) -> list[_Place]:
    return [(row, column) for row, columns in result.cells.items() for column in columns]


def _pairs(first: Result, second: Result) -> Iterator[tuple[str, str, _Place, _Place]]:
    ours, theirs = _places(first), _places(second)
    if len(ours) == len(theirs) == 1:
        yield (*theirs[0], ours[0], theirs[0])
        return
    for place in ours:
        if place in theirs:
            yield (*place, place, place)


def _ratio(first: list[float], second: list[float]) -> Estimate | None:
    a, b = ([value for value in values if math.isfinite(value) and value > 0] for values in (first, second))
    return stats.ratio(b, a) if a and b else None


def differences(first: Result, second: Result) -> list[str]:
    """Facts of the machine and settings that are not the same, as sentences."""
    machines = [(name, first.machine.get(name), second.machine.get(name)) for name in _UNLIKE]
    asked = [_settings(first.settings), _settings(second.settings)]
    settings = [(name, asked[0].get(name), asked[1].get(name)) for name in {**asked[0], **asked[1]}]
    return [f"{name} differs: {a} and {b}" for name, a, b in [*machines, *settings] if a != b]


def _settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was asked, without what is only said of it."""
    scenario = settings.get("scenario")
    if not isinstance(scenario, dict):
        return {name: value for name, value in settings.items() if name != "notes"}
    return {name: value for name, value in scenario.items() if name not in ("name", "target", "rounds")}


def text(first: Result, second: Result) -> str:
    """The comparison as a table."""
    found = compare(first, second)
    lines = [f"warning: {difference}" for difference in differences(first, second)]
    lines += [f"{second.name!r} to {first.name!r}: ratio [interval]; 1.00 is no change", ""]
    lines.append(f"{'row':<28}{'column':<18}{'metric':<19}{'ratio':<24}{'':<7}{'holds with':>10}")
    for one in found:
        lines.append(
            f"{one.row:<28}{one.column:<18}{one.metric:<19}{one.ratio.text():<24}{one.verdict:<7}"
            f"{one.ratio.confidence:>9.0%}"
        )
    return "\n".join(lines if found else [*lines[:-1], "no cell is in both results"])
