"""server.gates.holdout: digests, samples, which columns are inputs, labels and groups."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.config.gates import GatePolicy
from server.config.kinds import Context
from server.errors import InvalidArgument
from server.gates.holdout import (
    Holdout,
    arranged,
    digest_files,
    groups_of,
    input_tensors,
    label_numbers,
    label_texts,
    one_column,
    read_holdout,
)
from server.types import ModelSpec, TensorSpec

SPEC = ModelSpec("m", "1", (TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 1)),))


def policy(folder: Path, path: object = "h.csv", **asked: Any) -> GatePolicy:
    holdout = {"path": path} | asked.pop("holdout", {})
    return GatePolicy.model_validate({"holdout": holdout, **asked}, context=Context(folder))


def held(**columns: list[Any]) -> Holdout:
    table = {name: np.array(values, object if None in values else None) for name, values in columns.items()}
    return Holdout(table, len(next(iter(table.values()))), 0, "")


def names(found: Holdout, asked: GatePolicy, spec: ModelSpec = SPEC) -> list[str]:
    return [column.name for column in arranged(found, asked, spec).columns]


def test_files_are_read_in_order_and_pinned_by_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "b.csv").write_text("a,b\n3,4\n5,6\n")
    asked = policy(tmp_path, ["a.csv", "b.csv"])
    sha256 = digest_files(asked.paths())
    assert sha256 == hashlib.sha256(b"a,b\n1,2\na,b\n3,4\n5,6\n").hexdigest()
    found = read_holdout(asked, sha256)
    assert (found.rows, found.table["a"].tolist()) == (3, [1, 3, 5])
    assert found.told() == {"sha256": sha256, "rows": 3, "of": 3}
    with pytest.raises(InvalidArgument, match=r"gone\.csv cannot be read"):
        digest_files([tmp_path / "gone.csv"])


def test_a_sample_is_the_same_every_time(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("a\n" + "\n".join(map(str, range(1000))))
    asked = policy(tmp_path, holdout={"max_rows": 100})
    first, second = (read_holdout(asked, "").table["a"].tolist() for _ in range(2))
    assert first == second == sorted(set(first))
    assert len(first) == 100
    assert read_holdout(policy(tmp_path, holdout={"max_rows": 100}, seed=1), "").table["a"].tolist() != first


def test_inputs_are_what_is_neither_label_nor_group_unless_needed(tmp_path: Path) -> None:
    three = held(a=[1.0], b=[2.0], city=["x"], label=[1])
    cut = {"slices": [{"column": "city", "min": 0.5}], "holdout": {"label": "label"}}
    assert names(three, policy(tmp_path, **cut)) == ["a", "b"]
    two = held(a=[1.0], city=[2.0], label=[1])
    assert names(two, policy(tmp_path, **cut)) == ["a", "city"]
    assert names(three, policy(tmp_path, holdout={"columns": ["b", "a"]})) == ["b", "a"]
    mapped = {"map": ["b=x[0]", "a=x[1]"]}
    tensor = input_tensors(arranged(three, policy(tmp_path, holdout=mapped), SPEC), SPEC)[0]
    assert tensor.tolist() == [[2.0, 1.0]]
    assert tensor.dtype == np.float32
    with pytest.raises(InvalidArgument, match="no column 'z'; it has a, b, city, label"):
        names(three, policy(tmp_path, holdout={"columns": ["z"]}))


@pytest.mark.parametrize("most", [100, 1000])
def test_strings_of_text_files_are_as_they_are_written(tmp_path: Path, most: int) -> None:
    codes = ["", *[f"{place:04d}" for place in range(1, 300)]]
    (tmp_path / "h.csv").write_text("code,flag,y\n" + "".join(f"{code},TRUE,01\n" for code in codes))
    asked = policy(tmp_path, holdout={"label": "y", "max_rows": most})
    spec = ModelSpec("m", "1", (TensorSpec("x", "BYTES", (-1, 2)),), ())
    found = read_holdout(asked, "")
    tensor = input_tensors(arranged(found, asked, spec), spec)[0]
    # Numbers, as which the sample was read, say which rows these are.
    own = [0 if np.isnan(number) else int(number) for number in found.table["code"]]
    assert len(own) == min(most, 300)
    assert tensor.tolist() == [[codes[place].encode(), b"TRUE"] for place in own]
    assert found.table["y"].tolist() == [1] * len(own)


def test_text_files_that_change_meanwhile_are_refused(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("a,b\n1,2\n3,4\n")
    asked = policy(tmp_path)
    found = read_holdout(asked, "")
    (tmp_path / "h.csv").write_text("a,b\n1,2\n")
    spec = ModelSpec("m", "1", (TensorSpec("x", "BYTES", (-1, 2)),), ())
    with pytest.raises(InvalidArgument, match="have changed: they had 2 rows"):
        arranged(found, asked, spec)


def test_labels(tmp_path: Path) -> None:
    asked = policy(tmp_path, holdout={"label": "label"})
    texts = label_texts(held(label=["yes", None, "no"]), asked)
    assert texts is not None
    assert texts.tolist() == ["yes", "", "no"]
    numbers = label_numbers(held(label=[1.0, float("nan")]), asked)
    assert numbers is not None
    assert np.isnan(numbers[1])
    assert label_texts(held(other=[1]), asked) is None
    assert label_texts(held(label=[None, None]), asked) is None
    assert label_numbers(held(label=[float("nan")]), asked) is None
    assert label_numbers(held(label=[1]), policy(tmp_path)) is None
    with pytest.raises(InvalidArgument, match="not all numbers"):
        label_numbers(held(label=["a", "b"]), asked)


def test_labels_of_a_text_file_that_are_names_of_classes(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("x,label\n" + "1,007\n1,7.0\n1,\n1,8\n1,nan\n")
    asked = policy(tmp_path, holdout={"label": "label"})
    found = read_holdout(asked, "")
    for names, wanted in (((), ["7", "7", "", "8", ""]), (("007", "8", "nan"), ["007", "7", "", "8", ""])):
        texts = label_texts(found, asked, names)
        assert texts is not None
        assert texts.tolist() == wanted


def test_groups_by_value_and_by_bins() -> None:
    found = held(city=["a", None], age=[17.0, 30.0], many=[0, 1])
    assert groups_of(found, "city", ()).tolist() == ["a", "missing"]
    assert groups_of(found, "age", (18, 30)).tolist() == ["under 18", "from 30"]
    assert groups_of(held(age=[18.0, 29.9, float("nan")]), "age", (18, 30)).tolist() == [
        "18 to 30",
        "18 to 30",
        "missing",
    ]
    with pytest.raises(InvalidArgument, match="use bins"):
        groups_of(held(many=list(range(300))), "many", ())
    with pytest.raises(InvalidArgument, match="which bins are of"):
        groups_of(found, "city", (1,))
    with pytest.raises(InvalidArgument, match="wanted one a row"):
        one_column(Holdout({"x": np.zeros((2, 3))}, 2, 2, ""), "x")


def test_groups_of_text_files_are_codes_as_they_stand_there(tmp_path: Path) -> None:
    """Also where one of the files has nothing but numbers and another has not; bins are of numbers all the same."""
    (tmp_path / "a.csv").write_text("zip,n,age\n007,1,17\n7,1.0,018\n,2.5,30\n")
    (tmp_path / "b.csv").write_text("zip,n,age\n 007,nan,18\n2B,1e0,\n")
    groups = {"slices": [{"column": "zip", "metric": "accuracy"}, {"column": "age", "bins": [18]}],
              "fairness": [{"column": "n", "demographic_parity": "10%"}]}  # fmt: skip
    found = read_holdout(policy(tmp_path, ["a.csv", "b.csv"], **groups), "")
    assert groups_of(found, "zip", ()).tolist() == ["007", "7", "missing", "007", "2B"]
    assert groups_of(found, "n", ()).tolist() == ["1", "1", "2.5", "missing", "1"]
    assert groups_of(found, "age", (18,)).tolist() == ["under 18", "from 18", "from 18", "from 18", "missing"]
    (tmp_path / "h.csv").write_text("zip\n" + "\n".join(f"{code:03}" for code in range(150)))
    few = read_holdout(
        policy(tmp_path, holdout={"max_rows": 100}, slices=[{"column": "zip", "metric": "accuracy"}]), ""
    )
    assert groups_of(few, "zip", ()).tolist() == [f"{code:03}" for code in few.table["zip"]]


def test_columns_of_different_lengths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "h.npz", a=np.zeros(3), b=np.zeros(2))
    with pytest.raises(InvalidArgument, match=r"different lengths: \[2, 3\]"):
        read_holdout(policy(tmp_path, "h.npz"), "")
