"""``tidegate audit``: read the audit trail and check its chain."""

from __future__ import annotations

from pathlib import Path

import click

from server.audit import AuditHead, AuditRow, Broken
from server.cli import show
from server.cli.registry import AS_JSON, STATE_DIR
from server.state import open_existing


@click.group()
def audit() -> None:
    """The audit trail: who did what, in rows that are chained to one another."""


@audit.command()
@click.option("-n", "--limit", type=click.IntRange(1, 100_000), default=20, show_default=True, help="How many rows.")
@click.option("--after", type=click.IntRange(0), help="The first rows after this number instead of the last ones.")
@STATE_DIR
@AS_JSON
def tail(limit: int, after: int | None, state_dir: Path, as_json: bool) -> None:
    """Show the last rows of the trail, oldest first."""
    state = open_existing(state_dir)
    try:
        rows = state.audit.tail(limit, after=after)
    finally:
        state.close()
    if as_json:
        show.as_json([row.as_dict() for row in rows])
        return
    cells = [[r.seq, r.event.ts, r.event.actor, r.event.action, r.event.subject, brief(r)] for r in rows]
    show.table(["SEQ", "TIME", "ACTOR", "ACTION", "SUBJECT", "DETAIL"], cells)


def brief(row: AuditRow) -> str:
    """The detail on one line, cut to a readable length."""
    text = ", ".join(f"{key}={value}" for key, value in row.event.detail.items())
    return text if len(text) <= 100 else f"{text[:97]}..."


@audit.command()
@click.option("--head", metavar="SEQ:HASH", help="An earlier head, kept elsewhere, that the chain must still contain.")
@STATE_DIR
@AS_JSON
def verify(head: str | None, state_dir: Path, as_json: bool) -> None:
    """Check the whole chain. Exit code 1 names the first broken row; the last line gives the head to be kept."""
    known = parse_head(head)
    state = open_existing(state_dir)
    try:
        outcome = state.audit.verify(known)
    finally:
        state.close()
    broken = isinstance(outcome, Broken)
    if as_json:
        end = {"seq": outcome.seq, "reason": outcome.reason} if isinstance(outcome, Broken) else None
        found = None if isinstance(outcome, Broken) else {"seq": outcome.head.seq, "hash": outcome.head.hash}
        show.as_json({"ok": not broken, "broken": end, "head": found})
    elif isinstance(outcome, Broken):
        click.echo(f"broken at row {outcome.seq}: {outcome.reason}", err=True)
    else:
        click.echo(f"{outcome.head.seq} rows, the chain holds; head {outcome.head.seq}:{outcome.head.hash}")
    raise click.exceptions.Exit(1 if broken else 0)


def parse_head(text: str | None) -> AuditHead | None:
    """``12:ab34...`` -> the head."""
    if text is None:
        return None
    number, _, digest = text.partition(":")
    if not number.isdigit() or not digest:
        raise click.UsageError(f"--head must be SEQ:HASH, got {text!r}")
    return AuditHead(int(number), digest)
