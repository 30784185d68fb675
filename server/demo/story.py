"""The demo's course. First act: prepare, serve, judge, load, check, sum up; the second is ``loop``'s."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass

from server.demo.clients import CallFailed, HttpClient, Load
from server.demo.installer import ClientsUnavailable
from server.demo.loop.story import run_loop
from server.demo.models import write_repository
from server.demo.options import DemoOptions
from server.demo.prepare import Preparation, Prepared
from server.demo.process import Addresses, ServerFailed
from server.demo.quality import Finding, judge
from server.demo.report import Reporter
from server.demo.serving import Server, refuse_beside_a_kept_server, serving
from server.demo.statistics import served
from server.demo.verdict import Row, count_failures, row_failures
from server.demo.wheels import WheelMismatch, WheelUnavailable
from server.demo.workload import compare


def tell(options: DemoOptions) -> int:
    """Run the acts that are asked for and show them; the exit code."""
    reporter = Reporter(options.plain)
    failures: list[str] = []
    try:
        refuse_beside_a_kept_server(options.kept_file)
        options.state_dir.mkdir(parents=True, exist_ok=True)
        reporter.line(f"[bold]Tidegate demo[/bold] on {os.cpu_count()} cores; its files are in {options.state_dir}/")
        if options.serves:
            failures += _Serving(options, reporter).run()
        if options.loops:
            failures += run_loop(options, reporter)
    except (ServerFailed, CallFailed, WheelUnavailable, WheelMismatch, ClientsUnavailable) as error:
        failures.append(str(error))
    for failure in failures:
        reporter.failed(failure)
    return 1 if failures else 0


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What the served models did while the server was up."""

    findings: list[Finding]
    rows: list[Row]
    load_seconds: float


@dataclass(slots=True)
class _Serving:
    """The first act."""

    options: DemoOptions
    reporter: Reporter

    def run(self) -> list[str]:
        """What went wrong; empty when all is well."""
        begun = time.monotonic()
        state_dir = self.options.state_dir
        prepared = Preparation(self.options, self.reporter).run()
        repository = state_dir / "model-repository"
        write_repository(repository, prepared.scenario.models)
        kept_file = self.options.kept_file if self.options.keep and not self.options.loops else None
        self.reporter.line("\n[bold]Server[/bold]")
        with serving(
            Server(repository, state_dir / "server", state_dir / "server.log", kept_file), self.reporter
        ) as up:
            outcome = asyncio.run(self._use(prepared, up))
            failures = self._show(outcome)
        self._sum_up(outcome, prepared, failures, time.monotonic() - begun)
        return failures

    async def _use(self, prepared: Prepared, addresses: Addresses) -> _Outcome:
        scenario = prepared.scenario
        async with HttpClient(addresses.http) as client:
            self.reporter.line("\n[bold]Quality[/bold], judged on answers that came through the server")
            findings = await judge(scenario, client.infer)
            self.reporter.findings(findings)
            models = [model.name for model in scenario.models]
            before = await served(client, models)
            load = Load(
                scenario.workloads,
                addresses.http,
                addresses.grpc,
                self.options.seconds,
                self.options.state_dir / "calls",
                prepared.clients_python,
            )
            await self._load(load)
            after = await served(client, models)
        counted = {name: now.since(before[name]) for name, now in after.items()}
        rows = [Row(log, compare(log), counted[log.workload.name]) for log in load.logs]
        return _Outcome(findings, sorted(rows, key=lambda row: row.log.workload.name), load.took_s)

    async def _load(self, load: Load) -> None:
        protocols = "JSON and binary over HTTP (httpx)" + (", gRPC (tritonclient)" if load.clients_python else "")
        callers = load.callers()
        self.reporter.line(f"\n[bold]Load[/bold]: {callers} callers for {load.seconds:g} s, {protocols}, all at once")
        with self.reporter.load(load.counts, load.seconds) as tick:
            await load.run(tick)

    def _show(self, outcome: _Outcome) -> list[str]:
        """The tables; what is wrong in them."""
        self.reporter.results(outcome.rows)
        failures = [f"{finding.model}: {finding.text}" for finding in outcome.findings if not finding.ok]
        for row in outcome.rows:
            failures += row_failures(row)
        return failures + count_failures(outcome.rows)

    def _sum_up(self, outcome: _Outcome, prepared: Prepared, failures: list[str], total_s: float) -> None:
        self.reporter.summary(outcome.rows, outcome.load_seconds)
        if prepared.skipped:
            self.reporter.line(f"[yellow]skipped[/yellow]: {', '.join(prepared.skipped)}")
        verdict = f"[bold red]{len(failures)} failures[/bold red]" if failures else "[bold green]all good[/bold green]"
        self.reporter.line(f"{verdict}, {total_s:.0f} s in all")
