"""``python -m loadtests`` from a scenario file to a comparison and a page, against a real server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from loadtests import results, runner
from loadtests.__main__ import main
from loadtests.models import MODEL, write_model
from loadtests.scenario import load_scenario
from loadtests.servers import Target, floor, serving

SCENARIO = """
name: {name}
target: {{label: ours, grpc: "{grpc}", http: "{http}", pid: {pid}}}
model: bench
protocol: {protocol}
{loop}
connections: 2
ramp_s: 0.05
duration_s: 0.2
rounds: 2
"""


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_run_compare_plot(tmp_path: Path) -> None:
    write_model(tmp_path / f"{MODEL}.onnx")
    closed, opened = tmp_path / "closed.yaml", tmp_path / "open.yaml"
    with serving(tmp_path / f"{MODEL}.onnx") as (pid, ready):
        places = {"grpc": ready["grpc"], "http": ready["http"], "pid": pid}
        closed.write_text(SCENARIO.format(name="closed", protocol="grpc", loop="streams: 2", **places))
        opened.write_text(SCENARIO.format(name="open", protocol="http-json", loop="loop: open\nrate: 50", **places))
        a, b = tmp_path / "a.json", tmp_path / "b.json"
        assert "round 2 of 2" in run("run", closed, "--output", a)
        run("run", opened, "--output", b, "--html", tmp_path / "b.html")
    found = results.load(b).cells["open"]["ours"]
    assert [sample.errors for sample in found] == [0, 0]
    assert all(sample.late.count == sample.latency.count > 0 for sample in found)
    assert (tmp_path / "b.html").read_text().startswith("<!DOCTYPE html>")
    said = run("compare", a, b)
    assert "warning: protocol differs: grpc and http-json" in said
    assert "p99_us" in said
    assert run("plot", a).strip() == str(tmp_path / "a.html")
    assert "Latency by percentile" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize("loop", ["loop: open", "rate: 5"])
def test_errors_are_one_line(tmp_path: Path, loop: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(SCENARIO.format(name="n", grpc="127.0.0.1:1", http="", pid=0, protocol="grpc", loop=loop))
    result = CliRunner().invoke(main, ["run", str(path), "--output", str(tmp_path / "r.json")])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "Traceback" not in result.output


GONE = """
name: gone
target: {{http: "127.0.0.1:9"{more}}}
model: bench
payload: {{inline: {{x: {{datatype: FP32, shape: [1], data: [1]}}}}}}
protocol: http-json
generator: {generator}
"""


@pytest.mark.parametrize("generator", ["own", "h2load"])
@pytest.mark.parametrize(("more", "wanted"), [("", "nobody answers at 127.0.0.1:9"), (", pid: 4194305", "target.pid")])
def test_a_server_that_is_not_there(tmp_path: Path, generator: str, more: str, wanted: str) -> None:
    (tmp_path / "s.yaml").write_text(GONE.format(generator=generator, more=more))
    result = CliRunner().invoke(main, ["run", str(tmp_path / "s.yaml"), "--output", str(tmp_path / "r.json")])
    assert (result.exit_code, result.output.startswith("Error: ")) == (1, True)
    assert wanted in result.output
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("generator", ["own", "h2load"])
def test_a_round_without_a_server_is_none(tmp_path: Path, generator: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(GONE.format(generator=generator, more=""))
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9"):
        asyncio.run(runner.run(load_scenario(path), Target("ours", "127.0.0.1:9", ""), print))


@pytest.mark.parametrize("generator", ["own", "h2load"])
def test_a_run_in_which_every_request_failed_is_no_success(tmp_path: Path, generator: str) -> None:
    write_model(tmp_path / f"{MODEL}.onnx")
    path, kept = tmp_path / "s.yaml", tmp_path / "r.json"
    more = f"generator: {generator}\npayload: {{inline: {{x: {{datatype: FP32, shape: [1], data: [1]}}}}}}"
    with serving(tmp_path / f"{MODEL}.onnx") as (_, ready):
        path.write_text(SCENARIO.format(name="n", grpc="", http=ready["http"], pid=0, protocol="http-json", loop=more))
        result = CliRunner().invoke(main, ["run", str(path), "--output", str(kept)])
    assert result.exit_code == 1, result.output
    assert "no request succeeded" in result.output.splitlines()[-1]
    assert all(sample.outcomes.get("http 400") for sample in results.load(kept).cells["n"]["ours"])


class Mortal(asyncio.Protocol):
    """Answers so many requests, then it and its listener are gone."""

    def __init__(self, left: list[int], listener: list[asyncio.Server]) -> None:
        self.left, self.listener = left, listener

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.left[0] -= 1
        if self.left[0] < 0:
            self.listener[0].close()
            self.transport.abort()
        else:
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


@contextmanager
def mortal(answers: int) -> Iterator[str]:
    loop = asyncio.new_event_loop()
    listener: list[asyncio.Server] = []
    left = [answers]
    listener.append(loop.run_until_complete(loop.create_server(lambda: Mortal(left, listener), "127.0.0.1", 0)))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{listener[0].sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_what_was_measured_until_a_server_was_gone_is_kept(tmp_path: Path) -> None:
    more = "loop: open\nrate: 200\npayload: {inline: {x: {datatype: FP32, shape: [1], data: [1]}}}"
    path, kept = tmp_path / "s.yaml", tmp_path / "r.json"
    with mortal(20) as http:
        path.write_text(SCENARIO.format(name="n", grpc="", http=http, pid=0, protocol="http-json", loop=more))
        result = CliRunner().invoke(main, ["run", str(path), "--output", str(kept)])
    assert result.exit_code == 1, result.output
    assert "1 of 2 rounds were measured" in result.output
    (sample,) = results.load(kept).cells["n"]["ours"]
    assert 0 < sample.outcomes["ok"] <= 20
    assert sample.errors > 0


@pytest.mark.parametrize("option", ["--output", "--html"])
def test_a_place_that_takes_no_file_is_told_before(tmp_path: Path, option: str) -> None:
    (tmp_path / "s.yaml").write_text(GONE.format(generator="own", more=""))
    (tmp_path / "file").touch()
    arguments = ["run", str(tmp_path / "s.yaml"), "--output", str(tmp_path / "r"), option, str(tmp_path / "file" / "x")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert f"{tmp_path}/file" in result.output


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    results.Result("n", {}).save(tmp_path / "r.json")
    (tmp_path / "file").touch()
    page = tmp_path / "file" / "x.html"
    result = CliRunner().invoke(main, ["plot", str(tmp_path / "r.json"), "-o", str(page)])
    assert (result.exit_code, result.output.startswith("Error: ")) == (1, True)
    assert f"{tmp_path}/file" in result.output
    run("plot", tmp_path / "r.json", "-o", tmp_path / "new" / "x.html")
    assert (tmp_path / "new" / "x.html").read_text().startswith("<!DOCTYPE html>")


def test_a_model_that_cannot_be_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path / f"{MODEL}.onnx")
    path = tmp_path / "s.yaml"
    with floor("bare", tmp_path) as other:  # its answer to everything is no metadata
        path.write_text(SCENARIO.format(name="n", grpc="", http=other.http, pid=0, protocol="http-json", loop=""))
        result = CliRunner().invoke(main, ["run", str(path), "--output", str(tmp_path / "r.json")])
    assert result.exit_code == 1
    assert "metadata" in result.output
