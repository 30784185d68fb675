"""The writer: one thread that turns records into segments, by model, version and what was captured of it.

A segment is closed when it has enough rows or bytes, when it is old enough, when half of the memory that may be held is
in use, or when another one needs its place. What cannot be written is given up and counted, and the next segment is
tried anew: a full disk costs captured rows and nothing else.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import structlog

from server.capture.columns import Plan, TensorPlan, client_id_of, rows_of, tensor_columns
from server.capture.formats import Array, Table
from server.capture.ring import Captured, Label, Record, Ring, Shadowed
from server.capture.segments import Facts, Kind, SegmentStore, storage_errors
from server.config.capture_options import CaptureSettings
from server.types import Tensor

log: Any = structlog.get_logger("capture")

#: Segments that are gathered at once; another one closes the oldest.
MAX_OPEN: Final = 64
#: The longest that the thread sleeps: a ring that fills slowly is emptied this often.
_LOOK_S: Final = 1.0

#: Gets the captured requests of a segment that was written.
Tell: TypeAlias = Callable[[Sequence[Captured]], None]
PlanOf: TypeAlias = Callable[[Captured | Shadowed], Plan]


@dataclass(slots=True)
class _Open:
    """A segment that is being gathered. ``opened``: monotonic seconds."""

    opened: float
    records: list[Record] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0


class Writer:
    """Empties a ring into a store. ``plan_of``: what is captured of a request's version."""

    def __init__(
        self, ring: Ring, store: SegmentStore, settings: CaptureSettings, plan_of: PlanOf, tell: Tell | None = None
    ) -> None:
        self.written_rows = self.written_segments = 0
        self.lost: Counter[str] = Counter()
        self._ring = ring
        self._store = store
        self._settings = settings
        self._plan_of = plan_of
        self._tell = tell
        self._secret = settings.secret.encode()
        self._open: dict[tuple[object, ...], _Open] = {}
        self._errors = storage_errors(store.form)
        self._wake = threading.Event()
        self._flushed = threading.Condition()
        self._flushes = self._flushes_done = 0
        self._closing = False
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="tidegate-capture", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something to do. From any thread."""
        self._wake.set()

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Write everything that was offered before; False when that takes longer. Blocks; not from the loop."""
        with self._flushed:
            self._flushes += 1
            wanted = self._flushes
            self._wake.set()
            return self._flushed.wait_for(lambda: self._flushes_done >= wanted, timeout_s)

    def close(self, timeout_s: float = 60.0) -> None:
        """Write what there is and end the thread."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)

    # --- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._patience())
            self._wake.clear()
            self._turn()
        self._turn()
        for key in list(self._open):
            self._close_segment(key)
        self._store.close()

    def _patience(self) -> float:
        """Seconds until the oldest open segment is due."""
        due = [found.opened + self._settings.segment_age_s for found in self._open.values()]
        return max(0.0, min([_LOOK_S, *[at - time.monotonic() for at in due]]))

    def _turn(self) -> None:
        """Take what waits, and close what is due."""
        flushes = self._flushes
        for _ in range(self._ring.records):  # no more than that: what comes meanwhile must not put off the rest
            if (record := self._ring.take()) is None:
                break
            self._gather(record)
        now = time.monotonic()
        wanted = flushes != self._flushes_done
        for key, found in list(self._open.items()):
            if wanted or now >= found.opened + self._settings.segment_age_s:
                self._close_segment(key)
        if wanted:
            with self._flushed:
                self._flushes_done = flushes
                self._flushed.notify_all()

    def _gather(self, record: Record) -> None:
        key = _key(record)
        found = self._open.get(key)
        if found is None:
            if len(self._open) >= MAX_OPEN:
                self._close_segment(next(iter(self._open)))
            found = self._open[key] = _Open(time.monotonic())
        found.records.append(record)
        found.rows += _rows(record)
        found.bytes += record.size
        full = found.rows >= self._settings.segment_rows or found.bytes >= self._settings.segment_bytes
        if full:
            self._close_segment(key)
        elif self._ring.bytes > self._settings.max_bytes // 2 or self._ring.records > self._settings.max_requests // 2:
            self._close_segment(max(self._open, key=lambda one: self._open[one].bytes))

    def _close_segment(self, key: tuple[object, ...]) -> None:
        """Write one segment, or give it up; its records are let go either way."""
        found = self._open.pop(key)
        try:
            self._write(found)
        except self._errors as error:
            self._give_up(found, "disk", error)
        except Exception as error:  # noqa: BLE001 - the boundary: whatever was captured must not end the writer
            self._give_up(found, "unwritable", error)
        finally:
            for record in found.records:
                self._ring.done(record)

    def _give_up(self, found: _Open, reason: str, error: Exception) -> None:
        self.lost[reason] += len(found.records)
        if not self._failing:  # once, until a segment is written again
            log.error("capture_not_written", reason=reason, records=len(found.records), error=str(error))
        self._failing = True

    def _write(self, found: _Open) -> None:
        captured = [record for record in found.records if isinstance(record, Captured)]
        shadowed = [record for record in found.records if isinstance(record, Shadowed)]
        if captured:
            facts, table = self._requests(captured)
        elif shadowed:
            facts, table = self._shadows(shadowed)
        else:
            facts, table = _labels([record for record in found.records if isinstance(record, Label)])
        self._store.write(facts, table)
        self.written_segments += 1
        self.written_rows += len(next(iter(table.values())))
        if self._failing:
            log.info("capture_written_again")
            self._failing = False
        if captured and self._tell is not None:
            self._tell(captured)

    # --- tables ------------------------------------------------------------------------------------------------

    def _requests(self, records: list[Captured]) -> tuple[Facts, Table]:
        """The rows of requests of one version that carry the same tensors."""
        first = records[0]
        plan = self._plan_of(first)
        table = self._about(records, plan)
        counts = [_rows(record) for record in records]
        table["__arm"] = np.repeat(_texts([record.arm for record in records]), counts)
        table["__generation"] = np.repeat(np.array([record.generation for record in records], np.int64), counts)
        table |= self._side(plan.inputs, [record.inputs for record in records], plan.batched)
        table |= self._side(plan.outputs, [record.outputs for record in records], plan.batched)
        return _facts("requests", records, first.spec.version), table

    def _shadows(self, records: list[Shadowed]) -> tuple[Facts, Table]:
        """The rows of copies that one version of a shadow has answered with the same tensors, or has not."""
        first = records[0]
        plan = self._plan_of(first)
        table = self._about(records, plan)
        table |= self._side(plan.outputs, [record.outputs for record in records], plan.batched)
        return _facts("shadows", records, f"{first.spec.name}:{first.spec.version}"), table

    def _about(self, records: Sequence[Captured | Shadowed], plan: Plan) -> Table:
        """What is known of each row beside its tensors and its route."""
        counts = [_rows(record) for record in records]
        client_ids = [client_id_of(record.client_id, plan.client_id, self._secret) for record in records]
        columns = {
            "__id": _texts([record.tidegate_id for record in records]),
            "__client_id": _texts(client_ids),
            "__model": _texts([record.model for record in records]),
            "__version": _texts([record.spec.version for record in records]),
            "__digest": _texts([record.spec.digest for record in records]),
            "__time": np.array([record.time_ns for record in records], np.int64),
            "__latency_ns": np.array([record.latency_ns for record in records], np.int64),
            "__status": _texts([record.status for record in records]),
        }
        table = {name: np.repeat(values, counts) for name, values in columns.items()}
        table["__row"] = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        return table

    def _side(self, plans: Mapping[str, TensorPlan], records: Sequence[list[Tensor]], batched: bool) -> Table:
        """The columns of the inputs, or of the outputs, of records that carry the same tensors."""
        table: Table = {}
        by_name = [{tensor.name: tensor for tensor in tensors} for tensors in records]
        for name in by_name[0]:
            table |= self._tensor(plans[name], [tensors[name] for tensors in by_name], batched)
        return table

    def _tensor(self, plan: TensorPlan, tensors: Iterable[Tensor], batched: bool) -> Table:
        return tensor_columns(plan, [rows_of(tensor, batched) for tensor in tensors], self._secret)


def _key(record: Record) -> tuple[object, ...]:
    """What has to be equal within a segment."""
    if isinstance(record, Label):
        return ("labels", record.model)
    spec, outputs = record.spec, tuple([tensor.name for tensor in record.outputs])
    if isinstance(record, Shadowed):
        return ("shadows", record.model, spec.name, spec.version, spec.digest, id(spec), outputs)
    inputs = tuple([tensor.name for tensor in record.inputs])
    return ("requests", record.model, spec.version, spec.digest, id(spec), inputs, outputs)


def _rows(record: Record) -> int:
    """Rows of a record in the table; a request without tensors, which was refused, has one too."""
    if isinstance(record, Label) or not record.spec.max_batch_size:
        return 1
    if isinstance(record, Shadowed):
        return record.outputs[0].shape[0] if record.outputs else max(1, record.rows)
    tensors = record.inputs or record.outputs
    return tensors[0].shape[0] if tensors else 1


def _facts(kind: Kind, records: Sequence[Captured | Shadowed], version: str) -> Facts:
    times = [record.time_ns for record in records]
    return Facts(kind, records[0].model, version, records[0].spec.digest, min(times), max(times))


def _labels(records: list[Label]) -> tuple[Facts, Table]:
    times = [record.time_ns for record in records]
    table: Table = {
        "__id": _texts([record.id for record in records]),
        "__row": np.array([record.row for record in records], np.int32),
        "name": _texts([record.name for record in records]),
        "value": np.array([record.value for record in records], np.float64),
        "__time": np.array(times, np.int64),
    }
    return Facts("labels", records[0].model, "", "", min(times), max(times)), table


def _texts(values: Sequence[str]) -> Array:
    """Texts as a column; what is no valid Unicode is escaped, as files take UTF-8 only."""
    out = np.empty(len(values), object)
    out[:] = [value.encode("utf-8", "backslashreplace").decode() for value in values]
    return out
