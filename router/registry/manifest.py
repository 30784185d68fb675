"""What a version is: its files by digest, and what must be known of it without asking anybody else.

The canonical form is JSON with sorted keys, no spaces and no escapes beyond JSON's own, in UTF-8; its SHA-256 is the
identity of the version. Reading is strict: an unknown key, a wrong type, NaN or a path that could leave its folder is a
``ManifestError`` that names the key, what was wanted and what was got.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar

FORMAT: Final = "tidegate.manifest/1"
MAX_MANIFEST_BYTES: Final = 16 * 1024 * 1024
MAX_FILES: Final = 4096
_MAX_PATH_BYTES: Final = 1024
_MAX_NAME_BYTES: Final = 255
_MAX_TEXT_BYTES: Final = 64 * 1024

MODEL, DATA, PROFILE, CONFIG, LABELS, OTHER = "model", "data", "profile", "config", "labels", "other"
#: What a file is for: the graph, its external weights, the drift profile, config.pbtxt, label texts, anything else.
ROLES: Final = (MODEL, DATA, PROFILE, CONFIG, LABELS, OTHER)

_INTEGERS: Final = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
DATATYPES: Final = frozenset({"BOOL", *_INTEGERS, "FP16", "BF16", "FP32", "FP64", "BYTES"})

_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")

Scalar: TypeAlias = str | int | float | bool | None
T = TypeVar("T")


class ManifestError(ValueError):
    """A manifest or a part of one is wrong."""


@dataclass(slots=True, frozen=True)
class FileEntry:
    """One file of a version: its relative POSIX path, content digest, size in bytes, and what it is for."""

    path: str
    sha256: str
    size: int
    role: str = OTHER


@dataclass(slots=True, frozen=True)
class TensorEntry:
    """An input or output as published: V2 datatype, shape with -1 for a free axis."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(slots=True, frozen=True)
class Signature:
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


@dataclass(slots=True, frozen=True)
class Metric:
    """One number measured on one data set of ``n`` rows (None: not known)."""

    dataset: str
    name: str
    value: float
    n: int | None = None


@dataclass(slots=True, frozen=True)
class DataSource:
    """What the version was trained on. ``time_range``: first and last time in it, RFC 3339."""

    uri: str = ""
    sha256: str = ""
    rows: int | None = None
    time_range: tuple[str, str] | None = None


@dataclass(slots=True, frozen=True)
class CodeSource:
    """What code made it. ``dirty``: with uncommitted changes (None: not known)."""

    repo: str = ""
    commit: str = ""
    dirty: bool | None = None


@dataclass(slots=True, frozen=True)
class Lineage:
    """Where a version comes from. ``environment``: SHA-256 of the lock file. ``trigger_id``: what asked for the run."""

    data: DataSource = DataSource()
    code: CodeSource = CodeSource()
    environment: str = ""
    parent_run: str = ""
    parent_version: int | None = None
    trigger_id: str = ""


@dataclass(slots=True, frozen=True)
class Description:
    """Everything a publisher says of a version beside its files.

    ``profile``: the drift reference profile as a JSON object, None when it is a file of role ``profile`` or absent.
    ``gate_policy``: SHA-256 of the policy that the version was checked by, "" for none. ``card``: text for people.
    """

    signature: Signature | None = None
    metrics: tuple[Metric, ...] = ()
    params: Mapping[str, Scalar] = field(default_factory=dict)
    lineage: Lineage = Lineage()
    profile: Mapping[str, object] | None = None
    gate_policy: str = ""
    card: str = ""
    licence: str = ""
    publisher: str = ""


@dataclass(slots=True, frozen=True)
class Manifest:
    """Files and description of one version. Build with ``make`` or ``parse``: they check."""

    files: tuple[FileEntry, ...]
    description: Description = Description()

    def canonical(self) -> bytes:
        """The one form that is hashed and stored."""
        files = [_plain(entry) for entry in self.files]
        return canonical_json({"format": FORMAT, "files": files, **describe(self.description)})

    def digest(self) -> str:
        """SHA-256 (hex) of the canonical form: the version's identity."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def file(self, role: str) -> FileEntry | None:
        """The first file of a role."""
        return next((entry for entry in self.files if entry.role == role), None)


def make(files: Iterable[FileEntry], description: Description | None = None) -> Manifest:
    """A checked manifest, its files in the order of their paths. Raises ManifestError."""
    ordered = tuple(sorted(files, key=lambda entry: entry.path))
    return parse(Manifest(ordered, description or Description()).canonical())


def parse(text: bytes | str) -> Manifest:
    """Read a manifest. Raises ManifestError for anything but a complete and valid one."""
    top = _Keys(_json_object(text), "")
    if top.take("format", None) != FORMAT:
        raise ManifestError(f"format: wanted {FORMAT!r}, got {_shown(top.got('format'))}")
    files = top.array("files", _file)
    _check_files(files)
    description = _description(top)
    if description.profile is not None and any(entry.role == PROFILE for entry in files):
        raise ManifestError("profile: given both inline and as a file of role 'profile'")
    return Manifest(files, description)


def parse_description(text: bytes | str) -> Description:
    """Read what a publisher says of a version: the manifest's keys without ``format`` and ``files``."""
    return _description(_Keys(_json_object(text), ""))


def describe(description: Description) -> dict[str, object]:
    """The plain JSON form of a description. What is empty is left out, so that new keys leave old digests alone."""
    plain: dict[str, object] = _plain(description)
    return plain


def canonical_json(value: object) -> bytes:
    """Sorted keys, no spaces, UTF-8. Raises ManifestError for NaN, infinity and what JSON cannot say."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(f"wanted finite JSON values with text in UTF-8, got: {error}") from error


def check_path(path: str) -> None:
    """ManifestError unless ``path`` is relative, in POSIX form, visible, and stays inside its folder."""
    parts = path.split("/")
    if path.startswith("/"):
        reason = "is absolute"
    elif _CONTROL.search(path):
        reason = "holds a control character, a backslash or bytes that are no UTF-8"
    elif len(path.encode()) > _MAX_PATH_BYTES or any(len(part.encode()) > _MAX_NAME_BYTES for part in parts):
        reason = f"is longer than {_MAX_PATH_BYTES} bytes, or a name in it than {_MAX_NAME_BYTES}"
    elif any(part.startswith(".") or not part for part in parts):
        reason = "has an empty, hidden, '.' or '..' part"
    else:
        return
    raise ManifestError(f"file path {_shown(path)} {reason}; wanted a relative path of visible names joined by '/'")


# -- reading ----------------------------------------------------------------------------------------------------------


class _Keys:
    """The keys of one JSON object, each taken once; what is left over is unknown."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, dict):
            raise ManifestError(f"{where or 'manifest'}: wanted an object, got {_shown(values)}")
        self._left = dict(values)
        self._all = values
        self._where = where

    def name(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def got(self, key: str) -> object:
        return self._all.get(key)

    def take(self, key: str, default: object) -> Any:
        return self._left.pop(key, default)

    def text(self, key: str, limit: int = _MAX_TEXT_BYTES) -> str:
        value = self.take(key, "")
        if not isinstance(value, str) or len(value.encode("utf-8", "surrogatepass")) > limit:
            raise ManifestError(f"{self.name(key)}: wanted a text of at most {limit} bytes, got {_shown(value)}")
        return value

    def nonempty(self, key: str) -> str:
        value = self.text(key)
        if not value:
            raise ManifestError(f"{self.name(key)}: wanted a text, got nothing")
        return value

    def sha256(self, key: str, *, required: bool = False) -> str:
        value = self.text(key)
        if (value or required) and _SHA256.fullmatch(value) is None:
            raise ManifestError(f"{self.name(key)}: wanted 64 lower-case hexadecimal digits, got {_shown(value)}")
        return value

    def count(self, key: str) -> int | None:
        value = self.take(key, None)
        if value is not None and (type(value) is not int or not 0 <= value < 2**63):
            raise ManifestError(f"{self.name(key)}: wanted a non-negative integer, got {_shown(value)}")
        return value

    def flag(self, key: str) -> bool | None:
        value = self.take(key, None)
        if value is not None and type(value) is not bool:
            raise ManifestError(f"{self.name(key)}: wanted true or false, got {_shown(value)}")
        return value

    def number(self, key: str) -> float:
        value = self.take(key, None)
        if type(value) not in {int, float} or not abs(value) < 2**1023:
            raise ManifestError(f"{self.name(key)}: wanted a finite number, got {_shown(value)}")
        return float(value)

    def array(self, key: str, read: Callable[[_Keys], T]) -> tuple[T, ...]:
        values = self.take(key, [])
        if not isinstance(values, list):
            raise ManifestError(f"{self.name(key)}: wanted a list, got {_shown(values)}")
        return tuple(_complete(_Keys(value, f"{self.name(key)}[{index}]"), read) for index, value in enumerate(values))

    def inner(self, key: str, read: Callable[[_Keys], T]) -> T:
        return _complete(_Keys(self.take(key, {}), self.name(key)), read)

    def object(self, key: str) -> dict[str, Any] | None:
        value = self.take(key, None)
        if value is not None and not isinstance(value, dict):
            raise ManifestError(f"{self.name(key)}: wanted an object, got {_shown(value)}")
        return value

    def finish(self) -> None:
        for key in self._left:
            raise ManifestError(
                f"{self.name(key)}: unknown key; known are {', '.join(sorted(self._all.keys() - self._left.keys()))}"
            )


def _complete(keys: _Keys, read: Callable[[_Keys], T]) -> T:
    value = read(keys)
    keys.finish()
    return value


def _json_object(text: bytes | str) -> object:
    if len(text) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"manifest: wanted at most {MAX_MANIFEST_BYTES} bytes, got {len(text)}")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except ManifestError:
        raise
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"manifest: wanted JSON, got: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ManifestError(f"{_shown(twice)}: the key is there twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ManifestError(f"manifest: wanted finite numbers, got {_shown(text)}")
    return value


def _description(top: _Keys) -> Description:
    description = Description(
        signature=_signature(top),
        metrics=top.array("metrics", _metric),
        params=_params(top),
        lineage=top.inner("lineage", _lineage),
        profile=top.object("profile") or None,
        gate_policy=top.sha256("gate_policy"),
        card=top.text("card"),
        licence=top.text("licence"),
        publisher=top.text("publisher"),
    )
    top.finish()
    return description


def _file(keys: _Keys) -> FileEntry:
    path, sha256 = keys.nonempty("path"), keys.sha256("sha256", required=True)
    size, role = keys.count("size"), keys.text("role")
    if size is None:
        raise ManifestError(f"{keys.name('size')}: wanted a non-negative integer, got nothing")
    if role not in ROLES:
        raise ManifestError(f"{keys.name('role')}: wanted one of {', '.join(ROLES)}, got {_shown(role)}")
    return FileEntry(path, sha256, size, role)


def _check_files(files: tuple[FileEntry, ...]) -> None:
    if not 1 <= len(files) <= MAX_FILES:
        raise ManifestError(f"files: wanted 1 to {MAX_FILES} files, got {len(files)}")
    paths = [entry.path for entry in files]
    for path in paths:
        check_path(path)
    known = set(paths)
    if paths != sorted(known):
        raise ManifestError("files: wanted each path once, in order")
    for path in paths:
        above = next((folder for folder in _folders_above(path) if folder in known), None)
        if above is not None:
            raise ManifestError(f"files: {_shown(above)} is both a file and a folder")
    models = [entry.path for entry in files if entry.role == MODEL]
    if len(models) != 1:
        raise ManifestError(f"files: wanted exactly one file of role 'model', got {len(models)}")


def _folders_above(path: str) -> Iterable[str]:
    parts = path.split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts)))


def _signature(top: _Keys) -> Signature | None:
    if top.got("signature") is None:
        top.take("signature", None)
        return None
    found = top.inner("signature", lambda keys: Signature(_tensors(keys, "inputs"), _tensors(keys, "outputs")))
    return found if found.inputs or found.outputs else None


def _tensors(keys: _Keys, key: str) -> tuple[TensorEntry, ...]:
    tensors = keys.array(key, _tensor)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ManifestError(f"{keys.name(key)}: wanted each name once")
    return tensors


def _tensor(keys: _Keys) -> TensorEntry:
    name, datatype, shape = keys.nonempty("name"), keys.text("datatype"), keys.take("shape", [])
    if datatype not in DATATYPES:
        wanted = ", ".join(sorted(DATATYPES))
        raise ManifestError(f"{keys.name('datatype')}: wanted one of {wanted}, got {_shown(datatype)}")
    if not isinstance(shape, list) or not all(type(dim) is int and -1 <= dim < 2**63 for dim in shape):
        raise ManifestError(f"{keys.name('shape')}: wanted a list of integers from -1 up, got {_shown(shape)}")
    return TensorEntry(name, datatype, tuple(shape))


def _metric(keys: _Keys) -> Metric:
    return Metric(keys.nonempty("dataset"), keys.nonempty("name"), keys.number("value"), keys.count("n"))


def _params(top: _Keys) -> dict[str, Scalar]:
    params = top.object("params") or {}
    for key, value in params.items():
        if not isinstance(value, str | int | float | bool | None):
            raise ManifestError(f"params.{key}: wanted a text, number, true, false or null, got {_shown(value)}")
    return params


def _lineage(keys: _Keys) -> Lineage:
    return Lineage(
        data=keys.inner("data", _data_source),
        code=keys.inner("code", lambda code: CodeSource(code.text("repo"), code.text("commit"), code.flag("dirty"))),
        environment=keys.sha256("environment"),
        parent_run=keys.text("parent_run"),
        parent_version=keys.count("parent_version"),
        trigger_id=keys.text("trigger_id"),
    )


def _data_source(keys: _Keys) -> DataSource:
    uri, sha256, rows, times = (
        keys.text("uri"),
        keys.sha256("sha256"),
        keys.count("rows"),
        keys.take("time_range", None),
    )
    if times is not None and not (
        isinstance(times, list) and len(times) == 2 and all(isinstance(time, str) for time in times)
    ):
        raise ManifestError(f"{keys.name('time_range')}: wanted two times as texts, got {_shown(times)}")
    return DataSource(uri, sha256, rows, None if times is None else (times[0], times[1]))


# -- writing ----------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Dataclasses as JSON objects without their empty members, tuples as lists; JSON values are left as they are."""
    if hasattr(value, "__dataclass_fields__"):
        members = {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
        return {name: member for name, member in members.items() if not _empty(member)}
    if isinstance(value, Mapping):
        return dict(value)
    return [_plain(member) for member in value] if isinstance(value, tuple) else value


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | Mapping) and not value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
