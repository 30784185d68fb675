"""One codec process from start to end: its socket, the files shared with it, and the jobs that it has.

It does one job at a time and there are few files, so that the memory of jobs is bounded; more jobs wait for a file, and
over ``max_waiting`` they are refused. Everything but ``start`` and ``reap`` belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from server.codec.process import worker
from server.codec.process.messages import HELLO, NOTICE_BYTES, Notice, packed_head, parted
from server.codec.process.shared import SharedFile
from server.codec.process.steps import by_turns
from server.types import Buffer

#: One job is in work while the next is put in place.
_FILES: Final = 2
_MIB: Final = 1024 * 1024
#: The process uses no linear algebra: no threads for it.
_ENVIRONMENT: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Unavailable(Exception):
    """Do it without the codec process. ``reason``: full, starting, down, died, stalled, memory or unfit."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True, frozen=True)
class Started:
    """A process that has said hello."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    files: tuple[SharedFile, ...]


def start(timeout_s: float) -> Started:
    """Blocks until the process is ready. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    files: list[SharedFile] = []
    process = None
    try:
        with theirs:
            files += [SharedFile.create() for _ in range(_FILES)]
            process = _spawn([theirs.fileno(), *(file.fd for file in files)])
        ours.settimeout(timeout_s)
        if ours.recv(NOTICE_BYTES) != HELLO:
            raise OSError(f"the codec process ended before it was ready, exit code {process.wait()}")
        ours.setblocking(False)
    except BaseException:
        ours.close()
        for file in files:
            file.close()
        if process is not None:
            reap(process)
        raise
    return Started(process, ours, tuple(files))


def _spawn(descriptors: list[int]) -> subprocess.Popen[bytes]:
    """Its imports come from where ours do, and from no working directory."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", worker.__name__, *map(str, descriptors)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=descriptors,
        env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def reap(process: subprocess.Popen[bytes]) -> int:
    """End it, which costs nothing that is kept; its exit code. Blocks for a moment."""
    process.kill()
    return process.wait()


class Link:
    """The gateway's end of a started process. ``lost`` is called once, with the reason, when it is of no more use."""

    def __init__(
        self, started: Started, *, max_waiting: int, stall_s: float, lost: Callable[[Link, str], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.process = started.process
        self._socket = started.socket
        self._files = started.files
        self._max_waiting = max_waiting
        self._stall_s = stall_s
        self._lost = lost
        self._free = list(range(len(self._files)))
        self._waiting: deque[asyncio.Future[int]] = deque()
        #: Jobs that the process has, by file; a future that is done already was given up by its caller.
        self._jobs: dict[int, tuple[asyncio.Future[Notice], int]] = {}
        self._watch: asyncio.TimerHandle | None = None
        self._over = ""
        self._loop.add_reader(self._socket.fileno(), self._readable)

    async def do(self, head: dict[str, Any], chunks: list[Buffer]) -> tuple[dict[str, Any], memoryview]:
        """One job's result: its head and what follows. Raises Unavailable. May be cancelled at any point."""
        text = packed_head(head)
        number = await self._file()
        try:
            size = await by_turns(self._files[number].write([text, *chunks]))
            self._check()
        except BaseException as error:
            self._give_back(number, sum(map(len, chunks)))
            if isinstance(error, OSError):
                raise Unavailable("memory") from error
            raise
        answer = await self._asked(Notice(number, len(text), size))
        try:
            result = parted(answer, await by_turns(self._files[number].read(answer.size)))
        finally:
            self._give_back(number, max(size, answer.size))
        if "unfit" in result[0]:
            raise Unavailable("unfit")
        return result

    # --- files -----------------------------------------------------------------------------------------------

    async def _file(self) -> int:
        self._check()
        if self._free:
            return self._free.pop()
        if len(self._waiting) >= self._max_waiting:
            raise Unavailable("full")
        turn: asyncio.Future[int] = self._loop.create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):  # passed over already
                    self._waiting.remove(turn)
            elif turn.exception() is None:
                self._give_back(turn.result(), 0)
            raise

    def _give_back(self, number: int, size: int) -> None:
        """The file is free: for whoever waits longest, or for good when the process is gone."""
        if self._over:
            self._files[number].close()
            return
        self._files[number].trim(size)
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(number)
                return
        self._free.append(number)

    # --- the process -----------------------------------------------------------------------------------------

    async def _asked(self, notice: Notice) -> Notice:
        answer: asyncio.Future[Notice] = self._loop.create_future()
        self._jobs[notice.file] = answer, notice.size
        self._send(notice)
        try:
            return await answer
        except asyncio.CancelledError:
            if not answer.cancelled():  # it came in the same turn
                came = 0 if answer.exception() is not None else answer.result().size
                self._give_back(notice.file, max(notice.size, came))
            elif notice.file in self._jobs and self._jobs[notice.file][0] is answer:
                # Still the process's: it finds nothing there if it has not begun, and the file is free when it says so.
                self._files[notice.file].empty()
            raise
        except Unavailable:
            self._give_back(notice.file, 0)
            raise

    def _send(self, notice: Notice) -> None:
        if self._watch is None:
            self._arm()
        try:
            self._socket.send(notice.packed())
        except OSError:
            self.end("died")

    def _readable(self) -> None:
        try:
            data = self._socket.recv(NOTICE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._answered(Notice.unpacked(data))
        else:
            self.end("died")

    def _answered(self, notice: Notice) -> None:
        answer, size = self._jobs.pop(notice.file)
        self._arm()
        if answer.done():
            self._give_back(notice.file, max(size, notice.size))
        else:
            answer.set_result(notice)

    def _arm(self) -> None:
        """Some answer is due within the patience that all jobs in its hands deserve together."""
        if self._watch is not None:
            self._watch.cancel()
        self._watch = None
        if self._jobs:
            patience_s = self._stall_s + sum(size for _, size in self._jobs.values()) / _MIB
            self._watch = self._loop.call_later(patience_s, self.end, "stalled")

    def _check(self) -> None:
        if self._over:
            raise Unavailable(self._over)

    def end(self, reason: str) -> None:
        """No more jobs; those that it has are Unavailable."""
        if self._over:
            return
        self._over = reason
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        if self._watch is not None:
            self._watch.cancel()
        for turn in self._waiting:
            if not turn.done():
                turn.set_exception(Unavailable(reason))
        self._waiting.clear()
        for number in self._free:
            self._files[number].close()
        self._free.clear()
        for number, (answer, _) in self._jobs.items():
            if answer.done():
                self._files[number].close()
            else:
                answer.set_exception(Unavailable(reason))
        self._jobs.clear()
        self._lost(self, reason)
