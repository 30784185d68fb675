"""How far the streams of one connection may go on sending: windows that are given back at once, or held for a while."""

from __future__ import annotations

from collections.abc import Callable


class ReceiveWindows:
    """Counts what was received and not used yet, by stream.

    A stream's window is given back as its bytes come, unless the stream is ``full`` (its reader is slow) or the
    connection has over ``limit`` unused bytes. Then only the stream that has waited longest goes on: if all of them
    waited, they would wait for each other. Those with something ``unread`` wait for their readers and are passed over,
    or all would wait for a slow one; and where nobody else is, one of which nothing is unused goes on. Neither over
    twice the limit, since each that goes on may come to wait so as well.
    """

    __slots__ = ("_full", "_give_back", "_held", "_limit", "_unread", "_unused", "total")

    def __init__(
        self,
        give_back: Callable[[int, int], None],
        full: Callable[[int], bool],
        unread: Callable[[int], bool],
        limit: int,
    ) -> None:
        self._give_back = give_back
        self._full = full
        self._unread = unread
        self._limit = limit
        self._unused: dict[int, int] = {}  # oldest first
        self._held: dict[int, int] = {}  # what was not given back, whether it was used or not
        self.total = 0

    def came(self, stream_id: int, size: int) -> None:
        """So much of a body was received."""
        self._unused[stream_id] = self._unused.get(stream_id, 0) + size
        self.total += size
        if self._may_go_on(stream_id):
            self._give_back(stream_id, size)
        else:
            self._held[stream_id] = self._held.get(stream_id, 0) + size

    def used(self, stream_id: int, size: int) -> None:
        """So much of it was used."""
        left = self._unused.get(stream_id, 0) - size
        if left > 0:
            self._unused[stream_id] = left
            self.total -= size
        else:
            self.total -= self._unused.pop(stream_id, 0)
        self.let_go()

    def keep(self, stream_id: int, size: int) -> None:
        """So much of it is still to be used, and the rest was thrown away."""
        thrown = self._unused.get(stream_id, 0) - size
        if thrown > 0:
            self.used(stream_id, thrown)

    def forget(self, stream_id: int) -> None:
        """All of it was used or thrown away, and no more comes."""
        if not self._unused and not self._held:
            return  # bodies in one piece are never counted: nearly all of them
        self.total -= self._unused.pop(stream_id, 0)
        held = self._held.pop(stream_id, 0)
        if held:
            self._give_back(stream_id, held)
        self.let_go()

    def _may_go_on(self, stream_id: int) -> bool:
        if self._full(stream_id):
            return False
        return self.total <= self._limit or stream_id == self._first()

    def _first(self) -> int:
        """Over the limit: who goes on, unless it is full. 0: nobody."""
        if self.total > 2 * self._limit:
            return next(iter(self._unused), 0)
        for stream_id in self._unused:
            if not self._unread(stream_id):
                return stream_id
        for stream_id in self._held:
            if stream_id not in self._unused:
                return stream_id
        return 0

    def let_go(self) -> None:
        """Give back what may be. To be called at times too: who begins to wait for a reader makes way for another."""
        if self._held:
            over = self.total > self._limit
            for stream_id in [self._first()] if over else list(self._held):
                if stream_id in self._held and not self._full(stream_id):
                    self._give_back(stream_id, self._held.pop(stream_id))
