"""Versions laid out as folders, the way a loader wants them: ``<root>/<model>/<digest>/model.onnx``.

A folder is built apart and renamed, so that it is whole or not there. Looking at one again is cheap: what the system
says of each file (size, times, inode) is compared with what it said when the bytes were hashed. A folder that is not
what was published is replaced from the blobs.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from router.registry.base import StorageFailed
from router.registry.blobs import BlobStore, hash_open, staging_folder, storage, sync_folder
from router.registry.manifest import FileEntry

_STAMP: Final = ".tidegate.json"
_TEMPS: Final = ".tmp"
#: Somebody who replaces the same folder at the same moment makes us look again; this often at most.
_ATTEMPTS: Final = 10

#: path -> (size, mtime in ns, ctime in ns, inode)
_Stamp = dict[str, tuple[int, int, int, int]]


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
        healed: tuple[str, ...] = ()
        for _ in range(_ATTEMPTS):
            if os.path.lexists(folder):
                faults = _faults(folder, files)
                if not faults:
                    return folder, healed
                healed = tuple(faults)
            self._replace(folder, files)
        raise StorageFailed(f"the folder of {model} is being replaced again and again by somebody else")

    def write(self, files: Sequence[FileEntry], target: Path) -> None:
        """Make the new folder ``target`` with copies of the files. Raises Damaged or StorageFailed."""
        with staging_folder(target.parent) as staging:
            new = self._build(staging, files)
            with storage(f"folder {target.name} could not be made"):
                new.rename(target)
                sync_folder(target.parent)

    def folders(self) -> Iterator[CachedFolder]:
        """Every version folder on disk."""
        for path in self.root.glob("*/*"):
            if path.parent.name != _TEMPS:
                with suppress(OSError):
                    yield CachedFolder(path.parent.name, path.name, path, _last_use(path))

    def remove(self, folder: CachedFolder) -> None:
        """Delete a version's folder: at once gone under its name."""
        with staging_folder(self.root / _TEMPS) as staging, storage("a cached folder could not be deleted"):
            folder.path.rename(staging / "old")

    def sweep(self, older_than_s: float) -> int:
        """Remove what dead builders left behind; returns how many staging folders."""
        return sweep_staging_of(self.root, older_than_s)

    def _replace(self, folder: Path, files: Sequence[FileEntry]) -> None:
        """Build the folder anew and put it where another one may stand."""
        with staging_folder(self.root / _TEMPS) as staging:
            new = self._build(staging, files)
            with storage(f"the folder of {folder.parent.name} could not be made"):
                new_stamp = json.dumps(_stamp_of(new, files))
                (new / _STAMP).write_text(new_stamp)
                folder.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):
                    folder.rename(staging / "old")
                with _faster_neighbour():
                    new.rename(folder)
                sync_folder(folder.parent)

    def _build(self, staging: Path, files: Sequence[FileEntry]) -> Path:
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
