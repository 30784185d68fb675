"""server.gateway.deadlines: on time, cheap to begin and to end, whatever the times are."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.gateway.deadlines import Deadlines, Timed

MS = 1_000_000
#: A loop's timers may be early by this much.
SLACK = MS


class Handle:
    def __init__(self, act: Callable[[], None]) -> None:
        self.act: Callable[[], None] | None = act

    def cancel(self) -> None:
        self.act = None


class Loop:
    """A loop's clock and timers, without the waiting. ``early_ns``: how much too early they come."""

    def __init__(self, early_ns: int = 0) -> None:
        self.now = 10**15
        self.early_ns = early_ns
        self.armed = 0  # so many timers were asked for
        self._due: list[tuple[int, int, Handle]] = []

    def clock(self) -> int:
        return self.now

    def call_later(self, seconds: float, act: Callable[[], None]) -> Handle:
        assert seconds >= 0
        self.armed += 1
        handle = Handle(act)
        heappush(self._due, (self.now + max(0, round(seconds * 1e9) - self.early_ns), self.armed, handle))
        return handle

    def run(self, until_ns: int) -> None:
        while self._due and self._due[0][0] <= until_ns:
            at, _, handle = heappop(self._due)
            self.now = max(self.now, at)
            if handle.act is not None:
                handle.act()
        self.now = until_ns

    def timers(self) -> int:
        return sum(handle.act is not None for _, _, handle in self._due)


class Call(Timed):
    """Remembers when it was told."""

    def __init__(self, loop: Loop, after: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.loop = loop
        self.told: list[int] = []
        self._after = after

    def expired(self) -> None:
        self.told.append(self.loop.now)
        self._after()


DELAYS = st.one_of(st.integers(1, 10 * MS), st.integers(1, 10**10), st.integers(1, 10**20))


@given(
    st.lists(st.tuples(st.integers(0, 10**9), DELAYS, st.one_of(st.none(), st.integers(0, 10**10))), max_size=30),
    st.sampled_from([0, SLACK - 1000]),
)
def test_who_is_still_there_is_told_once_and_on_time(plan: list[tuple[int, int, int | None]], early_ns: int) -> None:
    loop = Loop(early_ns)
    deadlines = Deadlines(loop.clock, loop.call_later)
    started: list[tuple[Call, int]] = []
    ends: list[tuple[int, int, Call]] = []
    for wait, delay, ended in plan:
        loop.run(loop.now + wait)
        call = Call(loop)
        deadlines.add(call, loop.now + delay, loop.now)
        started.append((call, loop.now + delay))
        if ended is not None and ended < delay - SLACK:
            ends.append((loop.now + ended, len(ends), call))
    gone = {id(call) for *_, call in ends}
    for at, _, call in sorted(ends):
        if at >= loop.now:
            loop.run(at)
        if call.told:
            gone.discard(id(call))  # its end was planned for a time that had passed when all had begun
        deadlines.discard(call)
        deadlines.discard(call)
    loop.run(loop.now + 10**21)
    for call, until in started:
        if id(call) in gone:
            assert call.told == []
        else:
            assert len(call.told) == 1
            assert until - SLACK <= call.told[0] <= until
        assert call.turn_ns == 0
    assert (len(deadlines), loop.timers()) == (0, 0)


def test_calls_that_end_in_time_share_few_turns_and_timers() -> None:
    loop = Loop()
    deadlines = Deadlines(loop.clock, loop.call_later)
    for _ in range(100_000):
        call = Call(loop)
        deadlines.add(call, loop.now + 5_000 * MS, loop.now)
        loop.run(loop.now + MS // 10)
        deadlines.discard(call)
    assert loop.armed < 100  # 10 s went by, in turns of half a second
    loop.run(loop.now + 10_000 * MS)
    assert (len(deadlines), loop.timers()) == (0, 0)


def test_turns_that_nobody_has_any_more_do_not_pile_up() -> None:
    chance = Random(5)
    loop = Loop()
    deadlines = Deadlines(loop.clock, loop.call_later)
    most = 0
    for _ in range(50_000):
        call = Call(loop)
        deadlines.add(call, loop.now + chance.randrange(5 * MS, 3_600_000 * MS), loop.now)
        loop.run(loop.now + MS // 10)
        deadlines.discard(call)
        most = max(most, len(deadlines._turns))
    assert most < 400  # sixteen for each doubling of the time that is left


def test_nothing_wakes_the_loop_for_turns_that_nobody_has() -> None:
    loop = Loop()
    deadlines = Deadlines(loop.clock, loop.call_later)
    calls = [Call(loop) for _ in range(40)]
    for number, call in enumerate(calls):
        deadlines.add(call, loop.now + (100 << number), loop.now)
    armed = loop.armed
    for call in calls:
        deadlines.discard(call)
    loop.run(loop.now + 10**18)
    assert loop.armed == armed


@pytest.mark.parametrize("apart", [0, 1])
def test_one_that_is_told_may_end_others(apart: int) -> None:
    loop = Loop()
    deadlines = Deadlines(loop.clock, loop.call_later)
    calls: list[Call] = []

    def end_all() -> None:
        for call in calls:
            deadlines.discard(call)

    until = loop.now + 100 * MS
    for number in range(4):
        calls.append(Call(loop, end_all))
        deadlines.add(calls[-1], until + apart * number, loop.now)
    loop.run(until + 1_000 * MS)
    assert sum(len(call.told) for call in calls) == 1
    assert (len(deadlines), loop.timers()) == (0, 0)


def test_one_that_is_told_may_begin_anew() -> None:
    loop = Loop()
    deadlines = Deadlines(loop.clock, loop.call_later)

    times = [loop.now + 50 * MS, loop.now + 90 * MS, loop.now + 91 * MS]

    def again() -> None:
        if len(call.told) < len(times):
            deadlines.add(call, times[len(call.told)], loop.now)

    call = Call(loop, again)
    deadlines.add(call, times[0], loop.now)
    loop.run(loop.now + 1_000 * MS)
    assert len(call.told) == len(times)
    assert all(0 <= until - told <= SLACK for until, told in zip(times, call.told, strict=True))
    assert (len(deadlines), loop.timers()) == (0, 0)


class Placed(Call):
    """Has its place among the others of its turn: a set of few small hashes is in their order."""

    def __init__(self, loop: Loop, place: int, after: Callable[[], None] = lambda: None) -> None:
        super().__init__(loop, after)
        self._place = place

    def __hash__(self) -> int:
        return self._place


@pytest.mark.parametrize("place", [0, 2])
def test_one_that_begins_anew_holds_up_no_other_of_its_turn(place: int) -> None:
    loop = Loop()
    deadlines = Deadlines(loop.clock, loop.call_later)

    def again() -> None:
        if len(first.told) < 2:
            deadlines.add(first, loop.now + 5_000 * MS, loop.now)

    first, other = Placed(loop, 1, again), Placed(loop, place)
    turn = (loop.now + 5_000 * MS) >> 29 << 29
    until = turn + 100 * MS
    deadlines.add(first, turn, loop.now)
    deadlines.add(other, until, loop.now)
    assert first.turn_ns == other.turn_ns
    loop.run(loop.now + 20_000 * MS)
    assert len(first.told) == 2
    assert len(other.told) == 1
    assert until - SLACK <= other.told[0] <= until
    assert (len(deadlines), loop.timers()) == (0, 0)


def test_those_that_take_long_to_be_told_hold_up_nobody() -> None:
    loop = Loop()
    deadlines = Deadlines(loop.clock, loop.call_later)

    def work() -> None:
        loop.now += 50 * MS

    until = loop.now + 700 * MS
    late = Call(loop)
    deadlines.add(late, until, loop.now)
    for _ in range(10):
        deadlines.add(Call(loop, work), loop.now + 10 * MS, loop.now)
    loop.run(until + 10_000 * MS)
    assert until - SLACK <= late.told[0] <= until
    assert (len(deadlines), loop.timers()) == (0, 0)


def test_one_that_fails_keeps_no_other_from_being_told(capsys: pytest.CaptureFixture[str]) -> None:
    loop = Loop()
    deadlines = Deadlines(loop.clock, loop.call_later)

    def fail() -> None:
        raise ValueError("its own trouble")

    calls = [Call(loop, fail) for _ in range(3)]
    for call in calls:
        deadlines.add(call, loop.now + 2 * MS, loop.now)
    loop.run(loop.now + 10 * MS)
    assert [len(call.told) for call in calls] == [1, 1, 1]
    assert "its own trouble" in "".join(capsys.readouterr())
