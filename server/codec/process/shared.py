"""Memory that the gateway and the codec process share, as an anonymous file that both read and write.

It is never mapped: whoever finds less in it than was promised gets an error and no signal, and the kernel copies
without the interpreter's lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from server.codec.process.steps import Steps
from server.types import Buffer

#: Copied in one step: a fraction of a millisecond.
_STEP_BYTES: Final = 1024 * 1024
#: Memory that stays when a larger message is over: to be given pages anew costs as much as the copy.
_KEPT_BYTES: Final = 4 * 1024 * 1024


class CutOffError(Exception):
    """Less is there than was promised: the other side gave the message up."""


class SharedFile:
    """One message at a time, in either direction."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls) -> SharedFile:
        """Raises OSError where the system gives none."""
        return cls(os.memfd_create("tidegate-codec"))

    def write(self, chunks: Iterable[Buffer]) -> Steps[int]:
        """Put one chunk behind the other, from the start; the size of all. Raises OSError when memory is short."""
        position = step = 0
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                written = os.pwrite(self.fd, rest[: _STEP_BYTES - step], position)
                rest = rest[written:]
                position += written
                step += written
                if step >= _STEP_BYTES:
                    step = 0
                    yield
        return position

    def read(self, size: int) -> Steps[memoryview]:
        """The first ``size`` bytes, in memory of the reader's own. Raises CutOffError when there are fewer."""
        whole = memoryview(bytearray(size))
        position = 0
        while position < size:
            got = os.preadv(self.fd, [whole[position : position + _STEP_BYTES]], position)
            if not got:
                raise CutOffError(f"{position} of {size} bytes")
            position += got
            if position < size:
                yield
        return whole.toreadonly()

    def trim(self, size: int) -> None:
        """Give back the memory of a large message of ``size`` bytes that is over."""
        if size > _KEPT_BYTES:
            os.ftruncate(self.fd, _KEPT_BYTES)

    def empty(self) -> None:
        """Give up what is in it: who was to read it finds it cut off."""
        os.ftruncate(self.fd, 0)

    def close(self) -> None:
        os.close(self.fd)
