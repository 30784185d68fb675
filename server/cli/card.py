"""``tidegate registry card``: what is known of a version, from its manifest, the audit trail and its monitor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import click

from router.registry.base import Version
from router.registry.manifest import describe
from server.audit import AuditEvent, AuditLog
from server.cli import show
from server.cli.client import TOKEN, read_json
from server.cli.registry import CONFIG, STATE_DIR, chosen, opened, version_row
from server.errors import TidegateError

if TYPE_CHECKING:
    from server.offline.registries import Opened

_PAGE_ROWS: Final = 10_000
#: Rows of the trail about one version at most; the newest are kept.
_MOST_EVENTS: Final = 200
_GATE: Final = "gate."


@click.command()
@click.argument("reference")
@click.option("--md", "form", flag_value="md", default="md", help="Markdown.  [default]")
@click.option("--json", "form", flag_value="json", help="JSON.")
@click.option("--html", "form", flag_value="html", help="One page without anything from elsewhere.")
@click.option("--url", metavar="URL", help="Admin address of the server that serves it: drift as it is now.")
@TOKEN
@STATE_DIR
@CONFIG
def card(reference: str, form: str, url: str | None, token: str | None, state_dir: Path, config: Path | None) -> None:
    """Print the model card of a version. REFERENCE: MODEL (its champion), MODEL:7 or MODEL@alias."""
    from server.pages.card import card_markdown, card_page

    with opened(state_dir, config) as known:
        found = chosen(known.registry, reference)
        document = card_document(known, found, drift_of(found, known.state_dir, url, token))
    if form == "json":
        show.as_json(document)
    else:
        click.echo(card_page(document) if form == "html" else card_markdown(document), nl=False)


def card_document(known: Opened, found: Version, drift: Mapping[str, Any]) -> dict[str, Any]:
    """All of the card as plain values."""
    row = version_row(known.registry, found)
    manifest, events = found.manifest, list(events_of(known.state.audit, found.model, found.version))[-_MOST_EVENTS:]
    gates = [event for event in events if event["action"].startswith(_GATE)]
    return {
        **row,
        "description": {} if manifest is None else describe(manifest.description),
        "files": [] if manifest is None else [asdict(entry) for entry in manifest.files],
        "gates": [{**event["detail"], "ts": event["ts"], "actor": event["actor"]} for event in reversed(gates)],
        "history": [event for event in events if event not in gates],
        "drift": drift,
    }


def events_of(audit: AuditLog, model: str, version: int) -> Iterator[dict[str, Any]]:
    """The trail's rows about one version, oldest first: those of its own, and moves of an alias from or to it."""
    after = 0
    while rows := audit.tail(_PAGE_ROWS, after=after):
        for row in rows:
            if row.event.subject == f"{model}:{version}" or _moves(row.event, model, version):
                yield row.as_dict()
        after = rows[-1].seq


def _moves(event: AuditEvent, model: str, version: int) -> bool:
    """Whether an alias went to the version or away from it."""
    moves: list[object] = []
    if event.subject.startswith(f"{model}@"):
        moves = [event.detail]
    elif event.action == "registry.promote" and event.subject.startswith(f"{model}:"):
        moves = list(event.detail.values())
    return any(isinstance(move, Mapping) and version in (move.get("from"), move.get("to")) for move in moves)


# --- drift -----------------------------------------------------------------------------------------------------------


def drift_of(found: Version, state_dir: Path, url: str | None, token: str | None) -> dict[str, Any]:
    """A live report when an address is given, else the counts that were saved last, else why there is neither."""
    if url is not None:
        path = f"/admin/v1/monitors/{quote(found.model, safe='')}/{found.version}"
        try:
            return {"report": read_json(url, path, token).get("report") or {}}
        except TidegateError as error:
            return {"reason": error.message}
    folder = state_dir / "monitors" / found.model
    saved = sorted(folder.glob(f"{found.version}-*.state"), key=lambda path: path.stat().st_mtime_ns)
    if not saved:
        return {"reason": "No counts were saved. Name the admin address of the server with --url for a live report."}
    return saved_counts(saved[-1])


def saved_counts(path: Path) -> dict[str, Any]:
    """What a monitor had counted when it was last saved; or why that cannot be read."""
    from datetime import UTC, datetime

    from monitor.errors import MonitorError
    from monitor.state import MonitorState

    try:
        state = MonitorState.from_bytes(path.read_bytes(), path.name)
        saved = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except (MonitorError, OSError) as error:
        return {"reason": f"The saved counts cannot be read: {error}"}
    arms = [
        {"arm": arm, "rows": counts.rows, "dropped": counts.dropped, "in_alarm": _in_alarm(state.alarms, arm)}
        for arm, counts in state.arms.items()
    ]
    return {"saved": saved, "profile": state.sha256, "arms": arms}


def _in_alarm(alarms: Mapping[str, Any], arm: str) -> int | None:
    """How many columns of an arm are in alarm, over all traffic; None when that was not saved."""
    books = alarms.get("drift") or ()
    entry = next((found for owner, segment, found in books if owner == arm and not segment), None)
    return None if entry is None else sum(map(bool, entry["active"]))
