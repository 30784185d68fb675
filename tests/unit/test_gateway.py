"""server.gateway over the shipped fake runtime: admission, exactly one end per call, deadlines, cancels, counting."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router.types import ModelRoutes
from server.batching.batcher import Batcher
from server.errors import (
    DeadlineExceeded,
    Draining,
    InvalidArgument,
    ModelNotFound,
    ModelNotReady,
    TidegateError,
    TooManyRequests,
    VersionNotFound,
)
from server.gateway import AdmissionLimits, Gateway, GatewayPermit, RolloutBooks, Served
from server.gateway.call import Attempt, Call
from server.runtime.base import BatchingOptions, LoadRequest, ModelOptions
from server.runtime.fake import FakeRuntime, Script
from server.telemetry.instruments import Telemetry
from server.telemetry.trace import RequestTrace, SpanSink, TraceGate
from server.types import (
    Decision,
    InferenceRequest,
    InferenceResponse,
    RequestedOutput,
    RequestHead,
    RequestLimits,
    Tensor,
    Unsent,
)

LONG_NS = 50_000_000


class Answer:
    """A reply that remembers, with a future for its end."""

    def __init__(self) -> None:
        self.messages: list[tuple[InferenceResponse, Decision]] = []
        self.ends: list[TidegateError | None] = []
        self.ended = asyncio.get_running_loop().create_future()

    def message(self, response: InferenceResponse, decision: Decision) -> None:
        self.messages.append((response, decision))

    def finish(self, error: TidegateError | None) -> None:
        self.ends.append(error)
        self.ended.set_result(None)

    async def error(self) -> TidegateError | None:
        await asyncio.wait_for(self.ended, 10)
        assert len(self.ends) == 1
        return self.ends[0]


class Rig:
    """A gateway with one fake model, ``m`` version 1: ``y = 2 x + 1`` over FP32 [n, 4]."""

    def __init__(self, script: Script | None = None, **admission: Any) -> None:
        loop = asyncio.get_running_loop()
        self.sink = SpanSink()
        self.telemetry = Telemetry.create("test", TraceGate(0.0), self.sink)
        self.gateway = Gateway(
            limits=RequestLimits(),
            admission=AdmissionLimits(**admission),
            telemetry=self.telemetry,
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_later=loop.call_later,
            unsent=Unsent(1000),
        )
        self.runtime = FakeRuntime(script or Script(scale=2.0, offset=1.0, width=4))
        self.engine = self.runtime.load(LoadRequest("m", "1", Path("none"), ModelOptions()))
        self.batcher = Batcher(
            self.engine,
            BatchingOptions(max_queue_size=4),
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=loop.call_later,
        )
        self.served = Served(
            self.engine.spec, self.batcher, ModelOptions(), self.telemetry.model("m", "1"), self.telemetry.instruments
        )
        table = self.gateway.table.with_model("m", ModelRoutes({"1": self.served}, "1"))
        self.gateway.publish(table)

    def admit(self, **head: Any) -> GatewayPermit:
        fields = {"protocol": "http", "model": "", "version": "", "metadata": {}, "received_ns": time.monotonic_ns()}
        return self.gateway.admit(RequestHead(**(fields | head)))

    def ask(
        self, value: float = 1.0, *, request: dict[str, Any] | None = None, **head: Any
    ) -> tuple[Answer, Any, GatewayPermit]:
        permit = self.admit(**head)
        x = Tensor("x", "FP32", (1, 4), np.full((1, 4), value, np.float32).tobytes())
        answer = Answer()
        fields = {"model": "m", "version": "", "id": "i", "inputs": [x]} | (request or {})
        ticket = self.gateway.handle(permit, InferenceRequest(**fields), answer)
        return answer, ticket, permit

    async def close(self) -> None:
        await asyncio.to_thread(self.batcher.close)
        self.engine.close()


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))


def test_an_answer_ends_once_and_says_where_it_came_from() -> None:
    async def body() -> None:
        rig = Rig()
        answer, _, permit = rig.ask(3.0)
        assert await answer.error() is None
        ((response, decision),) = answer.messages
        assert (response.model, response.version, response.id) == ("m", "1", "i")
        assert response.outputs[0].array().tolist() == [[7.0] * 4]
        assert (decision.version, decision.arm, decision.generation) == ("1", "stable", 1)
        permit.release()
        permit.release()
        assert rig.gateway.requests_in_flight == 0
        assert rig.served.calls == 0
        assert rig.telemetry.stats_for("m", "1").success_count == 1
        await rig.close()

    run(body)


def test_a_request_that_is_over_is_freed_without_the_collector() -> None:
    async def ask(rig: Rig) -> None:
        answer, _, permit = rig.ask()
        _, ticket, left = rig.ask()
        ticket.cancel()
        left.release()
        assert await answer.error() is None
        permit.release()

    async def body() -> None:
        rig = Rig()
        gc.collect()
        gc.disable()
        try:
            await ask(rig)
            await rig.close()  # the end of the thread that ran it
            assert [one for one in gc.get_objects() if isinstance(one, Attempt | Call)] == []
        finally:
            gc.enable()

    run(body)


def test_refusals_reach_the_reply() -> None:
    async def body() -> None:
        rig = Rig()
        cases = [
            ({"model": "nobody"}, ModelNotFound, "Request for unknown model"),
            ({"version": "9"}, VersionNotFound, "version 9"),
            ({"version": "x"}, InvalidArgument, "positive whole number"),
            ({"inputs": []}, InvalidArgument, "missing 'x'"),
            ({"outputs": [RequestedOutput("z")]}, InvalidArgument, "'z'"),
            ({"parameters": {"priority": "high"}}, InvalidArgument, "priority"),
        ]
        for fields, kind, words in cases:
            answer, _, permit = rig.ask(request=fields)
            error = await answer.error()
            assert isinstance(error, kind)
            assert words in error.message
            permit.release()
        rig.gateway.unready["late"] = "loading"
        answer, _, permit = rig.ask(request={"model": "late"})
        assert isinstance(await answer.error(), ModelNotReady)
        permit.release()
        assert rig.served.calls == rig.gateway.requests_in_flight == 0
        await rig.close()

    run(body)


def test_attempts_and_errors_of_a_version_are_those_that_gates_count() -> None:
    async def body() -> None:
        rig, books = Rig(), RolloutBooks()
        books.enter("candidate", "stable", 0.5)
        requests: list[dict[str, Any]] = [{}, {"inputs": []}, {"parameters": {"priority": "high"}}]
        for request in requests:
            answer, _, permit = rig.ask(request=request)
            await answer.error()
            permit.release()
        assert rig.served.attempts() == (3, 0)  # wrong requests are no errors of the version
        for code in sorted(codes()):
            before = rig.served.attempts()
            rig.served.attempted("candidate", code)
            books.attempt("candidate", 0, code, None)
            attempts, errors = (now - then for now, then in zip(rig.served.attempts(), before, strict=True))
            taken = books.take()
            assert (code, attempts, float(errors)) == (code, taken.attempts, taken.alone["error"].total)
        assert rig.served.attempts()[1] > 5
        await rig.close()

    run(body)


def codes() -> set[str]:
    """How an attempt may end."""
    kinds = [TidegateError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {"ok", *(kind.code for kind in kinds)}


def test_while_the_server_starts_what_is_unknown_is_not_ready() -> None:
    async def body() -> None:
        rig = Rig()
        rig.gateway.starting = True
        for name, version in (("later", ""), ("later", "3"), ("m", "2")):
            with pytest.raises(ModelNotReady, match=f"'{name}'.* is not ready: the server is starting") as refused:
                rig.admit(model=name, version=version)
            assert refused.value.retry_after_s
        rig.admit(model="m", version="1").release()
        with pytest.raises(InvalidArgument, match="positive whole number"):
            rig.admit(model="m", version="x")
        rig.gateway.starting = False
        with pytest.raises(ModelNotFound):
            rig.admit(model="later")
        with pytest.raises(VersionNotFound):
            rig.admit(model="m", version="2")
        await rig.close()

    run(body)


def test_admission_limits_name_themselves() -> None:
    async def body() -> None:
        rig = Rig(max_requests=2, max_bytes=100)
        first = rig.admit(content_length=60)
        with pytest.raises(TooManyRequests, match="60 bytes, 41 more"):
            rig.admit(content_length=41)
        second = rig.admit(content_length=40)
        with pytest.raises(TooManyRequests, match="2 requests are in flight, the limit is 2"):
            rig.admit(content_length=0)
        first.release()
        second.release()
        with pytest.raises(ModelNotFound):
            rig.admit(model="nobody", content_length=1)
        rig.gateway.close()
        with pytest.raises(Draining):
            rig.admit(content_length=1)
        assert rig.gateway.requests_in_flight == 0
        await rig.close()

    run(body)


def test_a_request_holds_what_comes_of_it() -> None:
    async def body() -> None:
        rig = Rig(max_bytes=1000)
        permit = rig.admit(content_length=100)
        permit.hold(900)
        with pytest.raises(TooManyRequests, match="hold 900 bytes, 101 more"):
            rig.admit(content_length=101)
        with pytest.raises(TooManyRequests, match="hold 900 bytes, 101 more"):
            permit.hold(1001)
        permit.hold(50)  # counts for what its head said
        with pytest.raises(TooManyRequests, match="hold 100 bytes, 901 more"):
            rig.admit(content_length=901)
        rig.admit(content_length=900).release()
        permit.release()
        permit.hold(2000)
        rig.admit(content_length=1000).release()
        await rig.close()

    run(body)


def test_answers_that_nobody_reads_keep_new_requests_out() -> None:
    async def body() -> None:
        rig = Rig()
        held = rig.gateway.unsent.moved(0, 1000)
        rig.admit().release()
        held = rig.gateway.unsent.moved(held, 1001)
        with pytest.raises(TooManyRequests, match="1001 bytes of answers wait for their readers, the limit is 1000"):
            rig.admit()
        assert 'tidegate_rejected_total{reason="too_many_requests"} 1\n' in rig.telemetry.metrics.render().decode()
        rig.gateway.unsent.moved(held, 0)
        rig.admit().release()
        await rig.close()

    run(body)


@pytest.mark.parametrize("width", [4, 20_000])
def test_what_was_admitted_before_is_answered_if_small(width: int) -> None:
    """And let go of if large, counted like any refusal: its own answer would be one more that waits."""

    async def body() -> None:
        release, started = threading.Event(), threading.Event()
        rig = Rig(replace(blocked(release, started), width=width))
        x = Tensor("x", "FP32", (1, width), bytes(4 * width))
        answer, _, permit = rig.ask(request={"inputs": [x]})
        await asyncio.to_thread(started.wait, 20)
        rig.gateway.unsent.moved(0, 1001)
        release.set()
        error = await answer.error()
        page = rig.telemetry.metrics.render().decode()
        if width == 4:
            assert error is None
            assert len(answer.messages) == 1
        else:
            assert isinstance(error, TooManyRequests)
            assert not answer.messages
        refused = 'tidegate_rejected_total{reason="too_many_requests"} 1\n' in page
        assert refused is (width > 4)
        permit.release()
        assert rig.served.calls == rig.gateway.requests_in_flight == 0
        await rig.close()

    run(body)


def blocked(release: threading.Event, started: threading.Event) -> Script:
    """A model whose runs wait for ``release``."""

    def before_run(_: int) -> None:
        started.set()
        assert release.wait(20)

    return Script(scale=2.0, offset=1.0, width=4, run_ns=LONG_NS, before_run=before_run)


def test_a_deadline_ends_running_work_for_its_caller_only() -> None:
    async def body() -> None:
        release, started = threading.Event(), threading.Event()
        rig = Rig(blocked(release, started))
        hurried, _, one = rig.ask(deadline_ns=time.monotonic_ns() + 100_000_000)
        patient, _, two = rig.ask(5.0)
        assert isinstance(await hurried.error(), DeadlineExceeded)
        assert hurried.messages == []
        release.set()
        assert await patient.error() is None
        assert patient.messages[0][0].outputs[0].array().tolist() == [[11.0] * 4]
        one.release()
        two.release()
        late, _, three = rig.ask(deadline_ns=1)
        assert isinstance(await late.error(), DeadlineExceeded)
        three.release()
        assert rig.served.calls == 0
        await rig.close()

    run(body)


def test_a_cancel_is_silent_and_leaves_neighbours_alone() -> None:
    async def body() -> None:
        release, started = threading.Event(), threading.Event()
        rig = Rig(blocked(release, started))
        first, _, a = rig.ask(1.0)
        await asyncio.to_thread(started.wait, 10)
        gone, ticket, b = rig.ask(2.0)
        kept, _, c = rig.ask(3.0)
        ticket.cancel()
        ticket.cancel()
        release.set()
        assert await first.error() is None
        assert await kept.error() is None
        assert kept.messages[0][0].outputs[0].array().tolist() == [[7.0] * 4]
        assert (gone.messages, gone.ends) == ([], [])
        for permit in (a, b, c):
            permit.release()
        assert rig.served.calls == 0
        assert rig.telemetry.stats_for("m", "1").failures == {"CANCELED": 1}
        await rig.close()

    run(body)


def test_a_full_queue_refuses_and_counts() -> None:
    async def body() -> None:
        release, started = threading.Event(), threading.Event()
        rig = Rig(blocked(release, started))
        running, _, _ = rig.ask()
        await asyncio.to_thread(started.wait, 10)
        waiting = [rig.ask()[0] for _ in range(4)]
        refused, _, _ = rig.ask()
        error = await refused.error()
        assert error is not None
        assert error.code == "queue_full"
        assert "Exceeds maximum queue size" in error.message
        assert rig.telemetry.rejected("queue_full").value == 1
        release.set()
        for answer in [running, *waiting]:
            assert await answer.error() is None
        await rig.close()

    run(body)


def test_sampled_requests_of_one_batch_share_its_record() -> None:
    async def body() -> None:
        rig = Rig()
        traced = {"metadata": {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}}
        answers = [rig.ask(float(i), **traced) for i in range(3)]
        plain, _, _ = rig.ask()
        for answer, _, _ in answers:
            assert await answer.error() is None
        assert await plain.error() is None
        assert answers[0][2].traceresponse is not None
        await asyncio.sleep(0)
        records = [record for record in rig.sink.take(10) if isinstance(record, RequestTrace)]
        assert len(records) == 3
        (batch,) = {id(record.batches[0]): record.batches[0] for record in records}.values()
        assert [member.span_id for member in batch.members] == [record.context.span_id for record in records]
        assert {record.context.header()[3:35] for record in records} == {"a" * 32}
        await rig.close()

    run(body)


def test_what_is_told_of_a_queue_is_that_of_the_version_in_the_table() -> None:
    async def body() -> None:
        started, release = threading.Event(), threading.Event()

        def hold(_: int) -> None:
            started.set()
            assert release.wait(20)

        rig = Rig(Script(run_ns=LONG_NS, before_run=hold))
        stats = rig.telemetry.stats_for("m", "1")
        other = Rig()  # the same version loaded once more: its telemetry is bound to another queue, as yet
        stats.pending = other.served.batcher.pending
        rig.gateway.publish(rig.gateway.table)
        asked = [rig.ask() for _ in range(1)]
        assert await asyncio.to_thread(started.wait, 20)
        asked += [rig.ask() for _ in range(3)]
        assert stats.pending() == 3
        release.set()
        for answer, _, permit in asked:
            assert await answer.error() is None
            permit.release()
        assert stats.pending() == 0
        await rig.close()
        await other.close()

    run(body)
