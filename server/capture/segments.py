"""Segments: files of captured rows, each whole or not there, listed with its SHA-256.

A segment is ``<folder>/<model>/<kind>-<first time>-<number>.parquet`` (or ``.jsonl``) and beside it its entry of the
manifest, the same name with ``.json`` behind it. Both are written under hidden names, synced and then renamed, the
entry last: what an entry says is true whatever dies when, and who reads by entries never sees half a segment. Removing
goes the other way around. What a dead writer left is finished or removed when the next one opens the folder; a lock
that the kernel takes back with the process keeps out a second one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import structlog

from router.registry.blobs import sync_folder
from server.capture.formats import PARQUET, Array, StorageError, duckdb_error, has_duckdb, type_of, write_table
from server.errors import ConfigError

log: Any = structlog.get_logger("capture")

FORMAT: Final = "tidegate.capture/1"
ENTRY_SUFFIX: Final = ".json"
_TEMP: Final = ".tmp"
_LOCK: Final = ".lock"
_DIGITS: Final = 20

Kind: TypeAlias = Literal["requests", "labels", "shadows"]


@dataclass(slots=True, frozen=True)
class Facts:
    """What a segment's rows have in common. Times are ns since the epoch.

    ``version`` is "" for labels, and NAME:VERSION of who answered for shadows.
    """

    kind: Kind
    model: str
    version: str
    digest: str
    first_ns: int
    last_ns: int


@dataclass(slots=True, frozen=True)
class Entry:
    """One segment as the manifest lists it. ``columns``: name -> SQL type. ``path`` is where it was found."""

    facts: Facts
    file: str
    sha256: str
    size: int
    rows: int
    columns: Mapping[str, str]
    path: Path

    def to_json(self) -> bytes:
        listed = {key: getattr(self, key) for key in ("file", "sha256", "size", "rows")}
        whole = {"format": FORMAT, **asdict(self.facts), **listed, "columns": dict(self.columns)}
        return json.dumps(whole, indent=1).encode()


def read_entry(path: Path) -> Entry:
    """One entry of the manifest. Raises StorageError when it is not one, or OSError."""
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT:
            raise StorageError(f"{path.name}: format {found['format']!r} is not known, wanted {FORMAT!r}")
        facts = Facts(**{field.name: found[field.name] for field in fields(Facts)})
        data = path.with_name(found["file"])
        return Entry(facts, found["file"], found["sha256"], found["size"], found["rows"], found["columns"], data)
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path.name} is no entry of a capture manifest: {error}") from error


def entries(folder: Path, model: str, kind: Kind) -> list[Entry]:
    """The segments of one model by time, oldest first. Those that are removed meanwhile are left out."""
    found = []
    for path in sorted((folder / model).glob(f"{kind}-*{ENTRY_SUFFIX}")):
        with suppress(FileNotFoundError):
            found.append(read_entry(path))
    return found


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(entry: Entry) -> bool:
    """Is the segment's file there, with the bytes that were written?"""
    try:
        return entry.path.stat().st_size == entry.size and sha256_of(entry.path) == entry.sha256
    except OSError:
        return False


class SegmentStore:
    """Writes segments below ``folder`` and keeps within ``max_bytes`` and ``max_segments`` by removing the oldest.

    For one thread. The file that is being written comes on top of ``max_bytes``. Raises ConfigError when another
    process writes there, or the folder cannot be made.
    """

    def __init__(self, folder: Path, form: str, *, max_bytes: int, max_segments: int) -> None:
        self.folder = folder
        self.form = form
        self.removed = 0
        self._max_bytes = max_bytes
        self._max_segments = max_segments
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder)
        except OSError as error:
            raise ConfigError(f"capture folder {folder} cannot be used: {error.strerror or error}") from error
        self._known: list[tuple[int, int, Path]] = sorted(self._recovered())
        self.bytes = sum(size for _, size, _ in self._known)
        self._number = 1 + max([_number_of(path) for _, _, path in self._known], default=0)
        self._make_room(0)

    def __len__(self) -> int:
        return len(self._known)

    # --- writing -----------------------------------------------------------------------------------------------

    def write(self, facts: Facts, table: Mapping[str, Array]) -> Entry:
        """One segment, durable when this returns. Raises StorageError or OSError; then there is no trace of it."""
        place = self.folder / facts.model
        place.mkdir(parents=True, exist_ok=True)
        name = f"{facts.kind}-{facts.first_ns:0{_DIGITS}}-{self._number:08}.{self.form}"
        self._number += 1
        data, listed = place / f".{name}{_TEMP}", place / f".{name}{ENTRY_SUFFIX}{_TEMP}"
        try:
            entry = self._write(facts, table, data, place / name)
            _write_synced(listed, entry.to_json())
            self._make_room(entry.size)
            data.rename(entry.path)
            listed.rename(_entry_path(entry.path))
            sync_folder(place)
        except BaseException:
            for path in (data, listed):
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            raise
        self._known.append((facts.first_ns, entry.size, entry.path))
        self.bytes += entry.size
        return entry

    def _write(self, facts: Facts, table: Mapping[str, Array], data: Path, target: Path) -> Entry:
        metadata = {"tidegate": json.dumps({"format": FORMAT, **asdict(facts)})}
        write_table(data, table, self.form, metadata)
        with data.open("rb") as file:
            os.fsync(file.fileno())
        size = data.stat().st_size
        if size > self._max_bytes:
            raise StorageError(f"a segment of {size} bytes is over the {self._max_bytes} that may be kept in all")
        rows = len(next(iter(table.values())))
        columns = {name: type_of(values) for name, values in table.items()}
        return Entry(facts, target.name, sha256_of(data), size, rows, columns, target)

    def _make_room(self, size: int) -> None:
        """Remove the oldest segments until one of ``size`` more bytes fits."""
        self._known.sort()
        while self._known and (self.bytes + size > self._max_bytes or len(self._known) >= self._max_segments):
            _, gone, path = self._known[0]
            _remove(path)
            del self._known[0]
            self.bytes -= gone
            self.removed += 1

    # --- opening -----------------------------------------------------------------------------------------------

    def _recovered(self) -> Iterator[tuple[int, int, Path]]:
        """What is there after a crash: renames that were begun are finished, everything else half done is removed."""
        for place in [path for path in self.folder.iterdir() if path.is_dir()]:
            for left in place.glob(f".*{ENTRY_SUFFIX}{_TEMP}"):
                self._finish(left)
            for path in [*place.glob(f".*{_TEMP}"), *_orphans(place)]:
                path.unlink()
            for path in place.glob(f"*-*{ENTRY_SUFFIX}"):
                entry = _entry_or_none(path)
                if entry is None:
                    log.warning("capture_entry_unreadable", file=str(path))  # not this program's doing: left alone
                elif not entry.path.exists():
                    path.unlink()
                else:
                    yield entry.facts.first_ns, entry.size, entry.path

    @staticmethod
    def _finish(left: Path) -> None:
        """An entry whose segment got its name, but which did not get its own."""
        entry = _entry_or_none(left)
        if entry is not None and is_whole(entry):
            left.rename(_entry_path(entry.path))

    def close(self) -> None:
        """Let another process write here."""
        os.close(self._lock)


def default_format(wanted: str) -> str:
    """The format that ``auto`` means here. Raises ConfigError for Parquet without duckdb."""
    if wanted == "parquet" and not has_duckdb():
        raise ConfigError("capture.format parquet needs duckdb: install tidegate[capture], or use jsonl")
    return ("parquet" if has_duckdb() else "jsonl") if wanted == "auto" else wanted


def storage_errors(form: str) -> tuple[type[Exception], ...]:
    """What writing a segment of a format fails with when a disk is full, read-only or gone."""
    return (OSError, StorageError, duckdb_error()) if form == PARQUET else (OSError, StorageError)


def _entry_path(data: Path) -> Path:
    return data.with_name(data.name + ENTRY_SUFFIX)


def _entry_or_none(path: Path) -> Entry | None:
    try:
        return read_entry(path)
    except (StorageError, OSError):
        return None


def _orphans(place: Path) -> list[Path]:
    """Segments without an entry: their names were given, and then everything stopped."""
    data = [path for path in place.iterdir() if path.suffix in {".parquet", ".jsonl"} and "-" in path.name]
    return [path for path in data if not path.name.startswith(".") and not _entry_path(path).exists()]


def _remove(data: Path) -> None:
    """The entry first: a segment that is not listed is not there."""
    _entry_path(data).unlink(missing_ok=True)
    data.unlink(missing_ok=True)


def _number_of(path: Path) -> int:
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _locked(folder: Path) -> int:
    file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ConfigError(f"capture folder {folder} is written by another process: give each its own") from None
    return file
