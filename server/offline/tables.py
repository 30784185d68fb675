"""Parts of a table on disk, and the one file that they become: Parquet, CSV, JSON lines or npz.

A part is written whole or not at all; joining streams, so that neither needs more memory than a part.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from router.registry.blobs import sync_folder
from server.capture.formats import (
    Array,
    StorageError,
    connect,
    duckdb_error,
    identifier,
    json_values,
    literal,
    write_table,
)
from server.errors import InvalidArgument
from server.offline.chunks import CSV, JSONL, NPZ, PARQUET

_COPY_BYTES: Final = 1 << 20


def write_part(path: Path, table: Mapping[str, Array], form: str) -> None:
    """One part, durable under its name when this returns. Raises StorageError, InvalidArgument or OSError."""
    temp = path.with_name(f".{path.name}.tmp")
    temp.unlink(missing_ok=True)
    try:
        if form in (PARQUET, JSONL):
            write_table(temp, table, form, {})
        elif form == CSV:
            _write_csv(temp, table)
        else:
            _write_npz(temp, table)
        publish(temp, path)
    except BaseException:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        raise


def publish(temp: Path, path: Path) -> None:
    """Give a finished file its name, durably."""
    with temp.open("rb") as file:
        os.fsync(file.fileno())
    temp.replace(path)
    sync_folder(path.parent)


def _write_csv(path: Path, table: Mapping[str, Array]) -> None:
    with path.open("x", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(table)
        lines.writerows(zip(*[_cells(values) for values in table.values()], strict=True))


def _cells(values: Array) -> list[Any]:
    """Lists as JSON writes them."""
    plain = json_values(values)
    return ["" if value is None else str(value) if isinstance(value, list) else value for value in plain]


def _write_npz(path: Path, table: Mapping[str, Array]) -> None:
    arrays = {name: _dense(name, values) for name, values in table.items()}
    with path.open("xb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _dense(name: str, values: Array) -> Array:
    """Texts as an array of texts, lists of one length as a second axis, numbers of which some are missing as floats."""
    if values.dtype != object:
        return values
    if len(values) and isinstance(values[0], np.ndarray):
        if len({len(value) for value in values}) > 1:
            raise InvalidArgument(f"column '{name}' has rows of different lengths, which npz does not hold")
        return np.stack(list(values))
    if all(value is None or isinstance(value, bool | int | float) for value in values):
        return np.array([np.nan if value is None else value for value in values], np.float64)
    if any(isinstance(value, list) for value in values):
        raise InvalidArgument(f"column '{name}' holds lists of texts, which npz does not hold")
    return np.array(["" if value is None else value for value in values], "U")


# --- joining ---------------------------------------------------------------------------------------------------------


def join_parts(parts: Sequence[Path], target: Path, form: str, facts: Mapping[str, str]) -> None:
    """Write the rows of all parts, in order, to the new file ``target``, not synced. ``facts``: Parquet's metadata.

    Raises StorageError or OSError.
    """
    if form == PARQUET:
        _join_parquet(parts, target, facts)
    elif form == NPZ:
        _join_npz(parts, target)
    else:
        with target.open("xb") as out:
            for place, part in enumerate(parts):
                with part.open("rb") as file:
                    if form == CSV and place:
                        _skip_head(file)
                    shutil.copyfileobj(file, out, _COPY_BYTES)


def _skip_head(file: io.BufferedReader) -> None:
    """Past the line of names, whose quoted names may hold line ends."""
    line = file.readline()
    while line.count(b'"') % 2:
        line += file.readline()


def _join_parquet(parts: Sequence[Path], target: Path, facts: Mapping[str, str]) -> None:
    files = ", ".join(map(literal, parts))
    metadata = ", ".join(f"{identifier(key)}: {literal(value)}" for key, value in facts.items())
    connection = connect()
    try:
        connection.execute(
            f"COPY (SELECT * FROM read_parquet([{files}], union_by_name = true)) TO {literal(target)} "  # noqa: S608
            f"(FORMAT parquet, COMPRESSION zstd, KV_METADATA {{{metadata}}})"
        )
    except duckdb_error() as error:
        raise StorageError(f"{target.name} could not be written: {error}") from error
    finally:
        connection.close()


def _join_npz(parts: Sequence[Path], target: Path) -> None:
    with zipfile.ZipFile(target, "x", allowZip64=True) as archive:
        for name in _names(parts[0]):
            dtype, shape = _joined_type(name, parts)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as out:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(out, header)
                for values in _arrays(name, parts):
                    out.write(np.ascontiguousarray(values, dtype).tobytes())


def _names(part: Path) -> list[str]:
    with np.load(part, allow_pickle=False) as file:
        return list(file.files)


def _arrays(name: str, parts: Sequence[Path]) -> Iterable[Array]:
    for part in parts:
        with np.load(part, allow_pickle=False) as file:
            yield file[name]


def _joined_type(name: str, parts: Sequence[Path]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The type that holds all parts of an array (texts grow), and its shape."""
    found = [(values.dtype, values.shape) for values in _arrays(name, parts)]
    tails = {shape[1:] for _, shape in found}
    if len(tails) > 1:
        raise StorageError(f"array '{name}' has rows of different shapes, which npz does not hold")
    return np.result_type(*[dtype for dtype, _ in found]), (sum([shape[0] for _, shape in found]), *tails.pop())
