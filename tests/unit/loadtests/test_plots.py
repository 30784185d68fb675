"""loadtests.plots: one page, complete in itself, that says what the result says."""

from __future__ import annotations

import math
import re

import numpy as np

from loadtests.crew import Sample
from loadtests.histogram import Histogram
from loadtests.plots import curve, page_of
from tests.unit.loadtests.test_results import result, sample


def test_the_page_needs_nothing_else() -> None:
    page = page_of(result("a <b> run", native=[sample(), sample(120)], floor=[sample(900)]))
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"(?:src|href)\s*=|url\(|@import", page)
    assert "a &lt;b&gt; run" in page
    assert "<b>" not in page
    assert page.count('class="c0"') == page.count('class="c1"') == 1
    for word in ("native", "floor", "99%", "server CPU", "good answers a second"):
        assert word in page


def test_empty_cells_are_left_out_and_nothing_breaks() -> None:
    empty = Sample(1.0, 0, {}, Histogram())
    page = page_of(result(a=[empty]))
    assert "Latency by percentile" not in page
    assert "nan" not in page.partition("<script>")[0].lower()


def test_many_columns_share_colours() -> None:
    page = page_of(result(**{f"c{number}": [sample()] for number in range(11)}))
    assert 'class="c8"' not in page


def test_curve_is_the_tail_of_the_distribution() -> None:
    histogram = Histogram()
    values = np.random.default_rng(1).integers(10**6, 10**8, 1000)
    for value in values.tolist():
        histogram.record(value)
    points = curve(histogram)
    assert points[0][0] == 0
    assert points == sorted(points)
    assert math.isclose(points[-1][0], 3)
    assert points[-1][1] == values.max() / 1e6
    median = max(ms for decades, ms in points if decades <= -math.log10(0.5))
    assert math.isclose(median, np.median(values) / 1e6, rel_tol=0.02)
