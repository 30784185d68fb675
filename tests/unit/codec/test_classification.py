"""The classification extension."""

from __future__ import annotations

import numpy as np
import pytest

from server.codec.classification import classify
from server.errors import InvalidArgument
from server.types import DATATYPES, Tensor


def scores(datatype: str, shape: tuple[int, ...], values: list[float]) -> Tensor:
    return Tensor("y", datatype, shape, np.array(values, dtype=DATATYPES[datatype][0]).tobytes())


def test_largest_first_with_labels() -> None:
    result = classify(scores("FP32", (4,), [0.25, 8.0, -1.0, 0.5]), 3, ["a", "b"], batched=False)
    assert result == Tensor("y", "BYTES", (3,), [b"8.000000:1:b", b"0.500000:3", b"0.250000:0:a"])


def test_each_row_of_a_batch_alone() -> None:
    result = classify(scores("INT64", (2, 3), [1, 2, 3, 2**62, -5, 2**62 + 1]), 2, (), batched=True)
    assert result.shape == (2, 2)
    assert result.data == [b"3:2", b"2:1", b"%d:2" % (2**62 + 1), b"%d:0" % 2**62]


def test_more_classes_than_there_are() -> None:
    assert classify(scores("UINT8", (2,), [3, 200]), 10, (), batched=False).data == [b"200:1", b"3:0"]


def test_equal_values_and_nan() -> None:
    nan, inf = float("nan"), float("inf")
    result = classify(scores("FP64", (6,), [nan, 1.0, -inf, 1.0, nan, inf]), 6, (), batched=False)
    assert result.data == [b"inf:5", b"1.000000:1", b"1.000000:3", b"-inf:2", b"nan:0", b"nan:4"]


def test_unlabelled_line() -> None:
    assert classify(scores("FP32", (2,), [1.0, 2.0]), 2, ["a", ""], batched=False).data == [
        b"2.000000:1",
        b"1.000000:0:a",
    ]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4)])
def test_nothing_to_rank(shape: tuple[int, ...]) -> None:
    result = classify(scores("FP32", shape, []), 2, (), batched=True)
    assert result.data == []
    assert result.shape[0] == shape[0]


def test_other_datatypes() -> None:
    assert classify(Tensor("y", "BF16", (2,), b"\x80\x3f\x00\x40"), 1, (), batched=False).data == [b"2.000000:1"]
    assert classify(scores("FP16", (2,), [1.5, 0.5]), 1, (), batched=False).data == [b"1.500000:0"]
    assert classify(scores("BOOL", (2,), [False, True]), 1, (), batched=False).data == [b"1:1"]
    with pytest.raises(InvalidArgument, match=r"'y'.*BYTES"):
        classify(Tensor("y", "BYTES", (1,), [b"a"]), 1, (), batched=False)
