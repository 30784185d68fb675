"""server.control.models: versions come and go under traffic; a failed load never takes the old one away."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import structlog

from server.batching.batcher import Batcher, Work
from server.batching.offloop import OffLoopBatcher
from server.config.load import parse_config
from server.config.routing import RoutingSpec, compile_routing
from server.config.settings import ReloadSettings
from server.control.models import ModelControl
from server.control.publishing import Publisher
from server.control.sources import DirectorySource, ModelPlan, ModelSource, NamedModel, NamedSource, VersionPlan
from server.errors import (
    FailedPrecondition,
    InvalidArgument,
    ModelLoadError,
    ModelNotFound,
    ModelNotReady,
    OutOfMemory,
    TidegateError,
    VersionNotFound,
)
from server.gateway import AdmissionLimits, Gateway, Served
from server.runtime.base import Engine, LoadRequest, ModelOptions
from server.runtime.fake import FakeRuntime, Script
from server.runtime.upstream_options import UpstreamOptions
from server.telemetry.instruments import Telemetry
from server.types import Decision, InferenceRequest, InferenceResponse, RequestHead, RequestLimits, Tensor
from tests.support.routed import eventually


@dataclass
class FileRuntime:
    """Loads what the file says: ``bad`` fails, anything else is a scale. ``hold`` blocks loads until it is set."""

    engines: list[Any] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    loading: threading.Event = field(default_factory=threading.Event)
    before_run: Callable[[int], None] | None = None
    unreachable: bool = False
    #: Loads find no memory while this many engines are open.
    room: int = 1000

    def load(self, request: LoadRequest) -> Engine:
        self.loading.set()
        assert self.hold.wait(20)
        text = request.path.read_text()
        if sum(not engine.closed for engine in self.engines) >= self.room:
            raise OutOfMemory("The device has not enough memory.")
        if self.unreachable:
            raise ModelLoadError("it is down.")
        if text == "bad":
            raise ModelLoadError(f"{request.path.name} is bad.")
        if text == "crash":
            raise ZeroDivisionError
        engine = FakeRuntime(Script(scale=float(text), before_run=self.before_run)).load(request)
        self.engines.append(engine)
        return engine

    def describe(self) -> Mapping[str, object]:
        return {}


class Answer:
    """A reply that remembers how it ended."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[TidegateError | None] = asyncio.get_running_loop().create_future()

    def message(self, response: InferenceResponse, decision: Decision) -> None:
        pass

    def finish(self, error: TidegateError | None) -> None:
        self.ended.set_result(error)


class Rig:
    """A control over a directory, with the gateway it publishes to."""

    def __init__(
        self,
        root: Path,
        mode: str = "poll",
        reload: ReloadSettings | None = None,
        source: ModelSource | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        telemetry = Telemetry.create("test")
        self.root = root
        self.gateway = Gateway(
            limits=RequestLimits(),
            admission=AdmissionLimits(),
            telemetry=telemetry,
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_later=loop.call_later,
        )
        self.runtime = FileRuntime()
        self.runtime.hold.set()
        self.changes = 0
        self.audited: list[tuple[str, str]] = []
        self.closed: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.telemetry = telemetry
        self.batcher: Callable[..., Batcher] = Batcher

        def serve(engine: Engine, options: ModelOptions) -> Served:
            batcher = self.batcher(
                engine,
                options.batching,
                clock=time.monotonic_ns,
                call_soon=loop.call_soon,
                call_soon_threadsafe=loop.call_soon_threadsafe,
                call_later=loop.call_later,
            )
            counted = telemetry.model(engine.spec.name, engine.spec.version)
            return Served(engine.spec, batcher, options, counted, telemetry.instruments)

        self.control = ModelControl(
            source=source or DirectorySource(root, root / ".state"),
            runtime=self.runtime,
            gateway=self.gateway,
            serve=serve,
            publisher=Publisher(self.gateway, self._changed),
            forget=self._forget,
            audit=lambda action, subject, _: self.audited.append((action, subject)),
            mode=mode,
            reload=reload,
            close_seconds=3.0,
        )

    def _forget(self, model: str, version: str) -> None:
        self.telemetry.forget(model, version)
        self.closed.put_nowait((model, version))

    def _changed(self) -> None:
        self.changes += 1

    def gone(self, model: str, version: str) -> None:
        """Take a version's folder away."""
        folder = self.root / model / version
        (folder / "model.onnx").unlink()
        folder.rmdir()

    async def call(self, model: str = "m") -> TidegateError | None:
        """One request; how it ended."""
        permit = self.gateway.admit(RequestHead("http", "", "", {}, time.monotonic_ns()))
        answer = Answer()
        x = Tensor("x", "FP32", (1, 4), bytes(16))
        self.gateway.handle(permit, InferenceRequest(model, "", "", [x]), answer)
        try:
            return await answer.ended
        finally:
            permit.release()

    def put(self, model: str, version: str, text: str) -> None:
        folder = self.root / model / version
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / ".new"
        new.write_text(text)
        new.rename(folder / "model.onnx")

    def stable(self, model: str) -> str:
        return self.gateway.routes(model).stable

    def rows(self) -> dict[tuple[str, str], tuple[str, str]]:
        return {(row.name, row.version): (row.state, row.reason) for row in self.control.index(ready_only=False)}


def run(
    tmp_path: Path,
    body: Callable[[Rig], Coroutine[Any, Any, None]],
    mode: str = "poll",
    reload: ReloadSettings | None = None,
    source: ModelSource | None = None,
) -> None:
    async def main() -> None:
        rig = Rig(tmp_path, mode, reload, source)
        try:
            await asyncio.wait_for(body(rig), 30)
        finally:
            rig.runtime.hold.set()
            await asyncio.wait_for(rig.control.close(), 10)
        assert all(engine.closed for engine in rig.runtime.engines)

    gc.freeze()  # each close collects: it is not to go through all that earlier tests have left, for seconds
    try:
        asyncio.run(main())
    finally:
        gc.unfreeze()


def test_the_newest_version_serves_and_a_newer_one_takes_over(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        rig.put("m", "2", "2")
        await rig.control.start()
        assert rig.stable("m") == "2"
        assert set(rig.gateway.routes("m").versions) == {"2"}
        rig.put("m", "10", "3")
        await rig.control.refresh()
        assert rig.stable("m") == "10"
        assert set(rig.gateway.routes("m").versions) == {"10"}
        generation = rig.gateway.table.generation
        await rig.control.refresh()
        assert rig.gateway.table.generation == generation
        assert len(rig.runtime.engines) == 2
        assert rig.changes > 0

    run(tmp_path, body)


def test_the_old_version_serves_while_the_new_one_loads(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start()
        rig.runtime.hold.clear()
        rig.runtime.loading.clear()
        rig.put("m", "2", "2")
        refresh = asyncio.ensure_future(rig.control.refresh())
        await asyncio.to_thread(rig.runtime.loading.wait, 10)
        assert rig.stable("m") == "1"
        assert rig.rows()["m", "2"][0] == "LOADING"
        assert rig.control.ready("m", "1")
        assert not rig.control.ready("m", "2")
        rig.runtime.hold.set()
        await refresh
        assert rig.stable("m") == "2"

    run(tmp_path, body)


@pytest.mark.parametrize("text", ["bad", "crash"])
def test_a_failed_load_leaves_the_old_version_serving(tmp_path: Path, text: str) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start()
        rig.put("m", "2", text)
        for _ in range(2):
            await rig.control.refresh()
        state, reason = rig.rows()["m", "2"]
        assert (state, bool(reason)) == ("UNAVAILABLE", True)
        assert rig.gateway.routes("m").stable == "1"
        assert rig.control.failures()[0].version == "2"
        assert rig.audited == [("model.ready", "m:1"), ("model.refused", "m:2")]
        rig.put("m", "2", "22")
        await rig.control.refresh()
        assert rig.stable("m") == "2"
        assert rig.rows()["m", "2"] == ("READY", "")
        state, reason = rig.rows()["m", "1"]
        assert state == "UNAVAILABLE"
        assert reason.startswith("replaced, kept warm until 2")

    run(tmp_path, body)


def test_changed_bytes_are_loaded_beside_and_bad_ones_are_not(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start()
        first = rig.gateway.served("m", "")
        rig.put("m", "1", "bad")
        await rig.control.refresh()
        assert rig.gateway.served("m", "") is first
        assert "bad" in rig.rows()["m", "1"][1]
        rig.put("m", "1", "5")
        await rig.control.refresh()
        assert rig.gateway.served("m", "") is not first
        assert rig.rows() == {("m", "1"): ("READY", "")}

    run(tmp_path, body)


def test_a_version_in_use_is_closed_after_its_last_call(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start()
        held = rig.gateway.served("m", "")
        held.calls += 1
        rig.put("m", "2", "2")
        await rig.control.refresh()
        await asyncio.sleep(0)
        assert not rig.runtime.engines[0].closed
        held.release()

    run(tmp_path, body)


@pytest.mark.parametrize("hangs", [True, False])
def test_an_engine_is_not_closed_under_a_run_that_hangs(tmp_path: Path, hangs: bool) -> None:
    async def body(rig: Rig) -> None:
        started, go = threading.Event(), threading.Event()

        def hang(_: int) -> None:
            started.set()
            assert go.wait(20)

        rig.runtime.before_run = hang
        rig.batcher = partial(OffLoopBatcher, close_seconds=0.1 if hangs else 20)
        rig.put("m", "1", "1")
        await rig.control.start()
        ended: asyncio.Future[Work] = asyncio.get_running_loop().create_future()
        x = Tensor("x", "FP32", (1, 4), bytes(16))
        # As a caller that has gone away leaves it: nobody holds the version, and its run goes on.
        rig.gateway.served("m", "").batcher.submit(Work([x], 1, ended.set_result))
        assert await asyncio.to_thread(started.wait, 20)
        if not hangs:
            go.set()
        await rig.control.close()
        assert rig.runtime.engines[0].closed is not hangs
        go.set()
        await ended
        await asyncio.to_thread(eventually, lambda: rig.runtime.engines[0].closed)

    run(tmp_path, body)


def test_what_failed_is_tried_again_when_asked(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        rig.runtime.unreachable = True
        await rig.control.start()
        assert rig.rows()["m", "1"] == ("UNAVAILABLE", "it is down.")
        rig.runtime.unreachable = False
        await rig.control.refresh()
        assert rig.rows()["m", "1"] == ("UNAVAILABLE", "it is down.")
        await rig.control.refresh(retry_failed=True)
        assert rig.stable("m") == "1"

    run(tmp_path, body)


def test_a_model_that_is_removed_is_unknown_afterwards(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        rig.put("n", "1", "1")
        await rig.control.start()
        (tmp_path / "m" / "1" / "model.onnx").unlink()
        (tmp_path / "m" / "1").rmdir()
        (tmp_path / "m").rmdir()
        await rig.control.refresh()
        with pytest.raises(ModelNotFound):
            rig.gateway.served("m", "")
        with pytest.raises(ModelNotFound):
            rig.control.ready("m", "")
        assert set(rig.rows()) == {("n", "1")}

    run(tmp_path, body)


def test_a_broken_config_keeps_what_serves(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start()
        config = tmp_path / "m" / "config.pbtxt"
        config.write_text('platform: "tensorflow_graphdef"\n')
        await rig.control.refresh()
        assert rig.stable("m") == "1"
        config.write_text("max_batch_size: 8\n")
        await rig.control.refresh()
        assert len(rig.runtime.engines) == 2

    run(tmp_path, body)


def test_a_source_that_is_gone_is_the_reason_of_what_still_serves(tmp_path: Path) -> None:
    (tmp_path / "one.onnx").write_text("1")
    source = NamedSource((NamedModel("m", tmp_path / "one.onnx"),), tmp_path / "state")

    async def body(rig: Rig) -> None:
        await rig.control.start()
        assert rig.rows() == {("m", "1"): ("READY", "")}
        (tmp_path / "one.onnx").unlink()
        await rig.control.refresh(retry_failed=True)
        why = "its source 'one.onnx' cannot be read: No such file or directory"
        assert rig.rows() == {("m", "1"): ("READY", why)}
        assert await rig.call() is None
        (tmp_path / "one.onnx").write_text("1")
        await rig.control.refresh()
        assert rig.rows() == {("m", "1"): ("READY", "")}

    run(tmp_path, body, source=source)


def test_a_load_that_fails_says_whose_it_was(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        gone = NamedSource((NamedModel("m", tmp_path / "gone.onnx"),), tmp_path / "state")
        with pytest.raises(ModelLoadError, match=r"model 'm': its source 'gone.onnx' cannot be read") as refused:
            await rig.control.prepare(gone)
        assert (refused.value.model, refused.value.version) == ("m", "")
        rig.put("n", "3", "bad")
        with pytest.raises(ModelLoadError, match=r"model 'n' version 3: model.onnx is bad") as refused:
            await rig.control.prepare(DirectorySource(tmp_path, tmp_path / ".state"))
        assert (refused.value.model, refused.value.version) == ("n", "3")

    run(tmp_path, body)


def test_names_that_lead_to_what_is_not_loaded_are_known(tmp_path: Path) -> None:
    def specs(aliases: str) -> Mapping[str, RoutingSpec]:
        return compile_routing(parse_config(f"apiVersion: tidegate/v1\nmodels: {{m: {{source: m{aliases}}}}}\n"))

    async def body(rig: Rig) -> None:
        rig.put("m", "1", "bad")
        await rig.control.start()
        rig.control.commit(rig.control.as_it_is(), specs(", aliases: [also]"), 1)
        for name, why in (("m", "model.onnx is bad"), ("also", "m@latest is not loaded")):
            with pytest.raises(ModelNotReady, match=f"'{name}' is not ready: {why}"):
                rig.gateway.served(name, "")
        rig.put("m", "1", "1")
        await rig.control.refresh()
        assert rig.gateway.served("also", "") is rig.gateway.served("m", "")
        rig.control.commit(rig.control.as_it_is(), specs(""), 2)
        with pytest.raises(ModelNotFound):
            rig.gateway.served("also", "")
        assert rig.gateway.unready == {}

    run(tmp_path, body)


def test_an_orderly_end_leaves_no_route_that_leads_nowhere(tmp_path: Path) -> None:
    rule = "{name: r, match: {header: {x: y}}, to: 'a:1'}"
    text = f"models: {{a: {{source: a, aliases: [also]}}, b: {{source: b, rules: [{rule}]}}}}"
    specs = compile_routing(parse_config(f"apiVersion: tidegate/v1\n{text}\n"))

    async def body(rig: Rig) -> None:
        for name in "ab":
            rig.put(name, "1", "1")
        await rig.control.start()
        rig.control.commit(rig.control.as_it_is(), specs, 7)
        assert set(rig.gateway.table.models) == {"a", "also", "b"}
        with structlog.testing.capture_logs() as logs:
            await rig.control.close()
        assert [line for line in logs if line["log_level"] != "info"] == []
        assert (set(rig.gateway.table.models), rig.gateway.table.generation) == (set(), 7)
        with pytest.raises(ModelNotReady, match="shut down"):
            rig.gateway.served("a", "")

    run(tmp_path, body)


def test_explicit_control(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        rig.put("n", "1", "bad")
        await rig.control.start(("m",))
        assert rig.stable("m") == "1"
        assert rig.rows()["n", ""][0] == "UNAVAILABLE"
        with pytest.raises(InvalidArgument, match="config"):
            await rig.control.load("m", {"config": "{}"})
        with pytest.raises(ModelNotFound):
            await rig.control.load("nobody", {})
        with pytest.raises(ModelLoadError, match=r"'n': model\.onnx is bad"):
            await rig.control.load("n", {})
        await rig.control.unload("m")
        with pytest.raises(ModelNotReady, match="unloaded"):
            rig.gateway.served("m", "")
        assert rig.rows()["m", "1"] == ("UNAVAILABLE", "unloaded")
        await rig.control.load("m", {})
        assert rig.stable("m") == "1"
        with pytest.raises(VersionNotFound):
            rig.control.ready("m", "7")

    run(tmp_path, body, "explicit")


def test_a_load_that_leaves_the_old_bytes_serving_has_failed(tmp_path: Path) -> None:
    """As often as it is asked for, until the bytes can be loaded."""

    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start(("m",))
        rig.put("m", "1", "bad")
        for _ in range(2):
            with pytest.raises(ModelLoadError, match=r"failed to load 'm': model\.onnx is bad"):
                await rig.control.load("m", {})
        rig.put("m", "1", "2")
        rig.runtime.unreachable = True
        with pytest.raises(ModelLoadError, match="it is down"):
            await rig.control.load("m", {})
        assert rig.rows()["m", "1"] == ("READY", "it is down.")
        rig.runtime.unreachable = False
        await rig.control.load("m", {})  # the same bytes: who asks again has them tried again
        assert rig.rows()["m", "1"] == ("READY", "")
        (tmp_path / "m" / "config.pbtxt").write_text("max_batch_size: many")
        with pytest.raises(ModelLoadError, match=r"failed to load 'm': config\.pbtxt:1:17"):
            await rig.control.load("m", {})
        assert rig.stable("m") == "1"

    run(tmp_path, body, "explicit")


def test_an_unload_of_what_is_not_loaded_leaves_it_so(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.unload("m")  # before anybody has looked
        await rig.control.start()
        rig.put("late", "1", "1")
        for name in ("m", "late"):  # the second came since the last look
            await rig.control.unload(name)
            with pytest.raises(ModelNotReady, match="not loaded"):
                rig.gateway.served(name, "")
        assert rig.rows() == {(name, ""): ("UNAVAILABLE", "not loaded") for name in ("m", "late")}
        assert rig.audited == []
        with pytest.raises(ModelNotFound, match="'nobody'"):
            await rig.control.unload("nobody")

    run(tmp_path, body, "explicit")


def test_an_unload_before_the_first_look_knows_the_names_of_others(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(ModelNotFound, match="'nobody'"):
            await rig.control.unload("nobody")

    run(tmp_path, body, "explicit")


def test_an_unload_while_the_server_starts_comes_after_the_load(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("a", "1", "1")
        rig.put("b", "1", "1")
        rig.runtime.hold.clear()
        start = asyncio.ensure_future(rig.control.start(("*",)))
        await asyncio.to_thread(rig.runtime.loading.wait, 10)
        unload = asyncio.ensure_future(rig.control.unload("b"))  # a is loading, and b was not yet begun
        await asyncio.sleep(0)
        rig.runtime.hold.set()
        await asyncio.gather(start, unload)
        assert rig.stable("a") == "1"
        assert rig.rows()["b", "1"] == ("UNAVAILABLE", "unloaded")

    run(tmp_path, body, "explicit")


@pytest.mark.parametrize("mode", ["none", "poll"])
def test_load_and_unload_need_explicit_control(tmp_path: Path, mode: str) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start()
        async with rig.control.turn:  # somebody loads, for as long as it takes: nobody waits to be refused
            for act in (rig.control.load("m", {}), rig.control.unload("m")):
                with pytest.raises(FailedPrecondition, match="explicit"):
                    await act
            with pytest.raises(ModelNotFound):
                await rig.control.load("nobody", {})

    run(tmp_path, body, mode)


def test_a_version_is_held_until_everybody_has_let_it_go(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start()
        for _ in range(2):
            rig.control.hold("m", "1")
        rig.put("m", "2", "2")
        for loaded in ({"1", "2"}, {"1", "2"}, {"2"}):
            await rig.control.refresh()
            assert set(rig.gateway.routes("m").versions) == loaded
            rig.control.let_go("m", "1")
        rig.control.hold("m", "2")  # letting go of what nobody held has left nothing behind
        rig.put("m", "3", "3")
        await rig.control.refresh()
        assert set(rig.gateway.routes("m").versions) == {"2", "3"}

    run(tmp_path, body)


def test_a_look_that_crashes_is_not_the_last(tmp_path: Path) -> None:
    class Crashing(DirectorySource):
        looks = 0

        def scan(self) -> dict[str, ModelPlan]:
            self.looks += 1
            if self.looks == 2:
                raise ZeroDivisionError
            return super().scan()

    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start()
        rig.put("m", "2", "2")
        with structlog.testing.capture_logs() as logs:
            following = asyncio.ensure_future(rig.control.poll(0.01))
            assert await rig.closed.get() == ("m", "1")
            following.cancel()
        assert [line["event"] for line in logs if line["log_level"] == "error"] == ["poll_failed"]
        assert rig.stable("m") == "2"

    rules = ReloadSettings(keep_warm_s=0)
    run(tmp_path, body, reload=rules, source=Crashing(tmp_path, tmp_path / ".state"))


def test_looks_that_fail_are_told_when_that_begins_changes_and_ends(tmp_path: Path) -> None:
    class Failing(DirectorySource):
        """Looks after the start fail as ``errors`` say, one after the other; None is one that works."""

        errors: ClassVar[list[Exception | None]] = [
            OSError("gone"), OSError("gone"), OSError("stale"), ModelLoadError("stale"), ZeroDivisionError("stale"),
            ZeroDivisionError("stale"), None, None, ZeroDivisionError("stale"), None,
        ]  # fmt: skip
        looks = -1

        def scan(self) -> dict[str, ModelPlan]:
            self.looks += 1
            error = self.errors[self.looks - 1] if 0 < self.looks <= len(self.errors) else None
            if self.looks > len(self.errors):
                done.set()
            if error is not None:
                raise error
            return super().scan()

    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start()
        with structlog.testing.capture_logs() as logs:
            following = asyncio.ensure_future(rig.control.poll(0.001))
            assert await asyncio.to_thread(done.wait, 30)
            following.cancel()
        told = [(line["event"], line["log_level"], line.get("error", line.get("failed"))) for line in logs]
        assert told == [
            ("poll_failed", "warning", "gone"),
            ("poll_failed", "warning", "stale"),
            ("poll_failed", "warning", "stale"),
            ("poll_failed", "error", None),
            ("poll_works_again", "info", "ZeroDivisionError: stale"),
            ("poll_failed", "error", None),
            ("poll_works_again", "info", "ZeroDivisionError: stale"),
        ]
        assert rig.control.failing == ""

    done = threading.Event()
    run(tmp_path, body, source=Failing(tmp_path, tmp_path / ".state"))


def test_named_models_have_their_own_sources_and_options(tmp_path: Path) -> None:
    (tmp_path / "one.onnx").write_text("1")
    folder = tmp_path / "two" / "3"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_text("1")
    (tmp_path / "two" / "config.pbtxt").write_text("max_batch_size: 4\n")
    base = ModelOptions(intra_op_threads=3)
    source = NamedSource(
        (
            NamedModel("a", tmp_path / "one.onnx", base),
            NamedModel("b", tmp_path / "two", base),
            NamedModel("c", tmp_path / "gone", base),
        ),
        tmp_path / "state",
    )
    plans = source.scan()
    assert [(name, [v.version for v in plan.versions]) for name, plan in plans.items()] == [
        ("a", ["1"]),
        ("b", ["3"]),
        ("c", []),
    ]
    assert plans["b"].options.max_batch_size == 4
    assert plans["b"].options.intra_op_threads == 3
    assert "cannot be read" in plans["c"].error


def test_requests_for_a_loading_model_say_so(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        rig.runtime.hold.clear()
        start = asyncio.ensure_future(rig.control.start())
        await asyncio.to_thread(rig.runtime.loading.wait, 10)
        with pytest.raises(ModelNotReady, match="loading"):
            rig.gateway.admit(RequestHead("http", "m", "", {}, 0))
        rig.runtime.hold.set()
        await start

    run(tmp_path, body)


def test_going_back_to_a_version_that_is_kept_warm_loads_nothing(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start()
        first = rig.gateway.served("m", "")
        rig.put("m", "2", "2")
        await rig.control.refresh()
        assert rig.stable("m") == "2"
        with pytest.raises(VersionNotFound):
            rig.gateway.served("m", "1")
        with pytest.raises(VersionNotFound):
            rig.control.ready("m", "1")
        assert [row.version for row in rig.control.index(ready_only=True)] == ["2"]
        rig.gone("m", "2")
        await rig.control.refresh()
        assert rig.gateway.served("m", "") is first
        assert await rig.call() is None
        assert len(rig.runtime.engines) == 2
        assert await rig.closed.get() == ("m", "2")  # its file is gone: it cannot come back
        assert rig.rows() == {("m", "1"): ("READY", "")}

    run(tmp_path, body)


def test_only_what_the_last_change_replaced_is_kept_warm(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start()
        for number in ("2", "3"):
            rig.put("m", number, number)
            await rig.control.refresh()
        assert await rig.closed.get() == ("m", "1")
        assert not rig.runtime.engines[1].closed
        rig.put("m", "3", "33")  # written over: what was there cannot come back, and evicts nothing
        await rig.control.refresh()
        await asyncio.to_thread(eventually, lambda: rig.runtime.engines[2].closed)
        assert not rig.runtime.engines[1].closed
        assert not rig.runtime.engines[3].closed
        assert set(rig.rows()) == {("m", "2"), ("m", "3")}

    run(tmp_path, body)


def test_keeping_warm_ends_by_its_time_or_is_turned_off(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start()
        rig.put("m", "2", "2")
        await rig.control.refresh()
        assert await rig.closed.get() == ("m", "1")
        rig.control.obey(ReloadSettings(keep_warm_s=1000.0))
        rig.put("m", "3", "3")
        await rig.control.refresh()
        assert ("m", "2") in rig.rows()
        rig.control.obey(ReloadSettings(keep_warm_s=0.0))
        assert await rig.closed.get() == ("m", "2")
        rig.put("m", "4", "4")
        await rig.control.refresh()
        assert await rig.closed.get() == ("m", "3")

    run(tmp_path, body, reload=ReloadSettings(keep_warm_s=0.05))


def test_what_is_kept_warm_makes_room_for_a_load(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.runtime.room = 2
        rig.put("m", "1", "1")
        await rig.control.start()
        rig.put("m", "2", "2")
        await rig.control.refresh()
        rig.put("n", "1", "1")
        await rig.control.refresh()
        assert rig.stable("n") == "1"
        assert rig.runtime.engines[0].closed
        rig.put("n", "2", "2")
        await rig.control.refresh()
        assert "memory" in rig.rows()["n", "2"][1]
        assert rig.stable("n") == "1"

    run(tmp_path, body)


def test_an_unload_keeps_nothing_warm(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        await rig.control.start(("m",))
        rig.put("m", "2", "2")
        await rig.control.load("m", {})
        assert not rig.runtime.engines[0].closed
        await rig.control.unload("m")
        assert {await rig.closed.get(), await rig.closed.get()} == {("m", "1"), ("m", "2")}

    run(tmp_path, body, "explicit")


def test_requests_lose_a_replaced_version_at_the_end_of_the_drain(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        started, go = threading.Event(), threading.Event()

        def hang(_: int) -> None:
            started.set()
            assert go.wait(20)

        rig.runtime.before_run = hang
        rig.batcher = OffLoopBatcher
        rig.put("m", "1", "1")
        await rig.control.start()
        running = asyncio.ensure_future(rig.call())
        assert await asyncio.to_thread(started.wait, 20)
        waiting = asyncio.ensure_future(rig.call())
        rig.runtime.before_run = None
        rig.put("m", "2", "2")
        await rig.control.refresh()
        assert await rig.call() is None
        for lost in (await running, await waiting):
            assert isinstance(lost, ModelNotReady)
            assert lost.message == (
                "model 'm' version 1 was replaced, and 0.1 s later, the limit of its drain, the request was not done"
            )
        assert rig.telemetry.instruments.drain_cancelled.labels("m").value == 2
        assert not rig.runtime.engines[0].closed
        # The loader is free, and so is the end of the process; the engine is closed when its run is back.
        rig.put("m", "3", "3")
        await rig.control.refresh()
        await asyncio.wait_for(rig.control.close(), 5)
        assert not rig.runtime.engines[0].closed
        go.set()
        await asyncio.to_thread(eventually, lambda: rig.runtime.engines[0].closed)

    run(tmp_path, body, reload=ReloadSettings(drain_s=0.1))


def test_a_configuration_takes_back_what_the_one_before_it_had(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        def source(name: str) -> DirectorySource:
            return DirectorySource(tmp_path / name, tmp_path / ".state")

        for name, scale in (("a", "1"), ("b", "2"), ("c", "bad")):
            (tmp_path / name / "m" / "1").mkdir(parents=True)
            (tmp_path / name / "m" / "1" / "model.onnx").write_text(scale)
        control = rig.control
        served = {}
        for generation, name in enumerate(("a", "b"), 1):
            control.commit(await control.prepare(source(name)), {}, generation)
            served[name] = rig.gateway.served("m", "1")
        with pytest.raises(ModelLoadError, match="bad"):
            await control.prepare(source("c"))
        abandoned = await control.prepare(source("a"))
        await control.discard(abandoned)
        assert rig.gateway.served("m", "1") is served["b"]
        for generation, name in enumerate(("a", "b", "a"), 3):
            control.commit(await control.prepare(source(name)), {}, generation)
            assert rig.gateway.served("m", "1") is served[name]
            assert rig.gateway.table.generation == generation
            assert await rig.call() is None
        assert len(rig.runtime.engines) == 2
        assert rig.audited.count(("model.ready", "m:1")) == 5

    run(tmp_path, body)


@dataclass
class Elsewhere:
    """A model on another server, which ``FileRuntime`` takes from the folder ``root``."""

    root: Path

    def scan(self) -> dict[str, ModelPlan]:
        origin = UpstreamOptions("http://127.0.0.1:9")
        return {"m": ModelPlan("m", versions=(VersionPlan("1", self.root / "m.onnx", 1, origin),))}


def test_an_upstream_that_was_down_is_tried_again_until_it_is_there(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        (tmp_path / "m.onnx").write_text("1")
        rig.runtime.unreachable = True
        control = rig.control
        await control.start()
        mending = asyncio.ensure_future(control.mend())
        try:
            rig.runtime.loading.clear()
            assert await asyncio.to_thread(rig.runtime.loading.wait, 20)
            rig.runtime.unreachable = False
            await asyncio.to_thread(eventually, lambda: "m" in rig.gateway.table.models)
        finally:
            mending.cancel()
        assert rig.audited == [("model.refused", "m:1"), ("model.ready", "m:1")]
        assert rig.rows() == {("m", "1"): ("READY", "")}

    run(tmp_path, body, source=Elsewhere(tmp_path))


def test_an_upstream_that_was_down_is_not_tried_again_when_it_was_unloaded(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        (tmp_path / "m.onnx").write_text("1")
        rig.runtime.unreachable = True
        await rig.control.start(("m",))
        await rig.control.unload("m")
        rig.runtime.unreachable = False
        rig.runtime.loading.clear()
        mending = asyncio.ensure_future(rig.control.mend())
        try:
            assert not await asyncio.to_thread(rig.runtime.loading.wait, 1.5)  # the first try comes after a second
        finally:
            mending.cancel()
        await rig.control.load("m", {})
        assert rig.stable("m") == "1"

    run(tmp_path, body, "explicit", source=Elsewhere(tmp_path))


# --- aliases ----------------------------------------------------------------------------------------------------------


class Named:
    """A registry of one model: what its aliases name is wanted, its champion answers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.plans: dict[str, ModelPlan] = {}

    def say(self, refused: str = "", **aliases: str) -> None:
        wanted = sorted(set(aliases.values()) - {refused})
        versions = tuple([VersionPlan(one, self.root / "m" / one / "model.onnx", one) for one in wanted])
        reasons = {refused: "its manifest was changed"} if refused else {}
        self.plans = {
            "m": ModelPlan("m", versions=versions, refused=reasons, stable=aliases["champion"], aliases=aliases)
        }

    def fail(self) -> None:
        self.plans = {"m": ModelPlan("m", error="the registry cannot be read")}

    def scan(self) -> dict[str, ModelPlan]:
        return self.plans


def named(tmp_path: Path, body: Callable[[Rig, Named], Coroutine[Any, Any, None]]) -> None:
    """Versions 1 and 2 can be loaded, 3 cannot."""
    source = Named(tmp_path)

    async def main(rig: Rig) -> None:
        for version, text in (("1", "1"), ("2", "2"), ("3", "bad")):
            rig.put("m", version, text)
        await body(rig, source)

    run(tmp_path, main, source=source)


def leads(rig: Rig) -> dict[str, str]:
    return dict(rig.control.loaded("m").aliases)


async def put_in_force(rig: Rig, source: Named) -> None:
    """As a reload does."""
    async with rig.control.turn:
        rig.control.commit(await rig.control.prepare(source), {}, 1)


def test_a_registry_that_cannot_be_read_makes_no_challenger_champion(tmp_path: Path) -> None:
    async def body(rig: Rig, source: Named) -> None:
        source.say(champion="1", challenger="2")
        await rig.control.start()
        source.fail()
        await rig.control.refresh()
        await put_in_force(rig, source)
        assert (rig.stable("m"), leads(rig)) == ("1", {"champion": "1", "challenger": "2"})
        source.say(champion="2")
        await rig.control.refresh()
        assert (rig.stable("m"), leads(rig)) == ("2", {"champion": "2"})
        assert set(rig.gateway.routes("m").versions) == {"2"}

    named(tmp_path, body)


@pytest.mark.parametrize("refused", ["", "3"])
def test_a_champion_that_cannot_be_had_takes_nobodys_place(tmp_path: Path, refused: str) -> None:
    """Neither when it is looked at nor when the configuration is put in force anew; moved back or on, the rest goes."""

    async def body(rig: Rig, source: Named) -> None:
        source.say(champion="1")
        await rig.control.start()
        source.say(refused, champion="3")
        await rig.control.refresh()
        await put_in_force(rig, source)
        assert (rig.stable("m"), leads(rig)) == ("1", {"champion": "1"})
        assert rig.control.loaded("m").moving == {"champion": "3"}
        source.say(champion="1")
        await rig.control.refresh()
        assert (rig.stable("m"), set(rig.rows())) == ("1", {("m", "1")})
        source.say(champion="2")
        await rig.control.refresh()
        assert (rig.stable("m"), set(rig.gateway.routes("m").versions)) == ("2", {"2"})
        assert not rig.control.loaded("m").moving

    named(tmp_path, body)


def test_an_alias_stays_where_a_configuration_has_led_it(tmp_path: Path) -> None:
    """Not where it led at the last look at the source, which was before that."""

    async def body(rig: Rig, source: Named) -> None:
        source.say(champion="1", challenger="2", shadow="3")
        await rig.control.start()
        for aliases in ({"champion": "2", "previous": "1", "shadow": "3"}, {"champion": "3", "previous": "1"}):
            source.say(**aliases)
            await put_in_force(rig, source)
        assert leads(rig) == {"champion": "2", "previous": "1"}

    named(tmp_path, body)


def test_a_refusal_is_told_once_until_it_changes(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.put("m", "1", "1")
        (rig.root / "empty").mkdir()
        (rig.root / "no name").mkdir()
        config = rig.root / "m" / "config.pbtxt"
        with structlog.testing.capture_logs() as logs:
            await rig.control.start()

            async def look() -> list[tuple[str, str]]:
                logs.clear()
                for _ in range(2):
                    await rig.control.refresh()
                told = ("model_refused", "entry_ignored")
                return [(line["event"], line.get("model", line.get("entry"))) for line in logs if line["event"] in told]

            assert await look() == []
            for wrong in ("max_batch_size: x", "nonsense: 1 }"):
                config.write_text(wrong)
                assert await look() == [("model_refused", "m")]
            config.unlink()
            assert await look() == []
            config.write_text(wrong)
            assert await look() == [("model_refused", "m")]
            for folder in ("empty", "no name"):
                (rig.root / folder).rmdir()
            assert await look() == []
            for folder in ("empty", "no name"):
                (rig.root / folder).mkdir()
            assert sorted(await look()) == [("entry_ignored", "no name"), ("model_refused", "empty")]
            (rig.root / "no name").rmdir()
            (rig.root / "no name").symlink_to("/")
            assert await look() == [("entry_ignored", "no name")]  # for another reason

    run(tmp_path, body)
