from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from server.admission import Admission, admit
from server.runtime.base import DeclaredTensor, LoadRequest, ModelOptions, WarmupInput, WarmupSample
from server.runtime.onnx import OnnxEngine, OnnxRuntime
from server.types import ModelSpec, TensorSpec
from tests.unit.runtime.graphs import BFLOAT16, DOUBLE, FLOAT, FLOAT16, INT64, affine, constant, node, save, unary


def load(path: Path, **options: Any) -> OnnxEngine:
    request = LoadRequest("m", "7", path, ModelOptions(**options), folder=path.parent)
    return OnnxRuntime(measure_budget_s=0).load(request)


def judge(
    path: Path,
    *,
    warmup: tuple[WarmupSample, ...] = (),
    advisory: bool = False,
    options: dict[str, Any] | None = None,
    **specs: Any,
) -> Admission:
    engine = load(path, **(options or {}))
    try:
        return admit(engine, engine.inspection, warmup=warmup, folder=path.parent, advisory=advisory, **specs)
    finally:
        engine.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


@pytest.fixture
def two_by_two(path: Path) -> Path:
    """``p, q = a + b, a - b`` over FP32 [N, 4]."""
    return save(
        path,
        [node("Add", ["a", "b"], ["p"]), node("Sub", ["a", "b"], ["q"])],
        [(name, FLOAT, ("N", 4)) for name in "ab"],
        [(name, FLOAT, ("N", 4)) for name in "pq"],
    )


def tensor(name: str, datatype: str = "FP32", shape: Sequence[int] = (-1, 4), optional: bool = False) -> TensorSpec:
    return TensorSpec(name, datatype, tuple(shape), optional)


FITTING = ModelSpec("m", "6", (tensor("a"), tensor("b")), (tensor("p"), tensor("q")))


def with_input(spec: ModelSpec, changed: TensorSpec) -> ModelSpec:
    return replace(spec, inputs=tuple(changed if t.name == changed.name else t for t in spec.inputs))


def with_output(spec: ModelSpec, changed: TensorSpec) -> ModelSpec:
    return replace(spec, outputs=tuple(changed if t.name == changed.name else t for t in spec.outputs))


# --- the report ------------------------------------------------------------------------------------------------------


def test_a_version_that_passes_is_reported_whole(two_by_two: Path) -> None:
    verdict = judge(two_by_two, declared_signature=FITTING, champion=FITTING)
    assert verdict.admitted
    assert verdict.refusal == ""
    report = verdict.report
    assert (report.model, report.version, report.batch) == ("m", "7", 64)
    assert len(report.digest) == 64
    assert report.run_ns > 0
    assert report.memory_bytes >= 0
    assert [(check.name, check.ok) for check in report.checks] == [
        ("files", True),
        ("signature", True),
        ("champion", True),
        ("finite", True),
        ("batch", True),
    ]
    assert all(check.detail.endswith(".") for check in report.checks)


def test_the_report_is_plain_json(two_by_two: Path) -> None:
    verdict = judge(two_by_two)
    plain = json.loads(json.dumps(verdict.report.to_json()))
    assert plain["digest"] == verdict.report.digest
    assert plain["checks"][0] == {
        "name": "files",
        "ok": True,
        "detail": f"1 files, {two_by_two.stat().st_size} bytes in all.",
    }


def test_why_rows_are_not_gathered_is_in_the_report(path: Path) -> None:
    nodes = [node("ReduceMean", ["x", "axis"], ["m"]), node("Sub", ["x", "m"], ["y"])]
    save(path, nodes, [("x", FLOAT, ("N", 4))], [("y", FLOAT, ("N", 4))], [constant("axis", [0], "i8")])
    verdict = judge(path)
    batch = verdict.report.checks[-1]
    assert verdict.report.batch == 0
    assert batch.detail.startswith("Rows are not gathered: the model does not batch: ")


def test_an_inspection_of_other_files_does_not_admit(two_by_two: Path) -> None:
    engine = load(two_by_two)
    other = replace(engine.inspection, digest="0" * 64)
    assert admit(engine, other).refusal == (
        f"The model was loaded from digest {engine.spec.digest[:12]}, inspected was 000000000000."
    )


def test_as_advice_nothing_refuses_and_everything_is_reported(two_by_two: Path) -> None:
    wrong = with_input(FITTING, tensor("a", "INT64"))
    verdict = judge(two_by_two, declared_signature=wrong, advisory=True)
    assert verdict.admitted
    assert [check.name for check in verdict.report.checks if not check.ok] == ["signature"]


# --- the declared signature ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        (
            with_input(FITTING, tensor("a", "INT64")),
            "Input 'a' is declared as INT64[-1, 4], this version has FP32[-1, 4].",
        ),
        (
            with_input(FITTING, tensor("b", shape=(-1, 5))),
            "Input 'b' is declared as FP32[-1, 5], this version has FP32[-1, 4].",
        ),
        (
            with_output(FITTING, tensor("q", shape=(4,))),
            "Output 'q' is declared as FP32[4], this version has FP32[-1, 4].",
        ),
        (
            replace(FITTING, inputs=(*FITTING.inputs, tensor("c"))),
            "Input 'c', which is declared, is missing: this version has 'a', 'b'.",
        ),
        (replace(FITTING, inputs=FITTING.inputs[:1]), "Input 'b' of the model is not declared."),
        (replace(FITTING, outputs=FITTING.outputs[1:]), "Output 'p' of the model is not declared."),
    ],
)
def test_a_signature_other_than_declared(two_by_two: Path, declared: ModelSpec, sentence: str) -> None:
    assert judge(two_by_two, declared_signature=declared).refusal == sentence


@pytest.mark.parametrize("shape", [(-1, 4), (8, 4), (-1, -1)])
def test_free_dimensions_agree_with_any(two_by_two: Path, shape: tuple[int, ...]) -> None:
    assert judge(two_by_two, declared_signature=with_input(FITTING, tensor("a", shape=shape))).admitted


# --- the champion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("champion", "sentence"),
    [
        (
            with_input(FITTING, tensor("a", "FP16")),
            "Input 'a' of the champion is FP16[-1, 4], this version has FP32[-1, 4].",
        ),
        (
            with_input(FITTING, tensor("a", shape=(-1, 3))),
            "Input 'a' of the champion is FP32[-1, 3], this version has FP32[-1, 4].",
        ),
        (
            with_input(FITTING, tensor("a", shape=(-1, -1))),
            "Input 'a' of the champion is FP32[-1, -1], this version has FP32[-1, 4].",
        ),
        (
            with_output(FITTING, tensor("p", shape=(-1, 4, 1))),
            "Output 'p' of the champion is FP32[-1, 4, 1], this version has FP32[-1, 4].",
        ),
        (
            replace(FITTING, inputs=(tensor("x"), tensor("b"))),
            "Input 'x', which the champion has, is missing: this version has 'a', 'b'.",
        ),
        (
            replace(FITTING, inputs=FITTING.inputs[:1]),
            "Input 'b' is new, the champion has none of that name; a new input must be optional.",
        ),
        (replace(FITTING, outputs=FITTING.outputs[:1]), "Output 'q' is new, the champion has none of that name."),
        (
            with_input(FITTING, tensor("b", optional=True)),
            "Input 'b' is optional for the champion, this version requires it.",
        ),
    ],
)
def test_a_version_that_callers_of_the_champion_would_trip_over(
    two_by_two: Path, champion: ModelSpec, sentence: str
) -> None:
    assert judge(two_by_two, champion=champion).refusal == sentence


@pytest.mark.parametrize(
    "champion",
    [
        with_input(FITTING, tensor("a", shape=(8, 4))),
        with_output(FITTING, tensor("q", shape=(-1, -1))),
        with_output(FITTING, tensor("q", shape=(8, 4))),
        replace(FITTING, inputs=FITTING.inputs[::-1], outputs=FITTING.outputs[::-1]),
    ],
)
def test_a_version_that_takes_all_that_the_champion_takes(two_by_two: Path, champion: ModelSpec) -> None:
    assert judge(two_by_two, champion=champion).admitted


def test_a_new_input_may_be_optional(path: Path) -> None:
    save(
        path,
        [node("Mul", ["x", "scale"], ["y"])],
        [("x", FLOAT, ("N", 4)), ("scale", FLOAT, (1,))],
        [("y", FLOAT, ("N", 4))],
        [constant("scale", [2.0])],
    )
    champion = ModelSpec("m", "6", (tensor("x"),), (tensor("y"),))
    options = {"inputs": (DeclaredTensor("x"), DeclaredTensor("scale", optional=True))}
    assert [t.name for t in load(path, **options).spec.inputs if t.optional] == ["scale"]
    assert judge(path, champion=champion, options=options).admitted
    assert judge(path, declared_signature=champion, options=options).admitted


# --- finite answers --------------------------------------------------------------------------------------------------


def divided(path: Path, dtype: int, name: str) -> Path:
    """``y = x / 0`` in any floating datatype: infinite for what is not 0."""
    zero = onnx.TensorProto(name="zero", data_type=FLOAT, dims=[1], raw_data=bytes(4))
    nodes = [
        node("Cast", ["x"], ["f"], to=FLOAT),
        node("Div", ["f", "zero"], ["d"]),
        node("Cast", ["d"], ["y"], to=dtype),
    ]
    return save(path, nodes, [("x", dtype, ("N", 4))], [("y", dtype, ("N", 4))], [zero])


@pytest.mark.parametrize(("dtype", "name"), [(FLOAT, "FP32"), (FLOAT16, "FP16"), (DOUBLE, "FP64"), (BFLOAT16, "BF16")])
def test_infinite_answers_are_refused(path: Path, dtype: int, name: str) -> None:
    refusal = judge(divided(path, dtype, name)).refusal
    assert refusal == "Output 'y' holds 4 values that are NaN or infinite for made-up data of 1 rows."


def test_nan_is_refused(path: Path) -> None:
    nodes = [node("Sub", ["x", "x"], ["z"]), node("Div", ["z", "z"], ["y"])]
    save(path, nodes, [("x", FLOAT, ("N", 4))], [("y", FLOAT, ("N", 4))])
    assert "Output 'y' holds 4 values that are NaN" in judge(path).refusal


@pytest.mark.parametrize(
    "make", [affine, lambda path: unary(path, "Identity", INT64), lambda path: unary(path, "Identity", BFLOAT16)]
)
def test_finite_answers_pass(path: Path, make: Callable[[Path], Path]) -> None:
    assert judge(make(path)).admitted


def test_the_operators_samples_take_the_place_of_made_up_data(path: Path) -> None:
    """``log(x - 10)``: nothing made up is in its domain, the operator's sample is."""
    nodes = [node("Sub", ["x", "ten"], ["d"]), node("Log", ["d"], ["y"])]
    save(path, nodes, [("x", FLOAT, ("N", 4))], [("y", FLOAT, ("N", 4))], [constant("ten", 10.0)])
    (path.parent / "warmup").mkdir()
    (path.parent / "warmup" / "x").write_bytes(np.full(4, 11, "<f4").tobytes())
    sample = WarmupSample("real", 2, {"x": WarmupInput("FP32", (4,), "x")})
    assert "made-up data" in judge(path).refusal
    assert judge(path, warmup=(sample,)).admitted
    (path.parent / "warmup" / "x").write_bytes(np.full(4, 9, "<f4").tobytes())
    assert judge(path, warmup=(sample,)).refusal == (
        "Output 'y' holds 8 values that are NaN or infinite for warm-up sample 'real'."
    )


def test_a_sample_that_does_not_run_is_a_refusal(path: Path) -> None:
    missing = WarmupSample("gone", 1, {"x": WarmupInput("FP32", (4,), "nowhere")})
    assert judge(affine(path), warmup=(missing,)).refusal == (
        "Warm-up sample 'gone', input 'x': there is no file 'nowhere' in the model's warmup folder."
    )


def test_a_model_that_takes_nothing_made_up_is_admitted_with_a_note(path: Path) -> None:
    """Every index is out of range, whatever is drawn."""
    nodes = [node("Add", ["x", "far"], ["i"]), node("Gather", ["table", "i"], ["y"])]
    tables = [constant("far", [1000], "i8"), constant("table", [1.0, 2.0])]
    save(path, nodes, [("x", INT64, ("N", 1))], [("y", FLOAT, ("N", 1))], tables)
    verdict = judge(path)
    assert verdict.admitted
    assert "takes no made-up input" in next(c.detail for c in verdict.report.checks if c.name == "finite")
