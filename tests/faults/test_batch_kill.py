"""SIGKILL in the middle: batch jobs go on and give the same file; capturing never shows half a segment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from server.capture.segments import SegmentStore, entries, is_whole
from tests.support import models
from tests.support.server import PRODUCT_PATH

pytestmark = pytest.mark.timeout(180)
ENVIRONMENT = {**os.environ, "PYTHONPATH": PRODUCT_PATH, "PYTHONSAFEPATH": "1"}

#: Loads a model once and runs a batch job, slowly enough to be met anywhere: says "ready" when it begins.
BATCH = """
import sys
from pathlib import Path
from server.offline.batch import BatchSettings, run_batch
from server.offline.models import find_model
from server.runtime.onnx import OnnxRuntime
source, target, model = map(Path, sys.argv[1:4])
found = find_model(str(model), model.parent)
engine = OnnxRuntime(measure_budget_s=0).load(found.request)
print("ready", flush=True)
report = run_batch(source, target, found, engine, BatchSettings((), (), 4, 64), lambda done, total: None)
print(report.sha256, report.rows, flush=True)
"""


def start(code: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill_after(process: subprocess.Popen[str], seconds: float) -> str:
    """What it said beside "ready" before it ended, by itself or killed."""
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate(timeout=20)
    return out


@pytest.mark.parametrize(
    ("suffix", "kills"),
    [("csv", 6), pytest.param("csv", 12, marks=pytest.mark.slow), pytest.param("parquet", 12, marks=pytest.mark.slow)],
)
def test_a_killed_batch_job_goes_on_to_the_same_file(tmp_path: Path, suffix: str, kills: int) -> None:
    rng = random.Random(f"{suffix} {kills}")
    model = models.affine(tmp_path / "affine.onnx", scale=0.1)
    source = tmp_path / "in.npz"
    np.savez(source, x=np.random.default_rng(1).normal(size=(2500, 4)).astype(np.float32))
    whole = tmp_path / f"whole.{suffix}"
    finished = start(BATCH, source, whole, model)
    began = time.monotonic()
    sha256, rows = kill_after(finished, 60).split()
    length = time.monotonic() - began
    target = tmp_path / f"out.{suffix}"
    for _ in range(kills):
        said = kill_after(start(BATCH, source, target, model), rng.uniform(0, length / 3))
        assert target.exists() or not said, "the output is there when the job says so"
        if target.exists():
            break
    assert kill_after(start(BATCH, source, target, model), 60).split()[1] == rows == "2500"
    if suffix == "csv":
        assert whole.read_bytes() == target.read_bytes()
        assert sha256
    assert not (tmp_path / f"out.{suffix}.parts").exists()


#: Captures until it is killed, in small segments that are removed again soon.
CAPTURE = """
import sys
from pathlib import Path
import numpy as np
from server.capture.service import Capture
from server.config.capture_options import CaptureSettings, CaptureSpec
from server.types import Decision, ModelSpec, Tensor, TensorSpec
spec = ModelSpec("m", "1", (TensorSpec("x", "FP32", (-1, 4)),), (), max_batch_size=8, digest="d")
settings = CaptureSettings(
    default=CaptureSpec(10_000), format=sys.argv[2], segment_rows=20, max_segments=15, segment_age_s=0.001
)
capture = Capture(settings, Path(sys.argv[1]))
x = np.ones((1, 4), np.float32)
number = 0
while True:
    number += 1
    tensor = Tensor("x", "FP32", (1, 4), (x * number).tobytes())
    capture.offer("m", "", f"{number:x}", Decision("m", "1", "stable", 1), spec, [tensor], [], "ok", 1)
    capture.offer_label("m", f"{number:x}", "", 1.0)
    if number % 20 == 0:
        capture.flush()
    if number == 20:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("kills", [5, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_killed_writer_never_shows_half_a_segment(tmp_path: Path, form: str, kills: int) -> None:
    rng = random.Random(f"{form} {kills}")
    for _ in range(kills):
        process = start(CAPTURE, tmp_path, form)
        kill_after(process, rng.uniform(0.01, 0.4))
        for kind in ("requests", "labels"):
            for entry in entries(tmp_path, "m", kind):  # type: ignore[arg-type]
                assert is_whole(entry), f"{entry.file} is not what its entry says"
    opened = SegmentStore(tmp_path, form, max_bytes=10**9, max_segments=15)
    listed = [entry for kind in ("requests", "labels") for entry in entries(tmp_path, "m", kind)]  # type: ignore[arg-type]
    assert 0 < len(listed) == len(opened) <= 15
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted(
        name for entry in listed for name in (entry.file, f"{entry.file}.json")
    )
    opened.close()
