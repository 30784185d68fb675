"""Versions laid out as folders, the way a loader wants them: ``<root>/<model>/<digest>/model.onnx``.

A folder is built apart and renamed, so that it is whole or not there. Looking at one again is cheap: what the system
says of each file (size, times, inode) is compared with what it said when the bytes were hashed. A folder that is not
what was published is replaced from the blobs.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from router.registry.blobs import READ_FLAGS, BlobStore, hash_open, staging_folder, storage, sweep_staging, sync_folder
from router.registry.manifest import FileEntry

_STAMP: Final = ".tidegate.json"
_TEMPS: Final = ".tmp"
_LOCK: Final = ".lock"

#: Size, mtime in ns, ctime in ns, inode.
_Print = list[int]


@dataclass(slots=True, frozen=True)
class CachedFolder:
    """One version's folder; ``used`` is when it was last handed out, in seconds since the epoch."""

    model: str
    digest: str
    path: Path
    used: float


class ServingCache:
    """Folders under ``root``, filled from ``blobs``. Safe for any number of processes at once."""

    def __init__(self, root: Path, blobs: BlobStore) -> None:
        self.root = root
        self._blobs = blobs

    def get(self, model: str, digest: str, files: Sequence[FileEntry]) -> tuple[Path, tuple[str, ...]]:
        """The folder of a version, and the paths in it that had to be mended. Raises Damaged or StorageFailed."""
        folder = self.root / model / digest
        if not os.path.lexists(folder):
            self._build(folder, files)
            return folder, ()
        faults = _faults(folder, files)
        if faults:
            self._build(folder, files)
        return folder, tuple(faults)

    def write(self, files: Sequence[FileEntry], target: Path) -> None:
        """Make the new folder ``target`` with copies of the files. Raises Damaged or StorageFailed."""
        with staging_folder(target.parent) as staging:
            new = self._copies(staging, files)
            with storage(f"folder {target.name} could not be made"):
                new.rename(target)
                sync_folder(target.parent)

    def folders(self) -> Iterator[CachedFolder]:
        """Every version folder on disk."""
        for path in self.root.glob("*/*"):
            if not path.parent.name.startswith("."):
                with suppress(OSError):
                    yield CachedFolder(path.parent.name, path.name, path, _last_use(path))

    def remove(self, folder: CachedFolder) -> None:
        """Delete a version's folder: at once gone under its name."""
        with (
            staging_folder(self.root / _TEMPS) as staging,
            storage("a cached folder could not be deleted"),
            self._locked(),
            suppress(FileNotFoundError),
        ):
            folder.path.rename(staging / "old")

    def sweep(self, older_than_s: float) -> int:
        """Remove what dead builders left behind; returns how many staging folders."""
        return sweep_staging(self.root / _TEMPS, older_than_s)

    def _build(self, folder: Path, files: Sequence[FileEntry]) -> None:
        """Build the folder and put it in its place, unless a whole one stands there by then."""
        with staging_folder(self.root / _TEMPS) as staging:
            new = self._copies(staging, files)
            _write_stamp(new, {entry.path: _print(new / entry.path) for entry in files})
            with storage(f"the folder of {folder.parent.name} could not be made"), self._locked():
                folder.parent.mkdir(parents=True, exist_ok=True)
                if os.path.lexists(folder):
                    if not _faults(folder, files):
                        return
                    folder.rename(staging / "old")
                new.rename(folder)
                sync_folder(folder.parent)

    def _copies(self, staging: Path, files: Sequence[FileEntry]) -> Path:
        new = staging / "new"
        for entry in files:
            target = new / entry.path
            with storage(f"the folder of {entry.path} could not be made"):
                target.parent.mkdir(parents=True, exist_ok=True)
            self._blobs.copy(entry.sha256, target)
        with storage("a folder could not be synced"):
            for folder, _, _ in os.walk(new):
                sync_folder(Path(folder))
        return new

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among those who put folders in place or take them away; held for renames only."""
        file = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def _faults(folder: Path, files: Sequence[FileEntry]) -> list[str]:
    """The paths in ``folder`` that are missing, changed or should not be there. Notes that it was looked at."""
    wanted = {entry.path: entry for entry in files}
    found = _paths(folder)
    faults = {path for path in found if path not in wanted} | {path for path in wanted if path not in found}
    stamp = _read_stamp(folder)
    changed = [path for path in wanted if path not in faults and _print(folder / path) != stamp.get(path)]
    faults |= {path for path in changed if not _is_whole(folder / path, wanted[path])}
    with suppress(OSError):  # on a read-only disk the next look hashes again
        if changed and not faults:
            _write_stamp(folder, {path: _print(folder / path) for path in wanted})
        os.utime(folder / _STAMP)
    return sorted(faults)


def _paths(folder: Path) -> set[str]:
    """Everything in a folder but folders and the stamp, as relative paths; a link is a thing of its own."""
    if folder.is_symlink():
        return set()
    found = set()
    for above, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        found |= {os.path.relpath(os.path.join(above, name), folder) for name in names + links}
    return found - {_STAMP}


def _is_whole(path: Path, entry: FileEntry) -> bool:
    """Is this a regular file of its own, with the bytes that were published?"""
    try:
        file = os.open(path, READ_FLAGS)
    except OSError:
        return False
    try:
        info = os.fstat(file)
        regular = stat.S_ISREG(info.st_mode) and info.st_nlink == 1
        return regular and info.st_size == entry.size and hash_open(file) == entry.sha256
    finally:
        os.close(file)


def _print(path: Path) -> _Print:
    try:
        info = path.lstat()
    except OSError:
        return []
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]


def _read_stamp(folder: Path) -> Mapping[str, _Print]:
    """What was noted when the bytes were hashed; nothing when that cannot be read."""
    try:
        stamp = json.loads((folder / _STAMP).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _write_stamp(folder: Path, stamp: Mapping[str, _Print]) -> None:
    with storage("the stamp of a cached folder could not be written"):
        (folder / _STAMP).write_text(json.dumps(stamp))


def _last_use(folder: Path) -> float:
    stamp = folder / _STAMP
    return (stamp if stamp.exists() else folder).stat().st_mtime
