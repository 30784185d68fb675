"""Everything at once: whatever comes, leaves, fails or is late, each request ends once and is counted once.

The gateway, the batcher with its threads and the loop are the real ones; the engine fails and dawdles as rows tell it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest
import uvloop

from router.types import ModelRoutes
from server.batching.batcher import Batcher
from server.batching.timers import fine_timers
from server.errors import Draining, RuntimeFailure, TidegateError
from server.gateway import AdmissionLimits, Gateway, Served
from server.runtime.base import Batch, BatchingOptions, ModelOptions, QueuePolicy
from server.telemetry.instruments import Telemetry
from server.types import Decision, InferenceRequest, InferenceResponse, RequestHead, RequestLimits
from tests.unit.batching.engines import REJECTED, WIDTH, DoublingEngine, spec_of, work_of

REQUESTS = 400
#: What a rows' value asks of the engine, beside being doubled: REJECTED is one of its own.
SLOW, BROKEN = 1001.0, 1002.0
MS = 1_000_000

GREEDY = BatchingOptions(max_queue_size=60)
PATIENT = BatchingOptions(max_queue_delay_us=400, preferred_batch_sizes=(4, 8), preserve_ordering=True)
LEVELS = BatchingOptions(
    priority_levels=3,
    default_priority_level=2,
    default_queue_policy=QueuePolicy(default_timeout_us=3_000, allow_timeout_override=True),
    priority_queue_policy={
        1: QueuePolicy(max_queue_size=20),
        3: QueuePolicy(timeout_action="DELAY", default_timeout_us=500),
    },
)


class Caller:
    """One request, and all that it was ever told."""

    def __init__(self, value: float, rows: int) -> None:
        self.value = value
        self.rows = rows
        self.answers: list[InferenceResponse] = []
        self.ends: list[TidegateError | None] = []
        self.ended = asyncio.Event()
        self.left = False

    def message(self, response: InferenceResponse, decision: Decision) -> None:
        assert decision.version == "1"
        self.answers.append(response)

    def finish(self, error: TidegateError | None) -> None:
        self.ends.append(error)
        self.ended.set()

    def outcome(self) -> str:
        """ "ok", the code of the error, or "cancelled"; asserts that it is exactly one of them, and a true one."""
        if self.left:
            assert not self.ends
            assert not self.answers
            return "cancelled"
        (error,) = self.ends
        if error is not None:
            assert not self.answers
            return error.code
        (answer,) = self.answers
        assert answer.outputs[0].array().tolist() == [[2 * self.value] * WIDTH] * self.rows
        return "ok"


class Rig:
    """One model behind a gateway."""

    def __init__(self, seed: int, options: BatchingOptions, instances: int, run_ns: int) -> None:
        loop = asyncio.get_running_loop()
        self.random = random.Random(seed)
        self.telemetry = Telemetry.create("test")
        self.timers = fine_timers(loop)
        self.gateway = Gateway(
            limits=RequestLimits(),
            admission=AdmissionLimits(),
            telemetry=self.telemetry,
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_later=loop.call_later,
        )
        engine = DoublingEngine(spec_of(), instances=instances, run_ns=run_ns, hook=self.run)
        self.batcher = Batcher(
            engine,
            options,
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=loop.call_later,
            call_later_ns=None if self.timers is None else self.timers.call_later,
        )
        counted = self.telemetry.model("double", "1")
        self.served = Served(engine.spec, self.batcher, ModelOptions(), counted, self.telemetry.instruments)
        self.gateway.publish(self.gateway.table.with_model("double", ModelRoutes({"1": self.served}, "1")))

    def run(self, batch: Batch) -> None:
        """Inside every run, on whichever thread. What is asked of one row is done to the whole batch."""
        values = {bytes(part)[:4] for part in batch.parts[0] or ()}
        if SLOW_BYTES in values:
            time.sleep(0.002)
        if BROKEN_BYTES in values:
            raise RuntimeFailure("broken by one of its rows")

    async def call(self, number: int, *, leaves: bool = False, limit_ms: float = 0.0) -> Caller:
        """One request from its arrival to its end."""
        draw = self.random
        value = draw.choice((SLOW, BROKEN, REJECTED)) if draw.random() < 0.1 else float(number)
        caller = Caller(value, draw.choice((1, 1, 1, 2, 3, 8, 30, 64)))
        work = work_of(value, lambda _: None, caller.rows)
        parameters = {"priority": draw.randrange(4), "timeout": draw.choice((0, 200, 2_000))}
        now = time.monotonic_ns()
        head = RequestHead("grpc", "", "", {}, now, now + round(limit_ms * MS) if limit_ms else 0)
        permit = self.gateway.admit(head)
        inputs = [tensor for tensor in work.inputs if tensor is not None]
        request = InferenceRequest("double", "", "", inputs, parameters=parameters)
        ticket = self.gateway.handle(permit, request, caller)
        if leaves:
            for _ in range(draw.randrange(4)):
                await asyncio.sleep(0)
            if not caller.ends:
                ticket.cancel()
                caller.left = True
        else:
            await caller.ended.wait()
        ticket.cancel()  # as transports do at every end
        permit.release()
        return caller

    async def storm(self) -> list[Caller]:
        """Callers in waves: some wait, some are in a hurry, some leave."""
        calls: list[asyncio.Task[Caller]] = []
        for number in range(REQUESTS):
            leaves = self.random.random() < 0.2
            limit_ms = self.random.choice((0.0, 0.0, 0.0, 1e-6, 0.5, 3.0, 1000.0))
            calls.append(asyncio.create_task(self.call(number, leaves=leaves, limit_ms=limit_ms)))
            if self.random.random() < 0.15:
                await asyncio.sleep(self.random.choice((0, 0.0005, 0.002)))
        return list(await asyncio.gather(*calls))

    def check(self, callers: list[Caller]) -> Counter[str]:
        """Callers, statistics and gauges say the same; how the requests ended."""
        told = Counter(caller.outcome() for caller in callers)
        stats = self.telemetry.stats_for("double", "1")
        attempts = {code: int(counter.value) for (_, code), counter in self.served._attempts.items()}
        refused = told["deadline_exceeded"] - attempts.get("deadline_exceeded", 0)
        rejected = sum(self.telemetry.rejected(code).value for code in ("queue_full", "queue_timeout"))
        assert stats.success_count == told["ok"]
        assert stats.inference_count == sum(caller.rows for caller in callers if caller.outcome() == "ok")
        assert stats.success_count + stats.fail_count == len(callers) - refused
        assert self.telemetry.rejected("deadline_exceeded").value == refused
        assert rejected == told["queue_full"] + told["queue_timeout"]
        assert attempts == {code: n for code in told if (n := told[code] - refused * (code == "deadline_exceeded"))}
        assert stats.pending() == 0
        assert (self.gateway.requests_in_flight, self.served.calls) == (0, 0)
        return told

    async def close(self) -> None:
        """Runs that nobody waits for any more may still be going on."""
        await asyncio.to_thread(self.batcher.close)
        await asyncio.sleep(0)
        assert self.batcher.in_flight() == self.batcher.pending() == 0
        assert self.batcher.is_idle()
        if self.timers is not None:
            self.timers.close()


def _bytes_of(value: float) -> bytes:
    tensor = work_of(value, lambda _: None).inputs[0]
    assert tensor is not None
    assert isinstance(tensor.data, bytes)
    return tensor.data[:4]


SLOW_BYTES, BROKEN_BYTES = _bytes_of(SLOW), _bytes_of(BROKEN)


def run(body: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(body, 20))


@pytest.mark.parametrize("options", [GREEDY, PATIENT, LEVELS], ids=["greedy", "patient", "levels"])
@pytest.mark.parametrize(("instances", "run_ns"), [(1, 10_000), (1, 2 * MS), (2, 2 * MS)], ids=["loop", "one", "two"])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_request_ends_once_and_is_counted_once(
    seed: int, options: BatchingOptions, instances: int, run_ns: int
) -> None:
    async def body() -> None:
        rig = Rig(seed, options, instances, run_ns)
        told = rig.check(await rig.storm())
        assert min(told[code] for code in ("ok", "cancelled", "deadline_exceeded", "runtime_failure")) > 0, told
        await rig.close()

    run(body())


@pytest.mark.parametrize("instances", [1, 2])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_version_that_is_given_up_in_the_middle_answers_everyone(seed: int, instances: int) -> None:
    async def body() -> None:
        rig = Rig(seed, GREEDY, instances, 2 * MS)
        storm = asyncio.create_task(rig.storm())
        while rig.batcher.pending() < 20:
            assert not storm.done()
            await asyncio.sleep(0)
        assert rig.batcher.abandon(Draining("it is given up")) >= 20
        assert rig.batcher.pending() == 0
        told = rig.check(await storm)
        assert told["draining"] > 20
        await rig.close()

    run(body())
