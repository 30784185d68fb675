"""A small deterministic engine and a loop with a hand-turned clock, for the tests of this folder."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np

from server.batching.batcher import Batcher, Work
from server.errors import InputRejected
from server.runtime.base import Batch, BatchingOptions
from server.types import DATATYPES, ModelSpec, Tensor, TensorSpec

WIDTH = 3
REJECTED = -1.0


def spec_of(max_batch_size: int = 64, learned: int = 8) -> ModelSpec:
    """One input of three floats; outputs: twice the input, and its sum as text."""
    lead = (-1,) if max_batch_size else ()
    return ModelSpec(
        "double",
        "1",
        (TensorSpec("x", "FP32", (*lead, WIDTH)),),
        (TensorSpec("twice", "FP32", (*lead, WIDTH)), TensorSpec("text", "BYTES", (*lead, 1))),
        max_batch_size=max_batch_size,
        learned_batch_size=learned,
    )


class DoublingEngine:
    """Doubles its input. A value of REJECTED makes the whole run fail, as one bad row does in a real runtime.

    ``hook`` is called inside every run with the batch, and may block or raise.
    """

    def __init__(
        self,
        spec: ModelSpec | None = None,
        *,
        instances: int = 1,
        run_ns: int = 10_000,
        hook: Callable[[Batch], None] | None = None,
    ) -> None:
        self.spec = spec or spec_of()
        self.instances = instances
        self.run_ns = run_ns
        self.memory_bytes = 0
        self.hook = hook
        self.batches: list[Batch] = []
        self.busy: set[int] = set()

    def run(self, instance: int, batch: Batch) -> list[Tensor]:
        assert 0 <= instance < self.instances
        assert instance not in self.busy, "one run per instance at a time"
        self.busy.add(instance)
        try:
            return self._double(batch)
        finally:
            self.busy.discard(instance)

    def _double(self, batch: Batch) -> list[Tensor]:
        self.batches.append(batch)
        if self.hook is not None:
            self.hook(batch)
        x = joined(batch, 0, "FP32")
        if (x == REJECTED).any():
            raise InputRejected("index out of range")
        sums = [repr(float(row.sum())).encode() for row in x.reshape(-1, WIDTH)]
        return [
            Tensor("twice", "FP32", x.shape, (x * 2).tobytes()),
            Tensor("text", "BYTES", (*x.shape[:-1], 1), sums),
        ]

    def close(self) -> None:
        assert not self.busy


def joined(batch: Batch, index: int, datatype: str) -> np.ndarray[Any, np.dtype[Any]]:
    """The batch's input as one array, checked for size."""
    parts = batch.parts[index]
    assert parts is not None
    raw = b"".join(parts)  # type: ignore[arg-type]
    return np.frombuffer(raw, DATATYPES[datatype][0]).reshape(batch.shapes[index])


class ManualLoop:
    """Callbacks and timers of one thread, with a clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000_000
        self._ready: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[int, int, _Timer]] = []
        self._numbers = count()
        self.turns = 0

    def clock(self) -> int:
        return self.now

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        self._ready.append(lambda: callback(*args))

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> _Timer:
        timer = _Timer(callback)
        heapq.heappush(self._timers, (self.now + round(delay_s * 1e9), next(self._numbers), timer))
        return timer

    def turn(self) -> None:
        """One turn: the callbacks that are ready now, not those that they add."""
        self.turns += 1
        for _ in range(len(self._ready)):
            self._ready.popleft()()

    def settle(self) -> None:
        """Turn until nothing is ready."""
        for _ in range(1000):
            if not self._ready:
                return
            self.turn()
        raise AssertionError("the loop does not come to rest")

    def advance(self, ns: int) -> None:
        """Let time pass, firing timers on the way."""
        end = self.now + ns
        while self._timers and self._timers[0][0] <= end:
            due, _, timer = heapq.heappop(self._timers)
            self.now = max(self.now, due)
            if timer.callback is not None:
                timer.callback()
            self.settle()
        self.now = end

    def timers(self) -> int:
        return sum(timer.callback is not None for _, _, timer in self._timers)


class _Timer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


def manual_batcher(
    engine: DoublingEngine, options: BatchingOptions | None = None, **hooks: Any
) -> tuple[ManualLoop, Batcher]:
    """A batcher on a manual loop. Only for engines that run inline."""
    loop = ManualLoop()
    batcher = Batcher(
        engine,
        options or BatchingOptions(),
        clock=loop.clock,
        call_soon=loop.call_soon,
        call_soon_threadsafe=loop.call_soon,
        call_later=loop.call_later,
        **hooks,
    )
    return loop, batcher


def work_of(value: float, done: Callable[[Work], None], rows: int = 1, **terms: Any) -> Work:
    """Rows whose every element is ``value``, so that an answer tells whose it is."""
    data = np.full((rows, WIDTH), value, "<f4").tobytes()
    return Work([Tensor("x", "FP32", (rows, WIDTH), data)], rows, done, **terms)


def check_answer(work: Work, value: float) -> None:
    """The answer holds this request's own rows and nothing else."""
    assert work.error is None
    assert work.outputs is not None
    twice, text = work.outputs
    assert twice.shape == (work.rows, WIDTH)
    assert twice.array().tolist() == [[2 * value] * WIDTH] * work.rows
    assert text.data == [repr(value * WIDTH).encode()] * work.rows
