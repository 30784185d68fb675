"""Decides from what was measured whether the demo failed, and says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.demo.statistics import Served
from server.demo.workload import CallLog, Comparison


@dataclass(frozen=True, slots=True)
class Row:
    """One workload over one protocol, measured and checked. ``served`` is the model version's, over all protocols."""

    log: CallLog
    comparison: Comparison
    served: Served


def row_failures(row: Row) -> list[str]:
    """What is wrong with one workload over one protocol."""
    name = f"{row.log.workload.name} over {row.log.protocol}"
    failures = []
    if row.log.errors:
        failures.append(f"{name}: {len(row.log.errors)} errors, the first: {row.log.errors[0]}")
    if row.comparison.wrong:
        failures.append(f"{name}: {row.comparison.wrong} of {row.comparison.checked} answers are wrong")
    if not row.log.requests:
        failures.append(f"{name}: not one answer")
    return failures


def count_failures(rows: Sequence[Row]) -> list[str]:
    """The server must have counted just the rows that the callers had answered, where no call failed."""
    answered: dict[str, int] = {}
    for row in rows:
        answered[row.log.workload.name] = answered.get(row.log.workload.name, 0) + row.log.rows
    failed = {row.log.workload.name for row in rows if row.log.errors}
    counted = {row.log.workload.name: row.served.rows for row in rows}
    return [
        f"{name}: the callers had {answered_rows:,} rows answered, the server counted {counted[name]:,}"
        for name, answered_rows in answered.items()
        if name not in failed and counted[name] != answered_rows
    ]
