"""server.offline.batch: answers of a file equal the engine's own, whole or interrupted; other jobs are refused."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from onnx import TensorProto, helper

from server.errors import ConfigError, FailedPrecondition, InvalidArgument, NotFound, TidegateError
from server.offline.batch import BatchReport, BatchSettings, run_batch
from server.offline.chunks import read_chunks
from server.offline.models import Found, find_model
from server.runtime.base import Batch, Engine
from server.runtime.onnx import OnnxRuntime
from tests.support import models

ROWS = 103


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("models")
    return find_model(str(models.affine(folder / "affine.onnx", scale=0.1, shift=0.3)), folder)


@pytest.fixture(scope="module")
def engine(found: Found) -> Iterator[Engine]:
    loaded = OnnxRuntime(measure_budget_s=0).load(found.request)
    yield loaded
    loaded.close()


@pytest.fixture
def rows() -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).normal(size=(ROWS, 4)).astype(np.float32)


def write(path: Path, rows: np.ndarray[Any, Any], names: list[str]) -> Path:
    """The rows in the format of the path's name, with an id column before them."""
    columns = {"id": np.arange(len(rows)), **{name: rows[:, place] for place, name in enumerate(names)}}
    if path.suffix == ".parquet":
        with duckdb.connect() as connection:
            connection.register("rows", columns)
            connection.execute(f"COPY (SELECT * FROM rows) TO '{path}' (FORMAT parquet)")  # noqa: S608
    elif path.suffix == ".npz":
        np.savez(path, **columns)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(columns)
            out.writerows(zip(*[values.tolist() for values in columns.values()], strict=True))
    else:
        lines = [
            dict(zip(columns, row, strict=True)) for row in zip(*[v.tolist() for v in columns.values()], strict=True)
        ]
        path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


NAMES = ["x[0]", "x[1]", "x[2]", "x[3]"]


def run(source: Path, target: Path, found: Found, engine: Engine, **settings: Any) -> BatchReport:
    wanted = {"keep": ("id",), "chunk_rows": 10, "batch_rows": 5} | settings
    return run_batch(source, target, found, engine, BatchSettings(**wanted), lambda done, total: None)


def table_of(path: Path) -> dict[str, Any]:
    chunks = list(read_chunks(path, 1_000_000))
    assert len(chunks) == 1
    return chunks[0]


def answers_of(path: Path) -> np.ndarray[Any, Any]:
    table = table_of(path)
    return np.stack([np.array([float(v) for v in table[f"y[{i}]"]], np.float32) for i in range(4)], axis=1)


def direct(engine: Engine, rows: np.ndarray[Any, Any], step: int) -> np.ndarray[Any, Any]:
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]
    return np.concatenate([engine.run(0, Batch(len(p), [p.shape], [[p.tobytes()]]))[0].array() for p in parts])


@pytest.mark.parametrize("into", ["parquet", "csv", "jsonl", "npz"])
@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "npz"])
def test_every_format_gives_the_engines_own_answers_bit_for_bit(
    tmp_path: Path, found: Found, engine: Engine, rows: np.ndarray[Any, Any], suffix: str, into: str
) -> None:
    source, target = write(tmp_path / f"in.{suffix}", rows, NAMES), tmp_path / f"out.{into}"
    report = run(source, target, found, engine)
    assert (report.rows, report.resumed_rows, report.model) == (ROWS, 0, "affine")
    assert answers_of(target).tobytes() == direct(engine, rows, 5).tobytes()
    table = table_of(target)
    assert [int(value) for value in table["id"]] == list(range(ROWS))
    if into != "npz":
        assert set(table["__digest"]) == {engine.spec.digest}
        assert set(table["__version"]) == {"1"}
    about = json.loads((tmp_path / f"out.{into}.json").read_text())
    assert (about["digest"], about["rows"]) == (engine.spec.digest, ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, target.name, f"{target.name}.json"])


def test_the_same_job_again_changes_nothing(
    tmp_path: Path, found: Found, engine: Engine, rows: np.ndarray[Any, Any]
) -> None:
    source, target = write(tmp_path / "in.csv", rows, NAMES), tmp_path / "out.csv"
    first = run(source, target, found, engine)
    before = target.stat().st_mtime_ns
    again = run(source, target, found, engine)
    assert (again.resumed_rows, again.sha256) == (ROWS, first.sha256)
    assert target.stat().st_mtime_ns == before


class Stopping(Exception):
    pass


def stop_after(rows: int) -> Any:
    def progress(done: int, total: int | None) -> None:
        if done >= rows:
            raise Stopping

    return progress


@pytest.mark.parametrize("into", ["parquet", "npz", "csv"])
@pytest.mark.parametrize("at", [10, 50, ROWS])
def test_an_interrupted_job_goes_on_and_gives_the_same_file(
    tmp_path: Path, found: Found, engine: Engine, rows: np.ndarray[Any, Any], into: str, at: int
) -> None:
    source = write(tmp_path / "in.parquet", rows, NAMES)
    whole = run(source, tmp_path / f"whole.{into}", found, engine)
    target = tmp_path / f"out.{into}"
    settings = BatchSettings((), ("id",), 5, 10)
    with pytest.raises(Stopping):
        run_batch(source, target, found, engine, settings, stop_after(at))
    assert not target.exists()
    report = run(source, target, found, engine)
    assert (report.rows, report.resumed_rows) == (ROWS, at)
    assert answers_of(target).tobytes() == answers_of(Path(whole.output)).tobytes()


def test_a_job_goes_on_with_its_own_sizes_when_none_are_given(
    tmp_path: Path, found: Found, engine: Engine, rows: np.ndarray[Any, Any]
) -> None:
    source, target = write(tmp_path / "in.csv", rows, NAMES), tmp_path / "out.csv"
    with pytest.raises(Stopping):
        run_batch(source, target, found, engine, BatchSettings((), (), 5, 10), stop_after(20))
    report = run_batch(source, target, found, engine, BatchSettings(), lambda done, total: None)
    assert (report.rows, report.resumed_rows) == (ROWS, 20)


def begun(source: Path, target: Path, found: Found, engine: Engine) -> None:
    with pytest.raises(Stopping):
        run_batch(source, target, found, engine, BatchSettings((), ("id",), 5, 10), stop_after(20))


def test_a_changed_input_is_refused(tmp_path: Path, found: Found, engine: Engine, rows: np.ndarray[Any, Any]) -> None:
    source, target = write(tmp_path / "in.csv", rows, NAMES), tmp_path / "out.csv"
    begun(source, target, found, engine)
    write(source, rows + 1, NAMES)
    with pytest.raises(FailedPrecondition, match="the input has changed"):
        run(source, target, found, engine)


def test_a_changed_model_is_refused(tmp_path: Path, found: Found, engine: Engine, rows: np.ndarray[Any, Any]) -> None:
    source, target = write(tmp_path / "in.csv", rows, NAMES), tmp_path / "out.csv"
    begun(source, target, found, engine)
    other = find_model(str(models.affine(tmp_path / "affine.onnx", scale=3.0)), tmp_path)
    loaded = OnnxRuntime(measure_budget_s=0).load(other.request)
    with pytest.raises(FailedPrecondition, match="the model has changed"):
        run(source, target, other, loaded)
    loaded.close()


def test_other_settings_are_refused(tmp_path: Path, found: Found, engine: Engine, rows: np.ndarray[Any, Any]) -> None:
    source, target = write(tmp_path / "in.csv", rows, NAMES), tmp_path / "out.csv"
    begun(source, target, found, engine)
    with pytest.raises(FailedPrecondition, match="batch_rows was 5 and is 2"):
        run(source, target, found, engine, batch_rows=2)


def test_a_file_that_is_there_is_never_overwritten(
    tmp_path: Path, found: Found, engine: Engine, rows: np.ndarray[Any, Any]
) -> None:
    source, target = write(tmp_path / "in.csv", rows, NAMES), tmp_path / "out.csv"
    target.write_text("mine")
    with pytest.raises(FailedPrecondition, match="never overwritten"):
        run(source, target, found, engine)
    assert target.read_text() == "mine"
    assert not (tmp_path / "out.csv.parts").exists()


def test_a_finished_output_that_was_changed_is_not_taken_for_the_jobs(
    tmp_path: Path, found: Found, engine: Engine, rows: np.ndarray[Any, Any]
) -> None:
    source, target = write(tmp_path / "in.csv", rows, NAMES), tmp_path / "out.csv"
    run(source, target, found, engine)
    target.write_text(target.read_text() + "more")
    with pytest.raises(FailedPrecondition, match="never overwritten"):
        run(source, target, found, engine)


def test_two_processes_never_work_on_one_output(
    tmp_path: Path, found: Found, engine: Engine, rows: np.ndarray[Any, Any]
) -> None:
    source, target = write(tmp_path / "in.csv", rows, NAMES), tmp_path / "out.csv"
    refusals: list[object] = []

    def second(done: int, total: int | None) -> None:
        if not refusals:
            with pytest.raises(FailedPrecondition, match="another process is at work") as refusal:
                run(source, target, found, engine)
            refusals.append(refusal)

    run_batch(source, target, found, engine, BatchSettings((), ("id",), 5, 10), second)
    assert len(refusals) == 1
    assert target.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": ("nope",)}, "no column 'nope'"),
        ({"places": ("a=x[0]",)}, "no column 'a'"),
        ({"batch_rows": 65}, "batch rows must be 1 to 64"),
    ],
)
def test_wrong_settings_are_named_and_leave_nothing(
    tmp_path: Path, found: Found, engine: Engine, rows: np.ndarray[Any, Any], settings: dict[str, Any], message: str
) -> None:
    source, target = write(tmp_path / "in.csv", rows, NAMES), tmp_path / "out.csv"
    with pytest.raises(InvalidArgument, match=message):
        run(source, target, found, engine, **settings)
    assert not target.exists()


def test_files_that_cannot_be_used_are_named(tmp_path: Path, found: Found, engine: Engine) -> None:
    empty = tmp_path / "in.csv"
    empty.write_text("x[0],x[1],x[2],x[3]\n")
    for source, target, message in [
        (tmp_path / "none.csv", tmp_path / "out.csv", "no input file"),
        (empty, tmp_path / "out.xls", "wanted a name"),
        (empty, empty, "same file"),
        (empty, tmp_path / "out.csv.gz", "not written"),
        (empty, tmp_path / "out.csv", "has no rows"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            run(source, target, found, engine, keep=())


def test_lists_of_different_lengths_run_with_their_like(tmp_path: Path) -> None:
    path = models.save(
        tmp_path / "sum.onnx",
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)],
        [("x", TensorProto.FLOAT, ["n", "m"])],
        [("y", TensorProto.FLOAT, ["n", 1])],
        {"axes": np.array([1])},
    )
    found = find_model(str(path), tmp_path)
    engine = OnnxRuntime(measure_budget_s=0).load(found.request)
    source = tmp_path / "in.jsonl"
    lists = [[1.0], [2.0], [1.0, 2.0, 3.0], [4.0], [5.0, 6.0]]
    source.write_text("\n".join(json.dumps({"x": values}) for values in lists))
    run_batch(source, tmp_path / "out.npz", found, engine, BatchSettings(), lambda done, total: None)
    assert table_of(tmp_path / "out.npz")["y"].tolist() == [sum(values) for values in lists]
    engine.close()


def test_texts_go_in_and_come_out(tmp_path: Path) -> None:
    found = find_model(str(models.identity(tmp_path / "echo.onnx", "BYTES", 1)), tmp_path)
    engine = OnnxRuntime(measure_budget_s=0).load(found.request)
    source = tmp_path / "in.csv"
    words = ["a", "Zürich", "two\nlines", 'a "quote", and comma', "end"]
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([["word"], *[[word] for word in words]])
    for suffix in ("csv", "parquet", "jsonl", "npz"):
        target = tmp_path / f"out.{suffix}"
        run_batch(source, target, found, engine, BatchSettings(chunk_rows=2), lambda done, total: None)
        assert [str(value) for value in table_of(target)["y"]] == words
    engine.close()


def test_a_model_that_does_not_batch_is_run_row_by_row(tmp_path: Path) -> None:
    path = models.save(
        tmp_path / "fixed.onnx",
        [helper.make_node("Mul", ["x", "two"], ["y"])],
        [("x", TensorProto.FLOAT, [3])],
        [("y", TensorProto.FLOAT, [3])],
        {"two": np.array([2.0], np.float32)},
    )
    found = find_model(str(path), tmp_path)
    engine = OnnxRuntime(measure_budget_s=0).load(found.request)
    assert engine.spec.max_batch_size == 0
    source = tmp_path / "in.npz"
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez(source, x=x)
    run_batch(source, tmp_path / "out.npz", found, engine, BatchSettings(), lambda done, total: None)
    table = table_of(tmp_path / "out.npz")
    assert np.array_equal(np.stack([table[f"y[{i}]"] for i in range(3)], axis=1), 2 * x)
    engine.close()


def test_a_registry_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no gateway's state in .*none"):
        find_model("fraud", tmp_path / "none")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidArgument, match="no model file"):
        find_model(str(tmp_path / "none.onnx"), tmp_path)


def test_options_of_a_model_that_the_configuration_does_not_serve(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("apiVersion: tidegate/v1\nregistry: {embedded: true}\nmodels: {other: {}}\n")
    with pytest.raises(ConfigError, match="no model 'fraud'"):
        find_model("fraud", tmp_path, config)


@pytest.mark.parametrize(
    ("datatype", "column", "wanted"),
    [
        ("FP32", "[1.5, NULL]::FLOAT[]", [1.5, math.nan]),
        ("FP32", "CASE WHEN i = 1 THEN NULL ELSE [1, 2] END", "has 2 elements a row, the data have 1"),
        ("INT32", "[1, NULL]::INTEGER[]", "column 'x' has values that are missing, and INT32 has none"),
        ("BOOL", "[true, NULL]", "values that are missing, and BOOL"),
        ("BYTES", "['a', NULL]", ["a", ""]),
        ("BYTES", "['a'::BLOB, 'b'::BLOB]", ["a", "b"]),
        ("INT64", "[9007199254740993, 1]", [9007199254740993, 1]),
        ("FP16", "[70000.0, 1.0]::FLOAT[]", "outside the range of FP16"),
        ("FP32", "[1e300, 1.0]", "outside the range of FP32"),
        ("BF16", "[-1e300, 1.0]", "outside the range of BF16"),
        ("FP32", "['inf'::FLOAT, 'nan'::FLOAT]", [math.inf, math.nan]),
        ("FP32", "{'a': 1}", "values that are no FP32"),
        ("INT64", "[DATE '2030-01-01', DATE '2030-01-02']", "INT64"),
        ("BYTES", "['\\xFF'::BLOB, 'a'::BLOB]", "not UTF-8"),
    ],
)
def test_what_parquet_lacks_or_cannot_give_is_never_made_up(
    tmp_path: Path, datatype: str, column: str, wanted: list[Any] | str
) -> None:
    found = find_model(str(models.identity(tmp_path / "m.onnx", datatype, 2)), tmp_path)
    loaded = OnnxRuntime(measure_budget_s=0).load(found.request)
    source = tmp_path / "in.parquet"
    query = f"SELECT {column} AS x FROM range(3) t(i)"  # noqa: S608 - the test's own words
    duckdb.execute(f"COPY ({query}) TO '{source}' (FORMAT parquet)")
    try:
        if isinstance(wanted, str):
            with pytest.raises(TidegateError, match=wanted):
                run(source, tmp_path / "out.npz", found, loaded, keep=())
            return
        run(source, tmp_path / "out.npz", found, loaded, keep=())
    finally:
        loaded.close()
    with np.load(tmp_path / "out.npz") as answers:
        for index, value in enumerate(wanted):
            assert np.array_equal(answers[f"y[{index}]"], [value] * 3, equal_nan=isinstance(value, float))


@pytest.mark.parametrize(
    ("value", "wanted"), [("9007199254740993", 9007199254740993), ("12", 12), ("12.5", "are no INT64")]
)
def test_decimals_lose_no_digits(tmp_path: Path, value: str, wanted: int | str) -> None:
    found = find_model(str(models.identity(tmp_path / "m.onnx", "INT64", 1)), tmp_path)
    loaded = OnnxRuntime(measure_budget_s=0).load(found.request)
    source = tmp_path / "in.parquet"
    duckdb.execute(f"COPY (SELECT {value}::DECIMAL(20,2) AS x) TO '{source}' (FORMAT parquet)")
    try:
        if isinstance(wanted, str):
            with pytest.raises(InvalidArgument, match=wanted):
                run(source, tmp_path / "out.npz", found, loaded, keep=())
        else:
            run(source, tmp_path / "out.npz", found, loaded, keep=("x",))
            with np.load(tmp_path / "out.npz") as answers:
                assert answers["y"].tolist() == [wanted]
                assert answers["x"].tolist() == [f"{value}.00"]
    finally:
        loaded.close()
