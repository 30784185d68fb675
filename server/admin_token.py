"""The bearer token of the admin address: made once per state folder, readable by its owner only."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from server.errors import ConfigError

NAME: Final = "admin-token"
_TOKEN_BYTES: Final = 32
#: A shorter token, written by hand, could be guessed.
_LEAST_CHARS: Final = 16
_MOST_BYTES: Final = 4096


def load_or_make_token(state_dir: Path) -> str:
    """The token in ``state_dir/admin-token``, made (32 random bytes, base64url, mode 600) when there is none.

    Safe for several processes that start at once: they get the same token. Raises ConfigError when the file cannot be
    used, is no regular file, may be read or written by others than its owner, or holds no token.
    """
    path = state_dir / NAME
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        with _alone_in(state_dir) as folder:
            if not path.exists():
                _make(path, folder)
        return _load(path)
    except OSError as error:
        raise ConfigError(f"the admin token {path} cannot be used: {error.strerror or error}") from error


@contextmanager
def _alone_in(state_dir: Path) -> Iterator[int]:
    """No other process makes a token here meanwhile; gives a descriptor of the folder."""
    folder = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(folder)


def _make(path: Path, folder: int) -> None:
    """The file appears whole or not at all, whatever the umask and whenever the process dies."""
    partial = path.with_name(f".{NAME}.part")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="ascii") as file:
        os.fchmod(descriptor, 0o600)
        file.write(secrets.token_urlsafe(_TOKEN_BYTES) + "\n")
        file.flush()
        os.fsync(descriptor)
    partial.replace(path)
    os.fsync(folder)


def _load(path: Path) -> str:
    # Without O_NONBLOCK, opening a pipe would wait for its writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"the admin token {path} is not a regular file")
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077:
            raise ConfigError(
                f"the admin token {path} is open to others: wanted mode 600, got {mode:o}; "
                f"others may have read it: delete it for a new one, or chmod 600 it"
            )
        return _checked(path, file.read(_MOST_BYTES))


def _checked(path: Path, content: bytes) -> str:
    token = content.strip().decode("latin-1")
    if len(token) < _LEAST_CHARS or not all("!" <= char <= "~" for char in token):
        raise ConfigError(
            f"the admin token {path} must be {_LEAST_CHARS} or more printable ASCII characters without spaces; "
            "delete it for a new one"
        )
    return token
