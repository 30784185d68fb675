"""router.policy.split: where arms lie, what growth takes, and how well real keys follow the weights."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, permutations
from typing import Any

import pytest

from router.compiled import CompiledRoutes
from router.errors import BadRoutes
from router.policy.base import SPACE, Span, positions
from router.policy.split import layout, percent, widths
from router.types import Arm, ExperimentSplit, RolloutSplit
from tests.support.routes import ask, rollout, routes, to

KEYS = [f"user-{number}" for number in range(100_000)]


def experiment(coverage: int, *weights: int) -> ExperimentSplit[str]:
    arms = enumerate(weights, start=1)
    return ExperimentSplit("e", tuple(Arm(f"a{n}", to(str(n)), w) for n, w in arms), coverage)


def arms_of(split: Any, keys: list[str] = KEYS) -> list[str]:
    compiled = CompiledRoutes("m", routes(split=split))
    return [compiled.decide(ask(key), 0, 1).arm for key in keys]


#: Chi-square exceeds these with a chance of 1 in 1000, by degrees of freedom.
CRITICAL = {1: 10.828, 6: 22.458}


def follows(found: list[int], expected: list[float]) -> bool:
    statistic = sum((count - wanted) ** 2 / wanted for count, wanted in zip(found, expected, strict=True))
    return statistic < CRITICAL[len(found) - 1]


def within_three_sigma(count: int, share: float, total: int = len(KEYS)) -> bool:
    return abs(count - share * total) <= 3 * (total * share * (1 - share)) ** 0.5


# --- layouts ---


def test_no_split_is_all_stable() -> None:
    assert layout(None) == (Span(0, SPACE, "stable"),)


def test_one_arm_holds_the_first_part() -> None:
    edge = positions(1_000)
    assert layout(rollout(1_000)) == (Span(0, edge, "a2"), Span(edge, SPACE, "stable"))


def test_each_arm_begins_at_its_home() -> None:
    spans = layout(rollout(1_000, 2_000, 0))
    assert [(span.start, span.arm) for span in spans] == [
        (0, "a2"),
        (positions(1_000), "stable"),
        (SPACE // 3, "a3"),
        (SPACE // 3 + positions(2_000), "stable"),
    ]


def test_the_whole_and_nothing() -> None:
    assert layout(rollout(10_000)) == (Span(0, SPACE, "a2"),)
    assert layout(rollout(0, 0)) == (Span(0, SPACE, "stable"),)


def test_a_control_is_as_large_as_its_arm_and_right_behind_it() -> None:
    spans = layout(rollout(1_000, control=True))
    assert spans[:2] == (Span(0, positions(1_000), "a2"), Span(positions(1_000), 2 * positions(1_000), "c2"))
    assert widths(spans)["stable"] == SPACE - 2 * positions(1_000)


def test_controls_go_on_behind_the_next_arm_and_round_the_end() -> None:
    held = widths(layout(rollout(4_000, 500, control=True)))
    assert held["c2"] == held["a2"] == positions(4_000)
    assert held["c3"] == held["a3"] == positions(500)
    held = widths(layout(rollout(500, 4_500, control=True)))
    assert held["c3"] == positions(4_500)


def test_controls_make_do_with_what_is_left() -> None:
    held = widths(layout(rollout(7_000, control=True)))
    assert held["c2"] == SPACE - positions(7_000)
    assert held["stable"] == 0


def test_an_experiments_arms_begin_at_the_sum_of_the_weights_before() -> None:
    spans = [span for span in layout(experiment(2_000, 5_000, 2_500, 2_500)) if span.arm != "stable"]
    assert [(span.arm, span.start) for span in spans] == [("a1", 0), ("a2", SPACE // 2), ("a3", SPACE // 4 * 3)]
    assert [span.width for span in spans] == [positions(n) * 2_000 // 10_000 for n in (5_000, 2_500, 2_500)]
    assert widths(layout(experiment(10_000, 5_000, 5_000)))["stable"] == 0


# --- keys ---


@pytest.mark.parametrize("weight", [100, 1_000, 2_500, 5_000])
def test_keys_follow_the_weights(weight: int) -> None:
    found = Counter(arms_of(rollout(weight)))
    assert follows([found["a2"], found["stable"]], [weight * 10, len(KEYS) - weight * 10])


@pytest.mark.parametrize("weight", [100, 1_000, 2_500, 5_000])
def test_even_draws_follow_the_weights_exactly(weight: int) -> None:
    compiled = CompiledRoutes("m", routes(split=rollout(weight, weight)))
    draws = range(0, SPACE, SPACE // 100_000)
    found = Counter(compiled.decide(ask(), draw, 1).arm for draw in draws)
    assert all(abs(found[arm] - weight * 10) <= 2 for arm in ("a2", "a3"))


def test_keys_follow_three_arms_and_controls() -> None:
    found = Counter(arms_of(rollout(1_000, 500, 2_000, control=True)))
    names = ["a2", "a3", "a4", "c2", "c3", "c4", "stable"]
    shares = [0.1, 0.05, 0.2, 0.1, 0.05, 0.2, 0.3]
    assert follows([found[name] for name in names], [share * len(KEYS) for share in shares])


def test_nobody_leaves_an_arm_that_grows() -> None:
    stages = [arms_of(rollout(weight)) for weight in (500, 1_000, 2_500)]
    for before, after in pairwise(stages):
        assert not any(old == "a2" and new != "a2" for old, new in zip(before, after, strict=True))
    joined = sum(old != new for old, new in zip(stages[0], stages[2], strict=True))
    assert within_three_sigma(joined, 0.2)


@pytest.mark.parametrize("order", [*permutations(range(3))])
def test_three_arms_that_grow_in_any_order_take_only_from_stable(order: tuple[int, ...]) -> None:
    keys, weights = KEYS[:20_000], [500, 500, 500]
    before = arms_of(rollout(*weights), keys)
    for grows in [*order, *order]:
        weights[grows] += 1_000
        after = arms_of(rollout(*weights), keys)
        moved = {(old, new) for old, new in zip(before, after, strict=True) if old != new}
        assert moved == {("stable", f"a{grows + 2}")}
        before = after


def test_shrinking_gives_back_those_who_joined_last() -> None:
    small, large = arms_of(rollout(500)), arms_of(rollout(2_500))
    shrunk = arms_of(rollout(1_000))
    assert all(now == "a2" for was, now in zip(small, shrunk, strict=True) if was == "a2")
    assert all(was == "a2" for was, now in zip(large, shrunk, strict=True) if now == "a2")


def test_coverage_that_grows_moves_nobody_between_arms() -> None:
    stages = [arms_of(experiment(coverage, 5_000, 3_000, 2_000)) for coverage in (1_000, 3_000, 10_000)]
    for before, after in pairwise(stages):
        assert not any(old not in ("stable", new) for old, new in zip(before, after, strict=True))
    assert within_three_sigma(Counter(stages[2])["a2"], 0.3)


@pytest.mark.parametrize("change", [{"name": "r2"}, {"secret": b"s"}])
def test_a_new_id_or_secret_is_an_independent_draw(change: dict[str, Any]) -> None:
    first, second = arms_of(rollout(1_000)), arms_of(rollout(1_000, **change))
    both = sum(a == b == "a2" for a, b in zip(first, second, strict=True))
    assert within_three_sigma(both, 0.01)


# --- mistakes ---

TWO_HALVES = (Arm("a", to("2"), 5_000), Arm("b", to("3"), 5_000))
BAD = [
    (rollout(name=""), [("rollout", "id"), ("rollout", "arms")]),
    (rollout(5_001, 100), [("rollout", "arms", 0, "weight")]),
    (rollout(-1), [("rollout", "arms", 0, "weight")]),
    (RolloutSplit("r", (Arm("stable", to("2"), 1),)), [("rollout", "arms", 0, "name")]),
    (RolloutSplit("r", (Arm("", to("2"), 1),)), [("rollout", "arms", 0, "name")]),
    (
        RolloutSplit("r", (Arm("a", to("2"), 1, "a"),)),
        [("rollout", "arms", 0, "name"), ("rollout", "arms", 0, "control")],
    ),
    (ExperimentSplit("e", TWO_HALVES[:1], 100), [("experiment", "arms")]),
    (ExperimentSplit("e", TWO_HALVES, 10_001), [("experiment", "coverage")]),
]


@pytest.mark.parametrize(("split", "places"), BAD)
def test_splits_that_make_no_sense(split: Any, places: list[tuple[str | int, ...]]) -> None:
    with pytest.raises(BadRoutes) as caught:
        CompiledRoutes("m", routes(split=split))
    assert [problem.where for problem in caught.value.problems] == places


def test_the_largest_weight_is_told() -> None:
    with pytest.raises(BadRoutes, match=r"wanted 0% to 33\.33%, as 3 arms share the whole; got 40%"):
        CompiledRoutes("m", routes(split=rollout(4_000, 100, 100)))


@pytest.mark.parametrize(("share", "text"), [(0, "0%"), (1, "0.01%"), (250, "2.5%"), (10_000, "100%"), (-50, "-0.5%")])
def test_percent(share: int, text: str) -> None:
    assert percent(share) == text
