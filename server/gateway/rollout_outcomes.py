"""What callers report of answered requests, for the gates of a rollout that look at it.

An outcome is joined to its request by id, and counts for the arm that answered. What is a unit depends on the request,
as it does for errors. One without a key stands for itself. Of sticky traffic the unit is the key, since one user's
outcomes share that user's luck:

* for a ratio of the arms a key counts once a step, with its first outcome that is so and with the chance that it had of
  being the candidate's when the request was answered (``router.rollout.first_events``);
* for the candidate's own rate and for means a key counts once on each arm, with its first outcome there.

On the loop only. All of it is bounded: the oldest answers are forgotten, and keys over ``max_keys`` are not counted,
which is fair to both arms.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from math import isfinite
from typing import Any, Final

from router.errors import BadRolloutState
from router.rollout.evidence import OneArm, TwoArms
from router.rollout.first_events import FirstEvents, Placing
from router.rollout.gates import Means
from router.sequential import Moments

#: Ids of answered requests that wait for outcomes; older ones are forgotten.
MAX_ANSWERED: Final = 200_000
#: Longer ids are remembered by their digest: a caller's may be as long as a request allows.
_LONGEST_ID: Final = 64
#: Distinct keys of each outcome that are remembered.
MAX_KEYS: Final = 1 << 18
#: Keys that are written down; more are counted anew after a restart.
STORED_KEYS: Final = 10_000


@dataclass(slots=True, frozen=True)
class Outcomes:
    """What was heard of one outcome since the last look, in the form that each kind of gate takes."""

    rows: tuple[TwoArms, ...]
    alone: OneArm
    means: Means


@dataclass(slots=True)
class _Answer:
    """An answered request that may still be told of. ``heard``: the outcomes that were."""

    on_candidate: bool
    key: int
    placing: Placing
    heard: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Arm:
    """Units of one arm: the values, how many of them are so (over 0), and the same of those without a key."""

    values: Moments = field(default_factory=Moments)
    events: int = 0
    keyless: int = 0
    keyless_events: int = 0


class _Counted:
    """One outcome: what was heard since the last look, and the keys that have had their turn."""

    __slots__ = ("_arms", "_first", "_max_keys", "_told", "unplaced")

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys
        self._first = FirstEvents(max_keys)
        #: Keys with an outcome, of stable and of the candidate.
        self._told: tuple[set[int], set[int]] = (set(), set())
        self._arms = (_Arm(), _Arm())
        self.unplaced = 0

    def add(self, answer: _Answer, value: float) -> None:
        arm = self._arms[answer.on_candidate]
        if not answer.key:
            arm.keyless += 1
            arm.keyless_events += value > 0
        else:
            if value > 0:
                self._first.add(answer.key, answer.on_candidate, answer.placing)
            if not self._is_first(answer):
                return
        arm.values.add(value)
        arm.events += value > 0

    def _is_first(self, answer: _Answer) -> bool:
        told = self._told[answer.on_candidate]
        if answer.key in told:
            return False
        if len(told) >= self._max_keys:
            self.unplaced += 1
            return False
        told.add(answer.key)
        return True

    def take(self) -> Outcomes:
        theirs, ours = self._arms
        self._arms = (_Arm(), _Arm())
        keyless = (TwoArms(ours.keyless, ours.keyless_events, theirs.keyless, theirs.keyless_events),)
        rows = keyless if ours.keyless or theirs.keyless else ()
        alone = OneArm(ours.values.count, float(ours.events))
        return Outcomes((*rows, *self._first.take()), alone, Means(ours.values, theirs.values))

    def to_dict(self) -> dict[str, Any]:
        if max(len(self._first), *map(len, self._told)) > STORED_KEYS:
            return {}
        return {"first": self._first.to_dict(), "told": [list(told) for told in self._told]}

    def restore(self, found: Mapping[str, Any]) -> None:
        if not found:
            return
        try:
            theirs, ours = ({int(key) for key in told} for told in found["told"])
            self._first.restore(found["first"])
        except (KeyError, TypeError, ValueError) as failure:
            raise BadRolloutState(f"the stored outcomes are damaged ({type(failure).__name__})") from None
        self._told = theirs, ours


class OutcomeBooks:
    """The outcomes of one rollout. ``wanted``: the names that gates look at; no others are taken."""

    __slots__ = ("_answered", "_counted", "_max_answered")

    def __init__(self, wanted: Iterable[str], max_answered: int = MAX_ANSWERED, max_keys: int = MAX_KEYS) -> None:
        self._max_answered = max_answered
        self._counted = {name: _Counted(max_keys) for name in sorted(wanted)}
        #: By id, newest last.
        self._answered: OrderedDict[str, _Answer] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether any gate looks at any outcome."""
        return bool(self._counted)

    @property
    def unplaced(self) -> int:
        """Outcomes of keys that were not counted, as there were too many."""
        return sum(counted.unplaced for counted in self._counted.values())

    def answered(self, ids: Iterable[str], on_candidate: bool, key: int, placing: Placing) -> None:
        """A counted request was answered on an arm. ``ids``: the gateway's and the caller's own, if any; ``key`` 0: it
        had none."""
        answer = _Answer(on_candidate, key, placing)
        for id_ in map(_short, filter(None, ids)):
            self._answered[id_] = answer
            self._answered.move_to_end(id_)
        while len(self._answered) > self._max_answered:
            self._answered.popitem(last=False)

    def hear(self, request_id: str, name: str, value: float) -> bool:
        """An outcome of an answered request; each counts once. False when nobody looks at it or remembers the request.

        ``name`` "": the only one that is looked at.
        """
        if not name and len(self._counted) == 1:
            (name,) = self._counted
        answer, counted = self._answered.get(_short(request_id)), self._counted.get(name)
        if answer is None or counted is None or not isfinite(value):
            return False
        if name not in answer.heard:
            answer.heard.add(name)
            counted.add(answer, value)
        return True

    def take(self) -> dict[str, Outcomes]:
        """By name, what was heard since the last call."""
        return {name: counted.take() for name, counted in self._counted.items()}

    def to_dict(self) -> dict[str, Any]:
        """The keys that have had their turn; to be called right after ``take``."""
        return {name: counted.to_dict() for name, counted in self._counted.items()}

    def restore(self, found: Mapping[str, Any]) -> None:
        """Go on from ``to_dict``. Raises BadRolloutState."""
        if not isinstance(found, Mapping):
            raise BadRolloutState(f"outcomes must be an object, got {type(found).__name__}")
        for name, stored in found.items():
            if name in self._counted:
                self._counted[name].restore(stored)


def _short(request_id: str) -> str:
    if len(request_id) <= _LONGEST_ID:
        return request_id
    return blake2b(request_id.encode(errors="surrogatepass"), digest_size=_LONGEST_ID // 4).hexdigest()
