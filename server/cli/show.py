"""How commands show what they found: JSON for programs, aligned columns for people."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click


def as_json(value: object) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2))


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns under their headings; nothing but the headings when there are no rows."""
    texts = [[str(cell) for cell in row] for row in [headings, *rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(headings))]
    for row in texts:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def size(count: int) -> str:
    """Bytes with a binary unit: 1536 is 1.5 KiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
