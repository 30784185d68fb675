"""The gauge of what waits tells of the version that serves, whatever else was loaded of it and given up again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support import models
from tests.support.metrics import samples, wait_total
from tests.support.routed import Place, eventually
from tests.support.v2 import infer, tensor

SLOW = """
  slow:
    source: slow
    batching: {{max_batch_size: 1, max_queue_size: {room}}}
"""


def test_a_configuration_that_is_refused_leaves_the_gauge_alone(tmp_path: Path) -> None:
    place = Place(tmp_path)
    models.slow_scalar(tmp_path / "slow" / "1" / "model.onnx", size=512, layers=32)
    broken = tmp_path / "broken" / "1" / "model.onnx"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no model")
    text = place.text("")
    place.path.write_text(text + SLOW.format(room=100))
    with place.serve() as server, ThreadPoolExecutor(8) as pool:
        refused = text + SLOW.format(room=200) + "  zbroken: {source: broken}\n"
        status, answer, _ = place.admin(server, "POST", "config", refused.encode())
        assert status == 400, answer
        assert "zbroken" in answer["error"]
        x = tensor("x", "FP32", [1, 1], [1.0])
        asked = [pool.submit(infer, server.http, "slow", [x]) for _ in range(8)]
        label = '{model="slow",version="1"}'
        eventually(lambda: samples(server, "tidegate_pending_requests").get(label, 0) >= 2)
        assert [one.result()[0] for one in asked] == [200] * 8
        wait_total(server, "tidegate_pending_requests", 0)
