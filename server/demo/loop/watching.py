"""Scene one: a month like those before raises no alarm, traffic from one airport only does, and the report says why."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from server.demo.loop.claims import until
from server.demo.loop.rows import MODEL, only_from, shuffled
from server.demo.loop.stage import Stage

#: Rows a call: months go by in seconds.
ROWS: Final = 32
#: So many flights from one airport are enough for every window.
_SHIFTED: Final = 4000
_AIRPORT: Final = b"JFK"
_SEEN_S: Final = 20.0
_ALARMS: Final = ("drift.raised", "quality.raised", "performance.raised", "calibration.raised")


async def watch(stage: Stage) -> None:
    """March as it was, then JFK alone, then the report."""
    stage.reporter.line("\n[bold]Drift[/bold]: March as it was, then the same month from one airport only")
    await _unshifted(stage)
    await _shifted(stage)
    await _report(stage)


async def _unshifted(stage: Stage) -> None:
    march = shuffled(stage.flights.months(3, 3), seed=3)
    with stage.reporter.step("March, replayed with its arrivals") as step:
        await stage.replay.send(march, ROWS, progress=step.progress)
        document = await until(lambda: _counted(stage, len(march.late)), "not all of March was counted", _SEEN_S)
        step.detail = f"{len(march.late):,} flights, {stage.replay.book.told:,} arrivals joined with their predictions"
    raised = [f"{event['action']} of {_named(event)}" for event in await stage.audited(*_ALARMS)]
    stage.claims.check(not raised, f"no alarm in March{': ' * bool(raised)}{', '.join(raised)}")
    name, psi = _largest(document)
    stage.claims.check(psi < 0.1, f"largest PSI of a full window at its end: {name} {psi:.3f}")


async def _shifted(stage: Stage) -> None:
    march = shuffled(only_from(stage.flights.months(3, 3), _AIRPORT), seed=4)
    some = march.rows(slice(0, _SHIFTED))
    airport = _AIRPORT.decode()
    with stage.reporter.step(f"{airport} only, arrivals not known yet") as step:
        await stage.replay.send(some, ROWS, arrivals=False, progress=step.progress)
        document = await until(lambda: _full_shift(stage), "no window saw only shifted traffic", _SEEN_S)
        alarms = await until(lambda: _raised(stage), "no drift alarm was raised", _SEEN_S)
        step.detail = f"{len(some.late):,} flights"
    stage.claims.check("origin" in alarms, f"alarms: {', '.join(alarms)}")
    first = _ranked(document)
    stage.claims.check(first[0] == "origin", f"features by evidence: {', '.join(first[:3])}: origin ranks first")


async def _report(stage: Stage) -> None:
    path = stage.places.report
    words = ("monitor", "report", "--model", f"{MODEL}:1", "--url", stage.admin_address, "--html", str(path))
    await stage.tidegate.run(*words)
    page = await asyncio.to_thread(path.read_text, encoding="utf-8")
    whole = "<svg" in page and "origin" in page and "://" not in page.replace("http://www.w3.org", "")
    stage.claims.check(whole, f"drift report with plots: {path}")


async def _counted(stage: Stage, rows: int) -> dict[str, Any] | None:
    document = await stage.admin.monitor(MODEL, "1")
    counted = document.get("report", {}).get("counted", {}).get("stable", 0)
    return document if counted >= rows else None


async def _full_shift(stage: Stage) -> dict[str, Any] | None:
    """Once everything that was sent is counted, its window has nothing but shifted rows."""
    return await _counted(stage, stage.replay.book.rows)


async def _raised(stage: Stage) -> list[str] | None:
    """The inputs that an alarm was raised for."""
    return [_named(event) for event in await stage.audited("drift.raised")] or None


def _window(document: dict[str, Any]) -> dict[str, Any]:
    """The stable arm's full window."""
    found = [one for one in document["report"]["windows"] if one["arm"] == "stable" and one["full"]]
    return dict(found[0]) if found else {"scores": []}


def _largest(document: dict[str, Any]) -> tuple[str, float]:
    """(column, PSI) of the column that differs most."""
    scores = _window(document)["scores"]
    return max(((one["column"], float(one["psi"])) for one in scores), key=lambda one: one[1], default=("-", 1.0))


def _ranked(document: dict[str, Any]) -> list[str]:
    return [str(one["column"]) for one in _window(document)["scores"]] or ["-"]


def _named(event: dict[str, Any]) -> str:
    return str(event["detail"].get("feature") or event["detail"].get("name"))
