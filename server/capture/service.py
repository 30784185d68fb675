"""Capture: a sample of requests and answers, and the labels that come for them, on their way to disk.

``offer`` is what a request pays: a look-up, a hash, and for those in the sample copies of what may be kept and an
append; ``offer_shadow`` takes in the same way what a shadow answered to its copy. Neither raises or blocks. Everything
else happens on the writer's thread. What the rules drop is not even copied.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from server.capture.columns import Plan, client_id_of, plan_of
from server.capture.ring import Captured, Label, Ring, Shadowed, owned, size_of
from server.capture.sampling import drawn, edge_of, sample_id
from server.capture.segments import SegmentStore, default_format
from server.capture.writer import Tell, Writer
from server.config.capture_options import CaptureSettings, CaptureSpec
from server.errors import ConfigError
from server.telemetry.snapshot import FamilySnapshot, Points
from server.types import Decision, ModelSpec, Tensor

log: Any = structlog.get_logger("capture")

#: Requests drawn by a client's id whose label may come under the gateway's: the newest are remembered.
_REMEMBERED: Final = 200_000
#: Versions whose plans are kept; more are made anew.
_MAX_PLANS: Final = 256
#: So many waiting records wake the writer before its time.
_WAKE_AT: Final = 1024
#: Ids that the gateway makes.
_OWN_ID: Final = re.compile(r"[0-9a-f]{16}-[0-9a-f]+", re.ASCII)


@dataclass(slots=True, frozen=True)
class CaptureReport:
    """Counts since the start. ``dropped`` by reason: full, too_large, no_id, failed, disk, unwritable."""

    captured: int
    labels: int
    shadows: int
    dropped: Mapping[str, int]
    written_rows: int
    written_segments: int
    removed_segments: int
    segments: int
    disk_bytes: int
    held_requests: int
    held_bytes: int


class Capture:
    """Captures for one process. ``offer`` and ``offer_label`` belong to the loop's thread.

    Raises ConfigError when the folder cannot be used, or a rule needs a secret that is not there.
    """

    def __init__(
        self,
        settings: CaptureSettings,
        folder: Path,
        *,
        wall_clock: Callable[[], int] = time.time_ns,
        tell: Tell | None = None,
    ) -> None:
        _require_secret(settings)
        store = SegmentStore(
            folder,
            default_format(settings.format),
            max_bytes=settings.max_disk_bytes,
            max_segments=settings.max_segments,
        )
        self.folder = folder
        self._settings = settings
        self._clock = wall_clock
        self._store = store
        self._ring = Ring(settings.max_requests, settings.max_bytes)
        self._edges: dict[str, int] = {name: edge_of(spec.sample) for name, spec in settings.specs.items()}
        self._edge = edge_of(settings.default.sample)
        self._plans: OrderedDict[tuple[str, int], tuple[ModelSpec, Plan]] = OrderedDict()
        self._by_own_id: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._captured = self._labels = self._shadows = 0
        self._dropped: Counter[str] = Counter()
        self._closed = False
        self._writer = Writer(self._ring, store, settings, self._plan_for_writer, tell)
        self._writer.start()

    # --- for the gateway ---------------------------------------------------------------------------------------

    def offer(
        self,
        model: str,
        client_id: str,
        tidegate_id: str,
        decision: Decision,
        spec: ModelSpec,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor] | None,
        status: str,
        latency_ns: int,
    ) -> None:
        """Capture a request that is over, if it is in the sample. Called after the answer.

        ``model``: the models entry. ``inputs`` have been checked against ``spec``; none of a request that was refused.
        ``status``: "ok" or the error's code.
        """
        edge = self._edges.get(model, self._edge)
        if not edge or self._closed or not drawn(client_id or tidegate_id, edge):
            return
        try:
            self._take(model, client_id, tidegate_id, decision, spec, inputs, outputs or (), status, latency_ns)
        except Exception as error:  # the boundary: the request is answered, and nothing may follow from this
            self._dropped["failed"] += 1
            log.error("capture_failed", id=tidegate_id, exc_info=error)

    def _take(
        self,
        model: str,
        client_id: str,
        tidegate_id: str,
        decision: Decision,
        spec: ModelSpec,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        status: str,
        latency_ns: int,
    ) -> None:
        plan = self._plan(model, spec)
        kept_inputs = [tensor for tensor in inputs if tensor is not None and tensor.name in plan.inputs]
        kept_outputs = [tensor for tensor in outputs if tensor.name in plan.outputs]
        size = size_of(kept_inputs) + size_of(kept_outputs)
        if not self._fits(size):
            return
        record = Captured(
            model, spec, tidegate_id, client_id, decision.arm, decision.generation, status, self._clock(), latency_ns,
            [owned(tensor) for tensor in kept_inputs], [owned(tensor) for tensor in kept_outputs], size,
        )  # fmt: skip
        self._ring.offer(record)
        self._captured += 1
        if client_id:
            self._remember(model, tidegate_id)
        if self._ring.records >= _WAKE_AT:
            self._writer.wake()

    def _fits(self, size: int) -> bool:
        """Is there room for a record? When there is not, that is counted."""
        if size > self._settings.segment_bytes:
            self._dropped["too_large"] += 1
            return False
        if not self._ring.has_room(size):
            self._dropped["full"] += 1
            self._writer.wake()
            return False
        return True

    def offer_shadow(
        self,
        model: str,
        client_id: str,
        tidegate_id: str,
        spec: ModelSpec,
        rows: int,
        outputs: Sequence[Tensor] | None,
        status: str,
        latency_ns: int,
    ) -> None:
        """Capture what a shadow answered to the copy of a request, if that request is in the sample. Never raises.

        ``model``: the models entry that was asked; ``spec``: the shadow's. ``rows``: of the copy, 0 without a batch.
        """
        edge = self._edges.get(model, self._edge)
        if not edge or self._closed or not drawn(sample_id(client_id, tidegate_id), edge):
            return
        try:
            plan = self._plan(model, spec)
            kept = [tensor for tensor in outputs or () if tensor.name in plan.outputs]
            size = size_of(kept)
            if self._fits(size):
                own = [owned(tensor) for tensor in kept]
                now = self._clock()
                record = Shadowed(model, spec, tidegate_id, client_id, rows, status, now, latency_ns, own, size)
                self._ring.offer(record)
                self._shadows += 1
        except Exception as error:  # the boundary: the shadow's lane goes on
            self._dropped["failed"] += 1
            log.error("capture_failed", id=tidegate_id, exc_info=error)

    def offer_label(
        self, model: str, request_id: str, name: str, value: float, row: int = 0, time_ns: int | None = None
    ) -> bool:
        """Capture what became of a request, if that was in the sample; whether it was taken. Never raises.

        ``request_id``: the client's id or ``x-tidegate-id``. ``time_ns``: since the epoch, None: now. NaN and
        infinities are no labels. A label under the gateway's id of a request that had one of its own is known for as
        long as the request is remembered.
        """
        edge = self._edges.get(model, self._edge)
        if not edge or self._closed or not request_id or not math.isfinite(value):
            return False
        if not drawn(request_id, edge) and (model, request_id) not in self._by_own_id:
            return False
        shown = request_id if _OWN_ID.fullmatch(request_id) else self._masked_id(model, request_id)
        if not shown or not self._ring.offer(Label(model, shown, row, name, value, self._when(time_ns))):
            self._dropped["full" if shown else "no_id"] += 1
            return False
        self._labels += 1
        return True

    def _when(self, time_ns: int | None) -> int:
        """A time that was told, where it can have been; else now."""
        now_ns = self._clock()
        return now_ns if time_ns is None else max(0, min(time_ns, now_ns))

    def _masked_id(self, model: str, request_id: str) -> str:
        rule = self._settings.of(model).rules.get("__client_id")
        return request_id if rule is None else client_id_of(request_id, rule, self._settings.secret.encode())

    def _remember(self, model: str, tidegate_id: str) -> None:
        self._by_own_id[model, tidegate_id] = None
        if len(self._by_own_id) > _REMEMBERED:
            self._by_own_id.popitem(last=False)

    def _plan(self, model: str, spec: ModelSpec) -> Plan:
        """What is captured of a version. Kept by the identity of its spec, which the kept plan holds on to."""
        key = (model, id(spec))
        known = self._plans.get(key)
        if known is None:
            known = self._plans[key] = spec, plan_of(spec, self._settings.of(model))
            if len(self._plans) > _MAX_PLANS:
                self._plans.popitem(last=False)
        return known[1]

    def _plan_for_writer(self, record: Captured | Shadowed) -> Plan:
        """On the writer's thread, which shares nothing with the loop's plans."""
        return plan_of(record.spec, self._settings.of(record.model))

    # --- for the operator --------------------------------------------------------------------------------------

    def report(self) -> CaptureReport:
        """Counts; from any thread."""
        return CaptureReport(
            self._captured,
            self._labels,
            self._shadows,
            {**dict(self._dropped), **dict(self._writer.lost)},
            self._writer.written_rows,
            self._writer.written_segments,
            self._store.removed,
            len(self._store),
            self._store.bytes,
            self._ring.records,
            self._ring.bytes,
        )

    def families(self) -> list[FamilySnapshot]:
        """The counts as metrics."""
        found = self.report()
        dropped: Points = {(reason,): count for reason, count in found.dropped.items()}
        kinds: Points = {("requests",): found.captured, ("labels",): found.labels}
        if self._settings.shadows:
            kinds = {**kinds, ("shadows",): found.shadows}
        return [
            FamilySnapshot("tidegate_captured_total", "Captured records.", "counter", ("kind",), kinds),
            FamilySnapshot("tidegate_capture_dropped_total", "Records given up.", "counter", ("reason",), dropped),
            FamilySnapshot("tidegate_capture_disk_bytes", "Segments on disk.", "gauge", (), {(): found.disk_bytes}),
            FamilySnapshot("tidegate_capture_held_bytes", "Waiting in memory.", "gauge", (), {(): found.held_bytes}),
        ]

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Write everything that was offered before; False when that takes longer. Blocks; not from the loop."""
        return self._writer.flush(timeout_s)

    def close(self) -> None:
        """Take nothing more and write what there is. Blocks; call it off the loop, after the last answer."""
        self._closed = True
        self._writer.close()


def _require_secret(settings: CaptureSettings) -> None:
    specs = {"": settings.default, **settings.specs}
    for model, spec in specs.items():
        for column in _hashed(spec):
            if not settings.secret:
                where = f"capture of model '{model}'" if model else "capture"
                raise ConfigError(f"{where}: column '{column}' is to be hashed, which needs capture.secret")


def _hashed(spec: CaptureSpec) -> list[str]:
    return [column for column, rule in spec.rules.items() if rule.action == "hmac"]


__all__ = ["Capture", "CaptureReport", "sample_id"]
