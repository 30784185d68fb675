"""Capture behind a real gateway: what callers were answered is what the segments hold, and labels find it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import duckdb
import numpy as np

from router.types import ModelRoutes
from server.batching.batcher import Batcher
from server.capture.segments import entries
from server.capture.service import Capture
from server.config.capture_options import CaptureSettings, CaptureSpec
from server.errors import TidegateError
from server.gateway import AdmissionLimits, Gateway, Served
from server.offline.dataset import Wanted, export_dataset
from server.runtime.base import BatchingOptions, LoadRequest, ModelOptions
from server.runtime.onnx import OnnxRuntime
from server.telemetry.instruments import Telemetry
from server.telemetry.trace import SpanSink, TraceGate
from server.types import Decision, InferenceRequest, InferenceResponse, RequestHead, RequestLimits, Tensor
from tests.support import models


class Capturing:
    """A reply that hands every request that is over to capture, as the end of a call does."""

    def __init__(self, capture: Capture, served: Served, request: InferenceRequest, tidegate_id: str) -> None:
        self.answer: InferenceResponse | None = None
        self.ended = asyncio.get_running_loop().create_future()
        self._capture, self._served, self._request, self._id = capture, served, request, tidegate_id
        self._decision = Decision("m", "", "", 0)
        self._began = time.monotonic_ns()

    def message(self, response: InferenceResponse, decision: Decision) -> None:
        self.answer, self._decision = response, decision

    def finish(self, error: TidegateError | None) -> None:
        request, answer = self._request, self.answer
        self._capture.offer(
            "m", request.id, self._id, self._decision, self._served.spec,
            request.inputs if error is None else [], None if answer is None else answer.outputs,
            "ok" if error is None else error.code, time.monotonic_ns() - self._began,
        )  # fmt: skip
        self.ended.set_result(None)


def gateway_of(path: Path) -> tuple[Gateway, Served]:
    loop = asyncio.get_running_loop()
    telemetry = Telemetry.create("test", TraceGate(0.0), SpanSink())
    gateway = Gateway(
        limits=RequestLimits(),
        admission=AdmissionLimits(),
        telemetry=telemetry,
        clock=time.monotonic_ns,
        call_soon=loop.call_soon,
        call_later=loop.call_later,
    )
    engine = OnnxRuntime(measure_budget_s=0).load(LoadRequest("m", "1", path, ModelOptions()))
    batcher = Batcher(
        engine,
        BatchingOptions(),
        clock=time.monotonic_ns,
        call_soon=loop.call_soon,
        call_soon_threadsafe=loop.call_soon_threadsafe,
        call_later=loop.call_later,
    )
    served = Served(engine.spec, batcher, ModelOptions(), telemetry.model("m", "1"), telemetry.instruments)
    gateway.publish(gateway.table.with_model("m", ModelRoutes({"1": served}, "1")))
    return gateway, served


async def ask(gateway: Gateway, served: Served, capture: Capture, number: int, width: int = 4) -> Capturing:
    permit = gateway.admit(RequestHead("http", "m", "", {}, time.monotonic_ns()))
    x = Tensor("x", "FP32", (1, width), np.full((1, width), number, np.float32).tobytes())
    request = InferenceRequest("m", "", f"c{number}" if number % 2 else "", [x])
    reply = Capturing(capture, served, request, permit.tidegate_id)
    gateway.handle(permit, request, reply)
    await reply.ended
    permit.release()
    return reply


def test_segments_hold_what_callers_were_answered(tmp_path: Path) -> None:
    async def scenario() -> int:
        gateway, served = gateway_of(models.affine(tmp_path / "affine.onnx", scale=2.0, shift=1.0))
        settings = CaptureSettings(default=CaptureSpec(10_000), format="parquet", segment_rows=40)
        capture = Capture(settings, tmp_path / "capture")
        replies = await asyncio.gather(*[ask(gateway, served, capture, number) for number in range(100)])
        assert all(reply.answer is not None for reply in replies)
        refused = await ask(gateway, served, capture, 1000, width=3)
        assert refused.answer is None
        for number in range(1, 100, 2):
            assert capture.offer_label("m", f"c{number}", "", float(number))
        await asyncio.to_thread(capture.close)
        return len(entries(tmp_path / "capture", "m", "requests"))

    assert asyncio.run(scenario()) > 2
    export_dataset(tmp_path / "capture", "m", tmp_path / "out.parquet", Wanted())
    with duckdb.connect() as connection:
        connection.execute(f"CREATE VIEW rows AS SELECT * FROM '{tmp_path / 'out.parquet'}'")  # noqa: S608

        def one(query: str) -> object:
            return connection.execute(f"SELECT {query} FROM rows").fetchone()  # noqa: S608 - the test's own words

        assert one("count(*), count(DISTINCT __id)") == (101, 101)
        assert one('count(*) FILTER ("y[0]" = 2 * "x[0]" + 1 AND "y[3]" = 2 * "x[3]" + 1)') == (100,)
        assert one("count(*) FILTER (__label = \"x[0]\" AND __client_id = 'c' || CAST(__label AS INT))") == (50,)
        assert one("count(*) FILTER (__status = 'invalid_argument' AND \"x[0]\" IS NULL)") == (1,)
        assert one("count(*) FILTER (__arm = 'stable' AND __version = '1' AND __latency_ns > 0)") == (100,)
