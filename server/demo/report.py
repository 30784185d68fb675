"""What the demo shows: steps as they are done, live counts during the load, tables and a summary at the end.

Without a terminal (or with ``--plain``) nothing moves: finished steps and a line of counts every few seconds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from server.demo.clients import Count
from server.demo.data import KNOWN_WHEN, LATE_MINUTES
from server.demo.quality import Finding
from server.demo.verdict import Row, row_failures
from server.demo.workload import ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE

_PLAIN_EVERY_S: Final = 3.0
#: A pipe has no width: wide enough for the widest table.
_PLAIN_WIDTH: Final = 120

Counts = Mapping[tuple[str, str], Count]


@dataclass(slots=True)
class Step:
    """One thing being done. ``detail`` is shown beside it when it is finished."""

    name: str
    detail: str = ""
    _status: Status | None = None

    def progress(self, line: str) -> None:
        """Show what the step is at, where something may move."""
        if self._status is not None and line:
            self._status.update(f"{escape(self.name)} [dim]{escape(line[:90])}[/dim]")


@dataclass(slots=True)
class Reporter:
    plain: bool
    console: Console = field(default_factory=Console)

    def __post_init__(self) -> None:
        if not self.console.is_terminal:
            self.plain = True
            self.console.width = _PLAIN_WIDTH

    def line(self, text: str = "") -> None:
        """Rich markup; wrapped at words in a terminal, whole lines elsewhere."""
        self.console.print(text, highlight=False, soft_wrap=self.plain)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Show that something is being done, then that it is done and how long it took."""
        step, begun = Step(name), time.monotonic()
        if self.plain:
            yield step
        else:
            with self.console.status(escape(name), spinner="line") as step._status:
                yield step
        took = time.monotonic() - begun
        self.line(
            f"  [green]done[/green] {took:5.1f} s  {escape(name)}{escape(': ' + step.detail) * bool(step.detail)}"
        )

    def known_when(self) -> None:
        """What the model of the flights predicts, and when each of its columns is known."""
        self.line(f"        predicts at departure: will it arrive over {LATE_MINUTES} min late? Known:")
        for moment, columns in KNOWN_WHEN:
            self.line(f"        - {moment}: {columns}")

    def skipped(self, name: str, reason: str) -> None:
        self.line(f"  [yellow]skipped[/yellow]       {escape(name)}: {escape(reason)}")

    def failed(self, text: str) -> None:
        self.line(f"[bold red]FAILED[/bold red] {escape(text)}")

    @contextlib.contextmanager
    def load(self, counts: Callable[[], Counts], seconds: float) -> Iterator[Callable[[], None]]:
        """Show the counts while the load runs; to be called from its start a few times a second."""
        clock = _Clock()
        if self.plain:
            yield _PlainTicker(self, counts, clock, seconds)
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            yield lambda: live.update(_live_table(counts(), clock.elapsed_s(), seconds), refresh=True)

    def findings(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            mark = "[green]ok[/green]    " if finding.ok else "[bold red]FAILED[/bold red]"
            self.line(f"  {mark} {finding.model:<13} {escape(finding.text)}")

    def results(self, rows: Sequence[Row]) -> None:
        """The final table: one line per model version and protocol."""
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("model")
        table.add_column("over")
        for name in ("calls", "errors", "batch", "p50", "p95", "p99", "exact", "close", "wrong"):
            table.add_column(name, justify="right")
        previous = ""
        for row in rows:
            name = row.log.workload.name
            table.add_row(*_cells(row, first=name != previous), style="bold red" if row_failures(row) else None)
            previous = name
        self.console.print(table)
        for text in _LEGEND:
            self.line(f"[dim]{text}[/dim]")

    def summary(self, rows: Sequence[Row], load_seconds: float) -> None:
        """All calls in one sentence."""
        calls = sum(len(row.log.requests) for row in rows)
        errors = sum(len(row.log.errors) for row in rows)
        checks = [row.comparison for row in rows]
        exact, close, wrong = (sum(getattr(check, name) for check in checks) for name in ("exact", "close", "wrong"))
        self.line(
            f"\n[bold]Summary[/bold]: {calls:,} calls over {len({row.log.protocol for row in rows})} protocols in "
            f"{load_seconds:.0f} s, {errors:,} errors. {sum(check.checked for check in checks):,} answers checked: "
            f"{exact:,} equal bit for bit, {close:,} within tolerance, {wrong:,} wrong."
        )


_LEGEND: Final = (
    "batch: mean/max rows per execution, from the server's statistics; the protocols share batches.",
    "p50, p95, p99: milliseconds as the caller saw them; callers and server share this machine's cores.",
    "Every answer was checked against ONNX Runtime in this process, given the same request alone.",
    f"exact: equal bit for bit; close: floats within {RELATIVE_TOLERANCE:g} relative + {ABSOLUTE_TOLERANCE:g}.",
)


def _cells(row: Row, *, first: bool) -> list[str]:
    log, comparison = row.log, row.comparison
    batch = f"{row.served.mean_batch:.1f}/{row.served.largest_batch}" if first else ""
    counts = (comparison.exact, comparison.close, comparison.wrong)
    return [
        log.workload.name if first else "",
        log.protocol,
        f"{len(log.requests):,}",
        f"{len(log.errors):,}",
        batch,
        *percentiles(log.latencies_ns),
        *(f"{count:,}" for count in counts),
    ]


def percentiles(latencies_ns: Sequence[int]) -> list[str]:
    """p50, p95 and p99 in milliseconds, as text; dashes where nothing was answered."""
    if not latencies_ns:
        return ["-"] * 3
    return [f"{value / 1e6:.1f}" for value in np.percentile(latencies_ns, [50, 95, 99])]


def _live_table(counts: Counts, elapsed_s: float, seconds: float) -> Table:
    done = min(1.0, elapsed_s / seconds)
    bar = "#" * int(30 * done) + "." * (30 - int(30 * done))
    table = Table(title=f"calling {bar} {min(elapsed_s, seconds):.0f}/{seconds:.0f} s", box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("protocol")
    for name in ("requests", "per second", "median ms", "errors"):
        table.add_column(name, justify="right")
    for (model, protocol), count in sorted(counts.items()):
        rate = f"{count.requests / max(elapsed_s, 0.1):,.0f}"
        style = "red" if count.errors else None
        table.add_row(
            model, protocol, f"{count.requests:,}", rate, f"{count.median_ms:.1f}", f"{count.errors:,}", style=style
        )
    return table


@dataclass(slots=True)
class _Clock:
    """Seconds since it was first asked."""

    begun: float | None = None

    def elapsed_s(self) -> float:
        now = time.monotonic()
        self.begun = now if self.begun is None else self.begun
        return now - self.begun


@dataclass(slots=True)
class _PlainTicker:
    """A line of totals per protocol every few seconds."""

    reporter: Reporter
    counts: Callable[[], Counts]
    clock: _Clock
    seconds: float
    last: float = 0.0

    def __call__(self) -> None:
        elapsed = self.clock.elapsed_s()
        if elapsed - self.last < _PLAIN_EVERY_S:
            return
        self.last = elapsed
        totals: dict[str, int] = {}
        errors = 0
        for (_, protocol), count in self.counts().items():
            totals[protocol] = totals.get(protocol, 0) + count.requests
            errors += count.errors
        shown = ", ".join(f"{protocol} {total:,}" for protocol, total in totals.items())
        self.reporter.line(f"  {elapsed:4.0f} of {self.seconds:.0f} s: {shown} requests, {errors} errors")
