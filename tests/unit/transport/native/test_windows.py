"""Receive windows: given back while there is room, held for slow readers, never lost."""

from __future__ import annotations

import random
from collections import Counter

from server.transport.native.windows import ReceiveWindows


class Book:
    """Windows with their ledger."""

    def __init__(self, limit: int) -> None:
        self.full: set[int] = set()
        self.unread: set[int] = set()
        self.given: Counter[int] = Counter()
        self.windows = ReceiveWindows(self._give, self.full.__contains__, self.unread.__contains__, limit)

    def _give(self, stream_id: int, size: int) -> None:
        self.given[stream_id] += size


def test_windows_are_given_back_at_once() -> None:
    book = Book(100)
    book.windows.came(1, 60)
    assert (book.given[1], book.windows.total) == (60, 60)
    book.windows.used(1, 20)
    assert book.windows.total == 40
    book.windows.forget(1)
    assert book.windows.total == 0


def test_over_the_limit_only_the_oldest_goes_on() -> None:
    book = Book(100)
    book.windows.came(1, 80)
    book.windows.came(3, 40)
    book.windows.came(1, 50)
    assert book.given == {1: 130}
    book.windows.forget(1)
    assert book.given == {1: 130, 3: 40}


def test_a_full_stream_waits_for_its_reader() -> None:
    book = Book(100)
    book.full.add(1)
    book.windows.came(1, 30)
    book.windows.came(3, 30)
    assert book.given == {3: 30}
    book.full.clear()
    book.windows.used(1, 10)
    assert book.given == {3: 30, 1: 30}


def test_over_the_limit_who_waits_for_a_reader_is_passed_over() -> None:
    """Else all would wait for that reader. Each that goes on may come to wait so, and so there is an end to it."""
    book = Book(100)
    book.windows.came(1, 70)
    book.unread.add(1)
    book.windows.came(3, 40)
    book.windows.came(5, 30)
    assert book.given == {1: 70, 3: 40}
    book.unread.add(3)
    book.windows.used(1, 10)
    assert book.given == {1: 70, 3: 40, 5: 30}
    book.windows.came(5, 80)
    assert book.windows.total == 210
    assert book.given == {1: 70, 3: 40, 5: 30}
    book.windows.used(1, 20)
    assert book.given == {1: 70, 3: 40, 5: 110}
    book.windows.came(7, 5)
    book.unread.add(5)
    book.windows.let_go()
    assert book.given == {1: 70, 3: 40, 5: 110, 7: 5}


def test_over_the_limit_one_with_nothing_unused_does_not_wait_for_readers() -> None:
    book = Book(100)
    book.windows.came(1, 60)
    book.unread.add(1)
    book.windows.came(3, 50)
    book.windows.came(5, 30)
    book.windows.used(5, 30)
    assert book.given == {1: 60, 3: 50}
    book.unread.add(3)
    book.windows.let_go()
    assert book.given == {1: 60, 3: 50, 5: 30}


def test_what_was_thrown_away_holds_nobody_up() -> None:
    book = Book(100)
    book.windows.came(1, 90)
    book.windows.came(3, 40)
    assert book.given == {1: 90}
    book.windows.keep(1, 95)
    book.windows.keep(5, 10)
    assert (book.windows.total, book.given) == (130, {1: 90})
    book.windows.keep(1, 20)
    assert (book.windows.total, book.given) == (60, {1: 90, 3: 40})
    book.windows.keep(1, 0)
    assert book.windows.total == 40


def test_a_long_stream_that_is_read_counts_what_is_unread_only() -> None:
    """Else a busy stream would look like one that hoards, and its neighbours would wait."""
    book = Book(100)
    for _ in range(1000):
        book.windows.came(1, 30)
        book.windows.used(1, 29)
        book.windows.used(1, 1)
    book.windows.came(1, 90)
    book.windows.came(3, 10)
    assert book.given[3] == 10
    assert book.windows.total == 100


def test_nothing_is_lost_or_given_twice() -> None:
    """Whatever the order, what came is given back exactly once by the time that all streams are over."""
    for seed in range(200):
        rng = random.Random(seed)
        book, came, unread = Book(200), Counter[int](), Counter[int]()
        for _ in range(200):
            stream_id = rng.randrange(6)
            match rng.randrange(5):
                case 0 | 1:
                    size = rng.randrange(1, 60)
                    came[stream_id] += size
                    unread[stream_id] += size
                    book.windows.came(stream_id, size)
                case 2:
                    size = rng.randrange(unread[stream_id] + 1)
                    unread[stream_id] -= size
                    book.windows.used(stream_id, size)
                case 3:
                    unread[stream_id] = 0
                    book.windows.forget(stream_id)
                case _:
                    rng.choice((book.full, book.unread)).__ixor__({stream_id})
            assert book.windows.total == unread.total()
            assert all(book.given[i] <= came[i] for i in came)
        book.full.clear()
        for stream_id in range(6):
            book.windows.forget(stream_id)
        assert +book.given == +came
        assert book.windows.total == 0
