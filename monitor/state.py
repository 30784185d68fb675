"""What a monitor knows, as plain data: saved, restored, and merged with that of other processes.

A state is bound to the SHA-256 of its profile: counts of one profile mean nothing under another, so mixing them is
refused. Merging adds integers (see ``panes.merge_arms``): any number of states, in any order and grouping, give
bit-identical counts. Alarms and the seasonal reference belong to whoever looks at the counts and are not merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from monitor import sealed
from monitor.errors import ProfileMismatch, StateError
from monitor.panes import ArmState, SeriesState, merge_arms
from monitor.types import Array

_KIND: Final = "monitor state"
_SCHEMA: Final = 1
_FACTS: Final = ("index", "rows", "dropped", "start_ns", "end_ns")


@dataclass(slots=True, eq=False)
class MonitorState:
    """``alarms`` and ``inflation`` by arm, and ``seasonal`` arrays: empty where they do not travel."""

    model: str
    version: str
    sha256: str
    arms: dict[str, ArmState]
    alarms: dict[str, Any] = field(default_factory=dict)
    inflation: dict[str, Any] = field(default_factory=dict)
    seasonal: tuple[Array, Array, Array] | None = None

    def to_bytes(self) -> bytes:
        """A sealed file: see ``monitor.sealed``."""
        arrays: dict[str, Array] = {}
        arms: dict[str, Any] = {}
        for arm, state in self.arms.items():
            arms[arm] = {"rows": state.rows, "dropped": state.dropped, "refused": state.refused, "series": []}
            arrays[f"{arm}/total"] = state.total
            for place, series in enumerate(state.series):
                arms[arm]["series"].append({"unit": series.unit, "pane": series.pane, "closed": series.closed})
                arrays[f"{arm}/{place}/facts"] = np.stack([getattr(series, name) for name in _FACTS])
                arrays[f"{arm}/{place}/counts"] = series.counts
        for name, values in zip(("slots", "rows", "written"), self.seasonal or (), strict=False):
            arrays[f"/seasonal/{name}"] = values
        header = {
            "schema": _SCHEMA,
            "model": self.model,
            "version": self.version,
            "sha256": self.sha256,
            "arms": arms,
            "alarms": self.alarms,
            "inflation": self.inflation,
        }
        return sealed.pack(_KIND, header, arrays)

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "monitor state") -> MonitorState:
        """Raises StateError when the bytes are damaged or of another schema."""
        header, arrays, _ = sealed.unpack(data, _KIND, StateError, what)
        try:
            if header["schema"] != _SCHEMA:
                raise StateError(f"{what}: schema {header['schema']} is not known, wanted {_SCHEMA}")
            arms = {arm: _arm(arm, found, arrays) for arm, found in header["arms"].items()}
            names = [f"/seasonal/{name}" for name in ("slots", "rows", "written")]
            seasonal = (arrays[names[0]], arrays[names[1]], arrays[names[2]]) if names[0] in arrays else None
            texts = [str(header[name]) for name in ("model", "version", "sha256")]
            return cls(texts[0], texts[1], texts[2], arms, header["alarms"], header["inflation"], seasonal)
        except (KeyError, TypeError, ValueError, IndexError) as failure:
            raise StateError(f"{what}: the state is damaged ({type(failure).__name__})") from None


def _arm(arm: str, found: dict[str, Any], arrays: dict[str, Array]) -> ArmState:
    series = []
    for place, entry in enumerate(found["series"]):
        facts, counts = arrays[f"{arm}/{place}/facts"], arrays[f"{arm}/{place}/counts"]
        if facts.shape != (len(_FACTS), len(counts)) or counts.ndim != 2 or entry["unit"] not in ("rows", "time"):
            raise ValueError("series")
        index, rows, dropped, start_ns, end_ns = (np.ascontiguousarray(fact) for fact in facts)
        pane, closed = int(entry["pane"]), int(entry["closed"])
        series.append(SeriesState(entry["unit"], pane, closed, index, rows, dropped, start_ns, end_ns, counts))
    return ArmState(int(found["rows"]), int(found["dropped"]), int(found["refused"]), arrays[f"{arm}/total"], series)


def merge(states: Sequence[MonitorState]) -> MonitorState:
    """The counts of several processes as one state. Raises ProfileMismatch, StateError for none or other windows."""
    if not states:
        raise StateError("there is no state to merge")
    first = states[0]
    for state in states:
        if state.sha256 != first.sha256:
            raise ProfileMismatch(
                f"counts under profile {state.sha256[:12]} cannot be added to counts under profile {first.sha256[:12]}"
            )
    arms = sorted({arm for state in states for arm in state.arms})
    merged = {arm: merge_arms([state.arms[arm] for state in states if arm in state.arms]) for arm in arms}
    return MonitorState(first.model, first.version, first.sha256, merged)
