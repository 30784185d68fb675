"""server.gates.running: batches, turns, and the time that is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from server.gates.running import OutOfTime, Pace, outputs, run_times
from server.runtime.base import LoadRequest, ModelOptions
from server.runtime.fake import FakeEngine, FakeRuntime, Script


def engine(**script: object) -> FakeEngine:
    return FakeRuntime(Script(**script)).load(LoadRequest("m", "1", Path("m.onnx"), ModelOptions()))  # type: ignore[arg-type]


def test_rows_go_in_batches_and_come_back_in_order() -> None:
    fake = engine(width=2, max_batch_size=4)
    rows = np.arange(20, dtype="f4").reshape(10, 2)
    assert np.array_equal(outputs(fake, [rows], {"y"}, Pace())["y"], 2 * rows + 1)
    assert [run.rows for run in fake.runs] == [4, 4, 2]
    assert outputs(fake, [rows], set(), Pace()) == {}


def test_a_model_that_does_not_batch_runs_row_by_row_where_it_can() -> None:
    fake = engine(width=1, max_batch_size=1)
    assert outputs(fake, [np.zeros((3, 1), "f4")], {"y"}, Pace())["y"].tolist() == [[1], [1], [1]]
    assert [run.rows for run in fake.runs] == [1, 1, 1]


def test_time_is_looked_at_between_batches() -> None:
    fake, times = engine(width=1, max_batch_size=1), iter(range(100))
    with pytest.raises(OutOfTime, match="the time limit passed"):
        outputs(fake, [np.zeros((10, 1), "f4")], {"y"}, Pace(until=4, now=lambda: next(times)))
    assert len(fake.runs) == 4
    with pytest.raises(OutOfTime, match="called off"):
        Pace(stopped=lambda: True).check()


def test_both_run_equally_often_by_turns() -> None:
    order: list[str] = []
    ours = engine(width=1, before_run=lambda _: order.append("ours"))
    theirs = engine(width=1, before_run=lambda _: order.append("theirs"))
    rows = np.zeros((5, 1), "f4")
    found = run_times(ours, theirs, ([rows], [rows]), 3, 6, 10**12, Pace())
    assert [len(times) for times in found] == [6, 6]
    assert order[-12:] == ["ours", "theirs", "theirs", "ours"] * 3
    assert {run.rows for run in ours.runs} == {3}
    assert (found[0] > 0).all()


def test_a_spent_budget_ends_the_runs() -> None:
    times = iter(range(0, 10**6, 10))
    rows = np.zeros((5, 1), "f4")
    pace = Pace(now=lambda: next(times))
    found = run_times(engine(width=1), engine(width=1), ([rows], [rows]), 1, 1000, 25, pace)
    assert len(found[0]) == len(found[1]) == 128
