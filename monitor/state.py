"""What a monitor knows, as plain data: saved, restored, and merged with that of other processes.

A state is bound to the SHA-256 of its profile: counts of one profile mean nothing under another, so mixing them is
refused. Merging adds integers (see ``panes.merge_arms``): any number of states, in any order and grouping, give
bit-identical counts. Alarms, past ones too, and the seasonal reference belong to whoever looks at the counts and are
not merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from monitor import sealed
from monitor.errors import ProfileMismatch, StateError
from monitor.history import SavedAlarms
from monitor.panes import ArmState, SeriesState, merge_arms
from monitor.types import Array

_KIND: Final = "monitor state"
_SCHEMA: Final = 3
#: What can be read: builds before stored all counts in bytes or words of their own.
_KNOWN: Final = (2, 3)
#: The least count that is not in half a byte.
_MANY: Final = 15
#: Where more of all counts than this are as large, each has as much room as the largest needs.
_MOST_LARGE: Final = 1 / 16
_FACTS: Final = ("index", "rows", "dropped", "start_ns", "end_ns")


@dataclass(slots=True, eq=False)
class MonitorState:
    """``segments``: by arm and name. ``rules``: what is counted behind the cells (see ``monitor.panes``).

    ``alarms`` and ``inflation`` by arm, ``seasonal`` arrays, ``history`` arrays by (arm, window), ``past`` alarms:
    empty where they do not travel.
    """

    model: str
    version: str
    sha256: str
    arms: dict[str, ArmState]
    alarms: dict[str, Any] = field(default_factory=dict)
    inflation: dict[str, Any] = field(default_factory=dict)
    seasonal: tuple[Array, Array, Array] | None = None
    rules: tuple[str, ...] = ()
    segments: dict[str, dict[str, ArmState]] = field(default_factory=dict)
    history: dict[tuple[str, str], dict[str, Array]] = field(default_factory=dict)
    past: SavedAlarms | None = None

    def to_bytes(self) -> bytes:
        """A sealed file: see ``monitor.sealed``."""
        arrays: dict[str, Array] = {}
        arms = {arm: _stored(arm, state, arrays) for arm, state in self.arms.items()}
        segments = [
            {"arm": arm, "segment": name, **_stored(f"/segments/{arm}/{place}", state, arrays)}
            for arm, found in self.segments.items()
            for place, (name, state) in enumerate(found.items())
        ]
        for place, kept in enumerate(self.history.values()):
            arrays |= {f"/history/{place}/{name}": values for name, values in kept.items()}
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
            "rules": list(self.rules),
            "segments": segments,
            "history": [{"arm": arm, "window": window} for arm, window in self.history],
            "past": None if self.past is None else self.past.stored("/past/", arrays),
        }
        return sealed.pack(_KIND, header, arrays, [name for name in arrays if name.endswith("/few")])

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "monitor state") -> MonitorState:
        """Raises StateError when the bytes are damaged or of another schema."""
        header, arrays, _ = sealed.unpack(data, _KIND, StateError, what)
        try:
            if header["schema"] not in _KNOWN:
                raise StateError(f"{what}: schema {header['schema']} is not known, wanted {_SCHEMA}")
            arms = {arm: _arm(arm, found, arrays) for arm, found in header["arms"].items()}
            names = [f"/seasonal/{name}" for name in ("slots", "rows", "written")]
            seasonal = (arrays[names[0]], arrays[names[1]], arrays[names[2]]) if names[0] in arrays else None
            texts = [str(header[name]) for name in ("model", "version", "sha256")]
            return cls(
                texts[0],
                texts[1],
                texts[2],
                arms,
                header["alarms"],
                header["inflation"],
                seasonal,
                tuple([str(rule) for rule in header["rules"]]),
                _segments(header["segments"], arrays),
                _history(header["history"], arrays),
                SavedAlarms.of(header.get("past"), "/past/", arrays),  # builds before had none
            )
        except (KeyError, TypeError, ValueError, IndexError) as failure:
            raise StateError(f"{what}: the state is damaged ({type(failure).__name__})") from None


def _stored(key: str, state: ArmState, arrays: dict[str, Array]) -> dict[str, Any]:
    """The header's entry of one arm; its arrays go into ``arrays``."""
    series = []
    fits = np.abs(state.total).max(initial=0) <= np.iinfo("i4").max
    arrays[f"{key}/total"] = state.total.astype("i4") if fits else state.total
    for place, one in enumerate(state.series):
        series.append({"unit": one.unit, "pane": one.pane, "closed": one.closed})
        arrays[f"{key}/{place}/facts"] = np.stack([getattr(one, name) for name in _FACTS])
        arrays |= {f"{key}/{place}/{name}": stored for name, stored in _stored_counts(one.counts).items()}
    return {"rows": state.rows, "dropped": state.dropped, "refused": state.refused, "series": series}


def _stored_counts(counts: Array) -> dict[str, Array]:
    """Counts of panes (panes, cells), which are most of a state; compressing them would be most of the work of saving.

    Of a pane's rows few are in one cell. So ``few`` (uint8) has two counts in a byte, pane by pane, the first in its
    lower half; where that is ``_MANY`` the count is this or more, and in ``many`` (int32): its place among all
    counts, and itself. ``counts``, each with as much room as the largest needs, where many are large.
    """
    panes, cells = counts.shape
    large = np.flatnonzero(counts >= _MANY)
    if not counts.size or counts.min() < 0:
        return {"counts": counts}
    most = counts.max()
    if len(large) > _MOST_LARGE * counts.size or max(int(most), counts.size) > np.iinfo("i4").max:
        return {"counts": counts.astype("u1") if most <= np.iinfo("u1").max else counts}
    halves = np.zeros((panes, cells + cells % 2), "u1")
    halves[:, :cells] = np.minimum(counts, _MANY)
    few = halves[:, ::2] | halves[:, 1::2] << 4
    return {"few": few, "many": np.stack([large, counts.ravel()[large]]).astype("i4")}


def _read_counts(key: str, arrays: dict[str, Array], cells: int) -> Array:
    """int32 or wider (panes, cells); KeyError or ValueError where they are not as ``_stored_counts`` has them."""
    if f"{key}/counts" in arrays:
        counts = arrays[f"{key}/counts"]
        return counts.astype("i4") if counts.dtype == "u1" else counts
    few, (places, many) = arrays[f"{key}/few"], arrays[f"{key}/many"]
    if few.dtype != "u1" or few.ndim != 2 or few.shape[1] != (cells + 1) // 2 or places.min(initial=0) < 0:
        raise ValueError("counts")
    counts = np.empty((len(few), cells), "i4")
    counts[:, ::2] = few & 0xF
    counts[:, 1::2] = few[:, : cells // 2] >> 4
    counts.ravel()[places] = many
    return counts


def _segments(entries: Sequence[dict[str, Any]], arrays: dict[str, Array]) -> dict[str, dict[str, ArmState]]:
    found: dict[str, dict[str, ArmState]] = {}
    for entry in entries:
        own = found.setdefault(str(entry["arm"]), {})
        own[str(entry["segment"])] = _arm(f"/segments/{entry['arm']}/{len(own)}", entry, arrays)
    return found


def _history(entries: Sequence[dict[str, Any]], arrays: dict[str, Array]) -> dict[tuple[str, str], dict[str, Array]]:
    found: dict[tuple[str, str], dict[str, Array]] = {}
    for place, entry in enumerate(entries):
        key = f"/history/{place}/"
        found[str(entry["arm"]), str(entry["window"])] = {
            name.removeprefix(key): values for name, values in arrays.items() if name.startswith(key)
        }
    return found


def _arm(arm: str, found: dict[str, Any], arrays: dict[str, Array]) -> ArmState:
    series = []
    total = arrays[f"{arm}/total"].astype("i8", copy=False)
    for place, entry in enumerate(found["series"]):
        facts = arrays[f"{arm}/{place}/facts"]
        counts = _read_counts(f"{arm}/{place}", arrays, len(total))
        if facts.shape != (len(_FACTS), len(counts)) or counts.ndim != 2 or entry["unit"] not in ("rows", "time"):
            raise ValueError("series")
        index, rows, dropped, start_ns, end_ns = (np.ascontiguousarray(fact) for fact in facts)
        pane, closed = int(entry["pane"]), int(entry["closed"])
        series.append(SeriesState(entry["unit"], pane, closed, index, rows, dropped, start_ns, end_ns, counts))
    return ArmState(int(found["rows"]), int(found["dropped"]), int(found["refused"]), total, series)


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
        if state.rules != first.rules:
            raise StateError(
                f"counts of the rules {', '.join(state.rules) or 'none'} cannot be added to those of the rules "
                f"{', '.join(first.rules) or 'none'}"
            )
    return MonitorState(
        first.model,
        first.version,
        first.sha256,
        _merged([state.arms for state in states]),
        rules=first.rules,
        segments={
            arm: _merged([state.segments[arm] for state in states if arm in state.segments])
            for arm in sorted({arm for state in states for arm in state.segments})
        },
    )


def _merged(parts: Sequence[Mapping[str, ArmState]]) -> dict[str, ArmState]:
    names = sorted({name for part in parts for name in part})
    return {name: merge_arms([part[name] for part in parts if name in part]) for name in names}
