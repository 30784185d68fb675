"""Timers that are true to some ten microseconds, for waits of a few milliseconds and less.

Event loops keep time by the millisecond, as the system call in which they sleep does: what is asked for between two of
them comes too late, or at once. A timer of the kernel (timerfd) is a file that can be read once the time has come: the
loop watches it like a socket, and sleeps meanwhile. One such file serves all timers of a loop, and is always set to the
first of them.

Linux has them. Python has their functions from 3.13 on only, so those of the C library are called.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from heapq import heappop, heappush
from struct import Struct
from typing import Final, Protocol

_NS: Final = 10**9
_TFD_TIMER_ABSTIME: Final = 1
#: ``struct itimerspec``: the interval (0: it comes once) and the value, each in seconds and nanoseconds.
_SETTING: Final = Struct("@llll")


class Readers(Protocol):
    """What is needed of an event loop."""

    def call_soon(self, callback: Callable[[], object], /) -> object: ...
    def add_reader(self, fd: int, callback: Callable[[], object], /) -> object: ...
    def remove_reader(self, fd: int, /) -> object: ...


class FineTimer:
    """One callback to come. It is never early."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Harmless when it has come already."""
        self._callback = None

    def come(self) -> None:
        """Its time has come, unless it was cancelled."""
        if self._callback is not None:
            callback, self._callback = self._callback, None
            callback()


class FineTimers:
    """The fine timers of one loop, used on its thread only; ``fine_timers`` makes them.

    A timer that is cancelled takes its place until its time has come: for short waits that is soon.
    """

    __slots__ = ("_due", "_kernel", "_loop", "_numbers")

    def __init__(self, loop: Readers, kernel: KernelTimer) -> None:
        self._loop = loop
        self._kernel = kernel
        self._due: list[tuple[int, int, FineTimer]] = []
        self._numbers = 0
        loop.add_reader(kernel.fd, self._fire)

    def __len__(self) -> int:
        return len(self._due)

    def call_later(self, delay_ns: int, callback: Callable[[], None]) -> FineTimer:
        """Call back on a later turn of the loop, when so much time has passed."""
        timer = FineTimer(callback)
        self._numbers += 1
        entry = (time.monotonic_ns() + delay_ns, self._numbers, timer)
        heappush(self._due, entry)
        if self._due[0] is entry:
            self._kernel.set(entry[0])
        return timer

    def _fire(self) -> None:
        self._kernel.clear()
        now, due = time.monotonic_ns(), self._due
        while due and due[0][0] <= now:
            self._loop.call_soon(heappop(due)[2].come)  # one that raises does not keep the others from coming
        if due:
            self._kernel.set(due[0][0])

    def close(self) -> None:
        """Nothing comes any more. On the loop's thread, before the loop is closed; twice is harmless."""
        self._due.clear()
        if self._kernel.fd >= 0:
            self._loop.remove_reader(self._kernel.fd)
            self._kernel.close()


class KernelTimer:
    """A timerfd by the monotonic clock, as ``time.monotonic_ns`` tells it. Raises OSError where there is none."""

    __slots__ = ("_settime", "_setting", "fd")

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise OSError(f"no timerfd on {sys.platform}")
        library = ctypes.PyDLL(None, use_errno=True)  # calls too short to let others have the lock
        try:
            create, self._settime = library.timerfd_create, library.timerfd_settime
        except AttributeError:
            raise OSError("the C library has no timerfd") from None
        self._setting = ctypes.create_string_buffer(_SETTING.size)
        self.fd: int = create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        _check(self.fd)

    def set(self, at_ns: int) -> None:
        """It is to come then, or at once if that has passed, and only then."""
        _SETTING.pack_into(self._setting, 0, 0, 0, *divmod(at_ns, _NS))
        _check(self._settime(self.fd, _TFD_TIMER_ABSTIME, self._setting, None))

    def clear(self) -> None:
        """It has been seen to have come."""
        with suppress(BlockingIOError):  # it was set anew after it had come
            os.read(self.fd, 8)

    def close(self) -> None:
        os.close(self.fd)
        self.fd = -1


def fine_timers(loop: Readers) -> FineTimers | None:
    """Fine timers for a loop; None where the system has none. To be closed."""
    try:
        return FineTimers(loop, KernelTimer())
    except OSError:
        return None


def _check(result: int) -> None:
    """Raises OSError for what a C function has returned on failure."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
