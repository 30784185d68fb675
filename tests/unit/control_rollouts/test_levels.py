"""What level gates are held against: the right window of the right rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from server.control.rollouts.evidence import Reading
from server.control.rollouts.levels import read_level


def window(rows: int, psi: float, arm: str = "candidate", **changes: Any) -> dict[str, Any]:
    scores = [{"psi": psi / 2, "ks_low": 0.1}, {"psi": psi, "ks_low": 0.3}]
    values = {"arm": arm, "rows": rows, "full": True, "start_ns": 100, "end_ns": 200, "scores": scores}
    return values | changes


def test_the_widest_full_window_and_the_column_that_drifted_most() -> None:
    windows = [window(100, 0.2), window(1_000, 0.4), window(9_000, 0.9, full=False)]
    assert read_level(windows, "psi", 100) == Reading(0.4, 200)
    assert read_level(windows, "ks", 100) == Reading(0.3, 200)


@pytest.mark.parametrize(
    "windows",
    [
        [],
        [window(0, 0.4)],
        [window(100, 0.4, full=False)],
        [window(100, 0.4, "pinned")],
        [window(100, 0.4, start_ns=99)],
        [window(100, math.nan, scores=[{"psi": math.nan}])],
    ],
)
def test_what_says_nothing(windows: list[dict[str, Any]]) -> None:
    assert read_level(windows, "psi", 100) is None


def test_of_two_arms_the_one_that_is_served_now() -> None:
    """After the promotion the candidate answers as stable; what it had as candidate stands still."""
    before, after = window(1_000, 0.1), window(100, 0.7, "stable", end_ns=300)
    assert read_level([before, after], "psi", 100) == Reading(0.7, 300)
    assert read_level([before, after | {"full": False}], "psi", 100) is None
