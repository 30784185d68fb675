"""loadtests.peers.running: a program that does not start is said with what it wrote, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from loadtests.models import MODEL, bench_row, write_model
from loadtests.peers.catalog import MOSEC
from loadtests.peers.environments import Unavailable
from loadtests.peers.running import running, until_right


def test_a_peer_that_is_not_installed(tmp_path: Path) -> None:
    write_model(tmp_path / f"{MODEL}.onnx")
    row, wanted = bench_row(), np.zeros((1, 2), np.float32)
    cores = os.sched_getaffinity(0)
    with running(MOSEC, Path(sys.executable), tmp_path / f"{MODEL}.onnx", row, tmp_path, cores) as one:
        assert one.target.grpc == ""
        assert set(one.target.requests) == {"http-json", "http-binary"}
        with pytest.raises(Unavailable, match=r"(?s)mosec ended with 1.*No module named 'mosec'"):
            asyncio.run(until_right(MOSEC, one, row, wanted))
    assert not Path(f"/proc/{one.target.pid}").exists()
