"""server.shadowing: budgets, breaker, slots and memory of the lane, on a hand-moved clock and a batcher that waits."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from monitor.compare import CompareSpec, prepare
from router.breaker import BreakerPolicy
from router.shadow import ShadowBudget
from server.batching.batcher import Work
from server.errors import Draining, QueueFull, RuntimeFailure, TidegateError
from server.shadowing import SHADOW_BREAKER, CompareWorker, ShadowLane
from server.telemetry.instruments import Telemetry
from server.telemetry.trace import ShadowTrace, TraceContext
from server.types import ModelSpec, Tensor, TensorSpec

SECOND = 10**9
SPEC = ModelSpec("m", "9", (TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 4)),), max_batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    prepare()


class Timer:
    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.at, self.act, self.cancelled = at, act, False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """Time and turns by hand."""

    def __init__(self) -> None:
        self.now = SECOND
        self.soon: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self.timers: list[Timer] = []

    def clock(self) -> int:
        return self.now

    def call_soon(self, act: Callable[..., object], *arguments: Any) -> None:
        self.soon.append((act, arguments))

    def call_later(self, seconds: float, act: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.now + int(seconds * SECOND), act))
        return self.timers[-1]

    def turn(self) -> None:
        while self.soon:
            act, arguments = self.soon.pop(0)
            act(*arguments)

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)
        due = [timer for timer in self.timers if timer.at <= self.now]
        self.timers = [timer for timer in self.timers if timer.at > self.now]
        for timer in due:
            if not timer.cancelled:
                timer.act()
        self.turn()


class Waiting:
    """A target whose requests wait for the test's word."""

    def __init__(self) -> None:
        self.spec = SPEC
        self.works: list[Work] = []
        self.cancelled: list[Work] = []
        self.refusal: TidegateError | None = None

    @property
    def batcher(self) -> Waiting:
        return self

    def submit(self, work: Work) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.works.append(work)

    def cancel(self, work: Work) -> None:
        self.cancelled.append(work)

    def answer(self, shift: float = 0.0) -> None:
        work = self.works.pop(0)
        assert work.inputs[0] is not None
        work.outputs = [tensor("y", work.inputs[0].array() + np.float32(shift))]
        work.assembled_ns, work.computed_ns, work.batch_rows = 1, 2_001, 1
        work.settle(work)

    def fail(self) -> None:
        work = self.works.pop(0)
        work.error = RuntimeFailure("scripted")
        work.settle(work)


def tensor(name: str, values: Any) -> Tensor:
    return Tensor(name, "FP32", values.shape, values.astype("<f4").tobytes())


def answered(value: float = 1.0, width: int = 4) -> Work:
    """What the primary's batcher gives back: it echoes."""
    values = np.full((1, width), value)
    work = Work([tensor("x", values)], 1, lambda _: None, outputs=[tensor("y", values)])
    work.assembled_ns, work.computed_ns, work.batch_rows = 1, 1_001, 1
    return work


class Rig:
    def __init__(self, offload: Any = None, breaker: BreakerPolicy = SHADOW_BREAKER, **budget: Any) -> None:
        self.loop, self.target, self.load = Loop(), Waiting(), 0.0
        self.telemetry = Telemetry.create("test")
        self.traced: list[ShadowTrace] = []
        self.told: list[tuple[Any, ...]] = []
        self.lane = ShadowLane(
            self.target,
            budget=ShadowBudget(**({"rps": 1e6} | budget)),
            compare=CompareSpec(),
            telemetry=self.telemetry.shadow("m", "9"),
            clock=self.loop.clock,
            call_soon=self.loop.call_soon,
            call_soon_threadsafe=self.loop.call_soon,
            call_later=self.loop.call_later,
            load=lambda: self.load,
            offload=offload or self.compare_now,
            breaker=breaker,
            traced=self.traced.append,
            captured=lambda *what: self.told.append(what),
        )

    @staticmethod
    def compare_now(job: Callable[[], None]) -> bool:
        job()
        return True

    def offer(self, count: int = 1, **work: Any) -> None:
        for i in range(count):
            self.lane.offer(f"id-{i}", answered(**work))

    def dropped(self) -> dict[str, int]:
        return self.lane.report()["dropped"]


def test_a_pair_is_sent_on_a_later_turn_and_compared() -> None:
    rig = Rig()
    rig.offer()
    assert rig.target.works == []
    rig.loop.turn()
    rig.target.answer(shift=0.5)
    rig.loop.turn()
    report = rig.lane.report()
    assert (report["sent"], report["in_flight"], report["comparing"], report["queued"]) == (1, 0, 0, 0)
    assert report["comparison"]["outputs"]["y"]["max_abs_diff"] == 0.5
    assert report["comparison"]["worst"][0]["id"] == "id-0"
    assert report["comparison"]["latency"]["ratio"] == 2.0
    json.dumps(report, allow_nan=False)
    page = rig.telemetry.metrics.render().decode()
    for line in (
        'tidegate_shadow_requests_total{model="m",version="9"} 1',
        'tidegate_shadow_pairs_total{model="m",version="9"} 1',
        'tidegate_shadow_disagreements_total{model="m",version="9",kind="tolerance"} 1',
        'tidegate_shadow_max_abs_diff{model="m",version="9"} 0.5',
        'tidegate_shadow_latency_ratio{model="m",version="9"} 2',
    ):
        assert line in page
    assert all(timer.cancelled for timer in rig.loop.timers)


def test_a_full_queue_drops_its_oldest() -> None:
    rig = Rig(queue=3, in_flight=1)
    for value in range(5):
        rig.offer(value=float(value))
    rig.loop.turn()
    assert rig.dropped() == {"queue": 2}
    (work,) = rig.target.works
    assert work.inputs[0] is not None
    assert work.inputs[0].array()[0, 0] == 2.0


def test_no_more_are_in_flight_than_the_budget_says_and_comparing_counts() -> None:
    jobs: list[Callable[[], None]] = []

    def later(job: Callable[[], None]) -> bool:
        jobs.append(job)
        return True

    rig = Rig(offload=later, in_flight=2)
    rig.offer(4)
    rig.loop.turn()
    assert len(rig.target.works) == 2
    rig.target.answer()
    rig.loop.turn()
    assert len(rig.target.works) == 1  # one on its way, one being compared
    jobs.pop()()
    rig.loop.turn()
    assert len(rig.target.works) == 2


def test_the_rate_is_bounded_over_any_stretch() -> None:
    rig = Rig(rps=10.0, queue=1000)
    for _ in range(1000):  # ten seconds at 100 a second
        rig.offer()
        rig.loop.now += SECOND // 100
    taken = 1000 - rig.dropped()["rps"]
    assert 99 <= taken <= 102


def test_bodies_over_the_bound_are_not_taken_and_use_no_rate() -> None:
    rig = Rig(max_body_bytes=32, rps=1.0)
    rig.offer(width=5)
    assert rig.dropped() == {"body": 1}
    rig.offer(width=4)
    assert rig.dropped() == {"body": 1}
    assert rig.lane.held_bytes() == 32


def test_strings_count_with_what_their_objects_take() -> None:
    rig = Rig(max_body_bytes=1000)
    texts = Tensor("x", "BYTES", (100,), [b""] * 100)
    rig.lane.offer("a", Work([texts], 1, lambda _: None, outputs=[]))
    assert rig.dropped() == {"body": 1}


def test_load_of_the_primary_comes_first() -> None:
    rig = Rig(yield_above_load=0.7, in_flight=1, timeout_ns=SECOND)
    rig.offer(3)
    rig.loop.turn()
    rig.load = 0.8
    rig.offer()
    assert rig.dropped() == {"load": 1}
    rig.target.answer()
    rig.loop.turn()
    assert rig.target.works == []  # there is a place, and the primary needs the machine
    rig.load = 0.7
    rig.loop.advance(0.05)
    assert len(rig.target.works) == 1  # nobody had to offer anything for it


def test_what_waits_for_too_long_is_let_go_of() -> None:
    rig = Rig(timeout_ns=SECOND)
    rig.offer(3)
    rig.load = 1.0
    for _ in range(22):
        rig.loop.advance(0.05)
    assert rig.target.works == []
    assert rig.dropped() == {"timeout": 3}
    assert rig.lane.held_bytes() == 0
    assert all(timer.cancelled for timer in rig.loop.timers)


def test_without_a_version_or_an_answer_nothing_is_sent() -> None:
    rig = Rig()
    rig.lane.target = None
    rig.offer()
    rig.lane.primary_failed()
    rig.lane.offer("a", Work([], 1, lambda _: None))
    assert rig.dropped() == {"no_model": 1, "primary_failed": 2}


@pytest.mark.parametrize(
    ("refusal", "dropped", "errors"),
    [
        (QueueFull("full"), {"queue": 1}, {}),
        (Draining("going"), {"no_model": 1}, {}),
        (RuntimeFailure("odd"), {}, {"runtime_failure": 1}),
    ],
)
def test_a_batcher_that_refuses_is_counted(refusal: TidegateError, dropped: Any, errors: Any) -> None:
    rig = Rig()
    rig.target.refusal = refusal
    rig.offer()
    rig.loop.turn()
    report = rig.lane.report()
    assert (report["dropped"], report["errors"], report["sent"], report["in_flight"]) == (dropped, errors, 0, 0)


def test_a_signature_that_does_not_fit_is_an_error_of_the_shadow() -> None:
    rig = Rig()
    rig.offer(width=5)
    rig.loop.turn()
    assert rig.lane.report()["errors"] == {"invalid_argument": 1}
    assert rig.target.works == []


def test_time_over_gives_back_slot_and_memory() -> None:
    rig = Rig(timeout_ns=2 * SECOND, in_flight=1)
    rig.offer(2)
    rig.loop.turn()
    hung = rig.target.works.pop()
    rig.loop.advance(2.0)
    assert rig.dropped() == {"timeout": 1}
    assert rig.target.cancelled == [hung]
    assert len(rig.target.works) == 1  # the next one has the slot
    assert rig.lane.held_bytes() == 32
    hung.outputs = [tensor("y", np.ones((1, 4)))]
    hung.settle(hung)  # too late: nobody listens
    assert rig.lane.report()["comparison"]["pairs"] == 0
    assert rig.lane.report()["in_flight"] == 1


def test_a_target_that_goes_takes_what_is_on_its_way_along() -> None:
    rig = Rig(in_flight=2, breaker=BreakerPolicy(min_requests=1))
    rig.offer(5)
    rig.loop.turn()
    flying = list(rig.target.works)
    assert rig.lane.detach() is rig.target
    assert sorted(map(id, rig.target.cancelled)) == sorted(map(id, flying))
    assert rig.dropped() == {"no_model": 5}
    assert rig.lane.held_bytes() == 0
    assert rig.lane.detach() is None
    for work in flying:
        work.error = RuntimeFailure("nobody listens")
        work.settle(work)
    rig.lane.target = following = Waiting()
    rig.offer(3)
    rig.loop.turn()
    report = rig.lane.report()
    assert (report["in_flight"], report["queued"], report["breaker"]) == (2, 1, "closed")
    assert (report["errors"], len(following.works)) == ({}, 2)


def test_failures_open_the_breaker_and_a_probe_closes_it() -> None:
    rig = Rig(in_flight=1, timeout_ns=100 * SECOND)
    rig.offer(7)
    rig.loop.turn()
    for _ in range(5):
        rig.target.fail()
        rig.loop.turn()
    report = rig.lane.report()
    assert (report["breaker"], report["errors"], report["dropped"]) == ("open", {"runtime_failure": 5}, {"breaker": 2})
    assert rig.lane.held_bytes() == 0
    rig.offer()
    rig.loop.turn()
    assert rig.dropped() == {"breaker": 3}
    for outcome, state in ((rig.target.fail, "open"), (rig.target.answer, "closed")):
        rig.loop.advance(30.0)
        rig.offer(3)
        rig.loop.turn()
        assert rig.lane.report()["breaker"] == "half_open"
        assert len(rig.target.works) == 1
        outcome()
        rig.loop.turn()
        assert rig.lane.report()["breaker"] == state
    rig.offer()
    rig.loop.turn()
    assert len(rig.target.works) == 1


def test_memory_is_bounded_by_the_queue_whatever_is_offered() -> None:
    rig = Rig(queue=8, in_flight=2, max_body_bytes=4096)
    rig.target.spec = replace(SPEC, inputs=(TensorSpec("x", "FP32", (-1, -1)),))
    most = 0
    for i in range(500):
        rig.offer(width=1 + i * 7 % 1400)
        most = max(most, rig.lane.held_bytes())
        if i % 3 == 0:
            rig.loop.turn()
    assert most <= (8 + 2) * 4096
    assert rig.dropped()["queue"] > 0
    assert rig.dropped()["body"] > 0


def test_the_bound_is_one_of_real_memory() -> None:
    rig = Rig(queue=16, in_flight=2, max_body_bytes=64 * 1024)
    rig.target.spec = replace(SPEC, inputs=(TensorSpec("x", "FP32", (-1, -1)),))

    def offer_views() -> None:
        body, outputs = memoryview(bytearray(1 << 20)), memoryview(bytearray(1 << 20))  # a view keeps all of its buffer
        work = answered()
        work.inputs = [Tensor("x", "FP32", (1, 8000), body[:32000])]
        work.outputs = [Tensor("y", "FP32", (1, 8000), outputs[:32000])]
        rig.lane.offer("a", work)

    tracemalloc.start()
    for _ in range(100):
        offer_views()
        rig.loop.turn()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rig.lane.held_bytes() == 18 * 64000
    assert 18 * 64000 < held < 18 * 64 * 1024 + 200_000


def test_views_are_copied_out_of_the_buffers_they_lie_in() -> None:
    rig = Rig()
    body = memoryview(bytearray(10_000))
    work = answered()
    work.inputs = [Tensor("x", "FP32", (1, 4), body[16:32])]
    work.outputs = [Tensor("y", "FP32", (1, 4), body[32:48])]
    rig.lane.offer("a", work)
    body[16:32] = b"\xff" * 16  # the owner has the buffer back
    rig.loop.turn()
    assert rig.target.works[0].inputs[0].data == bytes(16)  # type: ignore[union-attr]


def test_a_comparison_that_finds_no_room_frees_the_slot() -> None:
    rig = Rig(offload=lambda _: False, in_flight=1)
    rig.offer(2)
    rig.loop.turn()
    rig.target.answer()
    assert rig.dropped() == {"queue": 1}
    assert len(rig.target.works) == 1


def test_a_closed_lane_holds_and_takes_nothing() -> None:
    rig = Rig(in_flight=1)
    rig.offer(3)
    rig.loop.turn()
    (work,) = rig.target.works
    rig.lane.close()
    assert rig.target.cancelled == [work]
    assert rig.lane.held_bytes() == 0
    rig.offer()
    rig.lane.primary_failed()
    rig.loop.turn()
    assert (rig.lane.report()["queued"], rig.lane.report()["in_flight"], rig.dropped()) == (0, 0, {"no_model": 2})


def test_shadows_are_in_no_other_family() -> None:
    rig = Rig()
    rig.offer()
    rig.loop.turn()
    rig.target.answer()
    rig.loop.turn()
    lines = [line for line in rig.telemetry.metrics.render().decode().splitlines() if 'version="9"' in line]
    assert lines
    assert all(line.startswith("tidegate_shadow_") for line in lines)
    rig.telemetry.forget("m", "9")
    assert 'version="9"' not in rig.telemetry.metrics.render().decode()


def test_the_worker_refuses_over_its_room_and_ends() -> None:
    started, go, done = threading.Event(), threading.Event(), []
    worker = CompareWorker(room=1)

    def hold() -> None:
        started.set()
        assert go.wait(20)

    assert worker.submit(hold)
    assert started.wait(20)
    assert worker.submit(lambda: done.append(1))
    assert not worker.submit(lambda: done.append(2))
    go.set()
    worker.close()
    assert done == [1]


def test_what_the_shadow_answered_is_told_once_with_the_clients_id() -> None:
    rig = Rig(in_flight=8)
    told = rig.told
    for number, client_id in enumerate(("", "mine", "late")):
        rig.lane.offer(f"t{number}", answered(), client_id=client_id)
    rig.loop.turn()
    rig.loop.now += 500
    rig.target.answer(1.0)
    rig.target.fail()
    rig.loop.advance(3600)
    outputs = told[0][4]
    assert [what[:4] + what[5:6] for what in told] == [
        ("", "t0", SPEC, 1, "ok"),
        ("mine", "t1", SPEC, 1, "runtime_failure"),
        ("late", "t2", SPEC, 1, "version_timeout"),
    ]
    assert np.array_equal(outputs[0].array(), np.full((1, 4), 2.0))
    assert [what[4] for what in told[1:]] == [None, None]


def test_a_copy_of_a_traced_request_is_traced_too() -> None:
    rig = Rig(timeout_ns=SECOND)
    primary = TraceContext(7, 8)
    rig.offer()
    rig.lane.offer("answered", answered(), primary)
    rig.loop.turn()
    rig.target.answer()
    rig.target.answer()
    rig.loop.turn()
    (record,) = rig.traced
    assert (record.context.trace_id, record.context.parent_id) == (7, 8)
    assert record.context.span_id not in (0, 8)
    assert (record.tidegate_id, record.code) == ("answered", "ok")
    rig.lane.offer("late", answered(), primary)
    rig.loop.turn()
    rig.loop.advance(2.0)
    assert [(record.tidegate_id, record.code) for record in rig.traced[1:]] == [("late", "version_timeout")]
