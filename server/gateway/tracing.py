"""Records of sampled requests: made when a request is over, shared per batch, handed on once per turn of the loop."""

from __future__ import annotations

from server.batching.batcher import CallSoon, Work
from server.telemetry.instruments import Telemetry
from server.telemetry.trace import BatchTrace, RequestTrace, TraceContext, new_span_id
from server.types import Decision, RequestHead


class SampledRequests:
    """Sampled requests of one turn of the loop. Members of one batch end in the same turn and share its record."""

    def __init__(self, telemetry: Telemetry, call_soon: CallSoon) -> None:
        self._telemetry = telemetry
        self._call_soon = call_soon
        self._records: list[RequestTrace] = []
        self._batches: dict[tuple[str, str, int], BatchTrace] = {}

    def add(self, record: RequestTrace, work: Work | None) -> None:
        if not self._records:
            self._call_soon(self._hand_over)
        self._records.append(record)
        if work is not None and work.batch_id:
            record.batches.append(self._batch(record, work))

    def _batch(self, record: RequestTrace, work: Work) -> BatchTrace:
        key = (record.model, record.version, work.batch_id)
        batch = self._batches.get(key)
        if batch is None:
            batch = self._batches[key] = BatchTrace(
                record.model, record.version, work.batch_rows, (), work.started_ns,
                work.assembled_ns, work.computed_ns, work.finished_ns,
            )  # fmt: skip
        batch.members += (record.context,)
        return batch

    def _hand_over(self) -> None:
        sink = self._telemetry.sink
        if sink is not None:
            for record in self._records:
                sink.offer(record)
        self._records.clear()
        self._batches.clear()


def beside(context: TraceContext) -> TraceContext:
    """A span of its own in the same place: of the next message of a stream."""
    return TraceContext(context.trace_id, new_span_id(), context.parent_id, context.tracestate)


def record_of(
    head: RequestHead,
    received_ns: int,
    tidegate_id: str,
    context: TraceContext,
    decision: Decision,
    work: Work | None,
    code: str,
    now: int,
) -> RequestTrace:
    """The record of one sampled request that is over. Times are monotonic ns."""
    queued = 0 if work is None else work.enqueued_ns
    return RequestTrace(
        context,
        head.protocol,
        received_ns,
        tidegate_id,
        decoded_ns=queued,
        queued_ns=queued,
        finished_ns=now,
        model=decision.model,
        version=decision.version,
        arm=decision.arm,
        rows=0 if work is None else work.rows,
        code=code,
    )
