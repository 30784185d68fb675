"""``tidegate rollout``: what climbs, why it stands where it stands, and the orders of people. By the admin address."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import click

from server.cli import show
from server.cli.client import STATE_DIR, TOKEN, URL, order, read_json, token_in
from server.cli.registry import ACTOR, AS_JSON
from server.state import operator

REASON = click.option("--reason", default="", help="Why, for the audit.")
#: Of the table of expected steps.
STEP_HEADINGS: Final = ("WEIGHT", "MEDIAN", "90 %", "BY")
REVISION = click.option("--revision", type=int, help="Only if the rollout is still at this revision.")


@click.group()
def rollout() -> None:
    """Rollouts: a candidate climbs step by step while its gates allow it."""


@rollout.command("list")
@URL
@TOKEN
@AS_JSON
def list_rollouts(url: str, token: str | None, as_json: bool) -> None:
    """Every rollout that the server knows, those of the configuration first."""
    found = read_json(url, "/admin/v1/rollouts", token)["rollouts"]
    if as_json:
        show.as_json(found)
        return
    headings = ["ID", "NAME", "CANDIDATE", "STATE", "STEP", "WEIGHT", "REASON"]
    show.table(headings, [_cells(row) for row in found])


def _cells(row: dict[str, Any]) -> list[object]:
    state = f"{row['state']}, paused" if row.get("paused") else row["state"]
    weight = f"{row['weight']:g}%" if "weight" in row else ""
    return [row["id"], row["name"], row.get("candidate", ""), state, row.get("step", ""), weight, row.get("reason", "")]


@rollout.command()
@click.argument("rollout_id", metavar="ID")
@URL
@TOKEN
@AS_JSON
def status(rollout_id: str, url: str, token: str | None, as_json: bool) -> None:
    """One rollout: where it stands, what each gate says, and how long its steps are expected to take."""
    found = read_json(url, _path(rollout_id), token)
    if as_json:
        show.as_json(found)
    else:
        _describe(found)


def _path(rollout_id: str, word: str = "") -> str:
    return f"/admin/v1/rollouts/{quote(rollout_id, safe='')}{f':{word}' if word else ''}"


def _describe(found: dict[str, Any]) -> None:
    click.echo(f"{found['id']}: {found['state']}{', paused' if found.get('paused') else ''} ({found['reason']})")
    if "weight" in found:
        versions = f"{found['candidate']} beside {found['stable']}"
        click.echo(f"{versions}, {found['weight']:g}% of requests, revision {found['revision']}")
    if gates := found.get("gates"):
        click.echo("")
        show.table(
            ["GATE", "ACTION", "SAYS", "EVIDENCE", "CANDIDATE", "STABLE", "ESTIMATE"], [_gate(gate) for gate in gates]
        )
    if steps := found.get("plan"):
        click.echo("")
        show.table(STEP_HEADINGS, [step_cells(step) for step in steps])


def _gate(gate: dict[str, Any]) -> list[object]:
    evidence = f"{gate['e']:.3g}" if "e" in gate else ""
    estimate = f"{gate['estimate']:.4g}" if "estimate" in gate else ""
    arms = [f"{arm[1]:g} of {arm[0]:g}" if (arm := gate.get(side)) else "" for side in ("candidate", "stable")]
    return [gate["gate"], gate["reaction"], gate["verdict"], evidence, *arms, estimate]


def step_cells(step: Mapping[str, Any]) -> list[str]:
    """One expected step, under STEP_HEADINGS."""
    times = [f"{step[name]:.0f} s" if step[name] is not None else "not known" for name in ("median_s", "p90_s")]
    waits = ", then approval" if step["approve"] else ""
    return [f"{step['weight']:g}%", *times, (step["gate"] or "least time") + waits]


def _ordering(word: str, text: str) -> None:
    @rollout.command(word, help=text)
    @click.argument("rollout_id", metavar="ID")
    @REASON
    @REVISION
    @ACTOR
    @URL
    @TOKEN
    @STATE_DIR
    @AS_JSON
    def ordered(
        rollout_id: str,
        reason: str,
        revision: int | None,
        actor: str | None,
        url: str,
        token: str | None,
        state_dir: Path,
        as_json: bool,
    ) -> None:
        headers = {"x-tidegate-actor": actor or operator(), "x-tidegate-reason": reason}
        if revision is not None:
            headers["if-match"] = str(revision)
        found = order(url, _path(rollout_id, word), token or token_in(state_dir), headers)
        if as_json:
            show.as_json(found)
        else:
            _describe(found)


_ordering("pause", "Stand still: nothing advances, gates go on and may still take the candidate back.")
_ordering("resume", "End a pause, or a hold that you have looked into: the gates that hold begin anew.")
_ordering("abort", "Take the candidate's traffic away and end the rollout.")
_ordering("approve", "Let a rollout go on that waits for people.")
_ordering("promote", "Make the candidate stable now, over what is not shown yet; never over what is.")
_ordering("rollback", "Go back to the version before, also after the promotion while that is kept warm.")
_ordering("clear", "Let a candidate that was rolled back be tried again at once.")
