"""Counters, gauges, histograms and their registry."""

from __future__ import annotations

import bisect
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.telemetry.metrics import DURATION_BOUNDS_NS, ROWS_BOUNDS, MetricsRegistry
from server.telemetry.snapshot import FamilySnapshot, HistogramValue


def by_name(registry: MetricsRegistry) -> dict[str, FamilySnapshot]:
    return {family.name: family for family in registry.snapshot()}


def test_counters_and_gauges_keep_their_number() -> None:
    registry = MetricsRegistry()
    counter = registry.counter("c_total", "C.", ("k",))
    gauge = registry.gauge("g", "G.").labels()
    counter.labels("a").inc()
    counter.labels("a").inc(4)
    counter.labels("b").inc(2)
    gauge.set(7)
    gauge.inc(3)
    gauge.dec()
    families = by_name(registry)
    assert families["c_total"].points == {("a",): 5, ("b",): 2}
    assert families["g"].points == {(): 9}


def test_a_child_is_bound_once() -> None:
    family = MetricsRegistry().counter("c_total", "C.", ("k", "l"))
    assert family.labels("a", "b") is family.labels("a", "b")
    assert family.labels("a", "b") is not family.labels("b", "a")


#: On bounds, and beside them.
AT_BOUNDS = [bound + step for bound in DURATION_BOUNDS_NS for step in (-1, 0, 1)]


@given(st.lists(st.integers(-5, 40 * 10**9) | st.sampled_from(AT_BOUNDS) | st.sampled_from([0, 1, 2**70]), max_size=50))
def test_a_histogram_counts_each_value_in_its_inclusive_bucket(values: list[int]) -> None:
    histogram = MetricsRegistry().histogram("h", "H.", (), DURATION_BOUNDS_NS, 10**9).labels()
    for value in values:
        histogram.observe(value)
    read = histogram.read()
    assert isinstance(read, HistogramValue)
    expected = [0] * (len(DURATION_BOUNDS_NS) + 1)
    for value in values:
        expected[sum(bound < value for bound in DURATION_BOUNDS_NS)] += 1
    assert list(read.counts) == expected
    assert (read.count, read.total) == (len(values), sum(values))


def test_a_value_on_a_bound_belongs_below_it() -> None:
    histogram = MetricsRegistry().histogram("h", "H.", (), (10, 20)).labels()
    for value in (10, 11, 20, 21):
        histogram.observe(value)
    read = histogram.read()
    assert isinstance(read, HistogramValue)
    assert read.counts == (1, 2, 1)


def test_default_bounds_ascend_and_cover_a_gateway() -> None:
    assert (DURATION_BOUNDS_NS[0], DURATION_BOUNDS_NS[-1]) == (10_000, 30 * 10**9)
    assert list(DURATION_BOUNDS_NS) == sorted(set(DURATION_BOUNDS_NS))
    assert bisect.bisect_left(ROWS_BOUNDS, 1) == 0
    assert ROWS_BOUNDS[-1] == 1024


def test_a_traced_observation_is_its_buckets_exemplar() -> None:
    histogram = MetricsRegistry().histogram("h", "H.", (), (10, 20)).labels()
    histogram.observe(5)
    histogram.observe_traced(15, 7, 8)
    histogram.observe_traced(16, 9, 10)
    read = histogram.read()
    assert isinstance(read, HistogramValue)
    assert read.counts == (1, 2, 0)
    assert {index: (e.trace_id, e.span_id, e.value) for index, e in read.exemplars.items()} == {1: (9, 10, 16)}


def test_a_snapshot_does_not_move() -> None:
    registry = MetricsRegistry()
    child = registry.histogram("h", "H.", (), (10,)).labels()
    child.observe(1)
    before = registry.snapshot()
    child.observe_traced(1, 2, 3)
    value = before[0].points[()]
    assert isinstance(value, HistogramValue)
    assert (value.count, value.exemplars) == (1, {})


def test_collectors_are_asked_at_each_snapshot() -> None:
    registry = MetricsRegistry()
    waiting = [3]
    registry.collect(lambda: [FamilySnapshot("waiting", "W.", "gauge", (), {(): waiting[0]})])
    assert by_name(registry)["waiting"].points == {(): 3}
    waiting[0] = 4
    assert by_name(registry)["waiting"].points == {(): 4}


def test_a_model_that_is_gone_is_forgotten() -> None:
    registry = MetricsRegistry()
    route = registry.counter("route_total", "R.", ("model", "version", "arm"))
    other = registry.counter("other_total", "O.", ("reason",))
    other.labels("m").inc()
    for version, arm in (("1", "a"), ("1", "b"), ("2", "a")):
        route.labels("m", version, arm).inc()
    registry.forget(model="m", version="1")
    families = by_name(registry)
    assert set(families["route_total"].points) == {("m", "2", "a")}
    assert families["other_total"].points == {("m",): 1}


@pytest.mark.parametrize("name", ["", "1st", "with-dash", "with space", "taken"])
def test_malformed_or_repeated_names_are_refused(name: str) -> None:
    registry = MetricsRegistry()
    registry.gauge("taken", "")
    with pytest.raises(ValueError, match="malformed or taken"):
        registry.counter(name, "")


@pytest.mark.parametrize("label", ["le", "__name__", "a-b", ""])
def test_malformed_or_reserved_labels_are_refused(label: str) -> None:
    with pytest.raises(ValueError, match="label"):
        MetricsRegistry().counter("c", "", (label,))


def test_the_number_of_label_values_must_fit() -> None:
    with pytest.raises(ValueError, match="got 1 values"):
        MetricsRegistry().counter("c", "", ("a", "b")).labels("x")


@pytest.mark.parametrize("bounds", [(), (2, 1), (1, 1)])
def test_bounds_must_ascend(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        MetricsRegistry().histogram("h", "", (), bounds)


def test_a_page_can_be_read_while_another_thread_writes() -> None:
    registry = MetricsRegistry()
    family = registry.counter("c_total", "C.", ("k",))

    done = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        while not done.is_set():
            family.labels(str(written % 3_000)).inc()
            written += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(100):
            registry.render()
    finally:
        done.set()
        writer.join()
    assert written > 0
    assert sum(value for value in by_name(registry)["c_total"].points.values() if isinstance(value, int)) == written
