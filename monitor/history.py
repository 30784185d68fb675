"""What the looks of one window said, for plots: the newest ones, in a ring of a fixed size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from monitor.errors import StateError
from monitor.types import Array

#: Values per look and column, float32.
_NAMES: Final = ("psi", "psi_threshold", "ks", "ks_threshold", "log10_p")
_DECIMALS: Final = 6


class History:
    """``capacity`` looks at ``columns`` columns: 21 bytes per look and column, 24 per look, taken at once."""

    def __init__(self, columns: int, capacity: int) -> None:
        self._capacity = capacity
        self._looks = 0
        #: end of the window in ns, its rows.
        self._facts = np.zeros((capacity, 2), "i8")
        self._level = np.zeros(capacity, "f8")
        self._values = np.zeros((capacity, len(_NAMES), columns), "f4")
        self._alarms = np.zeros((capacity, columns), "u1")

    def add(self, end_ns: int, rows: int, log_level: float, values: Array, alarms: Array) -> None:
        """One look. ``values``: psi, its critical value, ks, its critical value, log10 p, by column."""
        slot = self._looks % self._capacity
        facts = self._facts
        facts[slot, 0], facts[slot, 1] = end_ns, rows  # a fraction of what a tuple takes
        self._level[slot] = log_level
        self._values[slot] = values
        self._alarms[slot] = alarms
        self._looks += 1

    def _slots(self, last: int) -> Array:
        """Ring places of the newest looks, oldest first."""
        held = min(self._looks, self._capacity, last)
        return np.arange(self._looks - held, self._looks) % self._capacity

    def to_dict(self, names: Sequence[str], last: int) -> dict[str, Any]:
        """Lists of equal length, oldest look first; what is undefined is None. ``names``: of the columns to be given,
        in the columns' order, empty for those to be left out."""
        slots = self._slots(last)
        values, alarms = self._values[slots], self._alarms[slots].astype(bool)
        return {
            "time_ns": self._facts[slots, 0].tolist(),
            "rows": self._facts[slots, 1].tolist(),
            "level": np.exp(self._level[slots]).tolist(),
            "columns": {
                name: {
                    **{value: _plain(values[:, place, column]) for place, value in enumerate(_NAMES)},
                    "in_alarm": alarms[:, column].tolist(),
                }
                for column, name in enumerate(names)
                if name
            },
        }

    def state(self) -> dict[str, Array]:
        """Copies for ``restore``."""
        slots = self._slots(self._capacity)
        return {
            "facts": self._facts[slots],
            "level": self._level[slots],
            "values": self._values[slots],
            "alarms": self._alarms[slots],
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Raises StateError when the arrays are not those of as many columns."""
        own = {"facts": self._facts, "level": self._level, "values": self._values, "alarms": self._alarms}
        looks = len(state["facts"]) if "facts" in state else -1
        if any(name not in state or state[name].shape != (looks, *array.shape[1:]) for name, array in own.items()):
            raise StateError("the state's history is of other columns")
        held = min(looks, self._capacity)
        for name, array in own.items():
            array[:held] = state[name][looks - held :]
        self._looks = held


def _plain(values: Array) -> list[float | None]:
    rounded = np.round(values.astype("f8"), _DECIMALS)
    out: list[float | None] = rounded.tolist()
    if np.isfinite(rounded).all():
        return out
    return [value if good else None for value, good in zip(out, np.isfinite(rounded).tolist(), strict=True)]
