"""Events of sticky traffic, counted once per key and step, each with the chance it had of being the candidate's.

A user who fails once fails again, so requests of one user are no independent coins (but users are). A key counts with
its first event in a step. Where its event was seen before, in an earlier step, its place is no longer open: a key of
the candidate stays there, which is no news, and one of stable had, when the candidate's share grew from s to t, the
chance (t - s) / (1 - s) to have moved. So rows are kept by chance, and evidence adds up over steps without counting a
user's bad luck twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from router.errors import BadRolloutState
from router.rollout.evidence import TwoArms


class FirstEvents:
    """First events of keys (64-bit hashes) for one kind of event. Remembers ``max_keys``; later ones are not counted.

    Leaving later keys out is fair to both arms. ``unplaced`` says how many events that was.
    """

    __slots__ = ("_counts", "_max_keys", "_seen", "_share", "_step", "unplaced")

    def __init__(self, max_keys: int = 1 << 18) -> None:
        self._max_keys = max_keys
        self._seen: dict[int, tuple[int, float]] = {}
        self._counts: dict[float, list[int]] = defaultdict(lambda: [0, 0])
        self._step = 0
        self._share = 0.0
        self.unplaced = 0

    def enter(self, share: float) -> None:
        """A step begins in which the candidate has ``share`` of the keys that are compared."""
        self._step += 1
        self._share = share

    def add(self, key: int, on_candidate: bool) -> None:
        """A key had the event."""
        seen = self._seen.get(key)
        if seen is None:
            self._place(key, on_candidate)
        elif seen[0] != self._step:
            self._again(key, on_candidate, seen[1])

    def _place(self, key: int, on_candidate: bool) -> None:
        if len(self._seen) >= self._max_keys:
            self.unplaced += 1
            return
        self._count(key, on_candidate, self._share)

    def _again(self, key: int, on_candidate: bool, share_then: float) -> None:
        # 1.0 stands for a key that was the candidate's: it will not be counted again while the candidate keeps it.
        if share_then >= 1 or self._share <= share_then:
            self._seen[key] = (self._step, share_then)
        else:
            self._count(key, on_candidate, (self._share - share_then) / (1 - share_then))

    def _count(self, key: int, on_candidate: bool, chance: float) -> None:
        self._seen[key] = (self._step, 1.0 if on_candidate else self._share)
        self._counts[chance][not on_candidate] += 1

    def take(self) -> tuple[TwoArms, ...]:
        """What was counted since the last call."""
        rows = tuple(TwoArms(0, ours, 0, theirs, chance) for chance, (ours, theirs) in self._counts.items())
        self._counts.clear()
        return rows

    def to_dict(self) -> dict[str, Any]:
        return {
            "seen": [[key, step, share] for key, (step, share) in self._seen.items()],
            "step": self._step,
            "share": self._share,
            "unplaced": self.unplaced,
        }

    def restore(self, found: Mapping[str, Any]) -> None:
        """Go on from ``to_dict``, which must follow a ``take``; BadRolloutState when it is damaged."""
        try:
            seen = {int(key): (int(step), float(share)) for key, step, share in found["seen"]}
            rest = int(found["step"]), float(found["share"]), int(found["unplaced"])
        except (KeyError, TypeError, ValueError) as failure:
            raise BadRolloutState(f"the stored keys are damaged ({type(failure).__name__})") from None
        self._seen = seen
        self._step, self._share, self.unplaced = rest
