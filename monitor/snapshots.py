"""Snapshots in a folder: one file per model, version and profile, each written whole or not at all."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from monitor import sealed

SUFFIX: Final = ".state"
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]")


def file_name(model: str, version: str, sha256: str) -> str:
    """Readable, and different for every model, version and profile, whatever their names hold."""
    digest = hashlib.sha256("\0".join((model, version, sha256)).encode()).hexdigest()[:24]
    return f"{_UNSAFE.sub('_', model)[:48]}-{_UNSAFE.sub('_', version)[:24]}-{digest}{SUFFIX}"


def write(folder: Path, name: str, data: bytes) -> None:
    """Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    sealed.write_file(folder / name, data)


def read(folder: Path, name: str) -> bytes | None:
    """None when there is no such snapshot. Raises OSError."""
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        return None


def prune(folder: Path, keep: Collection[str], spare: int) -> list[str]:
    """Delete snapshots but those named, and the ``spare`` newest others (a version may come back); names deleted."""
    others = [path for path in folder.glob(f"*{SUFFIX}") if path.name not in keep]
    others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in others[spare:]:
        path.unlink(missing_ok=True)
    return [path.name for path in others[spare:]]
