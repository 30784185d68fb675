"""The result of ``python -m loadtests.peers`` as text: a block for each row, and the goals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from loadtests import stats
from loadtests.bench_rows import Goal, Row
from loadtests.bench_table import estimate, generator_was_the_limit, heading, limit_of, reached
from loadtests.peers.catalog import MOSEC, PYTRITON
from loadtests.peers.paired import OURS
from loadtests.results import Result
from loadtests.stats import Estimate

#: How far Tidegate is to be ahead, of a peer by a protocol: this many times its rate at this part of its CPU time.
FACTORS: Final = {(MOSEC.name, "http-json"): 2.0, (MOSEC.name, "http-binary"): 2.0, (PYTRITON.name, "grpc"): 12.0}
#: Cores that neighbours may take before ratios mean little: servers of many threads then get more than those of one.
_NOISE: Final = 0.2
_BEFORE: Final = {"rate": "/s", "cpu_us": "us CPU"}


def goals(result: Result, rows: Iterable[Row]) -> list[Goal]:
    """Of every peer in every row that it was measured in; floors have their goals in ``make bench``."""
    peers = result.settings["peers"]
    return [
        goal
        for row in rows
        for column in result.cells.get(row.name, {})
        if column in peers
        for factor in [FACTORS.get((column, row.way.protocol), 1.0)]
        for goal in (
            Goal(row.name, OURS, row.name, column, "rate", factor, at_least=True),
            Goal(row.name, OURS, row.name, column, "cpu_us", 1 / factor),
        )
    ]


def _met(result: Result, goal: Goal) -> bool:
    return reached(goal, estimate(result, goal)).startswith("reached")


def text(result: Result, rows: Iterable[Row]) -> str:
    """Everything that is to be read."""
    kept = [row for row in rows if row.name in result.cells]
    blocks = [line for row in kept for line in ("", *_block(result, row))]
    return "\n".join([*heading(result), *blocks, "", *_goals(result, kept), "", *_notes(result, kept)])


def _block(result: Result, row: Row) -> Iterator[str]:
    yield f"{row.name}: {row.says}"
    yield (
        f"  {'':<12}{'/s':>8}{'p50 ms':>9}{'p99 ms':>9}{'us CPU':>9}{'errors':>8}"
        f"   {f'/s, {OURS} to it':<24}{f'us CPU, {OURS} to it':<24}"
    )
    columns = result.cells[row.name]
    for column in sorted(columns, key=lambda one: -_median(result, row, one, "rate")):
        rate, p50, p99, cpu = (_median(result, row, column, m) for m in ("rate", "p50_us", "p99_us", "cpu_us"))
        errors = sum(sample.errors for sample in columns[column])
        figures = f"{rate:>8.0f}{p50 / 1000:>9.2f}{p99 / 1000:>9.2f}{cpu:>9.1f}{errors:>8}"
        ratios = [_ratio(result, row, column, metric) for metric in _BEFORE] if column != OURS else []
        yield f"  {column:<12}{figures}   {''.join(f'{ratio.text():<24}' for ratio in ratios)}".rstrip()


def _median(result: Result, row: Row, column: str, metric: str) -> float:
    values = [value for value in result.values(row.name, column, metric) if math.isfinite(value)]
    return stats.median(values).value


def _ratio(result: Result, row: Row, column: str, metric: str) -> Estimate:
    return estimate(result, Goal(row.name, OURS, row.name, column, metric, None))


def _goals(result: Result, rows: list[Row]) -> Iterator[str]:
    """One line for each goal that is more than to be ahead, and one for each peer."""
    every = goals(result, rows)
    yield f"{'goal, ratio of one interleaved run':<58}{'':>10}  {'median [interval]':<28}"
    for goal in every:
        if goal.limit != 1.0:
            ratio = estimate(result, goal)
            name = f"{goal.row}: {goal.column} to {goal.base_column}, {_BEFORE[goal.metric]}"
            yield f"{name:<58}{limit_of(goal):>10}  {ratio.text(3):<28}{reached(goal, ratio)}"
    for peer in result.settings["peers"]:
        if own := [replace(goal, limit=1.0) for goal in every if goal.base_column == peer]:
            lost = [f"{goal.row} ({_BEFORE[goal.metric]})" for goal in own if not _met(result, goal)]
            verdict = f"NOT reached in {len(lost)}: {', '.join(lost)}" if lost else "reached"
            yield f"{f'ahead of {peer} in all {len(own)} comparisons':<58}{'':>10}  {verdict}"
    errors = sum(sample.errors for columns in result.cells.values() for sample in columns.get(OURS, []))
    yield f"{f'no errors of {OURS}':<58}{'':>10}  {'reached' if not errors else f'NOT reached: {errors}'}"


def _foreign_cores(result: Result, rows: list[Row]) -> float:
    """Median over the cells that our own generator asked: beside h2load its own time could not be told apart."""
    cells = [samples for row in rows if not row.external for samples in result.cells[row.name].values()]
    known = [s.foreign_cpu_s / s.seconds for samples in cells for s in samples if s.foreign_cpu_s is not None]
    return stats.median(known).value if known else 0.0


def _notes(result: Result, rows: list[Row]) -> Iterator[str]:
    rounds, wanted = result.settings["rounds"], result.settings["rounds_wanted"]
    batch = result.settings["batch"]
    yield f"{rounds} rounds" + (f" of {wanted}: then time was up." if rounds < wanted else ".")
    if (foreign := _foreign_cores(result, rows)) > _NOISE:
        yield f"NOISE: everything else on the machine took {foreign:.1f} cores meanwhile; measure again."
    delay = f"peers wait {batch['delay_ms']} ms for them where it can be set"
    yield f"Batches of at most {batch['max_rows']} rows; {delay}."
    yield "us CPU: user and system time of the server's process tree per good answer. Medians of the rounds; intervals"
    yield "by order statistics (95 %, or the whole range where there are few rounds)."
    yield from generator_was_the_limit(result)
    for column, why in result.settings["left_out"].items():
        yield f"Left out, {column}: {why.splitlines()[0]}"
