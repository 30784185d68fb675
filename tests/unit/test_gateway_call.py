"""server.gateway.call: what a request that is tried again is counted as, and who is to blame for what went wrong."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

from monitor.compare import CompareSpec
from router.breaker import BreakerPolicy, State
from router.retry import RetryBudget, RetryPolicy
from router.shadow import ShadowBudget
from router.types import Arm, Destination, ModelRoutes, RolloutSplit, ShadowRoute
from server.errors import (
    DeadlineExceeded,
    InputRejected,
    InvalidArgument,
    ModelNotFound,
    RuntimeFailure,
    TidegateError,
    VersionNotFound,
)
from server.gateway import Breakers, ModelPolicy
from server.runtime.fake import Script
from server.shadowing import ShadowLane
from server.types import WRITING, Decision, InferenceRequest, InferenceResponse, RequestHead, Tensor
from tests.unit import test_gateway
from tests.unit.test_gateway_policy import EVERYTHING, FAILS, Answer, Rig, experiment, run

MS = 1_000_000
RETRIED = RetryPolicy(retry_on=frozenset({"runtime_failure"}), max_retries=3)


def ended(rig: Rig, version: str) -> int:
    """Requests that were counted as ended at a version."""
    stats = rig.telemetry.stats_for("m", version)
    return stats.success_count + stats.fail_count


def rejected(rig: Any, code: str) -> float:
    """Requests that were counted as refused before they were routed."""
    return float(rig.telemetry.rejected(code).value)


def test_a_deadline_that_passed_while_an_attempt_ran_is_told_as_such() -> None:
    async def body() -> None:
        deadline = 0

        def run_past_it(_: int) -> None:  # on the loop, so that no timer of it can come before the answer
            threading.Event().wait(max(0, deadline - time.monotonic_ns()) / 1e9 + 0.01)

        script = Script(faults=FAILS, before_run=run_past_it)
        rig = Rig(script, ModelPolicy(RETRIED, RetryBudget(RETRIED)))
        deadline = time.monotonic_ns() + 100 * MS
        error, _ = await rig.ask(deadline_ns=deadline)
        assert isinstance(error, DeadlineExceeded)
        assert "when the request arrived" not in error.message
        assert ended(rig, "2") == 1
        assert rejected(rig, "deadline_exceeded") == 0
        await rig.close()

    run(body)


def test_a_retry_that_the_breaker_refuses_is_counted_at_the_version_that_failed() -> None:
    async def body() -> None:
        breakers = Breakers(BreakerPolicy(min_requests=1, open_at=1, open_ns=10**15))
        rig = Rig(Script(), ModelPolicy(RETRIED, RetryBudget(RETRIED), breakers=breakers), stable=Script(faults=FAILS))
        rig.publish(None)
        error, _ = await rig.ask()
        assert isinstance(error, TidegateError)
        assert rig.attempts("1", "stable", "runtime_failure") == 1
        assert ended(rig, "1") == 1
        assert rejected(rig, "model_not_ready") == 0
        await rig.close()

    run(body)


def test_inputs_that_stable_refuses_do_not_open_its_breaker() -> None:
    async def body() -> None:
        breakers = Breakers(BreakerPolicy(min_requests=4, open_at=5_000, open_ns=10**15))
        rig = Rig(Script(), ModelPolicy(breakers=breakers), stable=Script(reject_marker=7.0))
        rig.publish(None)
        for _ in range(8):
            error, _ = await rig.ask(7.0)
            assert isinstance(error, InputRejected)
        assert breakers.of(rig.stable).state is State.CLOSED
        error, _ = await rig.ask(1.0)
        assert error is None
        await rig.close()

    run(body)


@pytest.mark.parametrize(("model", "version", "kind"), [("nobody", "", ModelNotFound), ("m", "9", VersionNotFound)])
def test_an_unknown_model_is_counted_alike_by_its_head_and_by_its_body(
    model: str, version: str, kind: type[TidegateError]
) -> None:
    async def body() -> None:
        rig = test_gateway.Rig()
        with pytest.raises(kind):  # as HTTP finds out: the head names the model
            rig.admit(model=model, version=version)
        assert rejected(rig, kind.code) == 1
        answer, _, permit = rig.ask(request={"model": model, "version": version})  # as gRPC does
        assert isinstance(await answer.error(), kind)
        permit.release()
        assert rejected(rig, kind.code) == 2
        await rig.close()

    run(body)


def test_a_failure_of_stable_is_one_of_the_version() -> None:
    """The counterpart: what no caller is to blame for opens the breaker."""

    async def body() -> None:
        breakers = Breakers(BreakerPolicy(min_requests=4, open_at=5_000, open_ns=10**15))
        rig = Rig(Script(), ModelPolicy(breakers=breakers), stable=Script(faults=FAILS))
        rig.publish(None)
        for _ in range(4):
            error, _ = await rig.ask()
            assert isinstance(error, RuntimeFailure)
        assert breakers.of(rig.stable).state is State.OPEN
        await rig.close()

    run(body)


# --- shadows ---------------------------------------------------------------------------------------------------------


def shadowed(rig: Rig) -> ShadowLane:
    """Every request is sampled for a shadow whose version is not loaded, so that copies of answers are dropped too."""
    lane = ShadowLane(
        None,
        budget=ShadowBudget(),
        compare=CompareSpec(),
        telemetry=rig.telemetry.shadow("m", "9"),
        clock=time.monotonic_ns,
        call_soon=rig.loop.call_soon,
        call_soon_threadsafe=rig.loop.call_soon_threadsafe,
        call_later=rig.loop.call_later,
        load=lambda: 0.0,
        offload=lambda _: False,
    )
    shadow = ShadowRoute("s", Destination("other", "9", rig.stable), EVERYTHING)
    split = RolloutSplit("r", (Arm("canary", Destination("m", "2", rig.candidate), EVERYTHING),))
    routes = ModelRoutes({"1": rig.stable, "2": rig.candidate}, "1", split=split, shadows=(shadow,))
    rig.policy.lanes = {"s": lane}
    rig.gateway.publish(rig.gateway.table.with_model("m", routes), {"m": rig.policy})
    return lane


def dropped(lane: ShadowLane) -> Any:
    return lane.report()["dropped"]


def test_a_sampled_request_that_is_answered_goes_to_its_shadow() -> None:
    async def body() -> None:
        rig = Rig(Script(), ModelPolicy())
        lane = shadowed(rig)
        assert (await rig.ask())[0] is None
        assert dropped(lane) == {"no_model": 1}
        await rig.close()

    run(body)


def test_a_sampled_request_that_the_primary_fails_is_counted_as_dropped() -> None:
    async def body() -> None:
        rig = Rig(Script(faults=FAILS), ModelPolicy(RETRIED, RetryBudget(RETRIED)))
        lane = shadowed(rig)
        for count in range(1, 4):
            assert isinstance((await rig.ask())[0], RuntimeFailure)
            assert dropped(lane) == {"primary_failed": count}, "once for all of its attempts"
        await rig.close()

    run(body)


def test_a_fallbacks_answer_is_no_primarys() -> None:
    async def body() -> None:
        policy = RetryPolicy(fallback_on=frozenset({"runtime_failure"}))
        breakers = Breakers(BreakerPolicy(min_requests=2, open_at=1, open_ns=10**15))
        rig = Rig(Script(faults=FAILS), ModelPolicy(policy, RetryBudget(policy), breakers=breakers))
        lane = shadowed(rig)
        for count in range(1, 5):  # from the third on the breaker lets nothing through
            assert (await rig.ask())[0] is None
            assert dropped(lane) == {"primary_failed": count}
        assert rig.attempts("2", "canary", "runtime_failure") == 2
        await rig.close()

    run(body)


def test_a_sampled_request_that_is_never_tried_or_given_up_is_counted_as_dropped() -> None:
    async def body() -> None:
        rig = Rig(Script(), ModelPolicy())
        lane = shadowed(rig)
        assert isinstance((await rig.ask(deadline_ns=1))[0], DeadlineExceeded)
        assert dropped(lane) == {"primary_failed": 1}
        start(rig).cancel()
        assert dropped(lane) == {"primary_failed": 2}
        await rig.close()

    run(body)


def start(rig: Rig, width: int = 4) -> Any:
    """A request that nobody waits for."""
    permit = rig.gateway.admit(RequestHead("grpc", "", "", {"x-user": "u"}, time.monotonic_ns()))
    x = Tensor("x", "FP32", (1, width), np.ones((1, width), np.float32).tobytes())
    ticket = rig.gateway.handle(permit, InferenceRequest("m", "", "", [x]), Answer())
    permit.release()
    return ticket


# --- experiments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", [0, 1])
def test_no_arm_is_to_blame_for_its_callers(arm: int) -> None:
    async def body() -> None:
        rig = Rig(Script(reject_marker=7.0), ModelPolicy(), stable=Script(reject_marker=7.0))
        books = experiment(rig)
        ours, user = books.counts[arm], ""
        while not ours.units:  # a user of this arm
            user = f"user-{books.counts[0].units + books.counts[1].units}"
            assert isinstance((await rig.ask(7.0, user=user))[0], InputRejected)
        permit = rig.gateway.admit(RequestHead("grpc", "", "", {"x-user": user}, time.monotonic_ns()))
        wrong, right = (Tensor("x", "FP32", (1, n), bytes(4 * n)) for n in (3, 4))
        answer = Answer()
        rig.gateway.handle(permit, InferenceRequest("m", "", "", [wrong]), answer)
        assert isinstance(await answer.ended, InvalidArgument)
        rig.gateway.handle(permit, InferenceRequest("m", "", "", [right]), Answer()).cancel()
        permit.release()
        assert (ours.requests, ours.errors, ours.attempted_units) == (0, 0, 0)
        assert (await rig.ask(1.0, user=user))[0] is None
        assert (ours.requests, ours.errors, ours.attempted_units, ours.failed_units) == (1, 0, 1, 0)
        await rig.close()

    run(body)


def test_an_arm_is_to_blame_for_its_failures_and_for_being_late() -> None:
    async def body() -> None:
        release = threading.Event()
        late = Script(before_run=lambda _: release.wait(20), run_ns=50 * MS)
        rig = Rig(late, ModelPolicy(), stable=Script(faults=FAILS))
        books = experiment(rig)
        for number in range(20):
            error, _ = await rig.ask(user=f"user-{number}", deadline_ns=time.monotonic_ns() + 10 * MS)
            assert isinstance(error, RuntimeFailure | DeadlineExceeded)
        for counts in books.counts:
            assert counts.requests == counts.errors == counts.failed_units > 0
        release.set()
        await rig.close()

    run(body)


# --- answers that cannot be written ----------------------------------------------------------------------------------


class Unwritten:
    """The reply of a transport that says what has become of its answer; ``ticket`` is cancelled as transports do."""

    def __init__(self, said: str | None) -> None:
        self.said = said
        self.ticket: Any = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def message(self, response: InferenceResponse, decision: Decision) -> None:
        assert response.outputs
        assert decision.version == "2"

    def finish(self, error: TidegateError | None) -> str | None:
        self.ended.set_result(None)
        if self.said != WRITING:
            self.ticket.cancel()
        return None if error is not None else self.said


async def ask(rig: Rig, said: str | None) -> Unwritten:
    permit = rig.gateway.admit(RequestHead("grpc", "", "", {"x-user": "u"}, time.monotonic_ns()))
    x = Tensor("x", "FP32", (1, 4), np.ones((1, 4), np.float32).tobytes())
    reply = Unwritten(said)
    reply.ticket = rig.gateway.handle(permit, InferenceRequest("m", "", "", [x]), reply)
    await reply.ended
    permit.release()
    return reply


def counted(rig: Rig) -> tuple[int, int, int]:
    """Requests that were counted as answered, failed and cancelled."""
    stats = rig.telemetry.stats_for("m", "2")
    return stats.success_count, stats.fail_count, stats.failures.get("CANCELED", 0)


@pytest.mark.parametrize(("said", "result"), [(None, (1, 0, 0)), ("invalid_argument", (0, 1, 0))])
def test_a_request_is_counted_by_what_its_caller_is_told(said: str | None, result: tuple[int, int, int]) -> None:
    async def body() -> None:
        rig = Rig(Script(), ModelPolicy())
        lane = shadowed(rig)
        await ask(rig, said)
        assert counted(rig) == result
        assert rig.attempts("2", "canary", "ok") == 1  # the version is not to blame
        assert dropped(lane) == {"no_model" if said is None else "primary_failed": 1}
        await rig.close()

    run(body)


@pytest.mark.parametrize(
    ("code", "result"), [("ok", (1, 0, 0)), ("internal", (0, 1, 0)), ("deadline_exceeded", (0, 1, 1))]
)
def test_an_answer_that_takes_long_to_write_is_counted_when_it_is(code: str, result: tuple[int, int, int]) -> None:
    async def body() -> None:
        rig = Rig(Script(), ModelPolicy())
        reply = await ask(rig, WRITING)
        assert counted(rig) == (0, 0, 0)
        assert rig.candidate.calls == 1
        reply.ticket.written(code)
        assert rig.candidate.calls == 0
        assert counted(rig) == result
        reply.ticket.written("internal")
        reply.ticket.cancel()
        assert counted(rig) == result
        await rig.close()

    run(body)


@pytest.mark.parametrize("code", ["ok", "cancelled"])
def test_a_version_that_is_let_go_while_its_answer_is_written_leaves_no_series(code: str) -> None:
    async def body() -> None:
        rig = Rig(Script(), ModelPolicy())
        reply = await ask(rig, WRITING)
        held, forgotten = rig.candidate, list[str]()

        def forget() -> None:
            forgotten.append("2")
            rig.telemetry.forget("m", "2")

        held.on_idle = forget
        if not held.calls:  # nothing holds it: it is closed, and forgotten
            forget()
        reply.ticket.written(code)
        assert forgotten == ["2"]
        assert b'version="2"' not in rig.telemetry.metrics.render()
        await rig.close()

    run(body)


def test_a_caller_who_leaves_while_the_answer_is_written_has_cancelled() -> None:
    async def body() -> None:
        rig = Rig(Script(), ModelPolicy())
        reply = await ask(rig, WRITING)
        reply.ticket.cancel()
        assert counted(rig) == (0, 1, 1)
        reply.ticket.written("ok")
        assert counted(rig) == (0, 1, 1)
        await rig.close()

    run(body)


def test_what_is_no_end_of_an_answer_changes_nothing() -> None:
    async def body() -> None:
        rig = Rig(Script(faults=FAILS), ModelPolicy())
        reply = await ask(rig, None)
        reply.ticket.written("ok")
        assert counted(rig) == (0, 1, 0)
        ticket = start(rig)
        ticket.written("ok")  # it has no answer yet
        ticket.cancel()
        assert counted(rig) == (0, 2, 1)
        await rig.close()

    run(body)
