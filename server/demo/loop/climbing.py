"""Scenes three and four: the new version climbs by itself; a broken one is refused, and, forced, taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from server.demo.loop.claims import LoopFailed, until
from server.demo.loop.replay import CALLERS
from server.demo.loop.rows import MODEL, break_forest, shuffled
from server.demo.loop.settings import FORCED, ROLLOUT, STEPS, forced_text
from server.demo.loop.stage import Stage

#: Rollouts count calls, so the calls are small.
_ROWS: Final = 4
#: A window of drift counts flights, so here they are larger.
_MORE_ROWS: Final = 16
_CLIMBED_S: Final = 90.0
_GATE_FAILED: Final = 3
_OPERATOR: Final = "operator"
#: Rows of the trail that give a candidate more traffic.
_GROWTH: Final = ("rollout.step", "rollout.promoting")
#: States that a job of retraining ends in.
_CLOSED: Final = ("promoted", "rejected", "lost")


async def climb(stage: Stage, version: str) -> None:
    """The challenger, from its quality gates to champion."""
    stage.reporter.line("\n[bold]Rollout[/bold]: quality gates, copies of the traffic, then 10, 50 and 100 % of it")
    may = shuffled(stage.flights.months(5, 5), seed=6)
    rollout, before = f"{ROLLOUT}-{version}", len(stage.replay.book.errors)
    with stage.reporter.step(f"{MODEL}:{version} climbs while May is replayed") as step:
        async with stage.replay.going_on(may, _ROWS):
            await _ends(stage, rollout, "promoted", step.progress)
        step.detail = f"{stage.replay.book.versions[version]:,} flights answered by it meanwhile"
    _climbed(stage, await _told(stage, rollout))
    aliases = await _aliases(stage)
    moved = aliases == {"champion": int(version), "previous": int(version) - 1}
    stage.claims.check(moved, f"champion is {aliases.get('champion')}, previous is {aliases.get('previous')}")
    job = await until(lambda: _closed_job(stage, version), "the job of the training was not closed", _CLIMBED_S)
    stage.claims.check(job["state"] == "promoted", f"the job of the training is {job['state']}")
    _nobody_failed(stage, before)


def _climbed(stage: Stage, story: Sequence[dict[str, Any]]) -> None:
    """By the trail: the gates first, then copies, then the shares of the steps, each once."""
    gated = next((event for event in story if event["action"] == "rollout.gated"), None)
    passed = gated is not None and gated["detail"]["status"] == "passed"
    stage.claims.check(passed, f"quality gates passed on flights that were held out{_findings(gated)}")
    shares = [event["detail"]["weight"] / 100 for event in story if event["action"] in _GROWTH]
    shadowed = any(event["action"] == "rollout.shadowing" for event in story)
    shown = ", ".join(f"{share:g} %" for share in shares)
    stage.claims.check(shadowed and shares == list(STEPS), f"got copies of the traffic, then {shown} of it")


async def refuse(stage: Stage, good: Path, version: int) -> None:
    """A version that was broken after its training: its gate refuses it; forced past it, it is taken back."""
    stage.reporter.line("\n[bold]A broken version[/bold]: the same forest, the weights of its leaves shuffled")
    broken = stage.places.root / "broken.onnx"
    broken.write_bytes(await asyncio.to_thread(break_forest, await asyncio.to_thread(good.read_bytes)))
    await _refused_in_a_pipeline(stage, good, broken)
    june = shuffled(stage.flights.months(6, 6), seed=7)
    before = len(stage.replay.book.errors)
    async with stage.replay.going_on(june, _MORE_ROWS, arrivals=False):
        number = await stage.tidegate.publish(MODEL, broken, good.with_suffix(".tgp"), "challenger")
        await _refused_by_the_server(stage, str(number))
        await _forced(stage, str(number))
    aliases = await _aliases(stage)
    stage.claims.check(aliases.get("champion") == version, f"champion is {aliases.get('champion')}, as before")
    _nobody_failed(stage, before)


async def _refused_in_a_pipeline(stage: Stage, good: Path, broken: Path) -> None:
    files = ("--candidate", str(broken), "--champion", str(good))
    with stage.reporter.step("tidegate gate check, as a pipeline does") as step:
        words = ("gate", "check", *files, "--policy", str(stage.places.policy), "--json")
        found = await stage.tidegate.run(*words, codes=(_GATE_FAILED,))
        failed = [one["gate"] for one in found.json()["findings"] if one["status"] == "failed"]
        step.detail = f"exit code {found.code}; failed: {', '.join(failed)}"


async def _refused_by_the_server(stage: Stage, number: str) -> None:
    rollout = f"{ROLLOUT}-{number}"
    with stage.reporter.step(f"{MODEL}:{number} published as challenger all the same") as step:
        found = await _ends(stage, rollout, "failed", step.progress)
    answered = stage.replay.book.versions[number]
    stage.claims.check(
        not answered, f"refused by its gates, {answered} flights answered by it; {_first(found['reason'])}"
    )


async def _forced(stage: Stage, number: str) -> None:
    rollout = f"{FORCED}-{number}"
    with stage.reporter.step(
        "somebody takes gates and shadow out of the configuration, and clears the version"
    ) as step:
        await stage.admin.apply(forced_text(stage.places), _OPERATOR, "it is urgent")
        words = ("--url", stage.admin_address, "--actor", _OPERATOR, "--reason", "it is urgent")
        await stage.tidegate.here("rollout", "clear", f"{ROLLOUT}-{number}", *words)
        found = await _ends(stage, rollout, "rolled_back", step.progress)
        answered = stage.replay.book.versions[number]
        step.detail = f"{answered:,} flights answered by it"
    stage.claims.check(answered > 0 and found["weight"] == 0, f"rolled back by itself: {found['reason']}; weight 0")
    await _settled(stage, number)


async def _closed_job(stage: Stage, version: str) -> dict[str, Any] | None:
    """The training's job once it is known what became of its version."""
    jobs = await stage.jobs()
    return next((job for job in jobs if job["version"] == version and job["state"] in _CLOSED), None)


async def _settled(stage: Stage, number: str) -> None:
    """From now on nothing reaches it, though the replay goes on."""
    book, before = stage.replay.book, stage.replay.book.versions[number]
    rows = book.rows

    async def more() -> bool | None:
        return True if book.rows > rows + 1000 else None

    await until(more, "the replay stood still", _CLIMBED_S)
    late = book.versions[number] - before
    stage.claims.check(late <= _MORE_ROWS * CALLERS, f"none of the next {book.rows - rows:,} flights is answered by it")


async def _ends(stage: Stage, rollout: str, wanted: str, progress: Any) -> dict[str, Any]:
    """The rollout when it has come to the state wanted. Raises LoopFailed when it ends otherwise."""

    async def look() -> dict[str, Any] | None:
        found = await stage.admin.rollout(rollout)
        if not found:
            return None
        progress(f"{found['state']} {found['weight']:g} % {found['reason']}")
        if found["state"] == wanted:
            return found
        if found.get("ended") or found["state"] == "hold":
            raise LoopFailed(f"rollout {rollout} is {found['state']}, not {wanted}: {found['reason']}")
        return None

    return await until(look, f"rollout {rollout} did not come to {wanted}", _CLIMBED_S)


async def _told(stage: Stage, rollout: str) -> list[dict[str, Any]]:
    """What the trail has of one rollout, oldest first."""
    events = await stage.admin.audit()
    return [
        event
        for event in events
        if event["action"].startswith("rollout.") and event["detail"].get("id", rollout) == rollout
    ]


def _findings(gated: dict[str, Any] | None) -> str:
    """How both models did on the holdout, and what else was asked."""
    found = [] if gated is None else list(gated["detail"]["evidence"])
    quality: dict[str, Any] = next((one["evidence"] for one in found if one["gate"] == "quality"), {})
    metrics = quality.get("metrics")
    if not metrics:
        return ""
    ours, theirs = metrics["candidate"], metrics["champion"]
    better = ", ".join(f"{name} {theirs[name]:.4f} -> {ours[name]:.4f}" for name in ("brier", "auc"))
    return f" ({quality['rows']:,}): {better}; {', '.join(one['gate'] for one in found if one['gate'] != 'quality')}"


def _first(reason: str) -> str:
    """The first of several reasons."""
    return reason.partition(";")[0]


async def _aliases(stage: Stage) -> dict[str, int]:
    rows = (await stage.tidegate.here("registry", "alias", MODEL, "--json")).json()
    return {row["alias"]: int(row["version"]) for row in rows if row["version"]}


def _nobody_failed(stage: Stage, before: int) -> None:
    book = stage.replay.book
    errors = book.errors[before:]
    first = f", the first: {errors[0]}" if errors else ""
    stage.claims.check(not errors, f"{len(errors)} of all calls failed meanwhile{first}")
