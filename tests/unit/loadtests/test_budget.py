"""loadtests.budget: rounds end with their number or with the time, whichever comes first."""

from __future__ import annotations

import time

from loadtests.budget import Budget


def test_as_many_rounds_as_wanted_where_there_is_time() -> None:
    assert list(Budget(60.0).rounds(3)) == [0, 1, 2]


def test_no_round_begins_that_would_not_end_in_time() -> None:
    budget = Budget(0.25)
    numbers = []
    for number in budget.rounds(100):
        numbers.append(number)
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            pass
    assert numbers in ([0], [0, 1])


def test_the_first_round_is_always_begun() -> None:
    budget = Budget(0.0)
    assert budget.left_s() == 0
    assert list(budget.rounds(5)) == [0]
