"""Bundles: one version in one folder that a gateway without registry or network serves, on a CPU.

``config.yaml`` (ready to serve), ``models/NAME/`` (every file of the version), ``manifest.json`` (what it is, and the
SHA-256 of each file). A bundle is built beside its place and renamed: it is whole or not there, and never replaces
anything. ``verify_bundle`` tells a folder that is what was written from one that is not.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from router.registry.base import CHAMPION, Version
from router.registry.blobs import sync_folder
from router.registry.directory import CONFIG_FILENAME, DEFAULT_FILENAME
from router.registry.manifest import MODEL, PROFILE, Manifest, describe
from router.registry.references import split_reference
from server.capture.segments import sha256_of
from server.config.load import load_config
from server.errors import FailedPrecondition, InvalidArgument, TidegateError
from server.offline.registries import opened

FORMAT: Final = "tidegate.bundle/1"
MANIFEST: Final = "manifest.json"
CONFIG: Final = "config.yaml"
#: What a gateway that serves the bundle makes in it.
STATE: Final = "state"


@dataclass(slots=True, frozen=True)
class Bundle:
    """What a bundle holds. ``digest``: the registry's, of the version's own manifest."""

    model: str
    version: int
    digest: str
    files: int
    bytes: int
    folder: str


def export_bundle(reference: str, state_dir: Path | None, folder: Path, config: Path | None = None) -> Bundle:
    """Write the version that ``reference`` means (a model alone: its champion) to the new ``folder``.

    ``state_dir`` and ``config``: which registry, as for ``opened``. Raises FailedPrecondition when there is something
    of that name, TidegateError for what the registry refuses.
    """
    if os.path.lexists(folder):
        raise FailedPrecondition(f"{folder} exists already: it is never overwritten")
    model, which = split_reference(reference)
    with opened(state_dir, config) as found, _staged(folder) as staging:
        version = found.registry.resolve(model, which or f"@{CHAMPION}")
        (staging / "models").mkdir()
        found.registry.fetch(model, version.version, staging / "models" / model)
        (staging / CONFIG).write_text(config_of(version), encoding="utf-8")
        load_config(staging / CONFIG)
        listed = _listed(staging)
        about = {"format": FORMAT, "model": model, "version": version.version, "digest": version.digest}
        described = {} if version.manifest is None else describe(version.manifest.description)
        (staging / MANIFEST).write_text(json.dumps({**about, "files": listed, "description": described}, indent=1))
        _sync(staging)
    size = sum(int(entry["size"]) for entry in listed)
    return Bundle(model, version.version, version.digest, len(listed), size, str(folder))


def config_of(version: Version) -> str:
    """The configuration that serves the version under its own name and number."""
    manifest = version.manifest
    if manifest is None or (graph := manifest.file(MODEL)) is None:
        raise TidegateError(f"{version.model}:{version.version} has no file of role 'model'")
    home = f"models/{version.model}"
    named = graph.path == DEFAULT_FILENAME or any(entry.path == CONFIG_FILENAME for entry in manifest.files)
    section: dict[str, Any] = {
        "versions": {str(version.version): {"source": home if named else f"{home}/{graph.path}"}},
        "runtime": {"providers": ["cpu"]},
        **_monitored(manifest, home, version.version),
    }
    config = {"apiVersion": "tidegate/v1", "state": {"dir": STATE}, "models": {version.model: section}}
    return yaml.safe_dump(config, sort_keys=False)


def _monitored(manifest: Manifest, home: str, version: int) -> dict[str, Any]:
    profile = manifest.file(PROFILE)
    return {} if profile is None else {"monitor": {"profiles": {str(version): f"{home}/{profile.path}"}}}


def verify_bundle(folder: Path) -> Bundle:
    """Hash every file again and load the configuration. Raises TidegateError that names what is wrong."""
    about = _about(folder)
    listed = {entry["path"]: entry for entry in about["files"]}
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    wrong = [f"{path} is missing" for path in listed if path not in found]
    wrong += [f"{path} is not listed" for path in found if path not in listed]
    wrong += [fault for path, entry in listed.items() if path in found and (fault := _fault(found[path], entry))]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise TidegateError(f"{folder} is not what was exported: {'; '.join(sorted(wrong)[:5])}{more}")
    load_config(folder / CONFIG)
    size = sum(entry["size"] for entry in listed.values())
    return Bundle(about["model"], about["version"], about["digest"], len(listed), size, str(folder))


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / MANIFEST).read_bytes())
        if about["format"] != FORMAT:
            raise InvalidArgument(f"{folder}/{MANIFEST}: format {about['format']!r} is not known, wanted {FORMAT!r}")
        for entry in about["files"]:
            _ = entry["path"] + entry["sha256"], entry["size"] + 0
        _ = about["model"], about["version"], about["digest"]
    except OSError as error:
        raise InvalidArgument(f"{folder} is no bundle: {MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(f"{folder}/{MANIFEST} is no manifest of a bundle: {error}") from error
    found: dict[str, Any] = about
    return found


def _fault(path: Path, entry: Mapping[str, Any]) -> str:
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        return f"{entry['path']} is not a regular file"
    if info.st_size != entry["size"] or sha256_of(path) != entry["sha256"]:
        return f"{entry['path']} was changed"
    return ""


# --- building --------------------------------------------------------------------------------------------------------


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A new folder beside its place, which gets its name when the block ends well and is removed otherwise."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield staging
            staging.chmod(0o755)
            staging.rename(folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        sync_folder(folder.parent)
    except OSError as error:
        raise TidegateError(f"{folder} cannot be written: {error.strerror or error}") from error


def _files(folder: Path) -> Iterator[Path]:
    """Everything but folders, the manifest, and what serving leaves."""
    for above, folders, names in os.walk(folder):
        if Path(above) == folder:
            folders[:] = [name for name in folders if name != STATE]
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        for name in [*names, *links]:
            path = Path(above, name)
            if path != folder / MANIFEST:
                yield path


def _listed(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(_files(folder))
    return [
        {"path": path.relative_to(folder).as_posix(), "sha256": sha256_of(path), "size": path.stat().st_size}
        for path in paths
    ]


def _sync(folder: Path) -> None:
    for path in (folder / CONFIG, folder / MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for above, _, _ in os.walk(folder):
        sync_folder(Path(above))
