"""Kept rows: the newest ones, as they came, within their bounds."""

from __future__ import annotations

import io

import numpy as np
import pytest

from monitor.layout import Block, Layout
from monitor.profile import ReferenceProfile
from monitor.sample import MAX_STRING, RowSample

LAYOUT = Layout(
    ReferenceProfile.from_arrays({"x": np.arange(40.0).reshape(20, 2), "word": np.array([b"a", b"b"] * 10, object)})
)


def block(first: int, rows: int, word: bytes = b"w") -> Block:
    numbers = np.arange(2.0 * first, 2.0 * (first + rows))
    found = LAYOUT.read([[numbers.tobytes()], [[word] * rows]], rows)
    assert found is not None
    return found


@pytest.mark.parametrize("sizes", [[3, 3, 3], [1] * 9, [9], [2, 7]])
def test_the_newest_rows_in_order_however_they_came(sizes: list[int]) -> None:
    sample, first = RowSample(LAYOUT, 5, 1 << 20), 0
    for size in sizes:
        sample.add("stable", np.arange(first, first + size), block(first, size))
        first += size
    found = sample.read()
    assert found["__time"].tolist() == [4, 5, 6, 7, 8]
    assert found["x[0]"].tolist() == [8.0, 10.0, 12.0, 14.0, 16.0]
    assert found["x[1]"].tolist() == [9.0, 11.0, 13.0, 15.0, 17.0]


def test_columns_are_copies_that_a_file_can_hold() -> None:
    sample = RowSample(LAYOUT, 10, 1 << 20)
    numbers = bytearray(np.arange(4.0).tobytes())
    read = LAYOUT.read([[numbers], [[b"long" * 100, b""]]], 2)
    assert read is not None
    sample.add("canary", np.array([5, 6]), read)
    numbers[:] = bytes(32)
    file = io.BytesIO()
    np.savez(file, **sample.read())
    file.seek(0)
    with np.load(file, allow_pickle=False) as found:
        assert found["x[1]"].tolist() == [1.0, 3.0]
        assert found["word"].tolist() == [(b"long" * 100)[:MAX_STRING], b""]
        assert found["__arm"].tolist() == ["canary"] * 2


def test_bytes_are_bounded() -> None:
    sample = RowSample(LAYOUT, 1000, 10_000)
    for place in range(50):
        sample.add("stable", np.full(10, place), block(0, 10, b"w" * 200))
    kept = sample.read()["__time"]
    assert 10 <= len(kept) <= 10_000 // 200
    assert kept[-1] == 49
    sample.add("stable", np.full(400, 50), block(0, 400))
    assert len(sample.read()["x[0]"]) == 0  # one block over the bound alone


def test_nothing_kept_reads_as_empty_columns() -> None:
    found = RowSample(LAYOUT, 5, 100).read()
    assert {name: (len(values), values.dtype.kind) for name, values in found.items()} == {
        "x[0]": (0, "f"),
        "x[1]": (0, "f"),
        "word": (0, "S"),
        "__time": (0, "i"),
        "__arm": (0, "U"),
    }
