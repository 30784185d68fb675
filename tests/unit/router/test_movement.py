"""router.movement: exact shares of keys that move, and which of the moves are a reshuffle."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from router.compiled import CompiledRoutes
from router.movement import Movement, Place, plan_movement, plan_movements
from router.policy.base import SPACE, positions
from router.table import RoutingTable
from router.types import Arm, ExperimentSplit, KeySpec, ModelRoutes, RolloutSplit
from tests.support.routes import rollout, routes, to


def plan(old: ModelRoutes[str], new: ModelRoutes[str]) -> Movement:
    return plan_movement(CompiledRoutes("m", old), CompiledRoutes("m", new))


def moves(movement: Movement) -> dict[tuple[str, str], Fraction]:
    return {(move.old.arm, move.new.arm): move.share for move in movement.moves}


def share(weight: int) -> Fraction:
    return Fraction(positions(weight), SPACE)


def split(*weights: int, **more: Any) -> ModelRoutes[str]:
    return routes(split=rollout(*weights, **more))


def test_growth_takes_exactly_the_difference_from_stable() -> None:
    movement = plan(split(500), split(1_000))
    assert moves(movement) == {("stable", "a2"): share(1_000) - share(500)}
    assert not movement.reshuffles
    assert str(movement.moves[0]) == "5.00% of keys: stable (m 1) -> a2 (m 2)"


def test_shrinking_and_ending_are_no_reshuffle() -> None:
    assert moves(plan(split(1_000), split(500))) == {("a2", "stable"): share(1_000) - share(500)}
    assert not plan(split(1_000), split(500)).reshuffles
    assert moves(plan(split(1_000), routes())) == {("a2", "stable"): share(1_000)}
    assert not plan(split(1_000), routes()).reshuffles


def test_the_same_routes_move_nobody() -> None:
    movement = plan(split(1_000, 2_000, control=True), split(1_000, 2_000, control=True))
    assert movement == Movement((), ())
    assert movement.share == 0


def test_controls_are_stables_ground() -> None:
    assert moves(plan(split(500), split(500, control=True))) == {}
    grown = plan(split(500, control=True), split(1_000, control=True))
    assert moves(grown) == {("stable", "a2"): share(1_000) - share(500)}


def test_an_arm_more_moves_the_homes() -> None:
    movement = plan(split(1_000, 1_000), split(1_000, 1_000, 0))
    assert movement.reshuffles
    assert moves(movement) == {("a3", "stable"): share(1_000), ("stable", "a3"): share(1_000)}
    assert [move.old.arm for move in movement.reshuffled] == ["a3"]


@pytest.mark.parametrize("change", [{"name": "other"}, {"secret": b"s"}])
def test_a_new_draw_for_the_same_arm_is_a_reshuffle(change: dict[str, Any]) -> None:
    movement = plan(split(1_000), split(1_000, **change))
    tenth = share(1_000)
    assert moves(movement) == {("a2", "stable"): tenth * (1 - tenth), ("stable", "a2"): tenth * (1 - tenth)}
    assert movement.reshuffles


def test_another_place_of_the_key_is_a_new_draw() -> None:
    old = split(1_000)
    assert plan(old, replace(old, key=KeySpec(("request:id",)))).reshuffles
    assert not plan(old, replace(old, key=KeySpec(old.key.sources, "stable"))).moves


def test_promotion_moves_everyone_else_to_the_new_version() -> None:
    movement = plan(split(2_500), routes(stable="2"))
    assert movement.share == 1
    assert not movement.reshuffles
    assert movement.moves[0].old == Place("stable", "m", "1")
    assert movement.moves[0].share == 1 - share(2_500)


def test_the_next_rollout_after_a_promotion_is_no_reshuffle() -> None:
    split_9 = RolloutSplit("r9", (Arm("a2", to("9"), 500),))
    assert not plan(split(2_500), routes(stable="2", split=split_9)).reshuffles


def test_another_version_under_the_same_id_is_a_reshuffle() -> None:
    swapped = RolloutSplit("r", (Arm("a2", to("9"), 1_000),))
    movement = plan(split(1_000), routes(split=swapped))
    assert movement.reshuffles
    assert movement.moves[0].new == Place("a2", "m", "9")


def test_arms_that_swap_versions_are_a_reshuffle() -> None:
    swapped = RolloutSplit("r", (Arm("a2", to("3"), 1_000), Arm("a3", to("2"), 1_000)))
    assert plan(split(1_000, 1_000), routes(split=swapped)).reshuffles


def experiment(coverage: int, *weights: int) -> ModelRoutes[str]:
    arms = tuple(Arm(f"a{n}", to(str(n)), weight) for n, weight in enumerate(weights, start=2))
    return routes(split=ExperimentSplit("e", arms, coverage))


def test_coverage_only_takes_from_stable() -> None:
    movement = plan(experiment(2_000, 5_000, 5_000), experiment(3_000, 5_000, 5_000))
    assert set(moves(movement)) == {("stable", "a2"), ("stable", "a3")}
    assert not movement.reshuffles
    assert not plan(experiment(3_000, 5_000, 5_000), experiment(2_000, 5_000, 5_000)).reshuffles


def test_other_shares_of_an_experiment_are_a_reshuffle() -> None:
    assert plan(experiment(10_000, 5_000, 5_000), experiment(10_000, 4_000, 6_000)).reshuffles
    assert plan(experiment(1_000, 5_000, 5_000), experiment(1_000, 4_000, 6_000)).reshuffles


def test_whole_tables() -> None:
    old = RoutingTable({"m": split(500), "same": routes(model="m"), "gone": routes(model="m")}, 1)
    new = RoutingTable({"m": split(600), "same": routes(model="m"), "come": routes(model="m")}, 2)
    assert list(plan_movements(old, new)) == ["m"]
