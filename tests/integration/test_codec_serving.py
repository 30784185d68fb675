"""``tidegate serve`` with its codec process: switched by the file, counted on the metrics page, killed, ended."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support import models
from tests.support.codec import TRANSPORTS, tensor_body
from tests.support.metrics import samples, total, wait_total
from tests.support.server import serving

WIDTH = 20_000
VALUES = np.arange(WIDTH, dtype="<f4").reshape(1, -1) / 8


def asked(url: str) -> None:
    """One large request, rightly answered."""
    answer = httpx.post(f"{url}/v2/models/wide/infer", content=tensor_body(VALUES), timeout=20, trust_env=False)
    assert answer.status_code == 200, answer.text
    np.testing.assert_array_equal(np.array(answer.json()["outputs"][0]["data"], "<f4"), (2 * VALUES + 1).ravel())


def written(folder: Path, codec: str) -> str:
    models.affine(folder / "wide.onnx", width=WIDTH)
    path = folder / "tidegate.yaml"
    path.write_text(
        f"apiVersion: tidegate/v1\nserver: {{codec: {codec}}}\nstate: {{dir: state}}\n"
        "models: {wide: {source: wide.onnx}}\n"
    )
    return str(path)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_large_json_in_a_process_of_its_own(tmp_path: Path, transport: str) -> None:
    with serving(written(tmp_path, "{offload_over: 32KiB}"), "--transport", transport) as server:
        asked(server.url)
        pid = server.wait_for("codec_process_started")["pid"]
        before = total(server, "tidegate_codec_jobs_total")  # it may have been there for the first one's answer
        asked(server.url)
        wait_total(server, "tidegate_codec_jobs_total", before + 2)
        assert samples(server, "tidegate_codec_fallbacks_total")['{reason="starting"}'] >= 1
        os.kill(pid, signal.SIGKILL)
        asked(server.url)
        server.wait_for("codec_process_lost", pid=pid)
        while total(server, "tidegate_codec_starts_total") < 2:
            asked(server.url)


def test_it_ends_with_the_server(tmp_path: Path) -> None:
    with serving(written(tmp_path, "{}")) as server:
        asked(server.url)
        descriptor = os.pidfd_open(server.wait_for("codec_process_started")["pid"])
        server.terminate()
        assert server.wait() == 0
        assert select.select([descriptor], [], [], 10)[0]
        os.close(descriptor)


def test_switched_off(tmp_path: Path) -> None:
    with serving(written(tmp_path, "{process: false}")) as server:
        asked(server.url)
        assert not samples(server, "tidegate_codec_starts_total")
        assert not any(line.get("event") == "codec_process_started" for line in server.lines)
