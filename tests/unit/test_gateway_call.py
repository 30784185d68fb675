"""server.gateway.call: what a request that is tried again is counted as, and who is to blame for what went wrong."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from router.breaker import BreakerPolicy, State
from router.retry import RetryBudget, RetryPolicy
from server.errors import DeadlineExceeded, InputRejected, ModelNotFound, RuntimeFailure, TidegateError, VersionNotFound
from server.gateway import Breakers, ModelPolicy
from server.runtime.fake import Script
from tests.unit import test_gateway
from tests.unit.test_gateway_policy import FAILS, Rig, run

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
        deadline = time.monotonic_ns() + 20 * MS

        def run_past_it(_: int) -> None:  # on the loop, so that no timer of it can come before the answer
            threading.Event().wait(max(0, deadline - time.monotonic_ns()) / 1e9 + 0.01)

        script = Script(faults=FAILS, before_run=run_past_it)
        rig = Rig(script, ModelPolicy(RETRIED, RetryBudget(RETRIED)))
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
