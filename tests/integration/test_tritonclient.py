"""The public Triton client in its own process and environment against a real server: each check is one test."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import models
from tests.support.metrics import wait_total
from tests.support.server import ROOT, Server, serving

PYTHON = ROOT / ".venv-clients" / "bin" / "python"
SCRIPT = ROOT / "tests" / "clients" / "triton_checks.py"
LABELLED = """
name: "labelled"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 4 ] label_filename: "labels.txt" } ]
"""
IMPATIENT = """
name: "impatient"
max_batch_size: 1
dynamic_batching { default_queue_policy { timeout_action: REJECT allow_timeout_override: true } }
"""
ONE_BY_ONE = """
name: "slow"
max_batch_size: 1
"""
BOTH = [
    "bf16", "classification", "compression", "errors", "every_datatype", "health", "ids_versions_and_parameters",
    "large_tensors", "log_settings", "model_config", "model_metadata", "queue_timeout",
    "repository_and_model_control", "requested_outputs", "server_metadata", "shared_memory_is_refused_clearly",
    "statistics", "texts_that_are_not_utf8", "timeouts", "trace_settings", "async_infer", "asyncio",
]  # fmt: skip
SINGLE = [
    "json_in_and_out", "threads_of_both_protocols", "stream", "stream_asyncio", "stream_cancelled",
    "stream_with_a_timeout", "cancelled_calls",
]  # fmt: skip
NAMES = sorted([*SINGLE, *(f"{name}_{protocol}" for name in BOTH for protocol in ("http", "grpc"))])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("repository")
    for name in ("affine", "spare", "labelled"):
        models.affine(root / name / "1" / "model.onnx")
    models.two_inputs(root / "simple" / "1" / "model.onnx")
    models.lookup(root / "lookup" / "1" / "model.onnx")
    for name in ("slow", "impatient"):
        models.slow_scalar(root / name / "1" / "model.onnx", size=512, layers=8)
    for name, text in (("labelled", LABELLED), ("slow", ONE_BY_ONE), ("impatient", IMPATIENT)):
        (root / name / "config.pbtxt").write_text(text)
    (root / "labelled" / "labels.txt").write_text("cat\ndog\nbird\nfish\n")
    for datatype in models.ELEMENT_TYPES:
        models.identity(root / f"identity_{datatype.lower()}" / "1" / "model.onnx", datatype)
    (root / "identity_fp32" / "config.pbtxt").write_text('name: "identity_fp32"\nmax_batch_size: 2000000\n')
    state = str(tmp_path_factory.mktemp("state"))
    with serving(
        "--model-repository", str(root), "--state-dir", state, "--model-control", "explicit", "--load-model", "*"
    ) as running:
        yield running
        wait_total(running, "tidegate_pending_requests", 0)
        assert not [line for line in running.lines if line.get("event") == "request_failed"]


def run_script(*arguments: str) -> str:
    done = subprocess.run(
        [str(PYTHON), "-I", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=55, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def held(server: Server) -> dict[str, str]:
    """Every check's name -> "" or its traceback."""
    if not Path(PYTHON).exists():
        pytest.fail("the clients' environment is missing: run `make .venv-clients/.installed`")
    return dict(json.loads(run_script(json.dumps({"http": server.http, "grpc": server.grpc}))))


@pytest.mark.parametrize("name", NAMES)
def test_client(held: dict[str, str], name: str) -> None:
    assert held[name] == "", held[name]


def test_no_check_is_left_out() -> None:
    assert json.loads(run_script("--list")) == NAMES
