"""``tidegate monitor``: reference profiles and calibrations from files, drift reports from a running server."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import click
import numpy as np

from server.cli import labelled, show
from server.cli.client import TOKEN, URL, read, read_json
from server.errors import InvalidArgument, TidegateError

if TYPE_CHECKING:
    from monitor.calibration import Calibration
    from monitor.layout import Layout
    from monitor.profile import ColumnProfile, ReferenceProfile
    from server.tabular import Array, Tabular

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
DATA = click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
MODEL = click.option("--model", type=click.Path(path_type=Path), help="The ONNX file that the columns go into.")
MAP = click.option(
    "--map", "places", multiple=True, metavar="COLUMN=TENSOR[INDEX]",
    help="Which element of which tensor a column is; may be repeated. Columns that are not mapped are left out.",
)  # fmt: skip
RUN = click.option("--run", "run_model", is_flag=True, help="Run the model over the rows: its outputs are columns too.")

_BASE: Final = "/admin/v1/monitors"
#: Features shown of one arm held against another.
_COMPARED: Final = 10


@click.group()
def monitor() -> None:
    """Drift: profiles of what a model was trained on, and how live traffic differs from them."""


@contextmanager
def _told() -> Iterator[None]:
    """What the monitor refuses, and files that cannot be read or written, end the command with one line."""
    from monitor.errors import MonitorError

    try:
        yield
    except MonitorError as error:
        raise TidegateError(str(error)) from error
    except OSError as error:
        raise TidegateError(f"{error.filename or 'a file'}: {error.strerror or error}") from error
    except MemoryError as error:
        raise TidegateError(f"the data do not fit into memory ({error}): take a part of the rows") from error


@contextmanager
def _given() -> Iterator[None]:
    """The same for data, models and options that were given: what is wrong with them is wrong usage."""
    try:
        with _told():
            yield
    except TidegateError as error:
        raise click.ClickException(error.message) from error


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """A file that cannot be written is called by its name, not by that of the one beside it."""
    try:
        yield
    except OSError as error:
        raise TidegateError(f"{output} cannot be written: {error.strerror or error}") from error


# --- profile ---------------------------------------------------------------------------------------------------------


@monitor.command()
@DATA
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The profile, usually .tgp.")
@MODEL
@click.option(
    "--signature", type=click.Path(path_type=Path), help="JSON with the model's inputs and outputs, instead of --model."
)
@MAP
@RUN
@click.option("--kind", "kinds", multiple=True, metavar="COLUMN=KIND", help="numeric, integer, boolean, categorical.")
@click.option(
    "--knots", default="1024", show_default=True, help="Quantiles kept per column, or 'all': KS is exact then."
)
@click.option("--bins", type=int, default=10, show_default=True, help="Bins that PSI is taken over.")
@click.option("--segment", metavar="COLUMN=V1,V2", help="Also count the rows of each of these values by themselves.")
@labelled.options
@AS_JSON
def profile(
    data: tuple[Path, ...], output: Path, model: Path | None, signature: Path | None, places: Sequence[str],
    run_model: bool, kinds: Sequence[str], knots: str, bins: int, segment: str | None, as_json: bool,
    label: str | None, **predicted: Any,
) -> None:  # fmt: skip
    """Build a reference profile from DATA: .csv, .csv.gz, .npz or .parquet files of the same columns.

    Columns become elements of the model's tensors by --map, by names (as in an .npz of tensors, or in captured
    traffic), or in their order when the model has one input. No row is kept in the profile.

    With --label the profile also says how good predictions are on these rows, and labels of live traffic are held
    against that: take data that the model was not trained on. --predict, --task, --form, --threshold and --classes must
    be as in the model's labels section.
    """
    from monitor.profile import ReferenceProfile

    with _given():
        found, outcomes = _arranged(data, model, signature, places, run_model, kinds, label)
        built = ReferenceProfile.from_table(found.table, found.columns, knots=_knots(knots), bins=bins)
        if segment is not None:
            built = _segmented(built, found, segment)
        if label is not None and outcomes is not None:
            wanted = labelled.Labelled(label, **predicted)
            built = replace(built, labels=labelled.reference_of(found, outcomes, wanted))
        with _writing(output):
            built.save(output)
        told = {} if built.labels is None else labelled.told(built.labels)
    if as_json:
        columns = [_column_dict(column) for column in built.columns]
        about = {"path": str(output), "sha256": built.sha256, "rows": built.rows, "columns": columns}
        show.as_json({**about, "labels": told})
        return
    headings = ["COLUMN", "ELEMENT", "KIND", "MISSING", "MEAN", "SD", "BINS", "KS WITHIN"]
    show.table(headings, [_column_cells(column) for column in built.columns])
    click.echo(f"{output}: {len(built.columns)} columns, {built.rows} rows, sha256 {built.sha256[:12]}")
    if told:
        click.echo(f"labels '{label}': {', '.join([f'{name} {value:.4g}' for name, value in told.items()])}")


def _segmented(built: ReferenceProfile, found: Tabular, text: str) -> ReferenceProfile:
    """The profile with counts per value; values of a column of numbers are numbers."""
    from monitor.segments import with_segments
    from monitor.types import BYTES, Segment

    name, _, listed = text.rpartition("=")
    column = next((column for column in found.columns if column.name == name), None)
    if column is None:
        known = ", ".join([column.name for column in found.columns])
        raise click.UsageError(f"--segment must be COLUMN=V1,V2 with a column of the profile ({known}), got {text}")
    values: list[str | float] = list(listed.split(","))
    if column.datatype != BYTES:
        try:
            values = [float(value) for value in values]
        except ValueError:
            raise click.UsageError(f"--segment: {name} holds numbers, got {listed}") from None
    return with_segments(built, found.table, Segment(name, tuple(values)))


def _arranged(
    data: Sequence[Path], model: Path | None, signature: Path | None, places: Sequence[str], run_model: bool,
    kinds: Sequence[str], label: str | None = None,
) -> tuple[Tabular, Array | None]:  # fmt: skip
    """The columns of the data, and the values of the label, which is none of them."""
    from server import tabular

    if model is not None and signature is not None:
        raise click.UsageError("give --model or --signature, not both")
    if run_model and model is None:
        raise click.UsageError("--run needs --model")
    wanted = tabular.parse_kinds(kinds)
    table = tabular.read_tables(data)
    if len({len(values) for values in table.values()}) > 1:
        rows = [f"{name} {len(values)}" for name, values in table.items()]
        raise InvalidArgument(f"the data's columns differ in rows: {_some(rows)}")
    outcomes = None if label is None else labelled.set_aside(table, label, data)
    if model is None:
        spec = None if signature is None else tabular.read_signature(signature)
        return tabular.with_strings(tabular.arrange(table, spec, places, wanted), data), outcomes
    engine = tabular.load(model)
    try:
        found = tabular.with_strings(tabular.arrange(table, engine.spec, places), data)
        if run_model:
            tabular.add_outputs(found, engine)
    finally:
        engine.close()
    return tabular.with_kinds(found, wanted), outcomes


def _knots(text: str) -> int | None:
    if text == "all":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise click.UsageError(f"--knots must be a whole number or 'all', got {text!r}")
    return int(text)


def _column_dict(found: ColumnProfile) -> dict[str, Any]:
    return {
        **asdict(found.column),
        "rows": found.rows,
        "missing": found.rows - found.present,
        "mean": found.mean,
        "sd": found.sd,
        "bins": list(found.bins),
        "knots": len(found.knots),
        "ordered": found.ordered,
        "ks_resolution": found.ks_resolution,
    }


def _column_cells(found: ColumnProfile) -> list[object]:
    column = found.column
    element = f"{column.source} {column.tensor}" + (f"[{column.index}]" if column.width > 1 else "")
    missing = f"{100 * (found.rows - found.present) / max(1, found.rows):.2f}%"
    within = f"{found.ks_resolution:.4f}" if found.ordered else "-"
    return [
        _printable(column.name),
        _printable(element),
        column.kind,
        missing,
        f"{found.mean:.4g}",
        f"{found.sd:.4g}",
        len(found.bins),
        within,
    ]


# --- calibrate, skew -------------------------------------------------------------------------------------------------


@monitor.command()
@click.argument("profile_file", metavar="PROFILE", type=click.Path(path_type=Path))
@DATA
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The calibration, as JSON.")
@MODEL
@MAP
@RUN
@AS_JSON
def calibrate(
    profile_file: Path, data: tuple[Path, ...], output: Path, model: Path | None, places: Sequence[str],
    run_model: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure how much rows depend on each other, on drift-free traffic in DATA in the order of time.

    p-values assume independent rows. What is measured here corrects them: name the file as the model's
    monitor.calibration.
    """
    from monitor import calibration, sealed
    from monitor.layout import Layout

    with _given():
        layout = Layout(_load(profile_file))
        found, _ = _arranged(data, model, None, places, run_model, ())
        done = calibration.calibrate(layout, _of_profile(layout, found, data))
        with _writing(output):
            sealed.write_file(output, json.dumps(done.to_dict()).encode())
    _warn(layout, done)
    if as_json:
        show.as_json({**done.to_dict(), "columns": list(layout.names)})
        return
    rows = zip(layout.names, done.ks, done.psi, done.settled, strict=True)
    cells = [
        [_printable(name), f"{ks:.2f}", f"{psi:.2f}", "yes" if settled else "NO"] for name, ks, psi, settled in rows
    ]
    show.table(["COLUMN", "KS INFLATION", "PSI INFLATION", "SETTLED"], cells)
    click.echo(f"{output}: {done.rows} rows in blocks of {done.block_rows}")


def _warn(layout: Layout, done: Calibration) -> None:
    """What must not be overlooked, on standard error."""
    from monitor.calibration import INFLATION_LIMIT

    worst = np.maximum(done.ks, done.psi_mean).tolist()
    over = [f"{name} ({most:.1f})" for name, most in zip(layout.names, worst, strict=True) if most > INFLATION_LIMIT]
    short = [name for name, settled in zip(layout.names, done.settled.tolist(), strict=True) if not settled]
    if over:
        _loud(
            f"consecutive rows depend on each other; counts vary over {INFLATION_LIMIT} times as much as those of "
            f"independent rows: {_some(over)}.\n  Without this calibration p-values would be far too small and false "
            "alarms certain; with it, small shifts take longer to be seen."
        )
    if short:
        _loud(
            f"NOT calibrated: {_some(short)}. Longer blocks still vary more than the {done.block_rows} rows of a block "
            "can show: give more traffic, or use a seasonal reference."
        )


def _loud(text: str) -> None:
    click.secho(f"WARNING: {text}", fg="red", bold=True, err=True)


@monitor.command()
@click.argument("profile_file", metavar="PROFILE", type=click.Path(path_type=Path))
@DATA
@MODEL
@MAP
@RUN
@click.option("--html", type=click.Path(path_type=Path), help="Write the report as a page, too.")
@AS_JSON
def skew(
    profile_file: Path, data: tuple[Path, ...], model: Path | None, places: Sequence[str], run_model: bool,
    html: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Hold all rows of DATA, such as captured traffic, against PROFILE: one window, one look."""
    with _given():
        profile_ = _load(profile_file)
        found, _ = _arranged(data, model, None, places, run_model, ())
        report = _skew(profile_, found, data, profile_file.stem)
        _show({"report": report}, html, as_json)


def _skew(profile_: ReferenceProfile, found: Tabular, data: Sequence[Path], name: str) -> dict[str, Any]:
    """A drift report of one window that has all rows; one such report in a hundred may be over by chance."""
    from monitor.judging import Judge
    from monitor.layout import Layout
    from monitor.types import AlarmRules, DriftReport, Settings, Window, WindowCounts

    layout = Layout(profile_)
    cells = layout.count_table(_of_profile(layout, found, data))
    rows = int(cells[: int(layout.start[1])].sum())
    if not rows:
        raise InvalidArgument("the data have no rows")
    window = Window("rows", rows, rows)
    judge = Judge(layout, Settings(windows=(window,), rules=AlarmRules(ert_rows=100 * rows)))
    counts = WindowCounts(window.name, rows, 0, 0, 0, 1, True, cells)
    report = DriftReport(name, "data", profile_.sha256, (judge.window_report("data", counts),), {"data": rows})
    return report.to_dict()


def _load(path: Path) -> ReferenceProfile:
    from monitor.profile import ReferenceProfile

    return ReferenceProfile.load(path)


def _of_profile(layout: Layout, found: Tabular, data: Sequence[Path]) -> dict[str, Any]:
    """The profile's columns in the data: by name, else by tensor and element. Strings are as the files have them."""
    from monitor.types import BYTES
    from server.tabular import with_strings

    elements = {(column.source, column.tensor, column.index): column.name for column in found.columns}
    #: Without a model whatever is read is an input; with one the outputs are strings already, or the model's own.
    read = {column.name for column in found.columns if column.source == "input"}
    names: dict[str, str] = {}
    strings: list[str] = []
    for profiled in layout.columns:
        column = profiled.column
        name = column.name
        if name not in found.table:
            name = elements.get((column.source, column.tensor, column.index), "")
        if name not in found.table:
            hint = ": use --model with --run" if column.source == "output" else ""
            raise InvalidArgument(f"the data have no column '{column.name}' of the profile{hint}")
        names[column.name] = name
        if column.datatype == BYTES and name in read:
            strings.append(name)
    table = with_strings(found, data, strings).table
    return {own: table[name] for own, name in names.items()}


# --- report ----------------------------------------------------------------------------------------------------------


@monitor.command()
@click.option("--model", "reference", metavar="M[:V]", help="The model, and which version when several are watched.")
@URL
@TOKEN
@click.option("--html", type=click.Path(path_type=Path), help="Write the page with plots to this file.")
@AS_JSON
def report(reference: str | None, url: str, token: str | None, html: Path | None, as_json: bool) -> None:
    """Show the drift of a version that a running server watches; without --model, what it watches."""
    watched = _watched(url, token)
    if reference is None:
        _show_watched(watched, as_json)
        return
    model, version = _chosen(reference, watched)
    path = f"{_BASE}/{quote(model, safe='')}/{quote(version, safe='')}"
    document = read_json(url, path, token)
    if "report" not in document:
        raise TidegateError(f"{url}{path} answers no drift report")
    with _told():
        if html is not None:
            html.write_bytes(read(url, f"{path}?format=html", token))
        _show(document, None, as_json)
    if html is not None and not as_json:
        click.echo(f"{html}: the report with plots")


def _watched(url: str, token: str | None) -> list[dict[str, Any]]:
    found = read_json(url, _BASE, token).get("monitors")
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _show_watched(watched: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        show.as_json(list(watched))
        return
    cells = []
    for entry in watched:
        alarms = [f"{arm}: {', '.join(columns)}" for arm, columns in (entry.get("alarms") or {}).items()]
        facts = [entry.get("columns", "-"), ", ".join(entry.get("windows") or ()), "; ".join(alarms) or "-"]
        cells.append([f"{entry.get('model')}:{entry.get('version')}", str(entry.get("profile", ""))[:12], *facts])
    show.table(["VERSION", "PROFILE", "COLUMNS", "WINDOWS", "IN ALARM"], cells)


def _chosen(reference: str, watched: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Model and version. A model alone means its only watched version."""
    model, _, version = reference.rpartition(":") if ":" in reference else (reference, "", "")
    if version:
        return model, version
    versions = [str(entry.get("version")) for entry in watched if entry.get("model") == model]
    if len(versions) != 1:
        having = f"versions {', '.join(versions)} are" if versions else "no version is"
        raise click.UsageError(f"--model {model}: {having} watched, wanted one; name it as {model}:VERSION")
    return model, versions[0]


def _show(document: Mapping[str, Any], html: Path | None, as_json: bool) -> None:
    if html is not None:
        from server.pages import drift_page

        html.write_text(drift_page(document), encoding="utf-8")
    if as_json:
        show.as_json(_finite(document))
        return
    found = document["report"]
    profiled = f"profile {found['profile'][:12]}" if "profile" in found else "no profile"
    click.echo(f"{found['model']}:{found['version']}, {profiled}")
    for warning in found.get("warnings") or ():
        _loud(warning)
    for window in found.get("windows") or ():
        _show_window(window)
    for window in document.get("comparisons") or ():
        _show_comparison(window)
    for window in (document.get("performance") or {}).get("windows") or ():
        _show_labels(window)


def _show_window(window: Mapping[str, Any]) -> None:
    partial = "" if window.get("full") else ", not full yet"
    sampled = ", sampled" if window.get("sampled") else ""
    click.echo(f"\n{window['arm']}, last {_length(window)}: {window['rows']} rows{partial}{sampled}")
    _show_scores(window, window["scores"])


def _show_comparison(window: Mapping[str, Any]) -> None:
    """The strongest features of one arm held against another."""
    scores = window["scores"][:_COMPARED]
    rows = f"{window['rows']} rows against {max([score['reference_rows'] for score in scores], default=0)}"
    click.echo(f"\n{window['arm']} against {window['against']}, last {_length(window)}: {rows}")
    _show_scores(window, scores)


def _show_scores(window: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> None:
    verdicts = {verdict["column"]: verdict for verdict in window["verdicts"]}
    alarms = frozenset(window.get("in_alarm") or ())
    cells = [_score_cells(score, verdicts[score["column"]], score["column"] in alarms) for score in scores]
    headings = ["STATE", "FEATURE", "PSI", "PSI P", "KS", "KS P", "P LIMIT", "MISSING", "OUTSIDE", "NEW"]
    show.table(headings, cells)


def _length(window: Mapping[str, Any]) -> str:
    """A window's length from its name, which has no space between number and unit."""
    name = str(window["window"])
    return f"{name.removesuffix('rows')} rows" if name.endswith("rows") else name


def _show_labels(window: Mapping[str, Any]) -> None:
    """The signals of one window of labels."""
    partial = "" if window.get("full") else ", not full yet"
    part = f" ({_printable(window['slice'])})" if window.get("slice") else ""
    click.echo(f"\n{window['arm']}{part}, last {_length(window)} of labels: {window['rows']} rows{partial}")
    alarms = frozenset(window.get("in_alarm") or ())
    cells = [
        [
            "ALARM" if signal["name"] in alarms else "over" if signal["over"] else "",
            signal["name"],
            *[_decimal(signal[name]) for name in ("value", "reference", "effect", "margin", "p", "level")],
        ]
        for signal in window.get("signals") or ()
    ]
    if cells:
        show.table(["STATE", "SIGNAL", "NOW", "REFERENCE", "WORSE BY", "MARGIN", "P", "P LIMIT"], cells)


def _score_cells(score: Mapping[str, Any], verdict: Mapping[str, Any], alarm: bool) -> list[str]:
    state = "ALARM" if alarm else "over" if verdict["over"] else ""
    outside = None if score["below"] is None or score["above"] is None else score["below"] + score["above"]
    numbers = [score["psi"], score["psi_p"], score["ks_low"], score["ks_p"], verdict["level"]]
    shares = [score["missing"], outside, score["new_category"]]
    return [state, _printable(score["column"]), *[_decimal(n) for n in numbers], *[_percent(share) for share in shares]]


def _decimal(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.2f}%"


def _printable(name: str) -> str:
    """A name cannot move the cursor of a terminal, nor fill its width."""
    shown = "".join([char if char.isprintable() else "?" for char in name])
    return shown if len(shown) <= 48 else shown[:47] + "…"


def _finite(value: Any) -> Any:
    """NaN and infinities as null: JSON has no others."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
