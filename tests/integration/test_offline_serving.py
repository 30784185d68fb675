"""Batch answers against a real server's for the same rows, bit for bit; and a bundle, exported, checked and served."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from onnx import TensorProto, helper

from server.offline.chunks import read_chunks
from server.types import DATATYPES
from tests.support import models, v2
from tests.support.cli import cli, quickly
from tests.support.server import Server, serving

ROWS, WIDTH = 96, 24


def network(path: Path, seed: int) -> Path:
    """Two layers of FP32 matrix products: what they round to depends on how they are run."""
    rng = np.random.default_rng(seed)
    return models.save(
        path,
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
            helper.make_node("Tanh", ["h"], ["t"]),
            helper.make_node("Gemm", ["t", "w2", "b2"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["n", WIDTH])],
        [("y", TensorProto.FLOAT, ["n", 3])],
        {
            "w1": rng.normal(size=(WIDTH, 33)).astype("f4"),
            "b1": rng.normal(size=33).astype("f4"),
            "w2": rng.normal(size=(33, 3)).astype("f4"),
            "b2": rng.normal(size=3).astype("f4"),
        },
    )


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    for number in (1, 2):
        source = network(folder / f"{number}/model.onnx", number).parent
        alias = "champion" if number == 1 else "challenger"
        quickly("registry", "publish", "net", str(source), "--alias", alias, "--state-dir", str(folder / "state"))
    return folder / "state"


@pytest.fixture(scope="module")
def server(state: Path) -> Iterator[Server]:
    with serving("--state-dir", str(state)) as found:
        yield found


@pytest.fixture(scope="module")
def x() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)


def online(server: Server, x: np.ndarray[Any, Any], step: int, version: str = "") -> bytes:
    """The server's raw answers to requests of ``step`` rows, one after the other, in the binary form."""
    path = "/v2/models/net" + (f"/versions/{version}" if version else "") + "/infer"
    answers = b""
    for start in range(0, len(x), step):
        part = x[start : start + step]
        size = {"binary_data_size": part.nbytes}
        head = json.dumps(
            {
                "inputs": [{"name": "x", "datatype": "FP32", "shape": list(part.shape), "parameters": size}],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
        status, body, found = v2.call(server.http, "POST", path, head + part.tobytes(), headers)
        assert status == 200, body
        answers += body[int(found["inference-header-content-length"]) :]
    return answers


def answers_of(path: Path) -> bytes:
    (table,) = read_chunks(path, 10_000)
    return np.stack([np.asarray(table[f"y[{i}]"], np.float32) for i in range(3)], axis=1).tobytes()


@pytest.mark.parametrize(("reference", "version"), [("net", ""), ("net@challenger", "2"), ("net:1", "1")])
@pytest.mark.parametrize("step", [1, 8])
def test_batch_answers_are_the_servers_bit_for_bit(
    tmp_path: Path, server: Server, state: Path, x: np.ndarray[Any, Any], reference: str, version: str, step: int
) -> None:
    np.savez(tmp_path / "in.npz", x=x)
    out = tmp_path / "out.parquet"
    files = ["--in", str(tmp_path / "in.npz"), "--out", str(out), "--state-dir", str(state)]
    arguments = ["batch", *files, "--model", reference, "--batch-rows", str(step), "--chunk-rows", "40", "--json"]
    said = cli(*arguments).stdout if step == 1 else quickly(*arguments)
    assert answers_of(out) == online(server, x, step, version)
    (table,) = read_chunks(out, 10_000)
    report = json.loads(said)
    assert set(table["__version"]) == {version or "1"} == {report["version"]}
    assert set(table["__digest"]) == {report["digest"]}


#: A column of 5,000 rows in row groups of 2,048, for each datatype, as SQL of the row number ``i``.
COLUMNS = {
    "BOOL": "i % 3 = 0",
    "INT8": "(i % 256 - 128)::TINYINT",
    "INT64": "9223372036854775807 - i",
    "UINT64": "18446744073709551615::UBIGINT - i::UBIGINT",
    "FP16": "(i / 7)::FLOAT",
    "FP32": "CASE WHEN i % 5 = 0 THEN NULL ELSE i / 7 END",
    "FP64": "CASE i % 4 WHEN 0 THEN '-inf'::DOUBLE WHEN 1 THEN -0.0 ELSE i / 7 END",
    "BYTES": "CASE WHEN i % 5 = 0 THEN '' ELSE 'é' || i END",
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Server]]:
    """A server of a model for each datatype, called after it, and the folder that it serves."""
    root = tmp_path_factory.mktemp("odd")
    for datatype in COLUMNS:
        models.identity(root / datatype / "1" / "model.onnx", datatype, 1)
    with serving("--model-repository", str(root), cwd=root.parent) as found:
        yield root, found


@pytest.mark.parametrize("datatype", sorted(COLUMNS))
def test_every_datatype_is_answered_as_online(tmp_path: Path, odd: tuple[Path, Server], datatype: str) -> None:
    """The server is asked in the binary form with the rows of the Parquet file; a missing float is NaN there."""
    root, server = odd
    source, out = tmp_path / "in.parquet", tmp_path / "out.npz"
    query = f"SELECT i, {COLUMNS[datatype]} AS x FROM range(5000) t(i) ORDER BY i"  # noqa: S608 - the test's own words
    with duckdb.connect() as connection:
        connection.execute(f"COPY ({query}) TO '{source}' (FORMAT parquet, ROW_GROUP_SIZE 2048)")
        values = [row[1] for row in connection.execute(query).fetchall()]
    arguments = ["--in", str(source), "--out", str(out), "--model", str(root / datatype / "1/model.onnx")]
    quickly("batch", *arguments, "--batch-rows", "64", "--chunk-rows", "640", "--keep", "i")
    with np.load(out) as found:
        assert found["i"].tolist() == list(range(5000))
        answers = found["y"]
    rows = [*values[:64], *values[-64:]]
    online = [asked for start in (0, 64) for asked in ask(server, datatype, rows[start : start + 64])]
    mine = [*answers[:64], *answers[-64:]]
    assert bits(online, datatype) == bits(mine, datatype)


def bits(values: list[Any], datatype: str) -> bytes:
    """Their bytes; FP16 as the FP32 that batch writes it as."""
    if datatype == "BYTES":
        return repr([value.decode() if isinstance(value, bytes) else str(value) for value in values]).encode()
    return np.array(values).astype("f4" if datatype == "FP16" else DATATYPES[datatype][0]).tobytes()


def ask(server: Server, datatype: str, values: list[Any]) -> list[Any]:
    """The answers to rows, over the binary form."""
    if datatype == "BYTES":
        data = lengthened([value.encode() for value in values])
    else:
        data = np.array([math.nan if value is None else value for value in values], DATATYPES[datatype][0]).tobytes()
    size = {"binary_data_size": len(data)}
    asked = {"name": "x", "datatype": datatype, "shape": [len(values), 1], "parameters": size}
    head = json.dumps({"inputs": [asked], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    status, body, found = v2.call(server.http, "POST", f"/v2/models/{datatype}/infer", head + data, headers)
    assert status == 200, body
    answer = body[int(found["inference-header-content-length"]) :]
    return elements(answer) if datatype == "BYTES" else list(np.frombuffer(answer, DATATYPES[datatype][0]))


def lengthened(values: list[bytes]) -> bytes:
    return b"".join([len(value).to_bytes(4, "little") + value for value in values])


def elements(data: bytes) -> list[bytes]:
    found = []
    while data:
        size = int.from_bytes(data[:4], "little")
        found.append(data[4 : 4 + size])
        data = data[4 + size :]
    return found


def test_a_bundle_is_served_without_its_registry(
    tmp_path: Path, server: Server, state: Path, x: np.ndarray[Any, Any]
) -> None:
    folder = tmp_path / "edge"
    cli("export", "net@challenger", str(folder), "--state-dir", str(state))
    assert "is whole" in cli("export", "--verify", str(folder)).stdout
    again = cli("export", "net", str(folder), "--state-dir", str(state), check=False)
    assert (again.returncode, "never overwritten" in again.stderr) == (1, True)
    with serving(str(folder / "config.yaml"), cwd=tmp_path) as edge:
        assert v2.get(edge.http, "/v2/models/net")[1]["versions"] == ["2"]
        assert online(edge, x[:8], 8) == online(server, x[:8], 8, "2")
    assert "is whole" in cli("export", "--verify", str(folder)).stdout


def test_wrong_usage_ends_with_one_line(tmp_path: Path, state: Path) -> None:
    for args in (
        ["batch", "--in", "none.csv", "--out", str(tmp_path / "o.csv"), "--model", "net", "--state-dir", str(state)],
        ["batch", "--in", "none.csv", "--out", "o.csv", "--model", "nothing", "--state-dir", str(state)],
        ["data", "export", "--model", "net", "-o", str(tmp_path / "o.csv"), "--state-dir", str(state)],
        ["data", "export", "--model", "net", "-o", "o.csv", "--from", "soon", "--state-dir", str(state)],
        ["export", "net@none", str(tmp_path / "e"), "--state-dir", str(state)],
        ["export", "--verify", str(tmp_path)],
        ["export"],
    ):
        done = cli(*args, check=False)
        assert done.returncode in (1, 2), args
        assert "Traceback" not in done.stderr, args
        assert done.stderr.strip(), args
    assert list(tmp_path.iterdir()) == []
