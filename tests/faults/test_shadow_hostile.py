"""Shadows that crash, hang, crawl or answer garbage behind a real gateway: callers notice nothing, memory bounded."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitor.compare import CompareSpec, prepare
from router.breaker import BreakerPolicy
from router.shadow import ShadowBudget
from router.types import FULL_SHARE, Destination, ModelRoutes, ShadowRoute
from server.batching.batcher import Batcher
from server.batching.offloop import OffLoopBatcher
from server.errors import RuntimeFailure, TidegateError
from server.gateway import AdmissionLimits, Gateway, Served
from server.gateway.policy import ModelPolicy
from server.runtime.base import Batch, BatchingOptions, Engine, LoadRequest, ModelOptions
from server.runtime.fake import FakeRuntime, Script
from server.shadowing import CompareWorker, ShadowLane
from server.telemetry.instruments import Telemetry
from server.types import Decision, InferenceRequest, InferenceResponse, RequestHead, RequestLimits, Tensor

MS = 10**6
NEVER = BreakerPolicy(min_requests=10**9)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    prepare()


class Answer:
    def __init__(self) -> None:
        self.ended: asyncio.Future[TidegateError | None] = asyncio.get_running_loop().create_future()
        self.response: InferenceResponse | None = None

    def message(self, response: InferenceResponse, decision: Decision) -> None:
        self.response = response

    def finish(self, error: TidegateError | None) -> None:
        self.ended.set_result(error)


class Rig:
    """Model ``m``: version 1 answers ``y = 2 x + 1``, version 2 is ``shadow``, an engine of the test's."""

    def __init__(self, shadow: Engine, breaker: BreakerPolicy = NEVER, **budget: Any) -> None:
        self.loop = asyncio.get_running_loop()
        #: Set after everything that may change the lane's report.
        self.changed = asyncio.Event()
        self.telemetry = Telemetry.create("test")
        self.gateway = Gateway(
            limits=RequestLimits(),
            admission=AdmissionLimits(),
            telemetry=self.telemetry,
            clock=time.monotonic_ns,
            call_soon=self.loop.call_soon,
            call_later=self.loop.call_later,
        )
        primary = FakeRuntime().load(LoadRequest("m", "1", Path("none"), ModelOptions()))
        self.batcher = Batcher(primary, BatchingOptions(), **self.calls())
        self.shadow_batcher = OffLoopBatcher(shadow, BatchingOptions(), close_seconds=0.2, **self.telling_calls())
        self.worker = CompareWorker()
        shadowed = self.served(shadow, self.shadow_batcher)
        self.lane = ShadowLane(
            shadowed,
            budget=ShadowBudget(**({"rps": 1e6, "timeout_ns": 100 * MS} | budget)),
            compare=CompareSpec(),
            telemetry=self.telemetry.shadow("m", "2"),
            load=lambda: 0.0,
            offload=self.worker.submit,
            breaker=breaker,
            **self.telling_calls(),
        )
        every = ShadowRoute("s", Destination("m", "2", shadowed), FULL_SHARE)
        routes = ModelRoutes({"1": self.served(primary, self.batcher)}, "1", shadows=(every,))
        self.gateway.publish(self.gateway.table.with_model("m", routes))
        self.shadow_requests(self.lane)

    def shadow_requests(self, lane: ShadowLane | None) -> None:
        """From now on every request that is answered is offered to ``lane``."""
        lanes = {} if lane is None else {"s": lane}
        self.gateway.publish(self.gateway.table, {"m": ModelPolicy(lanes=lanes)})

    def and_tell(self, act: Callable[..., object], *arguments: Any) -> None:
        act(*arguments)
        self.changed.set()

    def calls(self) -> dict[str, Any]:
        return {
            "clock": time.monotonic_ns,
            "call_soon": self.loop.call_soon,
            "call_soon_threadsafe": self.loop.call_soon_threadsafe,
            "call_later": self.loop.call_later,
        }

    def telling_calls(self) -> dict[str, Any]:
        """The same, for those who change the lane's report in them."""
        return {
            "clock": time.monotonic_ns,
            "call_soon": lambda act, *a: self.loop.call_soon(self.and_tell, act, *a),
            "call_soon_threadsafe": lambda act, *a: self.loop.call_soon_threadsafe(self.and_tell, act, *a),
            "call_later": lambda delay, act, *a: self.loop.call_later(delay, self.and_tell, act, *a),
        }

    def served(self, engine: Engine, batcher: Batcher) -> Served:
        spec = engine.spec
        counted = self.telemetry.model(spec.name, spec.version)
        return Served(spec, batcher, ModelOptions(), counted, self.telemetry.instruments)

    async def ask(self, value: float) -> None:
        """One request that must be answered, and rightly."""
        permit = self.gateway.admit(RequestHead("http", "m", "", {}, time.monotonic_ns()))
        x = Tensor("x", "FP32", (1, 4), np.full((1, 4), value, np.float32).tobytes())
        answer = Answer()
        self.gateway.handle(permit, InferenceRequest("m", "", "", [x]), answer)
        assert await answer.ended is None
        assert answer.response is not None
        assert answer.response.version == "1"
        assert answer.response.outputs[0].array().tolist() == [[2 * value + 1] * 4]
        permit.release()

    async def traffic(self, count: int) -> list[float]:
        """So many requests, eight at a time; the time that each took."""
        took: list[float] = []

        async def caller(numbers: range) -> None:
            for number in numbers:
                began = time.perf_counter()
                await self.ask(float(number))
                took.append(time.perf_counter() - began)

        await asyncio.gather(*[caller(range(start, count, 8)) for start in range(8)])
        return took

    async def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Give the shadow its turns until the report is as wanted."""
        async with asyncio.timeout(20):
            while not holds(report := self.lane.report()):
                self.changed.clear()
                await self.changed.wait()
        return report

    async def close(self) -> None:
        self.lane.close()
        await asyncio.to_thread(self.batcher.close)
        await asyncio.to_thread(self.shadow_batcher.close)
        await asyncio.to_thread(self.worker.close)

    def check_callers_saw_nothing(self, count: int) -> None:
        stats = self.telemetry.stats_for("m", "1")
        assert (stats.success_count, stats.fail_count) == (count, 0)
        shadow = self.telemetry.stats_for("m", "2")
        assert (shadow.success_count, shadow.fail_count, shadow.execution_count) == (0, 0, 0)


class Hostile:
    """An engine of version 2 whose runs do what the test says; ``act`` gets the right answer."""

    def __init__(self, act: Callable[[Batch, Tensor], list[Tensor]]) -> None:
        self._right = FakeRuntime(Script(max_batch_size=1, learned_batch_size=1)).load(
            LoadRequest("m", "2", Path("none"), ModelOptions())
        )
        self.spec, self.instances, self.run_ns, self.memory_bytes = self._right.spec, 1, 1_000, 0
        self._act = act
        self.threads: set[int] = set()

    def run(self, instance: int, batch: Batch) -> list[Tensor]:
        self.threads.add(threading.get_ident())
        return self._act(batch, *self._right.run(instance, batch))

    def close(self) -> None:
        self._right.close()


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(40):
            await body()

    asyncio.run(bounded())


def raising(error: BaseException) -> Callable[[Batch, Tensor], list[Tensor]]:
    def act(*_: Any) -> list[Tensor]:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeFailure("scripted"), "runtime_failure"),
        (MemoryError(), "out_of_memory"),
        (ValueError("a defect"), "runtime_failure"),
    ],
)
def test_a_shadow_that_fails_is_counted_and_then_left_alone(error: Exception, code: str) -> None:
    async def body() -> None:
        rig = Rig(
            Hostile(raising(error)),
            BreakerPolicy(min_requests=5, probes=1, open_ns=3_600_000 * MS),
            timeout_ns=20_000 * MS,
        )
        await rig.traffic(200)
        report = await rig.until(lambda found: found["queued"] == found["in_flight"] == 0)
        assert 5 <= report["errors"][code] <= 5 + rig.lane.budget.in_flight
        assert report["breaker"] == "open"
        assert report["errors"][code] + report["dropped"]["breaker"] == 200
        rig.check_callers_saw_nothing(200)
        await rig.close()

    run(body)


def test_a_shadow_that_hangs_costs_its_slots_for_its_time_and_nothing_else() -> None:
    async def body() -> None:
        go = threading.Event()

        def hang(_: Batch, right: Tensor) -> list[Tensor]:
            go.wait(60)
            return [right]

        rig = Rig(
            Hostile(hang),
            BreakerPolicy(min_requests=5, probes=1, open_ns=300 * MS),
            in_flight=2,
            queue=16,
            max_body_bytes=32,
            timeout_ns=500 * MS,
        )
        most = asked = 0
        while (report := rig.lane.report())["breaker"] == "closed":
            await rig.traffic(40)
            asked += 40
            most = max(most, rig.lane.held_bytes())
        assert report["dropped"]["timeout"] >= 5
        assert report["dropped"]["queue"] > 0
        assert 0 < most <= (16 + 2) * 32
        await rig.until(lambda found: found["in_flight"] == found["queued"] == 0)
        assert rig.lane.held_bytes() == 0
        rig.check_callers_saw_nothing(asked)
        go.set()  # it comes back: a probe finds out
        while rig.lane.report()["comparison"]["pairs"] == 0:
            await rig.ask(1.0)
            asked += 1
            await asyncio.sleep(0.02)
        assert rig.lane.report()["breaker"] == "closed"
        rig.check_callers_saw_nothing(asked)
        await rig.until(lambda found: found["in_flight"] == found["queued"] == 0)
        await rig.close()
        assert not rig.shadow_batcher.hung()

    run(body)


def test_a_run_that_never_ends_does_not_hold_up_the_closing() -> None:
    async def body() -> None:
        go = threading.Event()

        def hang(_: Batch, right: Tensor) -> list[Tensor]:
            go.wait(60)
            return [right]

        engine = Hostile(hang)
        rig = Rig(engine)
        await rig.traffic(8)
        await rig.until(lambda _: bool(engine.threads))
        began = time.monotonic()
        await rig.close()
        assert time.monotonic() - began < 20
        assert rig.shadow_batcher.hung()
        go.set()

    run(body)


def test_a_slow_shadow_drops_what_it_cannot_take_and_is_never_on_the_loop() -> None:
    async def body() -> None:
        crawl = threading.Event()

        def slow(_: Batch, right: Tensor) -> list[Tensor]:
            crawl.wait(0.1)
            return [right]

        engine = Hostile(slow)
        rig = Rig(engine, queue=4, in_flight=1, timeout_ns=10_000 * MS)
        lane, quiet, shadowed = rig.lane, [], []
        for _ in range(6):  # blocks in turn, so that what else the machine does falls on both
            rig.shadow_requests(None)
            quiet += await rig.traffic(100)
            rig.shadow_requests(lane)
            shadowed += await rig.traffic(100)
        report = lane.report()
        assert report["dropped"]["queue"] > 100
        assert threading.get_ident() not in engine.threads
        # On the loop one run alone would be a hundred times a request and more.
        assert statistics.median(shadowed) < 5 * statistics.median(quiet)
        rig.check_callers_saw_nothing(1200)
        await rig.close()

    run(body)


@pytest.mark.parametrize(
    ("garble", "kind"),
    [
        (lambda right: [Tensor("y", "FP32", (1, 2), bytes(8))], "shape"),
        (lambda right: [Tensor("y", "FP32", (4,), right.data)], "shape"),
        (lambda right: [Tensor("y", "FP32", (1, 4), b"\0" * 5)], "shape"),
        (lambda right: [Tensor("y", "INT32", (1, 4), right.data)], "datatype"),
        (lambda right: [Tensor("y", "BYTES", (1, 4), [b"?"] * 4)], "datatype"),
        (lambda right: [Tensor("y", "FP32", (1, 4), np.full(4, np.nan, "<f4").tobytes())], "tolerance"),
        (lambda right: [], "missing"),
        (lambda right: [right, Tensor("z", "FP32", (1, 4), right.data)], "missing"),
    ],
)
def test_garbage_is_a_finding(garble: Callable[[Tensor], list[Tensor]], kind: str) -> None:
    async def body() -> None:
        rig = Rig(Hostile(lambda _, right: garble(right)), in_flight=64, timeout_ns=10_000 * MS)
        await rig.traffic(40)
        report = await rig.until(lambda found: found["comparison"]["pairs"] == 40)
        assert report["comparison"]["disagreeing"] == 40
        assert all(kind in entry["disagreements"] for entry in report["comparison"]["worst"])
        assert report["breaker"] == "closed"
        rig.check_callers_saw_nothing(40)
        await rig.close()

    run(body)


@pytest.mark.parametrize("answer", [None, [None], 7])
def test_what_is_no_answer_at_all_is_an_error_of_the_shadow(answer: Any) -> None:
    async def body() -> None:
        rig = Rig(Hostile(lambda *_: answer), in_flight=64, timeout_ns=10_000 * MS)
        await rig.traffic(4)
        report = await rig.until(lambda found: found["in_flight"] == found["comparing"] == found["queued"] == 0)
        assert sum(report["errors"].values()) == 4
        rig.check_callers_saw_nothing(4)
        await rig.close()

    run(body)


def test_a_right_shadow_agrees_and_a_perturbed_one_is_measured() -> None:
    async def body() -> None:
        def perturb(_: Batch, right: Tensor) -> list[Tensor]:
            return [Tensor("y", "FP32", right.shape, (right.array() + np.float32(0.25)).tobytes())]

        for act, difference in ((lambda _, right: [right], 0.0), (perturb, 0.25)):
            rig = Rig(Hostile(act), in_flight=64, timeout_ns=10_000 * MS)
            await rig.traffic(64)
            report = await rig.until(lambda found: found["comparison"]["pairs"] == 64)
            assert report["comparison"]["outputs"]["y"]["max_abs_diff"] == difference
            assert report["comparison"]["agreement"] == (0.0 if difference else 1.0)
            rig.check_callers_saw_nothing(64)
            await rig.close()

    run(body)
