"""``tidegate batch``: a file of rows through a model, with the answers that the server would give."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from server.cli import show
from server.cli.registry import AS_JSON, STATE_DIR, folder_given

#: Between two lines of progress where no bar can be drawn.
_LINE_EVERY_S: Final = 5.0

Progress = Callable[[int, int | None], None]


@click.command()
@click.option(
    "--in", "source", required=True, type=click.Path(path_type=Path), help=".parquet, .csv[.gz], .jsonl or .npz"
)
@click.option(
    "--out", "target", required=True, type=click.Path(path_type=Path), help=".parquet, .csv, .jsonl or .npz; new."
)
@click.option(
    "--model", "reference", required=True, metavar="MODEL", help="MODEL (its champion), MODEL@ALIAS, MODEL:7, or .onnx"
)
@click.option(
    "--map", "places", multiple=True, metavar="COLUMN=TENSOR[INDEX]",
    help="Which element of which input a column is; may be repeated.",
)  # fmt: skip
@click.option("--keep", multiple=True, metavar="COLUMN", help="A column that is copied to the output; may be repeated.")
@click.option("--batch-rows", type=click.IntRange(1), help="Rows of one run.  [default: what the server would gather]")
@click.option("--chunk-rows", type=click.IntRange(1), help="Rows in memory and in a part.  [default: about 32768]")
@click.option(
    "--config", type=click.Path(path_type=Path), help="A server's configuration: its registry and its options."
)
@STATE_DIR
@AS_JSON
def batch(
    source: Path, target: Path, reference: str, places: tuple[str, ...], keep: tuple[str, ...],
    batch_rows: int | None, chunk_rows: int | None, config: Path | None, state_dir: Path, as_json: bool,
) -> None:  # fmt: skip
    """Run every row of a file through MODEL. Interrupted, the same command goes on where it stopped."""
    from server.offline.batch import BatchSettings, run_batch
    from server.offline.models import find_model
    from server.runtime.onnx import OnnxRuntime
    from server.telemetry import log

    log.configure("text", "warning")
    found = find_model(reference, folder_given(state_dir), config)
    engine = OnnxRuntime().load(found.request)
    settings = BatchSettings(places, keep, batch_rows or 0, chunk_rows or 0)
    try:
        with _shown(f"{found.name}:{found.version}") as progress:
            report = run_batch(source, target, found, engine, settings, progress)
    finally:
        engine.close()
    if as_json:
        show.as_json(asdict(report))
    else:
        done = f"{report.rows} rows ({report.resumed_rows} of them before)" if report.resumed_rows else report.rows
        unit = "" if report.resumed_rows else " rows"
        click.echo(f"{done}{unit} by {report.model}:{report.version} ({report.digest[:12]}) in {report.output}")


@contextmanager
def _shown(title: str) -> Iterator[Progress]:
    """A bar on a terminal where rich is installed, else a line now and then, on standard error."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        with _bar(title) as progress:
            yield progress
    else:
        yield _lines(title)


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    rich: Any = importlib.import_module("rich.progress")
    console = importlib.import_module("rich.console").Console(stderr=True)
    columns = (
        rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn(),
    )  # fmt: skip
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(title: str) -> Progress:
    last = time.monotonic()

    def progress(done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S or done == total:
            last = now
            click.echo(f"{title}: {done} rows" + (f" of {total}" if total else ""), err=True)

    return progress
