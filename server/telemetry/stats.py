"""Statistics of one model version in the shape of Triton's statistics extension, and the ``nv_*`` metrics from them.

One set of plain integers is written per request and per batch; the JSON answer, the gRPC answer and the metrics page
are all derived from it when asked for, so nothing is counted twice.

Meanings (Triton's): a *request* is one call, an *inference* is one row, an *execution* is one run of the engine.
``success`` is the whole time of requests that were answered; ``queue`` and ``compute_*`` are those same requests'
shares (every member of a batch is charged the batch's full time); ``fail`` is the whole time of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from time import time_ns
from typing import Final

from server.telemetry.snapshot import FamilySnapshot, Kind, Points

_MODEL_LABELS: Final = ("model", "version")


@dataclass(slots=True)
class BatchStats:
    """Runs of one batch size: how many, and the time spent in each stage, in ns."""

    count: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0


def _nothing_pending() -> int:
    return 0


@dataclass(slots=True)
class ModelStats:
    """Counters of one (model, version). One writer, any number of readers."""

    model: str
    version: str
    #: Requests waiting for this version right now; whoever owns the queue puts its own reader here.
    pending: Callable[[], int] = field(default=_nothing_pending, repr=False, compare=False)
    inference_count: int = 0
    execution_count: int = 0
    last_inference_ms: int = 0
    success_count: int = 0
    success_ns: int = 0
    fail_count: int = 0
    fail_ns: int = 0
    queue_ns: int = 0
    compute_input_ns: int = 0
    compute_infer_ns: int = 0
    compute_output_ns: int = 0
    #: Failed requests per Triton reason (REJECTED, CANCELED, BACKEND, OTHER).
    failures: dict[str, int] = field(default_factory=dict)
    batches: dict[int, BatchStats] = field(default_factory=dict)

    def request_done(
        self,
        ok: bool,
        total_ns: int,
        queue_ns: int,
        compute_input_ns: int,
        compute_infer_ns: int,
        compute_output_ns: int,
        rows: int,
        code: str = "",
    ) -> None:
        """Count one finished request. ``code`` is the error's code when it failed; stage times then do not count."""
        if not ok:
            self._failed(total_ns, code)
            return
        self.success_count += 1
        self.success_ns += total_ns
        self.queue_ns += queue_ns
        self.compute_input_ns += compute_input_ns
        self.compute_infer_ns += compute_infer_ns
        self.compute_output_ns += compute_output_ns
        self.inference_count += rows

    def batch_done(self, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count one run of the engine over ``rows`` rows."""
        batch = self.batches.get(rows)
        if batch is None:
            batch = self.batches[rows] = BatchStats()
        batch.count += 1
        batch.input_ns += input_ns
        batch.infer_ns += infer_ns
        batch.output_ns += output_ns
        self.execution_count += 1
        self.last_inference_ms = time_ns() // 1_000_000

    def as_dict(self) -> dict[str, object]:
        """One entry of ``model_stats``, as the HTTP statistics answer has it."""
        done = self.success_count
        return {
            "name": self.model,
            "version": self.version,
            "last_inference": self.last_inference_ms,
            "inference_count": self.inference_count,
            "execution_count": self.execution_count,
            "inference_stats": {
                "success": _duration(done, self.success_ns),
                "fail": _duration(self.fail_count, self.fail_ns),
                "queue": _duration(done, self.queue_ns),
                "compute_input": _duration(done, self.compute_input_ns),
                "compute_infer": _duration(done, self.compute_infer_ns),
                "compute_output": _duration(done, self.compute_output_ns),
                "cache_hit": _duration(0, 0),
                "cache_miss": _duration(0, 0),
            },
            "batch_stats": [_batch_entry(rows, batch) for rows, batch in sorted(self.batches.items())],
        }

    def snapshot(self) -> ModelStats:
        """A detached copy that can be pickled: the numbers as they are now, without the pending reader."""
        batches = {rows: replace(batch) for rows, batch in tuple(self.batches.items())}
        return replace(self, pending=_nothing_pending, failures=dict(self.failures), batches=batches)

    def add(self, other: ModelStats) -> None:
        """Fold in what another process counted for the same version."""
        for name in _ADDED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.last_inference_ms = max(self.last_inference_ms, other.last_inference_ms)
        for reason, count in other.failures.items():
            self.failures[reason] = self.failures.get(reason, 0) + count
        for rows, theirs in other.batches.items():
            ours = self.batches.setdefault(rows, BatchStats())
            for stage in fields(BatchStats):
                setattr(ours, stage.name, getattr(ours, stage.name) + getattr(theirs, stage.name))

    def _failed(self, total_ns: int, code: str) -> None:
        self.fail_count += 1
        self.fail_ns += total_ns
        reason = failure_reason(code)
        self.failures[reason] = self.failures.get(reason, 0) + 1


_ADDED: Final = (
    "inference_count",
    "execution_count",
    "success_count",
    "success_ns",
    "fail_count",
    "fail_ns",
    "queue_ns",
    "compute_input_ns",
    "compute_infer_ns",
    "compute_output_ns",
)


def _duration(count: int, ns: int) -> dict[str, int]:
    return {"count": count, "ns": ns}


def _batch_entry(rows: int, batch: BatchStats) -> dict[str, object]:
    return {
        "batch_size": rows,
        "compute_input": _duration(batch.count, batch.input_ns),
        "compute_infer": _duration(batch.count, batch.infer_ns),
        "compute_output": _duration(batch.count, batch.output_ns),
    }


# --- Triton's metrics ----------------------------------------------------------------------------------------------

_REASONS: Final = {
    "queue_full": "REJECTED",
    "queue_timeout": "REJECTED",
    "too_many_requests": "REJECTED",
    "draining": "REJECTED",
    "deadline_exceeded": "CANCELED",
    "cancelled": "CANCELED",
    "input_rejected": "BACKEND",
    "out_of_memory": "BACKEND",
    "runtime_failure": "BACKEND",
    "upstream_unavailable": "BACKEND",
}
REASONS: Final = ("REJECTED", "CANCELED", "BACKEND", "OTHER")


def failure_reason(code: str) -> str:
    """Triton's word for why a request failed, from an error's code."""
    return _REASONS.get(code, "OTHER")


_NV_COUNTERS: Final[tuple[tuple[str, str, Callable[[ModelStats], int]], ...]] = (
    ("nv_inference_request_success", "Requests answered.", lambda s: s.success_count),
    ("nv_inference_count", "Rows inferred.", lambda s: s.inference_count),
    ("nv_inference_exec_count", "Runs of the engine.", lambda s: s.execution_count),
    ("nv_inference_request_duration_us", "Time of answered requests.", lambda s: s.success_ns // 1000),
    ("nv_inference_queue_duration_us", "Time answered requests waited.", lambda s: s.queue_ns // 1000),
    ("nv_inference_compute_input_duration_us", "Time gathering inputs.", lambda s: s.compute_input_ns // 1000),
    ("nv_inference_compute_infer_duration_us", "Time running the model.", lambda s: s.compute_infer_ns // 1000),
    ("nv_inference_compute_output_duration_us", "Time splitting outputs.", lambda s: s.compute_output_ns // 1000),
)


def nv_families(all_stats: Iterable[ModelStats]) -> Iterator[FamilySnapshot]:
    """Triton's metric names with Triton's labels, read from the statistics as they are now."""
    stats = tuple(all_stats)
    for name, help_text, read in _NV_COUNTERS:
        yield _per_model(name, help_text, "counter", {(s.model, s.version): read(s) for s in stats})
    failures: Points = {(s.model, s.version, reason): s.failures.get(reason, 0) for s in stats for reason in REASONS}
    yield FamilySnapshot(
        "nv_inference_request_failure", "Requests that failed.", "counter", (*_MODEL_LABELS, "reason"), failures
    )
    pending: Points = {(s.model, s.version): s.pending() for s in stats}
    yield _per_model("nv_inference_pending_request_count", "Requests waiting.", "gauge", pending)
    yield _per_model("tidegate_pending_requests", "Requests waiting.", "gauge", pending)


def _per_model(name: str, help_text: str, kind: Kind, points: Points) -> FamilySnapshot:
    return FamilySnapshot(name, help_text, kind, _MODEL_LABELS, points)
