from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import structlog
from skl2onnx import to_onnx
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.naive_bayes import GaussianNB

from server.errors import ModelLoadError, RuntimeFailure
from server.runtime.base import (
    Batch,
    BatchingOptions,
    DeclaredTensor,
    LoadRequest,
    ModelOptions,
    Provider,
    WarmupInput,
    WarmupSample,
)
from server.runtime.onnx import OnnxEngine, OnnxRuntime, allocate_from
from tests.contracts.runtime_contract import Case, RuntimeContract, batch_of, some_rows
from tests.unit.runtime.graphs import (
    BFLOAT16,
    FLOAT,
    INT64,
    STRING,
    affine,
    constant,
    node,
    save,
    unary,
)


def load(path: Path, budget_s: float = 0, state: Path | None = None, **options: Any) -> OnnxEngine:
    request = LoadRequest("m", "1", path, ModelOptions(**options), folder=path.parent, state_dir=state)
    return OnnxRuntime(measure_budget_s=budget_s).load(request)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(path, **options)
    assert str(path.parent) not in caught.value.message
    assert caught.value.message.endswith(".")
    return caught.value.message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


class TestContract(RuntimeContract):
    def case(self, folder: Path) -> Case:
        runtime = OnnxRuntime(measure_budget_s=0.05)
        path = affine(folder / "model.onnx")

        def request(instances: int) -> LoadRequest:
            return LoadRequest("affine", "3", path, ModelOptions(instances=instances))

        def broken() -> tuple[OnnxRuntime, LoadRequest]:
            corrupt = folder / "corrupt.onnx"
            corrupt.write_bytes(path.read_bytes()[:100])
            return runtime, LoadRequest("affine", "3", corrupt, ModelOptions())

        return Case(runtime, request, broken, refused=-7.0)


# --- files that are no models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"hello world", b"\0" * 100_000, os.urandom(5000), b"{}", b"PK\x03\x04"])
def test_what_is_not_onnx_is_refused_by_file_name(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert refusal(path).startswith("model.onnx ")


def test_a_truncated_model_is_refused(path: Path) -> None:
    affine(path)
    content = path.read_bytes()
    for end in (1, len(content) // 3, len(content) - 1):
        path.write_bytes(content[:end])
        assert "model.onnx cannot be loaded" in refusal(path)


def test_an_unknown_operator_or_version_says_which(path: Path) -> None:
    assert "NoSuchOp" in refusal(unary(path, "NoSuchOp"))
    relu = unary(path, "Relu")
    model = onnx.load(str(relu))
    model.opset_import[0].version = 99
    path.write_bytes(model.SerializeToString())
    assert f"needs opset 99 of ai.onnx, onnxruntime {ort.__version__} takes at most" in refusal(path)
    model.opset_import[0].version = 17
    model.ir_version = 99
    path.write_bytes(model.SerializeToString())
    assert f"has IR version 99, onnxruntime {ort.__version__} takes at most" in refusal(path)


def test_external_data_is_loaded_from_the_models_folder_only(path: Path) -> None:
    save(
        path,
        [node("Add", ["x", "w"], ["y"])],
        [("x", FLOAT, ("N", 4))],
        [("y", FLOAT, ("N", 4))],
        [constant("w", np.arange(4))],
    )
    onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    assert load(path).run(0, batch_of(np.zeros((1, 4), "<f4")))[0].array().tolist() == [[0, 1, 2, 3]]
    (path.parent / "w.bin").rename(path.parent.parent / "w.bin")
    assert refusal(path) == "External data 'w.bin' of tensor 'w' does not exist."


# --- signature and batching --------------------------------------------------------------------------------------


def test_bare_models_that_batch_are_recognised_and_named_by_their_digest(path: Path) -> None:
    engine = load(affine(path))
    assert (engine.spec.max_batch_size, engine.spec.learned_batch_size, engine.spec.batching_note) == (64, 64, "")
    assert len(engine.spec.digest) == 64
    assert engine.spec.platform == "onnxruntime_onnx"
    assert engine.run_ns > 0


def stateful(path: Path) -> Path:
    nodes = [node("Neg", ["x"], ["y"]), node("Neg", ["state"], ["next"])]
    inputs = [("x", FLOAT, ("N", 4)), ("state", FLOAT, (2, "N", 3))]
    return save(path, nodes, inputs, [("y", FLOAT, ("N", 4)), ("next", FLOAT, (2, "N", 3))])


def reduction(path: Path) -> Path:
    return save(path, [node("ReduceSum", ["x"], ["y"])], [("x", FLOAT, ("N", 4))], [("y", FLOAT, (None, None))])


def sorting(path: Path) -> Path:
    nodes = [node("Shape", ["x"], ["s"], end=1), node("TopK", ["x", "s"], ["y", "i"], axis=0)]
    return save(path, nodes, [("x", FLOAT, ("N", 4))], [("y", FLOAT, ("N", 4)), ("i", INT64, ("N", 4))])


def scalar_beside(path: Path) -> Path:
    inputs = [("x", FLOAT, ("N", 4)), ("rate", FLOAT, ())]
    return save(path, [node("Mul", ["x", "rate"], ["y"])], inputs, [("y", FLOAT, ("N", 4))])


def fixed(path: Path) -> Path:
    return unary(path, "Relu", FLOAT, (1, 4))


def centring(path: Path) -> Path:
    nodes = [node("ReduceMean", ["x", "rows"], ["m"]), node("Sub", ["x", "m"], ["y"])]
    return save(path, nodes, [("x", FLOAT, ("N", 4))], [("y", FLOAT, ("N", 4))], [constant("rows", [0], "i8")])


def noisy(path: Path) -> Path:
    return unary(path, "RandomNormalLike")


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (stateful, "the first dimension of input 'state' is fixed to 2"),
        (scalar_beside, "input 'rate' is a scalar"),
        (fixed, "the first dimension of input 'x' is fixed to 1"),
        (reduction, "the first dimension of output 'y' is fixed to 1"),
        (sorting, "output 'y' of 2 rows together differs from the same rows alone"),
        (centring, "output 'y' of 2 rows together differs from the same rows alone"),
        (noisy, "output 'y' of 2 rows together differs from the same rows alone"),
    ],
)
def test_models_whose_rows_must_not_meet(path: Path, build: Any, why: str) -> None:
    spec = load(build(path)).spec
    assert (spec.max_batch_size, spec.learned_batch_size) == (0, 0)
    assert spec.batching_note == f"the model does not batch: {why}"


@pytest.mark.parametrize("build", [sorting, centring, reduction])
def test_declared_batching_that_fails_its_proof_serves_requests_alone(path: Path, build: Any) -> None:
    engine = load(build(path), max_batch_size=8)
    assert (engine.spec.max_batch_size, engine.spec.learned_batch_size) == (8, 1)
    assert engine.spec.batching_note.startswith("rows are never gathered: output 'y' of 2 rows ")
    assert engine.run(0, batch_of(some_rows(5)))[0].array().size


def test_rows_alone_still_give_the_models_own_answer(path: Path) -> None:
    rows = some_rows(6)
    (values, _) = load(sorting(path), max_batch_size=8).run(0, batch_of(rows))
    np.testing.assert_array_equal(values.array(), np.sort(rows, axis=0)[::-1])


def test_a_declared_mismatch_names_wanted_and_got(path: Path) -> None:
    affine(path)
    wrong = (DeclaredTensor("x", "FP32", (5,)),)
    assert refusal(path, max_batch_size=8, inputs=wrong) == "Input 'x': dims [5] are declared, the graph has [4]."


def test_an_output_that_v2_cannot_carry_is_left_out(path: Path) -> None:
    nodes = [node("Neg", ["x"], ["y"]), node("SequenceConstruct", ["x"], ["s"])]
    save(path, nodes, [("x", FLOAT, ("N", 4))], [("y", FLOAT, ("N", 4))])
    model = onnx.load(str(path))
    model.graph.output.append(onnx.helper.make_tensor_sequence_value_info("s", FLOAT, None))
    path.write_bytes(model.SerializeToString())
    engine = load(path)
    assert [output.name for output in engine.spec.outputs] == ["y"]
    assert "output 's' has type seq(tensor(float)), which cannot be served: left out" in engine.spec.batching_note
    assert len(engine.run(0, batch_of(some_rows(2)))) == 1


def test_tables_bound_the_ids_that_are_tried(path: Path) -> None:
    table = constant("table", np.arange(6).reshape(2, 3))
    save(
        path,
        [node("Gather", ["table", "x"], ["y"])],
        [("x", INT64, ("N", "L"))],
        [("y", FLOAT, ("N", "L", 3))],
        [table],
    )
    assert load(path).spec.learned_batch_size == 64


def test_a_model_that_takes_no_made_up_input_loads_unbatched_and_is_taken_for_slow(path: Path) -> None:
    nodes = [node("Add", ["x", "far"], ["i"]), node("Gather", ["table", "i"], ["y"])]
    constants = [constant("far", -100, "i8"), constant("table", [5.0, 6.0])]
    engine = load(save(path, nodes, [("x", INT64, ("N", 1))], [("y", FLOAT, ("N", 1))], constants))
    assert engine.spec.max_batch_size == 0
    assert "takes no made-up input" in engine.spec.batching_note
    assert engine.run_ns == 10_000_000
    (answer,) = engine.run(0, Batch(1, [(2, 1)], [[np.array([100, 101], "<i8").tobytes()]]))
    assert answer.array().tolist() == [[5.0], [6.0]]


def test_strings_batch_too(path: Path) -> None:
    engine = load(unary(path, "Identity", STRING, ("N", 1)))
    assert engine.spec.learned_batch_size == 64
    (answer,) = engine.run(0, Batch(3, [(3, 1)], [[[b"a"], [b"b", b"c"]]]))
    assert (answer.shape, answer.data) == ((3, 1), [b"a", b"b", b"c"])


def test_bfloat16_batches_too(path: Path) -> None:
    assert load(unary(path, "Identity", BFLOAT16, ("N", 3))).spec.learned_batch_size == 64


@pytest.mark.parametrize("model", [GaussianNB(), RandomForestClassifier(20, random_state=0)])
def test_classifiers_batch_and_agree_with_their_makers(path: Path, model: Any) -> None:
    digits = load_digits()
    pixels = digits.data.astype("<f4") / 16
    model.fit(pixels, digits.target)
    path.write_bytes(to_onnx(model, pixels[:1], options={"zipmap": False}, target_opset=18).SerializeToString())
    engine = load(path, budget_s=0.2)
    assert engine.spec.batching_note == ""
    assert engine.spec.learned_batch_size > 1
    label, probability = engine.run(0, Batch(40, [(40, 64)], [[row.tobytes() for row in pixels[:40]]]))
    np.testing.assert_array_equal(label.array(), model.predict(pixels[:40]))
    np.testing.assert_allclose(probability.array(), model.predict_proba(pixels[:40]), atol=1e-5)


def test_labels_come_from_the_models_folder(path: Path) -> None:
    affine(path)
    (path.parent / "labels.txt").write_text("cat\ndog\nfün\n", encoding="utf-8")
    assert load(path, outputs=(DeclaredTensor("y", label_filename="labels.txt"),)).spec.outputs[0].labels == (
        "cat",
        "dog",
        "fün",
    )
    for name in ("absent.txt", "../labels.txt", "/etc/hostname"):
        assert refusal(path, outputs=(DeclaredTensor("y", label_filename=name),)).startswith("There is no label file")
    (path.parent / "labels.txt").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refusal(path, outputs=(DeclaredTensor("y", label_filename="labels.txt"),))


# --- learning and warm-up ----------------------------------------------------------------------------------------


def test_what_is_learned_is_kept_beside_the_digest(path: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = load(affine(path), 0.1, state)
    (file,) = (state / "learned").iterdir()
    assert file.name.startswith(first.spec.digest[:40])
    written = file.stat().st_mtime_ns
    assert load(path, 0.1, state).spec.learned_batch_size == first.spec.learned_batch_size
    assert file.stat().st_mtime_ns == written
    load(path, 0.1, state, intra_op_threads=2)
    assert len(list((state / "learned").iterdir())) == 2


def test_the_operator_sets_the_rows_gathered(path: Path) -> None:
    affine(path)
    assert load(path, batching=BatchingOptions(max_rows=5)).spec.learned_batch_size == 5
    assert load(path, batching=BatchingOptions(enabled=False)).spec.learned_batch_size == 1


@pytest.mark.parametrize(
    ("options", "lowered"),
    [
        ({"batching": BatchingOptions(max_rows=65)}, [(65, 64)]),
        ({"batching": BatchingOptions(max_rows=64)}, []),
        ({"batching": BatchingOptions(max_rows=9), "max_batch_size": 8}, [(9, 8)]),
        ({"batching": BatchingOptions(max_rows=65), "max_batch_size": 65}, []),
        ({"batching": BatchingOptions(max_rows=65), "max_batch_size": 0}, []),
        ({"batching": BatchingOptions(max_rows=65, enabled=False)}, []),
        ({}, []),
    ],
)
def test_rows_over_the_largest_batch_are_lowered_with_a_line_in_the_log(
    path: Path, options: dict[str, Any], lowered: list[tuple[int, int]]
) -> None:
    affine(path)
    with structlog.testing.capture_logs() as logs:
        spec = load(path, **options).spec
    found = [line for line in logs if line["event"] == "max_rows_lowered"]
    assert [(line["wanted"], line["used"]) for line in found] == lowered
    assert all((line["model"], line["version"], line["log_level"]) == ("m", "1", "warning") for line in found)
    assert all(spec.learned_batch_size == used for _, used in lowered)


def test_warm_up_samples_are_run_and_may_fail_the_load(path: Path) -> None:
    affine(path)
    (path.parent / "warmup").mkdir()
    (path.parent / "warmup" / "bad").write_bytes(np.array([-7, 0, 0, 0], "<f4").tobytes())

    def sample(source: str) -> tuple[WarmupSample, ...]:
        return (WarmupSample("w", 2, {"x": WarmupInput("FP32", (4,), source)}),)

    assert load(path, warmup=sample("random")).spec.batching_note == ""
    assert "Warm-up sample 'w' failed: The model refused this input: Gather node 'lookup'" in refusal(
        path, warmup=sample("bad")
    )


# --- sessions ----------------------------------------------------------------------------------------------------


def test_a_provider_that_does_not_work_is_an_error_unless_falling_back_is_declared(path: Path) -> None:
    affine(path)
    working = OnnxRuntime().describe()["providers_working"]
    for name in {"cuda", "tensorrt"} - set(working):  # type: ignore[call-overload]
        wanted = (Provider(name),)
        assert refusal(path, providers=wanted).startswith(f"Execution provider {name} is wanted but does not work here")
        engine = load(path, providers=wanted, allow_provider_fallback=True)
        assert f"execution provider {name} does not work here" in engine.spec.batching_note
        assert engine.run(0, batch_of(some_rows(1)))
    assert "Unknown execution provider 'npu'" in refusal(path, providers=(Provider("npu"),))


def test_session_settings_reach_the_session(path: Path, tmp_path: Path) -> None:
    nodes = [node("Neg", ["x"], ["a"]), node("Neg", ["a"], ["y"])]
    save(path, nodes, [("x", FLOAT, ("N", 4))], [("y", FLOAT, ("N", 4))])
    # A value that the session cannot read fails the load: proof that the entry arrived.
    config = (("session.intra_op_thread_affinities", "not a list"),)
    assert "model.onnx cannot be loaded" in refusal(path, session_config=config, intra_op_threads=2)
    rows = some_rows(3)
    for options in (
        {"graph_optimization": "disable"},
        {"parallel_execution": True, "inter_op_threads": 2},
        {"intra_op_threads": 2, "allow_spinning": True},
    ):
        np.testing.assert_array_equal(load(path, **options).run(0, batch_of(rows))[0].array(), rows)
    assert "Unknown graph optimization 'most'" in refusal(path, graph_optimization="most")


def test_a_graph_that_changes_the_number_of_rows_gives_no_answer_for_several(path: Path) -> None:
    # Made-up floats are never negative, so the proof cannot see that this graph drops rows.
    nodes = [
        node("Gather", ["x", "zero"], ["first"], axis=1),
        node("GreaterOrEqual", ["first", "bound"], ["keep"]),
        node("Compress", ["x", "keep"], ["y"], axis=0),
    ]
    constants = [constant("zero", 0, "i8"), constant("bound", 0.0)]
    engine = load(save(path, nodes, [("x", FLOAT, ("N", 4))], [("y", FLOAT, (None, 4))], constants))
    rows = np.abs(some_rows(3))
    np.testing.assert_array_equal(engine.run(0, batch_of(rows))[0].array(), rows)
    rows[1] *= -1
    with pytest.raises(RuntimeFailure, match=r"Output 'y' has shape \[2, 4\] for a batch of 3 rows"):
        engine.run(0, batch_of(rows))


def test_describe_gives_a_reason_for_each_provider_that_fails() -> None:
    facts = OnnxRuntime().describe()
    failing = facts["providers_failing"]
    assert isinstance(failing, dict)
    assert all(failing.values())
    assert set(failing).isdisjoint(facts["providers_working"])  # type: ignore[arg-type]


def test_memory_from_a_runtime_allocator_is_aligned_and_outlives_its_value() -> None:
    import onnxruntime as ort

    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(info, None)
    blocks = [allocate_from(info, 1000) for _ in range(20)]
    for index, block in enumerate(blocks):
        block[:] = index
    assert all(block.ctypes.data % 64 == 0 and set(block.tolist()) == {i} for i, block in enumerate(blocks))


# --- machines with a CUDA device ---------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cuda_answers_change_with_the_input_on_every_instance(path: Path) -> None:
    affine(path)
    engine = load(path, providers=(Provider("cuda"),), instances=2, device_ids=(0,))
    for seed in range(5):
        rows = some_rows(3, seed)
        for instance in range(2):
            np.testing.assert_allclose(engine.run(instance, batch_of(rows))[0].array(), rows * 2 + 1, rtol=1e-6)


@pytest.mark.gpu
def test_cuda_memory_is_an_error_of_the_batch(path: Path) -> None:
    from server.errors import OutOfMemory

    nodes = [node("Expand", ["one", "size"], ["y"])]
    save(path, nodes, [("size", INT64, ("R",))], [("y", FLOAT, None)], [constant("one", [1])])
    engine = load(path, providers=(Provider("cuda"),), max_batch_size=0)

    def size(*dims: int) -> Batch:
        return Batch(1, [(len(dims),)], [[np.array(dims, "<i8").tobytes()]])

    with pytest.raises(OutOfMemory):
        engine.run(0, size(2**44))
    assert engine.run(0, size(3))[0].shape == (3,)


@pytest.mark.gpu
def test_tensorrt_engines_are_kept_by_digest(path: Path, tmp_path: Path) -> None:
    if "tensorrt" not in OnnxRuntime().describe()["providers_working"]:  # type: ignore[operator]
        pytest.skip("no TensorRT here")
    state = tmp_path / "state"
    engine = load(affine(path), state=state, providers=(Provider("tensorrt"),))
    assert any((state / "tensorrt" / engine.spec.digest).iterdir())
