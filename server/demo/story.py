"""The demo's course: prepare, serve, judge, load, check, sum up."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

from server.demo.clients import CallFailed, HttpClient, Load
from server.demo.installer import ClientsUnavailable
from server.demo.models import write_repository
from server.demo.options import DemoOptions
from server.demo.prepare import Preparation, Prepared
from server.demo.process import Addresses, ServerFailed, ServerProcess, kept_server, remember
from server.demo.quality import Finding, judge
from server.demo.report import Reporter
from server.demo.statistics import served
from server.demo.verdict import Row, count_failures, row_failures
from server.demo.wheels import WheelMismatch, WheelUnavailable
from server.demo.workload import compare


def tell(options: DemoOptions) -> int:
    """Run the demo and show it; the exit code."""
    reporter = Reporter(options.plain)
    try:
        failures = _Story(options, reporter).run()
    except (ServerFailed, CallFailed, WheelUnavailable, WheelMismatch, ClientsUnavailable) as error:
        failures = [str(error)]
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
class _Story:
    options: DemoOptions
    reporter: Reporter

    def run(self) -> list[str]:
        """What went wrong; empty when all is well."""
        begun = time.monotonic()
        state_dir = self.options.state_dir
        kept_file = state_dir / "kept-server.json"
        _refuse_beside_a_kept_server(kept_file)
        state_dir.mkdir(parents=True, exist_ok=True)
        self.reporter.line(f"[bold]Tidegate demo[/bold] on {os.cpu_count()} cores; its files are in {state_dir}/")
        prepared = Preparation(self.options, self.reporter).run()
        repository = state_dir / "model-repository"
        write_repository(repository, prepared.scenario.models)
        server = ServerProcess(repository, state_dir / "server", state_dir / "server.log")
        try:
            addresses = self._wait(server)
            outcome = asyncio.run(self._use(prepared, addresses))
            failures = self._show(outcome)
            if self.options.keep:
                remember(kept_file, server, addresses)
                server.leave_up()
            else:
                failures += self._stop(server)
        except BaseException:
            server.kill()
            raise
        self._sum_up(outcome, prepared, failures, time.monotonic() - begun)
        if self.options.keep:
            self._tell_kept(server, addresses)
        return failures

    def _wait(self, server: ServerProcess) -> Addresses:
        self.reporter.line("\n[bold]Server[/bold]")
        with self.reporter.step("tidegate serve") as step:
            addresses = server.wait_ready()
            step.detail = f"ready: HTTP {addresses.http}, gRPC {addresses.grpc}, metrics {addresses.metrics}"
        return addresses

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

    def _stop(self, server: ServerProcess) -> list[str]:
        try:
            with self.reporter.step("SIGTERM: drained and ended"):
                server.stop()
        except ServerFailed as error:
            return [str(error)]
        return []

    def _sum_up(self, outcome: _Outcome, prepared: Prepared, failures: list[str], total_s: float) -> None:
        self.reporter.summary(outcome.rows, outcome.load_seconds)
        if prepared.skipped:
            self.reporter.line(f"[yellow]skipped[/yellow]: {', '.join(prepared.skipped)}")
        verdict = f"[bold red]{len(failures)} failures[/bold red]" if failures else "[bold green]all good[/bold green]"
        self.reporter.line(f"{verdict}, {total_s:.0f} s in all")

    def _tell_kept(self, server: ServerProcess, addresses: Addresses) -> None:
        self.reporter.line(
            f"\nThe server stays up (pid {server.pid}; log {server.log}): HTTP {addresses.http}, "
            f"gRPC {addresses.grpc}, metrics {addresses.metrics}, admin {addresses.admin}\n"
            f"  curl http://{addresses.http}/v2/models/digits\n"
            f"  kill {server.pid}"
        )


def _refuse_beside_a_kept_server(kept_file: Path) -> None:
    kept = kept_server(kept_file)
    if kept is not None:
        raise ServerFailed(
            f"the server that an earlier demo left up (pid {kept.pid}, http://{kept.http}) uses {kept_file.parent}: "
            f"end it with 'kill {kept.pid}', or choose another --state-dir"
        )
