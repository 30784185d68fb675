"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from server.pages.numbers import DASH, count, decimal, moment, number, p_value, percent, ticks, time_pattern

HOUR_NS = 3_600_000_000_000


@pytest.mark.parametrize("nothing", [None, math.nan, "text", True, [1]])
def test_what_is_no_number_is_a_dash(nothing: object) -> None:
    assert math.isnan(number(nothing))
    assert [decimal(nothing), percent(nothing), p_value(nothing)] == [DASH] * 3
    assert (count(nothing), moment(nothing)) == ("0", DASH)


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (decimal(-0.0), "0.000"),
        (decimal(0.00012), "0.00012"),
        (decimal(12345.6), "1.23e+04"),
        (decimal(math.inf), "inf"),
        (decimal(10**400), "inf"),
        (percent(0), "0\u00a0%"),
        (percent(0.5), "50\u00a0%"),
        (percent(1), "100\u00a0%"),
        (percent(0.00001), "<0.01\u00a0%"),
        (percent(0.12345), "12.35\u00a0%"),
        (p_value(0), "<1e-300"),
        (p_value(3e-7), "3e-07"),
        (p_value(0.25), "0.250"),
        (count(1234567), "1\u202f234\u202f567"),
        (moment(1_790_000_000_000_000_000), "2026-09-21 14:13:20"),
        (moment(2**63), "2262-04-11 23:47:16"),
        (moment(10**30), DASH),
        (moment(-1), DASH),
    ],
)
def test_written(shown: str, wanted: str) -> None:
    assert shown == wanted


@pytest.mark.parametrize("top", [1e-9, 0.013, 0.2, 1.0, 7.3, 123456.0, 1e300])
def test_ticks_are_few_and_round_and_stay_inside(top: float) -> None:
    found = ticks(top)
    assert found[0] == 0
    assert 3 <= len(found) <= 9
    assert found[-1] <= top * 1.001 < found[-1] + 2 * found[1]


@pytest.mark.parametrize("top", [0.0, -1.0, math.nan, math.inf])
def test_without_a_range_there_is_one_tick(top: float) -> None:
    assert ticks(top) == [0.0]


def test_times_are_written_as_their_span_needs() -> None:
    assert [time_pattern(span) for span in (HOUR_NS // 2, 2 * HOUR_NS, 48 * HOUR_NS)] == [
        "%H:%M:%S",
        "%H:%M",
        "%m-%d %H:%M",
    ]
