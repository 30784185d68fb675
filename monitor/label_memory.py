"""Predictions that wait for their labels: a ring of rows, found by keyed hashes of their ids, that outlives a process.

Ids are kept as 64-bit BLAKE2b digests under a key of 16 random bytes. Who does not know the key cannot make two ids
that are taken for one another, and that two of a million are has a chance of about 3 in 10^8. The key is saved with the
ring, so that the next process knows the same ids. No text of an id is kept.

Memory is about 75 bytes per row (8 more per further class), made at the start, and up to half a kilobyte per request
with two ids.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from math import isnan, nan
from typing import Any, Final

import numpy as np

from monitor.errors import StateError
from monitor.types import Array

#: Ids of one request: the gateway's and the client's.
IDS: Final = 2
KEY_BYTES: Final = 16
_WORD: Final = (1 << 64) - 1


class IdHash:
    """Text of an id to a 64-bit number that is never 0. ``key``: of another process, to know what it knew."""

    __slots__ = ("_start", "key")

    def __init__(self, key: bytes = b"") -> None:
        self.key = key or secrets.token_bytes(KEY_BYTES)
        self._start = blake2b(digest_size=8, key=self.key)

    def __call__(self, name: str) -> int:
        found = self._start.copy()
        found.update(name.encode("utf-8", "surrogatepass"))
        return int.from_bytes(found.digest(), "little", signed=True) or 1


@dataclass(slots=True)
class GroupCounts:
    """Rows of one (version, arm, slice). ``forgotten`` rows left the memory, ``expired`` those of them unlabelled."""

    version: str
    arm: str
    slice: str
    predicted: int = 0
    joined: int = 0
    late: int = 0
    duplicate: int = 0
    conflicting: int = 0
    forgotten: int = 0
    expired: int = 0

    @property
    def waiting(self) -> int:
        """Rows remembered that have no label yet."""
        return self.predicted - self.joined - self.expired

    @property
    def join_rate(self) -> float:
        """Share of all predicted rows that have a label by now; NaN for none."""
        return self.joined / self.predicted if self.predicted else nan

    @property
    def settled_join_rate(self) -> float:
        """Share of the rows forgotten by now that got their label in time: not lowered by labels still to come."""
        return 1 - self.expired / self.forgotten if self.forgotten else nan

    def to_dict(self) -> dict[str, Any]:
        rates = {"waiting": self.waiting, "join_rate": self.join_rate, "settled_join_rate": self.settled_join_rate}
        return {**asdict(self), **rates}


@dataclass(slots=True, eq=False)
class SavedRows:
    """Requests that are remembered, oldest first, and their rows, end to end.

    Per request: ``requests`` int64 (k, 4): rows, time, unit and the place of its group in a list; ``ids`` int64
    (k, ``IDS``), 0 for none. Per row: ``labels`` float64 (n,), NaN where none came; ``predictions`` (n, width).
    """

    requests: Array
    ids: Array
    labels: Array
    predictions: Array

    def check(self, groups: int) -> None:
        """Raises StateError when the parts do not belong together."""
        count, rows = len(self.requests), len(self.labels)
        shaped = self.requests.shape == (count, 4) and self.ids.shape == (count, IDS)
        if not shaped or self.labels.shape != (rows,) or self.predictions.shape[:1] != (rows,):
            raise StateError("the saved predictions are damaged")
        each, group = self.requests[:, 0], self.requests[:, 3]
        if int(each.sum()) != rows or int(each.min(initial=1)) < 1:
            raise StateError("the saved predictions are not the rows of their requests")
        if int(group.min(initial=0)) < 0 or int(group.max(initial=-1)) >= groups:
            raise StateError("the saved predictions are of groups that were not saved")
        if not np.isfinite(self.predictions).all() or np.isinf(self.labels).any():
            raise StateError("the saved predictions hold values that are no numbers")


class Memory:
    """A ring of rows: request after request, oldest first, found by the hashes of their ids.

    ``head`` and ``tail`` number rows since the beginning; a request is known by the number of its first row, and the
    facts of a request stand at that row's place.
    """

    __slots__ = ("_capacity", "_first", "_ids", "_rows", "group", "head", "label", "predictions", "tail",
                 "time", "unit", "width")  # fmt: skip

    def __init__(self, capacity: int, width: int) -> None:
        self._capacity, self.width = capacity, width
        self.predictions = array("d", bytes(8 * capacity * width))
        self.label = array("d", bytes(8 * capacity))
        self.time = array("q", bytes(8 * capacity))
        self.unit = array("Q", bytes(8 * capacity))
        #: Of a request at the place of its first row, 0 at those of its others.
        self._rows = array("q", bytes(8 * capacity))
        self._ids = array("q", bytes(8 * IDS * capacity))
        self.group: list[GroupCounts | None] = [None] * capacity
        self._first: dict[int, int] = {}
        self.head = self.tail = 0

    def __len__(self) -> int:
        return self.head - self.tail

    @property
    def requests(self) -> int:
        """Ids that can be asked for."""
        return len(self._first)

    def find(self, hashed: int) -> int | None:
        return self._first.get(hashed)

    def place(self, number: int) -> int:
        return number % self._capacity

    def rows(self, number: int) -> int:
        """Rows of a request that is remembered."""
        return self._rows[number % self._capacity]

    def prediction(self, number: int) -> tuple[float, ...]:
        start = (number % self._capacity) * self.width
        return tuple(self.predictions[start : start + self.width])

    def room(self, rows: int) -> bool:
        """Whether that many rows fit without forgetting any."""
        return self.head - self.tail + rows <= self._capacity

    def add(
        self, ids: Sequence[int], rows: int, now_ns: int, unit: int, values: Sequence[float], group: GroupCounts
    ) -> int:
        """Append a request that there is room for; ``values``, row by row. How many of its ids were in use."""
        number, at = self.head, self.head % self._capacity
        self.head += rows
        self.time[at], self.unit[at], self.group[at] = now_ns, unit & _WORD, group
        width = self.width
        for row in range(rows):
            place = (number + row) % self._capacity
            self.label[place], self._rows[place] = nan, 0
            self.predictions[place * width : (place + 1) * width] = array("d", values[row * width : (row + 1) * width])
        self._rows[at] = rows
        used = 0
        for place in range(IDS):
            hashed = ids[place] if place < len(ids) else 0
            self._ids[at * IDS + place] = hashed
            if hashed and hashed not in ids[:place]:
                used += hashed in self._first
                self._first[hashed] = number
        return used

    def forget(self) -> None:
        """Let go of the oldest request, and count it in its group."""
        number, at = self.tail, self.tail % self._capacity
        rows = self._rows[at]
        for hashed in self._ids[at * IDS : (at + 1) * IDS]:
            if self._first.get(hashed) == number:
                del self._first[hashed]
        group = self.group[at]
        if group is not None:
            group.forgotten += rows
            labels = [self.label[(number + row) % self._capacity] for row in range(rows)]
            group.expired += sum(map(isnan, labels))
        self.group[at] = None
        self.tail += rows

    def oldest_ns(self) -> int:
        return self.time[self.tail % self._capacity]

    # --- over a restart ----------------------------------------------------------------------------------------------

    def groups(self) -> list[GroupCounts]:
        """Every group of a request that is remembered, once."""
        found = [group for group in self.group if group is not None]
        return list({id(group): group for group in found}.values())

    def saved(self, groups: Sequence[GroupCounts], most: int) -> SavedRows:
        """Copies of the newest requests, ``most`` rows at most. ``groups``: all of ``groups()``; places refer to it."""
        order = np.arange(max(self.tail, self.head - most), self.head) % self._capacity
        rows = _view(self._rows, "i8")[order]
        order = order[len(rows) if not rows.any() else int(np.argmax(rows > 0)) :]  # from the first whole request on
        rows = _view(self._rows, "i8")[order]
        starts = order[rows > 0]
        place = {id(group): number for number, group in enumerate(groups)}
        of = np.array([place[id(self.group[start])] for start in starts.tolist()], "i8")
        unit = _view(self.unit, "u8")[starts].view("i8")
        requests = np.stack([rows[rows > 0], _view(self.time, "i8")[starts], unit, of], axis=1)
        return SavedRows(
            requests,
            _view(self._ids, "i8").reshape(-1, IDS)[starts],
            _view(self.label, "f8")[order],
            _view(self.predictions, "f8").reshape(-1, self.width)[order],
        )

    def fits(self, saved: SavedRows) -> bool:
        """Whether there is room, and rows are as wide as these."""
        return len(saved.labels) <= self._capacity and saved.predictions.shape[1:] == (self.width,)

    def restore(self, saved: SavedRows, groups: Sequence[GroupCounts]) -> None:
        """Remember what was saved and fits, instead of nothing."""
        count = len(saved.labels)
        rows, time, unit, group = saved.requests.T
        starts = np.cumsum(rows) - rows
        _view(self.label, "f8")[:count] = saved.labels
        _view(self.predictions, "f8").reshape(-1, self.width)[:count] = saved.predictions
        for stored, values in ((self._rows, rows), (self.time, time), (self.unit, unit)):
            _view(stored, "i8")[starts] = values
        _view(self._ids, "i8").reshape(-1, IDS)[starts] = saved.ids
        for start, place in zip(starts.tolist(), group.tolist(), strict=True):
            self.group[start] = groups[place]
        for ids in saved.ids.T.tolist():
            for hashed, start in zip(ids, starts.tolist(), strict=True):
                if hashed and self._first.get(hashed, -1) < start:  # the newest of a repeated id
                    self._first[hashed] = start
        self.head = count


def _view(stored: array[Any], dtype: str) -> Array:
    return np.frombuffer(stored, dtype)


def remembered(saved: SavedRows, groups: int) -> tuple[list[int], list[int]]:
    """By group: rows that are remembered, and those of them without a label."""
    of = np.repeat(saved.requests[:, 3], saved.requests[:, 0])
    waiting = np.bincount(of[np.isnan(saved.labels)], minlength=groups)
    return np.bincount(of, minlength=groups).tolist(), waiting.tolist()
