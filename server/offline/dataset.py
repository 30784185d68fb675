"""Captured requests joined with their labels: the data set that a version is trained or judged on.

A row is a row of a captured request. Rows are deduplicated by request, row, version and arm: the first one counts. A
label is found by the request's id, or by the client's own; a client's id that came more than once means its newest
request. Of several labels of one name for a row the latest counts, however late it came. Labels have the columns
``__label`` and, where outcomes have names, ``__label_NAME``; ``__label_time`` is that of the latest. What one shadow
answered to the same request, where it was asked, has the columns ``__shadow_status``, ``__shadow_latency_ns`` and
``shadow:OUTPUT``; its first answer counts.

The same is said twice: in SQL for duckdb, and in plain Python for where that is not installed. The data decide nothing
about which one runs, and both give the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from server.capture.formats import (
    Array,
    StorageError,
    Table,
    connect,
    dtype_of,
    duckdb_error,
    has_duckdb,
    identifier,
    literal,
    read_json_lines,
    with_missing,
)
from server.capture.segments import Entry, entries, is_whole
from server.errors import ConfigError, FailedPrecondition, InvalidArgument, NotFound, TidegateError
from server.offline.chunks import PARQUET, format_of
from server.offline.tables import publish, write_part

#: Names of outcomes that become columns.
MAX_NAMES: Final = 64
_KEY: Final = ("__id", "__row", "__version", "__arm")
_ORDER: Final = ("__time", *_KEY)
_OF_SHADOW: Final = {"__status": "__shadow_status", "__latency_ns": "__shadow_latency_ns"}
_LABEL_TYPES: Final = {"__id": "VARCHAR", "__row": "INTEGER", "name": "VARCHAR", "value": "DOUBLE", "__time": "BIGINT"}

Row: TypeAlias = dict[str, Any]


@dataclass(slots=True, frozen=True)
class Wanted:
    """Which rows: requests from ``from_ns`` up to but without ``to_ns`` (None: no bound); labels of any time.

    ``shadow``: the NAME:VERSION whose answers are joined, "": none.
    """

    from_ns: int | None = None
    to_ns: int | None = None
    labelled_only: bool = False
    shadow: str = ""


@dataclass(slots=True, frozen=True)
class ExportReport:
    """``labelled``: rows with a label; ``segments``: of requests that were read.

    ``shadowed``: rows that the shadow which was asked for has, too.
    """

    rows: int
    labelled: int
    segments: int
    output: str
    shadowed: int = 0


@dataclass(slots=True, frozen=True)
class _Segments:
    """What is joined. ``shadows``: of the one shadow that is wanted."""

    requests: Sequence[Entry]
    labels: Sequence[Entry]
    shadows: Sequence[Entry]


def export_dataset(folder: Path, model: str, target: Path, wanted: Wanted, *, sql: bool | None = None) -> ExportReport:
    """Write the data set of one model from the capture folder to the new file ``target``.

    ``sql`` None: with duckdb if it is installed. Raises NotFound when there is none, InvalidArgument,
    FailedPrecondition when the file exists, StorageError for damaged segments.
    """
    form = format_of(target)
    if target.exists():
        raise FailedPrecondition(f"{target} exists already: it is never overwritten")
    if target.name.lower().endswith(".gz"):
        raise InvalidArgument(f"{target.name}: compressed CSV is read, not written")
    if form == PARQUET and not has_duckdb():
        raise ConfigError("Parquet needs duckdb: install tidegate[capture], or use csv, jsonl or npz")
    requests = _whole(entries(folder, model, "requests"))
    if not requests:
        raise NotFound(f"nothing is captured of model '{model}' in {folder}")
    labels = _whole(entries(folder, model, "labels"))
    found = _Segments(requests, labels, _whole(_shadows(folder, model, wanted.shadow)))
    try:
        by = _by_sql if (has_duckdb() if sql is None else sql) else _by_python
        rows, labelled, shadowed = by(found, target, form, wanted)
    except OSError as error:
        raise TidegateError(f"{error.filename or target}: {error.strerror or error}") from error
    return ExportReport(rows, labelled, len(requests), str(target), shadowed)


def _shadows(folder: Path, model: str, wanted: str) -> list[Entry]:
    """The segments of one shadow. Raises NotFound, which names those that there are."""
    found = entries(folder, model, "shadows") if wanted else []
    if wanted and not any(entry.facts.version == wanted for entry in found):
        known = ", ".join(sorted({entry.facts.version for entry in found})) or "none"
        raise NotFound(f"no answers of shadow {wanted} are captured for model '{model}'; there are those of: {known}")
    return [entry for entry in found if entry.facts.version == wanted]


def _whole(found: Sequence[Entry]) -> list[Entry]:
    """Segments that are what was written. One that a live server has removed meanwhile is left out."""
    kept = []
    for entry in found:
        if is_whole(entry):
            kept.append(entry)
        elif entry.path.exists():
            raise StorageError(f"{entry.path} is not what was written: its SHA-256 differs from its entry's")
    return kept


def _label_column(name: str) -> str:
    return f"__label_{name}" if name else "__label"


def _check_names(names: Sequence[str]) -> None:
    if len(names) > MAX_NAMES:
        raise InvalidArgument(f"labels have {len(names)} names, at most {MAX_NAMES} can be columns")


def _types(requests: Sequence[Entry]) -> dict[str, str]:
    """Every column of any segment with its type, in the order of their first appearance. Raises StorageError."""
    types: dict[str, str] = {}
    for entry in requests:
        for name, sql in entry.columns.items():
            if types.setdefault(name, sql) != sql:
                raise InvalidArgument(
                    f"column '{name}' is {types[name]} in some segments and {sql} in {entry.file}: export them by time"
                )
    return types


def _shadow_columns(shadows: Sequence[Entry]) -> dict[str, tuple[str, str]]:
    """Column of a shadow's segments -> what it is called in the data set, and its type."""
    if not shadows:
        return {}
    kept = {name: sql for name, sql in _types(shadows).items() if not name.startswith("__") or name in _OF_SHADOW}
    return {name: (_OF_SHADOW.get(name, f"shadow:{name}"), sql) for name, sql in kept.items()}


# --- SQL -------------------------------------------------------------------------------------------------------------


def _by_sql(segments: _Segments, target: Path, form: str, wanted: Wanted) -> tuple[int, int, int]:
    requests, labels = segments.requests, segments.labels
    connection = connect("1GB")
    try:
        types = _types(requests)
        connection.execute(f"CREATE VIEW requests AS {_union(requests)}")
        empty = ", ".join(f"CAST(NULL AS {sql}) AS {identifier(name)}" for name, sql in _LABEL_TYPES.items())
        connection.execute(f"CREATE VIEW labels AS {_union(labels) if labels else f'SELECT {empty} WHERE false'}")
        found = connection.execute("SELECT DISTINCT name FROM labels ORDER BY name").fetchall()
        names = [name for (name,) in found]
        _check_names(names)
        answered = [alias for alias, _ in _shadow_columns(segments.shadows).values()]
        connection.execute(f"CREATE VIEW shadows AS {_first_answers(segments.shadows)}")
        connection.execute(f"CREATE TEMP TABLE joined AS {_joined(names, types, answered, wanted)}")
        seen = "count(__shadow_status)" if segments.shadows else "0"
        counts = f"SELECT count(*), count(__label_time), {seen} FROM joined"  # noqa: S608 - our own name
        rows, labelled, shadowed = connection.execute(counts).fetchone()
        _require_rows(rows)
        ordered = f"SELECT * FROM joined ORDER BY {', '.join(map(identifier, _ORDER))}"  # noqa: S608 - our own names
        if form == PARQUET:
            temp = target.with_name(f".{target.name}.tmp")
            temp.unlink(missing_ok=True)
            connection.execute(f"COPY ({ordered}) TO {literal(temp)} (FORMAT parquet, COMPRESSION zstd)")
            publish(temp, target)
        else:
            table = connection.execute(ordered).fetchnumpy()
            write_part(target, {name: with_missing(values) for name, values in table.items()}, form)
        return rows, labelled, shadowed
    except duckdb_error() as error:
        raise StorageError(f"the captured segments could not be joined: {error}") from error
    finally:
        connection.close()


def _union(found: Sequence[Entry]) -> str:
    """The rows of all segments; columns that a segment does not have are NULL."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[Path]] = {}
    for entry in found:
        groups.setdefault((entry.path.suffix, tuple(entry.columns.items())), []).append(entry.path)
    return " UNION ALL BY NAME ".join(_scan(suffix, types, paths) for (suffix, types), paths in groups.items())


def _scan(suffix: str, types: Iterable[tuple[str, str]], paths: Sequence[Path]) -> str:
    files = f"[{', '.join(map(literal, paths))}]"
    if suffix == ".parquet":
        return f"SELECT * FROM read_parquet({files})"  # noqa: S608 - literals of our own
    columns = ", ".join(f"{identifier(name)}: {literal(sql)}" for name, sql in types)
    return f"SELECT * FROM read_json({files}, format = 'newline_delimited', columns = {{{columns}}})"  # noqa: S608


def _first_answers(shadows: Sequence[Entry]) -> str:
    """The first answer of the shadow to each row, under the names of the data set."""
    if not shadows:
        return "SELECT CAST(NULL AS VARCHAR) AS __id, CAST(NULL AS INTEGER) AS __row WHERE false"
    called = _shadow_columns(shadows)
    columns = ", ".join(f"{identifier(name)} AS {identifier(alias)}" for name, (alias, _) in called.items())
    first = "QUALIFY row_number() OVER (PARTITION BY __id, __row ORDER BY __time) = 1"
    return f"SELECT __id, __row, {columns} FROM ({_union(shadows)}) {first}"  # noqa: S608 - quoted above


def _joined(names: Sequence[str], types: Mapping[str, str], answered: Sequence[str], wanted: Wanted) -> str:
    key = ", ".join(map(identifier, _KEY))
    values = "".join(
        f", max(value) FILTER (name = {literal(name)}) AS {identifier(_label_column(name))}" for name in names
    )
    taken = "".join(f", {identifier(_label_column(name))}" for name in names)
    bounds = [f"__time >= {wanted.from_ns}"] if wanted.from_ns is not None else []
    bounds += [f"__time < {wanted.to_ns}"] if wanted.to_ns is not None else []
    bounds += ["__label_time IS NOT NULL"] if wanted.labelled_only else []
    columns = ", ".join(f"r.{identifier(name)}" for name in types)
    answers = "".join(f", shadows.{identifier(alias)}" for alias in answered)
    # Everything that is put in are identifiers and literals that were quoted above, and integers.
    return f"""
        WITH r AS (
            SELECT * FROM requests QUALIFY row_number() OVER (PARTITION BY {key} ORDER BY __time) = 1
        ), newest AS (
            SELECT __client_id, __row, max_by(__id, (__time, __id)) AS __id FROM r WHERE __client_id <> ''
            GROUP BY __client_id, __row
        ), hits AS (
            SELECT __id, __row, name, value, __time FROM labels
            UNION ALL
            SELECT n.__id, l.__row, l.name, l.value, l.__time FROM labels l
            JOIN newest n ON n.__client_id = l.__id AND n.__row = l.__row
        ), latest AS (
            SELECT * FROM hits
            QUALIFY row_number() OVER (PARTITION BY __id, __row, name ORDER BY __time DESC, value DESC) = 1
        ), found AS (
            SELECT __id, __row, max(__time) AS __label_time{values} FROM latest GROUP BY __id, __row
        )
        SELECT {columns}{answers}, __label_time{taken}
        FROM r LEFT JOIN found USING (__id, __row) LEFT JOIN shadows USING (__id, __row)
        {f"WHERE {' AND '.join(bounds)}" if bounds else ""}
    """  # noqa: S608


def _require_rows(rows: int) -> None:
    if not rows:
        raise NotFound("no captured request matches: nothing is written")


# --- plain Python ----------------------------------------------------------------------------------------------------


def _by_python(segments: _Segments, target: Path, form: str, wanted: Wanted) -> tuple[int, int, int]:
    types = _types(segments.requests)
    rows = _first(_rows(segments.requests))
    latest = _latest(rows, _rows(segments.labels))
    names = sorted({name for found in latest.values() for name in found})
    _check_names(names)
    kept = [row for row in rows if _matches(row, latest, wanted)]
    kept.sort(key=lambda row: [row[name] for name in _ORDER])
    _require_rows(len(kept))
    hits = [latest.get((row["__id"], row["__row"]), {}) for row in kept]
    table: Table = {name: _column([row.get(name) for row in kept], sql) for name, sql in types.items()}
    answers = _answers(_rows(segments.shadows))
    told = [answers.get((row["__id"], row["__row"]), {}) for row in kept]
    for name, (alias, sql) in _shadow_columns(segments.shadows).items():
        table[alias] = _column([answer.get(name) for answer in told], sql)
    table["__label_time"] = _column([max(t for t, _ in hit.values()) if hit else None for hit in hits], "BIGINT")
    for name in names:
        table[_label_column(name)] = _column([hit[name][1] if name in hit else None for hit in hits], "DOUBLE")
    write_part(target, table, form)
    return len(kept), sum(map(bool, hits)), sum(map(bool, told))


def _answers(shadows: Iterable[Row]) -> dict[tuple[str, int], Row]:
    """The first answer of the shadow to each row of a request."""
    answers: dict[tuple[str, int], Row] = {}
    for row in shadows:
        key = (row["__id"], row["__row"])
        answers[key] = min(answers.get(key, row), row, key=lambda one: int(one["__time"]))
    return answers


def _rows(found: Sequence[Entry]) -> list[Row]:
    rows: list[Row] = []
    for entry in found:
        if entry.path.suffix == ".parquet":
            raise ConfigError(f"{entry.path.name} is Parquet, which needs duckdb: install tidegate[capture]")
        table = read_json_lines(entry.path, entry.columns)
        rows += [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    return rows


def _first(rows: Iterable[Row]) -> list[Row]:
    """One row for each request, row, version and arm: the earliest."""
    kept: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple([row[name] for name in _KEY])
        if key not in kept or row["__time"] < kept[key]["__time"]:
            kept[key] = row
    return list(kept.values())


#: (request, row) -> name -> (time, value).
_Latest: TypeAlias = dict[tuple[str, int], dict[str, tuple[int, float]]]


def _latest(rows: Iterable[Row], labels: Iterable[Row]) -> _Latest:
    newest: dict[tuple[str, int], tuple[int, str]] = {}
    for row in rows:
        if row["__client_id"]:
            key = (row["__client_id"], row["__row"])
            newest[key] = max(newest.get(key, (-1, "")), (row["__time"], row["__id"]))
    latest: _Latest = {}
    for label in labels:
        ids = {label["__id"]}
        if (meant := newest.get((label["__id"], label["__row"]))) is not None:
            ids.add(meant[1])
        for found in ids:
            hit = latest.setdefault((found, label["__row"]), {})
            told = (label["__time"], label["value"])
            hit[label["name"]] = max(hit.get(label["name"], told), told)
    return latest


def _matches(row: Row, latest: _Latest, wanted: Wanted) -> bool:
    time = row["__time"]
    return (
        (wanted.from_ns is None or time >= wanted.from_ns)
        and (wanted.to_ns is None or time < wanted.to_ns)
        and (not wanted.labelled_only or (row["__id"], row["__row"]) in latest)
    )


def _column(values: Sequence[Any], sql: str) -> Array:
    """Plain values as a column; missing floats are NaN, what else is missing is None."""
    dtype = dtype_of(sql)
    if dtype.kind == "f":
        return np.array([np.nan if value is None else value for value in values], dtype)
    if dtype.kind != "O" and all(value is not None for value in values):
        return np.array(values, dtype)
    out = np.empty(len(values), object)
    for place, value in enumerate(values):
        out[place] = value.item() if isinstance(value, np.generic) else value
    return out
