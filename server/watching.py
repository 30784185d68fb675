"""Watches the configuration file: tells its new content once it has changed and settled.

The file is read again on every look, at most 4 MiB twice a second and off the event loop, rather than watched by the
system's notifications: that way it does not matter whether an editor wrote it in place or put a new file there,
whether Kubernetes swapped the link of the folder it lives in, nor whether the file system is a remote one that
notifies nobody. What to do with new content is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncGenerator
from pathlib import Path

import structlog

from server.config.load import MAX_BYTES

log = structlog.get_logger("tidegate.config")


class Unreadable(OSError):
    """The file is there and no configuration could be in it."""


def read_config(path: Path) -> bytes:
    """The content of ``path``. Raises OSError; for what is no regular file or over the limit, too. Never waits."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Unreadable("is not a regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise Unreadable(f"is over {MAX_BYTES} bytes, the most a configuration may have")
    return content


class ConfigWatcher:
    """One file. ``seen``: the content that needs no telling; None: whatever is there when watching begins.

    New content is told when it was the same for ``debounce_s``, so that a file half written is not taken. Between two
    looks lie ``interval_s``. A change and its undoing between two looks are no change.
    """

    def __init__(
        self, path: Path, debounce_s: float = 0.2, *, interval_s: float = 0.5, seen: bytes | None = None
    ) -> None:
        self._path = path
        self._debounce_s = debounce_s
        self._interval_s = interval_s
        self._seen = seen
        self._readable = True

    async def changes(self) -> AsyncGenerator[bytes, None]:
        """Every new content, for as long as it is asked for. A file that cannot be read is waited for."""
        if self._seen is None:
            self._seen = await self._look()
        while True:
            content = await self._settled()
            if content is not None and content != self._seen:
                self._seen = content
                yield content
            await asyncio.sleep(self._interval_s)

    async def _settled(self) -> bytes | None:
        """The content, when it is either nothing new or new for ``debounce_s``; None when it is still changing."""
        content = await self._look()
        if content is None or content == self._seen:
            return content
        await asyncio.sleep(self._debounce_s)
        return content if await self._look() == content else None

    async def _look(self) -> bytes | None:
        """The content now; None when there is none, which is logged once until there is one again."""
        try:
            content = await asyncio.to_thread(read_config, self._path)
        except OSError as error:
            if self._readable:
                log.warning("config_unreadable", path=str(self._path), error=error.strerror or str(error))
            self._readable = False
            return None
        if not self._readable:
            log.info("config_readable", path=str(self._path))
        self._readable = True
        return content
