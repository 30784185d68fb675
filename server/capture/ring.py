"""What waits to be written: a bounded queue from the loop to the writer thread that never blocks and never grows.

Full, it takes nothing more and counts what it turned away. ``offer`` belongs to one thread, ``take`` and ``done`` to
another: each counter has one writer, so there is no lock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, TypeAlias

from server.types import ModelSpec, Tensor

#: What a record takes in memory beside its tensors, about.
_RECORD_BYTES: Final = 512
#: What an element of a BYTES tensor takes beside its characters.
_ELEMENT_BYTES: Final = 64


@dataclass(slots=True)
class Captured:
    """One request that was answered, or failed, with its own copies. ``rows`` 0: the model does not batch.

    Times are ns: ``time_ns`` since the epoch. ``size``: bytes that it holds.
    """

    model: str
    spec: ModelSpec
    tidegate_id: str
    client_id: str
    arm: str
    generation: int
    status: str
    time_ns: int
    latency_ns: int
    inputs: list[Tensor]
    outputs: list[Tensor]
    size: int = 0


@dataclass(slots=True)
class Label:
    """What became of a row of a request. ``time_ns``: when that was, or when it was told."""

    model: str
    id: str
    row: int
    name: str
    value: float
    time_ns: int
    size: int = _RECORD_BYTES


@dataclass(slots=True)
class Shadowed:
    """What a shadow answered to the copy of a request; the request's own record has the inputs.

    ``model``: the models entry that was asked; ``spec`` is the shadow's. ``rows``: of the copy, 0 where the model does
    not batch. Times are ns: ``time_ns`` since the epoch.
    """

    model: str
    spec: ModelSpec
    tidegate_id: str
    client_id: str
    rows: int
    status: str
    time_ns: int
    latency_ns: int
    outputs: list[Tensor]
    size: int = 0


#: What is captured.
Record: TypeAlias = Captured | Label | Shadowed


class Ring:
    """At most ``max_records`` records of at most ``max_bytes`` together, from ``offer`` until ``done``."""

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._waiting: deque[Record] = deque()
        self._offered = self._offered_bytes = 0
        self._done = self._done_bytes = 0

    @property
    def records(self) -> int:
        """Records that are held, here or by who took them."""
        return self._offered - self._done

    @property
    def bytes(self) -> int:
        return self._offered_bytes - self._done_bytes

    def has_room(self, size: int) -> bool:
        return self.records < self._max_records and self.bytes + size <= self._max_bytes

    def offer(self, record: Record) -> bool:
        """Take a record; False when there is no room for it."""
        if not self.has_room(record.size):
            return False
        self._offered += 1
        self._offered_bytes += record.size
        self._waiting.append(record)
        return True

    def take(self) -> Record | None:
        """The oldest record, which stays counted until ``done``."""
        return self._waiting.popleft() if self._waiting else None

    def done(self, record: Record) -> None:
        """A record is written, or given up."""
        self._done += 1
        self._done_bytes += record.size


def size_of(tensors: list[Tensor]) -> int:
    """Bytes of tensors once they are owned."""
    return _RECORD_BYTES + sum([_data_size(tensor) for tensor in tensors])


def _data_size(tensor: Tensor) -> int:
    data = tensor.data
    if isinstance(data, list):
        return sum(map(len, data)) + _ELEMENT_BYTES * len(data)
    return data.nbytes if isinstance(data, memoryview) else len(data)


def owned(tensor: Tensor) -> Tensor:
    """The tensor without the received body or the whole batch that it may be a view on."""
    if isinstance(tensor.data, bytes | list):
        return tensor
    return Tensor(tensor.name, tensor.datatype, tensor.shape, bytes(tensor.data))
