"""When a column is in alarm: a pure state machine. It sees verdicts of looks, never counts, clocks or messages.

A column is calm or in alarm, once for all windows. Each look of a window says, per column, *over* (evidence of drift
that is real and large) or *quiet* (well below that) or neither.

* calm -> alarm: this look is over, and so were k of the last m looks of the same window, this one with them.
* alarm -> calm: in every window that ever looked, the last ``clear_looks`` looks were quiet.

A signal that flaps around the threshold is neither over often enough nor quiet long enough: it gives one alarm, not
many. Each alarm is an *episode*, numbered per column; raise and end carry the same number, which makes a good key for
whatever is to happen once per episode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from monitor.errors import StateError
from monitor.types import AlarmRules, Array

#: Places that a history of 64 bits can be moved by at once.
_MOST_SHIFTED: Final = 63


@dataclass(slots=True, frozen=True)
class Change:
    """``column`` (its place) entered an alarm, or left it, at a look of ``window``."""

    column: int
    raised: bool
    window: str
    episode: int


class AlarmBook:
    """The alarms of one arm: ``columns`` columns looked at through the named windows."""

    def __init__(self, columns: int, windows: Sequence[str], rules: AlarmRules) -> None:
        self._rules = rules
        self._mask = np.uint64((1 << rules.m) - 1)
        self._history = {name: np.zeros(columns, "u8") for name in windows}
        self._calm = {name: np.zeros(columns, "i8") for name in windows}
        self._looks = dict.fromkeys(windows, 0)
        #: Looks with nothing over and all quiet that are not in the three above yet: most are of that kind.
        self._uneventful = dict.fromkeys(windows, 0)
        #: bool per column. Not to be changed; a change of alarms makes another.
        self.active = np.zeros(columns, bool)
        #: Whether any column is in alarm.
        self.alarmed = False
        self._episodes = np.zeros(columns, "i8")

    def look(self, window: str, over: Array, quiet: Array) -> list[Change]:
        """One look of one window: bool per column. What changed, in the columns' order."""
        eventful = bool(np.count_nonzero(over))
        if not (eventful or self.alarmed) and np.count_nonzero(quiet) == len(quiet):
            self.pass_by(window)
            return []
        self._catch_up()
        history, calm = self._history[window], self._calm[window]
        history <<= np.uint64(1)
        history |= over.astype("u8")
        history &= self._mask
        calm += 1
        calm *= quiet.astype("i8")
        self._looks[window] += 1
        return self._changes(window, over) if eventful or self.alarmed else []

    def pass_by(self, window: str) -> None:
        """One look at which nothing is over and all is quiet, of a book without alarms."""
        self._uneventful[window] += 1

    def _catch_up(self) -> None:
        """Enter the looks at which nothing happened."""
        for name, looks in self._uneventful.items():
            if looks:
                # As many places as a history has are empty after as many looks; a shift by all of a word is undefined.
                self._history[name] <<= np.uint64(min(looks, _MOST_SHIFTED))
                self._history[name] &= self._mask if looks <= _MOST_SHIFTED else np.uint64(0)
                self._calm[name] += looks
                self._looks[name] += looks
                self._uneventful[name] = 0

    def _changes(self, window: str, over: Array) -> list[Change]:
        raised = over & ~self.active & (np.bitwise_count(self._history[window]) >= self._rules.k)
        cleared = self.active & self._all_calm() if self.alarmed else np.zeros_like(self.active)
        self._episodes[raised] += 1
        self._set_active((self.active | raised) & ~cleared)
        changed = np.flatnonzero(raised | cleared)
        return [Change(int(place), bool(raised[place]), window, int(self._episodes[place])) for place in changed]

    def _set_active(self, active: Array) -> None:
        self.active = active
        self.alarmed = bool(active.any())

    def _all_calm(self) -> Array:
        looked = [self._calm[name] for name, looks in self._looks.items() if looks]
        return np.asarray(np.min(looked, axis=0) >= self._rules.clear_looks)

    def restart(self) -> None:
        """Forget looks and alarms, as after a promotion; episodes go on counting."""
        for name in self._history:
            self._history[name][:] = 0
            self._calm[name][:] = 0
            self._looks[name] = self._uneventful[name] = 0
        self._set_active(np.zeros_like(self.active))

    def to_dict(self) -> dict[str, Any]:
        self._catch_up()
        return {
            "history": {name: values.tolist() for name, values in self._history.items()},
            "calm": {name: values.tolist() for name, values in self._calm.items()},
            "looks": dict(self._looks),
            "active": self.active.tolist(),
            "episodes": self._episodes.tolist(),
        }

    def restore(self, found: Mapping[str, Any]) -> None:
        """Go on from ``to_dict``. Windows that are new begin anew; StateError when the columns do not fit."""
        self._catch_up()
        try:
            active, episodes = np.array(found["active"], bool), np.array(found["episodes"], "i8")
            if active.shape != self.active.shape or episodes.shape != self._episodes.shape:
                raise StateError(f"the state has alarms of {active.size} columns, wanted {self.active.size}")
            for name in set(self._history) & set(found["history"]):
                self._history[name][:] = np.array(found["history"][name], "u8") & self._mask
                self._calm[name][:] = np.array(found["calm"][name], "i8")
                self._looks[name] = int(found["looks"][name])
        except (KeyError, TypeError, ValueError, OverflowError) as failure:
            raise StateError(f"the state's alarms are damaged ({type(failure).__name__})") from None
        self._set_active(active)
        self._episodes = episodes
