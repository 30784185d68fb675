"""Threads that follow an MLflow, from end to end over HTTP: alias to followed, hint to poll, outage to return."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from router.registry.origin import Unreachable
from server.audit import AuditLog
from server.mlflow.build import MlflowPart, open_mlflow
from server.mlflow.options import MlflowOptions
from tests.contracts.registry_contract import Case, Files, RegistryContract
from tests.support.mlflow_server import MLMODEL, Asked, Mlflow, Reply, running
from tests.support.pinned_store import pinned_store
from tests.support.rights import permissions_hold

V1, V2 = ({"model.onnx": b"graph" + bytes([seed]), "weights": bytes(2000)} for seed in (1, 2))


class Place:
    def __init__(self, root: Path, mlflow: Mlflow, **options: Any) -> None:
        self.mlflow, self.store = mlflow, pinned_store(root)
        given = {"poll_s": 3600.0, "timeout_s": 5.0, **options}
        self.part: MlflowPart = open_mlflow(
            MlflowOptions(mlflow.url, **given), root / "state", self.store, AuditLog(self.store).journal
        )
        self.registry, self.follower = self.part.registry, self.part.follower

    def champion(self) -> int | None:
        return self.registry.aliases("m").get("champion")

    def close(self) -> None:
        self.follower.close()
        self.store.close()


@pytest.fixture
def mlflow() -> Iterator[Mlflow]:
    with running() as server:
        yield server


@pytest.fixture
def place(mlflow: Mlflow, tmp_path: Path) -> Iterator[Place]:
    mlflow.add("m", V1)
    mlflow.add("m", V2)
    mlflow.point("m", "champion", 1)
    found = Place(tmp_path, mlflow)
    yield found
    found.close()


def eventually(check: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until
        time.sleep(0.01)


class TestContract(RegistryContract):
    @pytest.fixture(autouse=True)
    def server(self, mlflow: Mlflow) -> Iterator[None]:
        self.mlflow = mlflow
        self.places: list[Place] = []
        yield
        for place in self.places:
            place.close()

    def case(self, folder: Path) -> Case:
        place = Place(folder, self.mlflow)
        self.places.append(place)

        def add(model: str, files: Files) -> int:
            version = self.mlflow.add(model, files)
            place.registry.poll()
            return version

        return Case(place.registry, add)


def test_the_start_follows_what_is_there(place: Place) -> None:
    place.follower.start()
    assert place.champion() == 1
    assert (place.registry.fetch("m", 1).folder / "weights").read_bytes() == V1["weights"]


def test_a_hint_wakes_the_poll(place: Place) -> None:
    place.follower.start()
    place.mlflow.point("m", "champion", 2)
    place.follower.hint()
    eventually(lambda: place.champion() == 2)


def test_hints_do_not_drive_the_poll(place: Place) -> None:
    place.follower.start()
    polls, began = place.mlflow.count("/search"), time.monotonic()
    while time.monotonic() < began + 1.5:
        place.follower.hint()
    eventually(lambda: place.mlflow.count("/search") > polls)
    assert place.mlflow.count("/search") - polls <= 2 + (time.monotonic() - began)  # one a second


def test_an_outage_ends_by_itself(mlflow: Mlflow, tmp_path: Path) -> None:
    mlflow.add("m", V1)
    mlflow.point("m", "champion", 1)
    mlflow.trouble = lambda _: (503, b"")
    place = Place(tmp_path, mlflow, poll_s=0.05)
    try:
        place.follower.start()
        assert place.registry.models() == ()
        assert "503" in place.registry.standing().error
        mlflow.trouble = lambda _: None
        eventually(lambda: place.registry.models() == ("m",) and place.champion() == 1)
        assert place.registry.standing().reachable
    finally:
        place.close()


def test_a_folder_that_cannot_be_read_holds_up_its_own_model_only(mlflow: Mlflow, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "deep").mkdir(parents=True)
    for name, content in {**V1, "MLmodel": MLMODEL, "deep/notes": b"n"}.items():
        (shared / name).write_bytes(content)
    for model in ("a", "b"):
        mlflow.point(model, "champion", mlflow.add(model, V1))
    mlflow.places["a", 1] = f"file://{shared}"  # looked at before b
    (shared / "deep").chmod(0o444)
    with closing(Place(tmp_path, mlflow, artifact_folders=(shared.parent,))) as place:
        with permissions_hold():
            place.registry.poll()
            settled = {step.model: step.error for step in place.registry.settle()}
        (shared / "deep").chmod(0o755)
        assert isinstance(settled["a"], Unreachable)
        assert settled["b"] is None
        assert [place.registry.aliases(model) for model in ("a", "b")] == [{}, {"champion": 1}]


def test_the_poll_goes_on_while_a_version_is_downloaded(place: Place) -> None:
    place.follower.start()
    downloading, end = threading.Event(), threading.Event()

    def slow(asked: Asked) -> Reply | None:
        if asked.path.endswith("m-m-2/artifacts/weights"):
            downloading.set()
            end.wait(20)
        return None

    place.mlflow.trouble = slow
    place.mlflow.point("m", "champion", 2)
    place.follower.hint()
    assert downloading.wait(10)
    place.mlflow.point("m", "champion", 1)
    place.follower.hint()
    eventually(lambda: dict(place.registry.intended("m")) == {"champion": 1})
    assert place.champion() == 1
    end.set()


def test_closing_twice_and_without_a_start_is_fine(place: Place) -> None:
    place.follower.close()
    place.follower.close()
