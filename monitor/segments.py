"""Traffic cut by the values of one column, and the reference cut likewise.

A segment's rows differ from the whole in every column that has to do with the one it is cut by, so they are held
against the same segment of the reference: the profile carries counts per value (``with_segments``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from monitor.errors import SettingsError
from monitor.layout import Block, Layout
from monitor.profile import ReferenceProfile, SegmentReference, carried, column_values
from monitor.types import BYTES, Array, Column, Segment


def with_segments(profile: ReferenceProfile, table: Mapping[str, Any], segment: Segment) -> ReferenceProfile:
    """The profile with counts per segment of the table that it was made from. Another profile: its digest differs.

    Raises SettingsError for a column or value that the reference does not have.
    """
    layout = Layout(profile)
    column = layout.columns[layout.place_of(segment.column)].column
    values = column_values(table, column)
    rows = [values == value for value in _cast(segment, column)]
    for name, own in zip(segment.names, rows, strict=True):
        if not own.any():
            raise SettingsError(f"segment '{segment.column}': the reference has no row with the value {name}")
    codes = layout.codes_of(dict(table))
    counts = np.array(
        [np.concatenate([np.bincount(code[own], minlength=cells) for code, cells in codes]) for own in rows], "i8"
    )
    return replace(profile, segments=SegmentReference(segment.column, segment.values, counts))


def _cast(segment: Segment, column: Column) -> list[Any]:
    """The values as traffic carries them. Raises SettingsError for texts where numbers are, and the other way round."""
    if column.datatype == BYTES:
        if not all(isinstance(value, str) for value in segment.values):
            raise SettingsError(f"segment '{segment.column}': wanted strings, got {', '.join(segment.names)}")
        return [str(value).encode() for value in segment.values]
    if any(isinstance(value, str) for value in segment.values):
        raise SettingsError(
            f"segment '{segment.column}': wanted numbers for {column.datatype}, got {', '.join(segment.names)}"
        )
    found: list[float] = carried(np.array(segment.values, "f8"), column).tolist()
    if len(set(found)) != len(found):
        raise SettingsError(f"segment '{segment.column}': two values are the same in {column.datatype}")
    return found


class Cutter:
    """Says which segment each row belongs to. Raises SettingsError when the profile does not know the segments."""

    def __init__(self, layout: Layout, segment: Segment) -> None:
        self.column, self.names = segment.column, segment.names
        self._place = layout.place_of(segment.column)
        self._values = _cast(segment, layout.columns[self._place].column)
        self._lookup = {value: float(code) for code, value in enumerate(self._values)}
        #: int64 counts of cells per name.
        self.references = {name: _reference(layout, segment, name) for name in segment.names}

    def codes(self, block: Block) -> Array:
        """int64 per row: the place of its value among ``names``, -1 for any other."""
        values = block.column(self._place)
        if isinstance(values, list):
            return np.fromiter((self._lookup.get(value, -1) for value in values), "i8", block.rows)
        out = np.full(block.rows, -1, "i8")
        for code, value in enumerate(self._values):
            out[values == value] = code
        return out


def _reference(layout: Layout, segment: Segment, name: str) -> Array:
    known = layout.profile.segments
    names = () if known is None else Segment(known.column, known.values).names
    if known is None or known.column != segment.column or name not in names:
        cut = "is not cut by any column" if known is None else f"is cut by '{known.column}' into {', '.join(names)}"
        raise SettingsError(
            f"segment '{segment.column}': the reference profile {cut}, wanted the value {name}; make it anew with "
            "these segments"
        )
    return np.asarray(known.counts[names.index(name)])
