"""``tidegate data``: what was captured, as a data set."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import click

from server.cli import show
from server.cli.registry import AS_JSON, STATE_DIR
from server.errors import InvalidArgument


@click.group()
def data() -> None:
    """Captured requests, answers and labels."""


@data.command("export")
@click.option("--model", required=True, help="The models entry whose requests were captured.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=".parquet, .csv, .jsonl or .npz")
@click.option("--from", "first", metavar="TIME", help="Requests from this time on (RFC 3339; UTC unless it says).")
@click.option("--to", "last", metavar="TIME", help="Requests before this time. Labels count whenever they came.")
@click.option("--labelled", is_flag=True, help="Only rows that have a label.")
@click.option("--shadow", metavar="[NAME:]VERSION", help="Join what this shadow answered (capture.shadows).")
@click.option(
    "--capture-dir", type=click.Path(path_type=Path), help="Where segments are.  [default: STATE_DIR/capture]"
)
@STATE_DIR
@AS_JSON
def export(
    model: str, output: Path, first: str | None, last: str | None, labelled: bool, shadow: str | None,
    capture_dir: Path | None, state_dir: Path, as_json: bool,
) -> None:  # fmt: skip
    """Join captured requests of a model with their labels into one file. Safe beside a live server."""
    from server.offline.dataset import Wanted, export_dataset

    meant = "" if shadow is None else shadow if ":" in shadow else f"{model}:{shadow}"
    wanted = Wanted(parse_time("--from", first), parse_time("--to", last), labelled, meant)
    report = export_dataset(capture_dir or state_dir / "capture", model, output, wanted)
    if as_json:
        show.as_json(asdict(report))
    else:
        beside = f", {report.shadowed} with an answer of {meant}" if meant else ""
        found = f"{report.rows} rows, {report.labelled} with a label{beside}"
        click.echo(f"{found}, from {report.segments} segments: {output}")


def parse_time(flag: str, text: str | None) -> int | None:
    """RFC 3339 -> ns since the epoch. Raises InvalidArgument."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
        moment = found if found.tzinfo is not None else found.replace(tzinfo=UTC)
        return round(moment.timestamp() * 1e6) * 1000
    except (ValueError, OverflowError):
        raise InvalidArgument(f"{flag}: wanted a time such as 2030-01-31T12:00:00Z, got {text!r}") from None
