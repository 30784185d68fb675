"""A model directory as a registry: versions are what lies there, there are no aliases, and looking is polling.

``generation`` scans the directory; everything else answers from the last scan. Nothing here can be published or
changed, and nothing keeps the bytes from changing: ``fetch`` tells the digest of what is there now.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from router.registry.base import (
    Changes,
    Fetched,
    NotInRegistry,
    StorageFailed,
    Version,
    check_version,
    parse_reference,
    shown,
)
from router.registry.blobs import hash_open
from router.registry.directory import Fingerprint, FoundModel, FoundVersion, ScanProblem, scan
from router.registry.manifest import CONFIG, LABELS, MODEL, OTHER, FileEntry, canonical_json


class PolledRegistry:
    """Implements ``router.registry.base.RegistryBackend`` on a folder in the layout of Triton and KServe.

    ``filename_of`` as for ``router.registry.directory.scan``. Raises StorageFailed when the root cannot be read.
    """

    def __init__(self, root: Path, *, filename_of: Callable[[Path], str] | None = None) -> None:
        self._root = root
        self._filename_of = filename_of
        self._lock = threading.Lock()
        self._models: dict[str, FoundModel] = {}
        self._problems: tuple[ScanProblem, ...] = ()
        self._generation = 0
        #: model, also one that went -> generation of its last change
        self._changed: dict[str, int] = {}
        #: What was hashed, as long as its fingerprint stays.
        self._hashed: dict[tuple[str, str], tuple[Fingerprint, tuple[FileEntry, ...]]] = {}
        self.generation()

    @property
    def problems(self) -> tuple[ScanProblem, ...]:
        """What the last scan left out, and why."""
        return self._problems

    def models(self) -> tuple[str, ...]:
        return tuple(self._models)

    def versions(self, model: str) -> tuple[Version, ...]:
        return tuple(Version(model, int(number)) for number in self._model(model).versions)

    def version(self, model: str, version: int) -> Version:
        self._version(model, version)
        return Version(model, version)

    def aliases(self, model: str) -> Mapping[str, int]:
        self._model(model)
        return {}

    def resolve(self, model: str, reference: str) -> Version:
        alias, version = parse_reference(reference)
        self._model(model)
        if alias:
            raise NotInRegistry(f"model {shown(model)} lies in a plain directory, which has no alias {shown(alias)}")
        return self.version(model, version)

    def fetch(self, model: str, version: int) -> Fetched:
        """The version's own folder. ``digest`` covers the bytes there now; a later change gives another one."""
        found = self._version(model, version)
        folder = _folder(found)
        files = self._files(model, found, folder)
        listed = [[entry.path, entry.sha256, entry.size] for entry in files]
        return Fetched(model, version, hashlib.sha256(canonical_json(listed)).hexdigest(), folder, files)

    def triggered(self, model: str) -> Mapping[str, int]:
        self._model(model)
        return {}

    def generation(self) -> int:
        """Scan, and count up when anything changed. Raises StorageFailed; the last scan then stands."""
        with self._lock:
            try:
                found = scan(self._root, filename_of=self._filename_of)
            except OSError as error:
                raise StorageFailed(f"the model directory cannot be read: {error.strerror or error}") from error
            names = self._models.keys() | found.models.keys()
            changed = [name for name in names if self._models.get(name) != found.models.get(name)]
            if changed:
                self._generation += 1
            self._changed |= dict.fromkeys(changed, self._generation)
            self._models, self._problems = found.models, tuple(found.problems)
            return self._generation

    def changes(self, since: int) -> Changes:
        with self._lock:
            names = (name for name, generation in self._changed.items() if generation > since)
            return Changes(self._generation, frozenset(names))

    def close(self) -> None:
        """Nothing is held."""

    def _model(self, model: str) -> FoundModel:
        found = self._models.get(model)
        if found is None:
            raise NotInRegistry(f"the model directory has no model {shown(model)}")
        return found

    def _version(self, model: str, version: int) -> FoundVersion:
        check_version(version)
        found = self._model(model).versions.get(str(version))
        if found is None:
            raise NotInRegistry(f"model {shown(model)} has no version {version}")
        return found

    def _files(self, model: str, found: FoundVersion, folder: Path) -> tuple[FileEntry, ...]:
        known = self._hashed.get((model, found.version))
        if known is not None and known[0] == found.fingerprint:
            return known[1]
        model_file = str(found.path.relative_to(folder))
        files = tuple(_entry(folder, model_file, *file) for file in found.fingerprint)
        self._hashed[model, found.version] = (found.fingerprint, files)
        return files


def _folder(found: FoundVersion) -> Path:
    """The version folder: names in the fingerprint are relative to it."""
    names = {name for name, *_ in found.fingerprint}
    return found.path.parent if found.path.name in names else found.path.parent.parent


def _entry(folder: Path, model_file: str, name: str, mtime_ns: int, size: int, inode: int) -> FileEntry:
    """Hash one file, which must be and stay the one that was scanned."""
    try:
        file = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            sha256, info = hash_open(file), os.fstat(file)
        finally:
            os.close(file)
    except OSError as error:
        raise StorageFailed(f"{shown(name)} cannot be read: {error.strerror}") from error
    if (info.st_mtime_ns, info.st_size, info.st_ino) != (mtime_ns, size, inode):
        raise StorageFailed(f"{shown(name)} changed since the directory was looked at")
    role = MODEL if name == model_file else {".pbtxt": CONFIG, ".txt": LABELS}.get(Path(name).suffix, OTHER)
    return FileEntry(os.fsencode(name).decode(errors="backslashreplace"), sha256, size, role)
