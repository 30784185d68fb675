"""Snapshots merge by addition, exactly, and refuse what does not fit together."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.telemetry.metrics import MetricsRegistry
from server.telemetry.snapshot import Exemplar, FamilySnapshot, HistogramValue, Snapshot, merge

observations = st.lists(st.integers(0, 3_000), max_size=30)


def page(values: list[int], model: str = "m") -> Snapshot:
    registry = MetricsRegistry()
    registry.counter("seen_total", "Seen.", ("model",)).labels(model).inc(len(values))
    histogram = registry.histogram("size", "Size.", ("model",), (10, 100, 1000)).labels(model)
    for value in values:
        histogram.observe(value)
    return registry.snapshot()


@given(observations, observations, observations)
def test_merging_parts_equals_counting_the_whole(a: list[int], b: list[int], c: list[int]) -> None:
    assert merge([page(a), page(b), page(c)]) == page(a + b + c)
    assert merge([merge([page(a), page(b)]), page(c)]) == merge([page(a), merge([page(b), page(c)])])


def test_series_of_different_labels_stand_side_by_side() -> None:
    merged = {family.name: family for family in merge([page([1], "a"), page([1, 2], "b")])}
    assert merged["seen_total"].points == {("a",): 1, ("b",): 2}


def test_merging_leaves_its_parts_alone() -> None:
    part = page([5])
    merge([part, page([7])])
    assert part == page([5])


def test_gauges_may_ask_for_the_smallest_or_largest() -> None:
    def gauge(how: str, value: float) -> Snapshot:
        return [FamilySnapshot("g", "", "gauge", (), {(): value}, how)]  # type: ignore[arg-type]

    assert [merge([gauge(how, 3), gauge(how, 5)])[0].points[()] for how in ("sum", "min", "max")] == [8, 3, 5]


def test_the_later_exemplar_of_a_bucket_stays() -> None:
    left, right = Exemplar(1, 1, 5, 1.0), Exemplar(2, 2, 6, 2.0)
    one = HistogramValue((10,), 1, (1, 0), 5, {0: left})
    assert (one + replace(one, exemplars={0: right})).exemplars == {0: right}


def test_what_does_not_fit_is_refused() -> None:
    counter = FamilySnapshot("x", "", "counter", ("a",), {("1",): 1})
    with pytest.raises(ValueError, match="different kind or labels"):
        merge([[counter], [replace(counter, kind="gauge")]])
    with pytest.raises(ValueError, match="different kind or labels"):
        merge([[counter], [replace(counter, label_names=("b",))]])
    with pytest.raises(ValueError, match="different bounds"):
        HistogramValue((1,), 1, (0, 0), 0) + HistogramValue((2,), 1, (0, 0), 0)
    mixed = replace(counter, points={("1",): HistogramValue((1,), 1, (0, 0), 0)})
    with pytest.raises(ValueError, match="cannot be merged with a number"):
        merge([[counter], [mixed]])
