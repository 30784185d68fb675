"""The files of a version, looked at before a runtime is let near them: pure reading, nothing is built or run.

Every external data file is opened from its folder's descriptor, one path component at a time and never through a
symbolic link, and is measured and hashed on what was opened. Runtimes open files by path, later: ``recheck`` after
the load tells whether the paths still lead to the very same, unchanged files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Final

from server.errors import ModelLoadError
from server.runtime.base import InspectionLimits, ListedFile
from server.runtime.modelfile import ExternalTensor, ModelFacts, quoted, read_facts
from server.runtime.wireformat import Malformed, TooLarge, WireFile
from server.state import DATABASE

#: Operators of these domains come with ONNX Runtime; every other domain needs a library of custom operators.
KNOWN_DOMAINS: Final = frozenset(
    {
        "",
        "ai.onnx.ml",
        "ai.onnx.training",
        "ai.onnx.preview",
        "ai.onnx.preview.training",
        "com.microsoft",
        "com.microsoft.experimental",
        "com.microsoft.nchwc",
        "com.ms.internal.nhwc",
    }
)

_LIBRARY_NAME: Final = re.compile(r"\.(?:so(?:\.\d+)*|dll|dylib|pyd)$", re.IGNORECASE)
#: ELF, and Mach-O in both byte orders, 32 and 64 bits, and for several machines.
_LIBRARY_MAGIC: Final = tuple(
    bytes.fromhex(magic) for magic in ("7f454c46", "feedface", "feedfacf", "cefaedfe", "cffaedfe", "cafebabe")
)
_PE_OFFSET_AT: Final = 0x3C
_NO_FOLLOW: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: File systems stamp changes with a coarse clock: a file as young as this may change again without its stamp moving.
_CLOCK_GRAIN_NS: Final = 100_000_000


@dataclass(slots=True, frozen=True)
class Supported:
    """What the runtime takes, for a refusal that names both numbers. None or no entry: leave it to the runtime."""

    runtime: str = "the runtime"
    ir_version: int | None = None
    opsets: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Stamp:
    """What changes when a file is replaced or written to."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(slots=True, frozen=True)
class _Opened:
    """An open file and what was known of it before its first byte was read."""

    file: FileIO
    stamp: Stamp


@dataclass(slots=True, frozen=True)
class InspectedFile:
    """One file as it was read. ``name`` is relative to the model file's folder; ``sha256`` is hex."""

    name: str
    path: Path
    size: int
    sha256: str
    stamp: Stamp


@dataclass(slots=True, frozen=True)
class Inspection:
    """A version's files as they were when looked at: the model file first, then external data in name order.

    ``digest`` (SHA-256, hex) covers them all; without external data it is that of the model file. ``began_ns`` is the
    wall-clock time at which the first file was opened.
    """

    digest: str
    facts: ModelFacts
    files: tuple[InspectedFile, ...]
    began_ns: int

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)


def inspect_files(
    path: Path,
    folder: Path | None,
    *,
    limits: InspectionLimits | None = None,
    listed: Mapping[str, ListedFile] | None = None,
    supported: Supported | None = None,
) -> Inspection:
    """Look at the ONNX file ``path`` and everything it refers to.

    ``folder``: where the model's files must stay, and whose part beside the file is searched for shared libraries; None
    for a bare file, which may lie anywhere. ``listed``: the manifest's files by path relative to ``folder``; then each
    file must be listed, with its size and digest. Raises ModelLoadError with one sentence; OSError when reading fails.
    """
    limits = limits or InspectionLimits()
    began_ns = time.time_ns()
    beside = path.parent.resolve()
    with _opened_model(path, folder) as model:
        _check_model_size(path.name, model.stamp.size, limits)
        facts = _facts(path.name, model, limits)
        _check_versions(path.name, facts, supported or Supported())
        _check_domains(path.name, facts, limits)
        with _opened_externals(beside, facts.external, limits.max_external_files) as externals:
            opened = {path.name: model, **externals}
            _check_sizes(opened, facts.external, limits)
            files = tuple(_hashed(name, beside / name, entry) for name, entry in opened.items())
            for name, entry in externals.items():
                _refuse_library(name, entry.file, limits)
    if listed is not None:
        prefix = "" if folder is None else beside.relative_to(folder.resolve()).as_posix()
        _check_listed(files, "" if prefix == "." else prefix, listed)
    if folder is not None:
        _check_folder(beside, limits)
    return Inspection(_digest(files), facts, files, began_ns)


def recheck(inspection: Inspection) -> None:
    """Raise ModelLoadError when a file is no longer the one that was inspected. Call it after the runtime's load."""
    for file in inspection.files:
        try:
            status = file.path.stat()
        except OSError:
            raise ModelLoadError(f"{quoted(file.name)} went away while it was loaded.") from None
        young = file.stamp.ctime_ns > inspection.began_ns - _CLOCK_GRAIN_NS
        if _stamp(status) != file.stamp or (young and _sha256(file.path) != file.sha256):
            raise ModelLoadError(f"{quoted(file.name)} was changed while it was loaded.")


def sha256_of_library(path: Path) -> str:
    """SHA-256 (hex) of a custom-operator library. Raises ModelLoadError unless it is a regular file."""
    if not path.is_file():
        raise ModelLoadError(f"There is no custom-operator library {quoted(path.name)}.")
    return _sha256(path)


# --- opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def _opened_model(path: Path, folder: Path | None) -> Iterator[_Opened]:
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a loop of links is a RuntimeError before Python 3.13
        raise ModelLoadError(f"{path.name} does not exist.") from None
    if folder is not None and not real.is_relative_to(folder.resolve()):
        raise ModelLoadError(f"{path.name} is or lies behind a symbolic link that leads out of the model's folder.")
    opened, _ = _regular(path.name, os.open(real, _NO_FOLLOW))
    with opened.file:
        yield opened


@contextmanager
def _opened_externals(
    folder: Path, tensors: tuple[ExternalTensor, ...], max_files: int
) -> Iterator[dict[str, _Opened]]:
    """The external data files by name (their path from ``folder``), in name order, closed again at the end."""
    first = {_external_name(tensor): tensor for tensor in reversed(tensors)}
    if len(first) > max_files:
        raise ModelLoadError(f"The model has {len(first)} external data files, at most {max_files} are taken.")
    opened: dict[str, _Opened] = {}
    home = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in sorted(first):
            opened[name] = _open_external(home, name, first[name])
        yield opened
    finally:
        os.close(home)
        for entry in opened.values():
            entry.file.close()


def _external_name(tensor: ExternalTensor) -> str:
    """The tensor's location as a path from the model's folder, normalised. Raises ModelLoadError unless it is one."""
    location = tensor.location
    parts = location.split("/")
    if not location:
        reason = "is empty"
    elif not location.isprintable():
        reason = "has characters that are not printable"
    elif location.startswith("/") or location[1:2] == ":":
        reason = "is absolute"
    elif "\\" in location:
        reason = "has a backslash"
    elif ".." in parts:
        reason = "has '..' in it"
    elif not all(parts) or not any(part != "." for part in parts):
        reason = "has an empty part"
    else:
        return "/".join(part for part in parts if part != ".")
    raise ModelLoadError(
        f"Tensor {quoted(tensor.name)} has its external data at {quoted(location)}, which {reason}: "
        "wanted a path relative to the model file's folder and inside it."
    )


def _open_external(home: int, name: str, tensor: ExternalTensor) -> _Opened:
    what = f"External data {quoted(name)} of tensor {quoted(tensor.name)}"
    try:
        descriptor = _open_component_by_component(home, name.split("/"))
    except OSError as error:
        raise ModelLoadError(f"{what} {_why_not_opened(error)}.") from None
    opened, links = _regular(what, descriptor)
    if links != 1:
        opened.file.close()
        raise ModelLoadError(f"{what} has {links} hard links, wanted exactly one.")
    return opened


def _open_component_by_component(home: int, parts: list[str]) -> int:
    folder = os.dup(home)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(parts[-1], _NO_FOLLOW, dir_fd=folder)
    finally:
        os.close(folder)


def _why_not_opened(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "does not exist"
    if error.errno == errno.ELOOP:
        return "is a symbolic link, wanted a regular file"
    if error.errno == errno.ENOTDIR:
        return "lies behind a symbolic link or something else that is no folder"
    return f"cannot be read: {error.strerror}"


def _regular(what: str, descriptor: int) -> tuple[_Opened, int]:
    """The file, owned from here on, and how many hard links it has."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ModelLoadError(f"{what} is not a regular file.")
    return _Opened(FileIO(descriptor, "rb"), _stamp(status)), status.st_nlink


# --- the model file --------------------------------------------------------------------------------------------------


def _check_model_size(name: str, size: int, limits: InspectionLimits) -> None:
    if size == 0:
        raise ModelLoadError(f"{name} is empty.")
    if size > limits.max_model_bytes:
        raise ModelLoadError(f"{name} has {size} bytes; an ONNX file has at most {limits.max_model_bytes}.")


def _facts(name: str, model: _Opened, limits: InspectionLimits) -> ModelFacts:
    wire = WireFile(model.file.fileno(), model.stamp.size, limits.max_fields)
    try:
        return read_facts(wire, limits.max_graph_depth)
    except Malformed as error:
        raise ModelLoadError(f"{name} cannot be loaded: its bytes are no ONNX model, {error}.") from None
    except TooLarge as error:
        raise ModelLoadError(f"{name} {error}.") from None


def _check_versions(name: str, facts: ModelFacts, supported: Supported) -> None:
    if supported.ir_version is not None and facts.ir_version > supported.ir_version:
        raise ModelLoadError(
            f"{name} has IR version {facts.ir_version}, {supported.runtime} takes at most {supported.ir_version}."
        )
    for domain, version in facts.opsets.items():
        newest = supported.opsets.get(domain)
        if newest is not None and version > newest:
            raise ModelLoadError(
                f"{name} needs opset {version} of {domain or 'ai.onnx'}, {supported.runtime} takes at most {newest}."
            )


def _check_domains(name: str, facts: ModelFacts, limits: InspectionLimits) -> None:
    if limits.allowed_custom_ops:
        return
    for domain, operator in facts.foreign.items():
        if domain not in KNOWN_DOMAINS:
            raise ModelLoadError(
                f"{name} uses operator {quoted(operator)} of domain {quoted(domain)}, which is not built in: "
                "no library of custom operators is allowed for this model."
            )


# --- sizes, contents, manifest ---------------------------------------------------------------------------------------


def _check_sizes(opened: Mapping[str, _Opened], tensors: tuple[ExternalTensor, ...], limits: InspectionLimits) -> None:
    total = sum(entry.stamp.size for entry in opened.values())
    if total > limits.max_total_bytes:
        raise ModelLoadError(
            f"The model and its external data have {total} bytes, at most {limits.max_total_bytes} are taken."
        )
    for tensor in tensors:
        name = _external_name(tensor)
        size, end = opened[name].stamp.size, tensor.offset + (tensor.length or 0)
        if end > size:
            raise ModelLoadError(
                f"Tensor {quoted(tensor.name)} wants bytes {tensor.offset} to {end} of external data {quoted(name)}, "
                f"which has {size}."
            )


def _hashed(name: str, path: Path, opened: _Opened) -> InspectedFile:
    opened.file.seek(0)
    digest = hashlib.file_digest(opened.file, "sha256").hexdigest()
    return InspectedFile(name, path, opened.stamp.size, digest, opened.stamp)


def _digest(files: tuple[InspectedFile, ...]) -> str:
    """The model file's digest; with external data, one over its and theirs with their names."""
    model, *externals = files
    if not externals:
        return model.sha256
    total = hashlib.sha256(bytes.fromhex(model.sha256))
    for file in externals:
        total.update(file.name.encode() + b"\0" + bytes.fromhex(file.sha256))
    return total.hexdigest()


def _check_listed(files: tuple[InspectedFile, ...], prefix: str, listed: Mapping[str, ListedFile]) -> None:
    for file in files:
        entry = listed.get(f"{prefix}/{file.name}" if prefix else file.name)
        if entry is None:
            raise ModelLoadError(f"{quoted(file.name)} is not listed in the version's manifest.")
        if entry.size != file.size:
            raise ModelLoadError(
                f"{quoted(file.name)} has {file.size} bytes, the version's manifest lists {entry.size}."
            )
        if entry.sha256 != file.sha256:
            raise ModelLoadError(
                f"{quoted(file.name)} has SHA-256 {file.sha256[:12]}, the version's manifest lists {entry.sha256[:12]}."
            )


# --- shared libraries ------------------------------------------------------------------------------------------------


def _check_folder(folder: Path, limits: InspectionLimits) -> None:
    """Refuse a folder that holds a shared library, or more files than can be looked at."""
    pending, seen = [folder], 0
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                seen += 1
                if seen > limits.max_folder_files:
                    raise ModelLoadError(f"The model's folder holds over {limits.max_folder_files} files.")
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                else:
                    _check_entry(Path(entry.path).relative_to(folder).as_posix(), entry, limits)


def _check_entry(name: str, entry: os.DirEntry[str], limits: InspectionLimits) -> None:
    # The state folder may lie here too. To open and close its database would drop the locks that this process has on
    # it (POSIX locks are per process and file), and another process would take it for left behind.
    if entry.name.startswith(DATABASE):
        return
    if not entry.is_file(follow_symlinks=False):
        if _LIBRARY_NAME.search(name):
            raise ModelLoadError(f"{quoted(name)} beside the model is named like a shared library and no regular file.")
        return
    # What went away meanwhile, or may not be read, cannot be loaded either.
    with suppress(OSError), FileIO(os.open(entry.path, _NO_FOLLOW), "rb") as file:
        _refuse_library(name, file, limits)


def _refuse_library(name: str, file: FileIO, limits: InspectionLimits) -> None:
    if not _LIBRARY_NAME.search(name) and not _is_library(file.fileno()):
        return
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest not in limits.allowed_custom_ops:
        raise ModelLoadError(f"{quoted(name)} beside the model is a shared library that is not allowed by its SHA-256.")


def _is_library(descriptor: int) -> bool:
    head = os.pread(descriptor, _PE_OFFSET_AT + 4, 0)
    if head.startswith(_LIBRARY_MAGIC):
        return True
    if not head.startswith(b"MZ"):
        return False
    return os.pread(descriptor, 4, int.from_bytes(head[_PE_OFFSET_AT:], "little")) == b"PE\0\0"


# --- stamps ----------------------------------------------------------------------------------------------------------


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
