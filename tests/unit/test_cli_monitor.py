"""``tidegate monitor`` and profiles in ``registry publish``: commands on real files, models and a real listener."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from click.testing import CliRunner, Result

from monitor.calibration import Calibration
from monitor.engine import Monitor
from monitor.profile import ReferenceProfile
from monitor.tap import Item
from monitor.types import Settings, rows_window
from server.cli.main import cli
from server.errors import NotFound, TidegateError
from server.transport.admin import AdminViews, admin_app
from server.transport.answers import HttpSettings
from server.transport.reference.asgi import HttpServer
from tests.support import cli as processes
from tests.support import models
from tests.support.echo import EchoCatalog

ROWS = 3000
NAMES = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TIDEGATE_ADMIN_TOKEN", raising=False)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def ok(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, f"{result.output} {result.exception}"
    return result


def refused(*arguments: object) -> str:
    """The one sentence of a refusal that is meant for people."""
    result = run(*arguments)
    assert result.exit_code != 0
    if isinstance(result.exception, TidegateError):
        return result.exception.message
    assert isinstance(result.exception, SystemExit), result.exception
    return result.output


def values(shift: float = 0.0, rows: int = ROWS, seed: int = 3) -> np.ndarray[Any, Any]:
    found = np.random.default_rng(seed).normal(size=(rows, 4))
    found[:, 2] += shift
    return found


def csv(path: str, table: np.ndarray[Any, Any], names: tuple[str, ...] = NAMES) -> Path:
    np.savetxt(path, table, delimiter=",", header=",".join(names), comments="", fmt="%.9g")
    return Path(path)


def columns_of(path: str = "p.tgp") -> list[tuple[str, str, str, int]]:
    found = ReferenceProfile.load(Path(path)).columns
    return [(c.column.name, c.column.source, c.column.tensor, c.column.index) for c in found]


# --- profile ---


def test_columns_in_order_and_outputs_by_running_the_model() -> None:
    table = values()
    table[::5, 1] = np.nan
    data, model = csv("d.csv", table), models.affine(Path("m.onnx"))
    result = ok("monitor", "profile", data, "--model", model, "--run", "-o", "p.tgp")
    inputs = [(name, "input", "x", place) for place, name in enumerate(NAMES)]
    assert columns_of() == [*inputs, *[(f"y[{i}]", "output", "y", i) for i in range(4)]]
    built = {found.column.name: found for found in ReferenceProfile.load(Path("p.tgp")).columns}
    assert built["b"].rows - built["b"].present == ROWS / 5
    assert built["y[0]"].mean == pytest.approx(2 * built["a"].mean + 1, abs=1e-6)
    assert "20.00%" in result.output
    assert f"8 columns, {ROWS} rows" in result.output


def test_the_profile_is_that_of_the_data_as_the_model_gets_them() -> None:
    data, model = csv("d.csv", values()), models.affine(Path("m.onnx"))
    shown = json.loads(ok("monitor", "profile", data, "--model", model, "-o", "p.tgp", "--json").output)
    direct = ReferenceProfile.from_arrays({"x": values().round(9).astype("f4")}, names={"x": NAMES})
    assert shown["sha256"] == ReferenceProfile.load(Path("p.tgp")).sha256
    assert shown["rows"] == ROWS
    for column, other in zip(shown["columns"], direct.columns, strict=True):
        assert column["mean"] == pytest.approx(other.mean, abs=1e-6)


def parquet(source: str, path: str) -> str:
    """The same table as a Parquet file."""
    duckdb.read_csv(source).write_parquet(path)
    return path


def test_several_files_are_one_table_and_one_of_other_columns_is_refused() -> None:
    halves = [parquet(csv("one.csv", values()[:1000]), "one.parquet"), csv("two.csv", values()[1000:])]
    csv("all.csv", values())
    model = models.affine(Path("m.onnx"))
    ok("monitor", "profile", *halves, "--model", model, "-o", "p.tgp")
    ok("monitor", "profile", "all.csv", "--model", model, "-o", "q.tgp")
    assert ReferenceProfile.load(Path("p.tgp")).sha256 == ReferenceProfile.load(Path("q.tgp")).sha256
    parquet(csv("odd.csv", values(), ("a", "b", "c", "e")), "odd.parquet")
    assert "odd.parquet has other columns than one.csv: d, e" in refused(
        "monitor", "profile", "one.csv", "odd.parquet", "-o", "r.tgp"
    )
    assert not Path("r.tgp").exists()


def test_segments_are_counted_by_themselves() -> None:
    csv("d.csv", np.column_stack([values(), np.arange(ROWS) % 4]), (*NAMES, "code"))
    ok("monitor", "profile", "d.csv", "--kind", "code=categorical", "--segment", "code=0,3", "-o", "p.tgp")
    segments = ReferenceProfile.load(Path("p.tgp")).segments
    assert segments is not None
    assert (segments.column, segments.values) == ("code", (0.0, 3.0))
    assert segments.counts.sum(axis=1).tolist() == [5 * ROWS // 4] * 2
    for wrong, words in (("what=1", "a column of the profile"), ("code=a", "holds numbers"), ("code=9", "no row")):
        assert words in refused("monitor", "profile", "d.csv", "--segment", wrong, "-o", "q.tgp")


def test_columns_are_mapped_and_kinds_given() -> None:
    csv("d.csv", np.column_stack([values(), np.arange(ROWS) % 3]), (*NAMES, "code"))
    maps = [part for i, name in enumerate(("code", "d", "a")) for part in ("--map", f"{name}=x[{i}]")]
    model = models.affine(Path("m.onnx"))
    ok("monitor", "profile", "d.csv", "--model", model, *maps, "--kind", "code=categorical", "-o", "p.tgp")
    assert columns_of() == [("code", "input", "x", 0), ("d", "input", "x", 1), ("a", "input", "x", 2)]
    first = ReferenceProfile.load(Path("p.tgp")).columns[0].column
    assert (first.kind, first.width, first.datatype) == ("categorical", 4, "FP32")


def test_tensors_by_name_and_captured_rows_by_element() -> None:
    table = values().astype("f4")
    np.savez("tensors.npz", x=table)
    captured = {f"x[{i}]": table[:, i] for i in range(4)}
    np.savez("captured.npz", **captured, __time=np.arange(ROWS), __arm=np.full(ROWS, "stable"))
    model = models.affine(Path("m.onnx"))
    for data in ("tensors", "captured"):
        ok("monitor", "profile", f"{data}.npz", "--model", model, "--run", "-o", f"{data}.tgp")
    one, two = (ReferenceProfile.load(Path(f"{name}.tgp")) for name in ("tensors", "captured"))
    assert one.sha256 == two.sha256
    assert len(one.columns) == 8


@pytest.mark.parametrize("ending", ["npz", "csv"])
def test_captured_requests_that_failed_are_no_rows(ending: str) -> None:
    model = models.identity(Path("m.onnx"), "BYTES", 1)
    if ending == "npz":
        np.savez("c.npz", x=np.array(["ulm", "", "rom"] * 500), __status=np.array(["ok", "internal", "ok"] * 500))
    else:
        Path("c.csv").write_text("x,__status\n" + "ulm,ok\n,internal\nrom,ok\n" * 500)
    ok("monitor", "profile", f"c.{ending}", "--model", model, "--run", "-o", "p.tgp")
    found = ReferenceProfile.load(Path("p.tgp"))
    assert [(column.rows, column.present) for column in found.columns] == [(1000, 1000)] * 2


def test_without_a_model_or_by_a_signature() -> None:
    csv("d.csv", values())
    ok("monitor", "profile", "d.csv", "-o", "p.tgp")
    assert columns_of() == [(name, "input", name, 0) for name in NAMES]
    tensors = {"inputs": [{"name": "x", "datatype": "FP64", "shape": [-1, 4]}], "outputs": []}
    Path("s.json").write_text(json.dumps({"signature": tensors}))
    ok("monitor", "profile", "d.csv", "--signature", "s.json", "-o", "q.tgp")
    assert columns_of("q.tgp")[3] == ("d", "input", "x", 3)


def test_strings_and_several_inputs() -> None:
    model = models.identity(Path("m.onnx"), "BYTES", 1)
    with gzip.open("d.csv.gz", "wt") as file:
        file.write("x\n" + "ulm\nrom\n" * 500)
    ok("monitor", "profile", "d.csv.gz", "--model", model, "--run", "-o", "p.tgp")
    assert [c.categories for c in ReferenceProfile.load(Path("p.tgp")).columns] == [(b"rom", b"ulm")] * 2
    two = models.two_inputs(Path("two.onnx"))
    parts = np.arange(16 * 500).reshape(500, 16) % 37
    np.savez("two.npz", INPUT0=parts, INPUT1=parts)
    ok("monitor", "profile", "two.npz", "--model", two, "--run", "-o", "q.tgp")
    assert len(columns_of("q.tgp")) == 64
    sums = next(c for c in ReferenceProfile.load(Path("q.tgp")).columns if c.column.name == "OUTPUT0[0]")
    assert sums.mean == pytest.approx(2 * parts[:, 0].mean())


def test_strings_of_a_text_file_are_what_the_model_is_sent() -> None:
    """Though they look like numbers or truth values."""
    Path("d.csv").write_text("x\n" + "01067\n80331\n" * 1500)
    model = models.identity(Path("m.onnx"), "BYTES", 1)
    ok("monitor", "profile", "d.csv", "--model", model, "--run", "-o", "p.tgp")
    assert [c.categories for c in ReferenceProfile.load(Path("p.tgp")).columns] == [(b"01067", b"80331")] * 2
    shown = json.loads(ok("monitor", "skew", "p.tgp", "d.csv", "--model", model, "--run", "--json").output)
    assert [score["psi"] for score in shown["report"]["windows"][0]["scores"]] == [0.0, 0.0]
    ok("monitor", "profile", "d.csv", "--signature", signature("BYTES"), "-o", "q.tgp")
    shown = json.loads(ok("monitor", "skew", "q.tgp", "d.csv", "--json").output)  # nothing but the profile knows it
    assert [score["psi"] for score in shown["report"]["windows"][0]["scores"]] == [0.0]
    Path("e.csv").write_text("x\n" + "true\nfalse\n" * 1500)
    ok("monitor", "profile", "e.csv", "--signature", signature("BYTES"), "-o", "q.tgp")
    assert ReferenceProfile.load(Path("q.tgp")).columns[0].categories == (b"false", b"true")
    ok("monitor", "calibrate", "q.tgp", "e.csv", "-o", "c.json")


def test_strings_of_outputs_that_the_data_hold_are_as_they_are_written() -> None:
    Path("d.csv").write_text("x,y\n" + "0.5,007\n1.5,012\n" * 1500)
    sides = {"inputs": [("x", "FP32")], "outputs": [("y", "BYTES")]}
    told = {
        side: [{"name": name, "datatype": datatype, "shape": [-1, 1]} for name, datatype in tensors]
        for side, tensors in sides.items()
    }
    Path("s.json").write_text(json.dumps(told))
    ok("monitor", "profile", "d.csv", "--signature", "s.json", "-o", "p.tgp")
    assert ReferenceProfile.load(Path("p.tgp")).columns[1].categories == (b"007", b"012")
    shown = json.loads(ok("monitor", "skew", "p.tgp", "d.csv", "--json").output)
    assert [score["psi"] for score in shown["report"]["windows"][0]["scores"]] == [0.0, 0.0]


def signature(datatype: str) -> Path:
    path = Path(f"{datatype}.json")
    path.write_text(json.dumps({"inputs": [{"name": "x", "datatype": datatype, "shape": [-1, 1]}]}))
    return path


def test_a_model_may_lie_beside_anything() -> None:
    csv("d.csv", values())
    Path("library.so").write_bytes(b"\x7fELF" + bytes(60))
    Path("home").mkdir()
    Path("link.onnx").symlink_to(models.affine(Path("home/m.onnx")))
    ok("monitor", "profile", "d.csv", "--model", "link.onnx", "--run", "-o", "p.tgp")
    assert len(columns_of()) == 8


def test_exact_knots() -> None:
    csv("d.csv", values())
    ok("monitor", "profile", "d.csv", "--knots", "all", "--bins", "5", "-o", "p.tgp")
    first = ReferenceProfile.load(Path("p.tgp")).columns[0]
    assert (len(first.knots), len(first.bins), first.ks_resolution) == (ROWS, 6, 0.0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--map", "a:x"], "--map: wanted COLUMN=TENSOR or COLUMN=TENSOR[INDEX], got 'a:x'"),
        (["--map", "zip=x[0]"], "the data have no column 'zip'; they have a, b, c, d"),
        (["--map", "a=z"], "the model has no tensor 'z'; it has x, y"),
        (["--map", "a=x[9]"], "'x' has 4 elements a row, got index 9"),
        (["--map", "a=x[0]", "--map", "a=x[1]"], "column names must differ, got 'a' twice"),
        (["--map", "a=x[0]", "--run"], "wanted every element of input 'x', the data have 1"),
        (["--kind", "zip=categorical"], "--kind: there is no column 'zip'"),
        (["--kind", "a=colour"], "--kind: wanted COLUMN=KIND with one of numeric"),
        (["--knots", "some"], "--knots must be a whole number or 'all', got 'some'"),
        (["--knots", "1"], "2 to 4000000 knots per column, got 1"),
        (["--knots", "999999999"], "2 to 4000000 knots per column, got 999999999"),
        (["--map", "a=x[0]", "--map", "b=x[0]"], "'a' and 'b' are both mapped to x[0]"),
        (["--map", "a=x[0]", "--map", "b=x"], "'a' and 'b' are both mapped to x[0]"),
        (["--bins", "1"], "bins must be in 2..1000"),
        (["--signature", "s.json"], "give --model or --signature, not both"),
    ],
)
def test_what_does_not_fit_is_told(arguments: list[str], text: str) -> None:
    csv("d.csv", values())
    model = models.affine(Path("m.onnx"))
    assert text in refused("monitor", "profile", "d.csv", "--model", model, "-o", "p.tgp", *arguments)
    assert not Path("p.tgp").exists()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("none.csv", None, "none.csv cannot be read: No such file"),
        ("bad.csv", b"a,a\n1,2\n", "the first line must name the columns, each once"),
        ("bad.npz", b"not a zip", "bad.npz: not a readable npz file"),
        ("bad.txt", b"a", "wanted a .csv, .csv.gz, .npz or .parquet file"),
        (".", None, ".: wanted a .csv"),
        ("short.csv", b"a,b\n1,2\n", "input 'x' has 4 elements a row, the data have 2 columns"),
        ("empty.csv", b"a,b,c,d\n", "rows"),
    ],
)
def test_files_that_are_no_tables_are_told(name: str, content: bytes | None, text: str) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    model = models.affine(Path("m.onnx"))
    assert text in refused("monitor", "profile", name, "--model", model, "-o", "p.tgp")


def test_columns_of_other_lengths_are_told() -> None:
    np.savez("d.npz", a=np.arange(30.0), b=np.arange(30.0))
    ok("monitor", "profile", "d.npz", "-o", "p.tgp")
    np.savez("e.npz", a=np.arange(3000.0), b=np.arange(2500.0))
    text = "the data's columns differ in rows: a 3000, b 2500"
    assert text in refused("monitor", "skew", "p.tgp", "e.npz")
    assert text in refused("monitor", "calibrate", "p.tgp", "e.npz", "-o", "c.json")
    assert text in refused("monitor", "profile", "e.npz", "--label", "b", "-o", "q.tgp")


def test_names_do_not_move_the_cursor() -> None:
    Path("d.csv").write_text("a\x1b[31m\n1\n")
    assert "\x1b" not in ok("monitor", "profile", "d.csv", "-o", "p.tgp").output


def test_more_rows_than_there_is_memory_are_told() -> None:
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 4), }"
    with zipfile.ZipFile("d.npz", "w") as file:
        file.writestr("x.npy", header.ljust(127) + b"\n")
    assert "the data do not fit into memory" in refused("monitor", "profile", "d.npz", "-o", "p.tgp")


def test_where_nothing_can_be_written_the_file_is_named() -> None:
    csv("d.csv", values())
    text = refused("monitor", "profile", "d.csv", "--model", models.affine(Path("m.onnx")), "-o", "no/p.tgp")
    assert "no/p.tgp cannot be written: No such file" in text
    assert ". cannot be written" in refused("monitor", "profile", "d.csv", "-o", ".")


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", "none.csv", "--model", "m.onnx", "-o", "p.tgp"),
        ("profile", "d.csv", "--model", "d.csv", "-o", "p.tgp"),
        ("profile", "d.csv", "--model", "m.onnx", "-o", "p.tgp", "--map", "a:x"),
        ("calibrate", "d.csv", "d.csv", "-o", "c.json"),
        ("skew", "d.csv", "d.csv"),
    ],
)
def test_wrong_input_ends_with_one_line_and_the_status_of_wrong_usage(arguments: tuple[str, ...]) -> None:
    csv("d.csv", values())
    models.affine(Path("m.onnx"))
    done = processes.cli("monitor", *arguments, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_missing_values_cannot_run_through_integers() -> None:
    np.savez("d.npz", x=np.full((10, 1), np.nan))
    model = models.lookup(Path("m.onnx"))
    text = refused("monitor", "profile", "d.npz", "--model", model, "--run", "-o", "p.tgp")
    assert "column 'x' has missing values, which INT64 cannot carry" in text


# --- calibrate and skew ---


def test_independent_rows_need_no_warning_and_dependent_ones_get_it() -> None:
    csv("d.csv", values(rows=20_000))
    ok("monitor", "profile", "d.csv", "-o", "p.tgp")
    calm = ok("monitor", "calibrate", "p.tgp", "d.csv", "-o", "calm.json")
    assert "WARNING" not in calm.output
    walk = values(rows=20_000)
    for row in range(1, len(walk)):
        walk[row, 1] = 0.9 * walk[row - 1, 1] + 0.436 * walk[row, 1]
    csv("walk.csv", walk)
    loud = ok("monitor", "calibrate", "p.tgp", "walk.csv", "-o", "loud.json")
    assert "WARNING: consecutive rows depend on each other" in loud.stderr
    assert "b (" in loud.stderr
    done = Calibration.from_dict(json.loads(Path("loud.json").read_text()))
    assert done.sha256 == ReferenceProfile.load(Path("p.tgp")).sha256
    assert done.ks[1] > 3 > done.ks[0]
    csv("few.csv", values(rows=100))
    assert "calibration needs at least 2048 rows" in refused("monitor", "calibrate", "p.tgp", "few.csv", "-o", "x")


def test_skew_holds_data_against_a_profile() -> None:
    model = models.affine(Path("m.onnx"))
    csv("d.csv", values())
    csv("e.csv", values(0.5, seed=4))
    ok("monitor", "profile", "d.csv", "--model", model, "--run", "-o", "p.tgp")
    shown = ok("monitor", "skew", "p.tgp", "e.csv", "--model", model, "--run", "--html", "s.html").output
    over = [line.split()[1] for line in shown.splitlines() if line.startswith("over")]
    assert set(over) == {"c", "y[2]"}
    assert "Drift of " in Path("s.html").read_text()
    found = json.loads(ok("monitor", "skew", "p.tgp", "e.csv", "--model", model, "--run", "--json").output)
    assert found["report"]["windows"][0]["rows"] == ROWS
    text = refused("monitor", "skew", "p.tgp", "e.csv", "--model", model)
    assert "no column 'y[0]' of the profile: use --model with --run" in text


# --- report ---


def watched(model: str, version: str) -> dict[str, Any]:
    """The document of a monitor that saw a shift in its third column."""
    if (model, version) != ("fraud", "7"):
        raise NotFound(f"version '{version}' of model '{model}' is not monitored")
    profile = ReferenceProfile.from_arrays({"x": values().astype("f4")}, names={"x": NAMES})
    made = Monitor(model, version, profile, Settings(windows=(rows_window(1000),)))
    rows = values(0.5, seed=4).astype("f4")
    for i in range(0, ROWS, 500):
        made.ingest(made.keys, [Item(1_790_000_000_000_000_000 + i, "stable", 500, 0, [[rows[i : i + 500].tobytes()]])])
    same = values(seed=5).astype("f4")
    made.ingest(made.keys, [Item(1_790_000_000_000_000_000, "trial", ROWS, 0, [[same.tobytes()]])])
    compared = [{**asdict(window), "against": "stable"} for window in made.compare("trial")]
    return {"report": made.report().to_dict(), "comparisons": compared}


VERSIONS = [{"model": "fraud", "version": "7", "profile": "ab" * 32, "columns": 4, "alarms": {"stable": ["c"]}}]


def with_server(*commands: list[str], token: str | None = None, versions: Any = VERSIONS) -> list[Result]:
    """Run commands against a real admin listener; ``URL`` among their words becomes its address."""

    async def main() -> list[Result]:
        views = AdminViews(monitors=lambda: {"monitors": versions}, monitor=watched)
        app = admin_app(EchoCatalog(), token=token, loopback=token is None, views=views)
        listener = HttpServer(app, settings=HttpSettings(drain_idle_s=0.01))
        host, port = await listener.start("127.0.0.1", 0)
        try:
            spoken = [[f"http://{host}:{port}" if word == "URL" else word for word in words] for words in commands]
            return [await asyncio.to_thread(run, "monitor", "report", *words) for words in spoken]
        finally:
            await listener.drain(1)

    return asyncio.run(main())


def test_a_report_is_printed_written_as_json_and_as_a_page() -> None:
    listed, text, plain = with_server(
        ["--url", "URL"],
        ["--url", "URL", "--model", "fraud"],
        ["--url", "URL", "--model", "fraud:7", "--json", "--html", "r.html"],
    )
    assert [result.exit_code for result in (listed, text, plain)] == [0, 0, 0]
    assert listed.output.splitlines()[1].split() == ["fraud:7", "abababababab", "4", "stable:", "c"]
    first = next(line.split() for line in text.output.splitlines() if line.startswith("ALARM"))
    assert first[1] == "c"
    assert "stable, last 1000 rows: 1000 rows" in text.output
    against = text.output.partition("trial against stable, last 1000 rows: 1000 rows against 1000\n")[2]
    assert against.splitlines()[1].split()[:2] == ["over", "c"]
    assert json.loads(plain.output)["report"]["windows"][0]["in_alarm"] == ["c"]
    assert Path("r.html").read_text().startswith("<!DOCTYPE html>")


def test_reading_needs_the_token_where_the_server_wants_one() -> None:
    without, given = with_server(["--url", "URL"], ["--url", "URL", "--token", "secret"], token="secret")
    assert isinstance(without.exception, TidegateError)
    assert "401: this needs the admin token" in without.exception.message
    assert given.exit_code == 0


@pytest.mark.parametrize(
    ("reference", "versions", "text"),
    [
        ("fraud:8", VERSIONS, "404: version '8' of model 'fraud' is not monitored"),
        ("other", VERSIONS, "no version is watched, wanted one; name it as other:VERSION"),
        ("fraud", [*VERSIONS, {"model": "fraud", "version": "8"}], "versions 7, 8 are watched, wanted one"),
    ],
)
def test_a_version_that_is_not_there_is_told(reference: str, versions: Any, text: str) -> None:
    (result,) = with_server(["--url", "URL", "--model", reference], versions=versions)
    error = result.exception
    assert text in (error.message if isinstance(error, TidegateError) else result.output)


def test_a_server_that_does_not_speak_http_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=_say, args=(listener, b"SSH-2.0-nothing\r\n\r\n"))
        answering.start()
        text = refused("monitor", "report", "--url", f"127.0.0.1:{listener.getsockname()[1]}")
        answering.join(10)
    assert "cannot be read" in text


def _say(listener: socket.socket, words: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(words)


def test_addresses_that_answer_nothing_are_told() -> None:
    assert "takes the http or https URL" in refused("monitor", "report", "--url", "file:///etc/passwd")
    assert "cannot be read" in refused("monitor", "report", "--url", "127.0.0.1:1")


# --- registry publish ---


def published(*arguments: object) -> Mapping[str, str]:
    """path -> role of the version that is champion after publishing."""
    ok("registry", "publish", "fraud", *arguments, "--alias", "champion")
    shown = json.loads(ok("registry", "show", "fraud").output)
    return {entry["path"]: entry.get("role", "") for entry in shown["files"]}


def profile_of(model: Path, path: str = "p.tgp", datatype: str = "f4", width: int = 4) -> Path:
    del model
    ReferenceProfile.from_arrays({"x": values()[:, :width].astype(datatype)}).save(Path(path))
    return Path(path)


def test_a_profile_goes_with_the_version() -> None:
    model = models.affine(Path("f/model.onnx"))
    profile = profile_of(model)
    assert published(model, "--profile", profile) == {"model.onnx": "model", "profile.tgp": "profile"}
    Path("f/labels.txt").write_text("one\n")
    roles = {"model.onnx": "model", "profile.tgp": "profile", "labels.txt": "labels"}
    assert published("f", "--profile", profile) == roles
    profile_of(model, "f/drift.tgp")
    assert published("f")["drift.tgp"] == "profile"
    ok("registry", "fetch", "fraud", "out")
    assert ReferenceProfile.load(Path("out/drift.tgp")).sha256 == ReferenceProfile.load(profile).sha256


def breaks_file(model: Path) -> None:
    profile_of(model).write_bytes(b"no profile")


Spoil = Callable[[Path], object]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (breaks_file, "p.tgp"),
        (lambda model: profile_of(model, width=3), "has 3 elements a row, the model's has 4"),
        (lambda model: profile_of(model, datatype="f8"), "is FP64, the model's is FP32"),
        (lambda _: ReferenceProfile.from_arrays({"z": values()}).save(Path("p.tgp")), "the model has the inputs x"),
        (lambda _: None, "p.tgp cannot be read: No such file"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused_and_nothing_published(make: Spoil, text: str) -> None:
    model = models.affine(Path("f/model.onnx"))
    make(model)
    assert text in refused("registry", "publish", "fraud", model, "--profile", "p.tgp")
    assert json.loads(ok("registry", "list", "--json").output) == []


def test_two_profiles_are_one_too_many() -> None:
    model = models.affine(Path("f/model.onnx"))
    profile_of(model, "f/one.tgp")
    assert "has the profile one.tgp already" in refused("registry", "publish", "m", "f", "--profile", profile_of(model))
    profile_of(model, "f/two.tgp")
    assert "has 2 profiles, one.tgp, two.tgp" in refused("registry", "publish", "m", "f")


def test_the_signature_of_the_description_is_what_a_profile_is_held_against() -> None:
    model = models.affine(Path("f/model.onnx"))
    about = {"signature": {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 9]}], "outputs": []}}
    Path("about.json").write_text(json.dumps(about))
    text = refused("registry", "publish", "m", model, "--profile", profile_of(model), "--description", "about.json")
    assert "has 4 elements a row, the model's has 9" in text


# --- labels ---


def labelled(path: str = "v.csv") -> tuple[Path, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows of scores, and labels that come as the first of them says; every tenth row has none."""
    rng = np.random.default_rng(8)
    scores = rng.random((ROWS, 4)).round(6)
    fate = (rng.random(ROWS) < scores[:, 0]).astype("f8")
    fate[::10] = np.nan
    return csv(path, np.column_stack([scores, fate]), (*NAMES, "fate")), scores, fate


def test_a_profile_carries_how_good_predictions_were() -> None:
    data, scores, fate = labelled()
    model = models.identity(Path("m.onnx"))
    common = ("--model", model, "--run", "-o", "p.tgp")
    result = ok("monitor", "profile", data, *common, "--label", "fate", "--predict", "y[0]")
    with_labels = ReferenceProfile.load(Path("p.tgp"))
    assert [name for name, *_ in columns_of()] == [*NAMES, *[f"y[{i}]" for i in range(4)]]
    assert with_labels.labels is not None
    assert with_labels.labels.rows == ROWS * 9 // 10
    assert with_labels.labels.basis["output"] == "y"
    told = ~np.isnan(fate)
    right = ((scores[:, 0] >= 0.5) == fate)[told].mean()
    assert f"accuracy {right:.4g}" in result.output
    shown = json.loads(ok("monitor", "profile", data, *common, "--label", "fate", "--predict", "y[0]", "--json").output)
    assert shown["labels"]["accuracy"] == pytest.approx(right)
    csv("plain.csv", scores)
    ok("monitor", "profile", "plain.csv", *common)
    plain = ReferenceProfile.load(Path("p.tgp"))
    assert plain.labels is None
    assert plain.sha256 != with_labels.sha256


def test_labels_by_the_names_of_classes_and_numbers() -> None:
    rng = np.random.default_rng(2)
    x = rng.dirichlet(np.ones(4), 500).astype("f4")
    names = np.array(["a", "b", "c", "d"])[x.argmax(axis=1)]
    np.savez("v.npz", x=x, fate=names, amount=x[:, 1].astype("f8") + 1)
    model = models.identity(Path("m.onnx"))
    common = ("monitor", "profile", "v.npz", "--model", model, "--run", "-o", "p.tgp", "--json")
    many = ok(*common, "--label", "fate", "--predict", "y", "--task", "multiclass", "--classes", "a,b,c,d")
    assert json.loads(many.output)["labels"]["accuracy"] == 1.0
    number = ok(*common, "--label", "amount", "--predict", "y[1]", "--task", "regression")
    assert json.loads(number.output)["labels"]["bias"] == pytest.approx(-1.0)


def test_labels_of_a_text_file_are_names_of_classes_as_they_are_written() -> None:
    x = np.random.default_rng(2).dirichlet(np.ones(3), 500).round(6)
    fate = np.array(["01", "02", "00"])[x.argmax(axis=1)]
    fate[::10] = "NA"
    rows = [",".join([*map(str, row), name]) for row, name in zip(x.tolist(), fate.tolist(), strict=True)]
    Path("v.csv").write_text("x[0],x[1],x[2],fate\n" + "\n".join(rows))
    common = ("--model", models.identity(Path("m.onnx"), width=3), "--run", "-o", "p.tgp", "--json")
    asked = ("--label", "fate", "--predict", "y", "--task", "multiclass", "--classes", "01,02,00")
    labels = json.loads(ok("monitor", "profile", "v.csv", *common, *asked).output)["labels"]
    assert (labels["rows"], labels["accuracy"]) == (450, 1.0)


@pytest.mark.parametrize(
    ("words", "classes"), [(("true", "false"), ("--classes", "true,false")), (("no", "yes"), ()), (("0", "1"), ())]
)
def test_labels_mean_what_they_mean_to_the_server(words: tuple[str, str], classes: tuple[str, ...]) -> None:
    scores = np.random.default_rng(2).random(ROWS).round(6)
    rows = [f"{score},{words[score >= 0.5]}" for score in scores.tolist()]
    Path("v.csv").write_text("x,fate\n" + "\n".join(rows))
    common = ("--model", models.identity(Path("m.onnx"), width=1), "--run", "-o", "p.tgp", "--json")
    shown = ok("monitor", "profile", "v.csv", *common, "--label", "fate", *classes)
    assert json.loads(shown.output)["labels"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--label", "none"), "the data have no column 'none'"),
        (("--label", "fate"), "--predict must name one of y[0], y[1], y[2], y[3]"),
        (("--label", "fate", "--predict", "z"), "got 'z'"),
        (("--label", "fate", "--predict", "y[4]"), "'y' has no element 4"),
        (("--label", "fate", "--predict", "y", "--task", "multiclass"), "without --classes: multiclass needs 2 to 256"),
        (("--label", "fate", "--predict", "y[0]", "--classes", "no,yes,maybe"), "binary needs 0 to 2 classes"),
        (("--label", "a", "--predict", "y[0]"), "--label: 'a' holds"),
        (("--label", "fate", "--predict", "y[0]", "--form", "class"), "are no class of a binary task"),
    ],
)
def test_labels_that_do_not_fit_are_told(arguments: tuple[str, ...], text: str) -> None:
    data, _, _ = labelled()
    model = models.identity(Path("m.onnx"))
    if arguments[1] == "a":
        csv("v.csv", np.column_stack([values(), values()[:, 0]]), ("w", "x1", "y1", "z1", "a"))
    assert text in refused("monitor", "profile", data, "--model", model, "--run", "-o", "p.tgp", *arguments)


def test_labels_need_what_the_model_answers() -> None:
    data, _, _ = labelled()
    assert "use --model with --run" in refused("monitor", "profile", data, "-o", "p.tgp", "--label", "fate")
