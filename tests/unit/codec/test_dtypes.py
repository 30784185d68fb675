"""BF16 arithmetic and the ranges of the datatypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.codec.dtypes import FLOAT_LIMITS, FLOATS, INTEGER_RANGES, INTEGERS, bfloat16_bits, bfloat16_values
from server.types import ALL_DATATYPES


def bits(*values: float) -> list[int]:
    return bfloat16_bits(np.array(values, dtype=np.float64)).tolist()


def test_groups_cover_all_datatypes() -> None:
    assert set(INTEGERS) | set(FLOATS) | {"BOOL", "BYTES"} == ALL_DATATYPES
    assert INTEGER_RANGES["INT8"] == (-128, 127)
    assert INTEGER_RANGES["UINT64"] == (0, 2**64 - 1)


def test_every_bit_pattern_returns() -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    values = bfloat16_values(patterns)
    with np.errstate(invalid="ignore"):  # some of the NaN are signalling ones
        back = bfloat16_bits(values.astype(np.float64))
    numbers = ~np.isnan(values)
    assert np.array_equal(back[numbers], patterns[numbers])
    assert np.isnan(bfloat16_values(back[~numbers])).all()


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False))
def test_singles_round_as_the_reference_library_does(value: float) -> None:
    with np.errstate(over="ignore"):
        expected = np.array([value], dtype=np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    assert bits(value) == expected.tolist()


@settings(deadline=None)
@given(st.integers(0, 0x7F7E), st.sampled_from([-1, 1]), st.floats(1e-12, 1e-6))
def test_doubles_are_rounded_once(low: int, sign: int, nudge: float) -> None:
    """Just beside the middle of two neighbours a float32 in between would fall on the middle and go to even."""
    below, above = (float(bfloat16_values(np.array([low + k], dtype=np.uint16))[0]) for k in (0, 1))
    middle, step = (below + above) / 2, (above - below) * nudge
    offset = 0 if sign > 0 else 0x8000
    assert bits(sign * (middle + step)) == [low + 1 + offset]
    assert bits(sign * (middle - step)) == [low + offset]
    assert bits(sign * middle) == [low + (low & 1) + offset]


@pytest.mark.parametrize(
    ("value", "pattern"),
    [(float("inf"), 0x7F80), (float("-inf"), 0xFF80), (1e39, 0x7F80), (-1e308, 0xFF80), (-0.0, 0x8000), (1e-320, 0)],
)
def test_edges(value: float, pattern: int) -> None:
    assert bits(value) == [pattern]


def test_limits_are_the_largest_finite_values() -> None:
    assert bits(FLOAT_LIMITS["BF16"]) == [0x7F7F]
    assert FLOAT_LIMITS["FP16"] == 65504.0
