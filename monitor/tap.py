"""The hot path's end of the monitor: a bounded queue of batches that may drop, never blocks and never raises.

One producer and one consumer per tap: give every thread that runs batches a tap of its own. Each counter has one
writer, so they are exact without a lock: ``offered == taken + waiting + dropped + refused`` at rest.

Contents are copied (one join per tensor), because the buffers of a request are the transport's again once it was
answered. Strings of BYTES tensors are immutable and only referred to; nobody changes the lists that they come in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, compress
from typing import Any, Final, NamedTuple, TypeAlias, cast

from monitor.types import STABLE, HasData, Parts, Source

#: A monitored tensor.
Key: TypeAlias = tuple[Source, str]
#: What a string of a BYTES tensor costs beside its contents.
_STRING_OVERHEAD: Final = 40
#: More bytes than ever wait.
_NEVER: Final = 1 << 60
#: Entries of the queue before a batch's contents: when, which arm, rows.
_FIELDS: Final = 3
_ROWS: Final = 2

#: What batches hold of one key: a tensor's bytes, or a BYTES tensor's strings in pieces, or None where an optional
#: input was absent.
Contents: TypeAlias = bytes | list[list[bytes]] | None


class Item(NamedTuple):
    """One batch by itself. ``data[k]``: contents of key k in pieces, None where an optional input was absent."""

    now_ns: int
    arm: str
    rows: int
    size: int
    data: Sequence[list[Any] | None]


class Batches(NamedTuple):
    """Batches in the order that they came, field by field.

    When they were offered (ns), as which arm, their rows, their bytes in the queue, and the contents of each key.
    """

    times: Sequence[int]
    arms: Sequence[str]
    rows: Sequence[int]
    sizes: Sequence[int]
    data: Sequence[Sequence[Contents]]

    @classmethod
    def of(cls, items: Sequence[Item]) -> Batches:
        """Batches that come from no tap."""
        times, arms, rows, sizes, data = zip(*items, strict=True) if items else [()] * 5
        return cls(
            times, arms, rows, sizes, [[_whole(pieces) for pieces in column] for column in zip(*data, strict=True)]
        )

    def part(self, first: int, last: int) -> Batches:
        """Those from place ``first`` to before ``last``."""
        own = slice(first, last)
        return Batches(
            self.times[own], self.arms[own], self.rows[own], self.sizes[own], [column[own] for column in self.data]
        )

    def without(self, arm: str) -> Batches:
        """Those that were not offered as ``arm``."""
        if arm not in self.arms:
            return self
        kept = [own != arm for own in self.arms]
        return Batches(
            list(compress(self.times, kept)),
            list(compress(self.arms, kept)),
            list(compress(self.rows, kept)),
            list(compress(self.sizes, kept)),
            [list(compress(column, kept)) for column in self.data],
        )


def _join(pieces: Any) -> bytes:
    """Of pieces that are bytes or views of bytes."""
    return b"".join(pieces)


def _whole(pieces: list[Any] | None) -> Contents:
    if pieces is None or (pieces and isinstance(pieces[0], list)):
        return pieces
    return _join(pieces)


def _size(contents: Contents) -> int:
    if contents is None:
        return 0
    if isinstance(contents, bytes):
        return len(contents)
    return sum([sum(map(len, strings)) + _STRING_OVERHEAD * len(strings) for strings in contents])


def are_whole(column: Sequence[Contents], rows: Sequence[int], width: int) -> bool:
    """Whether each batch has ``width`` bytes, or strings, for each of its rows, unless it is absent."""
    for contents, count in zip(column, rows, strict=True):
        if contents is None:
            continue
        found = len(contents) if isinstance(contents, bytes) else sum([len(strings) for strings in contents])
        if found != count * width:
            return False
    return True


class Tap:
    """Made by ``Monitor.tap``. ``offer`` is for one thread, ``take`` for one other; counters may be read by anyone.

    ``offered``, ``taken``, ``dropped`` and ``refused`` are rows since the tap was made; ``dropped_by_arm`` likewise.
    """

    __slots__ = (
        "_bytes_in",
        "_bytes_out",
        "_easy_bytes",
        "_easy_rows",
        "_failed",
        "_half",
        "_inputs",
        "_max_bytes",
        "_max_rows",
        "_only",
        "_outputs",
        "_queue",
        "_refused",
        "_stride",
        "_taken",
        "_texts",
        "_wake",
        "_wake_bytes",
        "dropped",
        "dropped_by_arm",
        "keys",
        "offered",
    )

    def __init__(
        self,
        inputs: Sequence[tuple[str, int, bool]],
        outputs: Sequence[tuple[str, int, bool]],
        *,
        max_rows: int,
        max_bytes: int,
        wake_bytes: int = 0,
        wake: Callable[[], object] | None = None,
    ) -> None:
        """``inputs`` and ``outputs``: (name, place in the model's order, is it BYTES) of the monitored tensors.

        ``wake`` is called when the queue becomes half full of rows, or when more than ``wake_bytes`` wait (0: however
        many): it must be cheap and must not raise.
        """
        self.keys: tuple[Key, ...] = (*[("input", n) for n, _, _ in inputs], *[("output", n) for n, _, _ in outputs])
        self._inputs = [place for _, place, text in inputs if not text]
        self._outputs = [place for _, place, text in outputs if not text]
        texts = [text for _, _, text in (*inputs, *outputs)]
        #: The general way is taken as soon as one tensor is BYTES: (from outputs, place, is it BYTES).
        self._texts = (
            [(k >= len(inputs), place, text) for k, (_, place, text) in enumerate((*inputs, *outputs))]
            if any(texts)
            else []
        )
        self._max_rows, self._max_bytes, self._wake = max_rows, max_bytes, wake
        self._half, self._wake_bytes = max_rows // 2, wake_bytes or _NEVER
        #: Of the one tensor that is monitored, where that is an input and not BYTES: its place; else -1.
        self._only = self._inputs[0] if len(texts) == 1 and self._inputs else -1
        #: Batch after batch: the three fields and the contents of each key. One flat list, so that what waits gives the
        #: garbage collector nothing to look at, and its fields can be had by slices.
        self._queue: list[Any] = []
        self._stride = _FIELDS + len(self.keys)
        self._bytes_in = self._bytes_out = 0
        #: As long as ``offered`` and ``_bytes_in`` are not over these, there is room and nobody is to be woken: what is
        #: taken meanwhile only makes more room.
        self._easy_rows, self._easy_bytes = self._half, min(max_bytes, self._wake_bytes)
        self.offered = self.dropped = self._taken = self._refused = self._failed = 0
        self.dropped_by_arm: dict[str, int] = {}

    @property
    def taken(self) -> int:
        """Rows taken from the queue to be counted, but for those that failed."""
        return self._taken - self._failed

    @property
    def refused(self) -> int:
        """Rows that could not be read when they were offered, or not be counted when they were taken."""
        return self._refused + self._failed

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return self.offered - self._taken - self.dropped - self._refused

    def offer(
        self,
        rows: int,
        inputs: Sequence[Parts | None],
        outputs: Sequence[HasData],
        now_ns: int,
        arm: str = STABLE,
    ) -> bool:
        """Hand in one batch after it was run; False when it was dropped. Never blocks, never raises.

        ``inputs[i]``: contents of the model's input i in pieces, as a batch has them; ``outputs[j].data``: of output j.
        ``rows`` 0 (a model that does not batch) counts as one row.
        """
        count = rows or 1
        offered = self.offered = self.offered + count
        many = False
        if offered > self._easy_rows or self._bytes_in > self._easy_bytes:
            full, many = self._measure(offered)
            if full:
                self.dropped += count
                self.dropped_by_arm[arm] = self.dropped_by_arm.get(arm, 0) + count
                return False
        queue = self._queue
        try:
            if self._only >= 0 and isinstance(inputs, list) and (parts := inputs[self._only]) is not None:
                joined = _join(parts)
                size = len(joined)
                queue.append(now_ns)  # one by one costs less than a list that is copied
                queue.append(arm)
                queue.append(count)
                queue.append(joined)
            else:
                entry: list[Any] = [now_ns, arm, count]
                size = self._copy_general(entry, inputs, outputs) if self._texts else self._copy(entry, inputs, outputs)
                queue.extend(entry)
        except BaseException as error:  # the request path's boundary: a strange batch is refused, not raised about
            self._refused += count
            if begun := len(queue) % self._stride:  # counted from the end: the consumer may be at the beginning
                del queue[-begun:]
            if not isinstance(error, Exception):
                raise
            return False
        self._bytes_in += size
        if many or self._bytes_in > self._easy_bytes:
            self._tell(many)
        return True

    def _measure(self, offered: int) -> tuple[bool, bool]:
        """Whether there is no room for a batch, and whether the queue is half full of rows with it."""
        gone, bytes_out = self._taken + self.dropped + self._refused, self._bytes_out
        waiting, held = offered - gone, self._bytes_in - bytes_out
        self._easy_rows, self._easy_bytes = gone + self._half, bytes_out + min(self._max_bytes, self._wake_bytes)
        return waiting > self._max_rows or held > self._max_bytes, waiting > self._half

    def _tell(self, many_rows: bool) -> None:
        if self._wake is not None and (many_rows or self._bytes_in - self._bytes_out > self._wake_bytes):
            self._wake()

    def _copy(self, entry: list[Any], inputs: Sequence[Parts | None], outputs: Sequence[HasData]) -> int:
        """Append the contents of each key; their bytes."""
        size = 0
        for place in self._inputs:
            parts = inputs[place]
            if parts is None:
                entry.append(None)
                continue
            joined = _join(parts)
            size += len(joined)
            entry.append(joined)
        for place in self._outputs:
            joined = _join((outputs[place].data,))
            size += len(joined)
            entry.append(joined)
        return size

    def _copy_general(self, entry: list[Any], inputs: Sequence[Parts | None], outputs: Sequence[HasData]) -> int:
        size = 0
        for of_output, place, text in self._texts:
            parts = [outputs[place].data] if of_output else inputs[place]
            if parts is None:
                entry.append(None)
            elif text:
                lists = cast("list[list[bytes]]", list(parts))
                size += _size(lists)
                entry.append(lists)
            else:
                joined = _join(parts)
                size += len(joined)
                entry.append(joined)
        return size

    def take(self, max_rows: int) -> Batches:
        """The oldest batches, until ``max_rows`` rows are reached; empty when none wait."""
        queue, stride = self._queue, self._stride
        # A batch has a row at least: no more have to be looked at. What comes from here on is left for the next time.
        end = min(len(queue) // stride, max_rows) * stride
        if self.waiting > max_rows:
            reached = list(accumulate(queue[_ROWS:end:stride]))
            end = min(end, (bisect_left(reached, max_rows) + 1) * stride)
        times, arms, rows, *data = [queue[field:end:stride] for field in range(stride)]
        sizes = [0] * len(rows)
        for column in data:
            sizes = [size + _size(contents) for size, contents in zip(sizes, column, strict=True)]
        taken = Batches(times, arms, rows, sizes, data)
        rows_out, bytes_out = self._taken + sum(rows), self._bytes_out + sum(sizes)
        del queue[:end]  # what may fail came before
        self._taken, self._bytes_out = rows_out, bytes_out
        return taken

    def fail(self, rows: int) -> None:
        """Rows that were taken could not be counted: they are refused. For the thread that takes."""
        self._failed += rows
