"""Captured requests and answers as CloudEvents in the shape of KServe's payload logger, posted in batches.

Each request gives an ``org.kubeflow.serving.inference.request`` and, when it was answered, an ``...response``; their
``id`` is the request's and joins them. ``data`` is the V2 payload after the rules: elements that are dropped are null,
and a tensor with any rule other than keep says so in its parameters. Delivery is best effort: one attempt, and what a
slow or failing receiver does not take is dropped and counted. Segments on disk are the record.
"""

from __future__ import annotations

import queue
import ssl
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any, Final
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener

import orjson
import structlog

from server.capture.columns import Plan, TensorPlan, client_id_of, masked, plan_of, rows_of
from server.capture.formats import json_values
from server.capture.ring import Captured
from server.config.capture_options import CaptureSettings, EventOptions
from server.errors import ConfigError
from server.types import Tensor

log: Any = structlog.get_logger("capture")

REQUEST: Final = "org.kubeflow.serving.inference.request"
RESPONSE: Final = "org.kubeflow.serving.inference.response"
BATCH_TYPE: Final = "application/cloudevents-batch+json"
#: Events of one POST at most.
MAX_BATCH: Final = 256
#: Segments that may wait to be sent; more are dropped.
_ROOM: Final = 2


def events_of(record: Captured, plan: Plan, secret: bytes, namespace: str) -> Iterator[dict[str, Any]]:
    """The event of a request, and that of its answer when there was one."""
    head = {
        "specversion": "1.0",
        "id": record.tidegate_id,
        "source": f"/models/{record.model}",
        "subject": record.spec.digest,
        "time": datetime.fromtimestamp(record.time_ns / 1e9, UTC).isoformat(),
        "datacontenttype": "application/json",
        "inferenceservicename": record.model,
        "namespace": namespace,
        "component": "predictor",
        "endpoint": record.arm,
    }
    client_id = client_id_of(record.client_id, plan.client_id, secret)
    inputs = [_payload(plan.inputs[tensor.name], tensor, plan.batched, secret) for tensor in record.inputs]
    yield {**head, "type": REQUEST, "data": {"id": client_id, "inputs": inputs}}
    if record.status == "ok":
        outputs = [_payload(plan.outputs[tensor.name], tensor, plan.batched, secret) for tensor in record.outputs]
        answer = {"id": client_id, "model_name": record.model, "model_version": record.spec.version}
        yield {**head, "type": RESPONSE, "data": {**answer, "outputs": outputs}}


def _payload(plan: TensorPlan, tensor: Tensor, batched: bool, secret: bytes) -> dict[str, Any]:
    rows = rows_of(tensor, batched)
    rules = plan.rules * (rows.shape[1] if plan.as_list else 1)
    columns: list[list[Any]] = [
        [None] * len(rows) if rule.action == "drop" else json_values(masked(rows[:, index], rule, secret))
        for index, rule in enumerate(rules)
    ]
    shown = {
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": list(tensor.shape),
        "data": [value for row in zip(*columns, strict=True) for value in row],
    }
    changed = any(rule.action != "keep" for rule in rules)
    return {**shown, "parameters": {"masked": True}} if changed else shown


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Payloads go where the configuration says and nowhere else."""


class EventSender:
    """Posts events from a thread of its own. ``tell`` takes the requests of a written segment; it never blocks."""

    def __init__(self, settings: CaptureSettings, options: EventOptions) -> None:
        self.sent = self.dropped = 0
        self._settings = settings
        self._options = options
        self._secret = settings.secret.encode()
        try:
            context = ssl.create_default_context(cafile=options.ca_file or None)
        except OSError as error:
            raise ConfigError(f"capture.events.ca_file cannot be used: {error}") from error
        self._opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context), _NoRedirects())
        self._waiting: queue.Queue[Sequence[Captured] | None] = queue.Queue(_ROOM)
        self._thread = threading.Thread(target=self._run, name="tidegate-capture-events", daemon=True)
        self._thread.start()

    def tell(self, records: Sequence[Captured]) -> None:
        """Send what these requests say, later; dropped when the receiver does not keep up."""
        try:
            self._waiting.put_nowait(records)
        except queue.Full:
            self.dropped += len(records)

    def close(self) -> None:
        """Send what waits and end the thread. Blocks."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (records := self._waiting.get()) is not None:
            half = MAX_BATCH // 2
            for start in range(0, len(records), half):
                self._post(records[start : start + half])
            del records  # an idle thread keeps no tensors

    def _post(self, records: Sequence[Captured]) -> None:
        try:
            body = orjson.dumps([event for record in records for event in self._events(record)])
            request = Request(self._options.url, body, {"Content-Type": BATCH_TYPE}, method="POST")  # noqa: S310
            with self._opener.open(request, timeout=self._options.timeout_s):
                self.sent += len(records)
        except HTTPError as error:
            error.close()  # it holds the connection
            self._failed(records, str(error))
        except (OSError, HTTPException) as error:
            self._failed(records, str(error))
        except Exception as error:  # the boundary: whatever was captured must not end the sender
            self._failed(records, type(error).__name__)
            log.error("capture_event_failed", exc_info=error)

    def _events(self, record: Captured) -> Iterator[dict[str, Any]]:
        plan = plan_of(record.spec, self._settings.of(record.model))
        return events_of(record, plan, self._secret, self._options.namespace)

    def _failed(self, records: Sequence[Captured], reason: str) -> None:
        if not self.dropped:
            log.warning("capture_events_dropped", requests=len(records), error=reason)
        self.dropped += len(records)
