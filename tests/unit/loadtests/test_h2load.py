"""loadtests.h2load: its log is read as a window; where it is installed it asks as our generator does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loadtests import h2load
from loadtests.crew import PROTOCOLS, Way
from loadtests.models import MODEL, bench_row, write_model
from loadtests.servers import floor
from server.errors import InvalidArgument


def test_a_log() -> None:
    taken = h2load.read_log("1\t200\t1500\n2\t200\t2500\n3\t503\t10\n4\t-1\t7\nnoise\n", 2.0)
    assert (taken.seconds, taken.completed) == (2.0, 2)
    assert taken.outcomes == {"ok": 2, "http 503": 1, "http -1": 1}
    assert taken.latency.percentile(100) == 2_500_000


def test_where_it_is_missing_that_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidArgument, match="not installed"):
        asyncio.run(h2load.measure(None, "m", Way("grpc", 1), {}, 1.0))  # type: ignore[arg-type]


@pytest.mark.skipif(h2load.path() is None, reason="h2load is not installed")
def test_it_asks_in_every_protocol_it_has(tmp_path: Path) -> None:
    write_model(tmp_path / f"{MODEL}.onnx")
    with floor("bare", tmp_path) as target:
        for protocol in PROTOCOLS[:3]:
            sample = asyncio.run(h2load.measure(target, MODEL, Way(protocol, 2), {"x": bench_row()}, 1.0))
            assert set(sample.outcomes) == {"ok"}
            assert sample.completed > 10
            assert sample.cpu_us > 0
