"""``tidegate retrain``: ask a running server for a training, or show what became of those that were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import click

from server.cli import show
from server.cli.client import STATE_DIR, TOKEN, URL, order, read_json, token_in
from server.cli.registry import ACTOR, AS_JSON
from server.state import operator

_COLUMNS: Final = ("trigger_id", "model", "state", "since", "kinds", "champion", "version", "detail")


@click.command()
@click.argument("model", required=False)
@click.option("--reason", metavar="TEXT", help="Why; it stands in the audit and in the event.")
@click.option("--list", "listing", is_flag=True, help="Show jobs, of MODEL or of all, and ask for nothing.")
@URL
@TOKEN
@STATE_DIR
@ACTOR
@AS_JSON
def retrain(
    model: str | None,
    reason: str | None,
    listing: bool,
    url: str,
    token: str | None,
    state_dir: Path,
    actor: str | None,
    as_json: bool,
) -> None:
    """Ask for a training of MODEL now: by its configured sinks, whatever the cool-down and the budget say.

    Refused while a rollout of MODEL or another of its jobs is open.
    """
    if listing:
        jobs = read_json(url, "/admin/v1/retrains", token)["retrains"]
        _show([job for job in jobs if model in (None, job["model"])], as_json=as_json)
        return
    if not model or not reason:
        raise click.UsageError("name the MODEL and say why with --reason TEXT, or say --list")
    asked = {"reason": reason, "actor": actor or operator()}
    job = order(url, f"/admin/v1/retrains/{quote(model, safe='')}", token or token_in(state_dir), {}, asked)
    if as_json:
        show.as_json(job)
    else:
        click.echo(f"{job['trigger_id']}  {job['model']}  {job['state']}")


def _show(jobs: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        show.as_json(jobs)
        return
    rows = [[", ".join(cell) if isinstance(cell := job[key], list) else cell for key in _COLUMNS] for job in jobs]
    show.table([name.upper() for name in _COLUMNS], rows)
