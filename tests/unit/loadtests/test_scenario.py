"""loadtests.scenario: what a file may say, and errors that name what it must not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loadtests.crew import Way
from loadtests.scenario import load_scenario, payload_of, read_npz
from server.errors import ConfigError

GOOD = """
name: steady
target: {http: "127.0.0.1:8000", grpc: "127.0.0.1:8001", pid: 12}
model: fraud
payload: {inline: {x: {datatype: FP32, shape: [1, 2], data: [1.5, 2]}}}
protocol: grpc
loop: open
rate: 250
connections: 4
streams: 8
duration_s: 2
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "scenario.yaml"
    path.write_text(text)
    return path


def test_a_good_file(tmp_path: Path) -> None:
    scenario = load_scenario(written(tmp_path, GOOD))
    assert scenario.way() == Way("grpc", 4, 8)
    assert (scenario.rate, scenario.arrivals, scenario.rounds) == (250, "poisson", 3)
    payload = payload_of(scenario, "", "")
    assert payload["x"].tolist() == [[1.5, 2.0]]
    assert payload["x"].dtype == np.float32


def test_paths_start_at_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.ones((2, 3), np.float32))
    text = "name: a\ntarget: {serve: models/m.onnx}\nmodel: m\npayload: {npz: rows.npz}\nprotocol: http-json\n"
    scenario = load_scenario(written(tmp_path, text))
    assert scenario.target.serve == tmp_path / "models" / "m.onnx"
    assert payload_of(scenario, "", "")["x"].shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("model: fraud", "modle: fraud"), "modle"),
        (("rate: 250", "rate: 0"), "rate"),
        (("loop: open", "loop: closed"), "rate"),
        (("protocol: grpc", "protocol: http-json"), "streams must be 1"),
        (("protocol: grpc", "protocol: smtp"), "protocol"),
        (("connections: 4", "connections: 0"), "connections"),
        (("pid: 12}", "pid: 12, serve: m.onnx}"), "either serve"),
        (('http: "127.0.0.1:8000"', 'http: "localhost"'), "HOST:PORT"),
        (("data: [1.5, 2]", "data: [1.5]"), "does not fit"),
        (("datatype: FP32", "datatype: FP31"), "FP31"),
        (("payload: {inline", "payload: {npz: a.npz, inline"), "one of inline, npz and generate"),
        (("loop: open", "loop: open\ngenerator: h2load"), "h2load"),
        (("duration_s: 2", "duration_s: .inf"), "duration_s"),
        (("name: steady", "- name: steady"), "scenario.yaml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(ConfigError, match=said):
        load_scenario(written(tmp_path, GOOD.replace(*change)))


def test_every_wrong_key_is_named_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("rate: 250", "rate: fast").replace("connections: 4", "connections: many")
    with pytest.raises(ConfigError, match=r"(?s)rate.*connections|connections.*rate"):
        load_scenario(written(tmp_path, text))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_scenario(tmp_path / "none.yaml")


@pytest.mark.parametrize(("text", "got"), [("", "NoneType"), ("- 1", "list"), ("steady", "str")])
def test_a_file_without_keys(tmp_path: Path, text: str, got: str) -> None:
    with pytest.raises(ConfigError, match=f"mapping of keys, got {got}"):
        load_scenario(written(tmp_path, text))


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_an_npz_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "rows.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"rows\.npz"):
        read_npz(path)


def test_an_npz_of_objects_or_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ConfigError, match=r"rows\.npz"):
        read_npz(path)
    np.savez(path)
    with pytest.raises(ConfigError, match="no arrays"):
        read_npz(path)
