"""Segments: the reference cut by a column, and values that cannot be segments."""

from __future__ import annotations

import numpy as np
import pytest

from monitor.errors import ProfileError, SettingsError
from monitor.layout import Layout
from monitor.profile import ReferenceProfile
from monitor.segments import Cutter, with_segments
from monitor.types import Segment

TABLE = {
    "x": np.random.default_rng(0).standard_normal(400).astype("f4"),
    "size": np.array([0.1, 0.2, 0.3, 0.4] * 100, "f4"),
    "word": np.array([b"a", b"b"] * 200, object),
}
PROFILE = ReferenceProfile.from_arrays({"word": TABLE["word"], "x": TABLE["x"], "size": TABLE["size"]})


def test_the_reference_of_a_segment_is_the_count_of_its_rows() -> None:
    cut = with_segments(PROFILE, TABLE, Segment("size", (0.1, 0.3)))
    layout = Layout(cut)
    cutter = Cutter(layout, Segment("size", (0.3,)))
    own = {name: values[TABLE["size"] == np.float32(0.3)] for name, values in TABLE.items()}
    assert cutter.names == ("0.3",)
    assert (cutter.references["0.3"] == layout.count_table(own)).all()


def test_rows_are_told_apart_by_value() -> None:
    contents = [[[b"b", b"z", b"", b"a"]], [bytes(16)], [np.array([0.4, 0.1, np.nan, 0.7], "f4").tobytes()]]
    for segment, codes in (
        (Segment("size", (0.1, 0.4)), [1, 0, -1, -1]),
        (Segment("word", ("a", "b")), [1, -1, -1, 0]),
    ):
        layout = Layout(with_segments(PROFILE, TABLE, segment))
        block = layout.read(contents, 4)
        assert block is not None
        assert Cutter(layout, segment).codes(block).tolist() == codes


def test_a_profile_with_segments_is_another_profile_and_survives_its_file() -> None:
    cut = with_segments(PROFILE, TABLE, Segment("word", ("b", "a")))
    assert cut.sha256 != PROFILE.sha256
    again = ReferenceProfile.from_bytes(cut.to_bytes())
    assert again.sha256 == cut.sha256
    assert again.segments is not None
    assert (again.segments.column, again.segments.values) == ("word", ("b", "a"))
    data = bytearray(cut.to_bytes())
    data[-40] ^= 1
    with pytest.raises(ProfileError):
        ReferenceProfile.from_bytes(bytes(data))


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment("shoe", (1,)), "no column 'shoe'"),
        (Segment("word", ("c",)), "the reference has no row with the value c"),
        (Segment("word", (1,)), "wanted strings, got 1"),
        (Segment("size", ("a",)), "wanted numbers for FP32, got a"),
        (Segment("size", (0.1, 0.1 + 1e-10)), "two values are the same in FP32"),
    ],
)
def test_segments_that_cannot_be(segment: Segment, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        with_segments(PROFILE, TABLE, segment)


def test_no_whole_number_is_between_two() -> None:
    table = {"k": np.array([0, 1] * 50)}
    with pytest.raises(SettingsError, match=r"no row with the value 0\.5"):
        with_segments(ReferenceProfile.from_arrays(table), table, Segment("k", (0.5,)))


def test_a_reference_without_the_segment_is_refused() -> None:
    with pytest.raises(SettingsError, match="is not cut by any column, wanted the value a"):
        Cutter(Layout(PROFILE), Segment("word", ("a",)))
    cut = Layout(with_segments(PROFILE, TABLE, Segment("word", ("a",))))
    with pytest.raises(SettingsError, match="is cut by 'word' into a, wanted the value b"):
        Cutter(cut, Segment("word", ("b",)))


def test_the_number_of_segments_is_bounded() -> None:
    with pytest.raises(SettingsError, match="1 to 16 values, got 17"):
        Segment("x", tuple(range(17)))
    with pytest.raises(SettingsError, match="must differ"):
        Segment("x", ("1", 1))
