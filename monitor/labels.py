"""The join of predictions and labels by request id: late, duplicated, out of order, of unknown ids, in bounded memory.

Two ends. ``remember`` and ``label`` are for the serving thread: they append to one bounded queue and do nothing else.
``drain`` is for one other thread: it takes the queue in its order, so that what is joined depends on the order of
arrival alone and never on when it was drained.

A prediction is known by every id it was given (the gateway's and the client's). A client's id that repeats means its
newest prediction. Per row the first label counts; the same again is a duplicate, another one a conflict, both only
counted. A label whose id nobody knows waits for its prediction for a while. Predictions are kept in a ring of rows:
the oldest request is forgotten when a new one needs its room or when it is too old, and its rows without a label have
expired. Hence for every group at any time: predicted == joined + expired + waiting.

Ids are kept as 64-bit hashes, keyed per process: that two of a million are taken for one another has a chance of about
3 in 10^8. Memory is about 55 bytes per row (8 more per further class), made at the start, and up to half a kilobyte per
request with two ids.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from math import isfinite, isnan, nan
from typing import Any, Final, NamedTuple, TypeAlias, cast

import numpy as np

from monitor.outcomes import ALL, OTHER, HasTensor, Joined, LabelSettings
from monitor.types import BYTES, DATATYPES, Array, Buffer

#: Entries of the queue taken by one drain, so that what it returns is bounded.
TURN: Final = 65_536
#: Predictions and labels beyond this are no numbers that a mean could be taken of.
_LARGEST: Final = 1e60
_WORD: Final = (1 << 64) - 1

OnJoined: TypeAlias = Callable[[Sequence[Joined]], object]
#: (version, arm, predictions end to end).
OnPredicted: TypeAlias = Callable[[str, str, Sequence[float]], object]


class _Prediction(NamedTuple):
    ids: tuple[int, ...]
    version: str
    arm: str
    rows: int
    datatype: str
    data: Buffer | list[bytes]
    size: int
    slice: str
    unit: int
    now_ns: int


class _Label(NamedTuple):
    id: int
    row: int
    value: float | str
    now_ns: int


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


#: Of a ``LabelJoin``, by the names of its attributes.
COUNTERS: Final = ("dropped_rows", "dropped_labels", "refused_rows", "invalid_rows", "invalid_labels", "unknown",
                   "held_dropped", "repeated_ids")  # fmt: skip


@dataclass(slots=True)
class SavedJoin:
    """What of a join outlives its process. ``counters`` by the names of ``COUNTERS``."""

    counters: dict[str, int]
    groups: list[GroupCounts]


class _Memory:
    """A ring of rows: request after request, oldest first, found by the hashes of their ids.

    ``head`` and ``tail`` number rows since the beginning; a request is known by the number of its first row, and the
    facts of a request stand at that row's place.
    """

    __slots__ = ("_capacity", "_first", "_ids", "_width", "group", "head", "label", "predictions", "rows", "tail",
                 "time", "unit")  # fmt: skip

    def __init__(self, capacity: int, width: int) -> None:
        self._capacity, self._width = capacity, width
        self.predictions = array("d", bytes(8 * capacity * width))
        self.label = array("d", bytes(8 * capacity))
        self.time = array("q", bytes(8 * capacity))
        self.unit = array("Q", bytes(8 * capacity))
        self.rows = array("l", bytes(array("l").itemsize * capacity))
        self.group: list[GroupCounts | None] = [None] * capacity
        self._ids: list[tuple[int, ...]] = [()] * capacity
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

    def prediction(self, number: int) -> tuple[float, ...]:
        start = (number % self._capacity) * self._width
        return tuple(self.predictions[start : start + self._width])

    def room(self, rows: int) -> bool:
        """Whether that many rows fit without forgetting any."""
        return self.head - self.tail + rows <= self._capacity

    def add(self, item: _Prediction, values: Sequence[float], group: GroupCounts) -> int:
        """Append a request that there is room for; ``values``, row by row. How many of its ids were in use."""
        number, at = self.head, self.head % self._capacity
        self.head += item.rows
        self.rows[at], self.time[at], self.unit[at] = item.rows, item.now_ns, item.unit & _WORD
        self.group[at], self._ids[at] = group, item.ids
        width = self._width
        for row in range(item.rows):
            place = (number + row) % self._capacity
            self.label[place] = nan
            self.predictions[place * width : (place + 1) * width] = array("d", values[row * width : (row + 1) * width])
        used = 0
        for hashed in dict.fromkeys(item.ids):
            used += hashed in self._first
            self._first[hashed] = number
        return used

    def forget(self) -> None:
        """Let go of the oldest request, and count it in its group."""
        number, at = self.tail, self.tail % self._capacity
        rows = self.rows[at]
        for hashed in self._ids[at]:
            if self._first.get(hashed) == number:
                del self._first[hashed]
        group = self.group[at]
        if group is not None:
            group.forgotten += rows
            labels = [self.label[(number + row) % self._capacity] for row in range(rows)]
            group.expired += sum(map(isnan, labels))
        self.group[at], self._ids[at] = None, ()
        self.tail += rows

    def oldest_ns(self) -> int:
        return self.time[self.tail % self._capacity]


class LabelJoin:
    """The join of one model's predictions and labels. See the module for who may call what.

    Counters of the serving end, each with one writer: ``dropped_rows`` and ``dropped_labels`` (the queue was full),
    ``refused_rows`` (no such output). Counters of the drain: ``invalid_rows`` (contents that do not fit, or no finite
    number), ``invalid_labels`` (no value of the task), ``unknown`` labels (no prediction came in time, or no such row),
    ``held_dropped`` (labels that waited and had to make room; they are unknown too), ``repeated_ids``.
    """

    def __init__(self, model: str, settings: LabelSettings, on_predicted: OnPredicted | None = None) -> None:
        """``on_predicted`` sees every prediction that is remembered, on the draining thread."""
        self.model, self.settings = model, settings
        self._on_predicted = on_predicted
        self.dropped_rows = self.dropped_labels = self.refused_rows = 0
        self.invalid_rows = self.invalid_labels = self.unknown = self.held_dropped = self.repeated_ids = 0
        self._rows_in = self._rows_out = self._bytes_in = self._bytes_out = self._labels_in = self._labels_out = 0
        self._output, self._name = settings.output, settings.name
        self._queue: deque[_Prediction | _Label] = deque()
        self._memory = _Memory(settings.capacity_rows, settings.width)
        self._groups: OrderedDict[tuple[str, str, str], GroupCounts] = OrderedDict()
        #: Labels that wait for their prediction, numbered in the order they came, and the numbers per id.
        self._held: OrderedDict[int, _Label] = OrderedDict()
        self._held_ids: dict[int, list[int]] = {}
        self._holds = 0
        self._listeners: list[OnJoined] = []

    # --- the serving end -------------------------------------------------------------------------------------------

    def remember(
        self,
        ids: Sequence[str],
        version: str,
        arm: str,
        rows: int,
        outputs: Sequence[HasTensor],
        slice_value: str,
        now_ns: int,
        unit: int = 0,
    ) -> bool:
        """Hand in one answered request; False when it was dropped or refused. Never blocks, never raises.

        ``ids``: all that feedback may call it by; empty ones are passed over. ``rows`` 0 (a model that does not batch)
        counts as one row. ``outputs``: the answer's tensors in any order. ``slice_value`` "": not sliced.
        """
        count = rows or 1
        if (
            self._rows_in - self._rows_out + count > self.settings.queue_rows
            or self._bytes_in - self._bytes_out > self.settings.queue_bytes
        ):
            self.dropped_rows += count
            return False
        try:
            for tensor in outputs:
                if tensor.name == self._output:
                    data = tensor.data if isinstance(tensor.data, bytes | list) else bytes(tensor.data)
                    hashed = tuple([hash(found) for found in ids if found])
                    size = len(data) if isinstance(data, bytes) else sum(map(len, data))
                    self._queue.append(
                        _Prediction(hashed, version, arm, count, tensor.datatype, data, size, slice_value, unit, now_ns)
                    )
                    self._rows_in += count
                    self._bytes_in += size
                    return True
        except Exception:  # noqa: BLE001 - the request path's boundary: a strange answer is refused, not raised about
            self.refused_rows += count
            return False
        self.refused_rows += count
        return False

    def label(self, request_id: str, row: int, value: float | str, name: str, now_ns: int) -> bool:
        """Hand in one label; False when it is of another name or was dropped. Never blocks, never raises.

        ``name`` "" is taken for the label whatever its name is. Whether it finds its prediction, only a drain can tell.
        """
        if name and name != self._name:
            return False
        if self._labels_in - self._labels_out >= self.settings.queue_labels:
            self.dropped_labels += 1
            return False
        self._queue.append(_Label(hash(request_id), row, value, now_ns))
        self._labels_in += 1
        return True

    # --- the drain -------------------------------------------------------------------------------------------------

    def subscribe(self, listener: OnJoined) -> Callable[[], None]:
        """Have every drain's joined rows handed to ``listener``, on the draining thread. Call the result to end it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def drain(self, now_ns: int) -> list[Joined]:
        """Join what waits, at most ``TURN`` entries; the rows that got their label, in the order they did."""
        joined: list[Joined] = []
        predictions: list[_Prediction] = []
        for _ in range(min(len(self._queue), TURN)):
            item = self._queue.popleft()
            if isinstance(item, _Prediction):
                predictions.append(item)
                continue
            self._keep(predictions, joined)
            predictions = []
            self._labels_out += 1
            self._take_label(item, joined)
        self._keep(predictions, joined)
        if not self._queue:
            self._expire(now_ns)
        if joined:
            for listener in list(self._listeners):
                listener(joined)
        return joined

    @property
    def waiting(self) -> int:
        """Entries of the queue."""
        return len(self._queue)

    def _keep(self, items: list[_Prediction], joined: list[Joined]) -> None:
        """Remember a run of predictions; consecutive ones of the same form are converted together."""
        for _, run in groupby(items, lambda item: (item.datatype, len(item.data) // item.rows)):
            alike = list(run)
            flat = self._values(alike)
            start = 0
            for item in alike:
                self._rows_out += item.rows
                self._bytes_out += item.size
                count = item.rows * self.settings.width
                values = self._values([item]) if flat is None else flat[start : start + count]
                start += count
                self._keep_one(item, values, joined)

    def _keep_one(self, item: _Prediction, values: list[float] | None, joined: list[Joined]) -> None:
        if values is None or item.rows > self.settings.capacity_rows:
            self.invalid_rows += item.rows
            return
        self._expire(item.now_ns)
        while not self._memory.room(item.rows):
            self._memory.forget()
        group = self._group(item.version, item.arm, item.slice)
        group.predicted += item.rows
        self.repeated_ids += self._memory.add(item, values, group)
        if self._on_predicted is not None:
            self._on_predicted(item.version, item.arm, values)
        if self._held:
            self._release(item.ids, joined)

    def _values(self, items: Sequence[_Prediction]) -> list[float] | None:
        """All rows' predictions end to end, or None when not all contents are rows of what the settings say."""
        try:
            found = self._read(items)
        except (ValueError, TypeError, KeyError, IndexError):
            return None
        if found is None or not np.isfinite(found).all() or np.abs(found).max(initial=0.0) > _LARGEST:
            return None
        checked = predictions_of(self.settings, found)
        return None if checked is None else cast("list[float]", checked.reshape(-1).tolist())

    def _read(self, items: Sequence[_Prediction]) -> Array | None:
        index, width = self.settings.index, self.settings.width
        datatype, rows = items[0].datatype, sum([item.rows for item in items])
        if datatype == BYTES:
            texts = [text for item in items for text in cast("list[bytes]", item.data)]
            of = len(texts) // rows
            if of * rows != len(texts) or not 0 <= index < of:
                return None
            places = self.settings.class_of
            return np.array([places[text.decode()] for text in texts[index::of]])
        data = b"".join([cast("bytes", item.data) for item in items])
        read = np.frombuffer(data, DATATYPES[datatype][0])
        if len(read) % rows or index + width > len(read) // rows:
            return None
        picked = read.reshape(rows, -1)[:, index : index + width]
        if datatype == "BF16":
            return (picked.astype("u4") << 16).view("f4").astype("f8")
        return picked.astype("f8")

    def _group(self, version: str, arm: str, value: str) -> GroupCounts:
        key = (version, arm, value)
        if key not in self._groups:
            if value != ALL and self._slices(version, arm) >= self.settings.max_slices:
                key = (version, arm, OTHER)
            if key not in self._groups:
                self._groups[key] = GroupCounts(*key)
                if len(self._groups) > self.settings.max_groups:
                    self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _slices(self, version: str, arm: str) -> int:
        return sum([(v, a) == (version, arm) and s not in (ALL, OTHER) for v, a, s in self._groups])

    def _take_label(self, item: _Label, joined: list[Joined]) -> None:
        value = label_of(self.settings, item.value)
        if value is None:
            self.invalid_labels += 1
            return
        self._expire(item.now_ns)
        number = self._memory.find(item.id)
        if number is None:
            self._hold(item)
        else:
            self._join(number, item, value, joined)

    def _join(self, number: int, item: _Label, value: float, joined: list[Joined]) -> None:
        memory = self._memory
        first = memory.place(number)
        group = memory.group[first]
        if group is None or not 0 <= item.row < memory.rows[first]:
            self.unknown += 1
            return
        at = memory.place(number + item.row)
        known = memory.label[at]
        if not isnan(known):
            group.duplicate += known == value
            group.conflicting += known != value
            return
        memory.label[at] = value
        group.joined += 1
        predicted_ns = memory.time[first]
        group.late += item.now_ns - predicted_ns > self.settings.late_ns
        joined.append(
            Joined(
                self.model, group.version, group.arm, memory.unit[first], memory.prediction(number + item.row), value,
                group.slice, predicted_ns, item.now_ns,
            )
        )  # fmt: skip

    # --- labels before their prediction ------------------------------------------------------------------------------

    def _hold(self, item: _Label) -> None:
        if not self.settings.hold_labels:
            self.unknown += 1
            return
        if len(self._held) >= self.settings.hold_labels:
            self.held_dropped += 1
            self._give_up()
        self._held_ids.setdefault(item.id, []).append(self._holds)
        self._held[self._holds] = item
        self._holds += 1

    def _release(self, ids: Sequence[int], joined: list[Joined]) -> None:
        """Join the labels that waited for these ids' prediction, in the order they came."""
        numbers = [number for hashed in ids for number in self._held_ids.pop(hashed, ())]
        for item in [self._held.pop(number) for number in sorted(numbers)]:
            self._take_label(item, joined)

    def _give_up(self) -> None:
        """The label that has waited longest is unknown."""
        number, item = self._held.popitem(last=False)
        numbers = self._held_ids[item.id]
        numbers.remove(number)
        if not numbers:
            del self._held_ids[item.id]
        self.unknown += 1

    def _expire(self, now_ns: int) -> None:
        memory = self._memory
        while len(memory) and memory.oldest_ns() < now_ns - self.settings.max_age_ns:
            memory.forget()
        while self._held and next(iter(self._held.values())).now_ns < now_ns - self.settings.hold_ns:
            self._give_up()

    # --- over a restart ----------------------------------------------------------------------------------------------

    @property
    def taken(self) -> int:
        """Rows and labels that drains have taken so far."""
        return self._rows_out + self._labels_out

    def saved(self) -> SavedJoin:
        """What outlives the process: counts. Ids are known to this process alone, so what waits to be joined is lost.

        Rows that wait for their label have expired, and labels that wait for their prediction are unknown. For the
        draining thread, or under its lock.
        """
        lost = {"unknown": self.unknown + len(self._held)}
        groups = [replace(g, forgotten=g.predicted, expired=g.predicted - g.joined) for g in self._groups.values()]
        return SavedJoin({name: getattr(self, name) for name in COUNTERS} | lost, groups)

    def restore(self, saved: SavedJoin) -> None:
        """Go on counting, before anything was handed in."""
        for name, value in saved.counters.items():
            setattr(self, name, value)
        self._groups = OrderedDict(
            [((g.version, g.arm, g.slice), g) for g in saved.groups[-self.settings.max_groups :]]
        )

    # --- reading -----------------------------------------------------------------------------------------------------

    def groups(self) -> list[GroupCounts]:
        """Copies of the counts per group, sorted. For the draining thread, or under its lock."""
        return sorted(
            [GroupCounts(**asdict(group)) for group in self._groups.values()],
            key=lambda group: (group.version, group.arm, group.slice),
        )

    def counters(self) -> dict[str, int]:
        """What belongs to no group, and how much is held. Any thread."""
        return {
            "remembered_rows": len(self._memory),
            "remembered_ids": self._memory.requests,
            "held_labels": len(self._held),
            "queued": len(self._queue),
            "dropped_rows": self.dropped_rows,
            "dropped_labels": self.dropped_labels,
            "refused_rows": self.refused_rows,
            "invalid_rows": self.invalid_rows,
            "invalid_labels": self.invalid_labels,
            "unknown_labels": self.unknown,
            "held_dropped": self.held_dropped,
            "repeated_ids": self.repeated_ids,
        }


def predictions_of(settings: LabelSettings, found: Array) -> Array | None:
    """What an output holds (n, width) as predictions: logits made probabilities; None for no probability or class."""
    if settings.task == "regression":
        return found
    if settings.form == "class":
        whole = (found == np.floor(found)) & (found >= 0) & (found < max(2, len(settings.classes)))
        return found if whole.all() else None
    if settings.form == "logit":
        return _softmax(found) if settings.task == "multiclass" else _logistic(found)
    if found.min(initial=0.0) < 0.0 or found.max(initial=0.0) > 1.0:
        return None
    return found


def label_of(settings: LabelSettings, value: float | str) -> float | None:
    """An outcome, which may name a class, as a number of the task, or None."""
    if isinstance(value, str) and value in settings.class_of:
        return settings.class_of[value]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if not isfinite(number) or abs(number) > _LARGEST:
        return None
    if settings.task == "regression":
        return number
    return number if number == int(number) and 0 <= number < max(2, len(settings.classes)) else None


def _logistic(logits: Array) -> Array:
    """1 / (1 + e^-x) without overflow."""
    tail = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1.0, tail) / (1.0 + tail))


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
