"""server.offline.mapping: which column is which element, and that no number changes on its way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from server.errors import InvalidArgument
from server.offline.mapping import resolve, rows_of, tensor_of
from server.types import ModelSpec, TensorSpec


def spec(*inputs: TensorSpec) -> ModelSpec:
    return ModelSpec("m", "1", inputs, (), max_batch_size=8)


X = TensorSpec("x", "FP32", (-1, 2))
Z = TensorSpec("z", "INT8", (-1, 1))


def columns(model: ModelSpec, names: list[str], places: tuple[str, ...] = ()) -> list[tuple[str, ...] | None]:
    return [None if source is None else source.columns for source in resolve(model, names, places)]


@pytest.mark.parametrize(
    ("names", "places", "wanted"),
    [
        (["x[1]", "id", "x[0]", "z"], (), [("x[0]", "x[1]"), ("z",)]),
        (["x", "z"], (), [("x",), ("z",)]),
        (["a", "b", "z"], ("a=x[1]", "b=x[0]"), [("b", "a"), ("z",)]),
        (["x", "c"], ("c=z",), [("x",), ("c",)]),
    ],
)
def test_columns_are_found_by_name_or_by_map(names: list[str], places: tuple[str, ...], wanted: Any) -> None:
    assert columns(spec(X, Z), names, places) == wanted


def test_an_only_input_takes_all_columns_in_their_order() -> None:
    assert columns(spec(X), ["b", "a"]) == [("b", "a")]


def test_an_optional_input_may_be_absent() -> None:
    assert columns(spec(X, TensorSpec("z", "INT8", (-1, 1), optional=True)), ["x"]) == [("x",), None]


@pytest.mark.parametrize(
    ("names", "places", "message"),
    [
        (["x", "id"], (), "no columns for the inputs z"),
        (["x", "z"], ("nope=x",), "no column 'nope'"),
        (["x", "z"], ("x=nope",), "no input 'nope'"),
        (["a", "b"], ("a=x[1]",), "2 elements a row, 1 are mapped"),
        (["a", "b"], ("a=x[0]", "b=x[0]"), "mapped twice"),
        (["a"], ("a",), "wanted COLUMN=TENSOR"),
    ],
)
def test_what_cannot_be_mapped_is_named(names: list[str], places: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        resolve(spec(X, Z), names, places)


def values(datatype: str, given: Any) -> list[Any]:
    (source,) = resolve(spec(TensorSpec("a", datatype, (-1, 1))), ["a"])
    assert source is not None
    return list(tensor_of(source, rows_of(source, {"a": np.asarray(given)}, True), True).array().reshape(-1))


def texts(*items: object) -> Any:
    out = np.empty(len(items), object)
    out[:] = items
    return out


@pytest.mark.parametrize(
    ("datatype", "given", "wanted"),
    [
        ("INT64", texts("9007199254740993"), [9007199254740993]),
        ("UINT64", texts(2**64 - 1), [2**64 - 1]),
        ("INT8", np.array([1.0, -128.0]), [1, -128]),
        ("FP32", texts("0.1", "NaN", "-Infinity"), [np.float32(0.1), np.nan, -np.inf]),
        ("FP32", np.array([0.1]), [np.float32(0.1)]),
        ("FP64", np.array([0.1], "f4"), [float(np.float32(0.1))]),
        ("BOOL", texts("true", "0", "False"), [True, False, False]),
        ("BF16", np.array([1.0]), [0x3F80]),
        ("BYTES", texts("é", b"\xff", None, 3), ["é".encode(), b"\xff", b"", b"3"]),
    ],
)
def test_values_become_the_datatypes(datatype: str, given: Any, wanted: list[Any]) -> None:
    got = values(datatype, given)
    assert all(a == b or (a != a and b != b) for a, b in zip(got, wanted, strict=True)), got


@pytest.mark.parametrize(
    ("datatype", "given", "message"),
    [
        ("INT8", np.array([128]), "cannot hold exactly"),
        ("INT32", np.array([1.5]), "cannot hold exactly"),
        ("UINT8", np.array([-1]), "cannot hold exactly"),
        ("INT64", np.array([np.nan]), "cannot hold exactly"),
        ("INT64", texts(None), "are missing, and INT64"),
        ("FP32", texts("word"), "are no FP32"),
        ("BOOL", texts("maybe"), "are no BOOL"),
    ],
)
def test_what_a_datatype_cannot_hold_is_refused(datatype: str, given: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"column 'a' has values that .*{message}"):
        values(datatype, given)


def test_rows_take_the_models_shape() -> None:
    (source,) = resolve(spec(TensorSpec("a", "FP32", (-1, -1, 2))), ["a"])
    assert source is not None
    rows = rows_of(source, {"a": np.arange(12.0).reshape(2, 6)}, True)
    assert [row.shape for row in rows] == [(3, 2), (3, 2)]
    with pytest.raises(InvalidArgument, match="a multiple of 2 elements a row, the data have 3"):
        rows_of(source, {"a": np.arange(6.0).reshape(2, 3)}, True)
