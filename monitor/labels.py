"""The join of predictions and labels by request id: late, duplicated, out of order, of unknown ids, in bounded memory.

Two ends. ``remember`` and ``label`` are for the serving thread: they append to one bounded queue and do nothing else.
``drain`` is for one other thread: it takes the queue in its order, so that what is joined depends on the order of
arrival alone and never on when it was drained.

A prediction is known by every id it was given (the gateway's and the client's). A client's id that repeats means its
newest prediction. Per row the first label counts; the same again is a duplicate, another one a conflict, both only
counted. A label whose id nobody knows waits for its prediction for a while. Predictions are kept in a ring of rows:
the oldest request is forgotten when a new one needs its room or when it is too old, and its rows without a label have
expired. Hence for every group at any time: predicted == joined + expired + waiting.

When the outcome was may be told with it. That says which window of time the row belongs to and nothing else: what
expires, and what is late, goes by when things arrive, so that no caller's clock can have predictions forgotten.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import isfinite, isnan
from typing import Final, NamedTuple, TypeAlias, cast

import numpy as np

from monitor.errors import StateError
from monitor.label_memory import IDS, GroupCounts, IdHash, Memory, SavedRows, remembered
from monitor.outcomes import ALL, OTHER, HasTensor, Joined, LabelSettings
from monitor.types import BYTES, DATATYPES, Array, Buffer

#: Entries of the queue taken by one drain, so that what it returns is bounded.
TURN: Final = 65_536
#: Predictions and labels beyond this are no numbers that a mean could be taken of.
_LARGEST: Final = 1e60
#: What predictions that are saved may take, the newest of them: bytes, by row (``label_memory.SavedRows``) and number.
_SAVED_BYTES: Final = 64_000_000
_SAVED_ROW_BYTES: Final = 56

OnJoined: TypeAlias = Callable[[Sequence[Joined]], object]
#: (version, arm, predictions end to end).
OnPredicted: TypeAlias = Callable[[str, str, Sequence[float]], object]


class _Prediction(NamedTuple):
    ids: Sequence[str]
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
    id: str
    row: int
    value: float
    now_ns: int
    time_ns: int


class _Held(NamedTuple):
    """A label of a value that the task has, by the hash of its id."""

    id: int
    row: int
    value: float
    now_ns: int
    time_ns: int


#: Of a ``LabelJoin``, by the names of its attributes.
COUNTERS: Final = ("dropped_rows", "dropped_labels", "refused_rows", "invalid_rows", "invalid_labels", "unknown",
                   "held_dropped", "repeated_ids")  # fmt: skip


@dataclass(slots=True, eq=False)
class SavedJoin:
    """What of a join outlives its process. ``counters`` by the names of ``COUNTERS``; ``key``: of the ids' hashes.

    ``groups``: those that count, the newest last, after those that only remembered rows are of. ``held``, in the order
    they came: int64 (k, 4) with id, row, when it came and when the outcome was; ``held_values`` float64 (k,).
    """

    counters: dict[str, int]
    groups: list[GroupCounts]
    key: bytes
    rows: SavedRows
    held: Array = field(default_factory=lambda: np.empty((0, 4), "i8"))
    held_values: Array = field(default_factory=lambda: np.empty(0))

    def check(self) -> None:
        """Raises StateError when the parts do not belong together."""
        self.rows.check(len(self.groups))
        if self.held.shape != (len(self.held), 4) or self.held_values.shape != self.held.shape[:1]:
            raise StateError("the saved labels that wait are damaged")


class LabelJoin:
    """The join of one model's predictions and labels. See the module for who may call what.

    Counters of the serving end, each with one writer: ``dropped_rows`` and ``dropped_labels`` (the queue was full),
    ``refused_rows`` (no such output), ``invalid_labels`` (no value of the task). Counters of the drain:
    ``invalid_rows`` (contents that do not fit, or no finite number), ``unknown`` labels (no prediction came in time, or
    no such row), ``held_dropped`` (labels that waited and had to make room; they are unknown too), ``repeated_ids``.
    """

    def __init__(self, model: str, settings: LabelSettings, on_predicted: OnPredicted | None = None) -> None:
        """``on_predicted`` sees every prediction that is remembered, on the draining thread."""
        self.model, self.settings = model, settings
        self._on_predicted = on_predicted
        self.dropped_rows = self.dropped_labels = self.refused_rows = 0
        self.invalid_rows = self.invalid_labels = self.unknown = self.held_dropped = self.repeated_ids = 0
        self._rows_in = self._rows_out = self._bytes_in = self._bytes_out = 0
        self._labels_in = self._labels_out = self._chars_in = self._chars_out = 0
        self._output, self._name = settings.output, settings.name
        self._queue: deque[_Prediction | _Label] = deque()
        self._hash = IdHash()
        self._memory = Memory(settings.capacity_rows, settings.width)
        self._groups: OrderedDict[tuple[str, str, str], GroupCounts] = OrderedDict()
        #: Labels that wait for their prediction, numbered in the order they came, and the numbers per id.
        self._held: OrderedDict[int, _Held] = OrderedDict()
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

        ``ids``: the one or two that feedback may call it by; empty ones are passed over. ``rows`` 0 (a model that does
        not batch) counts as one row. ``outputs``: the answer's tensors in any order. ``slice_value`` "": not sliced.
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
                    size = len(data) if isinstance(data, bytes) else sum(map(len, data))
                    size += len("".join(ids))
                    self._queue.append(
                        _Prediction(ids, version, arm, count, tensor.datatype, data, size, slice_value, unit, now_ns)
                    )
                    self._rows_in += count
                    self._bytes_in += size
                    return True
        except Exception:  # noqa: BLE001 - the request path's boundary: a strange answer is refused, not raised about
            self.refused_rows += count
            return False
        self.refused_rows += count
        return False

    def label(
        self, request_id: str, row: int, value: float | str, name: str, now_ns: int, time_ns: int | None = None
    ) -> bool:
        """Hand in one label; False when it is of another name, no value of the task, or was dropped. Never blocks,
        never raises.

        ``name`` "" is taken for the label whatever its name is. ``time_ns``: when the outcome was, as it was told;
        None: when it came. Whether it finds its prediction, only a drain can tell.
        """
        if name and name != self._name:
            return False
        number = label_of(self.settings, value)
        if number is None:
            self.invalid_labels += 1
            return False
        if (
            self._labels_in - self._labels_out >= self.settings.queue_labels
            or self._chars_in - self._chars_out > self.settings.queue_bytes
        ):
            self.dropped_labels += 1
            return False
        time_ns = now_ns if time_ns is None else max(0, min(time_ns, now_ns))
        self._queue.append(_Label(request_id, row, number, now_ns, time_ns))
        self._labels_in += 1
        self._chars_in += len(request_id)
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
            self._chars_out += len(item.id)
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
        ids = [self._hash(name) for name in item.ids[:IDS] if name]
        self.repeated_ids += self._memory.add(ids, item.rows, item.now_ns, item.unit, values, group)
        if self._on_predicted is not None:
            self._on_predicted(item.version, item.arm, values)
        if self._held:
            self._release(ids, joined)

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
        self._expire(item.now_ns)
        row = max(-1, min(item.row, self.settings.capacity_rows))  # no request has more: a number that can be saved
        self._seek(_Held(self._hash(item.id), row, item.value, item.now_ns, item.time_ns), joined)

    def _seek(self, item: _Held, joined: list[Joined]) -> None:
        """Join a label, or have it wait for its prediction."""
        number = self._memory.find(item.id)
        if number is None:
            self._hold(item)
        else:
            self._join(number, item, joined)

    def _join(self, number: int, item: _Held, joined: list[Joined]) -> None:
        memory = self._memory
        first = memory.place(number)
        group = memory.group[first]
        if group is None or not 0 <= item.row < memory.rows(number):
            self.unknown += 1
            return
        at = memory.place(number + item.row)
        known = memory.label[at]
        if not isnan(known):
            group.duplicate += known == item.value
            group.conflicting += known != item.value
            return
        memory.label[at] = item.value
        group.joined += 1
        predicted_ns = memory.time[first]
        group.late += item.now_ns - predicted_ns > self.settings.late_ns
        joined.append(
            Joined(
                self.model, group.version, group.arm, memory.unit[first], memory.prediction(number + item.row),
                item.value, group.slice, predicted_ns, item.now_ns, max(item.time_ns, predicted_ns),
            )
        )  # fmt: skip

    # --- labels before their prediction ------------------------------------------------------------------------------

    def _hold(self, item: _Held) -> None:
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
            self._seek(item, joined)

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
        """All but the queue. For the draining thread, or under its lock.

        Of the predictions the newest, as many as may be: for the next process, older ones have expired.
        """
        counted = list(self._groups.values())
        known = {id(group) for group in counted}
        groups = [group for group in self._memory.groups() if id(group) not in known] + counted
        rows = self._memory.saved(groups, _SAVED_BYTES // (_SAVED_ROW_BYTES + 8 * self._memory.width))
        kept = [
            replace(group, forgotten=group.predicted - held, expired=group.predicted - group.joined - waiting)
            for group, held, waiting in zip(groups, *remembered(rows, len(groups)), strict=True)
        ]
        held = [(item.id, item.row, item.now_ns, item.time_ns) for item in self._held.values()]
        return SavedJoin(
            {name: getattr(self, name) for name in COUNTERS},
            kept,
            self._hash.key,
            rows,
            np.array(held, "i8").reshape(-1, 4),
            np.array([item.value for item in self._held.values()]),
        )

    def restore(self, saved: SavedJoin) -> None:
        """Go on from there, before anything was handed in. Raises StateError, and then takes nothing."""
        saved.check()
        if not self._memory.fits(saved.rows):
            raise StateError("the saved predictions do not fit the settings")
        for name, value in saved.counters.items():
            setattr(self, name, value)
        counted = saved.groups[-self.settings.max_groups :]
        self._groups = OrderedDict([((g.version, g.arm, g.slice), g) for g in counted])
        self._hash = IdHash(saved.key)
        self._memory.restore(saved.rows, saved.groups)
        for (hashed, row, now_ns, time_ns), value in zip(saved.held.tolist(), saved.held_values.tolist(), strict=True):
            self._hold(_Held(hashed, row, value, now_ns, time_ns))
        self._predicted_again(saved)

    def _predicted_again(self, saved: SavedJoin) -> None:
        """Have what is remembered seen as if it had been predicted now, arm by arm."""
        if self._on_predicted is None:
            return
        arms = [(group.version, group.arm) for group in saved.groups]
        of = np.repeat(saved.rows.requests[:, 3], saved.rows.requests[:, 0])
        for arm in dict.fromkeys(arms):
            mine = np.isin(of, [place for place, name in enumerate(arms) if name == arm])
            if mine.any():
                self._on_predicted(*arm, saved.rows.predictions[mine].reshape(-1).tolist())

    # --- reading -----------------------------------------------------------------------------------------------------

    def groups(self) -> list[GroupCounts]:
        """Copies of the counts per group, sorted. For the draining thread, or under its lock."""
        return sorted(
            [replace(group) for group in self._groups.values()],
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
