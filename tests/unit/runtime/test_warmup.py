from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from server.errors import InputRejected, ModelLoadError, TidegateError
from server.runtime.base import Batch, BatchingOptions, LoadRequest, ModelOptions, WarmupInput, WarmupSample
from server.runtime.warmup import Gathering, decide_gathering, run_generated_samples, run_operator_samples
from server.types import ModelSpec, Tensor, TensorSpec

SPEC = ModelSpec("m", "1", (TensorSpec("x", "FP32", (-1, 2)),), (), max_batch_size=8, digest="d" * 64)


class Model:
    """``y = x``, or the mean over the rows when ``mixes``; takes 1000 ns a run on its own clock."""

    def __init__(self, mixes: bool = False, fault: TidegateError | None = None) -> None:
        self.now = 0
        self.ran: list[int] = []
        self._mixes = mixes
        self._fault = fault

    def clock(self) -> int:
        return self.now

    def run(self, batch: Batch) -> list[Tensor]:
        self.ran.append(batch.rows)
        self.now += 1000
        if self._fault is not None:
            raise self._fault
        x = np.frombuffer(b"".join(batch.parts[0] or []), "<f4").reshape(batch.shapes[0])  # type: ignore[arg-type]
        y = np.broadcast_to(x.mean(axis=0), x.shape) if self._mixes else x
        return [Tensor("y", "FP32", y.shape, y.tobytes())]


def request(state: Path | None = None, **options: object) -> LoadRequest:
    return LoadRequest("m", "1", Path("model.onnx"), ModelOptions(**options), state_dir=state)  # type: ignore[arg-type]


def decide(model: Model, load: LoadRequest, spec: ModelSpec = SPEC, budget_s: float = 1.0) -> Gathering:
    return decide_gathering(model.run, spec, load, {"threads": 1}, budget_s, model.clock)


def test_a_constant_cost_per_run_gathers_the_maximum() -> None:
    assert decide(Model(), request()) == Gathering(8)


def test_rows_that_meet_are_never_gathered() -> None:
    found = decide(Model(mixes=True), request())
    assert found.rows == 1
    assert "differs from the same rows alone" in found.refusal


@pytest.mark.parametrize(("limit", "rows"), [(0, 0), (1, 1)])
def test_nothing_is_run_when_there_is_nothing_to_gather(limit: int, rows: int) -> None:
    model = Model()
    spec = ModelSpec("m", "1", SPEC.inputs, (), max_batch_size=limit)
    assert decide(model, request(), spec) == Gathering(rows)
    assert model.ran == []


def test_what_was_learned_is_not_measured_again(tmp_path: Path) -> None:
    first, second, other = Model(), Model(), Model()
    assert decide(first, request(tmp_path)) == decide(second, request(tmp_path)) == Gathering(8)
    assert first.ran
    assert second.ran == []
    decide_gathering(other.run, SPEC, request(tmp_path), {"threads": 2}, 1.0, other.clock)
    assert other.ran


def test_a_refusal_is_remembered_too(tmp_path: Path) -> None:
    first, second = Model(mixes=True), Model(mixes=True)
    assert decide(first, request(tmp_path)) == decide(second, request(tmp_path))
    assert second.ran == []


def test_the_operators_maximum_is_taken_unmeasured_but_not_unproved() -> None:
    model = Model()
    assert decide(model, request(batching=BatchingOptions(max_rows=3))) == Gathering(3)
    assert len(model.ran) < 30
    assert decide(Model(), request(batching=BatchingOptions(max_rows=100))) == Gathering(8)
    assert decide(Model(mixes=True), request(batching=BatchingOptions(max_rows=3))).rows == 1


def test_batching_that_is_off_gathers_one() -> None:
    assert decide(Model(), request(batching=BatchingOptions(enabled=False))) == Gathering(1)


def test_without_a_budget_the_maximum_is_taken() -> None:
    assert decide(Model(), request(), budget_s=0) == Gathering(8)


def sample(dims: tuple[int, ...] = (2,), count: int = 1) -> WarmupSample:
    return WarmupSample("first", 4, {"x": WarmupInput("FP32", dims)}, count)


def test_the_operators_samples_are_run_as_often_as_asked() -> None:
    model = Model()
    run_operator_samples(model.run, SPEC, request(warmup=(sample(count=3),)))
    assert model.ran == [4, 4, 4]


def test_an_operators_sample_that_fails_fails_the_load() -> None:
    model = Model(fault=InputRejected("No."))
    with pytest.raises(ModelLoadError, match=r"^Warm-up sample 'first' failed: No\.$"):
        run_operator_samples(model.run, SPEC, request(warmup=(sample(),)))


def test_generated_samples_warm_one_row_and_the_gathered_maximum() -> None:
    model = Model()
    spec = ModelSpec("m", "1", SPEC.inputs, (), max_batch_size=8, learned_batch_size=6)
    assert run_generated_samples(model.run, spec, request(), model.clock) == 1000
    assert set(model.ran) == {1, 6}


def test_a_model_that_takes_no_generated_sample_has_no_time() -> None:
    model = Model(fault=InputRejected("No."))
    assert run_generated_samples(model.run, SPEC, request(), model.clock) is None
