"""How much traffic a name has now, and how often stable fails: what the plan of a rollout reckons with."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

#: How far back it looks, and how many notes it keeps for that.
_WINDOW_NS: Final = 60 * 10**9
_NOTES: Final = 64
_EVERY_NS: Final = _WINDOW_NS // _NOTES


class Served(Protocol):
    """A version that answers. ``attempts``: how many have ended, and how many of them in an error of the version."""

    def attempts(self) -> tuple[int, int]: ...


#: The versions that share a name's traffic, stable first.
Arms: TypeAlias = tuple[Served, ...]


@dataclass(slots=True)
class _Notes:
    """(when, attempts of all arms, attempts of stable, how many of these failed), oldest first."""

    of: Arms
    notes: deque[tuple[int, int, int, int]] = field(default_factory=lambda: deque(maxlen=_NOTES))


class Meter:
    """Reads the attempts of every name that is served, every so often."""

    def __init__(self) -> None:
        self._names: dict[str, _Notes] = {}
        self._noted_ns = -_EVERY_NS

    def due(self, now_ns: int) -> bool:
        """Whether it is time for the next notes."""
        return now_ns - self._noted_ns >= _EVERY_NS

    def note(self, served: Mapping[str, Arms], now_ns: int) -> None:
        """Look at everything that is served now. A name whose arms are others than before is counted from nothing."""
        self._noted_ns = now_ns
        before, self._names = self._names, {}
        for name, arms in served.items():
            found = before.get(name)
            if found is None or found.of != arms:
                found = _Notes(arms)
            self._names[name] = found
            counts = [arm.attempts() for arm in arms]
            found.notes.append((now_ns, sum(total for total, _ in counts), *counts[0]))

    def read(self, name: str) -> tuple[float, float]:
        """(attempts per second, share of stable's that were errors) of about the last minute; zeros when too little was
        seen."""
        found = self._names.get(name)
        if found is None or len(found.notes) < 2:
            return 0.0, 0.0
        (then_ns, all_then, tried, failed), (now_ns, all_now, tries, fails) = found.notes[0], found.notes[-1]
        attempts = tries - tried
        return (all_now - all_then) * 1e9 / (now_ns - then_ns), (fails - failed) / attempts if attempts else 0.0
