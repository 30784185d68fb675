"""How much traffic a models entry has now, and how often stable fails: what the plan of a rollout reckons with."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from server.gateway import Served

#: How far back it looks, and how many notes it keeps for that.
_WINDOW_NS: Final = 60 * 10**9
_NOTES: Final = 64


@dataclass(slots=True)
class _Notes:
    of: Served
    notes: deque[tuple[int, int, int]] = field(default_factory=lambda: deque(maxlen=_NOTES))


class Meter:
    """Reads the attempts of stable versions every so often."""

    def __init__(self) -> None:
        self._entries: dict[str, _Notes] = {}

    def note(self, entry: str, served: Served | None, now_ns: int) -> None:
        """Look at the version that is stable now. Another version is counted from nothing."""
        if served is None:
            self._entries.pop(entry, None)
            return
        found = self._entries.get(entry)
        if found is None or found.of is not served:
            found = self._entries[entry] = _Notes(served)
        if not found.notes or now_ns - found.notes[-1][0] >= _WINDOW_NS // _NOTES:
            found.notes.append((now_ns, *served.attempts()))

    def read(self, entry: str) -> tuple[float, float]:
        """(attempts per second, share that failed) of about the last minute; zeros when too little was seen."""
        found = self._entries.get(entry)
        if found is None or len(found.notes) < 2:
            return 0.0, 0.0
        (then_ns, tried, failed), (now_ns, tries, fails) = found.notes[0], found.notes[-1]
        attempts = tries - tried
        return attempts * 1e9 / (now_ns - then_ns), (fails - failed) / attempts if attempts else 0.0
