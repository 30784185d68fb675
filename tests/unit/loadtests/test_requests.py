"""loadtests.requests: what the V2 protocol asks for, and servers that are asked in a form of their own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from loadtests import h2load
from loadtests.crew import Crew, Way
from loadtests.requests import Request, v2_request
from loadtests.servers import Target
from server._pb import inference_pb2 as pb

ROW = {"x": np.array([[1.0, 2.0]], np.float32)}


def test_json() -> None:
    request = v2_request("http-json", "m", "", ROW)
    assert request.path == "/v2/models/m/infer"
    assert json.loads(request.body)["inputs"][0]["data"] == [1.0, 2.0]


def test_binary_says_where_its_tensors_begin() -> None:
    request = v2_request("http-binary", "m", "3", ROW)
    assert request.path == "/v2/models/m/versions/3/infer"
    size = int(dict(request.headers)["inference-header-content-length"])
    assert json.loads(request.body[:size])["inputs"][0]["parameters"] == {"binary_data_size": 8}
    assert np.frombuffer(request.body[size:], "<f4").tolist() == [1.0, 2.0]


@pytest.mark.parametrize("protocol", ["grpc", "grpcio"])
def test_grpc_has_no_frame_yet(protocol: str) -> None:
    request = v2_request(protocol, "m", "3", ROW)
    message = pb.ModelInferRequest.FromString(request.body)
    assert (message.model_name, message.model_version) == ("m", "3")
    assert request.path.endswith("/ModelInfer")


class Recorder(BaseHTTPRequestHandler):
    """Answers ``right`` to whatever it is asked, and keeps the last request."""

    protocol_version = "HTTP/1.1"
    seen: tuple[str, str, bytes] = ("", "", b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        type(self).seen = (self.path, self.headers["x-form"], body)
        self.send_response(200)
        self.send_header("content-length", "5")
        self.end_headers()
        self.wfile.write(b"right")

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def own_form() -> Iterator[Target]:
    Recorder.seen = ("", "", b"")
    with ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever)
        thread.start()
        request = Request("/own", (("x-form", "own"),), b"a row")
        yield Target("other", f"127.0.0.1:{server.server_port}", requests={"http-json": request})
        server.shutdown()
        thread.join()


def test_a_target_is_asked_in_its_own_form(own_form: Target) -> None:
    async def ask() -> dict[str, int]:
        crew = Crew(own_form, "m", Way("http-json", 1), ROW, lambda body: body == b"right")
        try:
            return (await crew.measure(0.5)).outcomes
        finally:
            await crew.close()

    assert set(asyncio.run(ask())) == {"ok"}
    assert Recorder.seen == ("/own", "own", b"a row")


@pytest.mark.skipif(h2load.path() is None, reason="h2load is not installed")
def test_h2load_asks_in_it_too(own_form: Target) -> None:
    sample = asyncio.run(h2load.measure(own_form, "m", Way("http-json", 1), ROW, 1.0))
    assert set(sample.outcomes) == {"ok"}
    assert Recorder.seen == ("/own", "own", b"a row")
