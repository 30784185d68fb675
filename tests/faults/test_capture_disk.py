"""A full disk, a real one: what is captured, computed and taken from MLflow stops whole, and goes on with room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.test_store_disk import on_small_disk

FREE = """
def free():
    (disk / "ballast").unlink()
"""

CAPTURE = (
    FREE
    + """
import numpy as np
from server.capture.segments import entries, is_whole
from server.capture.service import Capture
from server.config.capture_options import CaptureSettings, CaptureSpec
from server.offline.dataset import Wanted, export_dataset
from server.types import Decision, ModelSpec, Tensor, TensorSpec
ROWS = 2000
x = Tensor("x", "FP32", (ROWS, 4), np.random.default_rng(7).normal(size=(ROWS, 4)).astype(np.float32).tobytes())
spec = ModelSpec("m", "1", (TensorSpec("x", "FP32", (-1, 4)),), (), max_batch_size=ROWS)
capture = Capture(CaptureSettings(default=CaptureSpec(10_000), format=sys.argv[3]), disk / "capture")

def offer(number):
    capture.offer("m", "", f"{1:016x}-{number:x}", Decision("m", "1", "stable", 1), spec, [x], [], "ok", 5)
    assert capture.flush()

def listed():
    found = entries(disk / "capture", "m", "requests")
    assert all(map(is_whole, found))
    names = {path.name for path in (disk / "capture" / "m").iterdir()}
    assert names == {name for entry in found for name in (entry.path.name, entry.path.name + ".json")}, names
    return len(found)

offer(1)
assert listed() == 1
fill()
for number in (2, 3):
    offer(number)
assert capture.report().dropped == {"disk": 2}, capture.report()
assert capture.report().held_requests == 0
assert listed() == 1
free()
offer(4)
assert listed() == 2
assert capture.report().dropped == {"disk": 2}
capture.close()
assert export_dataset(disk / "capture", "m", outside / "out.csv", Wanted()).rows == 2 * ROWS
"""
)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_segments_that_find_no_room_are_given_up_and_counted(tmp_path: Path, form: str) -> None:
    on_small_disk(f"sys.argv.append({form!r})\n" + CAPTURE, tmp_path)


BATCH = (
    FREE
    + """
import numpy as np
from server.errors import TidegateError
from server.offline.batch import BatchSettings, run_batch
from server.offline.models import find_model
from server.runtime.onnx import OnnxRuntime
from tests.support import models
form = sys.argv[3]
found = find_model(str(models.affine(outside / "m.onnx", width=16)), None)
engine = OnnxRuntime(measure_budget_s=0).load(found.request)
np.savez(outside / "in.npz", x=np.random.default_rng(7).normal(size=(3000, 16)).astype(np.float32))
done = []

def run(target):
    settings = BatchSettings(batch_rows=8, chunk_rows=200)
    return run_batch(outside / "in.npz", target, found, engine, settings, lambda rows, _: done.append(rows))

whole = run(outside / f"whole.{form}")
fill()
os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 150_000)
done.clear()
text = raises(TidegateError, lambda: run(disk / f"out.{form}"))
assert "o space" in text, text
assert 1 < len(done) < 15, done
assert not (disk / f"out.{form}").exists()
parts = [path.name for path in (disk / f"out.{form}.parts").iterdir()]
assert all(name.startswith(("part-", "job.json")) for name in parts), parts
assert len(parts) == len(done), (parts, done)
free()
resumed = run(disk / f"out.{form}")
assert resumed.resumed_rows == 200 * (len(parts) - 1) > 0
assert resumed.sha256 == whole.sha256
assert (disk / f"out.{form}").read_bytes() == (outside / f"whole.{form}").read_bytes()
assert not (disk / f"out.{form}.parts").exists()
"""
)


@pytest.mark.parametrize("form", ["csv", "npz", "jsonl"])
def test_a_batch_that_fills_the_disk_goes_on_where_it_stopped(tmp_path: Path, form: str) -> None:
    on_small_disk(f"sys.argv.append({form!r})\n" + BATCH, tmp_path)


def test_a_version_of_mlflow_that_finds_no_room_is_taken_once_there_is(tmp_path: Path) -> None:
    on_small_disk(
        FREE
        + """
from server.mlflow.build import open_mlflow
from server.mlflow.options import MlflowOptions
from tests.support.mlflow_server import running
graph = os.urandom(300_000)
now = [0.0]
with running() as mlflow:
    for content in (b"first", graph):
        mlflow.add("m", {"model.onnx": content})
    mlflow.point("m", "champion", 1)
    registry = open_mlflow(MlflowOptions(mlflow.url), disk, store, audit.journal).registry
    registry._clock = lambda: now[0]

    def look():
        registry.poll()
        return [settled.error for settled in registry.settle()]

    assert look() == [None]
    mlflow.point("m", "champion", 2)
    fill()
    (error,) = look()
    assert isinstance(error, StorageFailed), error
    assert "no space is left on the disk" in str(error), error
    assert registry.resolve("m", "@champion").version == 1
    assert not list((disk / "mlflow/blobs/tmp").iterdir())
    free()
    now[0] += 3
    assert look() == [None]
    assert registry.resolve("m", "@champion").version == 2
    assert (registry.fetch("m", 2).folder / "model.onnx").read_bytes() == graph
    assert "registry.refused" not in [row.event.action for row in audit.tail(100)]
    assert isinstance(audit.verify(), Verified)
""",
        tmp_path,
    )


def test_a_server_on_a_full_disk_goes_on_answering(tmp_path: Path) -> None:
    on_small_disk(
        FREE
        + """
import time
from server.capture.segments import entries, is_whole
from tests.support import models
from tests.support.cli import cli
from tests.support.metrics import total
from tests.support.routed import eventually
from tests.support.server import serving
from tests.support.v2 import infer, tensor
store.close()
for scale in (1.0, 2.0):
    path = models.affine(outside / f"{scale}.onnx", scale)
    alias = "champion" if scale == 1 else "challenger"
    cli("registry", "publish", "m", str(path), "--state-dir", str(disk), "--alias", alias)
(outside / "config.yaml").write_text(
    f"apiVersion: tidegate/v1\\nstate: {{dir: {disk}}}\\nregistry: {{embedded: true, poll_interval: 100ms}}\\n"
    "capture: {sample: 100%, format: jsonl, segment: {age: 100ms}}\\n"
)

def ask():
    status, body = infer(server.http, "m", [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])])
    assert status == 200, body
    return body["model_version"]

def lost():
    return total(server, "tidegate_capture_dropped_total")

with serving(str(outside / "config.yaml")) as server:
    assert ask() == "1"
    eventually(lambda: len(entries(disk / "capture", "m", "requests")) == 1)
    fill()
    for _ in range(20):
        assert ask() == "1"
    eventually(lambda: lost() > 0)
    moved = cli("registry", "alias", "m", "champion", "2", "--state-dir", str(disk), check=False)
    assert moved.returncode == 1, moved
    assert "no space is left on the disk" in moved.stderr, moved.stderr
    assert "Traceback" not in moved.stderr, moved.stderr
    assert ask() == "1"
    server.wait_for("capture_not_written")
    free()
    cli("registry", "alias", "m", "champion", "2", "--state-dir", str(disk))
    eventually(lambda: ask() == "2")
    server.wait_for("capture_written_again")
    server.terminate()
    assert server.wait() == 0
assert all(is_whole(entry) for entry in entries(disk / "capture", "m", "requests"))
open_all()
assert store.problems() == []
assert isinstance(audit.verify(), Verified)
""",
        tmp_path,
    )
