"""Tables from files."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import zipfile
from pathlib import Path

import duckdb
import numpy as np
import pytest

from monitor.errors import MissingReader, ProfileError
from monitor.loaders import read_table
from monitor.profile import ReferenceProfile
from monitor.types import Column

TEXT = 'n,x,flag,name,mixed\n1,0.5,true,"Ulm, DE",1\n2,,false,,a\n\n3,NaN,True,Rom,\n'


def check(table: dict[str, np.ndarray]) -> None:
    assert table["n"].tolist() == [1, 2, 3]
    assert table["n"].dtype == np.int64
    assert table["x"][0] == 0.5
    assert np.isnan(table["x"][1:]).all()
    assert table["flag"].tolist() == [True, False, True]
    assert table["name"].tolist() == ["Ulm, DE", None, "Rom"]
    assert table["mixed"].tolist() == ["1", "a", None]


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\ufeff" + TEXT, encoding="utf-8")
    check(read_table(tmp_path / "t.csv"))
    assert list(read_table(tmp_path / "t.csv", ["x"])) == ["x"]


def test_texts_of_a_csv_are_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("zip,flag,price\n01067,true,1.50\n80331,false,\n")
    read = read_table(tmp_path / "t.csv")
    assert read["zip"].tolist() == [1067, 80331]
    texts = read_table(tmp_path / "t.csv", texts=True)
    assert {name: values.tolist() for name, values in texts.items()} == {
        "zip": ["01067", "80331"],
        "flag": ["true", "false"],
        "price": ["1.50", None],
    }


def test_underscores_make_no_number(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1_0,1_0.5\n10,10.5\n")
    read = read_table(tmp_path / "t.csv")
    assert read["a"].tolist() == ["1_0", "10"]
    assert read["b"].tolist() == ["1_0.5", "10.5"]


def test_compressed_csv(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
        file.write(TEXT)
    check(read_table(tmp_path / "t.csv.gz"))


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.ones((4, 2)), y=np.arange(4))
    table = read_table(tmp_path / "t.npz", ["x"])
    assert list(table) == ["x"]
    assert table["x"].shape == (4, 2)


def test_a_single_array_is_no_npz_file(tmp_path: Path) -> None:
    with (tmp_path / "t.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ProfileError, match="not a readable npz"):
        read_table(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("t.txt", b"", "wanted a .csv"),
        ("t.csv", b"", "first line"),
        ("t.csv", b"a,a\n1,2\n", "each once"),
        ("t.csv", b"a,b\n1\n", "row 2 has 1 values, wanted 2"),
        ("t.csv", b"a\n\xff\n", "not a readable CSV"),
        ("t.csv.gz", b"a\n1\n", "not a readable CSV"),
        ("t.npz", b"PK\x03\x04nonsense", "not a readable npz"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, contents: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ProfileError, match=message):
        read_table(tmp_path / name)


def test_absent_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ProfileError, match="has no column z"):
        read_table(tmp_path / "t.csv", ["a", "z"])


def test_compressed_files_that_are_damaged_are_refused(tmp_path: Path) -> None:
    """Also where the damage is in what is compressed, or makes a file say that it is encrypted."""
    table = tmp_path / "t.npz"
    values = np.random.default_rng(0).integers(0, 9, 400)
    np.savez_compressed(table, x=values)
    packed = tmp_path / "l.npz"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as archive, archive.open("x.npy", "w") as file:
        np.save(file, values)  # type: ignore[arg-type]
    text = tmp_path / "t.csv.gz"
    text.write_bytes(gzip.compress(("x\n" + "\n".join(map(str, values.tolist()))).encode()))
    for path in (table, packed, text):
        whole = path.read_bytes()
        for place in range(len(whole)):
            for bit in (0, 2, 7):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
                with contextlib.suppress(ProfileError):
                    read_table(path)


READERS = [name for name in ("pyarrow", "duckdb") if importlib.util.find_spec(name) is not None]


def test_parquet_without_a_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingReader, match="needs pyarrow or duckdb"):
        read_table(tmp_path / "t.parquet")


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ProfileError, match="not a readable Parquet"):
        read_table(tmp_path / "t.parquet")


def test_truth_values_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("flag,text,none\ntrue,true,\n,maybe,\nFalse,,NA\n")
    table = read_table(tmp_path / "t.csv")
    np.testing.assert_array_equal(table["flag"], [1.0, np.nan, 0.0])
    assert table["text"].tolist() == ["true", "maybe", None]
    assert np.isnan(table["none"]).all()


@pytest.mark.parametrize("reader", READERS)
def test_what_parquet_has_no_value_for_is_missing(tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    with duckdb.connect() as connection:
        rows = "(VALUES ('DE', 1, true, 0.5), (NULL, NULL, NULL, NULL), ('?', 3, false, 1.5)) AS t(name, n, flag, x)"
        connection.sql("FROM " + rows).write_parquet(str(path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == reader or None)
    table = read_table(path)
    assert table["name"].tolist() == ["DE", None, "?"]
    profile = ReferenceProfile.from_table(
        table, [Column("name", "name", datatype="BYTES", kind="bytes"), Column("x", "x", datatype="FP64")]
    )
    assert [column.rows - column.present for column in profile.columns] == [1, 1]
    for name, wanted in (("n", [1, np.nan, 3]), ("flag", [1, np.nan, 0]), ("x", [0.5, np.nan, 1.5])):
        np.testing.assert_array_equal(table[name].astype("f8"), wanted)


@pytest.mark.parametrize("reader", READERS)
def test_what_parquet_calls_blobs_are_byte_strings(
    tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with duckdb.connect() as connection:
        connection.sql(r"SELECT * FROM (VALUES ('\xFF'::BLOB), (NULL), ('a'::BLOB)) AS t(b)").write_parquet(
            str(tmp_path / "t.parquet")
        )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == reader or None)
    table = read_table(tmp_path / "t.parquet")
    assert table["b"].tolist() == [b"\xff", None, b"a"]
    profile = ReferenceProfile.from_table(table, [Column("b", "b", datatype="BYTES", kind="bytes")])
    assert profile.columns[0].categories == (b"a", b"\xff")


@pytest.mark.parametrize("reader", READERS)
def test_dates_do_not_become_numbers_where_some_are_missing(
    tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with duckdb.connect() as connection:
        rows = "(VALUES (TIMESTAMP '2024-05-01 12:00:00'), (NULL)) AS t(moment)"
        connection.sql("FROM " + rows).write_parquet(str(tmp_path / "t.parquet"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == reader or None)
    table = read_table(tmp_path / "t.parquet")
    assert np.isnat(table["moment"]).tolist() == [False, True]
    with pytest.raises(ProfileError, match="datetime64"):
        ReferenceProfile.from_table(table, [Column("moment", "moment", datatype="FP64")])
