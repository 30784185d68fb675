"""loadtests.results: what is saved is what was measured, and damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadtests import results
from loadtests.crew import Sample
from loadtests.histogram import Histogram
from loadtests.results import METRICS, Result, read
from server.errors import ConfigError


def sample(rate: float = 100.0, cpu_s: float | None = 0.002, latency_us: int = 500) -> Sample:
    latency = Histogram()
    for number in range(100):
        latency.record(1000 * (latency_us + number))
    return Sample(1.0, int(rate), {"ok": 99, "http 503": 1}, latency, server_cpu_s=cpu_s, client_cpu_s=0.1)


def result(name: str = "run", **cells: list[Sample]) -> Result:
    made = Result(name, {"rounds": 2})
    for column, samples in cells.items():
        for one in samples:
            made.add("row", column, one)
    return made


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    made = result(a=[sample(), sample(120)], b=[sample(cpu_s=None)])
    path = tmp_path / "deep" / "result.json"
    made.save(path)
    again = results.load(path)
    assert again.to_json() == made.to_json()
    assert again.values("row", "a", "rate") == [100, 120]
    assert again.cells["row"]["b"][0].server_cpu_s is None


def test_facts_of_the_machine_are_in_it() -> None:
    found = result(a=[sample()]).to_json()
    assert found["machine"]["cores"] >= 1
    assert {"cpu", "kernel", "python", "packages", "commit"} <= set(found["machine"])
    assert found["machine"]["packages"]["numpy"]
    assert set(found["load_average"]) == {"start", "end"}


def test_figures_are_those_of_the_sample() -> None:
    one = sample()
    assert read(one, "rate") == 100
    assert read(one, "cpu_us") == pytest.approx(20)
    assert read(one, "p50_us") == pytest.approx(549, rel=0.005)
    assert one.errors == 1
    written = results.sample_json(one)
    assert set(written["figures"]) == set(METRICS) - {"instructions_each"}


def break_schema(found: dict[str, Any]) -> None:
    found["schema"] = "other/1"


def lose_machine(found: dict[str, Any]) -> None:
    del found["machine"]


def lose_latency(found: dict[str, Any]) -> None:
    del found["cells"][0]["samples"][0]["latency"]


def miscount(found: dict[str, Any]) -> None:
    found["cells"][0]["samples"][0]["latency"]["count"] += 1


def speak(found: dict[str, Any]) -> None:
    found["cells"][0]["samples"][0]["server_cpu_s"] = "little"


@pytest.mark.parametrize("damage", [break_schema, lose_machine, lose_latency, miscount, speak])
def test_damage_is_named(tmp_path: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    found = result(a=[sample()]).to_json()
    damage(found)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=r"result\.json"):
        results.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "\udcff"])
def test_what_is_no_result(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"result\.json"):
        results.load(path)


def test_a_folder_that_takes_no_result_is_named_before(tmp_path: Path) -> None:
    results.check_folder(tmp_path / "deep" / "down")
    assert (tmp_path / "deep" / "down").is_dir()
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "down"):
        with pytest.raises(OSError, match="file"):
            results.check_folder(wrong)
