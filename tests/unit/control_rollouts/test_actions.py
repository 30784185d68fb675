"""What machines ask for is done in their order: growth waits for the disk, the way back waits for nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from router.rollout.events import Accepted, Order, Ordered, State
from router.rollout.machine import Rollout
from router.table import RoutingTable
from server.audit import AuditLog, DeferredAudit
from server.batching.batcher import Batcher
from server.config.load import parse_config
from server.config.rollouts import compile_rollouts
from server.config.routing import compile_routing
from server.control.publishing import Loaded, Publisher
from server.control.rollouts.actions import Admission, Hands
from server.control.rollouts.run import Run, books_for
from server.control.rollouts.store import RolloutStore
from server.errors import ModelLoadError
from server.gateway import AdmissionLimits, Gateway, Served
from server.runtime.base import BatchingOptions, Engine, LoadRequest, ModelOptions
from server.runtime.fake import FakeRuntime, Script
from server.store.sqlite import SqliteStore
from server.telemetry.instruments import Telemetry
from server.types import RequestLimits

TEXT = """apiVersion: tidegate/v1
models:
  m:
    versions: {'1': {source: a.onnx}, '2': {source: b.onnx}}
    stable: 1
    rollout:
      id: r1
      candidate: 2
      steps: [{weight: 50%, approve: true}]
      gates: {errors: {event: error, max_rate: 5%}}
"""


class Nothing:
    """Who keeps models loaded, where nothing is ever unloaded."""

    def index(self, ready_only: bool) -> list[Any]:
        return []

    def hold(self, model: str, version: str) -> None: ...
    def let_go(self, model: str, version: str) -> None: ...


class Rig:
    """A rollout of version 2 beside version 1, with a store whose writers give up soon.

    ``working`` False: the rollout is not written down, so that another of its name can begin in the same store.
    """

    def __init__(self, folder: Path, busy_timeout_s: float = 0.1, *, working: bool = True) -> None:
        self.loop = asyncio.get_running_loop()
        self.telemetry = Telemetry.create("test")
        self.store = SqliteStore(folder / "tidegate.db", busy_timeout_s=busy_timeout_s)
        self.audit = AuditLog(self.store)
        self.deferred = DeferredAudit(self.audit, self.store)
        self.gateway = Gateway(
            limits=RequestLimits(),
            admission=AdmissionLimits(),
            telemetry=self.telemetry,
            clock=time.monotonic_ns,
            call_soon=self.loop.call_soon,
            call_later=self.loop.call_later,
        )
        config = parse_config(TEXT, path="f", folder=folder)
        template = compile_rollouts(config)["m"]
        self.publisher = Publisher(self.gateway, lambda: None)
        self.versions = {version: self.load(version) for version in "12"}
        self.publisher.replace(compile_routing(config), {"m": Loaded(self.versions, "1")}, 1)
        store = RolloutStore(self.store, self.audit)
        self.hands = Hands(self.gateway, self.publisher, Nothing(), store, self.deferred.record, no_engine)
        machine = Rollout(template.spec("r1", "1", "2", "digest"), "ada")
        self.run = Run(template, machine, books_for(template), 1)
        self.publisher.steer("m", self.run.steering(), self.run.books)
        self.worker = self.loop.create_task(self.hands.work(self.run))
        if not working:
            self.worker.cancel()

    def load(self, version: str) -> Served:
        engine = FakeRuntime(Script()).load(LoadRequest("m", version, Path("none"), ModelOptions()))
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

    @property
    def share(self) -> float:
        table: RoutingTable[Served] = self.gateway.table
        arms = table.compiled("m").arms
        return arms["candidate"].propensity if "candidate" in arms else 0.0

    @contextmanager
    def disk_taken(self) -> Iterator[None]:
        """Another writer has its turn, for as long as it likes."""
        with self.store.transaction():
            yield

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(25):
            while not holds():  # noqa: ASYNC110 - tables and disks ring no bell
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.worker.cancel()
        await asyncio.gather(self.worker, return_exceptions=True)
        for served in self.versions.values():
            await asyncio.to_thread(served.batcher.close)
        self.deferred.close()
        self.store.close()


async def no_engine(_: Served) -> Engine:
    raise ModelLoadError("nothing is loaded here")


def test_growth_waits_for_the_disk_and_an_abort_does_not(tmp_path: Path) -> None:
    async def body() -> None:
        rig = Rig(tmp_path)
        with rig.disk_taken():
            rig.hands.tell(rig.run, Accepted())
            await asyncio.sleep(0.3)
            assert rig.run.machine.state is State.LOADING
            assert rig.share == 0
        await rig.until(lambda: rig.share == 0.5)
        assert [row.event.action for row in rig.audit.tail(9)] == ["rollout.loading", "rollout.step"]
        with rig.disk_taken():
            rig.hands.tell(rig.run, Ordered(Order.ABORT, "bob"))
            assert rig.share == 0  # before anything was awaited
            assert rig.run.machine.state is State.ABORTED
        assert rig.deferred.flush(10)
        rows = rig.audit.tail(9)[2:]
        assert [(row.event.actor, row.event.action) for row in rows] == [
            ("bob", "rollout.rolling_back"), ("tidegate", "rollout.aborted"),
        ]  # fmt: skip
        await rig.close()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_what_the_quality_gates_said_is_in_the_audit_before_what_follows_from_it(tmp_path: Path) -> None:
    async def body() -> None:
        rig = Rig(tmp_path)
        await rig.hands.admit(rig.run)
        await rig.until(lambda: rig.share == 0.5)
        assert [row.event.action for row in rig.audit.tail(9)] == [
            "rollout.gated", "rollout.loading", "rollout.step",
        ]  # fmt: skip
        await rig.close()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_verdict_of_the_quality_gates_waits_for_no_disk(tmp_path: Path) -> None:
    async def body() -> None:
        rig = Rig(tmp_path)
        with rig.disk_taken():
            await rig.hands.admit(rig.run)
            assert rig.run.machine.state is State.LOADING
        await rig.until(lambda: rig.share == 0.5)
        assert rig.deferred.flush(10)
        assert "rollout.gated" in [row.event.action for row in rig.audit.tail(9)]
        await rig.close()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_quality_gates_that_crash_leave_it_to_people(tmp_path: Path) -> None:
    async def crashing(_model: str, _candidate: str, _stable: str) -> Admission:
        raise ZeroDivisionError

    async def body() -> None:
        rig = Rig(tmp_path)
        rig.hands.quality = crashing
        with capture_logs() as logs:
            await rig.hands.admit(rig.run)
        assert [line["event"] for line in logs if line["log_level"] == "error"] == ["rollout_admission_crashed"]
        machine = rig.run.machine
        assert (machine.state, "internal error in its quality gates" in machine.reason) == (State.PENDING, True)
        rig.hands.tell(rig.run, Ordered(Order.APPROVE, "bob"))
        await rig.until(lambda: rig.share == 0.5)
        await rig.close()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_rehearsal_that_crashes_fails_the_candidate(tmp_path: Path) -> None:
    async def crashing(_: Served) -> Engine:
        raise ZeroDivisionError

    async def body() -> None:
        rig = Rig(tmp_path)
        golden = tmp_path / "golden.json"
        golden.write_text('{"requests": [{"inputs": [], "outputs": []}]}')
        rig.run.template = replace(rig.run.template, golden=golden)
        rig.hands.load_again = crashing
        rig.hands.tell(rig.run, Accepted())
        await rig.until(lambda: rig.run.machine.state is State.FAILED)
        assert "internal error in its rehearsal" in rig.run.machine.reason
        assert rig.share == 0
        await rig.close()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_candidate_that_breaks_before_its_step_is_in_force_never_gets_it(tmp_path: Path) -> None:
    async def body() -> None:
        rig = Rig(tmp_path)
        rig.hands.tell(rig.run, Accepted())
        await rig.until(lambda: rig.share == 0.5)
        with rig.disk_taken():
            rig.hands.tell(rig.run, Ordered(Order.PROMOTE, "bob"))
            assert rig.run.machine.state is State.PROMOTING
            await asyncio.sleep(0.2)
            assert rig.share == 0.5
            rig.hands.tell(rig.run, Ordered(Order.ROLLBACK, "cleo", "no"))
            assert rig.share == 0
        await rig.until(lambda: rig.run.machine.state is State.ROLLED_BACK)
        await rig.until(rig.run.idle.is_set)
        assert rig.share == 0
        assert rig.deferred.flush(10)
        actions = [row.event.action for row in rig.audit.tail(20)]
        assert "rollout.promoting" in actions
        assert actions[-1] == "rollout.rolled_back"
        (row,) = rig.hands.store.all()
        assert (row.state, row.open, row.failed_ns is not None) == ("rolled_back", False, True)
        await rig.close()

    asyncio.run(asyncio.wait_for(body(), 30))


@pytest.mark.parametrize("stable", ["", "2"])
def test_nothing_is_steered_to_what_is_not_loaded(tmp_path: Path, stable: str) -> None:
    async def body() -> None:
        rig = Rig(tmp_path)
        rig.publisher.update("m", Loaded({"1": rig.versions["1"]}, "1"))
        rig.run.weight, rig.run.stable = 0 if stable else 5000, stable
        assert not rig.publisher.steer("m", rig.run.steering(), rig.run.books)
        assert rig.gateway.table.models["m"].stable == "1"
        await rig.close()

    asyncio.run(asyncio.wait_for(body(), 30))
