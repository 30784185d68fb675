"""Where the files of a version lie: behind MLflow's artifact proxy, or in folders of this machine that are allowed.

Both list and hand out the same way. A path on disk is opened one component at a time from the allowed folder and never
through a link, so that whoever can write there, or say what MLflow answers, leads nowhere else.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol
from urllib.parse import SplitResult, unquote, urlsplit

from router.registry.base import shown
from router.registry.blobs import READ_FLAGS, copy_hashed
from router.registry.origin import Unreachable, Unusable
from server.mlflow.fields import integer_of, objects_of, text_of
from server.mlflow.wire import Refusal, Wire

_PROXY: Final = "/api/2.0/mlflow-artifacts/artifacts"
_NOT_THERE: Final = "RESOURCE_DOES_NOT_EXIST"
_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: A folder with more than this is no version of a model.
_MAX_LISTED: Final = 20_000
_REMEDY: Final = (
    "start MLflow with --serve-artifacts and --artifacts-destination, so that it hands artifacts out itself, and log "
    "the model again"
)


@dataclass(slots=True, frozen=True)
class Listed:
    """One name in a folder. ``size``: in bytes, None when it is not said."""

    name: str
    is_folder: bool
    size: int | None = None


class Artifacts(Protocol):
    """Blocking. Paths are those that ``Places.of`` and ``listed`` gave. Raises Unreachable or Unusable."""

    def listed(self, folder: str) -> list[Listed]: ...

    def text(self, path: str, limit: int) -> bytes:
        """A file of at most ``limit`` bytes."""
        ...

    def copy(self, path: str, target: int, limit: int) -> None:
        """Write a file of at most ``limit`` bytes to the open and empty file ``target``."""
        ...


class Places:
    """Which artifacts there are for an address. ``netloc``: the server's own; ``folders``: those that are allowed."""

    def __init__(self, wire: Wire, netloc: str, folders: Sequence[Path]) -> None:
        self._netloc = netloc
        self._proxied = ProxiedArtifacts(wire)
        self._local = LocalArtifacts(folders)

    def of(self, uri: str) -> str:
        """The path of a version's folder, to be handed to ``at``. Raises Unusable for artifacts out of reach."""
        try:
            parts = urlsplit(uri)
        except ValueError as error:
            raise Unusable("the artifacts lie at an address that cannot be read") from error
        if parts.scheme == "mlflow-artifacts" and parts.netloc in ("", self._netloc):
            return "/".join(_segments(parts.path, parts))
        if (parts.scheme == "file" and parts.netloc in ("", "localhost")) or uri.startswith("/"):
            path = unquote(parts.path) if parts.scheme else uri
            return self._local.checked("/" + "/".join(_segments(path, parts if parts.scheme else None)))
        raise Unusable(
            f"the artifacts lie at {f'{parts.scheme[:20]}://...' if parts.scheme else 'a relative path'}, which is not "
            f"read from here; only those are taken that this MLflow server hands out: {_REMEDY}"
        )

    def at(self, path: str) -> Artifacts:
        """What holds a path: those on disk are absolute, the proxy's are not."""
        return self._local if path.startswith("/") else self._proxied


def is_segment(name: str) -> bool:
    """Can this be one name in a path, that leads into no other folder?"""
    return bool(name) and name not in (".", "..") and not any(c in "/\\\0" for c in name)


def _segments(path: str, parts: SplitResult | None) -> list[str]:
    segments = path.strip("/").split("/")
    if not all(map(is_segment, segments)) or (parts is not None and (parts.query or parts.fragment)):
        raise Unusable("the artifacts lie at a path that leads elsewhere")
    return segments


# --- behind the proxy ------------------------------------------------------------------------------------------------


class ProxiedArtifacts:
    """What ``mlflow server --serve-artifacts`` hands out."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def listed(self, folder: str) -> list[Listed]:
        try:
            found = self._wire.get(_PROXY, (("path", folder),))
        except Refusal as refusal:
            _refuse(refusal, folder)
        return [_row(row) for row in objects_of(found, "files")]

    def text(self, path: str, limit: int) -> bytes:
        try:
            return self._wire.text(f"{_PROXY}/{path}", (), limit)
        except Refusal as refusal:
            _refuse(refusal, path)

    def copy(self, path: str, target: int, limit: int) -> None:
        try:
            self._wire.download(f"{_PROXY}/{path}", (), target, limit)
        except Refusal as refusal:
            _refuse(refusal, path)


def _row(row: Mapping[str, Any]) -> Listed:
    return Listed(text_of(row, "path"), bool(row.get("is_dir")), integer_of(row, "file_size"))


def _refuse(refusal: Refusal, path: str) -> NoReturn:
    if refusal.status == 404 and refusal.code in ("", _NOT_THERE):
        raise Unusable(f"MLflow's artifact store has no {path[-120:]}") from refusal
    raise Unreachable(str(refusal)) from refusal


# --- on this machine -------------------------------------------------------------------------------------------------


class LocalArtifacts:
    """Artifacts below the folders that the operator allows, such as a disk that MLflow and the gateway share."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders

    def checked(self, path: str) -> str:
        """The path. Raises Unusable unless it lies below an allowed folder."""
        self._home(path)
        return path

    def listed(self, folder: str) -> list[Listed]:
        with self._opened(folder, _FOLDER_FLAGS) as descriptor, _reading(folder), os.scandir(descriptor) as found:
            rows: list[Listed] = []
            for item in found:
                if len(rows) >= _MAX_LISTED:
                    raise Unusable(f"{shown(folder)} holds more than {_MAX_LISTED} files")
                info = item.stat(follow_symlinks=False)
                rows.append(Listed(item.name, stat.S_ISDIR(info.st_mode), info.st_size))
            return rows

    def text(self, path: str, limit: int) -> bytes:
        with self._file(path, limit) as descriptor, _reading(path), os.fdopen(os.dup(descriptor), "rb") as file:
            found = file.read(limit + 1)
        if len(found) > limit:
            raise _too_large(path, limit)
        return found

    def copy(self, path: str, target: int, limit: int) -> None:
        with self._file(path, limit) as descriptor:
            _, size = copy_hashed(descriptor, target, limit + 1)
        if size > limit:  # it grew meanwhile
            raise _too_large(path, limit)

    def _home(self, path: str) -> tuple[Path, list[str]]:
        """The allowed folder that a path lies in, and the names from there on."""
        for folder in self._folders:
            for home in {folder, Path(os.path.realpath(folder))}:
                if Path(path).is_relative_to(home) and Path(path) != home:
                    return home, list(Path(path).relative_to(home).parts)
        raise Unusable(
            f"the artifacts lie in {shown(path)} on a disk, in none of the folders that "
            "registry.mlflow.artifact_folders allows: name the folder there if it is a disk of the gateway's too, or "
            f"{_REMEDY}"
        )

    @contextmanager
    def _file(self, path: str, limit: int) -> Iterator[int]:
        with self._opened(path, READ_FLAGS) as descriptor:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise Unusable(f"{shown(path)} is not a regular file")
            if info.st_nlink != 1:
                raise Unusable(f"{shown(path)} has {info.st_nlink} links; a file with another name is not taken")
            if info.st_size > limit:
                raise _too_large(path, limit)
            yield descriptor

    @contextmanager
    def _opened(self, path: str, flags: int) -> Iterator[int]:
        """A descriptor of what lies there, which no part of the path is a link to."""
        home, names = self._home(path)
        try:
            descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:  # the operator's folder: a disk that is not mounted says nothing of what is on it
            raise Unreachable(f"the artifact folder {home} cannot be read: {error.strerror}") from error
        try:
            for place, name in enumerate(names):
                above = descriptor
                descriptor = _below(above, name, path, flags if place + 1 == len(names) else _FOLDER_FLAGS)
                os.close(above)
            yield descriptor
        finally:
            os.close(descriptor)


def _below(above: int, name: str, path: str, flags: int) -> int:
    try:
        return os.open(name, flags, dir_fd=above)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ELOOP, errno.ENOTDIR):
            raise Unusable(
                f"{shown(name)} of {shown(path)} is a link or not a folder: links are not followed"
            ) from error
        if number in (errno.ENOENT, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO, None):
            raise Unusable(f"the artifact folder has no {shown(path[-60:])}") from error
        raise Unreachable(f"{shown(path)} cannot be read: {os.strerror(number)}") from error


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """A disk that fails, or a name that went meanwhile, says nothing of the version."""
    try:
        yield
    except OSError as error:
        raise Unreachable(f"{shown(path)} cannot be read: {error.strerror or error}") from error


def _too_large(path: str, limit: int) -> Unusable:
    return Unusable(f"{path[-120:]} has more than the {limit} bytes that are taken")
