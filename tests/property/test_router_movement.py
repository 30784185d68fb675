"""Movements against counting: every piece of ground is looked up in both tables, one position at a time."""

from __future__ import annotations

from collections import Counter, defaultdict
from fractions import Fraction
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from router.compiled import CompiledRoutes
from router.movement import Place, plan_movement
from router.policy.base import SPACE
from router.types import FULL_SHARE, Arm, ExperimentSplit, ModelRoutes
from tests.support.routes import ask, rollout, routes, to


@st.composite
def any_routes(draw: st.DrawFn) -> ModelRoutes[str]:
    count = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["rollout", "experiment", "none"]))
    stable = draw(st.sampled_from(["1", "2"]))
    if kind == "none":
        return routes(stable=stable)
    weights = draw(st.lists(st.integers(0, FULL_SHARE // count), min_size=count, max_size=count))
    if kind == "rollout":
        return routes(stable=stable, split=rollout(*weights, control=draw(st.booleans())))
    weights[-1] = FULL_SHARE - sum(weights[:-1])
    arms = tuple(Arm(f"a{n}", to(str(n)), weight) for n, weight in enumerate(weights, start=2))
    return routes(stable=stable, split=ExperimentSplit("r", arms, draw(st.integers(0, FULL_SHARE))))


def place_at(compiled: CompiledRoutes[str], position: int) -> Place:
    """Where a keyless draw of this position goes; controls are stable's."""
    decision = compiled.decide(ask(), position, 1)
    arm = "stable" if decision.arm.startswith("c") else decision.arm
    return Place(arm, decision.model, decision.version)


def counted(old: CompiledRoutes[str], new: CompiledRoutes[str]) -> dict[tuple[Any, Any], Fraction]:
    edges = sorted({0, SPACE, *(span.end for routes in (old, new) for span in routes.spans)})
    flows: Counter[tuple[Place, Place]] = Counter()
    for start, end in pairwise(edges):
        ends = {(place_at(old, at), place_at(new, at)) for at in (start, (start + end) // 2, end - 1)}
        assert len(ends) == 1
        flows[ends.pop()] += end - start
    return {pair: Fraction(width, SPACE) for pair, width in flows.items() if pair[0] != pair[1]}


@given(any_routes(), any_routes())
def test_movements_are_what_counting_finds(before: ModelRoutes[str], after: ModelRoutes[str]) -> None:
    old, new = CompiledRoutes("m", before), CompiledRoutes("m", after)
    movement = plan_movement(old, new)
    assert {(move.old, move.new): move.share for move in movement.moves} == counted(old, new)
    assert set(movement.reshuffled) <= set(movement.moves)
    assert all(move.old.arm != "stable" for move in movement.reshuffled)


@given(any_routes(), any_routes(), st.sampled_from(["other", "r"]))
def test_what_leaves_and_what_comes_is_what_an_arm_changes_by(
    before: ModelRoutes[str], after: ModelRoutes[str], name: str
) -> None:
    """Under one draw and under two: shares before, less those who leave, with those who come, are those after."""
    if after.split is not None:
        after = routes(stable=after.stable, split=type(after.split)(**{**as_fields(after.split), "id": name}))
    old, new = CompiledRoutes("m", before), CompiledRoutes("m", after)
    shares = held(old)
    for move in plan_movement(old, new).moves:
        shares[move.old] -= move.share
        shares[move.new] += move.share
    assert {place: share for place, share in shares.items() if share} == held(new)


def as_fields(split: Any) -> dict[str, Any]:
    return {name: getattr(split, name) for name in split.__slots__}


def held(compiled: CompiledRoutes[str]) -> dict[Place, Fraction]:
    found: dict[Place, Fraction] = defaultdict(Fraction)
    for span in compiled.spans:
        found[place_at(compiled, span.start)] += Fraction(span.width, SPACE)
    return found


@given(st.lists(st.tuples(st.integers(0, 2_500), st.integers(0, 2_500)), min_size=1, max_size=4))
def test_arms_that_only_grow_or_only_shrink_never_reshuffle(pairs: list[tuple[int, int]]) -> None:
    small = CompiledRoutes("m", routes(split=rollout(*(min(pair) for pair in pairs))))
    large = CompiledRoutes("m", routes(split=rollout(*(max(pair) for pair in pairs), control=True)))
    growth, shrinking = plan_movement(small, large), plan_movement(large, small)
    assert all(move.old.arm == "stable" for move in growth.moves)
    assert all(move.new.arm == "stable" for move in shrinking.moves)
    assert not growth.reshuffles
    assert not shrinking.reshuffles
