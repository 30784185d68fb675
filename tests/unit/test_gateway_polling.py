"""server.gateway.polling: when the loop stays awake, and when it does not."""

from __future__ import annotations

from collections.abc import Callable

from server.gateway.polling import ROW, BusyPoll

LIMIT_NS = 200_000


class Rig:
    """A loop by hand: ``turn`` runs what was asked for soon."""

    def __init__(self) -> None:
        self.now = 1_000_000
        self.soon: list[Callable[[], None]] = []
        self.poll = BusyPoll(LIMIT_NS, lambda: self.now, self.soon.append)

    def ask(self, gap_ns: int, *, alone: bool = True) -> None:
        self.now += gap_ns
        self.poll.came()
        self.now += 50_000
        self.poll.emptied(alone)

    def turn(self, took_ns: int = 10_000) -> bool:
        """Whether the loop is awake."""
        self.now += took_ns
        due = self.soon[:]
        self.soon.clear()
        for callback in due:
            callback()
        return bool(self.soon)


def test_it_begins_after_a_row_of_quick_requests_and_lasts_as_long_as_they_come() -> None:
    rig = Rig()
    rig.ask(10**9)
    for _ in range(ROW - 1):
        rig.ask(50_000)
        assert not rig.soon
    for _ in range(20):
        rig.ask(50_000)
        assert len(rig.soon) == 1
        assert rig.turn()


def test_it_does_not_stay_awake_for_an_answer() -> None:
    """Not for a model on its thread, nor for a stream that stays open: it does for what comes after the answer."""
    rig = Rig()
    for _ in range(ROW + 1):
        rig.ask(50_000)
    assert rig.turn()
    rig.poll.came()
    assert not rig.turn()
    rig.poll.emptied(True)
    assert sum(rig.turn() for _ in range(100)) == LIMIT_NS // 10_000


def test_others_beside_a_request_let_the_loop_sleep() -> None:
    rig = Rig()
    for _ in range(ROW + 1):
        rig.ask(50_000)
    rig.poll.came()
    rig.poll.emptied(False)
    assert not rig.turn()


def test_it_ends_with_the_first_request_that_does_not_come() -> None:
    rig = Rig()
    for _ in range(ROW + 1):
        rig.ask(50_000)
    assert sum(rig.turn() for _ in range(100)) == LIMIT_NS // 10_000
    rig.ask(50_000)
    assert not rig.soon  # a row is wanted again
    for _ in range(ROW):
        rig.ask(50_000)
    assert rig.turn()


def test_requests_that_come_together_or_late_keep_nobody_awake() -> None:
    rig = Rig()
    for _ in range(3 * ROW):
        rig.ask(50_000, alone=False)
        rig.ask(50_000)
    assert not rig.soon
    for _ in range(3 * ROW):
        rig.ask(LIMIT_NS + 1)
    assert not rig.soon
