"""The event loop kept awake for a moment where the next request is likely to come at once.

A caller with one request in flight sends the next one some ten microseconds after its answer. Meanwhile the loop goes
to sleep, and to put a processor to sleep and wake it again costs such a request as much as all its work: caches are
cold, and a hypervisor has given the core away. So the loop asks again and again instead, for a bounded time, as
hypervisors do before they halt a guest's processor. It begins only after several requests in a row that came alone,
each soon after the answer before it, and ends with the first that does not, after which such a row is wanted again:
load that comes in batches, or now and then, never pays for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from server.types import Clock

#: So many requests in a row come soon after the answer before them, before the next one is waited for awake.
ROW: Final = 8


class BusyPoll:
    """Told when requests come where none was in flight, and when the last one in flight has ended.

    ``limit_ns`` is how long the loop stays awake for a request; what comes within it counts as soon. For an answer it
    does not stay awake: a model on a thread of its own would have to fight it for the interpreter.
    """

    __slots__ = ("_call_soon", "_clock", "_limit_ns", "_polling", "_row", "_since")

    def __init__(self, limit_ns: int, clock: Clock, call_soon: Callable[..., object]) -> None:
        self._limit_ns = limit_ns
        self._clock = clock
        self._call_soon = call_soon
        self._since = 0  # when the last request ended; 0 while one is in flight
        self._row = 0
        self._polling = False

    def came(self) -> None:
        """A request, where none was in flight."""
        soon = self._clock() - self._since <= self._limit_ns
        self._row = self._row + 1 if soon else 0
        self._since = 0

    def emptied(self, alone: bool) -> None:
        """The last request in flight has ended. ``alone``: no other came between ``came`` and this."""
        self._since = self._clock()
        if not alone:
            self._row = 0
        elif self._row >= ROW and not self._polling:
            self._polling = True
            self._call_soon(self._poll)

    def _poll(self) -> None:
        """One turn of the loop that does not sleep."""
        self._polling = self._since > 0 and self._row >= ROW and self._clock() - self._since <= self._limit_ns
        if self._polling:
            self._call_soon(self._poll)
