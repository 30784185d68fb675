"""How a split divides the positions among arms. Whole numbers only; nothing is decided per request here.

Rollout: with m arms beside stable, arm i owns the home [i/m, (i+1)/m) and holds its first ``weight``; stable holds the
rest. An arm that grows takes from stable alone, one that shrinks gives back the keys that joined last. An arm's control
is the next ``weight`` of stable's ground behind it, going round at the end, and less where no more is left.

Experiment: arm i begins at the sum of the weights before it and holds ``weight`` times ``coverage``; the rest is
stable's. Coverage that grows moves nobody from one arm to another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from router.errors import Problem
from router.policy.base import SPACE, Span, merged, positions
from router.types import FULL_SHARE, PINNED_ARM, STABLE_ARM, Arm, ExperimentSplit, RolloutSplit

WHOLE = (Span(0, SPACE, STABLE_ARM),)


def layout(split: RolloutSplit[Any] | ExperimentSplit[Any] | None) -> tuple[Span, ...]:
    """Spans that cover all positions in order, without gaps; all of it stable's when there is no split."""
    if split is None:
        return WHOLE
    if isinstance(split, RolloutSplit):
        return _rollout(split)
    return _with_stable(_experiment(split))


def widths(spans: Iterable[Span]) -> Counter[str]:
    """How many positions each arm holds."""
    held: Counter[str] = Counter()
    for span in spans:
        held[span.arm] += span.width
    return held


def _rollout(split: RolloutSplit[Any]) -> tuple[Span, ...]:
    count = len(split.arms)
    homes = [index * SPACE // count for index in range(count)]
    taken = [Span(home, home + positions(arm.weight), arm.name) for home, arm in zip(homes, split.arms, strict=True)]
    for own, arm in zip(tuple(taken), split.arms, strict=True):
        if arm.control:
            free = [span for span in _with_stable(taken) if span.arm == STABLE_ARM]
            taken += _claim(free, own.end, own.width, arm.control)
    return _with_stable(taken)


def _claim(free: Iterable[Span], origin: int, width: int, name: str) -> Iterator[Span]:
    """The next ``width`` free positions from ``origin`` on, going round once."""
    behind = [Span(max(span.start, origin), span.end, name) for span in free if span.end > origin]
    before = [Span(span.start, min(span.end, origin), name) for span in free if span.start < origin]
    for span in behind + before:
        step = min(width, span.width)
        if step:
            yield Span(span.start, span.start + step, name)
        width -= step


def _experiment(split: ExperimentSplit[Any]) -> Iterator[Span]:
    starts = accumulate((arm.weight for arm in split.arms), initial=0)
    for start, arm in zip(starts, split.arms, strict=False):
        first = positions(start)
        yield Span(first, first + positions(arm.weight) * split.coverage // FULL_SHARE, arm.name)


def _with_stable(taken: Iterable[Span]) -> tuple[Span, ...]:
    """``taken`` in order, with stable in every gap."""
    out: list[Span] = []
    end = 0
    for span in sorted(span for span in taken if span.width):
        out += [Span(end, span.start, STABLE_ARM), span]
        end = span.end
    return merged([*out, Span(end, SPACE, STABLE_ARM)])


def problems(split: RolloutSplit[Any] | ExperimentSplit[Any]) -> Iterator[Problem]:
    """Every mistake in a split."""
    rollout = isinstance(split, RolloutSplit)
    place = "rollout" if rollout else "experiment"
    if not split.id:
        yield Problem((place, "id"), "wanted a name, got nothing")
    if not split.arms:
        yield Problem((place, "arms"), "wanted at least one arm, got none")
    for index, arm in enumerate(split.arms):
        for problem in _arm_problems(arm, len(split.arms) if rollout else 1):
            yield Problem((place, "arms", index, *problem.where), problem.message)
    yield from _name_problems(split.arms, place)
    if isinstance(split, ExperimentSplit):
        yield from _experiment_problems(split)


def _arm_problems(arm: Arm[Any], homes: int) -> Iterator[Problem]:
    most = FULL_SHARE // homes
    if not 0 <= arm.weight <= most:
        shared = f", as {homes} arms share the whole" if homes > 1 else ""
        yield Problem(("weight",), f"wanted 0% to {percent(most)}{shared}; got {percent(arm.weight)}")


def _name_problems(arms: tuple[Arm[Any], ...], place: str) -> Iterator[Problem]:
    names = Counter(name for arm in arms for name in (arm.name, arm.control) if name)
    for index, arm in enumerate(arms):
        for key, name in (("name", arm.name), ("control", arm.control)):
            if name in (STABLE_ARM, PINNED_ARM) or (not name and key == "name"):
                yield Problem((place, "arms", index, key), f"wanted a name but stable and pinned, got {name!r}")
            elif names[name] > 1:
                yield Problem((place, "arms", index, key), f"{name!r} names {names[name]} arms")


def _experiment_problems(split: ExperimentSplit[Any]) -> Iterator[Problem]:
    total = sum(arm.weight for arm in split.arms)
    if split.arms and total != FULL_SHARE:
        yield Problem(("experiment", "arms"), f"wanted shares that sum to 100%, got {percent(total)}")
    if not 0 <= split.coverage <= FULL_SHARE:
        yield Problem(("experiment", "coverage"), f"wanted 0% to 100%, got {percent(split.coverage)}")
    for index, arm in enumerate(split.arms):
        if arm.control:
            yield Problem(("experiment", "arms", index, "control"), "an experiment's arms have no control slices")


def percent(share: int) -> str:
    """A share for people: 250 -> "2.5%"."""
    whole, rest = divmod(abs(share), 100)
    decimals = f".{rest:02d}".rstrip("0").rstrip(".")
    return f"{'-' if share < 0 else ''}{whole}{decimals}%"
