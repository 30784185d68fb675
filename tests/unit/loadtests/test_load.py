"""loadtests.load: every request once, due times that do not move, and stalls that are paid for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from loadtests.lanes import OK, Lane, Sink
from loadtests.load import UNANSWERED, UNSENT, Closed, Open, due_times

SECOND = 1_000_000_000


class LoopLane:
    """A lane whose server is this loop: answers after ``delay_s``; while ``held`` is set it answers nothing."""

    sink: Sink

    def __init__(self, width: int = 1, delay_s: float = 0.001, outcome: Callable[[int], str] = lambda _: OK) -> None:
        self.width = width
        self.delay_s = delay_s
        self.outcome = outcome
        self.held = False
        self.waiting: list[int] = []
        self.sent: list[int] = []
        self.most = self.now = 0

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def send(self, due_ns: int) -> None:
        self.sent.append(due_ns)
        self.now += 1
        self.most = max(self.most, self.now)
        if self.held:
            self.waiting.append(due_ns)
        else:
            asyncio.get_running_loop().call_later(self.delay_s, self.answer, due_ns)

    def answer(self, due_ns: int) -> None:
        self.now -= 1
        self.sink.answered(self, due_ns, self.outcome(len(self.sent)))

    def let_go(self) -> None:
        self.held = False
        waiting, self.waiting = self.waiting, []
        for due_ns in waiting:
            self.answer(due_ns)


def test_closed_keeps_every_lane_full_and_loses_nothing() -> None:
    lanes = [LoopLane(1), LoopLane(3)]
    taken = asyncio.run(Closed(lanes).run(0.0, 0.15))
    assert [lane.most for lane in lanes] == [1, 3]
    assert sum(len(lane.sent) for lane in lanes) == taken.latency.count == sum(taken.outcomes.values())
    assert 0 < taken.completed <= taken.latency.count
    assert all(lane.now == 0 for lane in lanes)


def test_the_ramp_is_not_measured() -> None:
    for _ in range(5):  # unless the machine stood still until the ramp was over
        lane = LoopLane()
        start = time.perf_counter_ns()
        taken = asyncio.run(Closed([lane]).run(0.4, 0.1))
        begin = start + SECOND * 4 // 10  # or later, if the run itself began late
        if lane.sent[0] < begin:
            break
    assert taken.latency.count <= sum(due >= begin for due in lane.sent) < len(lane.sent)


def test_outcomes_are_counted_apart_and_only_good_ones_completed() -> None:
    lane = LoopLane(outcome=lambda number: OK if number % 2 else "http 503")
    taken = asyncio.run(Closed([lane]).run(0.0, 1.0))
    assert set(taken.outcomes) == {OK, "http 503"}
    assert taken.completed <= taken.outcomes[OK]


def test_open_sends_all_that_is_due_when_it_was_meant_to() -> None:
    lanes = [LoopLane(4), LoopLane(4)]
    taken = asyncio.run(Open(lanes, 400, "constant").run(0.0, 0.25))
    sent = sorted(due for lane in lanes for due in lane.sent)
    wanted = list(due_times(400, "constant", 0.0, 0.25))
    assert [due - sent[0] for due in sent] == [due - wanted[0] for due in wanted]
    assert taken.latency.count == taken.late.count == taken.outcomes[OK] == len(wanted)


def test_a_stall_is_paid_by_all_that_were_due_meanwhile() -> None:
    """No coordinated omission: the one lane hangs for a while, and nothing that waited behind it looks quick."""

    class Hanging(LoopLane):
        def send(self, due_ns: int) -> None:
            if not self.sent:  # from here on, however late this is
                asyncio.get_running_loop().call_later(0.2, self.let_go)
            super().send(due_ns)

    async def run() -> tuple[int, float, int]:
        lane = Hanging(delay_s=0.0)
        lane.held = True
        taken = await Open([lane], 200, "constant").run(0.0, 0.3)
        delayed = taken.latency.over(int(0.05 * SECOND))
        return delayed, taken.latency.percentile(100), taken.late.over(int(0.05 * SECOND))

    delayed, longest, sent_late = asyncio.run(run())
    # 40 requests were due in 0.2 s; those due over 0.05 s before its end are 30.
    assert delayed >= 28
    assert sent_late >= 28 - 1  # all of them but the one that hung
    assert longest >= 0.19 * SECOND


def test_what_gets_no_answer_counts_with_the_time_it_waited() -> None:
    async def run() -> None:
        lane = LoopLane()
        lane.held = True
        ended: list[int] = []
        taken = await Closed([lane], on_end=lambda: ended.append(time.perf_counter_ns()), grace_s=0.05).run(0.0, 0.05)
        assert taken.outcomes == {UNANSWERED: 1}
        # What is left of the window, and the grace time; 0.1 s where the request did not leave late.
        assert taken.latency.percentile(100) >= ended[0] - lane.sent[0] + 0.04 * SECOND
        lane.let_go()  # an answer after the end changes nothing
        assert taken.latency.count == 1

    asyncio.run(run())


def test_what_never_left_counts_too() -> None:
    async def run() -> None:
        lane = LoopLane()
        lane.held = True
        taken = await Open([lane], 100, "constant", grace_s=0.02).run(0.0, 0.1)
        assert taken.outcomes == {UNANSWERED: 1, UNSENT: 8}
        assert taken.latency.count == 9

    asyncio.run(run())


def test_an_answer_too_many_is_an_error() -> None:
    class Twice(LoopLane):
        def answer(self, due_ns: int) -> None:
            super().answer(due_ns)
            with pytest.raises(RuntimeError, match="twice"):
                self.sink.answered(self, due_ns - 1, OK)

    taken = asyncio.run(Closed([Twice()]).run(0.0, 0.02))
    assert taken.outcomes[OK]


def test_begin_and_end_are_told_around_the_window() -> None:
    told: list[tuple[str, int]] = []

    def note(what: str) -> Callable[[], None]:
        return lambda: told.append((what, time.perf_counter_ns()))

    start = time.perf_counter_ns()
    taken = asyncio.run(Closed([LoopLane()], note("begin"), note("end")).run(0.02, 0.1))
    assert [what for what, _ in told] == ["begin", "end"]
    (_, begin), (_, end) = told
    assert begin - start >= 0.02 * SECOND
    assert end - start >= 0.12 * SECOND
    assert 0 < end - begin <= taken.seconds * SECOND


# --- due times ---


def test_constant_due_times_are_evenly_spaced() -> None:
    due = list(due_times(1000, "constant", 0.0, 1.0))
    assert len(due) == 999
    assert {b - a for a, b in pairwise(due)} <= {999_999, 1_000_000, 1_000_001}


def test_poisson_gaps_are_exponential_and_the_same_again() -> None:
    due = np.array(list(due_times(2000, "poisson", 0.0, 10.0, seed=4)))
    gaps = np.diff(due) / SECOND
    assert abs(len(due) - 20_000) < 5 * 20_000**0.5
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05
    assert due.tolist() == list(due_times(2000, "poisson", 0.0, 10.0, seed=4))
    assert due.tolist() != list(due_times(2000, "poisson", 0.0, 10.0, seed=5))


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
def test_the_ramp_rises_in_a_straight_line(arrivals: str) -> None:
    due = np.array(list(due_times(1000, arrivals, 4.0, 2.0))) / SECOND  # type: ignore[arg-type]
    assert np.all(np.diff(due) >= 0)
    counts = np.histogram(due, bins=[0, 1, 2, 3, 4, 5, 6])[0]
    assert np.allclose(counts, [125, 375, 625, 875, 1000, 1000], atol=130 if arrivals == "poisson" else 2)
    assert due[-1] < 6


def test_lanes_are_lanes() -> None:
    lane: Lane = LoopLane()
    assert lane.width == 1
