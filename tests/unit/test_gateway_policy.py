"""server.gateway with a policy: fallback, retries, breaker and time limits hide nothing from the counts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitor.outcomes import LabelSettings
from router.breaker import BreakerPolicy, State
from router.experiment import ExperimentBooks, ExperimentSpec, OutcomeSpec
from router.retry import RetryBudget, RetryPolicy
from router.types import Arm, Destination, ExperimentSplit, KeySpec, ModelRoutes, RolloutSplit
from server.batching.batcher import Batcher
from server.errors import InvalidArgument, ModelNotReady, RuntimeFailure, TidegateError, VersionTimeout
from server.gateway import AdmissionLimits, Breakers, Gateway, ModelPolicy, Served
from server.monitoring.labels import LabelService, LabelWatch
from server.runtime.base import BatchingOptions, LoadRequest, ModelOptions
from server.runtime.fake import FakeRuntime, Script
from server.telemetry.instruments import Telemetry
from server.types import Decision, InferenceRequest, InferenceResponse, RequestHead, RequestLimits, Tensor

FAILS = {n: RuntimeFailure("broken on purpose") for n in range(10_000)}
EVERYTHING = 10_000


class Answer:
    """A reply that remembers."""

    def __init__(self) -> None:
        self.message_: tuple[InferenceResponse, Decision] | None = None
        self.ended: asyncio.Future[TidegateError | None] = asyncio.get_running_loop().create_future()

    def message(self, response: InferenceResponse, decision: Decision) -> None:
        self.message_ = (response, decision)

    def finish(self, error: TidegateError | None) -> None:
        self.ended.set_result(error)


class Rig:
    """Versions 1 (stable, doubles) and 2 (candidate) of model ``m``; ``candidate`` scripts version 2."""

    def __init__(self, candidate: Script, policy: ModelPolicy, *, stable: Script | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.telemetry = Telemetry.create("test")
        self.gateway = Gateway(
            limits=RequestLimits(),
            admission=AdmissionLimits(),
            telemetry=self.telemetry,
            clock=time.monotonic_ns,
            call_soon=self.loop.call_soon,
            call_later=self.loop.call_later,
        )
        self.stable = self.load("1", stable or Script(scale=2.0, offset=0.0))
        self.candidate = self.load("2", candidate)
        self.policy = policy
        self.publish(RolloutSplit("r", (Arm("canary", Destination("m", "2", self.candidate), EVERYTHING),)))

    def load(self, version: str, script: Script) -> Served:
        engine = FakeRuntime(script).load(LoadRequest("m", version, Path("none"), ModelOptions()))
        batcher = Batcher(
            engine,
            BatchingOptions(),
            clock=time.monotonic_ns,
            call_soon=self.loop.call_soon,
            call_soon_threadsafe=self.loop.call_soon_threadsafe,
            call_later=self.loop.call_later,
        )
        counted = self.telemetry.model("m", version)
        return Served(engine.spec, batcher, ModelOptions(), counted, self.telemetry.instruments)

    def publish(self, split: Any) -> None:
        versions = {"1": self.stable, "2": self.candidate}
        routes = ModelRoutes(versions, "1", key=KeySpec(("header:x-user",)), split=split)
        self.gateway.publish(self.gateway.table.with_model("m", routes), {"m": self.policy})

    async def ask(self, value: float = 1.0, user: str = "u", **head: Any) -> tuple[TidegateError | None, Answer]:
        fields = {"protocol": "http", "model": "", "version": "", "metadata": {"x-user": user}}
        permit = self.gateway.admit(RequestHead(**fields, received_ns=time.monotonic_ns(), **head))
        x = Tensor("x", "FP32", (1, 4), np.full((1, 4), value, np.float32).tobytes())
        answer = Answer()
        self.gateway.handle(permit, InferenceRequest("m", "", f"id-{user}", [x]), answer)
        error = await asyncio.wait_for(answer.ended, 10)
        permit.release()
        return error, answer

    def attempts(self, version: str, arm: str, code: str) -> float:
        return self.telemetry.instruments.attempts.labels("m", version, arm, code).value

    async def close(self) -> None:
        assert self.stable.calls == self.candidate.calls == 0
        for served in (self.stable, self.candidate):
            await asyncio.to_thread(served.batcher.close)


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))


def retrying(**fields: Any) -> ModelPolicy:
    policy = RetryPolicy(**fields)
    return ModelPolicy(policy, RetryBudget(policy))


def test_a_fallback_answers_and_hides_nothing() -> None:
    async def body() -> None:
        rig = Rig(Script(faults=FAILS), retrying(fallback_on=frozenset({"runtime_failure"})))
        for _ in range(10):
            error, answer = await rig.ask(3.0)
            assert error is None
            assert answer.message_ is not None
            response, decision = answer.message_
            assert response.outputs[0].array().tolist() == [[6.0] * 4]
            assert (decision.version, decision.arm) == ("1", "stable")
        assert rig.attempts("2", "canary", "runtime_failure") == 10
        assert rig.attempts("1", "stable", "ok") == 10
        await rig.close()

    run(body)


def test_without_a_policy_the_error_is_the_callers() -> None:
    async def body() -> None:
        rig = Rig(Script(faults=FAILS), ModelPolicy())
        error, _ = await rig.ask()
        assert isinstance(error, RuntimeFailure)
        assert rig.attempts("2", "canary", "runtime_failure") == 1
        await rig.close()

    run(body)


def test_a_retry_is_an_attempt_of_its_own_and_stays_in_its_budget() -> None:
    async def body() -> None:
        policy = retrying(retry_on=frozenset({"runtime_failure"}), max_retries=1, budget=0, min_concurrency=2)
        rig = Rig(Script(scale=5.0, offset=0.0, faults={0: RuntimeFailure("once")}), policy)
        error, answer = await rig.ask()
        assert error is None
        assert answer.message_ is not None
        assert answer.message_[1].version == "2"
        assert rig.attempts("2", "canary", "runtime_failure") == 1
        assert rig.attempts("2", "canary", "ok") == 1
        broken = Rig(Script(faults=FAILS), policy)
        codes = [(await broken.ask())[0] for _ in range(5)]
        assert all(isinstance(code, RuntimeFailure) for code in codes)
        assert broken.attempts("2", "canary", "runtime_failure") == 6
        await rig.close()
        await broken.close()

    run(body)


def test_an_open_breaker_sends_traffic_to_stable_and_probes_later() -> None:
    async def body() -> None:
        breakers = Breakers(BreakerPolicy(min_requests=4, open_at=5_000, open_ns=10**15))
        rig = Rig(Script(faults=FAILS), ModelPolicy(breakers=breakers))
        outcomes = [(await rig.ask())[0] for _ in range(10)]
        assert [isinstance(error, RuntimeFailure) for error in outcomes] == [True] * 4 + [False] * 6
        assert breakers.of(rig.candidate).state is State.OPEN
        assert breakers.of(rig.stable).state is State.CLOSED
        assert rig.attempts("2", "canary", "runtime_failure") == 4
        await rig.close()

    run(body)


def test_a_breaker_without_a_way_out_says_so() -> None:
    async def body() -> None:
        breakers = Breakers(BreakerPolicy(min_requests=2, open_at=1, open_ns=10**15))
        rig = Rig(Script(), ModelPolicy(breakers=breakers), stable=Script(faults=FAILS))
        rig.publish(None)
        outcomes = [(await rig.ask())[0] for _ in range(3)]
        assert isinstance(outcomes[2], ModelNotReady)
        assert "given a rest" in outcomes[2].message
        await rig.close()

    run(body)


def test_a_version_that_hangs_is_answered_by_stable_in_time() -> None:
    async def body() -> None:
        release = threading.Event()
        hang = Script(run_ns=50_000_000, before_run=lambda _: release.wait(20))
        policy = retrying(fallback_on=frozenset({"version_timeout"}))
        policy.timeout_ns = 50_000_000
        rig = Rig(hang, policy)
        error, answer = await rig.ask(4.0)
        assert error is None
        assert answer.message_ is not None
        assert answer.message_[1].version == "1"
        assert rig.attempts("2", "canary", "version_timeout") == 1
        policy.retry = RetryPolicy()
        error, _ = await rig.ask()
        assert isinstance(error, VersionTimeout)
        release.set()
        await rig.close()

    run(body)


def test_an_input_that_only_the_candidate_rejects_is_answered_by_stable() -> None:
    async def body() -> None:
        rig = Rig(Script(reject_marker=7.0), retrying(fallback_on=frozenset({"input_rejected"})))
        error, answer = await rig.ask(7.0)
        assert error is None
        assert answer.message_ is not None
        assert answer.message_[1].arm == "stable"
        await rig.close()

    run(body)


def experiment(rig: Rig) -> ExperimentBooks:
    """Half on ``control`` (version 1), half on ``b`` (version 2)."""
    arms = (
        Arm("control", Destination("m", "1", rig.stable), 5_000),
        Arm("b", Destination("m", "2", rig.candidate), 5_000),
    )
    spec = ExperimentSpec("e", (("control", 1), ("b", 1)), (OutcomeSpec("click", "binary", 10**18),))
    books = rig.policy.experiment = ExperimentBooks(spec)
    rig.publish(ExperimentSplit("e", arms, EVERYTHING))
    return books


def test_an_experiment_is_sticky_and_hears_of_its_outcomes() -> None:
    async def body() -> None:
        rig = Rig(Script(scale=5.0, offset=0.0), ModelPolicy())
        books = experiment(rig)
        seen: dict[str, str] = {}
        for n in range(60):
            user = f"user-{n % 30}"
            _, answer = await rig.ask(user=user)
            assert answer.message_ is not None
            assert seen.setdefault(user, answer.message_[1].arm) == answer.message_[1].arm
        assert set(seen.values()) == {"control", "b"}
        assert sum(arm.units for arm in books.counts) == 30
        assert sum(arm.requests for arm in books.counts) == 60
        assert rig.gateway.hear("m", "id-user-3", "click", 1)
        assert rig.gateway.hear("m", "id-user-4", "", 1)
        assert not rig.gateway.hear("m", "nobody", "click", 1)
        with pytest.raises(InvalidArgument, match="'clack'"):
            rig.gateway.hear("m", "id-user-3", "clack", 1)
        with pytest.raises(InvalidArgument, match="finite"):
            rig.gateway.hear("m", "id-user-3", "click", float("nan"))
        await rig.close()

    run(body)


def test_an_outcome_that_the_labels_have_no_room_for_is_dropped_and_not_called_wrong() -> None:
    async def body() -> None:
        rig = Rig(Script(scale=5.0, offset=0.0), ModelPolicy())
        watch = LabelWatch(LabelSettings("binary", "y", classes=("bad", "good"), queue_labels=1))
        labels = LabelService().acquire("m", "1", watch)
        rig.stable.labels = labels.tap(rig.stable.spec)
        assert rig.gateway.hear("m", "id", "", None, text="good")
        assert not rig.gateway.hear("m", "id", "", None, text="good")
        assert labels.monitor.join.dropped_labels == 1
        with pytest.raises(InvalidArgument, match="'neither'"):
            rig.gateway.hear("m", "id", "", None, text="neither")
        assert not rig.gateway.hear("m", "id", "", 2.0)  # no value of the task
        await rig.close()

    run(body)


def test_a_request_holds_what_it_may_fall_back_to() -> None:
    async def body() -> None:
        started, release = threading.Event(), threading.Event()

        def hang(_: int) -> None:
            started.set()
            assert release.wait(20)

        script = Script(run_ns=50_000_000, before_run=hang, faults=FAILS)
        rig = Rig(script, retrying(fallback_on=frozenset({"runtime_failure"})))
        asking = asyncio.ensure_future(rig.ask(3.0))
        assert await asyncio.to_thread(started.wait, 20)
        assert (rig.candidate.calls, rig.stable.calls) == (1, 1)
        release.set()
        error, answer = await asking
        assert error is None
        assert answer.message_ is not None
        assert answer.message_[1].version == "1"
        await rig.close()

    run(body)


def test_an_abandoned_attempt_is_answered_by_the_fallback() -> None:
    async def body() -> None:
        started, release = threading.Event(), threading.Event()

        def hang(_: int) -> None:
            started.set()
            assert release.wait(20)

        policy = retrying(fallback_on=frozenset({"model_not_ready"}))
        rig = Rig(Script(run_ns=50_000_000, before_run=hang), policy)
        asking = asyncio.ensure_future(rig.ask(3.0))
        assert await asyncio.to_thread(started.wait, 20)
        assert rig.candidate.batcher.abandon(ModelNotReady("it was replaced")) == 1
        error, answer = await asking
        assert error is None
        assert answer.message_ is not None
        assert answer.message_[0].outputs[0].array().tolist() == [[6.0] * 4]
        assert rig.attempts("2", "canary", "model_not_ready") == 1
        release.set()
        await rig.close()

    run(body)
