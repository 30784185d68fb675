"""``tidegate hook``: events on their way to other systems. Safe beside a live server, which sees a retry at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import click

from server.cli import show
from server.cli.registry import ACTOR, AS_JSON, STATE_DIR
from server.errors import NotFound
from server.outbox import STATES, Delivery, Outbox, State, rfc3339
from server.retraining import retry_refusal
from server.state import open_existing, operator


@click.group()
def hook() -> None:
    """Events for other systems: what waits, what was delivered, what was given up."""


@contextmanager
def opened(state_dir: Path) -> Iterator[Outbox]:
    """The outbox of a state folder. Raises NotFound rather than make one where a gateway has none."""
    state = open_existing(state_dir)
    try:
        yield Outbox(state.store, state.audit)
    finally:
        state.close()


@hook.command("list")
@click.option("--state", "wanted", type=click.Choice(STATES), help="Only deliveries in this state.")
@click.option("--event", "event_id", metavar="ID", help="Only the deliveries of this event.")
@click.option("-n", "--limit", type=click.IntRange(1, 100_000), default=20, show_default=True, help="How many.")
@STATE_DIR
@AS_JSON
def list_deliveries(wanted: str | None, event_id: str | None, limit: int, state_dir: Path, as_json: bool) -> None:
    """Show deliveries, newest first: one line for each event and sink."""
    with opened(state_dir) as outbox:
        found = outbox.list(limit, state=cast("State | None", wanted), event_id=event_id)
        if event_id is not None and not outbox.list(1, event_id=event_id):
            raise NotFound(f"there is no event {event_id[:64]!r} in the outbox")
    if as_json:
        show.as_json([delivery.as_dict() for delivery in found])
        return
    headings = ["ID", "SINK", "STATE", "ATTEMPTS", "TYPE", "SUBJECT", "CREATED", "DUE", "ERROR"]
    show.table(headings, [_cells(delivery) for delivery in found])


def _cells(delivery: Delivery) -> list[object]:
    settled = delivery.state in ("delivered", "dead")
    return [
        delivery.event_id,
        delivery.sink,
        delivery.state,
        delivery.attempts,
        delivery.type,
        delivery.subject,
        rfc3339(delivery.created_ns),
        "" if settled else rfc3339(delivery.due_ns),
        delivery.error,
    ]


@hook.command()
@click.argument("event_id", metavar="ID", required=False)
@click.option("--dead", is_flag=True, help="Every delivery that was given up.")
@ACTOR
@STATE_DIR
@AS_JSON
def retry(event_id: str | None, dead: bool, actor: str | None, state_dir: Path, as_json: bool) -> None:
    """Try the event ID again now, at every sink that does not have it; or, with --dead, all that was given up."""
    if (event_id is not None) == dead:
        raise click.UsageError("name the ID of an event, or say --dead")
    with opened(state_dir) as outbox:
        count = outbox.retry(event_id, actor=actor or operator(), refusal=retry_refusal)
    if as_json:
        show.as_json({"retried": count})
    else:
        click.echo(_retried(count, event_id))


def _retried(count: int, event_id: str | None) -> str:
    if count:
        return f"{count} {'delivery is' if count == 1 else 'deliveries are'} due now"
    if event_id is None:
        return "nothing to try again: no delivery was given up"
    return f"nothing to try again: each sink has event {event_id} or is just being sent it"
