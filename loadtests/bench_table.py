"""The result of ``make bench`` as text: a table of rows and columns, and the goals with their ratios."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from loadtests import stats
from loadtests.bench_rows import BARE, GOALS, NATIVE, NGH2, Goal, Row
from loadtests.results import Result
from loadtests.stats import Estimate

_UNITS: Final = {"cpu_us": "us CPU", "p50_us": "us p50", "p99_us": "us p99", "rate": "/s"}
_WIDTH: Final = 16
#: Share of a core, over which rate and latency are the generator's own. CPU per request of the server is not.
_BUSY_GENERATOR: Final = 0.9
#: What must be known of floors to read the ratios to them.
_FLOORS: Final = {
    NGH2: "a gRPC echo as users of the ngh2 library write it, in plain Python: the bare echo of native's class",
    BARE: "our own HTTP/2 session or an HTTP parser with nothing around it, no calls, no framing: no goal, to be known",
}


def text(result: Result, rows: Iterable[Row]) -> str:
    """Everything that is to be read of the rows that were to be measured."""
    rows = tuple(rows)
    return "\n".join(
        [*heading(result), "", *_table(result, rows), "", *_goals(result, rows), *_peers(result), "", *_notes(result)]
    )


def heading(result: Result) -> Iterator[str]:
    """Where and when it was measured."""
    machine = result.machine
    commit = machine["commit"] or "unknown"
    yield f"{machine['cpu']}, {machine['usable_cores']} cores, Python {machine['python']}, commit {commit}"
    yield "Tidegate compiled, as in a wheel" if machine["compiled"] else "Tidegate NOT compiled, slower than in a wheel"
    yield f"load average {result.load_start:.2f} at the start, {result.load_end:.2f} at the end"


def _table(result: Result, rows: Iterable[Row]) -> Iterator[str]:
    """Medians over the rounds; rates in brackets where the row is about cost."""
    kept = [row for row in rows if row.name in result.cells]
    named = [column for row in kept for column in (*row.columns, *result.cells[row.name])]
    columns = [column for column in dict.fromkeys(named) if any(column in result.cells[row.name] for row in kept)]
    yield f"{'':<20}{'':<8}" + "".join(f"{column[: _WIDTH - 1]:>{_WIDTH}}" for column in columns)
    for row in kept:
        cells = [_cell(result, row, column) for column in columns]
        yield f"{row.name:<20}{_UNITS[row.metric]:<8}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells)
        if row.metric != "rate":
            rates = [_median(result.values(row.name, column, "rate"), 0) for column in columns]
            yield f"{'':<20}{'/s':<8}" + "".join(f"{rate:>{_WIDTH}}" for rate in rates)


def _cell(result: Result, row: Row, column: str) -> str:
    values = [value for value in result.values(row.name, column, row.metric) if math.isfinite(value)]
    return _median(values, 0 if row.metric == "rate" else 1)


def _median(values: Sequence[float], digits: int) -> str:
    return f"{stats.median(values).value:.{digits}f}" if values else ""


def reached(goal: Goal, ratio: Estimate) -> str:
    """By the median; ``within noise`` where the interval holds the limit too."""
    if math.isnan(ratio.value):
        return "not measured"
    if goal.limit is None:
        return "no goal"
    good = ratio.value >= goal.limit if goal.at_least else ratio.value <= goal.limit
    word = "reached" if good else "NOT reached"
    return word + (", within noise" if ratio.low <= goal.limit <= ratio.high else "")


def estimate(result: Result, goal: Goal) -> Estimate:
    """The ratio of a goal's two cells, round by round as far as both have them."""
    values = result.values(goal.row, goal.column, goal.metric)
    base = result.values(goal.base_row, goal.base_column, goal.metric)
    rounds = min(len(values), len(base))
    return stats.paired_ratio(values[:rounds], base[:rounds])


def _goals(result: Result, rows: Iterable[Row]) -> Iterator[str]:
    asked = {row.name for row in rows}
    yield f"{'ratio of one interleaved run':<62}{'goal':>10}  {'median [interval]':<28}"
    for goal in (goal for goal in GOALS if goal.row in asked):
        ratio = estimate(result, goal)
        base = goal.base_column if goal.base_row == goal.row else f"{goal.base_row} {goal.base_column}"
        name = f"{goal.row}: {goal.column} to {base}, {_UNITS[goal.metric]}"
        yield f"{name:<62}{limit_of(goal):>10}  {_shown(ratio):<28}{reached(goal, ratio)}"


def limit_of(goal: Goal) -> str:
    """What the ratio is to be, as text."""
    return "" if goal.limit is None else f"{'>=' if goal.at_least else '<='} {goal.limit:.3g}"


def _peers(result: Result) -> Iterator[str]:
    """What each peer takes and gives, of what ``native`` does."""
    for peer in result.settings.get("peers", []):
        yield ""
        for row, columns in result.cells.items():
            if peer in columns and NATIVE in columns:
                for metric in ("cpu_us", "rate"):
                    ratio = estimate(result, Goal(row, peer, row, NATIVE, metric, None))
                    yield f"{f'{row}: {peer} to {NATIVE}, {_UNITS[metric]}':<62}{'':>10}  {_shown(ratio)}"


def _shown(ratio: Estimate) -> str:
    return "-" if math.isnan(ratio.value) else ratio.text(3)


def _notes(result: Result) -> Iterator[str]:
    yield "us CPU: user and system time of the server's process tree per good answer. Medians of the rounds."
    yield "Intervals of medians by order statistics (95 %, or the whole range where there are few rounds)."
    measured = {column for columns in result.cells.values() for column in columns}
    yield from (f"{floor}: {says}." for floor, says in _FLOORS.items() if floor in measured)
    for row, columns in result.cells.items():
        for column, samples in columns.items():
            errors = sum(sample.errors for sample in samples)
            if errors:
                yield f"ERRORS: {row}, {column}: {errors} of {sum(s.latency.count for s in samples)} requests"
    yield from generator_was_the_limit(result)
    yield from (str(note) for note in result.settings.get("notes", []))


def generator_was_the_limit(result: Result) -> Iterator[str]:
    """A line for each cell whose rate is that of our own generator."""
    for row, columns in result.cells.items():
        for column, samples in columns.items():
            if stats.median([s.client_cpu_s / s.seconds for s in samples]).value > _BUSY_GENERATOR:
                yield f"The generator was the limit of the rate: {row}, {column}"
