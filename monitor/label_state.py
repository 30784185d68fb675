"""What labels have taught, as plain data: kept over a restart, and carried by a profile as the reference.

A saved state is bound to a ``mark`` of everything that its numbers depend on; under another mark nothing goes on from
it. It holds scores and outcomes of the rows in the windows and of those that may still get a label, counts, alarms and
references. It holds no inputs, and of ids keyed hashes with their key: who has the file can tell whether an id that he
knows is in it, and cannot list them.

A reference is what the windows of a model are held against: exact sums and counts of labelled rows, and how many rows
of either outcome fell into each cell of a fine grid of scores. No row is in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from monitor import sealed
from monitor.decay import ReferenceRows
from monitor.errors import SettingsError, StateError
from monitor.history import SavedAlarms
from monitor.label_memory import KEY_BYTES, GroupCounts, SavedRows
from monitor.label_windows import Pane, SeriesState, WindowsState
from monitor.labels import COUNTERS, SavedJoin
from monitor.outcomes import LabelReference, LabelSettings
from monitor.performance import GRID, Ranking, Tally, scorer_of
from monitor.types import Array

#: (version, arm, slice).
GroupKey: TypeAlias = tuple[str, str, str]

_KIND: Final = "label state"
_SCHEMA: Final = 2
#: In the place of how many scores a pane's ranking keeps.
_NO_RANKING: Final = -1
_CELLS: Final = -2
#: Of settings, what the numbers of a reference depend on.
_BASIS: Final = ("task", "output", "index", "form", "threshold", "classes", "bins")


@dataclass(slots=True, eq=False)
class SavedGroup:
    """One (version, arm, slice). ``first``: rows (n, width) and labels (n,) that a reference is being learnt from.

    ``missing``: rows that it still lacks.
    """

    key: GroupKey
    windows: WindowsState
    alarms: dict[str, Any]
    reference: ReferenceRows | None
    first: tuple[Array, Array] | None
    missing: int


@dataclass(slots=True, eq=False)
class SavedLabels:
    """The labels of one model. ``run``: tells the episodes of its alarms from those that were numbered otherwise."""

    model: str
    mark: str
    run: str
    join: SavedJoin
    groups: list[SavedGroup]
    forgotten_groups: int = 0
    past: SavedAlarms | None = None

    def to_bytes(self) -> bytes:
        """A sealed file: see ``monitor.sealed``."""
        arrays = _join_arrays(self.join)
        groups = [_stored(f"{place}/", group, arrays) for place, group in enumerate(self.groups)]
        header = {
            "schema": _SCHEMA,
            "model": self.model,
            "mark": self.mark,
            "run": self.run,
            "counters": self.join.counters,
            "join": [asdict(group) for group in self.join.groups],
            "key": self.join.key.hex(),
            "groups": groups,
            "forgotten_groups": self.forgotten_groups,
            "past": None if self.past is None else self.past.stored("past/", arrays),
        }
        return sealed.pack(_KIND, header, arrays)

    @classmethod
    def from_bytes(cls, data: bytes, exact_rows: int, what: str = "label state") -> SavedLabels:
        """``exact_rows`` as in the settings. Raises StateError when the bytes are damaged or of another schema."""
        header, arrays, _ = sealed.unpack(data, _KIND, StateError, what)
        try:
            if header["schema"] != _SCHEMA:
                raise StateError(f"{what}: schema {header['schema']} is not known, wanted {_SCHEMA}")
            return cls(
                str(header["model"]),
                str(header["mark"]),
                str(header["run"]),
                _join(header, arrays),
                [_group(f"{place}/", found, arrays, exact_rows) for place, found in enumerate(header["groups"])],
                int(header["forgotten_groups"]),
                SavedAlarms.of(header.get("past"), "past/", arrays),  # builds before had none
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as failure:
            raise StateError(f"{what}: the state is damaged ({type(failure).__name__})") from None


# --- what waits ------------------------------------------------------------------------------------------------------


def _join_arrays(join: SavedJoin) -> dict[str, Array]:
    rows = join.rows
    return {
        "join/requests": rows.requests,
        "join/ids": rows.ids,
        "join/labels": rows.labels,
        "join/predictions": rows.predictions,
        "join/held": join.held,
        "join/held_values": join.held_values,
    }


def _join(header: Mapping[str, Any], arrays: Mapping[str, Array]) -> SavedJoin:
    counters = {name: int(header["counters"][name]) for name in COUNTERS}
    key = bytes.fromhex(header["key"])
    if len(key) != KEY_BYTES:
        raise ValueError("key")
    rows = SavedRows(*[arrays[f"join/{name}"] for name in ("requests", "ids", "labels", "predictions")])
    held = arrays["join/held"], arrays["join/held_values"]
    found = SavedJoin(counters, [GroupCounts(**group) for group in header["join"]], key, rows, *held)
    found.check()
    return found


# --- groups ----------------------------------------------------------------------------------------------------------


def _stored(at: str, group: SavedGroup, arrays: dict[str, Array]) -> dict[str, Any]:
    """The header's entry of one group; its arrays go into ``arrays``, each name led by ``at``."""
    panes = [pane for series in group.windows for pane in (*series.panes, series.open) if pane is not None]
    if group.reference is not None:
        panes.append(Pane(0, group.reference.tally, group.reference.ranking))
    arrays |= {f"{at}{name}": array for name, array in _of_panes(panes).items()}
    if group.first is not None:
        arrays[f"{at}first"], arrays[f"{at}first_labels"] = group.first
    return {
        "key": list(group.key),
        "series": [_series_entry(series) for series in group.windows],
        "alarms": group.alarms,
        "reference": group.reference is not None,
        "missing": group.missing,
    }


def _series_entry(series: SeriesState) -> dict[str, Any]:
    return {
        "unit": series.unit,
        "pane": series.pane,
        "closed": series.closed,
        "outdated": series.outdated,
        "panes": len(series.panes),
        "open": series.open is not None,
    }


def _group(at: str, found: Mapping[str, Any], arrays: Mapping[str, Array], exact_rows: int) -> SavedGroup:
    own = {name.removeprefix(at): array for name, array in arrays.items() if name.startswith(at)}
    panes = _panes(own, exact_rows)
    windows: WindowsState = []
    for entry in found["series"]:
        closed = [panes.pop(0) for _ in range(int(entry["panes"]))]
        opened = panes.pop(0) if entry["open"] else None
        if entry["unit"] not in ("rows", "time"):
            raise ValueError("unit")
        outdated = {str(name): int(rows) for name, rows in entry["outdated"].items()}
        windows.append(SeriesState(entry["unit"], int(entry["pane"]), int(entry["closed"]), closed, opened, outdated))
    kept = panes.pop(0) if found["reference"] else None
    if panes:
        raise ValueError("panes")
    version, arm, part = (str(name) for name in found["key"])
    return SavedGroup(
        (version, arm, part),
        windows,
        dict(found["alarms"]),
        None if kept is None else ReferenceRows(kept.tally, kept.ranking),
        (own["first"], own["first_labels"]) if "first" in own else None,
        int(found["missing"]),
    )


# --- panes -----------------------------------------------------------------------------------------------------------


def _of_panes(panes: Sequence[Pane]) -> dict[str, Array]:
    """``facts`` (n, 5) int64: index, rows, start, end, how many scores are kept; then what they hold, end to end."""
    if not panes:
        return {}
    facts, kept, grids = [], [], []
    for pane in panes:
        rows = None if pane.ranking is None else pane.ranking.rows()
        if rows is not None:
            kept.append(rows)
        elif pane.ranking is not None:
            grids.append(pane.ranking.cells())
        amount = _NO_RANKING if pane.ranking is None else _CELLS if rows is None else len(rows[0])
        facts.append((pane.index, pane.rows, pane.start_ns, pane.end_ns, amount))
    return {
        "facts": np.array(facts, "i8"),
        "counts": np.stack([pane.tally.counts for pane in panes]).astype("i8"),
        "sums": integers_to_bytes([pane.tally.sums for pane in panes]),
        "scores": np.concatenate([np.empty(0), *[scores for scores, _ in kept]]),
        "positive": np.concatenate([np.empty(0, "u1"), *[positive.astype("u1") for _, positive in kept]]),
        "cells": np.stack(grids) if grids else np.empty((0, 2, GRID), "i8"),
    }


def _panes(arrays: Mapping[str, Array], exact_rows: int) -> list[Pane]:
    if "facts" not in arrays:
        return []
    facts, counts, sums = arrays["facts"], arrays["counts"], integers_from_bytes(arrays["sums"])
    scores, positive, cells = arrays["scores"], arrays["positive"], arrays["cells"]
    if counts.ndim != 2 or facts.shape != (len(counts), 5) or len(sums) != len(counts) or len(scores) != len(positive):
        raise ValueError("panes")
    if cells.shape[1:] != (2, GRID) or not ((scores >= 0.0) & (scores <= 1.0)).all():
        raise ValueError("rankings")
    found, place, grid = [], 0, 0
    for (index, rows, start_ns, end_ns, amount), own, whole in zip(facts.tolist(), counts, sums, strict=True):
        ranking = None
        if amount == _CELLS:
            ranking, grid = Ranking.of_cells(cells[grid], exact_rows), grid + 1
        elif amount != _NO_RANKING:
            part = slice(place, place + amount)
            ranking, place = Ranking.of_rows(scores[part], positive[part], exact_rows), part.stop
        found.append(Pane(index, Tally(rows, own.copy(), whole), ranking, start_ns, end_ns))
    if (place, grid) != (len(scores), len(cells)):
        raise ValueError("rankings")
    return found


def integers_to_bytes(rows: Sequence[Sequence[int]]) -> Array:
    """Whole numbers of any size as uint8 (n, m, bytes): little endian, two's complement, all as wide as the widest."""
    width = max((number.bit_length() // 8 + 1 for row in rows for number in row), default=1)
    raw = b"".join([number.to_bytes(width, "little", signed=True) for row in rows for number in row])
    return np.frombuffer(raw, "u1").reshape(len(rows), -1, width)


def integers_from_bytes(found: Array) -> list[list[int]]:
    """What ``integers_to_bytes`` was given. Raises ValueError for another shape."""
    if found.ndim != 3 or found.dtype != np.uint8:
        raise ValueError("integers")
    return [[int.from_bytes(number.tobytes(), "little", signed=True) for number in row] for row in found]


# --- references ------------------------------------------------------------------------------------------------------


def reference_rows(settings: LabelSettings, predictions: Array, labels: Array) -> ReferenceRows:
    """A reference from rows (n, width) and labels (n,), all as a ``LabelJoin`` gives them."""
    scorer = scorer_of(settings)
    pairs = scorer.pairs(predictions, labels)
    ranking = None
    if pairs is not None:
        ranking = Ranking(len(labels))
        ranking.add(*pairs)
    return ReferenceRows(scorer.tally(predictions, labels), ranking)


def to_profile(settings: LabelSettings, reference: ReferenceRows) -> LabelReference:
    """A reference as a profile carries it: without a row, and with what it depends on."""
    ranking = reference.ranking
    return LabelReference(
        _basis(settings),
        reference.tally.rows,
        reference.tally.counts,
        integers_to_bytes([reference.tally.sums])[0],
        None if ranking is None else ranking.cells(),
    )


def from_profile(settings: LabelSettings, found: LabelReference) -> ReferenceRows:
    """The reference of a profile. Raises SettingsError when it was made under settings that count otherwise."""
    wanted = _basis(settings)
    for name in _BASIS:
        if found.basis.get(name) != wanted[name]:
            raise SettingsError(
                f"the profile's reference of labels was made with {name} {found.basis.get(name)!r}, the settings have "
                f"{wanted[name]!r}"
            )
    scorer = scorer_of(settings)
    empty, sums = scorer.empty(), integers_from_bytes(found.sums[None])[0]
    scored = settings.task != "regression" and settings.form != "class"
    sizes = found.counts.shape == empty.counts.shape and len(sums) == len(empty.sums)
    if not sizes or (found.cells is not None) != scored:
        raise SettingsError("the profile's reference of labels does not hold what its task needs")
    ranking = None if found.cells is None else Ranking.of_cells(found.cells)
    return ReferenceRows(Tally(found.rows, found.counts.astype("i8"), sums), ranking)


def _basis(settings: LabelSettings) -> dict[str, Any]:
    """As JSON gives it back; only a binary task has a use for the threshold, so that others agree on any."""
    threshold = settings.threshold if settings.task == "binary" else None
    known = {name: getattr(settings, name) for name in _BASIS}
    return {**known, "threshold": threshold, "classes": list(settings.classes)}
