"""The KServe SDK's two clients in an environment of their own, made on first use (a minute or two, half a gigabyte)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import models
from tests.support.environments import CLIENTS, environment
from tests.support.server import Server, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NAMES = [
    "errors", "grpc_every_datatype", "grpc_health", "many_at_once", "rest_every_datatype", "rest_health", "texts",
]  # fmt: skip


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter that has kserve."""
    return environment("kserve")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("repository")
    models.affine(root / "affine" / "1" / "model.onnx")
    for datatype in models.ELEMENT_TYPES:
        models.identity(root / f"identity_{datatype.lower()}" / "1" / "model.onnx", datatype)
    state = str(tmp_path_factory.mktemp("state"))
    with serving("--model-repository", str(root), "--state-dir", state) as running:
        yield running


def run_script(python: Path, argument: str) -> str:
    command = [str(python), "-I", str(CLIENTS / "kserve_checks.py"), argument]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def held(python: Path, server: Server) -> dict[str, str]:
    """Every check's name -> "" or its traceback."""
    return dict(json.loads(run_script(python, json.dumps({"http": server.http, "grpc": server.grpc}))))


@pytest.mark.parametrize("name", NAMES)
def test_client(held: dict[str, str], name: str) -> None:
    assert held[name] == "", held[name]


def test_no_check_is_left_out(python: Path) -> None:
    assert json.loads(run_script(python, "--list")) == NAMES
