"""Golden requests: what their files may say, and when a version disagrees with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from server.errors import ModelLoadError, RuntimeFailure
from server.golden import GoldenCase, load_golden, run_golden
from server.runtime.base import BatchingOptions, Engine, LoadRequest, ModelOptions
from server.runtime.fake import FakeEngine, Script
from server.runtime.onnx import OnnxRuntime
from tests.support import models
from tests.support.v2 import tensor

PLAIN = BatchingOptions()
X, Y = tensor("x", "FP32", [1, 4], [1, 2, 3, 4]), tensor("y", "FP32", [1, 4], [3, 5, 7, 9])


def fake(**script: Any) -> FakeEngine:
    """Answers ``2 x + 1``."""
    return FakeEngine(LoadRequest("m", "1", Path("m"), ModelOptions()), Script(**script))


def written(path: Path, *requests: Any) -> Path:
    path.write_text(json.dumps({"requests": list(requests)}))
    return path


def cases(path: Path, *requests: Any) -> tuple[GoldenCase, ...]:
    return load_golden(written(path / "golden.json", *requests))


def request(wanted: list[Any], **more: Any) -> dict[str, Any]:
    return {"inputs": [X], "outputs": [{**Y, "data": wanted}], **more}


def loaded(path: Path, options: ModelOptions | None = None) -> Engine:
    return OnnxRuntime().load(LoadRequest("m", "1", path, options or ModelOptions(), path.parent))


# --- answers ---


def test_right_answers_agree_within_tolerance(tmp_path: Path) -> None:
    engine = fake()
    right = cases(tmp_path, request([3, 5, 7, 9]), request([3.5, 5, 7, 9], abs_tol=0.5, rel_tol=0))
    assert run_golden(engine, right, PLAIN) == ""
    assert len(engine.runs) == 2


def test_the_first_disagreement_is_named(tmp_path: Path) -> None:
    wrong = cases(tmp_path, request([3, 5, 7, 9]), request([3, 5.5, 7, 8.5]), request([0, 0, 0, 0]))
    assert run_golden(fake(), wrong, PLAIN) == (
        "golden request 2: output 'y' at [0,1] should be 5.5, got 5, and 1 more of 4 values differ"
    )


def test_tolerances_are_what_decides(tmp_path: Path) -> None:
    def verdict(**tolerance: float) -> str:
        return run_golden(fake(), cases(tmp_path, request([3, 5, 7, 10], **tolerance)), PLAIN)

    assert verdict(abs_tol=1, rel_tol=0) == verdict(abs_tol=0, rel_tol=0.1) == ""
    assert "should be 10, got 9" in verdict(abs_tol=0.9, rel_tol=0)
    assert "should be 10, got 9" in verdict(abs_tol=0, rel_tol=0.09)
    assert "should be 10, got 9" in verdict()


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (tensor("z", "FP32", [1, 4], [3, 5, 7, 9]), "output 'z' is not among those of the model, 'y'"),
        (tensor("y", "FP64", [1, 4], [3, 5, 7, 9]), "output 'y' should be FP64[1,4], got FP32[1,4]"),
        (tensor("y", "FP32", [4], [3, 5, 7, 9]), "output 'y' should be FP32[4], got FP32[1,4]"),
    ],
)
def test_an_output_of_another_kind_disagrees(tmp_path: Path, output: Any, sentence: str) -> None:
    wrong = cases(tmp_path, {"inputs": [X], "outputs": [output]})
    assert run_golden(fake(), wrong, PLAIN) == f"golden request 1: {sentence}"


def test_a_request_that_does_not_fit_or_fails_disagrees(tmp_path: Path) -> None:
    misfit = cases(tmp_path, {"inputs": [tensor("x", "FP32", [1, 3], [1, 2, 3])], "outputs": [Y]})
    assert "golden request 1: unexpected shape for input 'x'" in run_golden(fake(), misfit, PLAIN)
    right = cases(tmp_path, request([3, 5, 7, 9]), request([3, 5, 7, 9]))
    failing = fake(faults={1: RuntimeFailure("the kernel gave up")})
    assert run_golden(failing, right, PLAIN) == "golden request 2: the kernel gave up"


@pytest.mark.parametrize(
    ("datatype", "right", "wrong"),
    [
        ("FP32", ["NaN", "Infinity", "-Infinity", 1.5], ["NaN", "Infinity", "Infinity", 1.5]),
        ("FP16", ["NaN", 2.0, 0.0, 1.5], [0.0, 2.0, 0.0, 1.5]),
        ("BF16", ["NaN", 2.0, 0.0, 1.5], ["NaN", 2.0, 0.5, 1.5]),
        ("FP64", [1e300, 2.0, 0.0, 1.5], [1e299, 2.0, 0.0, 1.5]),
        ("INT64", [2**63 - 1, 0, -1, 7], [2**63 - 2, 0, -1, 7]),
        ("UINT64", [2**64 - 1, 0, 1, 7], [2**64 - 2, 0, 1, 7]),
        ("UINT8", [255, 0, 1, 7], [255, 0, 1, 8]),
        ("BOOL", [True, False, True, True], [True, False, True, False]),
        ("BYTES", ["a", "", "ü", "x\u0000"], ["a", "", "u", "x\u0000"]),
    ],
)
def test_every_datatype_is_compared(tmp_path: Path, datatype: str, right: list[Any], wrong: list[Any]) -> None:
    engine = loaded(models.identity(tmp_path / "m.onnx", datatype))
    try:
        for wanted, agrees in ((right, True), (wrong, False)):
            path = tmp_path / "golden.json"
            tensors = (tensor("x", datatype, [1, 4], right), tensor("y", datatype, [1, 4], wanted))
            text = json.dumps({"requests": [{"inputs": [tensors[0]], "outputs": [tensors[1]]}]})
            for literal in ("NaN", "Infinity", "-Infinity"):
                text = text.replace(f'"{literal}"', literal)
            path.write_text(text)
            found = run_golden(engine, load_golden(path), PLAIN)
            assert found.startswith("golden request 1: output 'y' at [0,") != agrees, found
    finally:
        engine.close()


def test_one_value_says_what_was_wanted_and_got(tmp_path: Path) -> None:
    engine = loaded(models.identity(tmp_path / "m.onnx", "BYTES", width=1))
    asked = {"inputs": [tensor("x", "BYTES", [1, 1], ["cat"])], "outputs": [tensor("y", "BYTES", [1, 1], ["dog"])]}
    try:
        found = run_golden(engine, cases(tmp_path, asked), PLAIN)
    finally:
        engine.close()
    assert found == "golden request 1: output 'y' at [0,0] should be b'dog', got b'cat'"


# --- files ---


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "golden.json: wanted JSON: "),
        ("[" * 200_000, "golden.json: wanted JSON: "),
        ("[]", 'golden.json: wanted {"requests": [...]} and no other key'),
        ('{"requests": [], "more": 1}', 'golden.json: wanted {"requests": [...]} and no other key'),
        ('{"requests": []}', "golden.json: wanted 1 to 1000 requests, got 0"),
        (json.dumps({"requests": [0] * 1001}), "golden.json: wanted 1 to 1000 requests, got 1001"),
        ('{"requests": [1]}', "golden.json: golden request 1: wanted an object with inputs and outputs"),
        (json.dumps({"requests": [request([1], tol=1)]}), "golden.json: golden request 1: unknown key 'tol'"),
        (json.dumps({"requests": [request([1, 2])]}), "golden.json: golden request 1, outputs: "),
        (
            json.dumps({"requests": [request([3, 5, 7, 9]), {"inputs": [{}], "outputs": [Y]}]}),
            "golden.json: golden request 2, inputs: ",
        ),
        (
            json.dumps({"requests": [request([3, 5, 7, 9], abs_tol=-1)]}),
            "golden.json: golden request 1: abs_tol must be a number from 0, got -1",
        ),
        (
            json.dumps({"requests": [request([3, 5, 7, 9], rel_tol=True)]}),
            "golden.json: golden request 1: rel_tol must be a number from 0, got True",
        ),
        (
            json.dumps({"requests": [request([3, 5, 7, 9], rel_tol=float("nan"))]}),
            "golden.json: golden request 1: rel_tol must be a number from 0, got nan",
        ),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "golden.json"
    path.write_text(text)
    with pytest.raises(ModelLoadError) as caught:
        load_golden(path)
    assert caught.value.message.startswith(sentence)


def test_only_a_regular_file_of_bounded_size_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"golden.json: golden requests cannot be read: No such file"):
        load_golden(tmp_path / "golden.json")
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(ModelLoadError, match=rf"{path.name}: (wanted a regular file|.*cannot be read)"):
            load_golden(path)
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(64 * 1024 * 1024 + 1)
    with pytest.raises(ModelLoadError, match=r"large.json: is over 67108864 bytes"):
        load_golden(large)
