"""Tables of segments on disk: Parquet through duckdb where that is installed, else lines of JSON; the same columns.

A table is column name -> one-dimensional array: booleans, integers, float32 or float64; or objects, which are texts
(``str``) or lists (arrays of numbers or lists of texts). JSON has no NaN and no infinity: they are written as texts.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import orjson

from server.errors import ConfigError, TidegateError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Table: TypeAlias = dict[str, Array]

PARQUET: Final = "parquet"
JSONL: Final = "jsonl"
TEXT: Final = "VARCHAR"

#: numpy's code -> SQL type.
_SQL: Final = {
    "?": "BOOLEAN", "i1": "TINYINT", "i2": "SMALLINT", "i4": "INTEGER", "i8": "BIGINT", "u1": "UTINYINT",
    "u2": "USMALLINT", "u4": "UINTEGER", "u8": "UBIGINT", "f4": "FLOAT", "f8": "DOUBLE",
}  # fmt: skip
_NUMPY: Final = {name: code for code, name in _SQL.items()}


class StorageError(TidegateError):
    """A table could not be written or read."""

    code = "capture_storage"


def has_duckdb() -> bool:
    return importlib.util.find_spec("duckdb") is not None


def connect(memory: str = "512MB") -> Any:
    """A duckdb of our own: in memory, one thread, nothing fetched from anywhere. Raises ConfigError without duckdb."""
    if not has_duckdb():
        raise ConfigError("Parquet needs duckdb: install tidegate[capture]")
    duckdb = importlib.import_module("duckdb")
    settings = {
        "threads": 1,
        "memory_limit": memory,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "preserve_insertion_order": True,
    }
    return duckdb.connect(":memory:", config=settings)


def duckdb_error() -> type[Exception]:
    """The base of what duckdb raises."""
    error: type[Exception] = importlib.import_module("duckdb").Error
    return error


def literal(text: object) -> str:
    """A text as SQL writes it."""
    return "'" + str(text).replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A column's name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def with_missing(values: Any) -> Array:
    """What duckdb answers as numpy: missing floats become NaN, and what else is missing None; in lists, too."""
    found = _unmasked(values)
    if found.dtype == object and isinstance(next((value for value in found if value is not None), None), np.ndarray):
        for place, value in enumerate(found):
            found[place] = value if value is None else with_missing(value)
    return found


def _unmasked(values: Any) -> Array:
    if not np.ma.is_masked(values):
        return np.asarray(np.ma.getdata(values))
    if values.dtype.kind == "f":
        return np.asarray(values.filled(np.nan))
    out = np.ma.getdata(values).astype(object)
    out[np.ma.getmaskarray(values)] = None
    return out


# --- types -----------------------------------------------------------------------------------------------------------


def type_of(values: Array) -> str:
    """The SQL type of a column. What is no number is text, or lists of what its first list holds."""
    if values.dtype != object:
        return _SQL["?" if values.dtype.kind == "b" else values.dtype.str.lstrip("<|=")]
    for value in values:
        if isinstance(value, np.ndarray) and value.dtype != object:
            return type_of(value) + "[]"
        if isinstance(value, np.ndarray | list):
            return TEXT + "[]"
        if value is not None:
            return TEXT
    return TEXT


def dtype_of(sql: str) -> np.dtype[Any]:
    """The numpy type of a column of numbers, or of objects."""
    return np.dtype(_NUMPY.get(sql, object))


def column_of(values: Sequence[Any], sql: str) -> Array:
    """Plain values, as JSON has them, as a column of a type."""
    if sql in _NUMPY:
        dtype = dtype_of(sql)
        return np.array([float(value) for value in values] if dtype.kind == "f" else values, dtype)
    out = np.empty(len(values), object)
    inner = sql.removesuffix("[]")
    out[:] = [column_of(value, inner) if sql.endswith("[]") and value is not None else value for value in values]
    return out


# --- writing ---------------------------------------------------------------------------------------------------------


def write_table(path: Path, table: Mapping[str, Array], form: str, facts: Mapping[str, str]) -> None:
    """Write a new file, not synced. ``facts`` go into the metadata of Parquet. Raises StorageError, or OSError."""
    if form == JSONL:
        with path.open("xb") as file:
            file.writelines(json_lines(table))
        return
    connection = connect()
    try:
        connection.register("captured", dict(table))
        metadata = ", ".join(f"{identifier(key)}: {literal(value)}" for key, value in facts.items())
        connection.execute(
            f"COPY (SELECT {', '.join(_selected(table))} FROM captured) TO {literal(path)} "  # noqa: S608 - a literal of our own
            f"(FORMAT parquet, COMPRESSION zstd, KV_METADATA {{{metadata}}})"
        )
    except duckdb_error() as error:
        raise StorageError(f"{path.name} could not be written: {error}") from error
    finally:
        connection.close()


def _selected(table: Mapping[str, Array]) -> Iterator[str]:
    """Columns as they are to be stored. duckdb takes a NaN of numpy's for a missing value, of which there are none."""
    for name, values in table.items():
        column, sql = identifier(name), type_of(values)
        inner = sql.removesuffix("[]")
        if inner not in ("FLOAT", "DOUBLE"):
            yield column
        elif inner == sql:
            yield f"coalesce({column}, 'NaN'::{sql}) AS {column}"
        else:
            yield f"list_transform({column}, lambda value: coalesce(value, 'NaN'::{inner})) AS {column}"


def json_lines(table: Mapping[str, Array]) -> Iterator[bytes]:
    """One line of JSON for each row."""
    names = list(table)
    columns = [json_values(values) for values in table.values()]
    for row in zip(*columns, strict=True):
        yield orjson.dumps(dict(zip(names, row, strict=True)), option=orjson.OPT_APPEND_NEWLINE)


def json_values(values: Array) -> list[Any]:
    """A column as values that JSON has; NaN and infinities as words."""
    if values.dtype == object:
        return [json_values(np.asarray(value)) if isinstance(value, np.ndarray) else value for value in values]
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return [value if math.isfinite(value) else _word(value) for value in values.tolist()]
    plain: list[Any] = values.tolist()
    return plain


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


# --- reading ---------------------------------------------------------------------------------------------------------


def read_json_lines(path: Path, types: Mapping[str, str]) -> Table:
    """The columns of ``types`` of a file that ``write_table`` wrote. Raises StorageError, or OSError."""
    try:
        with path.open("rb") as file:
            rows = [orjson.loads(line) for line in file]
        return {name: column_of([row[name] for row in rows], sql) for name, sql in types.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path.name} is not what was written: {error}") from error
