"""What every ``server.runtime.base.Runtime`` owes the rest of the server, as tests to inherit.

Subclass ``RuntimeContract`` in a test module and implement ``case``. The model of the case has one input ``x`` and one
output ``y``, both FP32 [-1, 4], with ``y = 2 * x + 1``; it batches up to 64 rows, and refuses a row that starts with
``Case.refused``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from server.errors import InputRejected, ModelLoadError, RuntimeFailure
from server.runtime.base import Batch, Engine, LoadRequest, Runtime
from server.types import Buffer

WIDTH = 4
Rows = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True)
class Case:
    """A runtime, requests for its model, and one for a model that cannot be loaded."""

    runtime: Runtime
    #: Takes the number of instances.
    request: Callable[[int], LoadRequest]
    #: Makes the runtime fail its next load, and gives the request to fail with.
    broken: Callable[[], tuple[Runtime, LoadRequest]]
    refused: float


def expected(rows: Rows) -> Rows:
    return (rows * np.float32(2) + np.float32(1)).astype("<f4")


def some_rows(count: int, seed: int = 7) -> Rows:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype("<f4")


def batch_of(*members: Rows) -> Batch:
    rows = sum(len(member) for member in members)
    return Batch(rows, [(rows, WIDTH)], [[member.tobytes() for member in members]])


class RuntimeContract:
    def case(self, folder: Path) -> Case:
        raise NotImplementedError

    @pytest.fixture
    def subject(self, tmp_path: Path) -> Case:
        return self.case(tmp_path)

    @pytest.fixture
    def engine(self, subject: Case) -> Engine:
        return subject.runtime.load(subject.request(1))

    def test_engine_says_what_it_serves(self, subject: Case, engine: Engine) -> None:
        request = subject.request(1)
        assert (engine.spec.name, engine.spec.version) == (request.name, request.version)
        assert [(t.name, t.datatype, t.shape) for t in engine.spec.inputs] == [("x", "FP32", (-1, WIDTH))]
        assert [(t.name, t.datatype, t.shape) for t in engine.spec.outputs] == [("y", "FP32", (-1, WIDTH))]
        assert 1 <= engine.spec.learned_batch_size <= engine.spec.max_batch_size
        assert engine.instances == 1
        assert engine.run_ns > 0
        assert engine.memory_bytes >= 0

    def test_members_of_a_batch_are_answered_in_order(self, engine: Engine) -> None:
        members = [some_rows(count, seed=count) for count in (1, 3, 2)]
        (answer,) = engine.run(0, batch_of(*members))
        assert (answer.name, answer.datatype, answer.shape) == ("y", "FP32", (6, WIDTH))
        np.testing.assert_array_equal(answer.array(), expected(np.concatenate(members)))

    @pytest.mark.parametrize("rows", [1, 2, 5, 64])
    def test_any_number_of_rows(self, engine: Engine, rows: int) -> None:
        values = some_rows(rows)
        np.testing.assert_array_equal(engine.run(0, batch_of(values))[0].array(), expected(values))

    @pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
    def test_parts_are_any_buffer_at_any_address(self, engine: Engine, wrap: Callable[[bytes], Buffer]) -> None:
        values = some_rows(2)
        shifted = memoryview(b"\0" + values.tobytes())[1:]
        half = shifted.nbytes // 2
        joined = engine.run(0, Batch(2, [(2, WIDTH)], [[wrap(bytes(shifted[:half])), shifted[half:]]]))
        whole = engine.run(0, Batch(2, [(2, WIDTH)], [[shifted]]))
        typed = engine.run(0, Batch(2, [(2, WIDTH)], [[memoryview(values)]]))
        for (answer,) in (joined, whole, typed):
            np.testing.assert_array_equal(answer.array(), expected(values))

    def test_answers_belong_to_the_caller(self, engine: Engine) -> None:
        first, second = some_rows(3, seed=1), some_rows(3, seed=2)
        (answer,) = engine.run(0, batch_of(first))
        engine.run(0, batch_of(second))
        np.testing.assert_array_equal(answer.array(), expected(first))

    def test_input_is_left_as_it_was(self, engine: Engine) -> None:
        content = bytearray(some_rows(2).tobytes())
        before = bytes(content)
        engine.run(0, Batch(2, [(2, WIDTH)], [[content]]))
        assert bytes(content) == before

    def test_instances_run_at_once_without_mixing(self, subject: Case) -> None:
        engine = subject.runtime.load(subject.request(3))
        assert engine.instances == 3
        start = threading.Barrier(3)
        wrong: list[str] = []

        def work(instance: int) -> None:
            start.wait()
            for turn in range(40):
                values = some_rows(1 + turn % 5, seed=1000 * instance + turn)
                try:
                    same = np.array_equal(engine.run(instance, batch_of(values))[0].array(), expected(values))
                except Exception as error:
                    wrong.append(repr(error))
                else:
                    wrong.extend([] if same else [f"instance {instance}, turn {turn}"])

        threads = [threading.Thread(target=work, args=(instance,)) for instance in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_a_refused_row_fails_its_batch_and_leaves_the_engine_usable(self, subject: Case, engine: Engine) -> None:
        good, bad = some_rows(2), some_rows(1)
        bad[0, 0] = subject.refused
        with pytest.raises(InputRejected) as caught:
            engine.run(0, batch_of(good, bad))
        assert "/" not in caught.value.message
        np.testing.assert_array_equal(engine.run(0, batch_of(good))[0].array(), expected(good))

    def test_a_batch_of_the_wrong_size_is_an_error_and_not_an_answer(self, engine: Engine) -> None:
        values = some_rows(2)
        with pytest.raises(RuntimeFailure):
            engine.run(0, Batch(2, [(2, WIDTH)], [[values.tobytes()[:-4]]]))
        np.testing.assert_array_equal(engine.run(0, batch_of(values))[0].array(), expected(values))

    def test_close_may_be_repeated_and_ends_running(self, engine: Engine) -> None:
        engine.close()
        engine.close()
        with pytest.raises(RuntimeFailure):
            engine.run(0, batch_of(some_rows(1)))

    def test_a_version_that_cannot_load_says_why_in_one_sentence(self, subject: Case, tmp_path: Path) -> None:
        runtime, request = subject.broken()
        with pytest.raises(ModelLoadError) as caught:
            runtime.load(request)
        assert caught.value.message.endswith(".")
        assert "\n" not in caught.value.message
        assert str(tmp_path) not in caught.value.message

    def test_describe_tells_library_and_providers(self, subject: Case) -> None:
        facts = subject.runtime.describe()
        assert facts["library"]
        assert "cpu" in facts["providers_working"]  # type: ignore[operator]
        assert set(facts["providers_working"]) <= set(facts["providers_compiled"])  # type: ignore[call-overload]
