"""Checks shared by the wire forms."""

from __future__ import annotations

import pytest

from server.codec.checks import (
    check_byte_size,
    check_datatype,
    check_element_count,
    check_id,
    check_limit,
    check_name,
    check_shape,
    check_unique,
    refuse_shared_memory,
    requested_output,
    shown,
    whole_number,
)
from server.errors import InvalidArgument
from server.types import RequestedOutput


def test_shown_is_bounded() -> None:
    assert shown("x") == "'x'"
    assert len(shown("x" * 10_000)) < 120


@pytest.mark.parametrize("shape", [(), (0,), (3, 2), (0, 2**31, 2**29 - 1), (2**59,)])
def test_good_shapes(shape: tuple[int, ...]) -> None:
    check_shape("x", shape, 32)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((-1,), r"'x'.*\[-1\].*negative"),
        ((2,) * 33, "at most 32 dimensions are accepted, got 33"),
        ((2**62, 2**62), "64-bit"),
        ((0, 2**62, 2**62), "64-bit"),
        ((0, 2**70), "64-bit"),
        ((10**300,) * 32, "64-bit"),
    ],
)
def test_bad_shapes(shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text) as caught:
        check_shape("x", shape, 32)
    assert len(caught.value.message) < 300


def test_counts_name_wanted_and_got() -> None:
    with pytest.raises(InvalidArgument, match=r"'x'.*FP32.*\[2,3\].*24 bytes.*got 20"):
        check_byte_size("x", "FP32", (2, 3), 20)
    with pytest.raises(InvalidArgument, match=r"'x'.*\[2,3\].*6 elements.*got 5"):
        check_element_count("x", (2, 3), 5)
    with pytest.raises(InvalidArgument, match="at most 2 are accepted, got 3"):
        check_limit("inputs", 3, 2)
    check_byte_size("x", "FP32", (2, 3), 24)
    check_element_count("x", (), 1)
    check_limit("inputs", 2, 2)


def test_names_and_datatypes() -> None:
    with pytest.raises(InvalidArgument, match="input 'a' is given more than once"):
        check_unique("input", ["b", "a", "c", "a"])
    check_unique("input", ["a", "b"])
    with pytest.raises(InvalidArgument, match="name"):
        check_name("input", "")
    with pytest.raises(InvalidArgument, match=r"unknown datatype 'FP31'.*FP32"):
        check_datatype("x", "FP31")


def test_id_counts_bytes() -> None:
    check_id("é" * 2, 4)
    with pytest.raises(InvalidArgument, match="at most 4 bytes are accepted, got 5"):
        check_id("éé1", 4)


def test_requested_output() -> None:
    assert requested_output("y", {}) == RequestedOutput("y")
    assert requested_output("y", {"binary_data": False, "classification": 3}) == RequestedOutput("y", False, 3)
    for wrong in ({"binary_data": 1}, {"classification": -1}, {"classification": "3"}, {"classification": True}):
        with pytest.raises(InvalidArgument, match="output 'y'"):
            requested_output("y", wrong)
    with pytest.raises(InvalidArgument, match="shared memory"):
        refuse_shared_memory("output", "y", {"shared_memory_region": "r"})


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3),
        (3.0, 3),
        (-1, -1),
        (2.5, None),
        (True, None),
        ("3", None),
        (None, None),
        (1e300, int(1e300)),
        (float("inf"), None),
        (float("nan"), None),
    ],
)
def test_whole_number(value: object, number: int | None) -> None:
    assert whole_number(value) == number
