"""The origin over REST: what it makes of MLflow's answers, right ones and hostile ones."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from router.registry.base import NotInRegistry
from router.registry.manifest import MODEL, CodeSource, Metric, Signature, TensorEntry
from router.registry.origin import Intent, OfferedFile, Unreachable, Unusable
from server.mlflow.client import MlflowOrigin
from server.mlflow.options import MlflowOptions
from tests.support.mlflow_server import MLMODEL, Asked, Mlflow, Reply, running

FILES = {"model.onnx": b"graph", "weights": bytes(1000), "labels.txt": b"a\nb"}
TENSORS = (TensorEntry("x", "FP32", (-1, 4)),), (TensorEntry("y", "FP32", (-1, 4)),)


@pytest.fixture
def mlflow() -> Iterator[Mlflow]:
    with running() as server:
        yield server


def origin(mlflow: Mlflow, **options: Any) -> MlflowOrigin:
    return MlflowOrigin(MlflowOptions(mlflow.url, **{"timeout_s": 5.0, **options}))


def on(path: str, reply: Reply | Callable[[Asked], Reply]) -> Callable[[Asked], Reply | None]:
    def trouble(asked: Asked) -> Reply | None:
        if not asked.path.endswith(path):
            return None
        return reply(asked) if callable(reply) else reply

    return trouble


def read(client: MlflowOrigin, file: OfferedFile, target: Path, limit: int = 10_000) -> bytes:
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT)
    try:
        client.read(file, descriptor, limit)
    finally:
        os.close(descriptor)
    return target.read_bytes()


def test_intents_of_all_models_and_of_those_named(mlflow: Mlflow) -> None:
    for model in ("a", "b", "not ours"):
        mlflow.add(model, FILES)
    mlflow.add("a", FILES)
    mlflow.point("a", "champion", 1)
    mlflow.point("a", "Upper", 2)
    wanted = {"a": Intent({"champion": 1}, 2), "b": Intent({}, 1)}
    assert origin(mlflow).intents() == wanted
    assert origin(mlflow, models=("a", "gone")).intents() == {"a": wanted["a"]}


def test_pages_are_followed_and_bounded(mlflow: Mlflow) -> None:
    def page(asked: Asked) -> Reply:
        number = int(asked.query.get("page_token", "0"))
        model = {"name": f"m{number}"}
        return 200, {"registered_models": [model], **({"next_page_token": str(number + 1)} if number < last else {})}

    last = 2
    mlflow.trouble = on("/registered-models/search", page)
    assert sorted(origin(mlflow).intents()) == ["m0", "m1", "m2"]
    last = 10**6
    with pytest.raises(Unusable, match="name the models to follow"):
        origin(mlflow).intents()


def test_an_offer_has_the_files_and_where_they_come_from(mlflow: Mlflow) -> None:
    mlflow.tags = {"trigger_id": "t-1"}
    mlflow.add("m", {**FILES, "code/train.py": b"", "deep/er/notes": b"n", ".hidden": b""})
    offer = origin(mlflow).offer("m", 1)
    assert {file.path: (file.size, file.role) for file in offer.files} == {
        "model.onnx": (5, MODEL),
        "weights": (1000, "data"),
        "labels.txt": (3, "labels"),
        "deep/er/notes": (1, "data"),
    }
    found = offer.description
    assert found.signature == Signature(*TENSORS)
    assert found.params == {"depth": "10"}
    assert found.metrics == (Metric("holdout", "auc", 0.91),)
    assert (found.lineage.parent_run, found.lineage.trigger_id) == ("run-7", "t-1")
    assert found.lineage.code == CodeSource(commit="c0ffee")
    assert found.lineage.data.uri == "mlflow-dataset:flights#ab12"
    assert offer.created == "2023-11-14T22:13:20.000Z"


def test_what_is_not_there_is_named(mlflow: Mlflow) -> None:
    mlflow.add("m", FILES)
    with pytest.raises(NotInRegistry, match="'m' has no version 2"):
        origin(mlflow).offer("m", 2)
    with pytest.raises(NotInRegistry, match="nobody"):
        origin(mlflow).versions("nobody")
    with pytest.raises(NotInRegistry):
        origin(mlflow).versions("x' OR name='m")


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://bucket/x", r"lie at s3://\.\.\., .*--artifacts-destination"),
        ("file:///etc", r"lie in '/etc' on a disk, .* registry\.mlflow\.artifact_folders"),
        ("file://elsewhere/etc", "lie at file://"),
        ("/etc", "registry.mlflow.artifact_folders"),
        ("mlruns/0", "a relative path"),
        ("mlflow-artifacts://evil.example/x", "only those are taken"),
        ("mlflow-artifacts:/a/../../b", "leads elsewhere"),
        ("mlflow-artifacts:/", "leads elsewhere"),
        ("mlflow-artifacts://[", "cannot be read"),
    ],
)
def test_artifacts_elsewhere_are_refused(mlflow: Mlflow, uri: str, reason: str) -> None:
    mlflow.add("m", FILES)
    mlflow.trouble = on("/get-download-uri", (200, {"artifact_uri": uri}))
    with pytest.raises(Unusable, match=reason):
        origin(mlflow).offer("m", 1)


@pytest.mark.parametrize("name", ["..", "../x", "/etc/passwd", "a/b", "a\\b", "", "."])
def test_listings_that_lead_elsewhere_are_refused(mlflow: Mlflow, name: str) -> None:
    mlflow.add("m", FILES)
    mlflow.trouble = on("/mlflow-artifacts/artifacts", (200, {"files": [{"path": name, "file_size": 1}]}))
    with pytest.raises(Unusable, match="leads elsewhere"):
        origin(mlflow).offer("m", 1)


def test_a_listing_without_end_is_refused(mlflow: Mlflow) -> None:
    mlflow.add("m", FILES)
    mlflow.trouble = on("/mlflow-artifacts/artifacts", (200, {"files": [{"path": "d", "is_dir": True}]}))
    with pytest.raises(Unusable, match="more than 8 levels"):
        origin(mlflow).offer("m", 1)


def test_redirects_are_not_followed_and_the_token_stays_here(mlflow: Mlflow) -> None:
    with running() as other:
        mlflow.add("m", FILES)
        raw = f"HTTP/1.1 302 Found\r\nLocation: {other.url}/\r\nContent-Length: 0\r\n\r\n".encode()
        mlflow.trouble = lambda _: (0, raw)
        with pytest.raises(Unreachable, match="302: redirects are not followed"):
            origin(mlflow, token="secret").intents()
        assert other.asked == []
    assert [asked.headers["authorization"] for asked in mlflow.asked] == ["Bearer secret"]


def test_user_and_password_are_sent(mlflow: Mlflow) -> None:
    origin(mlflow, user="u", password="p").intents()
    assert mlflow.asked[0].headers["authorization"] == "Basic dTpw"


@pytest.mark.parametrize(
    "reply",
    [
        (500, b"boom"),
        (503, {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "later"}),
        (401, b"who?"),
        (404, b"<html>some proxy's</html>"),
        (0, b"not HTTP at all\r\n\r\n"),
        (0, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
        (0, b""),
    ],
)
def test_answers_that_say_nothing_are_an_outage(mlflow: Mlflow, reply: Reply) -> None:
    mlflow.trouble = lambda _: reply
    for options in ({}, {"models": ("m",)}):
        with pytest.raises(Unreachable) as raised:
            origin(mlflow, token="secret", **options).intents()
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "document",
    [
        b"[]",
        b"{",
        {"registered_models": {}},
        {"registered_models": [1]},
        {"registered_models": [{"name": 1}]},
        {"registered_models": [{"name": "m", "aliases": [{"alias": "champion", "version": "x"}]}]},
        {"registered_models": [{"name": "m", "aliases": [{"alias": "champion", "version": "0"}]}]},
        {"registered_models": [{"name": "m", "latest_versions": [{"version": None}]}]},
        b"[" * 100_000,
    ],
)
def test_answers_without_sense_are_refused(mlflow: Mlflow, document: Any) -> None:
    mlflow.trouble = lambda _: (200, document)
    with pytest.raises(Unusable):
        origin(mlflow).intents()


def test_an_answer_without_end_is_cut_off(mlflow: Mlflow) -> None:
    mlflow.trouble = lambda _: (0, b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n{")
    with pytest.raises(Unusable, match="more than the"):
        origin(mlflow).intents()


def test_silence_is_an_outage(mlflow: Mlflow) -> None:
    end = threading.Event()

    def hang(_: Asked) -> Reply:
        end.wait(20)
        return 200, {}

    mlflow.trouble = hang
    try:
        with pytest.raises(Unreachable, match=r"within 0\.2 s"):
            origin(mlflow, timeout_s=0.2).intents()
    finally:
        end.set()


def test_nobody_there_is_an_outage() -> None:
    with pytest.raises(Unreachable, match="cannot be reached"):
        MlflowOrigin(MlflowOptions("http://127.0.0.1:1")).intents()


def test_a_transfer_that_breaks_off_is_begun_again(mlflow: Mlflow, tmp_path: Path) -> None:
    mlflow.add("m", FILES)
    client = origin(mlflow)
    file = next(file for file in client.offer("m", 1).files if file.path == "weights")
    left = iter([(0, b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nxxxxx"), (500, b"")])
    mlflow.trouble = lambda asked: next(left, None) if asked.path.endswith("weights") else None
    assert read(client, file, tmp_path / "f") == FILES["weights"]
    assert mlflow.count("/weights") == 3
    mlflow.trouble = on("/weights", (0, b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nxxxxx"))
    with pytest.raises(Unreachable, match="broke off after 5 bytes"):
        read(client, file, tmp_path / "f")


@pytest.mark.parametrize("head", ["Content-Length: 2000", "Connection: close"])
def test_downloads_are_bounded(mlflow: Mlflow, tmp_path: Path, head: str) -> None:
    mlflow.trouble = lambda _: (0, f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + bytes(2000))
    with pytest.raises(Unusable, match="more than the 1999 bytes"):
        read(origin(mlflow), OfferedFile("f", "0/f"), tmp_path / "f", 1999)
    assert read(origin(mlflow), OfferedFile("f", "0/f"), tmp_path / "f", 2000) == bytes(2000)


def test_a_file_that_went_is_named(mlflow: Mlflow, tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="has no 0/f"):
        read(origin(mlflow), OfferedFile("f", "0/f"), tmp_path / "f")


def test_aliases_are_written(mlflow: Mlflow) -> None:
    mlflow.add("m", FILES)
    client = origin(mlflow)
    client.set_alias("m", "champion", 1)
    assert client.aliases("m") == {"champion": 1}
    client.drop_alias("m", "champion")
    assert client.aliases("m") == {}
    with pytest.raises(Unusable, match="m@champion was not moved: MLflow answered 404"):
        client.set_alias("m", "champion", 9)
    assert json.loads(mlflow.asked[0].body) == {"name": "m", "alias": "champion", "version": "1"}


def test_a_version_that_is_still_written_waits(mlflow: Mlflow) -> None:
    mlflow.add("m", FILES)
    mlflow.trouble = on("/model-versions/get", (200, {"model_version": {"status": "PENDING_REGISTRATION"}}))
    with pytest.raises(Unreachable, match="PENDING_REGISTRATION"):
        origin(mlflow).offer("m", 1)


def test_a_model_of_another_flavor_is_refused(mlflow: Mlflow) -> None:
    mlflow.add("m", FILES, mlmodel=b"flavors: {sklearn: {}}")
    with pytest.raises(Unusable, match="no ONNX flavor, only sklearn"):
        origin(mlflow).offer("m", 1)


def test_lineage_that_is_gone_spoils_nothing(mlflow: Mlflow) -> None:
    mlflow.add("m", FILES)
    gone = 404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}
    mlflow.trouble = lambda asked: gone if "logged-models" in asked.path or "runs" in asked.path else None
    assert origin(mlflow).offer("m", 1).description.params == {}


def test_the_identity_of_an_offer_is_its_mlmodel(mlflow: Mlflow) -> None:
    mlflow.add("m", FILES)
    before = origin(mlflow).offer("m", 1).identity
    mlflow.tamper("m", 1, "MLmodel", MLMODEL + b"x: 1\n")
    assert origin(mlflow).offer("m", 1).identity != before


def test_versions_are_found_by_their_trigger_whether_or_not_they_are_named(mlflow: Mlflow) -> None:
    for _ in range(5):
        mlflow.add("m", FILES)
    mlflow.own_tags = {
        ("m", 2): {"tidegate.trigger_id": "t-1"}, ("m", 3): {"trigger_id": "t-1"}, ("m", 4): {"trigger_id": "t-2"},
    }  # fmt: skip
    assert origin(mlflow).triggered("m") == {"t-1": 3, "t-2": 4}
    (asked,) = mlflow.asked
    assert asked.query["order_by"] == "version_number DESC"
    with pytest.raises(NotInRegistry):
        origin(mlflow).triggered("x' OR name='m")


def test_artifacts_in_an_allowed_folder_are_offered_and_read(mlflow: Mlflow, tmp_path: Path) -> None:
    mlflow.add("m", {})
    place = tmp_path / "shared" / "m-1"
    (place / "code").mkdir(parents=True)
    for name, content in {**FILES, "MLmodel": MLMODEL, "code/train.py": b"", ".hidden": b""}.items():
        (place / name).write_bytes(content)
    mlflow.places["m", 1] = place.as_uri()
    client = origin(mlflow, artifact_folders=(tmp_path / "shared",))
    offer = client.offer("m", 1)
    assert [(file.path, file.size) for file in offer.files] == [(n, len(FILES[n])) for n in sorted(FILES)]
    assert read(client, offer.files[1], tmp_path / "target") == b"graph"
    assert not [asked for asked in mlflow.asked if "artifacts" in asked.path]
