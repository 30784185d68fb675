"""What a rollout counts on the request path: attempts of the candidate and of what it is compared with.

Only first attempts of requests that the split has spread are counted, when they end and before a retry or a fallback is
decided. Requests with a key count an event once per key and step (``router.rollout.first_events``), requests without
one by themselves. Latency is the compute time of the batch, judged against what stable took for batches of about the
same size: a small arm is gathered in smaller batches, and is not to win or lose by that.

Everything here is on the loop: plain numbers that grow, of which the control takes what has come since it last did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from router.errors import BadRolloutState
from router.rollout.evidence import OneArm, TwoArms
from router.rollout.first_events import FirstEvents, Placing
from router.rollout.gates import Keys
from router.rollout.latency import TailThreshold
from router.rollout.spec import ERROR, EVENTS, SLOW, TIMEOUT
from server.batching.batcher import Work
from server.gateway.ends import LATE, NO_ERROR, NOTHING
from server.gateway.rollout_outcomes import MAX_KEYS, STORED_KEYS, OutcomeBooks, Outcomes


@dataclass(slots=True)
class Tally:
    """Attempts, and how many of them had each event. ``judged``: those whose latency could be."""

    attempts: int = 0
    errors: int = 0
    timeouts: int = 0
    judged: int = 0
    slow: int = 0

    def take(self) -> Tally:
        """What was counted; from nothing again."""
        taken = Tally(self.attempts, self.errors, self.timeouts, self.judged, self.slow)
        self.attempts = self.errors = self.timeouts = self.judged = self.slow = 0
        return taken

    def of(self, event: str) -> tuple[int, int]:
        """(units, those with the event)."""
        if event == SLOW:
            return self.judged, self.slow
        return self.attempts, self.errors if event == ERROR else self.timeouts


@dataclass(slots=True, eq=False)
class ArmBook:
    """One side of the comparison: requests with a key and without, and distinct keys not told of yet."""

    is_candidate: bool
    keyed: Tally = field(default_factory=Tally)
    keyless: Tally = field(default_factory=Tally)
    new_keys: int = 0


@dataclass(slots=True, frozen=True)
class Taken:
    """What has come since the last look. ``rows`` compare the arms, ``alone`` is the candidate's own, by event.

    ``outcomes`` are those that gates look at, by name.
    """

    attempts: int
    compared: int
    rows: Mapping[str, tuple[TwoArms, ...]]
    alone: Mapping[str, OneArm]
    keys: Keys
    outcomes: Mapping[str, Outcomes]


class RolloutBooks:
    """The counts of one running rollout. ``attempt`` is on the path of every request of its model."""

    __slots__ = (
        "_apart", "_arms", "_candidate", "_first", "_keys", "_outcomes", "_placing", "_stable", "_tails", "lost_keys",
    )  # fmt: skip

    def __init__(self, apart: str = "", wanted: Iterable[str] = ()) -> None:
        """``apart``: the arm that is batched by itself, as the candidate is, so that equal is compared with equal.

        ``wanted``: the outcomes that gates look at.
        """
        self._apart = apart
        self._candidate = ArmBook(True)
        self._stable = ArmBook(False)
        self._arms: Mapping[str, ArmBook] = {}
        self._first = {event: FirstEvents() for event in EVENTS}
        #: By the size of the batch, in powers of two.
        self._tails: dict[int, TailThreshold] = {}
        self._keys: set[int] = set()
        self._placing = Placing()
        self._outcomes = OutcomeBooks(wanted)
        self.lost_keys = 0

    def enter(self, candidate: str, stable: str, share: float) -> None:
        """Other arms, or other weights, are in force: ``share`` of the keys of both arms are the candidate's.

        ``candidate`` or ``stable`` "": that side gets nothing.
        """
        named = ((candidate, self._candidate), (stable, self._stable))
        self._arms = {name: book for name, book in named if name}
        self._placing = Placing(self._placing.step + 1, share)
        self._keys.clear()
        self._candidate.new_keys = self._stable.new_keys = 0

    # -- on the path --------------------------------------------------------------------------------------------

    def lane(self, arm: str) -> str:
        """The mark under which the requests of an arm are batched."""
        return arm if arm == self._apart else ""

    def attempt(self, arm: str, key: int, code: str, work: Work | None) -> None:
        """The first attempt of a counted request has ended. ``key`` 0: it had none."""
        book = self._arms.get(arm)
        if book is None or code in NOTHING:
            return
        tally = book.keyed if key else book.keyless
        tally.attempts += 1
        if key and key not in self._keys:
            self._new_key(book, key)
        if code != "ok":
            if code not in NO_ERROR:
                tally.errors += 1
                self._event(ERROR, book, key)
            if code in LATE:
                tally.timeouts += 1
                self._event(TIMEOUT, book, key)
        elif work is not None and work.computed_ns:
            self._judge(book, tally, key, work.computed_ns - work.assembled_ns, work.batch_rows.bit_length())

    def _new_key(self, book: ArmBook, key: int) -> None:
        if len(self._keys) >= MAX_KEYS:
            self.lost_keys += 1
            return
        self._keys.add(key)
        book.new_keys += 1

    def _event(self, event: str, book: ArmBook, key: int) -> None:
        if key:
            self._first[event].add(key, book.is_candidate, self._placing)

    def _judge(self, book: ArmBook, tally: Tally, key: int, took_ns: int, size: int) -> None:
        tail = self._tails.get(size)
        if tail is None:
            tail = self._tails[size] = TailThreshold()
        if tail.threshold_ns is not None:
            tally.judged += 1
            if took_ns > tail.threshold_ns:
                tally.slow += 1
                self._event(SLOW, book, key)
        if not book.is_candidate:
            tail.add(took_ns)

    # -- feedback -----------------------------------------------------------------------------------------------

    def answered(self, arm: str, tidegate_id: str, request_id: str, key: int = 0) -> None:
        """A counted request was answered: remembered for its outcomes, if any gate looks at one."""
        book = self._arms.get(arm)
        if book is not None and self._outcomes:
            self._outcomes.answered((tidegate_id, request_id), book.is_candidate, key, self._placing)

    def hear(self, request_id: str, name: str, value: float) -> bool:
        """An outcome of an answered request; False when nobody looks at it or remembers the request."""
        return self._outcomes.hear(request_id, name, value)

    # -- for the control ----------------------------------------------------------------------------------------

    def take(self) -> Taken:
        """Everything since the last call."""
        ours, theirs = self._candidate, self._stable
        keyed, keyless = (ours.keyed.take(), theirs.keyed.take()), (ours.keyless.take(), theirs.keyless.take())
        keys = Keys(ours.new_keys, theirs.new_keys, self._placing.share)
        ours.new_keys = theirs.new_keys = 0
        return Taken(
            keyed[0].attempts + keyless[0].attempts,
            keyed[1].attempts + keyless[1].attempts,
            {event: (*_compared(*keyless, event), *self._first[event].take()) for event in EVENTS},
            {event: _alone((keyed[0], keyless[0]), event) for event in EVENTS},
            keys,
            self._outcomes.take(),
        )

    @property
    def uncounted(self) -> int:
        """Keys, and events and outcomes of keys, that the evidence leaves out, as there were too many keys."""
        events = sum(first.unplaced for first in self._first.values())
        return self.lost_keys + events + self._outcomes.unplaced

    def to_dict(self) -> dict[str, Any]:
        """What a restart needs to go on; to be called right after ``take``."""
        return {
            "step": self._placing.step,
            "first": {event: first.to_dict() for event, first in self._first.items() if len(first) <= STORED_KEYS},
            "outcomes": self._outcomes.to_dict(),
            "tails": {str(size): tail.to_dict() for size, tail in self._tails.items()},
        }

    def restore(self, found: Mapping[str, Any]) -> None:
        """Go on from ``to_dict``. Raises BadRolloutState."""
        try:
            self._placing = Placing(int(found.get("step", 0)))
            for event, stored in found.get("first", {}).items():
                if event in self._first:
                    self._first[event].restore(stored)
            self._outcomes.restore(found.get("outcomes", {}))
            for size, stored in found.get("tails", {}).items():
                tail = self._tails[int(size)] = TailThreshold()
                tail.restore(stored)
        except (TypeError, ValueError, AttributeError) as error:
            raise BadRolloutState(f"the books are damaged: {error}") from None


def _compared(ours: Tally, theirs: Tally, event: str) -> Iterable[TwoArms]:
    """The row of requests without a key, whose share is the realised one; none when there were none."""
    n_c, k_c = ours.of(event)
    n_s, k_s = theirs.of(event)
    return (TwoArms(n_c, k_c, n_s, k_s),) if n_c or n_s else ()


def _alone(tallies: Iterable[Tally], event: str) -> OneArm:
    counted = [tally.of(event) for tally in tallies]
    return OneArm(sum(units for units, _ in counted), float(sum(events for _, events in counted)))
