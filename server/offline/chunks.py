"""Tables in files, read a chunk of rows at a time: Parquet (through duckdb), CSV, JSON lines, npz. Any of them may be
larger than memory. A chunk is column name -> array with one entry per row; text stays text, as only who asks for a
number knows which. Reading starts at any row, which is how an interrupted job goes on.
"""

from __future__ import annotations

import csv
import gzip
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final, TypeAlias

import numpy as np
import orjson

from server.capture.formats import Array, Table, connect, duckdb_error, identifier, literal, with_missing
from server.errors import InvalidArgument

PARQUET, CSV, JSONL, NPZ = "parquet", "csv", "jsonl", "npz"
_SUFFIXES: Final = {
    ".parquet": PARQUET, ".pq": PARQUET, ".csv": CSV, ".csv.gz": CSV, ".jsonl": JSONL, ".ndjson": JSONL, ".npz": NPZ,
}  # fmt: skip

_DECIMAL: Final = re.compile(r"DECIMAL\((\d+),\d+\)")
#: Decimal digits that every float of 64 bits keeps.
_EXACT_DIGITS: Final = 15

Reader: TypeAlias = Callable[[Path, int, int], Iterator[Table]]


def format_of(path: Path) -> str:
    """The format that a file's name says. Raises InvalidArgument."""
    name = path.name.lower()
    found = next((form for suffix, form in _SUFFIXES.items() if name.endswith(suffix)), None)
    if found is None:
        raise InvalidArgument(f"{path.name}: wanted a name that ends with one of {', '.join(_SUFFIXES)}")
    return found


def read_chunks(path: Path, rows: int, start: int = 0) -> Iterator[Table]:
    """Chunks of ``rows`` rows (the last one shorter) from row ``start`` on. Raises InvalidArgument, also later."""
    readers: dict[str, Reader] = {PARQUET: _parquet, CSV: _csv, JSONL: _jsonl, NPZ: _npz}
    try:
        yield from readers[format_of(path)](path, rows, start)
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, csv.Error, zipfile.BadZipFile) as error:
        raise InvalidArgument(f"{path.name} is not readable as {format_of(path)}: {error}") from error


def count_rows(path: Path) -> int | None:
    """How many rows there are, where that is known without reading them."""
    if format_of(path) != PARQUET:
        return None
    connection = connect()
    try:
        (found,) = connection.execute("SELECT sum(num_rows) FROM parquet_file_metadata(?)", [str(path)]).fetchone()
        return int(found)
    except duckdb_error():
        return None
    finally:
        connection.close()


def _parquet(path: Path, rows: int, start: int) -> Iterator[Table]:
    """By row numbers, which duckdb looks up in the row groups: a chunk costs the same wherever it lies."""
    if not path.is_file():
        raise InvalidArgument(f"{path} cannot be read: there is no such file")
    source = f"read_parquet({literal(path)}, file_row_number = true)"
    connection = connect()
    try:
        columns = _columns(connection, source)
        while True:
            chunk = connection.execute(
                f"SELECT {columns} FROM {source} "  # noqa: S608 - a literal and identifiers of our own
                f"WHERE file_row_number >= {start} AND file_row_number < {start + rows} ORDER BY file_row_number"
            ).fetchnumpy()
            found = {name: with_missing(values) for name, values in chunk.items()}
            got = len(next(iter(found.values()), ()))
            if got:
                yield found
            if got < rows:
                return
            start += rows
    except duckdb_error() as error:
        raise InvalidArgument(f"{path.name} is not readable as parquet: {error}") from error
    finally:
        connection.close()


def _columns(connection: Any, source: str) -> str:
    """Every column. Decimals of more digits than a float holds come as text, which loses none."""
    found = connection.execute(f"DESCRIBE SELECT * EXCLUDE file_row_number FROM {source}").fetchall()  # noqa: S608
    return ", ".join(
        f"{name}::VARCHAR AS {name}" if (digits := _DECIMAL.fullmatch(sql)) and int(digits[1]) > _EXACT_DIGITS else name
        for name, sql in ((identifier(column[0]), column[1]) for column in found)
    )


def _csv(path: Path, rows: int, start: int) -> Iterator[Table]:
    with _text(path) as file:
        lines = csv.reader(file, strict=True)
        names = next(lines, [])
        if not names or len(set(names)) != len(names):
            raise InvalidArgument(f"{path.name}: the first line must name the columns, each once")
        full = (_cells(path, line, lines.line_num, len(names)) for line in lines if line)
        for taken in _slices(full, rows, start):
            yield {name: _objects([line[place] for line in taken]) for place, name in enumerate(names)}


def _cells(path: Path, line: list[str], number: int, wanted: int) -> list[str]:
    if len(line) != wanted:
        raise InvalidArgument(f"{path.name}: line {number} has {len(line)} values, wanted {wanted}")
    return line


def _text(path: Path) -> IO[str]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _jsonl(path: Path, rows: int, start: int) -> Iterator[Table]:
    with path.open("rb") as file:
        numbered = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        for taken in _slices(numbered, rows, start):
            objects = [_object(path, number, line) for number, line in taken]
            names = list(objects[0])
            for (number, _), found in zip(taken, objects, strict=True):
                if found.keys() != objects[0].keys():
                    raise InvalidArgument(f"{path.name}: line {number} has other keys than the lines before it")
            yield {name: _objects([found[name] for found in objects]) for name in names}


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"{path.name}: line {number} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidArgument(f"{path.name}: line {number} is no JSON object")
    return found


def _slices(items: Iterable[Any], rows: int, start: int) -> Iterator[list[Any]]:
    remaining = islice(items, start, None)
    while taken := list(islice(remaining, rows)):
        yield taken


def _objects(values: list[Any]) -> Array:
    out = np.empty(len(values), object)
    for place, value in enumerate(values):  # one by one: lists of equal lengths would become a second axis
        out[place] = value
    return out


# --- npz -------------------------------------------------------------------------------------------------------------


def _npz(path: Path, rows: int, start: int) -> Iterator[Table]:
    """Every array of the archive at once, each from its own stream."""
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(path))
        arrays = {
            name.removesuffix(".npy"): _Stream(name, stack.enter_context(archive.open(name)))
            for name in archive.namelist()
        }
        counts = {stream.rows for stream in arrays.values()}
        if len(counts) != 1:
            raise InvalidArgument(f"{path.name}: arrays must have the same first dimension, they have {sorted(counts)}")
        for stream in arrays.values():
            stream.skip(start)
        for _ in range(start, counts.pop(), rows):
            yield {name: stream.take(rows) for name, stream in arrays.items()}


class _Stream:
    """One ``.npy`` member, read in order."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        header = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        major, _ = np.lib.format.read_magic(file)
        if major not in (1, 2):
            raise InvalidArgument(f"array {name}: npy version {major} is not read, only 1 and 2")
        shape, fortran, self.dtype = header[major - 1](file)
        if self.dtype.hasobject or not shape or (fortran and len(shape) > 1):
            raise InvalidArgument(f"array {name}: wanted numbers or texts in C order with one entry per row")
        self.rows, self._tail, self._file = shape[0], shape[1:], file
        self._row_bytes = self.dtype.itemsize * int(np.prod(self._tail, dtype=np.int64))
        self._at = 0

    def skip(self, rows: int) -> None:
        """Rows of a compressed stream can only be read past."""
        left = min(rows, self.rows) * self._row_bytes
        self._at = min(rows, self.rows)
        while left:
            got = len(self._file.read(min(left, 1 << 20)))
            if not got:
                raise EOFError("an array ends early")
            left -= got

    def take(self, rows: int) -> Array:
        count = min(rows, self.rows - self._at)
        raw = self._file.read(count * self._row_bytes)
        if len(raw) != count * self._row_bytes:
            raise EOFError("an array ends early")
        self._at += count
        return np.frombuffer(raw, self.dtype).reshape(count, *self._tail)
