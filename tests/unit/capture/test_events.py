"""server.capture.events: CloudEvents in KServe's shape, to a real receiver; a bad one costs events and nothing else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from server.capture.columns import hashed, plan_of
from server.capture.events import BATCH_TYPE, REQUEST, RESPONSE, EventSender, events_of
from server.capture.ring import Captured
from server.config.capture_options import CaptureSettings, CaptureSpec, ColumnRule, EventOptions
from server.types import ModelSpec, Tensor, TensorSpec

SPEC = ModelSpec(
    "m", "7", (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("who", "BYTES", (-1, 1))),
    (TensorSpec("y", "FP32", (-1, 1)),), max_batch_size=8, digest="abc",
)  # fmt: skip
RULES = {"x[1]": ColumnRule("drop"), "who": ColumnRule("hmac")}
SECRET = "a secret of the tests"


def record(status: str = "ok") -> Captured:
    x = Tensor("x", "FP32", (2, 2), np.array([[1, 2], [np.nan, 4]], np.float32).tobytes())
    who = Tensor("who", "BYTES", (2, 1), [b"alice", b"bob"])
    y = Tensor("y", "FP32", (2, 1), np.array([5, 6], np.float32).tobytes())
    outputs = [y] if status == "ok" else []
    return Captured("m", SPEC, "t-1", "c-1", "stable", 3, status, 10**18, 5, [x, who], outputs)


def test_a_request_and_its_answer_share_an_id() -> None:
    plan = plan_of(SPEC, CaptureSpec(10_000, RULES))
    asked, answered = events_of(record(), plan, SECRET.encode(), "default")
    assert (asked["type"], answered["type"]) == (REQUEST, RESPONSE)
    assert asked["id"] == answered["id"] == "t-1"
    names = ("specversion", "inferenceservicename", "namespace", "component", "endpoint")
    assert {key: asked[key] for key in names} == {
        "specversion": "1.0", "inferenceservicename": "m", "namespace": "default", "component": "predictor",
        "endpoint": "stable",
    }  # fmt: skip
    assert asked["time"] == "2001-09-09T01:46:40+00:00"
    x, who = asked["data"]["inputs"]
    assert (x["shape"], x["data"], x["parameters"]) == ([2, 2], [1.0, None, "NaN", None], {"masked": True})
    assert who["data"] == [hashed(b"alice", SECRET.encode()), hashed(b"bob", SECRET.encode())]
    assert answered["data"] == {
        "id": "c-1", "model_name": "m", "model_version": "7",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [2, 1], "data": [5.0, 6.0]}],
    }  # fmt: skip


def test_a_failed_request_has_no_answer() -> None:
    plan = plan_of(SPEC, CaptureSpec(10_000, RULES))
    (asked,) = events_of(record("runtime_failure"), plan, SECRET.encode(), "default")
    assert asked["type"] == REQUEST


@contextmanager
def receiver(status: int) -> Iterator[tuple[str, list[Any]]]:
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.headers["Content-Type"], json.loads(body)))
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/events", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sender(url: str) -> EventSender:
    options = EventOptions(url, timeout_s=5)
    return EventSender(CaptureSettings(default=CaptureSpec(10_000, RULES), secret=SECRET, events=options), options)


def test_events_are_posted_in_batches() -> None:
    with receiver(202) as (url, got):
        made = sender(url)
        made.tell([record() for _ in range(300)])
        made.close()
    assert [kind for kind, _ in got] == [BATCH_TYPE] * 3
    assert sum(len(events) for _, events in got) == 600
    assert (made.sent, made.dropped) == (300, 0)
    assert "alice" not in json.dumps(got)


def test_a_receiver_that_fails_or_sends_elsewhere_costs_its_events() -> None:
    for status in (500, 307):
        with receiver(status) as (url, got):
            made = sender(url)
            made.tell([record()])
            made.close()
        assert len(got) == 1
        assert (made.sent, made.dropped) == (0, 1)


def test_a_receiver_that_is_not_there_costs_its_events() -> None:
    with receiver(200) as (url, _):
        pass
    made = sender(url)
    made.tell([record()])
    made.close()
    assert (made.sent, made.dropped) == (0, 1)
