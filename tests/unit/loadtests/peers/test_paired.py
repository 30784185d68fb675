"""``python -m loadtests.peers`` with one peer that is really there."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from loadtests import h2load
from loadtests.peers.catalog import MOSEC
from loadtests.peers.environments import Unavailable, python_of
from loadtests.peers.paired import OURS, Plan, measure, rows_of
from loadtests.peers.table import text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mosec_beside_ours(tmp_path: Path) -> None:
    try:
        python_of(MOSEC.name)
    except Unavailable as error:
        pytest.skip(str(error))
    allowed = os.sched_getaffinity(0)
    rows = rows_of(h2load.path())
    result = asyncio.run(measure(Plan((MOSEC,), rows, 1, 0.5, 200.0), tmp_path))
    assert result.settings["left_out"] == {}
    for row in rows:
        assert (MOSEC.name in result.cells[row.name]) == (row.way.protocol != "grpc")
        for column, samples in result.cells[row.name].items():
            assert [sample.errors for sample in samples] == [0], (row.name, column)
            assert samples[0].completed > 0
            assert samples[0].cpu_us > 0
    assert f"ahead of {MOSEC.name} in all 8 comparisons" in text(result, rows)
    assert f"no errors of {OURS}" in text(result, rows)
    assert os.sched_getaffinity(0) == allowed
