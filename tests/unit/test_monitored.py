"""Which profile a version is watched under, and what its batches are counted as."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from monitor.types import Settings, rows_window
from router.table import RoutingTable
from router.types import Arm, Destination, ModelRoutes, RolloutSplit
from server.config.monitoring import Monitoring, MonitorSpec
from server.control.monitored import PROFILE_FILENAME, Arms, MonitoredSource
from server.control.sources import DirectorySource, ModelPlan
from server.errors import ModelLoadError
from server.monitoring.service import Mirror
from server.monitoring.watch import WatchedRequest


def repository(root: Path) -> Path:
    """Versions 1 and 2 of ``m``; the second brings a profile."""
    for version in "12":
        folder = root / "m" / version
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_text(version)
    (root / "m" / "2" / PROFILE_FILENAME).write_text("profile")
    (root / "m" / "config.pbtxt").write_text("version_policy: { all {} }")
    return root


def plan_of(root: Path, spec: MonitorSpec) -> ModelPlan:
    source = MonitoredSource(DirectorySource(root, root / ".state"), Monitoring(models={"m": spec}))
    return source.scan()["m"]


def watches(plan: ModelPlan) -> dict[str, Path | None]:
    requests = {version.version: plan.load_request(version) for version in plan.versions}
    return {
        version: request.watch.profile if isinstance(request, WatchedRequest) and request.watch is not None else None
        for version, request in requests.items()
    }


def test_a_profile_in_the_version_folder_is_found_by_itself(tmp_path: Path) -> None:
    root = repository(tmp_path)
    beside = root / "m" / "2" / PROFILE_FILENAME
    assert watches(plan_of(root, MonitorSpec())) == {"1": None, "2": beside}
    assert watches(plan_of(root, MonitorSpec(enabled=False))) == {"1": None, "2": None}


def test_what_the_file_names_goes_first(tmp_path: Path) -> None:
    root = repository(tmp_path)
    named, other = tmp_path / "named.tgp", tmp_path / "other.tgp"
    assert watches(plan_of(root, MonitorSpec(profile=named))) == {"1": named, "2": named}
    assert watches(plan_of(root, MonitorSpec(profile=named, profiles={"1": other}))) == {"1": other, "2": named}


def test_a_profile_that_is_asked_for_must_be_there(tmp_path: Path) -> None:
    plan = plan_of(repository(tmp_path), MonitorSpec(profile="registry"))
    first, second = plan.versions
    with pytest.raises(ModelLoadError, match="brings no drift profile"):
        plan.load_request(first)
    assert isinstance(plan.load_request(second), WatchedRequest)


def test_a_fingerprint_changes_with_how_a_version_is_watched_and_no_other(tmp_path: Path) -> None:
    root = repository(tmp_path)

    def fingerprints(spec: MonitorSpec) -> list[object]:
        return [version.fingerprint for version in plan_of(root, spec).versions]

    plain, again = fingerprints(MonitorSpec()), fingerprints(MonitorSpec())
    assert plain == again
    settings = Settings(windows=(rows_window(500),))
    other = fingerprints(MonitorSpec(settings=settings))
    assert (plain[0] == other[0], plain[1] == other[1]) == (True, False)
    (root / "m" / "2" / PROFILE_FILENAME).write_text("another profile")
    assert fingerprints(MonitorSpec())[1] != plain[1]


class Serving:
    """A version as the table has it: only its batcher matters here."""

    def __init__(self, taps: tuple[str, ...] | None) -> None:
        self.batcher = SimpleNamespace(taps=taps, arm="stable")


class Following:
    def __init__(self) -> None:
        self.serving: list[Any] = []
        self.mirrors: list[Mirror] = []

    def follow(self, serving: list[Any], mirrors: list[Mirror]) -> None:
        self.serving, self.mirrors = serving, mirrors


def follow(models: dict[str, ModelRoutes[Any]]) -> Following:
    following = Following()
    table: RoutingTable[Any] = RoutingTable(models, 1)
    Arms(SimpleNamespace(table=table), following).follow()  # type: ignore[arg-type]
    return following


def test_a_version_is_counted_as_its_part_in_the_table() -> None:
    versions = {number: Serving((f"tap{number}",)) for number in "123"}
    split = RolloutSplit("r", (Arm("candidate", Destination("m", "2", versions["2"]), 1000),))
    following = follow({"m": ModelRoutes(versions, "1", split=split)})
    assert {number: served.batcher.arm for number, served in versions.items()} == {
        "1": "stable",
        "2": "candidate",
        "3": "pinned",
    }
    assert following.mirrors == [Mirror("m", "2", "1", "candidate")]
    assert sorted(following.serving) == [("tap1",), ("tap2",), ("tap3",)]


def test_promotion_makes_a_candidate_stable() -> None:
    versions = {number: Serving((f"tap{number}",)) for number in "12"}
    split = RolloutSplit("r", (Arm("candidate", Destination("m", "2", versions["2"]), 1000),))
    follow({"m": ModelRoutes(versions, "1", split=split)})
    assert follow({"m": ModelRoutes(versions, "2")}).mirrors == []
    assert (versions["1"].batcher.arm, versions["2"].batcher.arm) == ("pinned", "stable")


def test_a_model_s_own_name_says_more_than_another_that_leads_to_it() -> None:
    versions = {number: Serving(None) for number in "12"}
    following = follow({"also": ModelRoutes(versions, "2", model="m"), "m": ModelRoutes(versions, "1")})
    assert (versions["1"].batcher.arm, versions["2"].batcher.arm) == ("stable", "pinned")
    assert following.serving == []


def test_an_arm_of_another_model_is_not_mirrored() -> None:
    own, other = Serving(("a",)), Serving(("b",))
    split = RolloutSplit("r", (Arm("candidate", Destination("n", "1", other), 1000),))
    following = follow({"m": ModelRoutes({"1": own}, "1", split=split), "n": ModelRoutes({"1": other}, "1")})
    assert following.mirrors == []
    assert other.batcher.arm in {"stable", "candidate"}
