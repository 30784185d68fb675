"""Writing over TLS no faster than the peer reads.

What is written to a TLS transport is encrypted at once and given to the socket's transport below, where no one sees it:
neither flow control nor the size of the write buffer tell that a large answer is still waiting there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from server.types import Buffer

#: Handed on at once, and what TLS may hold before it says that the socket takes no more.
_PIECE_BYTES: Final = 256 * 1024
_HIGH_BYTES: Final = 64 * 1024


class PacedTransport(asyncio.Transport):
    """In front of a TLS transport: keeps what is written while writing is paused, and hands it on in pieces.

    The protocol says so by ``pause`` and ``resume``, from its own ``pause_writing`` and ``resume_writing``.
    """

    def __init__(self, transport: Any) -> None:
        super().__init__()
        self._transport = transport
        self._waiting: deque[memoryview] = deque()
        self._size = 0
        self._paused = False
        self._ending = False
        transport.set_write_buffer_limits(high=_HIGH_BYTES)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def can_write_eof(self) -> bool:
        """TLS has no half-closed connections."""
        return False

    def write(self, data: Buffer) -> None:
        if len(data) <= _PIECE_BYTES and not self._waiting:
            self._transport.write(data)
        else:
            self.writelines([data])

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        if self.is_closing():
            return
        for data in list_of_data:
            view = memoryview(data).cast("B")
            self._waiting.extend(view[i : i + _PIECE_BYTES] for i in range(0, len(view), _PIECE_BYTES))
            self._size += len(view)
        self._push()

    def pause(self) -> None:
        """The socket takes no more."""
        self._paused = True

    def resume(self) -> bool:
        """The socket takes more. False: it was filled again from what waited."""
        self._paused = False
        self._push()
        return not self._paused

    def drop(self) -> None:
        """The connection is lost: hold nothing more for it."""
        self._ending = True
        self._waiting.clear()
        self._size = 0

    def _push(self) -> None:
        if self._transport.is_closing():
            self.drop()
        while self._waiting and not self._paused:
            piece = self._waiting.popleft()
            self._size -= len(piece)
            self._transport.write(piece)  # may pause
        if self._ending and not self._waiting:
            self._transport.close()

    def get_write_buffer_size(self) -> int:
        return self._size + int(self._transport.get_write_buffer_size())

    def is_closing(self) -> bool:
        return self._ending or bool(self._transport.is_closing())

    def close(self) -> None:
        """After what waits."""
        self._ending = True
        self._push()

    def abort(self) -> None:
        self.drop()
        self._transport.abort()
