"""server.gates.keeper and versions: registry and files, results that are kept, what is recorded, being called off."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from router.rollout.quality import Status
from server.audit import AuditEvent
from server.config.gates import GatePolicy
from server.config.kinds import Context
from server.errors import ModelLoadError, TidegateError, VersionNotFound
from server.gates.keeper import Found, Gatekeeper, event_of
from server.gates.versions import FileVersions, RegistryVersions
from server.runtime.base import Engine, LoadRequest, ModelOptions
from server.runtime.fake import FakeRuntime, Script
from server.runtime.onnx import OnnxRuntime
from server.state import State, open_state
from tests.support import gate_models


class CountedRuntime(OnnxRuntime):
    """A runtime that knows what it has loaded."""

    def __init__(self) -> None:
        super().__init__(measure_budget_s=0)
        self.loaded: list[str] = []

    def load(self, request: LoadRequest) -> Any:
        self.loaded.append(request.version)
        return super().load(request)


@pytest.fixture
def state(tmp_path: Path, made: Path) -> Iterator[State]:
    """``loans``: 1 is good and champion, 2 is worse and challenger, 3 the good one again."""
    found = open_state(tmp_path / "state")
    for name, alias in (("good", "champion"), ("worse", "challenger"), ("again", None)):
        found.registry.publish("loans", {"model.onnx": made / f"{name}.onnx"}, alias=alias, actor="test")
    yield found
    found.close()


def policy(folder: Path, **asked: Any) -> GatePolicy:
    holdout = {"path": "holdout.csv", "label": "label"}
    return GatePolicy.model_validate({"holdout": holdout, **asked}, context=Context(folder))


def test_a_version_of_the_registry_beside_its_champion(state: State, made: Path) -> None:
    runtime = CountedRuntime()
    keeper = Gatekeeper({"loans": policy(made)}, RegistryVersions(state.registry), runtime, state.audit.record)
    outcome = keeper.evaluate("loans", "@challenger")
    assert (outcome.status, outcome.version, outcome.against) == (Status.FAILED, "2", "1")
    assert outcome.candidate == state.registry.version("loans", 2).digest
    assert outcome.reason.startswith("quality: at least ")
    row = state.audit.tail(1)[0].event
    assert (row.action, row.subject, row.actor) == ("gate.failed", "loans:2", "tidegate")
    assert row.detail == outcome.to_json()
    assert keeper.evaluate("loans", "3", "2").status is Status.PASSED
    assert runtime.loaded == ["2", "1", "3", "2"]
    keeper.close()


def test_what_was_found_is_kept_by_digests(state: State, made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "holdout.csv", tmp_path / "holdout.csv")
    runtime, events = CountedRuntime(), list[AuditEvent]()
    keeper = Gatekeeper({"loans": policy(tmp_path)}, RegistryVersions(state.registry), runtime, events.append)
    first, again = keeper.evaluate("loans", "2"), keeper.evaluate("loans", "@challenger")
    assert (again, len(runtime.loaded), len(events)) == (first, 2, 2)
    keeper.replace_policies({"loans": policy(tmp_path, seed=1)})
    keeper.evaluate("loans", "2")
    assert len(runtime.loaded) == 4
    gate_models.write_holdout(tmp_path / "holdout.csv", seed=5)
    keeper.evaluate("loans", "2")
    assert len(runtime.loaded) == 6
    keeper.close()


def test_without_policy_data_or_version_nothing_is_decided(state: State, made: Path, tmp_path: Path) -> None:
    versions = RegistryVersions(state.registry)
    keeper = Gatekeeper({}, versions, CountedRuntime())
    assert not keeper.covers("loans")
    assert keeper.evaluate("loans", "2").reason == "policy: not decidable: there is no gate policy for this model"
    keeper.replace_policies({"loans": policy(tmp_path)})
    assert "holdout holdout.csv cannot be read: No such file" in keeper.evaluate("loans", "2").reason
    pinned = GatePolicy.model_validate(
        {"holdout": {"path": "holdout.csv", "label": "label", "sha256": "0" * 64}}, context=Context(made)
    )
    keeper.replace_policies({"loans": pinned})
    outcome = keeper.evaluate("loans", "2")
    assert (outcome.status, "the policy wants 0000" in outcome.reason) == (Status.UNDECIDED, True)
    keeper.replace_policies({"loans": policy(made)})
    outcome = keeper.evaluate("loans", "9")
    assert (outcome.status, "no version 9" in outcome.reason) == (Status.UNDECIDED, True)
    alone = keeper.evaluate("loans", "2", "@shadow")
    assert (alone.status, alone.champion) == (Status.UNDECIDED, "")
    assert "no version @shadow" in alone.reason
    keeper.close()


def test_a_candidate_that_cannot_be_loaded_fails_and_a_champion_is_then_none(made: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    files = FileVersions({"good": made / "good.onnx", "broken": tmp_path / "broken.onnx", "lost": tmp_path / "x.onnx"})
    keeper = Gatekeeper({"m": policy(made)}, files, CountedRuntime())
    assert keeper.evaluate("m", "broken", "good").status is Status.FAILED
    other = keeper.evaluate("m", "good", "broken")
    assert (other.status, other.findings[-1].gate) == (Status.UNDECIDED, "quality")
    assert keeper.evaluate("m", "good", "good").status is Status.PASSED
    with pytest.raises(VersionNotFound):
        files.find("m", "nobody")
    with pytest.raises(ModelLoadError):
        files.find("m", "lost")
    keeper.close()


def test_an_audit_that_fails_changes_nothing(made: Path) -> None:
    def refuse(_: AuditEvent) -> None:
        raise TidegateError("the disk is full")

    files = FileVersions({"good": made / "good.onnx"})
    keeper = Gatekeeper({"m": policy(made)}, files, CountedRuntime(), refuse)
    assert keeper.evaluate("m", "good", "good").status is Status.PASSED
    keeper.close()


class FakeVersions:
    def find(self, model: str, reference: str) -> Found:
        return Found(reference, f"digest of {reference}", LoadRequest(model, "1", Path("m.onnx"), ModelOptions()))


def test_stopping_calls_off_what_is_going_on(tmp_path: Path) -> None:
    """The candidate's first run waits for the test; the keeper is stopped meanwhile."""
    running, go_on = threading.Event(), threading.Event()

    def wait(_: int) -> None:
        running.set()
        assert go_on.wait(20)

    (tmp_path / "holdout.csv").write_text("a,label\n" + "1,3\n" * 200)
    asked = policy(tmp_path, task="regression")
    runtime = FakeRuntime(Script(width=1, before_run=wait))
    keeper = Gatekeeper({"m": asked}, FakeVersions(), runtime)

    async def check() -> Any:
        evaluation = asyncio.create_task(keeper.check("m", "new", "old"))
        await asyncio.to_thread(running.wait, 20)
        keeper.stop()
        go_on.set()
        return await evaluation

    outcome = asyncio.run(check())
    keeper.close()
    assert (outcome.status, outcome.findings[-1].reason) == (Status.UNDECIDED, "not decidable: it was called off")
    assert all(engine.closed for engine in runtime.engines)


def test_memory_that_is_not_there_asks(tmp_path: Path) -> None:
    class Full(FakeRuntime):
        def load(self, request: LoadRequest) -> Any:
            raise MemoryError

    (tmp_path / "holdout.csv").write_text("a,label\n" + "1,3\n" * 200)
    keeper = Gatekeeper({"m": policy(tmp_path, task="regression")}, FakeVersions(), Full())
    outcome = keeper.evaluate("m", "new", "old")
    assert outcome.reason == "load: not decidable: there is no memory for both models"
    event = event_of(outcome, "me@here")
    assert (event.action, event.subject, event.actor) == ("gate.undecided", "m:new", "me@here")
    keeper.close()


def test_the_signature_that_was_published_is_asked_of_the_model(tmp_path: Path, made: Path) -> None:
    from router.registry.manifest import Description, Signature, TensorEntry

    wrong = Signature((TensorEntry("other", "FP32", (-1, 4)),), ())
    state = open_state(tmp_path / "state")
    state.registry.publish("m", {"model.onnx": made / "good.onnx"}, Description(signature=wrong), actor="t")
    found = RegistryVersions(state.registry).find("m", "1")
    assert found.declared is not None
    assert found.declared.inputs[0].name == "other"
    keeper = Gatekeeper({"m": policy(made)}, RegistryVersions(state.registry), CountedRuntime())
    outcome = keeper.evaluate("m", "1")
    assert (outcome.findings[0].gate, outcome.findings[0].status) == ("admission", Status.FAILED)
    keeper.close()
    state.close()


def test_engines_are_closed(made: Path, tmp_path: Path) -> None:
    (tmp_path / "holdout.csv").write_text("a,label\n" + "1,3\n" * 200)
    runtime = FakeRuntime(Script(width=1))
    keeper = Gatekeeper({"m": policy(tmp_path, task="regression")}, FakeVersions(), runtime)
    assert keeper.evaluate("m", "new", "old").status is Status.PASSED
    engines: list[Engine] = [*runtime.engines]
    assert len(engines) == 2
    assert all(engine.closed for engine in runtime.engines)
    keeper.close()
