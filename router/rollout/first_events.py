"""Events of sticky traffic, counted once per key and step, each with the chance it had of being the candidate's.

A user who fails once fails again, so requests of one user are no independent coins (but users are). A key counts with
its first event in a step. Where its event was seen before, in an earlier step, its place is no longer open: a key of
the candidate stays there, which is no news, and one of stable had, when the candidate's share grew from s to t, the
chance (t - s) / (1 - s) to have moved. So rows are kept by chance, and evidence adds up over steps without counting a
user's bad luck twice.

What is heard of late (an outcome of a request that was answered some steps ago) counts with the chance of the step in
which the key was placed. Of a key that has counted in a later step meanwhile, it is no news.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from router.errors import BadRolloutState
from router.rollout.evidence import TwoArms


class Placing(NamedTuple):
    """How keys are placed for some time: the ``step``, numbered upward, and the candidate's share of those compared."""

    step: int = 0
    share: float = 0.0


class FirstEvents:
    """First events of keys (64-bit hashes) for one kind of event. Remembers ``max_keys``; later ones are not counted.

    Leaving later keys out is fair to both arms. ``unplaced`` says how many events that was.
    """

    __slots__ = ("_counts", "_max_keys", "_seen", "unplaced")

    def __init__(self, max_keys: int = 1 << 18) -> None:
        self._max_keys = max_keys
        self._seen: dict[int, Placing] = {}
        self._counts: dict[float, list[int]] = defaultdict(lambda: [0, 0])
        self.unplaced = 0

    def add(self, key: int, on_candidate: bool, placing: Placing) -> None:
        """A key had the event on the arm where it was by that ``placing``."""
        seen = self._seen.get(key)
        if seen is None:
            self._first(key, on_candidate, placing)
        elif placing.step > seen.step:
            self._again(key, on_candidate, placing, seen.share)

    def _first(self, key: int, on_candidate: bool, placing: Placing) -> None:
        if len(self._seen) >= self._max_keys:
            self.unplaced += 1
            return
        self._count(key, on_candidate, placing, placing.share)

    def _again(self, key: int, on_candidate: bool, placing: Placing, share_then: float) -> None:
        # 1.0 stands for a key that was the candidate's: it will not be counted again while the candidate keeps it.
        if share_then >= 1 or placing.share <= share_then:
            self._seen[key] = Placing(placing.step, share_then)
        else:
            self._count(key, on_candidate, placing, (placing.share - share_then) / (1 - share_then))

    def _count(self, key: int, on_candidate: bool, placing: Placing, chance: float) -> None:
        self._seen[key] = Placing(placing.step, 1.0) if on_candidate else placing
        self._counts[chance][not on_candidate] += 1

    def take(self) -> tuple[TwoArms, ...]:
        """What was counted since the last call."""
        rows = tuple(TwoArms(0, ours, 0, theirs, chance) for chance, (ours, theirs) in self._counts.items())
        self._counts.clear()
        return rows

    def __len__(self) -> int:
        return len(self._seen)

    def to_dict(self) -> dict[str, Any]:
        return {"seen": [[key, *placing] for key, placing in self._seen.items()], "unplaced": self.unplaced}

    def restore(self, found: Mapping[str, Any]) -> None:
        """Go on from ``to_dict``, which must follow a ``take``; BadRolloutState when it is damaged."""
        try:
            seen = {int(key): Placing(int(step), float(share)) for key, step, share in found["seen"]}
            unplaced = int(found["unplaced"])
        except (KeyError, TypeError, ValueError) as failure:
            raise BadRolloutState(f"the stored keys are damaged ({type(failure).__name__})") from None
        self._seen, self.unplaced = seen, unplaced
