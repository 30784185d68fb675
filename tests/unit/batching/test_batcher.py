"""The shell: gathering, answering exactly once, isolation, bounds, timers, order, and the move to threads."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import structlog

from server.batching.batcher import AHEAD_NS, INLINE_NS, THREAD_NS, Batcher, BatchRecord, Work
from server.errors import (
    ConfigError,
    DeadlineExceeded,
    Draining,
    InputRejected,
    InvalidArgument,
    ModelNotReady,
    OutOfMemory,
    QueueFull,
    QueueTimeout,
    RuntimeFailure,
    TidegateError,
    UpstreamFailure,
    UpstreamUnavailable,
)
from server.runtime.base import Batch, BatchingOptions, QueuePolicy
from server.types import ModelSpec, Tensor, TensorSpec
from tests.unit.batching.engines import REJECTED, DoublingEngine, check_answer, manual_batcher, spec_of, work_of

MS = 1_000_000


class Answers:
    """Collects works in the order in which they are answered; one answered twice is in there twice."""

    def __init__(self) -> None:
        self.works: list[Work] = []

    def __call__(self, work: Work) -> None:
        self.works.append(work)


def submit_all(batcher: Batcher, values: list[float], done: Callable[[Work], None], **terms: Any) -> list[Work]:
    works = [work_of(value, done, **terms) for value in values]
    for work in works:
        batcher.submit(work)
    return works


# --- gathering -------------------------------------------------------------------------------------------------------


def test_one_turn_makes_one_batch() -> None:
    engine, answers = DoublingEngine(), Answers()
    loop, batcher = manual_batcher(engine)
    works = submit_all(batcher, [1.0, 2.0, 3.0], answers)
    assert answers.works == []
    assert batcher.pending() == 3
    loop.turn()
    assert answers.works == works
    assert [batch.rows for batch in engine.batches] == [3]
    for value, work in zip([1.0, 2.0, 3.0], works, strict=True):
        check_answer(work, value)
    assert batcher.is_idle()


def test_inline_runs_one_batch_per_turn() -> None:
    engine, answers = DoublingEngine(), Answers()
    loop, batcher = manual_batcher(engine)
    submit_all(batcher, [float(n) for n in range(20)], answers)
    sizes = []
    for _ in range(3):
        loop.turn()
        sizes.append(len(answers.works))
    assert sizes == [8, 16, 20]


def test_requests_of_several_rows_get_their_own_rows() -> None:
    engine, answers = DoublingEngine(), Answers()
    loop, batcher = manual_batcher(engine)
    works = [work_of(float(rows), answers, rows=rows) for rows in (1, 3, 2)]
    for work in works:
        batcher.submit(work)
    loop.settle()
    assert [batch.rows for batch in engine.batches] == [6]
    for work in works:
        check_answer(work, float(work.rows))
        assert (work.batch_rows, work.batch_members, work.batch_id) == (6, 3, 1)


def test_a_request_over_the_learned_size_runs_alone_and_whole() -> None:
    engine, answers = DoublingEngine(spec_of(learned=4)), Answers()
    loop, batcher = manual_batcher(engine)
    for rows in (2, 9, 2):
        batcher.submit(work_of(float(rows), answers, rows=rows))
    loop.settle()
    assert [batch.rows for batch in engine.batches] == [2, 9, 2]
    for work in answers.works:
        check_answer(work, float(work.rows))


def test_a_model_that_does_not_batch_gets_shapes_as_they_are() -> None:
    engine, answers = DoublingEngine(spec_of(0, 0)), Answers()
    loop, batcher = manual_batcher(engine)
    for value in (1.0, 2.0):
        work = work_of(value, answers)
        work.rows = 0
        work.inputs = [Tensor("x", "FP32", (3,), work.inputs[0].data)]  # type: ignore[union-attr]
        batcher.submit(work)
    loop.settle()
    assert [(batch.rows, batch.shapes) for batch in engine.batches] == [(0, [(3,)]), (0, [(3,)])]
    assert [work.outputs[0].array().tolist() for work in answers.works] == [[2.0] * 3, [4.0] * 3]  # type: ignore[index]


def test_times_are_in_order_and_the_record_adds_up() -> None:
    records: list[BatchRecord] = []
    engine, answers = DoublingEngine(), Answers()
    loop, batcher = manual_batcher(engine, on_batch=records.append)
    engine.hook = lambda _: loop.advance(700)
    first = work_of(1.0, answers)
    batcher.submit(first)
    loop.now += 50
    batcher.submit(work_of(2.0, answers))
    loop.now += 5
    loop.turn()
    assert first.started_ns - first.enqueued_ns == 55
    assert first.enqueued_ns < first.started_ns <= first.assembled_ns < first.computed_ns <= first.finished_ns
    (record,) = records
    assert (record.rows, record.members, record.queue_ns, record.compute_ns, record.error) == (2, 2, 60, 700, None)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{0}, {3}, {7}, {0, 7}, {1, 2, 5}, set(range(8))])
def test_a_bad_row_fails_alone(bad: set[int]) -> None:
    records: list[BatchRecord] = []
    engine, answers = DoublingEngine(), Answers()
    loop, batcher = manual_batcher(engine, on_batch=records.append)
    works = submit_all(batcher, [REJECTED if n in bad else float(n) for n in range(8)], answers)
    loop.settle()
    assert len(answers.works) == 8
    for number, work in enumerate(works):
        if number in bad:
            assert isinstance(work.error, InputRejected)
            assert work.outputs is None
        else:
            check_answer(work, float(number))
    assert len(records) <= 2 * 8 - 1
    assert records[0].error == "input_rejected"
    assert batcher.is_idle()


def test_out_of_memory_is_answered_by_smaller_batches() -> None:
    def hook(batch: Batch) -> None:
        if batch.rows > 3:
            raise OutOfMemory("no memory on the device")

    engine, answers = DoublingEngine(hook=hook), Answers()
    loop, batcher = manual_batcher(engine)
    works = submit_all(batcher, [float(n) for n in range(8)], answers)
    loop.settle()
    assert [batch.rows for batch in engine.batches] == [8, 4, 2, 2, 4, 2, 2]
    for number, work in enumerate(works):
        check_answer(work, float(number))


@pytest.mark.parametrize("error", [UpstreamUnavailable("gone"), UpstreamFailure("500"), ModelNotReady("not yet")])
def test_a_batch_whose_server_fails_is_not_run_again_in_parts(error: TidegateError) -> None:
    def refuse(_: Batch) -> None:
        raise error

    engine, answers = DoublingEngine(hook=refuse), Answers()
    loop, batcher = manual_batcher(engine)
    works = submit_all(batcher, [float(n) for n in range(8)], answers)
    loop.settle()
    assert answers.works == works
    assert [work.error for work in works] == [error] * 8
    assert len(engine.batches) == 1
    assert batcher.is_idle()


def test_a_request_that_does_not_fit_alone_is_told_so() -> None:
    def hook(_: Batch) -> None:
        raise MemoryError

    engine, answers = DoublingEngine(hook=hook), Answers()
    loop, batcher = manual_batcher(engine)
    batcher.submit(work_of(1.0, answers))
    loop.settle()
    assert isinstance(answers.works[0].error, OutOfMemory)
    assert "model 'double' version '1'" in str(answers.works[0].error)


def test_an_unexpected_exception_tells_the_caller_nothing_and_stops_nothing() -> None:
    def hook(_: Batch) -> None:
        raise ZeroDivisionError("secret /path")

    engine, answers = DoublingEngine(hook=hook), Answers()
    loop, batcher = manual_batcher(engine)
    with structlog.testing.capture_logs() as logs:
        submit_all(batcher, [1.0, 2.0], answers)
        loop.settle()
    assert [type(work.error) for work in answers.works] == [RuntimeFailure, RuntimeFailure]
    assert "secret" not in str(answers.works[0].error)
    assert {(line["event"], line["model"]) for line in logs} == {("engine_raised", "double")}
    engine.hook = None
    work = work_of(3.0, answers)
    batcher.submit(work)
    loop.settle()
    check_answer(work, 3.0)


def test_an_engine_whose_output_is_not_the_batch_is_asked_again_for_each() -> None:
    """A wrong first dimension cannot be split; alone each member gets what the model gives."""

    class Pooling(DoublingEngine):
        def run(self, instance: int, batch: Batch) -> list[Tensor]:
            return [Tensor("one", "FP32", (1,), b"\0\0\x80?")]

    engine, answers = Pooling(), Answers()
    loop, batcher = manual_batcher(engine)
    submit_all(batcher, [1.0, 2.0, 3.0], answers)
    loop.settle()
    assert [work.outputs[0].shape for work in answers.works] == [(1,)] * 3  # type: ignore[index]


def test_a_callback_that_raises_does_not_hurt_its_neighbours() -> None:
    def broken(_: object) -> None:
        raise KeyError("mine")

    engine, answers = DoublingEngine(), Answers()
    loop, batcher = manual_batcher(engine, on_batch=broken)
    work = work_of(1.0, broken)
    with structlog.testing.capture_logs() as logs:
        batcher.submit(work)
        submit_all(batcher, [2.0], answers)
        loop.settle()
    check_answer(answers.works[0], 2.0)
    assert [line["event"] for line in logs] == ["callback_raised"] * 2
    assert batcher.is_idle()


# --- cancel ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_never_reaches_the_engine() -> None:
    engine, answers = DoublingEngine(), Answers()
    loop, batcher = manual_batcher(engine)
    works = submit_all(batcher, [1.0, 2.0, 3.0], answers)
    batcher.cancel(works[1])
    batcher.cancel(works[1])
    assert batcher.pending() == 2
    loop.settle()
    assert [batch.rows for batch in engine.batches] == [2]
    assert answers.works == [works[0], works[2]]
    batcher.cancel(works[0])
    assert batcher.is_idle()


@pytest.mark.parametrize("in_order", [False, True])
def test_what_is_abandoned_is_told_so_once_whether_it_waits_or_runs(in_order: bool) -> None:
    async def main() -> None:
        started, go, back = threading.Event(), threading.Event(), asyncio.Event()

        def hang(_: Batch) -> None:
            started.set()
            assert go.wait(20)

        engine, answers = DoublingEngine(run_ns=THREAD_NS, hook=hang), Answers()
        loop = asyncio.get_running_loop()
        batcher = Batcher(
            engine,
            BatchingOptions(preserve_ordering=in_order),
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=loop.call_later,
            on_batch=lambda _: back.set(),
        )
        running = submit_all(batcher, [1.0, 2.0], answers)
        assert await asyncio.to_thread(started.wait, 20)
        waiting = submit_all(batcher, [3.0, 4.0], answers)
        batcher.cancel(running[1])
        batcher.cancel(waiting[1])
        assert batcher.abandon(OutOfMemory("enough")) == 2
        assert [work.inputs for work in answers.works] == [waiting[0].inputs, running[0].inputs]
        for work in answers.works:
            assert isinstance(work.error, OutOfMemory)
            assert work.outputs is None
        assert batcher.abandon(OutOfMemory("again")) == 0
        with pytest.raises(Draining):
            batcher.submit(work_of(5.0, answers))
        assert batcher.pending() == 0
        go.set()
        await asyncio.wait_for(back.wait(), 20)
        assert len(answers.works) == 2
        assert batcher.is_idle()
        await asyncio.to_thread(batcher.close)

    asyncio.run(main())


def test_cancelling_a_neighbour_from_done_is_obeyed() -> None:
    engine, answers = DoublingEngine(), Answers()
    loop, batcher = manual_batcher(engine)
    second = work_of(2.0, answers)
    batcher.submit(work_of(1.0, lambda _: batcher.cancel(second)))
    batcher.submit(second)
    submit_all(batcher, [3.0], answers)
    loop.settle()
    assert len(answers.works) == 1
    check_answer(answers.works[0], 3.0)
    assert batcher.is_idle()


def test_submitting_from_done_works() -> None:
    engine, answers = DoublingEngine(), Answers()
    loop, batcher = manual_batcher(engine, BatchingOptions(max_queue_size=1))
    batcher.submit(work_of(1.0, lambda _: batcher.submit(work_of(2.0, answers))))
    loop.settle()
    check_answer(answers.works[0], 2.0)


# --- bounds, timeouts, deadlines -------------------------------------------------------------------------------------


def test_the_bound_refuses_with_the_text_clients_match_on() -> None:
    async def body() -> None:
        async with Gate() as gate:
            batcher = gate.batcher(BatchingOptions(max_queue_size=2))
            done = gate.collect(3)
            gate.submit(batcher, 1.0)
            await gate.running(1)
            gate.submit(batcher, 2.0)
            gate.submit(batcher, 3.0)
            with pytest.raises(QueueFull, match=r"^Exceeds maximum queue size: 2 .* limit is 2") as caught:
                gate.submit(batcher, 4.0)
            assert caught.value.retry_after_s
            gate.open()
            await done
            assert [work.error for work in gate.answers] == [None] * 3

    asyncio.run(body())


def test_only_those_count_as_waiting_who_wait_for_the_engine() -> None:
    engine, answers = DoublingEngine(spec_of(learned=1)), Answers()
    loop, batcher = manual_batcher(engine, BatchingOptions(max_queue_size=1))
    submit_all(batcher, [1.0, 2.0, 3.0], answers)
    loop.settle()
    assert len(answers.works) == 3


def test_a_bound_per_priority_names_it() -> None:
    async def body() -> None:
        policies = {2: QueuePolicy(max_queue_size=1)}
        options = BatchingOptions(priority_levels=2, default_priority_level=1, priority_queue_policy=policies)
        async with Gate() as gate:
            batcher = gate.batcher(options)
            done = gate.collect(3)
            gate.submit(batcher, 1.0)
            await gate.running(1)
            gate.submit(batcher, 2.0, priority=2)
            with pytest.raises(QueueFull, match="at priority 2, the limit is 1"):
                gate.submit(batcher, 3.0, priority=2)
            gate.submit(batcher, 4.0, priority=1)
            gate.open()
            await done
            assert [work.priority for work in gate.answers] == [0, 1, 2]

    asyncio.run(body())


def test_queued_work_expires_by_one_timer_while_the_engine_is_busy() -> None:
    policy = QueuePolicy(default_timeout_us=20_000)
    engine, answers = DoublingEngine(spec_of(learned=4)), Answers()
    loop, batcher = manual_batcher(engine, BatchingOptions(default_queue_policy=policy, max_queue_delay_us=10**9))
    patient, hasty = work_of(1.0, answers), work_of(2.0, answers, deadline_ns=loop.now + 10 * MS)
    batcher.submit(patient)
    batcher.submit(hasty)
    loop.settle()
    assert loop.timers() == 1
    loop.advance(10 * MS)
    assert answers.works == [hasty]
    assert isinstance(hasty.error, DeadlineExceeded)
    assert "after 10000 us" in str(hasty.error)
    loop.advance(10 * MS)
    assert answers.works == [hasty, patient]
    assert isinstance(patient.error, QueueTimeout)
    assert str(patient.error).startswith("Request timeout expired: waited 20000 us")
    assert "limit is 20000 us" in str(patient.error)
    assert engine.batches == []
    assert batcher.is_idle()


def test_the_queue_delay_gathers_over_turns() -> None:
    engine, answers = DoublingEngine(), Answers()
    loop, batcher = manual_batcher(engine, BatchingOptions(max_queue_delay_us=5000))
    submit_all(batcher, [1.0], answers)
    loop.settle()
    loop.advance(3 * MS)
    submit_all(batcher, [2.0], answers)
    loop.settle()
    assert engine.batches == []
    loop.advance(2 * MS)
    assert [batch.rows for batch in engine.batches] == [2]
    assert len(answers.works) == 2


def test_an_earlier_deadline_replaces_the_timer() -> None:
    loop, batcher = manual_batcher(DoublingEngine(), BatchingOptions(max_queue_delay_us=10**9))
    answers = Answers()
    for ms in (9, 5, 7, 3):
        batcher.submit(work_of(float(ms), answers, deadline_ns=loop.now + ms * MS))
        loop.settle()
        assert loop.timers() == 1
    loop.advance(10 * MS)
    assert [work.started_ns for work in answers.works] == [0] * 4
    assert answers.works == sorted(answers.works, key=lambda work: work.deadline_ns)
    assert loop.timers() == 0


def test_a_cancel_that_makes_up_a_preferred_size_starts_the_batch() -> None:
    options = BatchingOptions(max_queue_delay_us=10**9, preferred_batch_sizes=(3, 8))
    engine, answers = DoublingEngine(), Answers()
    loop, batcher = manual_batcher(engine, options)
    works = [work_of(float(rows), answers, rows=rows) for rows in (2, 2, 1)]
    for work in works:
        batcher.submit(work)
    loop.settle()
    assert engine.batches == []
    batcher.cancel(works[1])
    loop.settle()
    assert answers.works == [works[0], works[2]]


def test_a_bucket_that_is_too_small_refuses_at_once() -> None:
    spec = ModelSpec("m", "1", (TensorSpec("ids", "INT64", (-1, -1)),), (), max_batch_size=8, learned_batch_size=8)
    loop, batcher = manual_batcher(DoublingEngine(spec), BatchingOptions(buckets={"ids": (4, 8)}))
    work = Work([Tensor("ids", "INT64", (1, 9), bytes(72))], 1, Answers())
    with pytest.raises(InvalidArgument, match=r"input 'ids': .* at most 8, .* got 9"):
        batcher.submit(work)
    loop.settle()
    assert batcher.is_idle()


def test_a_default_priority_outside_the_levels_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="default_priority_level must be between 1 and priority_levels"):
        manual_batcher(DoublingEngine(), BatchingOptions(priority_levels=3))


# --- order -----------------------------------------------------------------------------------------------------------


def test_order_is_kept_where_asked() -> None:
    options = BatchingOptions(preserve_ordering=True, priority_levels=2, default_priority_level=2)
    engine, answers = DoublingEngine(spec_of(learned=1)), Answers()
    loop, batcher = manual_batcher(engine, options)
    works = [work_of(float(n), answers, priority=1 if n in (2, 4) else 2) for n in range(6)]
    for work in works:
        batcher.submit(work)
    loop.turn()
    assert answers.works == [], "the urgent third ran first but has to wait for its turn"
    loop.settle()
    assert answers.works == works
    assert batcher.is_idle()


def test_a_cancelled_head_lets_the_others_go() -> None:
    options = BatchingOptions(preserve_ordering=True, priority_levels=2, default_priority_level=2)
    engine, answers = DoublingEngine(spec_of(learned=1)), Answers()
    loop, batcher = manual_batcher(engine, options)
    head, urgent = work_of(1.0, answers), work_of(2.0, answers, priority=1)
    batcher.submit(head)
    batcher.submit(urgent)
    loop.turn()
    assert answers.works == []
    assert not batcher.is_idle()
    batcher.cancel(head)
    loop.settle()
    assert answers.works == [urgent]
    assert batcher.is_idle()


# --- idle and close --------------------------------------------------------------------------------------------------


def test_on_idle_comes_after_the_last_answer() -> None:
    events: list[str] = []
    engine = DoublingEngine(spec_of(learned=2))
    loop, batcher = manual_batcher(engine)
    batcher.on_idle = lambda: events.append("idle")
    for value in (1.0, 2.0, 3.0):
        batcher.submit(work_of(value, lambda work: events.append("done")))
    loop.settle()
    assert events[:3] == ["done"] * 3
    assert set(events[3:]) == {"idle"}


def test_on_idle_comes_when_the_last_is_cancelled() -> None:
    idle: list[str] = []
    _, batcher = manual_batcher(DoublingEngine(), on_idle=lambda: idle.append("idle"))
    work = work_of(1.0, Answers())
    batcher.submit(work)
    batcher.cancel(work)
    assert idle == ["idle"]


def test_close_refuses_what_comes_and_what_waits() -> None:
    _, batcher = manual_batcher(DoublingEngine())
    work = work_of(1.0, Answers())
    batcher.submit(work)
    with pytest.raises(RuntimeError, match="1 requests still wait"):
        batcher.close()
    batcher.cancel(work)
    batcher.close()
    batcher.close()
    with pytest.raises(Draining, match="model 'double' version '1' is being unloaded"):
        batcher.submit(work_of(1.0, Answers()))


# --- threads ---------------------------------------------------------------------------------------------------------


class Gate:
    """An engine behind a gate on real threads, on the running asyncio loop. Runs stop in the engine until ``open``."""

    def __init__(self, instances: int = 1, **spec: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._opened = threading.Event()
        self._runs = asyncio.Semaphore(0)
        self.engine = DoublingEngine(spec_of(**spec), instances=instances, run_ns=10 * MS, hook=self._hook)
        self.answers: list[Work] = []
        self._wanted = 0
        self._done: asyncio.Event = asyncio.Event()
        self._batchers: list[Batcher] = []

    def _hook(self, _: Batch) -> None:
        self._loop.call_soon_threadsafe(self._runs.release)
        assert self._opened.wait(20)

    async def __aenter__(self) -> Gate:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.open()
        for batcher in self._batchers:
            await self._loop.run_in_executor(None, batcher.close)

    def open(self) -> None:
        self._opened.set()

    async def running(self, count: int) -> None:
        """Wait until so many further runs have reached the engine."""
        for _ in range(count):
            await asyncio.wait_for(self._runs.acquire(), 20)

    def batcher(self, options: BatchingOptions | None = None, **hooks: Any) -> Batcher:
        batcher = loop_batcher(self.engine, options or BatchingOptions(), **hooks)
        self._batchers.append(batcher)
        return batcher

    def submit(self, batcher: Batcher, value: float, **terms: Any) -> Work:
        work = work_of(value, self._answered, **terms)
        batcher.submit(work)
        return work

    def _answered(self, work: Work) -> None:
        self.answers.append(work)
        if len(self.answers) == self._wanted:
            self._done.set()

    def collect(self, count: int) -> asyncio.Task[Any]:
        self._wanted = count
        return asyncio.ensure_future(asyncio.wait_for(self._done.wait(), 20))


def loop_batcher(engine: DoublingEngine, options: BatchingOptions, **hooks: Any) -> Batcher:
    loop = asyncio.get_running_loop()
    return Batcher(
        engine,
        options,
        clock=time.monotonic_ns,
        call_soon=loop.call_soon,
        call_soon_threadsafe=loop.call_soon_threadsafe,
        call_later=loop.call_later,
        **hooks,
    )


def test_what_waits_while_the_engine_is_busy_goes_in_next() -> None:
    async def body() -> None:
        async with Gate() as gate:
            batcher = gate.batcher()
            done = gate.collect(6)
            gate.submit(batcher, 0.0)
            await gate.running(1)
            for value in range(1, 6):
                gate.submit(batcher, float(value))
            assert (batcher.pending(), batcher.in_flight()) == (5, 1)
            gate.open()
            await done
            assert [batch.rows for batch in gate.engine.batches] == [1, 5]
            for value, work in enumerate(gate.answers):
                check_answer(work, float(value))

    asyncio.run(body())


def test_a_full_batch_lies_ready_while_the_engine_is_busy() -> None:
    async def body() -> None:
        async with Gate() as gate:
            batcher = gate.batcher(BatchingOptions(max_rows=2))
            done = gate.collect(6)
            gate.submit(batcher, 0.0)
            await gate.running(1)
            works = [gate.submit(batcher, float(value)) for value in range(1, 6)]
            await asyncio.sleep(0)  # the flush
            assert (batcher.pending(), batcher.in_flight()) == (3, 3)
            assert [work.started_ns for work in works] == [0] * 5, "none has begun"
            second = threading.Event()
            gate.engine.hook = lambda _: second.set()
            gate.open()
            assert second.wait(20), "the thread goes on though the loop does not turn"
            await done
            assert [batch.rows for batch in gate.engine.batches] == [1, 2, 2, 1]
            for value, work in enumerate(gate.answers):
                check_answer(work, float(value))
            starts = [work.started_ns for work in gate.answers]
            assert starts == sorted(starts)
            assert len(set(starts)) == 4

    asyncio.run(body())


def test_nothing_lies_ready_before_what_may_be_more_urgent() -> None:
    async def body() -> None:
        async with Gate() as gate:
            batcher = gate.batcher(BatchingOptions(max_rows=2, priority_levels=2, default_priority_level=1))
            done = gate.collect(4)
            gate.submit(batcher, 0.0)
            await gate.running(1)
            for value in (1.0, 2.0):
                gate.submit(batcher, value, priority=2)
            await asyncio.sleep(0)
            assert (batcher.pending(), batcher.in_flight()) == (2, 1)
            gate.submit(batcher, 3.0, priority=1)
            gate.open()
            await done
            assert [work.batch_id for work in gate.answers] == [1, 2, 2, 3]
            check_answer(gate.answers[1], 3.0)

    asyncio.run(body())


def test_nothing_lies_ready_behind_a_long_run() -> None:
    async def body() -> None:
        async with Gate() as gate:
            gate.engine.run_ns = AHEAD_NS
            batcher = gate.batcher(BatchingOptions(max_rows=2))
            done = gate.collect(4)
            gate.submit(batcher, 0.0)
            await gate.running(1)
            for value in range(1, 4):
                gate.submit(batcher, float(value))
            await asyncio.sleep(0)
            assert (batcher.pending(), batcher.in_flight()) == (3, 1)
            gate.open()
            await done

    asyncio.run(body())


def test_on_idle_comes_after_the_answers_of_a_thread() -> None:
    async def body() -> None:
        async with Gate() as gate:
            events: list[int] = []
            batcher = gate.batcher(on_idle=lambda: events.append(len(gate.answers)))
            done = gate.collect(3)
            for value in range(3):
                gate.submit(batcher, float(value))
            gate.open()
            await done
            await until_idle(batcher)
            assert set(events) == {3}

    asyncio.run(body())


def test_instances_run_at_the_same_time() -> None:
    async def body() -> None:
        async with Gate(instances=2, learned=2) as gate:
            batcher = gate.batcher()
            done = gate.collect(4)
            for value in range(4):
                gate.submit(batcher, float(value))
            await gate.running(2)
            assert gate.engine.busy == {0, 1}
            gate.open()
            await done

    asyncio.run(body())


def test_cancelling_running_work_discards_its_result_only() -> None:
    async def body() -> None:
        async with Gate() as gate:
            batcher = gate.batcher()
            done = gate.collect(2)
            works = [gate.submit(batcher, float(value)) for value in range(3)]
            await gate.running(1)
            batcher.cancel(works[1])
            assert not batcher.is_idle()
            gate.open()
            await done
            assert gate.answers == [works[0], works[2]]
            check_answer(works[2], 2.0)
            assert batcher.is_idle()

    asyncio.run(body())


def test_a_deadline_drops_queued_work_while_the_engine_is_busy() -> None:
    async def body() -> None:
        async with Gate() as gate:
            batcher = gate.batcher()
            first = gate.collect(1)
            gate.submit(batcher, 1.0)
            await gate.running(1)
            late = gate.submit(batcher, 2.0, deadline_ns=time.monotonic_ns() + 20 * MS)
            await first
            assert gate.answers == [late]
            assert isinstance(late.error, DeadlineExceeded)
            assert time.monotonic_ns() >= late.deadline_ns
            assert late.started_ns == 0

    asyncio.run(body())


def test_close_waits_for_a_run_whose_members_were_all_cancelled() -> None:
    async def body() -> None:
        async with Gate() as gate:
            batcher = gate.batcher()
            work = gate.submit(batcher, 1.0)
            await gate.running(1)
            batcher.cancel(work)
            closing = asyncio.get_running_loop().run_in_executor(None, batcher.close)
            assert gate.engine.busy == {0}
            gate.open()
            await asyncio.wait_for(closing, 20)
            assert gate.engine.busy == set()
            assert gate.answers == []
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("tidegate-double")]

    asyncio.run(body())


def test_a_worker_whose_loop_is_gone_ends_quietly() -> None:
    opened, reached = threading.Event(), threading.Event()

    def hook(_: Batch) -> None:
        reached.set()
        assert opened.wait(20)

    async def body() -> Batcher:
        batcher = loop_batcher(DoublingEngine(run_ns=10 * MS, hook=hook), BatchingOptions())
        batcher.submit(work_of(1.0, Answers()))
        await asyncio.get_running_loop().run_in_executor(None, reached.wait, 20)
        return batcher

    batcher = asyncio.run(body())
    opened.set()
    batcher.close()
    assert batcher.in_flight() == 1, "nobody was left to be told"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tidegate-double")]


def test_a_model_that_turns_out_long_moves_to_a_thread_and_back() -> None:
    async def body() -> None:
        threads: list[int] = []
        clock_ns = 0
        compute_ns = 0

        def hook(_: Batch) -> None:
            nonlocal clock_ns
            clock_ns += compute_ns
            threads.append(threading.get_ident())

        engine = DoublingEngine(run_ns=INLINE_NS - 1, hook=hook)
        loop = asyncio.get_running_loop()
        batcher = Batcher(
            engine,
            BatchingOptions(),
            clock=lambda: clock_ns + 1,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=loop.call_later,
        )

        async def one() -> None:
            done = asyncio.Event()
            batcher.submit(work_of(1.0, lambda _: done.set()))
            await asyncio.wait_for(done.wait(), 20)

        compute_ns = 1000 * THREAD_NS
        await one()
        assert batcher.inline(), "one pause of the process says nothing of the model"
        await one()
        assert not batcher.inline()
        await one()
        compute_ns = 1000
        for _ in range(40):
            await one()
        assert batcher.inline()
        await one()
        await loop.run_in_executor(None, batcher.close)
        own = threading.get_ident()
        assert threads[:2] == [own, own]
        assert threads[2] != own
        assert threads[-1] == own

    asyncio.run(body())


def test_several_instances_are_never_inline() -> None:
    async def body() -> None:
        batcher = loop_batcher(DoublingEngine(instances=2, run_ns=1), BatchingOptions())
        assert not batcher.inline()
        batcher.close()

    asyncio.run(body())


# --- stress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("instances", "options"),
    [
        (1, BatchingOptions()),
        (3, BatchingOptions()),
        (2, BatchingOptions(preserve_ordering=True)),
        (2, BatchingOptions(max_queue_delay_us=300, preferred_batch_sizes=(4,))),
        (
            2,
            BatchingOptions(
                priority_levels=3,
                default_priority_level=2,
                default_queue_policy=QueuePolicy("DELAY", default_timeout_us=200),
                max_queue_size=40,
            ),
        ),
    ],
)
def test_everyone_gets_exactly_their_own_rows(seed: int, instances: int, options: BatchingOptions) -> None:
    """Real threads, random sizes, bad rows, faults, cancels at any time; the values say whose rows they are."""

    async def body() -> None:
        rng = random.Random(seed)
        fault = random.Random(seed + 1)

        def hook(_: Batch) -> None:
            if fault.random() < 0.05:
                raise OutOfMemory("now and then")

        engine = DoublingEngine(spec_of(learned=8), instances=instances, run_ns=10 * MS, hook=hook)
        batcher = loop_batcher(engine, options)
        answers, cancelled = Answers(), Answers()
        works: dict[Work, float] = {}
        for number in range(600):
            value = REJECTED if rng.random() < 0.03 else float(number + 1)
            work = work_of(value, answers, rows=rng.choice([1, 1, 1, 2, 5, 11]), priority=rng.randint(0, 3))
            try:
                batcher.submit(work)
            except QueueFull:
                await asyncio.sleep(0)
                continue
            works[work] = value
            if rng.random() < 0.15:
                victim = rng.choice(list(works)[-20:])
                batcher.cancel(victim)
                if victim not in answers.works and victim not in cancelled.works:
                    cancelled(victim)
            if rng.random() < 0.4:
                await asyncio.sleep(0)
        await until_idle(batcher)
        ended = answers.works + cancelled.works
        assert len(ended) == len(works)
        assert set(ended) == set(works)
        for work in answers.works:
            check_outcome(work, works[work])
        if options.preserve_ordering:
            assert answers.works == [work for work in works if work not in cancelled.works]
        assert (batcher.pending(), batcher.in_flight()) == (0, 0)
        await asyncio.get_running_loop().run_in_executor(None, batcher.close)

    asyncio.run(body())


async def until_idle(batcher: Batcher) -> None:
    idle = asyncio.Event()
    batcher.on_idle = idle.set
    if not batcher.is_idle():
        await asyncio.wait_for(idle.wait(), 30)


def check_outcome(work: Work, value: float) -> None:
    if value == REJECTED:
        assert isinstance(work.error, InputRejected | OutOfMemory)
    elif isinstance(work.error, OutOfMemory):
        assert work.batch_members == 1, "only a member that failed alone is told"
    else:
        check_answer(work, value)
    assert (work.outputs is None) == (work.error is not None)
