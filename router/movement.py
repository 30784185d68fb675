"""What a change of routes does to keys: how many change arm or version, from where to where. Exact, nothing sampled.

Under one salt the two layouts lie over each other, so shares are lengths of overlaps. When the salt, the secret or the
place of the key changes, keys are drawn afresh: shares are products. Control slices are stable's and count as stable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

from router.compiled import CompiledRoutes
from router.policy.base import SPACE, overlay
from router.policy.split import widths
from router.table import RoutingTable
from router.types import STABLE_ARM


class Place(NamedTuple):
    """Where a key is served: by which arm, with which version of which model."""

    arm: str
    model: str
    version: str

    def __str__(self) -> str:
        return f"{self.arm} ({self.model} {self.version})"


@dataclass(slots=True, frozen=True)
class Move:
    """A share of all keys (0 < share <= 1) that goes from one place to another."""

    old: Place
    new: Place
    share: Fraction

    def __str__(self) -> str:
        return f"{float(self.share):.2%} of keys: {self.old} -> {self.new}"


@dataclass(slots=True, frozen=True)
class Movement:
    """``moves`` in order of size. ``reshuffled`` has those by which keys leave an arm that goes on without them.

    Leaving is in order when the arm only gives keys back to stable, or when it ends because no arm has its version any
    more: aborted, promoted, or followed by the next rollout.
    """

    moves: tuple[Move, ...]
    reshuffled: tuple[Move, ...]

    @property
    def share(self) -> Fraction:
        """The share of keys that move at all."""
        return sum((move.share for move in self.moves), Fraction(0))

    @property
    def reshuffles(self) -> bool:
        return bool(self.reshuffled)


_Flows: TypeAlias = dict[tuple[Place, Place], Fraction]


def plan_movement(old: CompiledRoutes[Any], new: CompiledRoutes[Any]) -> Movement:
    """What happens to keys when ``new`` replaces ``old``."""
    kept_draw = same_draw(old, new)
    flows = _overlaps(old, new) if kept_draw else _products(old, new)
    moves = tuple(sorted(_moves(flows), key=lambda move: (-move.share, move.old, move.new)))
    return Movement(moves, tuple(_reshuffled(moves, new, kept_draw)))


def plan_movements(old: RoutingTable[Any], new: RoutingTable[Any]) -> Mapping[str, Movement]:
    """The movement of each public name that both tables have and for which any key moves."""
    shared = [name for name in new.models if name in old.models]
    plans = {name: plan_movement(old.compiled(name), new.compiled(name)) for name in shared}
    return {name: plan for name, plan in plans.items() if plan.moves}


def same_draw(old: CompiledRoutes[Any], new: CompiledRoutes[Any]) -> bool:
    """Whether every key has the same position in both. Without a split on one side, any position will do."""
    a, b = old.routes.split, new.routes.split
    if a is None or b is None:
        return True
    return (a.id, a.secret, old.routes.key.sources) == (b.id, b.secret, new.routes.key.sources)


def _place(routes: CompiledRoutes[Any], arm: str) -> Place:
    choice = routes.arms[arm]
    own = {STABLE_ARM} if routes.routes.split is None else {each.name for each in routes.routes.split.arms}
    return Place(arm if arm in own else STABLE_ARM, choice.model, choice.version)


def _overlaps(old: CompiledRoutes[Any], new: CompiledRoutes[Any]) -> _Flows:
    flows: _Flows = defaultdict(Fraction)
    for start, end, before, after in overlay(old.spans, new.spans):
        flows[_place(old, before), _place(new, after)] += Fraction(end - start, SPACE)
    return flows


def _products(old: CompiledRoutes[Any], new: CompiledRoutes[Any]) -> _Flows:
    flows: _Flows = defaultdict(Fraction)
    for before, held in widths(old.spans).items():
        for after, taken in widths(new.spans).items():
            flows[_place(old, before), _place(new, after)] += Fraction(held * taken, SPACE * SPACE)
    return flows


def _moves(flows: _Flows) -> Iterator[Move]:
    for (before, after), share in flows.items():
        if before != after and share:
            yield Move(before, after, share)


def _reshuffled(moves: Iterable[Move], new: CompiledRoutes[Any], kept_draw: bool) -> Iterator[Move]:
    """Moves out of an arm for another reason than that it shrinks or ends."""
    moves = tuple(moves)
    going_on = {_place(new, arm) for arm in new.arms}
    gaining = {move.new for move in moves}
    for move in moves:
        arm, model, version = move.old
        if arm == STABLE_ARM:
            continue
        to_stable = move.new.arm == STABLE_ARM
        goes_on = any(place.arm != STABLE_ARM and place[1:] == (model, version) for place in going_on)
        shrinks = to_stable and move.old not in gaining
        ends = not goes_on and (to_stable or not kept_draw)
        if not (shrinks or ends):
            yield move
