"""server.capture.formats: what is written is read back, the same from Parquet as from JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from server.capture.formats import StorageError, Table, read_json_lines, type_of, write_table

EDGES = {
    "?": [True, False], "i1": [-128, 127], "i2": [-(2**15), 2**15 - 1], "i4": [-(2**31), 2**31 - 1],
    "i8": [-(2**63), 2**63 - 1], "u1": [0, 255], "u2": [0, 2**16 - 1], "u4": [0, 2**32 - 1], "u8": [0, 2**64 - 1],
    "f4": [np.float32(0.1), np.finfo("f4").max], "f8": [0.1, np.finfo("f8").tiny],
}  # fmt: skip


def table() -> Table:
    found: Table = {code: np.array(values, code) for code, values in EDGES.items()}
    found["special"] = np.array([np.nan, -np.inf], "f4")
    found['a "quoted"; name'] = np.array(["it's", 'a "text"\n'], object)
    lists = np.empty(2, object)
    lists[0], lists[1] = np.array([1.5, np.nan], "f4"), np.array([0.1], "f4")
    texts = np.empty(2, object)
    texts[0], texts[1] = ["a", "b"], []
    return {**found, "lists": lists, "texts": texts}


def same(got: Any, wanted: np.ndarray[Any, Any]) -> bool:
    if wanted.dtype == object:
        pairs = zip(got, wanted, strict=True)
        return all(
            np.array_equal(np.asarray(a, b.dtype), b, equal_nan=True)
            if isinstance(b, np.ndarray)
            else list(a) == list(b)
            for a, b in pairs
        )
    return np.asarray(got).dtype == wanted.dtype and np.asarray(got).tobytes() == wanted.tobytes()


def test_json_lines_give_back_what_was_written(tmp_path: Path) -> None:
    wanted = table()
    write_table(tmp_path / "t.jsonl", wanted, "jsonl", {})
    types = {name: type_of(values) for name, values in wanted.items()}
    got = read_json_lines(tmp_path / "t.jsonl", types)
    assert [name for name in wanted if not same(got[name], wanted[name])] == []


def test_parquet_gives_back_what_was_written(tmp_path: Path) -> None:
    wanted = table()
    write_table(tmp_path / "t.parquet", wanted, "parquet", {"about": 'it\'s "quoted"'})
    with duckdb.connect() as connection:
        found = connection.execute("SELECT * FROM read_parquet(?)", [str(tmp_path / "t.parquet")]).fetchnumpy()
        query = "SELECT decode(value) FROM parquet_kv_metadata(?) WHERE decode(key) = 'about'"
        assert connection.execute(query, [str(tmp_path / "t.parquet")]).fetchone() == ('it\'s "quoted"',)
    assert not any(np.ma.is_masked(values) for values in found.values()), "a NaN is a number, not a missing value"
    got = {name: np.ma.getdata(values) for name, values in found.items()}
    assert [name for name in wanted if not same(got[name], wanted[name])] == []


def test_damaged_lines_are_named(tmp_path: Path) -> None:
    for content in ("{", '{"b": 1}\n', "[1]\n", '{"a": "x"}\n'):
        (tmp_path / "t.jsonl").write_text(content)
        with pytest.raises(StorageError, match=r"t\.jsonl is not what was written"):
            read_json_lines(tmp_path / "t.jsonl", {"a": "BIGINT"})
