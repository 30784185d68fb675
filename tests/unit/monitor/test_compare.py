"""monitor.compare and its kernels: against their naive twins, and against recomputation from the whole data."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from monitor.compare import SAMPLED_PAIRS, CompareSpec, Pair, PairedComparison, prepare
from monitor.kernels import _jit, compare
from server.types import Tensor
from tests.reference import naive_compare

ROOT = Path(__file__).parents[3]
FLOATS: list[Any] = [np.float32, np.float64]
INTEGERS: list[Any] = [np.int64, np.uint64]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    prepare()


def two_vectors(dtype: Any) -> st.SearchStrategy[Any]:
    """Two vectors of one length; the second often repeats elements of the first."""
    elements = hnp.from_dtype(np.dtype(dtype))
    pairs = st.lists(st.tuples(elements, elements, st.booleans()), max_size=40)

    def split(rows: list[tuple[Any, Any, bool]]) -> tuple[Any, Any]:
        first = np.array([row[0] for row in rows], dtype)
        return first, np.array([row[0] if row[2] else row[1] for row in rows], dtype)

    return pairs.map(split)


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_differences_are_those_of_the_naive_twin(dtype: Any) -> None:
    @settings(max_examples=300, deadline=None)
    @given(two_vectors(dtype), st.floats(0, 1e3), st.floats(0, 1))
    def check(vectors: Any, abs_tol: float, rel_tol: float) -> None:
        primary, shadow = vectors
        over, nonfinite, largest, relative = compare.float_differences(primary, shadow, abs_tol, rel_tol)
        expected = naive_compare.float_differences(primary, shadow, abs_tol, rel_tol)
        assert (over, nonfinite) == expected[:2]
        assert math.isclose(largest, expected[2], rel_tol=1e-15)
        assert math.isclose(relative, expected[3], rel_tol=1e-15, abs_tol=1e-300)

    check()


@pytest.mark.parametrize(
    ("primary", "shadow", "expected"),
    [
        ([], [], (0, 0, 0.0, 0.0)),
        ([math.nan, math.inf, -math.inf], [math.nan, math.inf, -math.inf], (0, 0, 0.0, 0.0)),
        ([math.nan, math.inf, 1.0, 1.0], [1.0, -math.inf, math.inf, math.nan], (4, 4, 0.0, 0.0)),
        ([0.0], [-0.0], (0, 0, 0.0, 0.0)),
        ([2.0, 2.0], [2.0, 1.0], (1, 0, 1.0, 0.5)),
        ([1.7e308], [-1.7e308], (1, 0, sys.float_info.max, 2.0)),
    ],
)
def test_float_differences_of_special_values(primary: list[float], shadow: list[float], expected: Any) -> None:
    assert compare.float_differences(np.array(primary, float), np.array(shadow, float), 1e-3, 0.0) == expected


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_differences_are_exact(dtype: Any) -> None:
    @settings(max_examples=200, deadline=None)
    @given(two_vectors(dtype))
    def check(vectors: Any) -> None:
        assert compare.integer_differences(*vectors) == naive_compare.integer_differences(*vectors)

    check()
    ends = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
    assert compare.integer_differences(ends, ends[::-1].copy()) == (2, float(2**64 - 1))


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("width", [1, 2, 5])
def test_argmax_agreement_is_that_of_numpy(dtype: Any, width: int) -> None:
    few = st.sampled_from([0, 1, 2] + ([math.nan, math.inf, -math.inf] if dtype in FLOATS else []))

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(few, few), max_size=8).map(lambda rows: rows[: len(rows) // width * width]))
    def check(rows: list[tuple[float, float]]) -> None:
        primary, shadow = (np.array([row[side] for row in rows], dtype) for side in (0, 1))
        assert compare.argmax_agreement(primary, shadow, width) == naive_compare.argmax_agreement(
            primary, shadow, width
        )

    check()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([-math.inf, 0.0, 0.5, 1.0, math.inf]), max_size=12), st.lists(st.floats(0, 1), max_size=12)
)
def test_ks_is_that_of_the_definition(first: list[float], second: list[float]) -> None:
    a, b = np.sort(np.array(first, float)), np.sort(np.array(second, float))
    assert math.isclose(compare.ks_two_sample(a, b), naive_compare.ks_two_sample(a, b), abs_tol=1e-12)


def test_a_reservoir_keeps_pairs_together_and_every_element_with_equal_chance() -> None:
    capacity, count = 50, 1000
    hits = np.zeros(count)
    state = np.array([7], np.uint64)
    for _ in range(400):
        kept, other, seen = np.zeros((1, capacity)), np.zeros((1, capacity)), np.zeros(1, np.int64)
        values = np.arange(count, dtype=np.float64)
        compare.sample_pairs(values, values + 0.5, kept, other, seen, state)
        np.testing.assert_array_equal(other, kept + 0.5)
        assert seen[0] == count
        hits[kept[0].astype(int)] += 1
    assert hits.sum() == 400 * capacity
    chi_square = float((((hits - 20) ** 2) / 19).sum())  # each hit count is binomial(400, 0.05)
    assert abs(chi_square - count) < 5 * math.sqrt(2 * count)


def test_a_reservoir_leaves_nan_out_and_keeps_columns_apart() -> None:
    kept, other, seen = np.zeros((2, 8)), np.zeros((2, 8)), np.zeros(2, np.int64)
    values = np.array([1.0, 10.0, math.nan, 20.0, 3.0, 30.0], np.float32)
    compare.sample_pairs(values, values[::-1].copy(), kept, other, seen, np.array([1], np.uint64))
    assert seen.tolist() == [2, 2]  # the NaN of one side is at place 2, that of the other at 3
    assert kept[0, :2].tolist() == [1.0, 3.0]
    assert other[1, :2].tolist() == [3.0, 1.0]


def test_kernels_never_compile_for_new_types() -> None:
    with pytest.raises((TypeError, RuntimeError)):
        compare.ks_two_sample(np.zeros(3, np.complex128), np.zeros(3, np.complex128))
    _jit.compile_all()  # again: nothing is left to do
    kernel: Any = compare.ks_two_sample
    assert len(kernel.overloads) == 1


def test_the_module_alone_loads_no_compiler() -> None:
    code = "import sys, server.shadowing; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=50, check=False).returncode == 0


# --- pairs ---


def tensor(name: str, values: Any, datatype: str = "FP32") -> Tensor:
    array = np.asarray(values)
    if datatype == "BYTES":
        return Tensor(name, datatype, array.shape, [bytes(item) for item in array.ravel().tolist()])
    return Tensor(name, datatype, array.shape, array.tobytes())


def floats(values: Any) -> Tensor:
    return tensor("y", np.asarray(values, np.float32))


def compared(primary: Tensor, shadow: Tensor, **spec: Any) -> dict[str, Any]:
    comparison = PairedComparison(CompareSpec(**spec))
    comparison.add(Pair("a", [primary], [shadow]))
    report = comparison.report()
    json.dumps(report, allow_nan=False)
    return report


def test_a_perturbed_shadow_is_reported_as_an_offline_recomputation_finds_it() -> None:
    random = np.random.default_rng(5)
    comparison = PairedComparison(CompareSpec(abs_tol=1e-2, rel_tol=0.0, keep_worst=3))
    scores = random.random((300, 2, 4), np.float32)
    changed = (scores + random.normal(0, 0.01, scores.shape)).astype(np.float32)
    for i in range(len(scores)):
        comparison.add(Pair(str(i), [floats(scores[i])], [floats(changed[i])]))
    report = comparison.report()
    found = report["outputs"]["y"]
    distance = np.abs(scores.astype(float) - changed)
    assert found["max_abs_diff"] == distance.max()
    assert found["over_tolerance"] == int((distance > 1e-2).sum())
    assert found["argmax_agreement"] == float((scores.argmax(-1) == changed.argmax(-1)).mean())
    columns = [naive_compare.ks_two_sample(scores[..., c].ravel(), changed[..., c].ravel()) for c in range(4)]
    assert found["ks"] == pytest.approx(max(columns), abs=1e-12)  # 600 pairs a column: all of them are in the sample
    per_pair = distance.max((1, 2))
    assert [entry["id"] for entry in report["worst"]] == [str(i) for i in np.argsort(-per_pair)[:3]]
    assert [entry["max_abs_diff"] for entry in report["worst"]] == sorted(per_pair.tolist(), reverse=True)[:3]


def test_equal_outputs_agree() -> None:
    report = compared(floats([[1, 2], [3, math.nan]]), floats([[1, 2], [3, math.nan]]))
    assert (report["pairs"], report["disagreeing"], report["agreement"], report["worst"]) == (1, 0, 1.0, [])


@pytest.mark.parametrize(
    ("primary", "shadow", "kind"),
    [
        (floats([[1.0]]), floats([[1.0, 2.0]]), "shape"),
        (floats([[1.0]]), tensor("y", [[1.0]], "FP64"), "datatype"),
        (floats([[1.0]]), tensor("z", np.float32([[1.0]])), "missing"),
        (floats([[1.0]]), floats([[1.1]]), "tolerance"),
        (floats([[0.5, 0.5002]]), floats([[0.5002, 0.5]]), "argmax"),
        (tensor("y", [[7]], "INT64"), tensor("y", [[8]], "INT64"), "tolerance"),
        (tensor("y", [[True]], "BOOL"), tensor("y", [[False]], "BOOL"), "tolerance"),
        (tensor("y", [[b"a"]], "BYTES"), tensor("y", [[b"b"]], "BYTES"), "tolerance"),
        (floats([[1.0]]), Tensor("y", "FP32", (1, 1), b"\0\0"), "shape"),
        (floats([[1.0]]), Tensor("y", "FP32", (1, 1), [b"x"]), "shape"),
        (Tensor("y", "BYTES", (2,), [b"x"]), Tensor("y", "BYTES", (2,), []), "shape"),
        (Tensor("y", "FP8", (1,), b"x"), Tensor("y", "FP8", (1,), b"x"), "shape"),
        (floats([[1.0]]), floats([[math.nan]]), "tolerance"),
    ],
)
def test_every_kind_of_disagreement_is_named(primary: Tensor, shadow: Tensor, kind: str) -> None:
    report = compared(primary, shadow, abs_tol=1e-3 if kind == "argmax" else 0.0, rel_tol=0.0)
    assert report["disagreeing"] == 1
    assert kind in report["worst"][0]["disagreements"]
    assert report["outputs"]["y"]["disagreements"][kind] == 1


@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [
        ("UINT8", "u1"), ("UINT16", "<u2"), ("UINT32", "<u4"), ("UINT64", "<u8"), ("INT8", "i1"), ("INT16", "<i2"),
        ("INT32", "<i4"), ("INT64", "<i8"), ("FP16", "<f2"), ("FP32", "<f4"), ("FP64", "<f8"),
    ],
)  # fmt: skip
def test_every_datatype_is_read_as_what_it_is(datatype: str, dtype: str) -> None:
    report = compared(
        tensor("y", np.array([[1, 5], [4, 3]], dtype), datatype),
        tensor("y", np.array([[1, 2], [4, 3]], dtype), datatype),
    )
    found = report["outputs"]["y"]
    assert (found["max_abs_diff"], found["over_tolerance"], found["elements"]) == (3.0, 1, 4)
    assert (found["argmax_rows"], found["argmax_agreeing"]) == (2, 2)


def test_bf16_is_read_as_the_upper_half_of_a_float() -> None:
    halves = [(np.array([[value]], np.float32).view(np.uint32) >> 16).astype("<u2") for value in (1.5, -2.0)]
    found = compared(*(tensor("y", half, "BF16") for half in halves))["outputs"]["y"]
    assert found["max_abs_diff"] == 3.5


def test_buffers_may_lie_anywhere() -> None:
    raw = np.array([[1.0, 2.0]], np.float32).tobytes()
    shifted = Tensor("y", "FP32", (1, 2), memoryview(b"x" + raw)[1:])
    assert compared(floats([[1.0, 2.0]]), shifted)["disagreeing"] == 0


def test_empty_and_scalar_and_unbatched_outputs() -> None:
    assert compared(floats(np.zeros((0, 3))), floats(np.zeros((0, 3))))["outputs"]["y"]["over_tolerance_share"] is None
    assert compared(floats(1.0), floats(2.0))["outputs"]["y"]["argmax_rows"] == 0
    comparison = PairedComparison(CompareSpec())
    vector = floats([1.0, 2.0, 3.0])
    comparison.add(Pair("a", [vector], [vector], batched=False))
    assert comparison.report()["outputs"]["y"]["argmax_rows"] == 1
    comparison.add(Pair("b", [vector], [vector], batched=True))  # three rows of one score each
    assert comparison.report()["outputs"]["y"]["argmax_rows"] == 1


def test_only_named_outputs_are_compared() -> None:
    comparison = PairedComparison(CompareSpec(outputs=("y",)))
    comparison.add(Pair("a", [floats([[1.0]]), tensor("z", [[1]], "INT64")], [floats([[1.0]])]))
    assert list(comparison.report()["outputs"]) == ["y"]
    assert comparison.report()["disagreeing"] == 0


def test_the_worst_are_bounded_and_what_has_no_distance_is_worse_than_any() -> None:
    comparison = PairedComparison(CompareSpec(keep_worst=2))
    for name, value in (
        ("far", 1e9),
        ("nan", math.nan),
        ("near", 0.1),
        ("wide", 5.0),
        ("inf", math.inf),
        ("late", math.nan),
    ):
        comparison.add(Pair(name, [floats([[0.0]])], [floats([[value]])]))
    assert [entry["id"] for entry in comparison.report()["worst"]] == ["nan", "inf"]
    nothing = PairedComparison(CompareSpec(keep_worst=0))
    nothing.add(Pair("a", [floats([[0.0]])], [floats([[1.0]])]))
    assert nothing.report()["worst"] == []


def test_latency_is_compared_at_equal_batch_rows_only() -> None:
    comparison = PairedComparison(CompareSpec())
    one = [floats([[1.0]])]

    def add(primary_rows: int, primary_ns: int, shadow_rows: int, shadow_ns: int) -> float | None:
        pair = Pair("a", one, one, True, primary_ns, primary_rows, shadow_ns, shadow_rows)
        return comparison.add(pair).latency_ratio

    assert add(64, 64_000, 1, 2_000) is None  # no size in common
    assert add(1, 1_000, 1, 4_000) == pytest.approx(3.0)  # one primary of 1 us against a mean of 3 us
    report = comparison.report()["latency"]
    assert report == {
        "answers_at_equal_batch_rows": 1,
        "primary_mean_us": 1.0,
        "shadow_mean_us": 3.0,
        "ratio": pytest.approx(3.0),
    }


def filled(parts: list[Any]) -> PairedComparison:
    comparison = PairedComparison(CompareSpec(keep_worst=5))
    for name, (primary, shadow) in parts:
        comparison.add(Pair(name, [floats(primary)], [floats(shadow)], True, 1_000, 1, 2_000, 1))
    return comparison


def test_merged_comparisons_are_one_over_all_pairs() -> None:
    random = np.random.default_rng(3)
    pairs = [(str(i), (random.random((1, 2)), random.random((1, 2)))) for i in range(60)]
    whole, first, second = filled(pairs), filled(pairs[:20]), filled(pairs[20:])
    first.merge(second)
    assert first.report() == whole.report()


def test_merged_samples_stay_uniform() -> None:
    low, high = (
        filled([("a", (np.zeros((3 * SAMPLED_PAIRS, 1)),) * 2)]),
        filled([("b", (np.ones((SAMPLED_PAIRS, 1)),) * 2)]),
    )
    low.merge(high)
    sample = low._outputs["y"].sample
    assert sample is not None
    assert sample.seen.tolist() == [4 * SAMPLED_PAIRS]
    assert 0.2 < sample.primary[0].mean() < 0.3


def test_reports_and_pairs_from_many_threads_lose_nothing() -> None:
    comparison = PairedComparison(CompareSpec())
    primary, shadow = floats([[0.0, 1.0]]), floats([[0.0, 2.0]])

    def work(act: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=lambda: [act() for _ in range(200)])
        thread.start()
        return thread

    threads = [work(lambda: comparison.add(Pair("a", [primary], [shadow]))) for _ in range(3)]
    threads.append(work(comparison.report))
    for thread in threads:
        thread.join()
    report = comparison.report()
    assert (report["pairs"], report["disagreeing"], report["outputs"]["y"]["over_tolerance"]) == (600, 600, 600)
