"""loadtests.peers.table: which goals there are, whether they are met, and that nothing is hidden."""

from __future__ import annotations

from loadtests.peers.catalog import KSERVE, MOSEC, PYTRITON
from loadtests.peers.paired import OURS, rows_of
from loadtests.peers.table import goals, text
from loadtests.results import Result
from tests.unit.loadtests.test_results import sample

ROWS = rows_of("h2load")
JSON, BINARY, GRPC = ROWS[:3]


def measured(**columns: tuple[float, float]) -> Result:
    """(requests a second, CPU seconds) of each column in the first row, ``grpc_`` before it: in the gRPC one."""
    peers = {peer.name: peer.says for peer in (MOSEC, PYTRITON, KSERVE)}
    batch = {"max_rows": 32, "delay_ms": 1}
    left_out = {"kserve": "no wheel\nat all"}
    told = {"rounds": 3, "rounds_wanted": 4, "peers": peers, "batch": batch, "left_out": left_out}
    result = Result("peers", told)
    for name, (rate, cpu_s) in columns.items():
        row = GRPC if name.startswith("grpc_") else JSON
        for _ in range(3):
            result.add(row.name, name.removeprefix("grpc_"), sample(rate, cpu_s))
    return result


def test_rows_are_three_protocols_on_one_core_and_on_all() -> None:
    assert [row.name for row in ROWS[:3]] == ["HTTP JSON, one core", "HTTP binary, one core", "gRPC, one core"]
    assert all(row.way.in_flight == 64 for row in ROWS)
    assert [row.all_cores for row in ROWS] == [False] * 3 + [True] * 3
    assert [row.external for row in ROWS] == [True, True, False] * 2
    assert not any(row.external for row in rows_of(None))


def test_goals_are_of_peers_by_protocol() -> None:
    of_json = measured(tidegate=(200, 0.002), mosec=(100, 0.002), pytriton=(10, 0.01), floor=(9, 1.0))
    assert {(goal.base_column, goal.metric, goal.limit) for goal in goals(of_json, ROWS)} == {
        ("mosec", "rate", 2.0),
        ("mosec", "cpu_us", 0.5),
        ("pytriton", "rate", 1.0),
        ("pytriton", "cpu_us", 1.0),
    }
    of_grpc = goals(measured(grpc_tidegate=(1200, 0.002), grpc_pytriton=(100, 0.002)), ROWS)
    assert {goal.limit for goal in of_grpc} == {12.0, 1 / 12}


def test_goals_that_are_met() -> None:
    said = text(measured(tidegate=(210, 0.002), mosec=(100, 0.002)), ROWS)
    assert "HTTP JSON, one core: tidegate to mosec, /s" in said
    assert "2.10 [2.10, 2.10]" in said
    assert "NOT reached in" not in said
    assert f"no errors of {OURS}" in said
    assert "Left out, kserve: no wheel\n" in said + "\n"
    assert "at all" not in said
    assert "3 rounds of 4: then time was up." in said


def test_ahead_is_less_than_the_goal() -> None:
    said = text(measured(tidegate=(150, 0.002), mosec=(100, 0.002)), ROWS)
    lines = {line.split("  ")[0]: line for line in said.splitlines()}
    assert lines["HTTP JSON, one core: tidegate to mosec, /s"].endswith("NOT reached")
    assert lines["ahead of mosec in all 2 comparisons"].endswith(" reached")


def test_a_peer_that_is_ahead_is_said() -> None:
    said = text(measured(tidegate=(90, 0.001), mosec=(100, 0.002)), ROWS)
    assert "NOT reached in 1: HTTP JSON, one core (/s)" in said


def test_errors_of_ours_are_told() -> None:
    assert "NOT reached: 3" in text(measured(tidegate=(90, 0.001), mosec=(100, 0.002)), ROWS)


def test_a_busy_machine_is_told() -> None:
    result = measured(grpc_tidegate=(1200, 0.002), grpc_pytriton=(100, 0.002))
    assert "NOISE" not in text(result, ROWS)
    for columns in result.cells.values():
        for samples in columns.values():
            for one in samples:
                one.foreign_cpu_s = 1.4 * one.seconds
    assert "NOISE: everything else on the machine took 1.4 cores" in text(result, ROWS)
