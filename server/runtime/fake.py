"""A runtime without a model: deterministic answers, scripted faults, runs that wait for a test's word.

Shipped, as it also serves for trying a deployment's plumbing without weights. Every FP32 input ``x`` is answered by
an output ``y`` of the same shape with ``y = scale * x + offset``, so rows never influence each other and a mix-up of
rows shows in the values. A row that starts with ``Script.reject_marker`` is refused as a graph refuses bad input:
the whole batch fails, and only running members alone tells whose row it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from server.errors import InputRejected, ModelLoadError, OutOfMemory, RuntimeFailure, TidegateError
from server.runtime.base import Batch, LoadRequest
from server.types import ModelSpec, Tensor, TensorSpec, element_count


@dataclass(slots=True)
class Script:
    """What the fake does. ``before_run(n)`` is called in run ``n`` (from 0), on the running thread: it may block on an
    event; ``faults[n]`` is raised by run ``n``, after that."""

    scale: float = 2.0
    offset: float = 1.0
    width: int = 4
    max_batch_size: int = 64
    learned_batch_size: int = 64
    run_ns: int = 10_000
    faults: Mapping[int, TidegateError] = field(default_factory=dict)
    reject_marker: float | None = None
    #: Batches of more rows than this find no memory; 0: any number does.
    memory_rows: int = 0
    before_run: Callable[[int], None] | None = None
    load_error: str = ""


@dataclass(slots=True, frozen=True)
class RunRecord:
    """One run as it started: its number, instance, rows, and how many runs were going on, itself included."""

    number: int
    instance: int
    rows: int
    concurrent: int


class FakeEngine:
    """Implements ``Engine``. ``runs`` lists what was run, in order of start; safe to read from any thread."""

    def __init__(self, request: LoadRequest, script: Script) -> None:
        shape = (-1, script.width) if script.max_batch_size else (script.width,)
        self.spec = ModelSpec(
            name=request.name,
            version=request.version,
            inputs=(TensorSpec("x", "FP32", shape),),
            outputs=(TensorSpec("y", "FP32", shape),),
            platform="tidegate_fake",
            backend="fake",
            max_batch_size=script.max_batch_size,
            learned_batch_size=min(script.learned_batch_size, script.max_batch_size),
        )
        self.instances = max(1, request.options.instances)
        self.run_ns = script.run_ns
        self.memory_bytes = 0
        self.runs: list[RunRecord] = []
        self.closed = False
        self._script = script
        self._lock = threading.Lock()
        self._busy: set[int] = set()

    def run(self, instance: int, batch: Batch) -> list[Tensor]:
        record = self._begin(instance, batch.rows)
        try:
            return self._answer(record, batch)
        finally:
            with self._lock:
                self._busy.remove(instance)

    def close(self) -> None:
        self.closed = True

    def _begin(self, instance: int, rows: int) -> RunRecord:
        with self._lock:
            if self.closed:
                raise RuntimeFailure("The model has been unloaded.")
            if instance in self._busy or not 0 <= instance < self.instances:
                raise RuntimeFailure(f"Instance {instance} is busy or does not exist: the caller must not use it now.")
            self._busy.add(instance)
            record = RunRecord(len(self.runs), instance, rows, len(self._busy))
            self.runs.append(record)
            return record

    def _answer(self, record: RunRecord, batch: Batch) -> list[Tensor]:
        script = self._script
        if script.before_run is not None:
            script.before_run(record.number)
        fault = script.faults.get(record.number)
        if fault is not None:
            raise fault
        if script.memory_rows and batch.rows > script.memory_rows:
            raise OutOfMemory("The device has not enough memory for this batch.")
        values = _joined(batch)
        if script.reject_marker is not None:
            _refuse(values, script.reject_marker)
        output = (values * np.float32(script.scale) + np.float32(script.offset)).astype("<f4")
        return [Tensor("y", "FP32", batch.shapes[0], output.tobytes())]


class FakeRuntime:
    """Implements ``Runtime``: every load gives a ``FakeEngine`` that follows the script, kept in ``engines``."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.engines: list[FakeEngine] = []

    def load(self, request: LoadRequest) -> FakeEngine:
        if self.script.load_error:
            raise ModelLoadError(self.script.load_error)
        engine = FakeEngine(request, self.script)
        self.engines.append(engine)
        return engine

    def describe(self) -> Mapping[str, object]:
        return {"library": "fake", "providers_compiled": ["cpu"], "providers_working": ["cpu"], "providers_failing": {}}


def _joined(batch: Batch) -> np.ndarray[Any, np.dtype[np.float32]]:
    parts = batch.parts[0]
    if parts is None:
        raise RuntimeFailure("Input 'x' is missing.")
    data = b"".join(parts)  # type: ignore[arg-type]
    wanted = element_count(batch.shapes[0]) * 4
    if len(data) != wanted:
        raise RuntimeFailure(f"The batch holds {len(data)} bytes of input 'x', its shape says {wanted}.")
    return np.frombuffer(data, dtype="<f4").reshape(batch.shapes[0])


def _refuse(values: np.ndarray[Any, np.dtype[np.float32]], marker: float) -> None:
    rows = values.reshape(len(values), -1) if values.ndim > 1 else values.reshape(1, -1)
    if rows.size and bool((rows[:, 0] == np.float32(marker)).any()):
        raise InputRejected(f"The model refused this input: a row starts with {marker}.")
