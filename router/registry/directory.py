"""Model directories on disk: which models and versions a folder holds. stdlib only; opens no model.

Layouts read, all under one root:

- ``name/version/model.onnx`` with ``config.pbtxt`` and label files beside the versions (Triton, KServe);
- ``name/model.onnx``: one version, "1";
- ``version/model.onnx`` or ``model.onnx`` right in the root: the root itself is one model, named after the folder;
- ``digits.onnx`` in the root, or a root that is a file: a model named after the file (after its folder if it is
  called ``model.onnx``), version "1".

A model "file" may be a folder of that name that holds the file (weights stored beside the graph). Hidden names are
ignored. A link is followed only to targets inside the root. One bad entry is a ``ScanProblem`` and spoils nothing else.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

DEFAULT_FILENAME: Final = "model.onnx"
CONFIG_FILENAME: Final = "config.pbtxt"
MODEL_NAME_PATTERN: Final = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}"

_NAME: Final = re.compile(MODEL_NAME_PATTERN, re.ASCII)
_VERSION: Final = re.compile(r"[1-9][0-9]{0,18}", re.ASCII)
_MAX_VERSION: Final = 2**63 - 1

#: (file name, mtime in ns, size, inode) of every file that makes up a model or version.
Fingerprint = tuple[tuple[str, int, int, int], ...]


@dataclass(slots=True, frozen=True)
class FoundVersion:
    """One version: its model file, and a fingerprint that changes when any file of the version does."""

    version: str
    path: Path
    fingerprint: Fingerprint


@dataclass(slots=True, frozen=True)
class FoundModel:
    """One model. ``folder`` holds labels and warm-up data (None for a bare file); ``config`` its config.pbtxt.

    ``fingerprint`` covers the files right in the folder, so an edited config.pbtxt or label file shows.
    """

    name: str
    folder: Path | None
    config: Path | None
    versions: dict[str, FoundVersion]
    fingerprint: Fingerprint = ()


@dataclass(slots=True, frozen=True)
class ScanProblem:
    """Something that was left out, and why. ``version`` is "" when the whole model is meant."""

    model: str
    version: str
    message: str


@dataclass(slots=True, frozen=True)
class Scan:
    """What one look at a root found. ``models`` is sorted by name, versions by number."""

    models: dict[str, FoundModel] = field(default_factory=dict)
    problems: list[ScanProblem] = field(default_factory=list)


class _Refused(Exception):
    """An entry that cannot be used; the text says why."""


def is_model_name(name: str) -> bool:
    """Letters, digits, ``.``, ``_`` and ``-``, at most 255, not starting with a dot."""
    return _NAME.fullmatch(name) is not None


def is_version(text: str) -> bool:
    """A positive integer without leading zeros that fits in 64 bits."""
    return _VERSION.fullmatch(text) is not None and int(text) <= _MAX_VERSION


def scan(root: Path, *, filename_of: Callable[[Path], str] | None = None) -> Scan:
    """Look at ``root``, a folder or one model file.

    ``filename_of`` is given the path of a model's config.pbtxt and returns the file name looked for in its version
    folders; a ValueError from it is a problem of that model. Raises OSError when the root itself cannot be read.
    """
    return _Scanner(root, filename_of or (lambda _: DEFAULT_FILENAME)).run()


class _Scanner:
    """One scan. Entries are taken in the order of their names, so that two scans of one state are equal."""

    def __init__(self, root: Path, filename_of: Callable[[Path], str]) -> None:
        # Absolute, so that "." has a name; not resolved, so that a link's own name counts and can be switched over.
        self.root = Path(os.path.abspath(root))
        self.real_root = Path(os.path.realpath(root, strict=True))
        self.filename_of = filename_of
        self.found = Scan()

    def run(self) -> Scan:
        if stat.S_ISDIR(self.real_root.stat().st_mode):
            self._scan_root()
        else:
            self._scan_single_file()
        ordered = dict(sorted(self.found.models.items()))
        return Scan(ordered, self.found.problems)

    # -- the root -------------------------------------------------------------------------------------------------

    def _scan_single_file(self) -> None:
        """The root is one model file: named after itself, or after the folders it stands in."""
        if not self.real_root.is_file():
            raise OSError(f"{self.root.name} is neither a folder nor a regular file")
        parent, stem, version = self.root.parent, self.root.stem, "1"
        if self.root.name == DEFAULT_FILENAME:
            if is_version(parent.name):
                version, parent = parent.name, parent.parent
            stem = parent.name
        name = stem if is_model_name(stem) else "model"
        found = FoundVersion(version, self.root, (_fingerprint(self.root),))
        self.found.models[name] = FoundModel(name, None, None, {version: found})

    def _scan_root(self) -> None:
        names = _visible(self.root)
        if self._root_is_a_model(names):
            own = self.root.name if is_model_name(self.root.name) else "model"
            with self._guard(own):
                self._scan_model(own, self.root)
            names = [name for name in names if self._is_another_model(name, own)]
        for name in names:
            with self._guard(name):
                self._scan_entry(name)

    def _root_is_a_model(self, names: list[str]) -> bool:
        """Does the root hold a model file or config.pbtxt itself, or version folders with a model file right in it?"""
        if DEFAULT_FILENAME in names or CONFIG_FILENAME in names:
            return True
        versions = [self.root / name for name in names if is_version(name)]
        return any(path.suffix == ".onnx" for folder in versions if folder.is_dir() for path in folder.iterdir())

    def _is_another_model(self, name: str, own: str) -> bool:
        """Beside a root that is itself a model, its own files, labels and warm-up folders are no models."""
        path = self.root / name
        if is_version(name) or name == DEFAULT_FILENAME:
            return False
        if path.is_dir():
            return any(is_version(below) or below == DEFAULT_FILENAME for below in _visible(path))
        known = self.found.models.get(own)
        return path.suffix == ".onnx" and not (known and any(v.path == path for v in known.versions.values()))

    def _scan_entry(self, name: str) -> None:
        path = self.root / name
        if self._inside(path).is_dir():
            self._scan_model(name, path)
        elif path.suffix == ".onnx":
            self._scan_flat_file(path)

    def _scan_flat_file(self, path: Path) -> None:
        name = path.stem
        _require_name(name)
        if not path.is_file():
            raise _Refused(f"{path.name} is not a regular file")
        if name in self.found.models:
            raise _Refused(f"a folder named '{name}' holds this model too: '{path.name}' is left out")
        found = FoundVersion("1", path, (_fingerprint(path),))
        self.found.models[name] = FoundModel(name, None, None, {"1": found})

    # -- one model ------------------------------------------------------------------------------------------------

    def _scan_model(self, name: str, folder: Path) -> None:
        _require_name(name)
        if name in self.found.models:
            raise _Refused(f"two models are named '{name}': the folder is left out")
        config = self._config(folder)
        filename = self._filename(config)
        versions = self._versions(name, folder, filename)
        if not versions and os.path.lexists(folder / filename):
            versions = {"1": self._bare_version(folder, filename)}
        if not versions and not any(problem.model == name and problem.version for problem in self.found.problems):
            raise _Refused(f"no version folder with {filename} in it, and no {filename} beside where they would be")
        fingerprint = self._fingerprints(folder)
        self.found.models[name] = FoundModel(name, folder, config, versions, fingerprint)

    def _config(self, folder: Path) -> Path | None:
        path = folder / CONFIG_FILENAME
        if not os.path.lexists(path):
            return None
        if not self._inside(path).is_file():
            raise _Refused(f"{CONFIG_FILENAME} is not a file")
        return path

    def _filename(self, config: Path | None) -> str:
        if config is None:
            return DEFAULT_FILENAME
        try:
            filename = self.filename_of(config)
        except ValueError as error:
            raise _Refused(str(error)) from error
        if filename in {"", ".", ".."} or "/" in filename or "\\" in filename or "\0" in filename:
            raise _Refused(f"model file name {filename!r} must be the name of a file in the version folder")
        return filename

    def _versions(self, model: str, folder: Path, filename: str) -> dict[str, FoundVersion]:
        """The version folders of one model by number, ascending; other folders (labels, warm-up) are passed over."""
        found: dict[str, FoundVersion] = {}
        for name in sorted(filter(_numeric, _visible(folder)), key=lambda name: (len(name), name)):
            with self._guard(model, name if is_version(name) else ""):
                found[name] = self._version(folder / name, filename)
        return found

    def _version(self, folder: Path, filename: str) -> FoundVersion:
        if not is_version(folder.name):
            wanted = "a version is a positive integer without leading zeros, at most 2^63 - 1"
            raise _Refused(f"folder '{folder.name}' is passed over: {wanted}")
        if not self._inside(folder).is_dir():
            raise _Refused("a version is a folder, this is a file")
        return FoundVersion(folder.name, self._model_file(folder, filename), self._fingerprints(folder))

    def _bare_version(self, folder: Path, filename: str) -> FoundVersion:
        path = self._model_file(folder, filename)
        return FoundVersion("1", path, (_fingerprint(path),))

    def _model_file(self, folder: Path, filename: str) -> Path:
        """``folder/filename``, or the file of that name inside a folder of that name."""
        path = folder / filename
        if not os.path.lexists(path):
            others = [name for name in _visible(folder) if name.endswith(".onnx")]
            hint = f" (found {', '.join(others[:3])}: rename it or set default_model_filename)" if others else ""
            raise _Refused(f"no {filename} in the version folder{hint}")
        real = self._inside(path)
        if real.is_dir():
            path = path / filename
            real = self._inside(path)
        if not real.is_file():
            raise _Refused(f"{filename} is not a regular file")
        return path

    # -- safety ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _guard(self, model: str, version: str = "") -> Iterator[None]:
        """What the block refuses or cannot read becomes a problem."""
        try:
            yield
        except _Refused as refusal:
            reason = str(refusal)
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
        else:
            return
        self.found.problems.append(ScanProblem(_printable(model), version, reason))

    def _inside(self, path: Path) -> Path:
        """The real path behind ``path``, which must lie in the root."""
        real = Path(os.path.realpath(path, strict=True))
        if not real.is_relative_to(self.real_root):
            raise _Refused(f"'{path.name}' is a link that leads outside the model directory")
        return real

    def _fingerprints(self, folder: Path) -> Fingerprint:
        """Of every regular file in the folder; a folder in place of the model file is looked into as well."""
        found = []
        for name in _visible(folder):
            path = folder / name
            if path.suffix == ".onnx" and path.is_dir():
                found += [(f"{name}/{entry[0]}", *entry[1:]) for entry in self._fingerprints(path)]
            elif path.is_file():
                found.append(_fingerprint(path))
        return tuple(found)


def _visible(folder: Path) -> list[str]:
    """The names in a folder that are not hidden, sorted."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _printable(name: str) -> str:
    """A file name as text that any log takes: bytes that are no UTF-8 are shown by their value."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _numeric(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _require_name(name: str) -> None:
    if not is_model_name(name):
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise _Refused(
            f"model name {shown!r} must be letters, digits, '.', '_' or '-', at most 255, with no leading dot"
        )


def _fingerprint(path: Path) -> tuple[str, int, int, int]:
    info = path.stat()
    return path.name, info.st_mtime_ns, info.st_size, info.st_ino


def select_versions(policy: tuple[str, ...], available: Iterable[str]) -> list[str]:
    """The versions a policy serves out of those available, ascending by number.

    Policies: ("latest", n) the n highest; ("all",); ("specific", v, ...) those named that exist. Raises ValueError
    for anything else.
    """
    ordered = sorted(set(available), key=int)
    match policy:
        case ("all",):
            return ordered
        case ("latest", count) if is_version(count):
            return ordered[-int(count) :]
        case ("specific", *wanted) if wanted and all(map(is_version, wanted)):
            return [version for version in ordered if version in wanted]
    raise ValueError(f"unknown version policy {policy!r}: wanted ('latest', n), ('all',) or ('specific', version, ...)")
