"""Commands that read the registry which a configuration follows: MLflow's, with its pins in the state folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from server.cli.main import cli
from server.config.registry_file import registry_of
from server.errors import ConfigError, FailedPrecondition, TidegateError
from server.mlflow.build import open_mlflow
from server.offline.bundle import verify_bundle
from server.state import open_state
from tests.support import gate_models, models
from tests.support.mlflow_server import MLMODEL, Mlflow, running

UNNAMED = MLMODEL.replace(b'"name": "x", ', b"").replace(b'"name": "y", ', b"")


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[Mlflow]:
    """``m``: version 1 is champion, 2 challenger, 3 has no alias. ``loans``: 1 and 2, for gates."""
    with running() as server:
        for scale in (2, 3, 4):
            server.add("m", {"model.onnx": models.affine(tmp_path / f"{scale}.onnx", scale).read_bytes()})
        for make in (gate_models.good, gate_models.worse):
            content = make(tmp_path / f"{make.__name__}.onnx").read_bytes()
            server.add("loans", {"model.onnx": content}, mlmodel=b"flavors: {onnx: {data: model.onnx}}")
        for model in ("m", "loans"):
            server.point(model, "champion", 1)
            server.point(model, "challenger", 2)
        yield server


@pytest.fixture
def config(mlflow: Mlflow, tmp_path: Path) -> Path:
    path = tmp_path / "tidegate.yaml"
    gate_models.write_holdout(tmp_path / "holdout.csv")
    path.write_text(
        f"apiVersion: tidegate/v1\nregistry: {{mlflow: {{url: '{mlflow.url}', timeout: 2s}}}}\nstate: {{dir: state}}\n"
        "gates: {same: {holdout: {path: holdout.csv, label: label}}}\n"
    )
    return path


def run(config: Path, *arguments: object) -> Result:
    return CliRunner().invoke(cli, [*[str(argument) for argument in arguments], "--config", str(config)])


def read(config: Path, *arguments: object) -> Any:
    done = run(config, *arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def states(config: Path) -> dict[int, str]:
    return {row["version"]: row["state"] for row in read(config, "registry", "list", "m", "--json")}


def test_versions_are_listed_as_mlflow_has_them_and_taken_when_looked_at(mlflow: Mlflow, config: Path) -> None:
    assert states(config) == {1: "not taken", 2: "not taken", 3: "not taken"}
    shown = read(config, "registry", "show", "m")
    assert (shown["version"], shown["aliases"], shown["state"]) == (1, ["champion"], "pinned")
    assert shown["created"] == "2023-11-14T22:13:20.000Z"
    assert [row["path"] for row in shown["files"]] == ["model.onnx"]
    assert states(config) == {1: "pinned", 2: "not taken", 3: "not taken"}
    assert read(config, "registry", "alias", "m", "--json") == [
        {"alias": "challenger", "version": 2}, {"alias": "champion", "version": 1},
    ]  # fmt: skip
    assert read(config, "registry", "verify", "--json") == [{"model": "m", "version": 1, "problem": ""}]
    assert not [asked for asked in mlflow.asked if asked.method != "GET"]


def test_names_that_the_publisher_left_out_are_the_graphs(mlflow: Mlflow, config: Path, tmp_path: Path) -> None:
    mlflow.add("bare", {"model.onnx": models.affine(tmp_path / "b.onnx").read_bytes()}, mlmodel=UNNAMED)
    signature = read(config, "registry", "show", "bare:1")["signature"]
    assert [(side, tensor["name"]) for side in ("inputs", "outputs") for tensor in signature[side]] == [
        ("inputs", "x"), ("outputs", "y"),
    ]  # fmt: skip


def test_card_export_and_batch_take_the_version(config: Path, tmp_path: Path) -> None:
    card = read(config, "registry", "card", "m@challenger", "--json")
    assert (card["version"], card["state"], card["description"]["params"]) == (2, "pinned", {"depth": "10"})
    assert [event["action"] for event in card["history"]] == ["registry.pin"]
    bundle = read(config, "export", "m:3", tmp_path / "edge", "--json")
    assert (bundle["version"], bundle["files"]) == (3, 2)
    assert verify_bundle(tmp_path / "edge").digest == bundle["digest"]
    fetched = run(config, "registry", "fetch", "m:3", tmp_path / "files")
    assert fetched.exit_code == 0, fetched.output
    assert (tmp_path / "files" / "model.onnx").read_bytes() == (tmp_path / "4.onnx").read_bytes()
    np.savez(tmp_path / "in.npz", x=np.ones((3, 4), np.float32))
    report = read(config, "batch", "--in", tmp_path / "in.npz", "--out", tmp_path / "out.npz", "--model", "m", "--json")
    assert (report["rows"], report["version"]) == (3, "1")
    assert np.array_equal(np.load(tmp_path / "out.npz")["y[0]"], np.full(3, 3.0, np.float32))


def test_a_gate_judges_versions_of_mlflow_and_the_verdict_is_kept_here(config: Path, tmp_path: Path) -> None:
    failed = run(config, "gate", "check", "--model", "loans", "--json")
    assert failed.exit_code == 3, (failed.output, failed.exception)
    found = json.loads(failed.stdout)
    assert (found["model"], found["version"]) == ("loans", "2")
    state = open_state(tmp_path / "state")
    try:
        assert [row.event.subject for row in state.audit.tail(100) if row.event.action == "gate.failed"] == ["loans:2"]
    finally:
        state.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ("registry", "publish", "m", "2.onnx"),
        ("registry", "alias", "m", "champion", "2"),
        ("registry", "alias", "m", "champion", "--drop"),
        ("registry", "retire", "m:1"),
        ("registry", "gc"),
    ],
)
def test_what_would_write_says_where_that_is_done(mlflow: Mlflow, config: Path, arguments: tuple[str, ...]) -> None:
    done = run(config, *arguments)
    assert isinstance(done.exception, FailedPrecondition)
    assert f"those of MLflow at {mlflow.url}" in str(done.exception)
    assert "set_registered_model_alias" in str(done.exception)
    assert not mlflow.asked


def test_an_outage_leaves_what_was_followed_and_pinned(mlflow: Mlflow, config: Path, tmp_path: Path) -> None:
    mlflow.trouble = lambda _: (503, b"")
    done = run(config, "registry", "list")
    assert isinstance(done.exception, TidegateError)
    assert "503" in str(done.exception)
    mlflow.trouble = lambda _: None
    _follow(config)
    mlflow.point("m", "champion", 3)
    assert read(config, "registry", "show", "m")["version"] == 1  # as the gateway has followed, not as is wanted
    mlflow.trouble = lambda _: (503, b"")
    assert states(config) == {1: "pinned", 2: "pinned"}
    assert read(config, "export", "m", tmp_path / "edge", "--json")["version"] == 1


def test_bytes_that_changed_show_and_the_pinned_ones_are_exported(mlflow: Mlflow, config: Path, tmp_path: Path) -> None:
    _follow(config)
    graph = (tmp_path / "2.onnx").read_bytes()
    mlflow.tamper("m", 1, "model.onnx", graph[:-1] + b"!")
    mlflow.point("m", "previous", 1)
    _follow(config)
    assert states(config)[1] == "refused"
    read(config, "export", "m:1", tmp_path / "edge", "--json")
    assert (tmp_path / "edge" / "models" / "m" / "model.onnx").read_bytes() == graph


def test_the_state_folder_is_the_configurations_unless_one_is_named(mlflow: Mlflow, tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text("apiVersion: tidegate/v1\nstate: {dir: kept}\nserver: {auth: {admin_token: '${NOT_SET}'}}\n")
    source = tmp_path / "2.onnx"
    for where in ((), ("--state-dir", tmp_path / "other")):
        assert run(path, "registry", "publish", "m", source, *where).exit_code == 0
        assert [row["state"] for row in read(path, "registry", "list", "--json", *where)] == ["live"]
    assert (tmp_path / "kept" / "tidegate.db").exists()
    assert (tmp_path / "other" / "tidegate.db").exists()


@pytest.mark.parametrize(("text", "words"), [(None, "cannot be read"), ("a: [", "config.yaml")])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    done = run(path, "registry", "list")
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)


def _follow(config: Path) -> None:
    """What a gateway does: follow the aliases and take what they name."""
    said = registry_of(config)
    assert said.mlflow is not None
    assert said.state_dir is not None
    state = open_state(said.state_dir)
    try:
        registry = open_mlflow(said.mlflow, said.state_dir, state.store, state.audit.journal).registry
        registry.poll()
        list(registry.settle())
    finally:
        state.close()
