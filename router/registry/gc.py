"""Garbage collection of the embedded registry: what dead processes left, blobs nobody needs, folders nobody uses.

A blob is needed while any version names it that is not retired; a version with an alias cannot be retired. What is
needed is looked up in a write transaction, in which the blobs to go are set aside; publishing puts its blobs in place
in a write transaction too. So neither sees the other half done. A damaged manifest stops everything: its blobs are
not known.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from router.registry.blobs import TEMP_GRACE_S, BlobInfo
from router.registry.embedded import EmbeddedRegistry, manifests


@dataclass(slots=True, frozen=True)
class Collected:
    """What was removed: staging folders of the dead, blobs and their bytes, cached folders."""

    temps: int
    blobs: int
    bytes: int
    folders: int


def collect(registry: EmbeddedRegistry, *, actor: str, grace_s: float = TEMP_GRACE_S) -> Collected:
    """Remove what is not needed and older than ``grace_s``; a cached folder also when it was used since then.

    Raises Damaged when a manifest is, StorageFailed when the disk refuses.
    """
    temps = registry.sweep(grace_s)
    blobs = _collect_blobs(registry, actor, time.time() - grace_s)
    folders = _collect_folders(registry, time.time() - grace_s)
    return Collected(temps, len(blobs), sum(blob.size for blob in blobs), folders)


def _collect_blobs(registry: EmbeddedRegistry, actor: str, oldest: float) -> list[BlobInfo]:
    with registry.blobs.staging() as trash, registry.database.transaction() as connection:
        needed = _needed(connection)
        surplus = [blob for blob in registry.blobs.infos() if blob.sha256 not in needed and blob.modified <= oldest]
        _take_out(registry, surplus, trash)
        if surplus:
            detail = {"blobs": len(surplus), "bytes": sum(blob.size for blob in surplus)}
            registry.journal(connection, "registry.collect", "", detail, actor)
    return surplus


def _needed(connection: sqlite3.Connection) -> set[str]:
    live = [version.manifest for version in manifests(connection) if not version.retired]
    return {entry.sha256 for manifest in live if manifest is not None for entry in manifest.files}


def _take_out(registry: EmbeddedRegistry, blobs: list[BlobInfo], trash: Path) -> None:
    for blob in blobs:
        registry.blobs.take_out(blob.sha256, trash)


def _collect_folders(registry: EmbeddedRegistry, oldest: float) -> int:
    aliased = _aliased(registry)
    unused = [
        folder
        for folder in registry.cache.folders()
        if (folder.model, folder.digest) not in aliased and folder.used <= oldest
    ]
    for folder in unused:
        registry.cache.remove(folder)
    return len(unused)


def _aliased(registry: EmbeddedRegistry) -> set[tuple[str, str]]:
    """(model, digest) of every version that has an alias."""
    query = "SELECT a.model, v.digest FROM registry_alias a JOIN registry_version v USING (model, version)"
    with registry.database.reading() as connection:
        return set(connection.execute(query).fetchall())
