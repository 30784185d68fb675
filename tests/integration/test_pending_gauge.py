"""The gauge of what waits tells of the version that serves, whatever else was loaded of it and given up again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.metrics import wait_total
from tests.support.routed import Place
from tests.support.upstream import Rows, scaled, upstream
from tests.support.v2 import infer, tensor

FAR = """
  far:
    versions: {{"1": {{upstream: {{url: "http://{address}", model: m, timeout: 60s}}}}}}
    batching: {{max_batch_size: 1, max_queue_size: {room}}}
"""


def test_a_configuration_that_is_refused_leaves_the_gauge_alone(tmp_path: Path) -> None:
    """Another server has the model, and answers one request at a time: none before all are there."""
    go, place = threading.Event(), Place(tmp_path)

    def held(x: Rows) -> bytes:
        go.wait(60)
        return scaled(1)(x)

    broken = tmp_path / "broken" / "1" / "model.onnx"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no model")
    text = place.text("")
    with upstream(held) as far:
        place.path.write_text(text + FAR.format(address=far.address, room=100))
        with place.serve() as server, ThreadPoolExecutor(8) as pool:
            refused = text + FAR.format(address=far.address, room=200) + "  zbroken: {source: broken}\n"
            status, answer, _ = place.admin(server, "POST", "config", refused.encode())
            assert status == 400, answer
            assert "zbroken" in answer["error"]
            x = tensor("x", "FP32", [1, 4], [1.0] * 4)
            asked = [pool.submit(infer, server.http, "far", [x]) for _ in range(8)]
            try:
                wait_total(server, "tidegate_pending_requests", 7)
            finally:
                go.set()
            assert [one.result()[0] for one in asked] == [200] * 8
            wait_total(server, "tidegate_pending_requests", 0)
