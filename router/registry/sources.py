"""The files that a publisher hands in: found, named and opened without ever following a link.

A folder is walked by descriptors, so that nothing can be swapped for a link between the look and the reading. Hidden
names are passed over, as everywhere. Names become paths of the manifest and must be valid ones.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from router.registry.base import PublishRefused, shown
from router.registry.blobs import open_regular
from router.registry.directory import CONFIG_FILENAME, DEFAULT_FILENAME
from router.registry.manifest import (
    CONFIG,
    DATA,
    LABELS,
    MAX_FILES,
    MODEL,
    OTHER,
    PROFILE,
    ROLES,
    ManifestError,
    check_path,
)

#: A folder, one model file, or path in the version -> file on disk.
Source: TypeAlias = Path | Mapping[str, Path]

_MAX_DEPTH = 16


def each_file(source: Source, take: Callable[[str, int], None]) -> None:
    """Call ``take(path, descriptor)`` for every file of a source, in no set order. Raises PublishRefused."""
    try:
        _each_file(source, take)
    except OSError as error:  # of the source alone: ``take`` raises none
        raise PublishRefused(f"the files to publish cannot be read: {error.strerror or error}") from error


def _each_file(source: Source, take: Callable[[str, int], None]) -> None:
    if isinstance(source, Mapping):
        _check_count(len(source))
        for path, file in source.items():
            _take(path, file, None, take)
    elif _is_folder(source):
        with _folder(source, source.name, None) as folder:
            if _walk(folder, "", take, 0) == 0:
                raise PublishRefused(f"{source.name} holds no file")
    else:
        _take(DEFAULT_FILENAME if source.suffix == ".onnx" else source.name, source, None, take)


def _is_folder(path: Path) -> bool:
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError) as error:
        raise PublishRefused(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISLNK(mode):
        raise PublishRefused(f"{path.name} is a symbolic link; give what it points to")
    return stat.S_ISDIR(mode)


def _walk(folder: int, above: str, take: Callable[[str, int], None], count: int) -> int:
    """Take what a folder holds; ``count`` files were taken before, the new count is returned."""
    if above.count("/") > _MAX_DEPTH:
        raise PublishRefused(f"{above} lies more than {_MAX_DEPTH} folders deep")
    for name in sorted(name for name in os.listdir(folder) if not name.startswith(".")):
        path = above + name
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):
            with _folder(Path(name), path, folder) as inner:
                count = _walk(inner, path + "/", take, count)
        else:
            count += 1
            _check_count(count)
            _take(path, Path(name), folder, take)
    return count


def _take(path: str, file: Path, folder: int | None, take: Callable[[str, int], None]) -> None:
    try:
        check_path(path)
    except ManifestError as error:
        raise PublishRefused(str(error)) from error
    descriptor = open_regular(file, path, folder=folder)
    try:
        take(path, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _folder(path: Path, name: str, above: int | None) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    except OSError as error:
        raise PublishRefused(f"folder {shown(name)} cannot be read: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check_count(count: int) -> None:
    if count > MAX_FILES:
        raise PublishRefused(f"the version has more than {MAX_FILES} files")


def roles_of(paths: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """What each file is for: as given, else by its name. Raises PublishRefused.

    The model is ``model.onnx``, or the only ``.onnx`` file; what lies beside it without being known is its data.
    """
    for path, role in given.items():
        if path not in paths or role not in ROLES:
            raise PublishRefused(
                f"role {shown(role)} for {shown(path)}: wanted one of {', '.join(ROLES)} for a file given"
            )
    model = next((path for path, role in given.items() if role == MODEL), None) or _model(paths)
    return {path: given.get(path) or (MODEL if path == model else _role(path)) for path in paths}


def _model(paths: list[str]) -> str:
    if DEFAULT_FILENAME in paths:
        return DEFAULT_FILENAME
    candidates = [path for path in paths if path.endswith(".onnx")]
    if len(candidates) != 1:
        found = ", ".join(sorted(candidates)[:3]) or "none"
        raise PublishRefused(
            f"wanted {DEFAULT_FILENAME}, exactly one .onnx file or a file of role 'model'; .onnx files found: {found}"
        )
    return candidates[0]


def _role(path: str) -> str:
    if path == CONFIG_FILENAME:
        return CONFIG
    suffix = os.path.splitext(path)[1]
    roles = {".txt": LABELS, ".tgp": PROFILE, ".data": DATA, ".bin": DATA, ".weights": DATA}
    return roles.get(suffix, OTHER)
