from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from server.errors import OutOfMemory, RuntimeFailure
from server.runtime.base import LoadRequest, ModelOptions
from server.runtime.fake import FakeEngine, FakeRuntime, Script
from tests.contracts.runtime_contract import Case, RuntimeContract, batch_of, expected, some_rows


def request(instances: int = 1) -> LoadRequest:
    return LoadRequest("fake", "1", Path("model.onnx"), ModelOptions(instances=instances))


def engine(script: Script, instances: int = 1) -> FakeEngine:
    return FakeRuntime(script).load(request(instances))


class TestContract(RuntimeContract):
    def case(self, folder: Path) -> Case:
        def broken() -> tuple[FakeRuntime, LoadRequest]:
            return FakeRuntime(Script(load_error="The file is corrupt.")), request()

        return Case(FakeRuntime(Script(reject_marker=-7.0)), request, broken, refused=-7.0)


def test_scripted_fault_hits_its_run_only() -> None:
    subject = engine(Script(faults={1: RuntimeFailure("scripted")}))
    values = some_rows(2)
    subject.run(0, batch_of(values))
    with pytest.raises(RuntimeFailure, match="scripted"):
        subject.run(0, batch_of(values))
    np.testing.assert_array_equal(subject.run(0, batch_of(values))[0].array(), expected(values))


def test_memory_runs_out_above_the_scripted_rows() -> None:
    subject = engine(Script(memory_rows=2))
    subject.run(0, batch_of(some_rows(2)))
    with pytest.raises(OutOfMemory):
        subject.run(0, batch_of(some_rows(3)))


def test_runs_wait_for_the_script_and_their_overlap_is_recorded() -> None:
    arrived, go = threading.Semaphore(0), threading.Event()

    def hold(_: int) -> None:
        arrived.release()
        go.wait()

    subject = engine(Script(before_run=hold), instances=2)
    threads = [threading.Thread(target=subject.run, args=(i, batch_of(some_rows(1 + i)))) for i in range(2)]
    for thread in threads:
        thread.start()
        arrived.acquire()
    go.set()
    for thread in threads:
        thread.join()
    assert [(run.number, run.instance, run.rows, run.concurrent) for run in subject.runs] == [
        (0, 0, 1, 1),
        (1, 1, 2, 2),
    ]


def test_an_instance_is_not_run_twice_at_once() -> None:
    problems: list[str] = []

    def intrude(number: int) -> None:
        if number == 0:
            try:
                subject.run(0, batch_of(some_rows(1)))
            except RuntimeFailure as error:
                problems.append(error.message)

    subject = engine(Script(before_run=intrude))
    subject.run(0, batch_of(some_rows(1)))
    assert problems == ["Instance 0 is busy or does not exist: the caller must not use it now."]


def test_a_model_that_does_not_batch_has_no_batch_axis() -> None:
    subject = engine(Script(max_batch_size=0))
    assert (subject.spec.max_batch_size, subject.spec.learned_batch_size) == (0, 0)
    assert subject.spec.inputs[0].shape == (4,)


def test_runtime_keeps_its_engines() -> None:
    runtime = FakeRuntime()
    loaded = runtime.load(request())
    assert runtime.engines == [loaded]
