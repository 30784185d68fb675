"""Reference profiles: what they keep, the file they make, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from monitor import sealed
from monitor.errors import ProfileError
from monitor.outcomes import LabelReference
from monitor.profile import MAX_CATEGORIES, ReferenceProfile, datatype_of, quantile_knots
from monitor.types import Column


def mixed(rows: int = 2000) -> ReferenceProfile:
    rng = np.random.default_rng(0)
    return ReferenceProfile.from_arrays(
        {
            "x": rng.standard_normal((rows, 3)).astype("f4"),
            "age": rng.integers(0, 90, rows),
            "sex": rng.integers(0, 2, rows).astype(bool),
            "city": rng.choice(np.array(["Ulm", "Köln", "", "Rom"], object), rows),
            "zone": rng.integers(1, 6, rows).astype("i4"),
        },
        {"score": rng.random(rows)},
        names={"x": ["a", "b", "c"]},
        kinds={"zone": "categorical"},
    )


def test_columns_are_the_tensors_elements() -> None:
    columns = {found.column.name: found.column for found in mixed().columns}
    assert list(columns) == ["a", "b", "c", "age", "sex", "city", "zone", "score"]
    assert columns["b"] == Column("b", "x", "input", 1, 3, "FP32", "numeric")
    assert (columns["age"].datatype, columns["age"].kind) == ("INT64", "integer")
    assert (columns["sex"].datatype, columns["sex"].kind) == ("BOOL", "boolean")
    assert (columns["city"].datatype, columns["city"].kind) == ("BYTES", "bytes")
    assert columns["zone"].kind == "categorical"
    assert (columns["score"].source, columns["score"].datatype) == ("output", "FP64")


def test_every_cell_count_is_the_reference() -> None:
    for found in mixed().columns:
        assert found.rows == 2000
        assert found.counts.min() >= 0
        assert len(found.bin_of) == len(found.counts) == 2 * len(found.knots) + 2
        assert set(found.bin_of.tolist()) == set(range(len(found.bins)))
        assert found.bins[-1] == "missing"


def test_file_round_trip_keeps_everything(tmp_path: Path) -> None:
    profile = mixed()
    profile.save(tmp_path / "profile")
    again = ReferenceProfile.load(tmp_path / "profile")
    assert again.sha256 == profile.sha256
    for one, two in zip(profile.columns, again.columns, strict=True):
        assert one.column == two.column
        assert (one.bins, one.categories, one.rare, one.mean, one.sd) == (
            two.bins,
            two.categories,
            two.rare,
            two.mean,
            two.sd,
        )
        for name in ("knots", "counts", "bin_of", "level_of"):
            assert (getattr(one, name) == getattr(two, name)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


def test_digest_names_the_contents() -> None:
    assert mixed().sha256 == mixed().sha256
    assert mixed(2001).sha256 != mixed().sha256


@pytest.mark.parametrize("place", [0, 9, 40, -200, -1])
def test_a_damaged_file_is_refused(place: int) -> None:
    data = bytearray(mixed().to_bytes())
    data[place] ^= 0x55
    with pytest.raises(ProfileError):
        ReferenceProfile.from_bytes(bytes(data))


@pytest.mark.parametrize("size", [0, 7, 11, 500, -1])
def test_a_file_cut_short_is_refused(size: int) -> None:
    with pytest.raises(ProfileError):
        ReferenceProfile.from_bytes(mixed().to_bytes()[:size])


def test_a_file_of_another_kind_is_refused() -> None:
    with pytest.raises(ProfileError, match="wanted a reference profile, got a cake"):
        ReferenceProfile.from_bytes(sealed.pack("cake", {}, {}))


def test_contents_that_would_mislead_the_kernels_are_refused() -> None:
    header, arrays, _ = sealed.unpack(mixed().to_bytes(), "reference profile", ProfileError, "p")
    wrong = {
        "knots": arrays["knots"][::-1],
        "bin_of": arrays["bin_of"] + 1000,
        "level_of": arrays["level_of"] - 1,
        "counts": arrays["counts"][1:],
    }
    for name, values in wrong.items():
        data = sealed.pack("reference profile", header, {**arrays, name: np.ascontiguousarray(values)})
        with pytest.raises(ProfileError, match="damaged"):
            ReferenceProfile.from_bytes(data)
    header = json.loads(json.dumps(header))
    header["schema"] = 99
    with pytest.raises(ProfileError, match="schema 99"):
        ReferenceProfile.from_bytes(sealed.pack("reference profile", header, arrays))


def test_the_file_is_small() -> None:
    values = np.random.default_rng(0).standard_normal((50_000, 30)).astype("f4")
    assert len(ReferenceProfile.from_arrays({"x": values}).to_bytes()) < 300_000


def test_values_are_compared_as_the_model_is_sent_them() -> None:
    values = np.array([16777216.0, 16777217.0, 16777218.0])
    (single,) = ReferenceProfile.from_arrays({"x": values}, datatypes={"x": "FP32"}).columns
    assert single.knots.tolist() == [16777216.0, 16777218.0]
    (half,) = ReferenceProfile.from_arrays({"x": [1.0, 1.0001, 1e6]}, datatypes={"x": "FP16"}).columns
    assert half.knots.tolist() == [1.0, np.inf]
    (brain,) = ReferenceProfile.from_arrays({"x": [1.0, 1.001, 3.0, np.nan]}, datatypes={"x": "BF16"}).columns
    assert brain.knots.tolist() == [1.0, 3.0]
    assert brain.counts.tolist() == [0, 2, 0, 1, 0, 1]


def test_few_values_have_a_bin_each_and_are_not_tested_by_ks() -> None:
    (found,) = ReferenceProfile.from_arrays({"x": np.repeat([1.0, 2.0, 3.0], [1000, 990, 3])}).columns
    assert found.bins == ("1", "2", "rare", "new", "missing")
    assert not found.ordered
    assert found.levels == 5


def test_quantile_bins_hold_equal_shares() -> None:
    (found,) = ReferenceProfile.from_arrays({"x": np.arange(1000.0)}, knots=100).columns
    assert found.ordered
    assert len(found.bins) == 11
    assert np.bincount(found.bin_of, found.counts, 11).tolist() == [100.0] * 10 + [0]


def test_strings_over_the_bound_share_a_cell() -> None:
    names = [f"c{i}" for i in range(1500)]
    values = np.array([name for i, name in enumerate(names) for _ in range(1 + (i < 100))], object)
    (found,) = ReferenceProfile.from_arrays({"x": values}).columns
    assert len(found.categories) == MAX_CATEGORIES - 1
    assert len(found.rare) == 1500 - (MAX_CATEGORIES - 1)
    assert set(found.categories) >= {f"c{i}".encode() for i in range(100)}
    assert found.counts[-3] == 1500 - (MAX_CATEGORIES - 1)


def test_missing_strings() -> None:
    (found,) = ReferenceProfile.from_arrays({"x": np.array(["a", None, "", float("nan"), b"a"], object)}).columns
    assert found.categories == (b"a",)
    assert found.counts.tolist() == [0, 2, 0, 3]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReferenceProfile.from_arrays({}), "at least one column"),
        (lambda: ReferenceProfile.from_arrays({"x": 3.0}), "no rows"),
        (lambda: ReferenceProfile.from_arrays({"x": []}), "no rows"),
        (lambda: ReferenceProfile.from_arrays({"x": [1.0], "y": [1.0, 2.0]}), "differ in rows"),
        (lambda: ReferenceProfile.from_arrays({"x": [1.0]}, {"x": [1.0]}), "'x' twice"),
        (lambda: ReferenceProfile.from_arrays({"x": [1.0]}, knots=1), "2 to 4000000 knots"),
        (lambda: ReferenceProfile.from_arrays({"x": [1.0]}, knots=10**9), "2 to 4000000 knots"),
        (lambda: ReferenceProfile.from_arrays({"x": [[1.0, 2.0], [3.0]]}), "tensor 'x': not all rows"),
        (lambda: ReferenceProfile.from_arrays({"x": np.array(["a\ud800"])}), "UTF-8 has no bytes for: surrogates"),
        (
            lambda: ReferenceProfile.from_arrays({"x": np.array([10**400], object)}, datatypes={"x": "FP64"}),
            "too large for a double",
        ),
        (lambda: ReferenceProfile.from_arrays({"x": [1.0]}, bins=1), "bins"),
        (lambda: ReferenceProfile.from_arrays({"x": ["a"]}, datatypes={"x": "FP32"}), "not all values are numbers"),
        (lambda: ReferenceProfile.from_arrays({"x": ["a"]}, kinds={"x": "numeric"}), "go together"),
        (lambda: ReferenceProfile.from_arrays({"x": [1.0]}, datatypes={"x": "FP8"}), "FP8"),
        (lambda: ReferenceProfile.from_arrays({"x": np.ones((2, 2))}, names={"x": ["a"]}), "2 columns, got 1"),
        (lambda: ReferenceProfile.from_arrays({"x": np.array(["2020-01-01"], "M8[D]")}), "datetime64"),
        (lambda: ReferenceProfile.from_table({"x": [1.0]}, [Column("y", "y")]), "no column 'y'"),
        (lambda: ReferenceProfile.from_table({"x": np.ones((2, 2))}, [Column("x", "x")]), "one-dimensional"),
    ],
)
def test_what_cannot_be_profiled_is_said(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        build()


@pytest.mark.parametrize(
    ("datatype", "left"), [("INT64", [-1, 0, 1, 2]), ("BOOL", [0, 1]), ("BF16", [-1.5, -0.5, 0, 0.5, 1.5, 2])]
)
def test_values_are_what_is_left_of_them_in_the_datatype(datatype: str, left: list[float]) -> None:
    values = np.array([-1.5, -0.5, 0.0, 0.5, 1.5, 2.0, np.nan])
    built = ReferenceProfile.from_arrays({"x": values}, datatypes={"x": datatype}).columns[0]
    assert built.knots.tolist() == left
    assert built.rows - built.present == 1


def test_more_knots_than_rows_are_all_of_them() -> None:
    values = np.random.default_rng(0).standard_normal(500)
    most = ReferenceProfile.from_arrays({"x": values}, knots=4_000_000)
    assert most.sha256 == ReferenceProfile.from_arrays({"x": values}, knots=None).sha256


def test_too_many_strings_are_no_categories() -> None:
    values = np.array([str(i) for i in range(65_537)], object)
    with pytest.raises(ProfileError, match="65537 distinct strings"):
        ReferenceProfile.from_arrays({"x": values})


def test_quantile_knots_keep_both_ends() -> None:
    values = np.sort(np.random.default_rng(0).standard_normal(1000))
    knots = quantile_knots(values, 10)
    assert (knots[0], knots[-1]) == (values[0], values[-1])
    assert len(knots) == 11


def test_datatypes_of_arrays() -> None:
    assert datatype_of(np.zeros(1, ">f8"), "x") == "FP64"
    assert datatype_of(np.zeros(1, "u2"), "x") == "UINT16"
    assert datatype_of(np.array(["a"]), "x") == "BYTES"


def test_a_reference_of_labels_is_kept_and_named_by_the_digest() -> None:
    plain = mixed()
    cells = np.zeros((2, 8), "i8")
    labels = LabelReference({"task": "binary"}, 3, np.array([1, 2], "i8"), np.zeros((2, 5), "u1"), cells)
    kept = ReferenceProfile.from_bytes(replace(plain, labels=labels).to_bytes())
    assert kept.sha256 != plain.sha256
    assert kept.labels is not None
    assert (kept.labels.basis, kept.labels.rows) == ({"task": "binary"}, 3)
    np.testing.assert_array_equal(kept.labels.counts, [1, 2])
    assert ReferenceProfile.from_bytes(plain.to_bytes()).labels is None
    for broken in (replace(labels, rows=0), replace(labels, cells=cells[:1]), replace(labels, counts=-labels.counts)):
        with pytest.raises(ProfileError, match="damaged"):
            ReferenceProfile.from_bytes(replace(plain, labels=broken).to_bytes())
