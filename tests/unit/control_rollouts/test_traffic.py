"""What a plan reckons with: requests per second of a name, and how often its stable version fails."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from server.control.rollouts.traffic import Meter

S = 10**9


@dataclass(eq=False)
class Version:
    """So many attempts, so many of them failed."""

    total: int = 0
    failed: int = 0

    def attempts(self) -> tuple[int, int]:
        return self.total, self.failed


def test_the_rate_is_of_all_arms_and_errors_are_of_stable() -> None:
    meter, stable, candidate = Meter(), Version(1_000, 500), Version(7)
    assert meter.read("m") == (0.0, 0.0)
    for second in range(5):
        meter.note({"m": (stable, candidate), "n": (stable,)}, second * S)
        stable.total, stable.failed, candidate.total = stable.total + 90, stable.failed + 9, candidate.total + 10
    assert meter.read("m") == (100.0, pytest.approx(0.1))
    assert meter.read("n") == (90.0, pytest.approx(0.1))


def test_other_arms_are_counted_from_nothing_and_names_that_went_are_forgotten() -> None:
    meter, stable, candidate = Meter(), Version(), Version(50)
    meter.note({"m": (stable,)}, 0)
    meter.note({"m": (stable, candidate)}, S)
    assert meter.read("m") == (0.0, 0.0)
    candidate.total += 30
    meter.note({"m": (stable, candidate)}, 2 * S)
    assert meter.read("m") == (30.0, 0.0)
    meter.note({}, 3 * S)
    assert meter.read("m") == (0.0, 0.0)


def test_what_is_long_ago_is_forgotten() -> None:
    meter, stable = Meter(), Version()
    for second in range(200):
        stable.total += 1_000 if second < 100 else 10
        meter.note({"m": (stable,)}, second * S)
    assert meter.read("m")[0] == pytest.approx(10)


def test_notes_are_due_about_once_a_second() -> None:
    meter = Meter()
    assert meter.due(0)
    meter.note({}, 0)
    assert [meter.due(ms * 10**6) for ms in (100, 900, 1_000)] == [False, False, True]
