"""When the time of calls is up: nearly all of them end long before, so to begin and to end one has to be cheap.

A timer of the loop costs as much as routing the call. So calls whose time is up at about the same moment share a turn:
they are looked at when it comes, an eighth of their time before at most, and those that are still there get a finer
one. Only what has a few milliseconds left has a turn of its own. One timer of the loop is set to the first turn.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

import structlog

from server.batching.batcher import CallLater, TimerHandle
from server.types import Clock

log: Any = structlog.get_logger("gateway")

#: From here on a turn is the very time that was asked for.
_EXACT_NS: Final = 4_000_000
#: A turn is as long as an eighth of what is left, or less.
_FINER_BITS: Final = 3
#: Loops keep time by the millisecond: what comes so soon is due.
_SLACK_NS: Final = 1_000_000


class Timed:
    """Something that ends by ``until_ns``. Its turn is the business of :class:`Deadlines`; 0: it has none."""

    __slots__ = ("turn_ns", "until_ns")

    def __init__(self) -> None:
        self.until_ns = 0
        self.turn_ns = 0

    def expired(self) -> None:
        """Its time is up. It has no turn any more."""


class Deadlines:
    """Who is to be told when, by one loop's time. ``clock`` is monotonic ns; used on the loop's thread only."""

    __slots__ = ("_armed", "_armed_ns", "_call_later", "_clock", "_members", "_turns")

    def __init__(self, clock: Clock, call_later: CallLater) -> None:
        self._clock = clock
        self._call_later = call_later
        self._members: dict[int, set[Timed]] = {}  # by turn
        self._turns: list[int] = []  # the same turns, a heap
        self._armed: TimerHandle | None = None
        self._armed_ns = 0

    def __len__(self) -> int:
        return sum(map(len, self._members.values()))

    def add(self, timed: Timed, until_ns: int, now_ns: int) -> None:
        """Tell it at ``until_ns`` or within a millisecond before. It is not to be in here yet."""
        timed.until_ns = until_ns
        turn = self._seat(timed, until_ns, now_ns)
        if self._armed is None or turn < self._armed_ns:
            self._arm(now_ns)

    def discard(self, timed: Timed) -> None:
        """It is over. Harmless when it is not in here."""
        turn = timed.turn_ns
        if turn:
            timed.turn_ns = 0
            members = self._members.get(turn)
            if members is not None:  # else its turn has come, and one before it ends it
                members.discard(timed)

    def _seat(self, timed: Timed, until_ns: int, now_ns: int) -> int:
        left, turn = until_ns - now_ns, until_ns
        if left > _EXACT_NS:
            bits = left.bit_length() - 1 - _FINER_BITS
            turn = until_ns >> bits << bits
        timed.turn_ns = turn
        members = self._members.get(turn)
        if members is None:
            self._members[turn] = {timed}
            heappush(self._turns, turn)
        else:
            members.add(timed)
        return turn

    def _arm(self, now_ns: int) -> None:
        if self._armed is not None:
            self._armed.cancel()
        self._armed_ns = self._turns[0]
        self._armed = self._call_later(max(0, self._armed_ns - now_ns) / 1e9, self._come)

    def _come(self) -> None:
        """The first turn has come, and maybe others with it."""
        self._armed = None
        now = self._clock()
        turns, members = self._turns, self._members
        while turns and (turns[0] <= now + _SLACK_NS or not members[turns[0]]):
            turn = heappop(turns)
            for timed in members.pop(turn):
                if timed.turn_ns == turn:
                    timed.turn_ns = 0
                    if timed.until_ns <= now + _SLACK_NS:
                        self._tell(timed.expired)
                    else:
                        self._seat(timed, timed.until_ns, now)
        # One that was told may have begun something else, and armed for it before others were seated.
        if turns and (self._armed is None or turns[0] < self._armed_ns):
            self._arm(self._clock())  # not ``now``: those that were told have taken their time

    def _tell(self, expired: Callable[[], None]) -> None:
        try:
            expired()
        except Exception as error:  # the boundary of one call: the others are told all the same
            log.error("request_failed", exc_info=error)
