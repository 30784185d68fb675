"""The whole of ``make bench``, floors and all, in its smallest form; and every floor's answer against the model's."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest

from loadtests import bench_table, h2load
from loadtests.bench import Plan, check_labels, chosen, measure
from loadtests.bench_rows import ROWS
from loadtests.crew import Crew, Pace, Protocol, Sample, Way, checking
from loadtests.models import MODEL, bench_row, write_model
from loadtests.servers import Target, floor
from loadtests.session import session
from server.errors import InvalidArgument

FLOORS: dict[str, tuple[Protocol, ...]] = {
    "ngh2": ("grpc", "grpcio"),
    "bare": ("http-json", "http-binary", "grpc", "grpcio"),
    "native-echo": ("http-json", "http-binary", "grpc", "grpcio"),
    "grpc-echo": ("grpc", "grpcio"),
    "usual-grpc": ("grpc", "grpcio"),
    "usual-http": ("http-json", "http-binary"),
}


@pytest.mark.parametrize("name", FLOORS)
def test_floors_answer_what_the_model_answers(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / f"{MODEL}.onnx")
    wanted = {"y": np.asarray(session(tmp_path / f"{MODEL}.onnx").run(None, {"x": bench_row()})[0])}

    async def ask(target: Target, protocol: Protocol) -> Sample:
        way = Way(protocol, 4, 1 if protocol.startswith("http") else 2)
        crew = Crew(target, MODEL, way, {"x": bench_row()}, checking(protocol, wanted))
        try:
            open_loop = await crew.measure(0.1, Pace(100))
            assert set(open_loop.outcomes) == {"ok"}
            sample = await crew.measure(0.5)
            for _ in range(10):  # unless one of the two stood still for all of it
                assert set(sample.outcomes) <= {"ok"}
                if sample.completed:
                    break
                sample = await crew.measure(0.5)
            return sample
        finally:
            await crew.close()

    with floor(name, tmp_path) as target:
        assert bool(target.http) == ("http-json" in FLOORS[name])
        for protocol in FLOORS[name]:
            sample = asyncio.run(ask(target, protocol))
            assert set(sample.outcomes) == {"ok"}
            assert sample.completed > 0
            assert sample.cpu_us > 0
    assert not Path(f"/proc/{target.pid}").exists()


def test_rows_are_chosen_by_name() -> None:
    assert [row.name for row in chosen(["gRPC 8x8", "gRPC 64x1"])] == ["gRPC 64x1", "gRPC 8x8"]
    with pytest.raises(InvalidArgument, match="gRPC 64x1"):
        chosen(["gRPC 64"])
    assert len(chosen(None)) == len(ROWS) - (h2load.path() is None)


def test_labels_of_peers_are_their_own() -> None:
    one = Target("one", "h:1")
    check_labels((one, Target("two", "h:1")))
    for label in ("native", "onnxruntime", "one"):
        with pytest.raises(InvalidArgument, match=label):
            check_labels((one, Target(label, "h:1")))


def test_a_peer_stands_beside_ours(tmp_path: Path) -> None:
    write_model(tmp_path / f"{MODEL}.onnx")
    allowed = os.sched_getaffinity(0)
    with floor("bare", tmp_path) as other:
        peer = Target("peer", other.http, other.grpc, pid=other.pid)
        result = measure(Plan(chosen(["HTTP binary 64"]), 1, 0.4, (peer,)))
    (columns,) = result.cells.values()
    assert set(columns) == {"native", "reference", "usual-http", "bare", "native-echo", "peer"}
    for samples in columns.values():
        assert [sample.errors for sample in samples] == [0]
        assert samples[0].completed > 0
    assert "HTTP binary 64: peer to native, /s" in bench_table.text(result, ROWS)
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_every_row_is_measured_without_an_error() -> None:
    result = measure(Plan(chosen(None), 1, 0.3))
    for row in chosen(None):
        assert set(row.columns) <= set(result.cells[row.name])
        for column, samples in result.cells[row.name].items():
            assert [sample.errors for sample in samples] == [0], (row.name, column)
            assert samples[0].completed > 0, (row.name, column)
