"""Scene two: the arrivals of April say that the model has aged; a training is asked for, runs, and registers."""

from __future__ import annotations

from typing import Any, Final

from server.demo.loop.claims import until
from server.demo.loop.rows import MODEL, shuffled
from server.demo.loop.stage import Stage
from server.demo.loop.watching import ROWS

_SEEN_S: Final = 20.0
_TRAINED_S: Final = 150.0
#: Alarms that come from labels.
_DECAY: Final = ("performance.raised", "calibration.raised")


async def relearn(stage: Stage) -> str:
    """April with its arrivals; the version that the training registered."""
    stage.reporter.line("\n[bold]Retraining[/bold]: April, whose arrivals become known a little later")
    await _decay(stage)
    return await _training(stage)


async def _decay(stage: Stage) -> None:
    april = shuffled(stage.flights.months(4, 4), seed=5)
    with stage.reporter.step("April, replayed with its arrivals") as step:
        await stage.replay.send(april, ROWS, progress=step.progress)
        await until(lambda: stage.first_audited(*_DECAY), "the arrivals of April raised no alarm", _SEEN_S)
        step.detail = f"{len(april.late):,} flights"
    alarms = await stage.audited(*_DECAY)
    told = [f"{one['name']} worse by {one['effect']:.3f}" for one in (alarm["detail"] for alarm in alarms)]
    stage.claims.check(bool(told), f"alarms: {', '.join(told)}")
    drift = await stage.audited("drift.raised", "drift.cleared")
    calm = bool(drift) and drift[-1]["action"] == "drift.cleared"
    stage.claims.check(calm, "no input differs from January-February by now: drift alone would not have noticed")


async def _training(stage: Stage) -> str:
    with stage.reporter.step("training, asked for by the server") as step:
        asked = await until(lambda: stage.first_audited("retrain.requested"), "no training was asked for", _SEEN_S)
        trigger = str(asked["detail"]["trigger_id"])
        step.progress("a local command trains, builds the profile and publishes")
        job = await until(lambda: _registered(stage), "no version was registered", _TRAINED_S)
        step.detail = f"trigger {trigger[:12]}, version {job['version']}"
    reasons = ", ".join(f"{one['kind']} ({one['name']})" for one in asked["detail"]["reasons"])
    once = len(await stage.audited("retrain.requested")) == 1
    stage.claims.check(once, f"asked for once, because of: {reasons}")
    found = (await stage.tidegate.here("registry", "show", f"{MODEL}:{job['version']}")).json()
    stage.claims.check(
        found["lineage"]["trigger_id"] == trigger == job["trigger_id"],
        f"{MODEL}:{job['version']} names the trigger in its lineage, trained on {found['lineage']['data']['rows']:,} "
        f"flights ({found['lineage']['data']['uri']})",
    )
    return str(job["version"])


async def _registered(stage: Stage) -> dict[str, Any] | None:
    """The job once it has a version."""
    return next((job for job in await stage.jobs() if job["version"]), None)
