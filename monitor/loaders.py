"""Tables from files: ``.csv``, ``.csv.gz`` (standard library), ``.npz`` (numpy), ``.parquet`` (pyarrow or duckdb)."""

from __future__ import annotations

import csv
import gzip
import importlib
import importlib.util
import lzma
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from monitor.errors import MissingReader, ProfileError
from monitor.types import Array

#: What stands for a missing value in text files, lower case.
MISSING_TEXTS: Final = frozenset({"", "na", "nan", "null", "none", "n/a"})
#: How the names of text files end, lower case.
TEXT_FILES: Final = (".csv", ".csv.gz")
#: What reading an archive raises that is damaged, encrypted or none.
_NO_ARCHIVE: Final = (
    ValueError, OverflowError, EOFError, RuntimeError, OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError
)  # fmt: skip
_BOOLEANS: Final = {"true": True, "false": False}


def read_table(path: Path, columns: Collection[str] | None = None, *, texts: bool = False) -> dict[str, Array]:
    """Column name -> values of one file, all rows; ``columns`` picks some. Raises ProfileError, or OSError.

    Columns of a text file become integers where every value is one, floats where every value is a number or missing,
    booleans where every value is true or false (floats where some are missing), and strings otherwise; with ``texts``
    they are the strings that the file holds, None for empty ones. Arrays of several dimensions (npz) stay as they are.
    """
    name = path.name.lower()
    if name.endswith(TEXT_FILES):
        table = _read_csv(path, columns, texts)
    elif name.endswith(".npz"):
        table = _read_npz(path, columns)
    elif name.endswith((".parquet", ".pq")):
        table = _read_parquet(path, columns)
    else:
        raise ProfileError(f"{path}: wanted a .csv, .csv.gz, .npz or .parquet file")
    absent = sorted(set(columns or ()) - set(table))
    if absent:
        raise ProfileError(f"{path.name} has no column {', '.join(absent)}")
    return table


def _read_csv(path: Path, columns: Collection[str] | None, as_they_are: bool) -> dict[str, Array]:
    try:
        with _open_text(path) as file:
            lines = csv.reader(file)
            head = next(lines, [])
            if len(set(head)) != len(head) or not head:
                raise ProfileError(f"{path.name}: the first line must name the columns, each once")
            wanted = [(place, name) for place, name in enumerate(head) if columns is None or name in columns]
            texts: list[list[str]] = [[] for _ in wanted]
            for number, line in enumerate(_full_lines(lines), start=2):
                if len(line) != len(head):
                    raise ProfileError(f"{path.name}: row {number} has {len(line)} values, wanted {len(head)}")
                for values, (place, _) in zip(texts, wanted, strict=True):
                    values.append(line[place])
    except (csv.Error, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as failure:
        raise ProfileError(f"{path.name}: not a readable CSV file ({failure})") from None
    convert = _strings if as_they_are else _parsed
    return {name: convert(values) for (_, name), values in zip(wanted, texts, strict=True)}


def _open_text(path: Path) -> Any:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _full_lines(lines: Iterable[list[str]]) -> Iterator[list[str]]:
    return (line for line in lines if line)


def _parsed(texts: list[str]) -> Array:
    lowered = [text.strip().lower() for text in texts]
    found = set(lowered)
    if found and found <= _BOOLEANS.keys():
        return np.array([_BOOLEANS[text] for text in lowered])
    if found & _BOOLEANS.keys() and found <= _BOOLEANS.keys() | MISSING_TEXTS:
        return np.array([float(_BOOLEANS.get(text, np.nan)) for text in lowered])
    if any("_" in text for text in lowered):  # Python's digits may be grouped by it, a file's are not
        return _strings(texts)
    try:
        return np.array([int(text) for text in lowered], dtype="i8")
    except (ValueError, OverflowError):
        pass
    try:
        return np.array([np.nan if text in MISSING_TEXTS else float(text) for text in lowered])
    except ValueError:
        return _strings(texts)


def _strings(texts: list[str]) -> Array:
    out = np.empty(len(texts), object)
    out[:] = [None if text == "" else text for text in texts]
    return out


def _read_npz(path: Path, columns: Collection[str] | None) -> dict[str, Array]:
    with path.open("rb") as raw:
        try:
            with np.lib.npyio.NpzFile(raw, allow_pickle=False) as file:
                table = {name: file[name] for name in file.files if columns is None or name in columns}
        except _NO_ARCHIVE as failure:
            raise ProfileError(f"{path.name}: not a readable npz file ({failure})") from None
    for name, values in table.items():
        if not isinstance(values, np.ndarray):  # the bytes of a file that is no array
            raise ProfileError(f"{path.name}: '{name}' is no array")
    return table


def _read_parquet(path: Path, columns: Collection[str] | None) -> dict[str, Array]:
    picked = sorted(columns) if columns is not None else None
    path.open("rb").close()  # who is not there is told of as everywhere
    if importlib.util.find_spec("pyarrow") is not None:
        return _through_pyarrow(path, picked)
    if importlib.util.find_spec("duckdb") is not None:
        return _through_duckdb(path, picked)
    raise MissingReader(
        f"{path.name}: reading Parquet needs pyarrow or duckdb; install one of them, or give csv or npz"
    )


def _through_pyarrow(path: Path, columns: list[str] | None) -> dict[str, Array]:
    arrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        names = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=None if columns is None else [c for c in columns if c in names])
    except arrow.ArrowException as failure:
        raise ProfileError(f"{path.name}: not a readable Parquet file ({failure})") from None
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _through_duckdb(path: Path, columns: list[str] | None) -> dict[str, Array]:
    duckdb = importlib.import_module("duckdb")
    with duckdb.connect() as connection:
        try:
            found = connection.execute("SELECT * FROM read_parquet(?)", [str(path)]).fetchnumpy()
        except duckdb.Error as failure:
            why = str(failure).partition("\n")[0]  # then comes the query
            raise ProfileError(f"{path.name}: not a readable Parquet file ({why})") from None
    return {name: _filled(values) for name, values in found.items() if columns is None or name in columns}


def _filled(values: Any) -> Array:
    """A masked array's missing values as NaN, or None among objects, or no date among dates."""
    if values.dtype.kind == "O":
        out = np.empty(len(values), object)  # duckdb's blobs are bytearrays
        out[:] = [bytes(value) if isinstance(value, bytearray) else value for value in np.ma.getdata(values)]
        out[np.ma.getmaskarray(values)] = None  # ``filled(None)`` fills in a text of numpy's own
        return out
    if not np.ma.is_masked(values):
        return np.asarray(values)
    if values.dtype.kind in "mM":
        return np.asarray(values.filled(np.array("NaT", values.dtype)))
    return np.asarray(values.astype("f8").filled(np.nan))
