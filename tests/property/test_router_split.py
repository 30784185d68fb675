"""Layouts under any weights: they cover everything once, arms hold exactly their share, growth is monotone."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from router.policy.base import SPACE, Span, positions
from router.policy.split import layout, widths
from router.types import FULL_SHARE, Arm, ExperimentSplit
from tests.support.routes import rollout, to


@st.composite
def rollout_weights(draw: st.DrawFn) -> list[int]:
    count = draw(st.integers(1, 6))
    return draw(st.lists(st.integers(0, FULL_SHARE // count), min_size=count, max_size=count))


@st.composite
def experiments(draw: st.DrawFn) -> tuple[int, ...]:
    cuts = sorted(draw(st.lists(st.integers(0, FULL_SHARE), max_size=5)))
    return tuple(b - a for a, b in pairwise([0, *cuts, FULL_SHARE]))


def covered_once(spans: tuple[Span, ...]) -> None:
    assert spans[0].start == 0
    assert spans[-1].end == SPACE
    assert all(a.end == b.start and a.arm != b.arm for a, b in pairwise(spans))
    assert all(span.width > 0 for span in spans)


def ground(spans: tuple[Span, ...], arm: str) -> tuple[Span, ...]:
    return tuple(span for span in spans if span.arm == arm)


@given(rollout_weights(), st.booleans())
def test_a_rollout_covers_everything_once_and_exactly(weights: list[int], control: bool) -> None:
    spans = layout(rollout(*weights, control=control))
    covered_once(spans)
    held = widths(spans)
    assert all(held[f"a{n}"] == positions(weight) for n, weight in enumerate(weights, start=2))


@given(rollout_weights())
def test_controls_take_from_stable_only_and_as_much_as_there_is(weights: list[int]) -> None:
    plain, matched = layout(rollout(*weights)), layout(rollout(*weights, control=True))
    held = widths(matched)
    left = widths(plain)["stable"]
    for n, weight in enumerate(weights, start=2):
        assert ground(plain, f"a{n}") == ground(matched, f"a{n}")
        assert held[f"c{n}"] == min(positions(weight), left)
        left -= held[f"c{n}"]
    assert held["stable"] == left


@given(rollout_weights(), st.data())
def test_an_arm_that_grows_keeps_its_ground_and_no_other_moves(weights: list[int], data: st.DataObject) -> None:
    grows = data.draw(st.integers(0, len(weights) - 1))
    larger = list(weights)
    larger[grows] = data.draw(st.integers(weights[grows], FULL_SHARE // len(weights)))
    before, after = layout(rollout(*weights)), layout(rollout(*larger))
    for n in range(2, len(weights) + 2):
        old, new = ground(before, f"a{n}"), ground(after, f"a{n}")
        if n != grows + 2:
            assert old == new
        elif old:
            assert (new[0].start, new[0].end >= old[0].end) == (old[0].start, True)


@given(experiments(), st.integers(0, FULL_SHARE), st.integers(0, FULL_SHARE))
def test_an_experiment_covers_everything_once_and_coverage_only_extends_arms(
    weights: tuple[int, ...], one: int, other: int
) -> None:
    arms = tuple(Arm(f"a{n}", to(str(n)), weight) for n, weight in enumerate(weights, start=2))
    small, large = (layout(ExperimentSplit("e", arms, coverage)) for coverage in sorted((one, other)))
    covered_once(small)
    covered_once(large)
    held = widths(large)
    for arm in arms:
        assert held[arm.name] == positions(arm.weight) * max(one, other) // FULL_SHARE
        for old in ground(small, arm.name):
            assert any(new.start == old.start and new.end >= old.end for new in ground(large, arm.name))
