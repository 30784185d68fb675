"""router.window: what is counted leaves when the window has passed."""

from __future__ import annotations

import pytest

from router.window import SlidingCounts

S = 1_000_000_000


def totals(counts: SlidingCounts, now_ns: int) -> tuple[int, int]:
    counts.advance(now_ns)
    return counts.first, counts.second


def test_counts_stay_for_the_window_and_leave_within_a_bucket_more() -> None:
    counts = SlidingCounts(10 * S, 10)
    counts.add(3, 1, 5 * S + S // 2)
    assert totals(counts, 15 * S + S // 2) == (3, 1)
    assert totals(counts, 16 * S) == (0, 0)


def test_buckets_leave_one_by_one() -> None:
    counts = SlidingCounts(10 * S, 10)
    for second in range(100, 120):
        counts.add(1, 0, second * S)
    assert totals(counts, 119 * S) == (11, 0)
    assert totals(counts, 124 * S) == (6, 0)
    assert totals(counts, 10_000 * S) == (0, 0)


def test_a_long_pause_and_a_clock_that_goes_back() -> None:
    counts = SlidingCounts(10 * S, 10)
    counts.add(5, 5, 1_000_000 * S)
    counts.add(1, 0, 999_000 * S)
    assert totals(counts, 1_000_000 * S) == (6, 5)
    counts.add(1, 1, 2_000_000 * S)
    assert totals(counts, 2_000_000 * S) == (1, 1)


def test_clear() -> None:
    counts = SlidingCounts(S, 10)
    counts.add(1, 1, 0)
    counts.clear()
    assert totals(counts, S // 2) == (0, 0)


@pytest.mark.parametrize(("window", "buckets"), [(0, 1), (5, 10), (10, 0)])
def test_windows_without_time(window: int, buckets: int) -> None:
    with pytest.raises(ValueError, match="at least one bucket"):
        SlidingCounts(window, buckets)
