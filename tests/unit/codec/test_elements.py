"""Lists of JSON values as tensor elements."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.codec.elements import InexactIntegerError, are_numbers, contents, packer
from server.errors import InvalidArgument
from server.types import DATATYPES


def array(datatype: str, values: list[Any], *, exact: bool = False) -> list[Any]:
    data = contents("x", datatype, values, exact=exact)
    assert isinstance(data, bytes)
    return np.frombuffer(data, DATATYPES[datatype][0]).tolist()


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if "INT" in name])
def test_integers_cover_their_range(datatype: str) -> None:
    info = np.iinfo(DATATYPES[datatype][0])
    low, high = int(info.min), int(info.max)
    assert array(datatype, [low, 0, high]) == [low, 0, high]
    for outside in (low - 1, high + 1):
        with pytest.raises(InvalidArgument, match=rf"'x'.*element 1 .*{outside}; {datatype} wants .*{low}\.\.{high}"):
            contents("x", datatype, [0, outside], exact=True)


def test_whole_floats_are_integers() -> None:
    assert array("INT32", [1.0, 2, -3.0]) == [1, 2, -3]
    assert array("UINT8", [255.0, -0.0]) == [255, 0]


@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf"), True, "1", None, [1], {}])
def test_what_is_no_integer(value: object) -> None:
    with pytest.raises(InvalidArgument, match=r"element 2 .*INT32 wants an integer"):
        contents("x", "INT32", [0, 1.0, value, 1], exact=False)


def test_doubles_beyond_2_53_are_never_taken_for_integers() -> None:
    with pytest.raises(InexactIntegerError):
        contents("x", "INT64", [1.0, float(2**53)], exact=False)
    with pytest.raises(InvalidArgument, match="without point or exponent"):
        contents("x", "INT64", [1.0, float(2**53)], exact=True)
    assert array("INT64", [2.0**53 - 1]) == [2**53 - 1]


def test_floats_accept_integers_and_non_finite_values() -> None:
    for datatype in ("FP16", "FP32", "FP64"):
        values = array(datatype, [1, 0.5, float("inf"), float("-inf"), float("nan")])
        assert values[:4] == [1.0, 0.5, float("inf"), float("-inf")]
        assert np.isnan(values[4])
    assert array("BF16", [1.0, float("inf"), 1]) == [0x3F80, 0x7F80, 0x3F80]


@pytest.mark.parametrize(
    ("datatype", "value"),
    [("FP16", 65520.0), ("FP16", -70000), ("BF16", 3.4e38), ("FP32", 1e39), ("FP32", -(10**40)), ("FP64", 10**400)],
)
def test_finite_values_out_of_range(datatype: str, value: float) -> None:
    with pytest.raises(InvalidArgument, match=rf"'x'.*element 1 .*{datatype} wants a number in -"):
        contents("x", datatype, [0.0, value, float("inf")], exact=True)


@given(
    st.sampled_from(["FP32", "FP64"]),
    st.lists(st.floats() | st.floats(width=32) | st.integers(-(2**70), 2**70), min_size=1, max_size=40),
)
def test_floats_are_numpys_in_short_lists_and_long_ones(datatype: str, values: list[float]) -> None:
    dtype = DATATYPES[datatype][0]
    doubles = np.array(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        wanted = doubles.astype(dtype)
    for factor in (1, 1 + 600 // len(values)):
        if np.any(np.isinf(wanted) & np.isfinite(doubles)):
            with pytest.raises(InvalidArgument, match=f"{datatype} wants a number in"):
                contents("x", datatype, values * factor, exact=True)
            continue
        data = contents("x", datatype, values * factor, exact=True)
        assert isinstance(data, bytes)
        np.testing.assert_array_equal(np.frombuffer(data, dtype), np.tile(wanted, factor), strict=True)


@pytest.mark.parametrize("value", [True, None, "1", [1.0], {}])
def test_what_is_no_number(value: object) -> None:
    for datatype in ("FP16", "BF16", "FP32", "FP64"):
        with pytest.raises(InvalidArgument, match=rf"element 1 .*{datatype} wants a number"):
            contents("x", datatype, [0.0, value], exact=False)


def test_bools_are_true_or_false_only() -> None:
    assert array("BOOL", [True, False]) == [True, False]
    for value in (1, 0.0, "true", None):
        with pytest.raises(InvalidArgument, match=r"element 1 .*BOOL wants true or false"):
            contents("x", "BOOL", [True, value], exact=False)


def test_strings() -> None:
    assert contents("x", "BYTES", ["", "é", "\x00"], exact=False) == [b"", "é".encode(), b"\x00"]
    with pytest.raises(InvalidArgument, match=r"element 0 .* null; BYTES wants a string"):
        contents("x", "BYTES", [None], exact=False)


@pytest.mark.parametrize("datatype", [*DATATYPES, "BYTES"])
def test_no_elements(datatype: str) -> None:
    assert not contents("x", datatype, [], exact=False)


@pytest.mark.parametrize("datatype", [*DATATYPES, "BYTES"])
def test_a_packer_makes_the_same_contents(datatype: str) -> None:
    for values in ([], [1], [0.1, -2, 1e-50, -0.0], [3.4028235e38] * 512, [1] * 513):
        pack = packer(datatype, len(values))
        assert (pack is not None) is (datatype in ("FP32", "FP64") and len(values) <= 512)
        if pack is not None:
            assert pack(*values) == contents("x", datatype, values, exact=False)


def test_a_packer_refuses_what_contents_refuse() -> None:
    for datatype, value in (("FP32", 1e39), ("FP32", 10**400), ("FP64", -(10**400))):
        pack = packer(datatype, 1)
        assert pack is not None
        with pytest.raises((OverflowError, struct.error)):
            pack(value)
        with pytest.raises(InvalidArgument, match="wants a number"):
            contents("x", datatype, [value], exact=False)


@pytest.mark.parametrize("value", [True, None, "1", [1], {}, b"1"])
def test_numbers_are_integers_and_floats(value: object) -> None:
    assert are_numbers([])
    assert are_numbers([1, 2.5, 2**80, math.nan])
    assert not are_numbers([1, value])
