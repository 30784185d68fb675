"""server.control.quality: a verdict becomes an admission, and versions are loaded as plans say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from server.audit import AuditEvent
from server.batching.batcher import Batcher
from server.config.gates import GatePolicy
from server.config.kinds import Context
from server.control.quality import LoadedVersions, QualityGates
from server.control.registry import RegistryPlans
from server.control.rollouts.actions import Admission
from server.control.sources import ModelPlan, VersionPlan
from server.errors import ModelLoadError, ModelNotFound, TidegateError, VersionNotFound
from server.gates.keeper import Gatekeeper
from server.gateway import Served
from server.runtime.base import LoadRequest, ModelOptions
from server.runtime.onnx import OnnxRuntime
from server.runtime.upstream_options import UpstreamOptions
from server.state import State, open_state
from server.telemetry.instruments import Telemetry
from tests.support import models


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    """``m``: 1 is champion, 2 the same but for a bit, 3 is off."""
    found = open_state(tmp_path / "state")
    for shift, alias in ((0.0, "champion"), (1e-6, "challenger"), (3.0, "shadow")):
        path = models.affine(tmp_path / f"{shift}.onnx", 1.0, shift, width=1)
        found.registry.publish("m", {"model.onnx": path}, alias=alias, actor="test")
    x, noise = np.random.default_rng(3).normal(size=(2, 1000))
    np.savetxt(tmp_path / "holdout.csv", np.c_[x, x + noise], delimiter=",", header="x,truth", comments="")
    yield found
    found.close()


def policy(folder: Path, label: str = "truth") -> GatePolicy:
    holdout = {"path": "holdout.csv", "label": label, "columns": ["x"]}
    return GatePolicy.model_validate({"task": "regression", "holdout": holdout}, context=Context(folder))


def nobody(model: str, version: str) -> Served:
    raise ModelNotFound(f"{model} {version}")


def versions(state: State, folder: Path) -> LoadedVersions:
    plans = RegistryPlans(state.registry, folder / "state", lambda *_: None)
    plan = plans.by_alias("m", "m", ModelOptions())
    return LoadedVersions(lambda _: plan, nobody)


def asked(state: State, folder: Path, candidate: str, stable: str, **policies: GatePolicy) -> Admission:
    told: list[AuditEvent] = []
    keeper = Gatekeeper(policies, versions(state, folder), OnnxRuntime(measure_budget_s=0), told.append)
    try:
        found = asyncio.run(QualityGates(keeper)("m", candidate, stable))
    finally:
        keeper.close()
    assert len(told) == len(policies)
    return found


def test_the_policy_decides_beside_stable(state: State, tmp_path: Path) -> None:
    good = asked(state, tmp_path, "2", "1", m=policy(tmp_path))
    assert (good.status, good.reason) == ("passed", "")
    assert {finding["gate"] for finding in good.evidence} >= {"admission", "quality"}
    bad = asked(state, tmp_path, "3", "1", m=policy(tmp_path))
    assert bad.status == "failed"
    assert bad.reason.startswith("quality:")
    assert asked(state, tmp_path, "1", "3", m=policy(tmp_path)).status == "passed"


def test_what_cannot_be_decided_asks(state: State, tmp_path: Path) -> None:
    for candidate, stable, label in (("2", "1", "nobody"), ("2", "9", "truth"), ("9", "1", "truth")):
        found = asked(state, tmp_path, candidate, stable, m=policy(tmp_path, label))
        assert found.status == "undecidable", found
        assert found.reason


def test_without_a_policy_everything_passes(state: State, tmp_path: Path) -> None:
    assert asked(state, tmp_path, "3", "1") == Admission()


def test_versions_of_the_registry_have_their_digest_and_their_files(state: State, tmp_path: Path) -> None:
    found = versions(state, tmp_path).find("m", "2")
    published = state.registry.version("m", 2)
    assert (found.name, found.digest) == ("2", published.digest)
    assert found.request.path.is_file()
    assert list(found.request.listed or {}) == ["model.onnx"]
    with pytest.raises(VersionNotFound, match="m has no version 9"):
        versions(state, tmp_path).find("m", "9")


def test_a_file_has_the_digest_that_it_was_loaded_with_and_an_upstream_none(tmp_path: Path) -> None:
    path = models.affine(tmp_path / "f.onnx")
    engine = OnnxRuntime(measure_budget_s=0).load(LoadRequest("m", "1", path, ModelOptions()))
    served = served_of(engine)
    upstream = UpstreamOptions("http://127.0.0.1:1")

    def request(version: VersionPlan) -> LoadRequest:
        other = upstream if version.version == "2" else None
        return LoadRequest("m", version.version, version.path, ModelOptions(), upstream=other)

    plan = ModelPlan("m", versions=(VersionPlan("1", path, ""), VersionPlan("2", Path(), "")), request=request)
    found = LoadedVersions(lambda _: plan, lambda *_: served)
    assert found.find("m", "1").digest == engine.spec.digest != ""
    assert found.find("m", "1").declared is None
    with pytest.raises(ModelLoadError, match="another server's"):
        found.find("m", "2")
    with pytest.raises(TidegateError):
        LoadedVersions(lambda _: plan, nobody).find("m", "1")
    engine.close()


def served_of(engine: object) -> Served:
    telemetry = Telemetry.create("test")

    async def made() -> Served:
        loop = asyncio.get_running_loop()
        batcher = Batcher(
            engine, ModelOptions().batching, clock=lambda: 0, call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe, call_later=loop.call_later,
        )  # fmt: skip
        return Served(engine.spec, batcher, ModelOptions(), telemetry.model("m", "1"), telemetry.instruments)  # type: ignore[attr-defined]

    return asyncio.run(made())
