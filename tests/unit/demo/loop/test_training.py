"""server.demo.loop.training: what it says of a version, and which events it answers. The loop itself runs the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from router.registry.manifest import parse_description
from server.demo.loop.training import Trained, described
from server.demo.process import environment


def test_the_description_is_one_that_the_registry_takes() -> None:
    about = described(Trained(Path("m.onnx"), Path("m.tgp"), 7), "captured since then", "0123abc")
    lineage = parse_description(json.dumps(about).encode()).lineage
    assert (lineage.data.rows, lineage.data.uri, lineage.trigger_id) == (7, "captured since then", "0123abc")


def test_an_event_that_asks_for_no_training_is_none(tmp_path: Path) -> None:
    event = {"type": "io.tidegate.alert.drift.raised", "data": {"feature": "origin"}}
    done = subprocess.run(
        [sys.executable, "-m", "server.demo.loop.training", str(tmp_path)],
        input=json.dumps(event),
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=50,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
