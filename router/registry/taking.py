"""Bytes from an origin: downloaded within limits into a staging folder, hashed, and compared with a pin."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from router.registry.blobs import MAX_FILE_BYTES, BlobStore, Staged, hash_open, storage
from router.registry.manifest import MAX_FILES, ManifestError, Signature, TensorEntry, check_path
from router.registry.origin import BytesChanged, Offer, OfferedFile, Origin, Unusable
from router.registry.pins import Pin

#: ``ends(graph)``: names of a graph's inputs that a caller must give, and of its outputs; None when it cannot be read.
Ends: TypeAlias = Callable[[Path], tuple[tuple[str, ...], tuple[str, ...]] | None]


@dataclass(slots=True, frozen=True)
class Limits:
    """The largest file and the largest version that are taken, in bytes."""

    file_bytes: int = MAX_FILE_BYTES
    version_bytes: int = 2 * MAX_FILE_BYTES


@contextmanager
def taken(origin: Origin, offer: Offer, blobs: BlobStore, limits: Limits) -> Iterator[Mapping[str, Staged]]:
    """The files of an offer, by path, downloaded and synced; gone when the block ends, but for what was kept.

    Raises Unusable, Unreachable or StorageFailed.
    """
    check_offer(offer, limits)
    left = limits.version_bytes
    with blobs.staging() as folder:
        staged = {}
        for file in offer.files:
            found = staged[file.path] = _download(origin, file, folder, min(left, limits.file_bytes))
            if file.size not in (None, found.size):
                raise Unusable(f"{file.path} was listed with {file.size} bytes and came with {found.size}")
            left -= found.size
        yield staged


def check_offer(offer: Offer, limits: Limits) -> None:
    """Raises Unusable for paths that lead elsewhere and for more than may be taken, as far as the origin says."""
    if not 1 <= len(offer.files) <= MAX_FILES:
        raise Unusable(f"wanted 1 to {MAX_FILES} files, the registry offers {len(offer.files)}")
    for file in offer.files:
        try:
            check_path(file.path)
        except ManifestError as error:
            raise Unusable(f"the registry offers an unusable file: {error}") from error
        if (file.size or 0) > limits.file_bytes:
            raise Unusable(f"{file.path} has {file.size} bytes; at most {limits.file_bytes} are taken")
    size = sum(file.size or 0 for file in offer.files)
    if size > limits.version_bytes:
        raise Unusable(f"the version has {size} bytes; at most {limits.version_bytes} are taken")


def named(signature: Signature | None, graph: Path, ends: Ends | None) -> Signature | None:
    """The signature with the graph's own names in place of "", which stands for the only tensor of a side.

    None when the graph has more than one there, or cannot be read: what is meant is not known then.
    """
    if signature is None or all(tensor.name for tensor in (*signature.inputs, *signature.outputs)):
        return signature
    found = None if ends is None else ends(graph)
    if found is None:
        return None
    inputs, outputs = _named(signature.inputs, found[0]), _named(signature.outputs, found[1])
    return Signature(inputs, outputs) if inputs and outputs else None


def _named(side: tuple[TensorEntry, ...], names: tuple[str, ...]) -> tuple[TensorEntry, ...]:
    if all(tensor.name for tensor in side):
        return side
    return tuple([replace(side[0], name=name) for name in names]) if len(side) == len(names) == 1 else ()


def _download(origin: Origin, file: OfferedFile, folder: Path, limit: int) -> Staged:
    with storage(f"{file.path} could not be downloaded"):
        descriptor, name = tempfile.mkstemp(dir=folder)
        try:
            origin.read(file, descriptor, limit)
            size = os.lseek(descriptor, 0, os.SEEK_END)
            os.lseek(descriptor, 0, os.SEEK_SET)
            sha256 = hash_open(descriptor)
            os.fchmod(descriptor, 0o444)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return Staged(Path(name), sha256, size)


def compare_offer(pin: Pin, offer: Offer) -> None:
    """Raises BytesChanged when what is offered cannot be what was pinned: another description, other files or sizes."""
    pinned = {entry.path: entry for entry in pin.manifest.files}
    offered = {file.path: file for file in offer.files}
    for path in sorted(pinned.keys() ^ offered.keys()):
        raise BytesChanged(_changed(pin, f"{path} {'is new' if path in offered else 'is gone'}"))
    for path, file in offered.items():
        if file.size is not None and file.size != pinned[path].size:
            raise BytesChanged(_changed(pin, f"{path} has {file.size} bytes and had {pinned[path].size}"))
        if file.role != pinned[path].role:
            raise BytesChanged(_changed(pin, f"{path} was the {pinned[path].role} and is the {file.role}"))
    if offer.identity != pin.identity:
        raise BytesChanged(_changed(pin, "its description is another"))


def compare_bytes(pin: Pin, staged: Mapping[str, Staged]) -> None:
    """Raises BytesChanged when the files are not those that were pinned."""
    pinned = {entry.path: entry.sha256 for entry in pin.manifest.files}
    for path in sorted(pinned.keys() | staged.keys()):
        found = staged[path].sha256 if path in staged else "missing"
        if found != pinned.get(path):
            raise BytesChanged(_changed(pin, f"{path} has SHA-256 {found} and had {pinned.get(path, 'none')}"))


def _changed(pin: Pin, what: str) -> str:
    of = pin.version
    return f"the bytes of {of.model}:{of.version} changed in the registry since it was first taken: {what}"
