"""Content-addressed files: each is kept once, read-only, under the SHA-256 of its bytes.

A file is written beside its final place, hashed while it is copied, synced and then renamed: a name under ``sha256/``
always stands for a whole file, whatever dies when. What a dead writer leaves lies in ``tmp/`` and is swept; living
writers hold a lock that the kernel takes back with the process.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from router.registry.base import Damaged, PublishRefused, StorageFailed

MAX_FILE_BYTES: Final = 16 * 2**30
#: What dead writers left is swept when it is older than this.
TEMP_GRACE_S: Final = 3600.0
_CHUNK_BYTES: Final = 1 << 20
_LOCK_NAME: Final = "lock"
_LOCK_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(slots=True, frozen=True)
class Staged:
    """A file copied to a temporary place, hashed and synced, but under no final name yet."""

    path: Path
    sha256: str
    size: int


@dataclass(slots=True, frozen=True)
class BlobInfo:
    """A blob as the disk knows it. ``modified`` is in seconds since the epoch."""

    sha256: str
    size: int
    modified: float


class BlobStore:
    """Blobs under ``root``: ``sha256/ab/abcd...`` and ``tmp/``. Safe for any number of processes at once."""

    def __init__(self, root: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.root = root
        self._blobs = root / "sha256"
        self._temps = root / "tmp"
        self._max_file_bytes = max_file_bytes

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder for temporary files, gone when the block ends."""
        with staging_folder(self._temps) as folder:
            yield folder

    def stage(self, source: int, name: str, folder: Path) -> Staged:
        """Copy the open regular file ``source`` into a staging folder.

        Raises PublishRefused, naming the file ``name``, when it is too large or changes meanwhile; StorageFailed.
        """
        before = os.fstat(source)
        if before.st_size > self._max_file_bytes:
            raise PublishRefused(f"{name} has {before.st_size} bytes; at most {self._max_file_bytes} are taken")
        with storage(f"{name} could not be copied into the registry"):
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as target:
                # One byte more than there were shows a file that grows.
                sha256, size = copy_hashed(source, target.fileno(), before.st_size + 1)
                os.fchmod(target.fileno(), 0o444)
                os.fsync(target.fileno())
            if size != before.st_size or _identity(os.fstat(source)) != _identity(before):
                raise PublishRefused(f"{name} changed while it was copied")
            return Staged(Path(target.name), sha256, size)

    def keep(self, staged: Iterable[Staged]) -> None:
        """Give staged files their final names, durably.

        A blob that is there already is replaced: the new one is known to be whole. Called within the transaction that
        names them, so that garbage collection, which looks in a transaction too, cannot come between.
        """
        with storage("a blob could not be put in place"):
            folders = set()
            for file in staged:
                target = self.path(file.sha256)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.path.replace(target)
                folders.add(target.parent)
            for folder in (*folders, self._blobs, self.root, self.root.parent):
                sync_folder(folder)

    def take_out(self, sha256: str, folder: Path) -> None:
        """Move a blob into a staging folder, to be deleted with it: quick, whatever its size."""
        with storage("a blob could not be taken out"):
            self.path(sha256).replace(folder / sha256)

    def path(self, sha256: str) -> Path:
        """Where a blob lies, if it is there."""
        return self._blobs / sha256[:2] / sha256

    def has(self, sha256: str, size: int) -> bool:
        """Is a file of this name and size there? Its bytes are not looked at."""
        try:
            info = self.path(sha256).lstat()
        except OSError:
            return False
        return stat.S_ISREG(info.st_mode) and info.st_size == size

    def copy(self, sha256: str, target: Path) -> None:
        """Write a blob's bytes to the new file ``target``, synced. Raises Damaged when they are not what they were.

        Always a copy, never a hard link: a link would let a change of one spoil the other, and loaders of ONNX refuse
        external data with more than one link.
        """
        with self._opened(sha256) as source, storage(f"{target.name} could not be written"):
            file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
            try:
                found, _ = copy_hashed(source, file)
                os.fsync(file)
            finally:
                os.close(file)
        _require(found, sha256)

    def verify(self, sha256: str) -> None:
        """Hash a blob again. Raises Damaged when it is missing or its bytes are not what they were."""
        with self._opened(sha256) as source, storage(f"blob {sha256} cannot be read"):
            found = hash_open(source)
        _require(found, sha256)

    def infos(self) -> Iterator[BlobInfo]:
        """Every blob on disk."""
        for path in self._blobs.glob("??/*"):
            with suppress(FileNotFoundError):
                info = path.lstat()
                yield BlobInfo(path.name, info.st_size, info.st_mtime)

    def sweep(self, older_than_s: float = TEMP_GRACE_S) -> int:
        """Remove what dead writers left behind; returns how many staging folders."""
        return sweep_staging(self._temps, older_than_s)

    @contextmanager
    def _opened(self, sha256: str) -> Iterator[int]:
        try:
            file = os.open(self.path(sha256), READ_FLAGS)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ELOOP, errno.ENOTDIR}:
                raise Damaged(f"blob {sha256} is missing") from error
            raise StorageFailed(f"blob {sha256} cannot be read: {error.strerror}") from error
        try:
            yield file
        finally:
            os.close(file)


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent``, removed with all that is still in it when the block ends. Raises StorageFailed."""
    with storage("no temporary folder could be made"):
        parent.mkdir(parents=True, exist_ok=True)
        folder, lock = _held_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _held_folder(parent: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds it; another try when a sweep took it for abandoned before."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".tidegate-", dir=parent))
        with suppress(FileNotFoundError):
            lock = os.open(folder / _LOCK_NAME, _LOCK_FLAGS, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / _LOCK_NAME).exists():
                return folder, lock
            os.close(lock)


def sweep_staging(parent: Path, older_than_s: float) -> int:
    """Remove the staging folders in ``parent`` that nobody holds and that are older than this; returns how many."""
    oldest = time.time() - older_than_s
    return sum(_swept(folder, oldest) for folder in list(parent.glob("*")) if folder.is_dir())


def _swept(folder: Path, oldest: float) -> bool:
    """Remove one staging folder if it is old and no living process works in it. What cannot be removed stays."""
    with suppress(OSError):
        if folder.stat().st_mtime > oldest:
            return False
        lock = os.open(folder / _LOCK_NAME, _LOCK_FLAGS, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)
        return True
    return False


def open_regular(path: Path, name: str, *, folder: int | None = None) -> int:
    """A descriptor of a regular file, below the open ``folder`` when given. Refuses links, pipes, devices, folders.

    Raises PublishRefused, in which the file is called ``name``.
    """
    try:
        file = os.open(path, READ_FLAGS, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise PublishRefused(f"{name} is a symbolic link; give the file that it points to") from error
        raise PublishRefused(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PublishRefused(f"{name} cannot be read: {error}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise PublishRefused(f"{name} is not a regular file")
    return file


def copy_hashed(source: int, target: int, limit: int | None = None) -> tuple[str, int]:
    """Copy up to ``limit`` bytes between descriptors; returns the SHA-256 (hex) of what was written, and its size."""
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK_BYTES))
    while limit is None or size < limit:
        wanted = _CHUNK_BYTES if limit is None else min(_CHUNK_BYTES, limit - size)
        count = os.readv(source, [buffer[:wanted]])
        if not count:
            break
        digest.update(buffer[:count])
        written = 0
        while written < count:
            written += os.write(target, buffer[written:count])
        size += count
    return digest.hexdigest(), size


def hash_open(file: int) -> str:
    """SHA-256 (hex) of an open file from where it stands."""
    with os.fdopen(os.dup(file), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def storage(what: str) -> Iterator[None]:
    """What the system refuses in the block becomes StorageFailed: ``what``, and why."""
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"{what}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "no space is left on the disk"
        case errno.EROFS:
            return "the disk is read-only"
        case errno.EFBIG:
            return "the file is larger than the system allows"
        case _:
            return error.strerror or str(error)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _identity(info: os.stat_result) -> tuple[int, int, int]:
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _require(found: str, sha256: str) -> None:
    if found != sha256:
        raise Damaged(f"blob {sha256} was changed: its bytes now have SHA-256 {found}")
