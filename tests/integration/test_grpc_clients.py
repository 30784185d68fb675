"""gRPC's own clients in Go, Java and JavaScript on both transports: what they check is in ``tests/clients/grpc_*``."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from server._pb import inference_pb2 as pb
from server.types import RequestLimits
from tests.support import models, pki, programs
from tests.support.echo import EchoPort, running
from tests.support.http2 import INFER, STREAM_INFER
from tests.support.secured import secured
from tests.support.server import Server, serving

#: The first build of the Go client compiles its library, and the first run of the JavaScript one installs it.
pytestmark = pytest.mark.timeout(300)

CHECKS = ("unary", "metadata", "stream", "given_up", "gzip", "large", "deadline", "errors", "health", "storm")
#: Calls of each of eight callers in ``storm``; grpc-js and the reference take longer for them.
STORM = {("go", "native"): 1000, ("java", "native"): 1000}
STORM_OTHERWISE = 200
LANGUAGES = {"go": programs.grpc_go, "java": programs.grpc_java, "js": programs.grpc_js}
TRANSPORTS = ("native", "reference")
LIMITS = RequestLimits(max_body_bytes=4 << 20)
RUN_S = 100
HELD_NS = 50_000_000  # until the deadline of the calls of "deadline", as they are sent


@pytest.fixture(scope="module", params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def program(language: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of one language's client."""
    return LANGUAGES[language](tmp_path_factory.mktemp(language))


def message(model: str, *numbers: float, id: str = "") -> bytes:
    request = pb.ModelInferRequest(model_name=model, id=id)
    request.inputs.add(name="x", datatype="FP32", shape=[1, len(numbers)])
    request.raw_input_contents.append(np.array(numbers, "<f4").tobytes())
    return request.SerializeToString()


def answered(channel: grpc.Channel, request: bytes, wanted: np.ndarray[Any, Any]) -> tuple[bytes, bytes]:
    """The right answers to ``request``, of a unary call and in a stream: got by grpcio, read by protobuf."""
    unary = channel.unary_unary(INFER)(request, timeout=20)
    (streamed,) = channel.stream_stream(STREAM_INFER)(iter([request]), timeout=20)
    for answer in (pb.ModelInferResponse.FromString(unary), pb.ModelStreamInferResponse.FromString(streamed)):
        response = answer.infer_response if isinstance(answer, pb.ModelStreamInferResponse) else answer
        assert np.array_equal(np.frombuffer(response.raw_output_contents[0], "<f4"), wanted)
    return unary, streamed


def write_pair(folder: Path, channel: grpc.Channel, name: str, request: bytes, wanted: np.ndarray[Any, Any]) -> None:
    unary, streamed = answered(channel, request, wanted)
    (folder / f"{name}.request").write_bytes(request)
    (folder / f"{name}.answer").write_bytes(unary)
    (folder / f"{name}.streamed").write_bytes(streamed)


#: path, request, status, trailer retry-after, text ("*": of the library)
ERRORS = f"""\
{INFER}\tunknown.request\t5\t-\tRequest for unknown model: 'é%' is not found
{INFER}\tfull.request\t14\t1\tExceeds maximum queue size
{INFER}\tnoise.request\t3\t-\t*
/a/B\tsmall.request\t12\t-\t*
"""


def client_files(certificates: Path) -> tuple[Path, Path, Path]:
    """Whom a client trusts, its certificate, its key."""
    return certificates / "ca.pem", certificates / "client.pem", certificates / "client.key"


def dialled(address: str, certificates: Path | None) -> grpc.Channel:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    if certificates is None:
        return grpc.insecure_channel(address, options)
    ca, certificate, key = (file.read_bytes() for file in client_files(certificates))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate), options)


def prepare(folder: Path, channel: grpc.Channel, storm: int) -> None:
    """What the programs read."""
    large = np.arange(150_000, dtype="<f4")
    write_pair(folder, channel, "small", message("affine", 1, 2), np.float32([3, 5]))
    write_pair(folder, channel, "other", message("later", 3, 4, 5, id="é"), np.float32([7, 9, 11]))
    write_pair(folder, channel, "large", message("echo", *large), large)
    for name, request in (
        ("held", message("held", 1)),
        ("unknown", message("é%", 1)),
        ("full", message("full", 1)),
        ("noise", b"\xff" * 9),
    ):
        (folder / f"{name}.request").write_bytes(request)
    (folder / "errors.txt").write_text(ERRORS)
    (folder / "storm.txt").write_text(str(storm))


def assert_all_right(command: list[str], language: str, port: EchoPort) -> None:
    """What the program finds is right, and so is what has reached ``port``."""
    before = len(port.admitted)
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=True)
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert told == dict.fromkeys(CHECKS, "ok"), done.stderr[-2000:]

    heads = port.admitted[before:]
    (keyed,) = [head for head in heads if "x-key" in head.metadata]
    assert keyed.metadata["x-key"].startswith("grpc-")
    assert "x-key-bin" not in keyed.metadata
    # Ten were told that their 50 ms are over, some of them perhaps before they arrived: all others had begun.
    in_time = [head for head in heads if 0 < head.deadline_ns - head.received_ns <= HELD_NS]
    assert 0 < len(port.held) == len(in_time) <= 10
    assert port.wait(lambda: all(ticket.ended for ticket in port.held)), "deadlines did not reach the work"
    assert port.wait(lambda: len(port.admitted) == len(port.released))
    assert len(set(port.released)) == len(port.released)
    peers = {head.peer for head in heads}
    # grpc-js keeps one connection for its second client, which compresses, and one for the first.
    assert len(peers) == (2 if language == "js" else 1), "a connection was cut in between"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_calls(program: list[str], language: str, transport: str, tmp_path: Path) -> None:
    with running(transport=transport, limits=LIMITS) as server:
        address = "{}:{}".format(*server.grpc)
        with dialled(address, None) as channel:
            prepare(tmp_path, channel, STORM.get((language, transport), STORM_OTHERWISE))
        assert_all_right([*program, address, str(tmp_path), "all"], language, server.port)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pki.usual(tmp_path_factory.mktemp("pki"))


@pytest.mark.parametrize(
    ("version", "mutual"),
    [(ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, False)],
    ids=["mutual TLS 1.2", "TLS 1.3"],
)
def test_calls_over_tls(
    program: list[str], language: str, version: ssl.TLSVersion, mutual: bool, certificates: Path, tmp_path: Path
) -> None:
    with (
        running(transport="native", limits=LIMITS) as base,
        secured(base, certificates, mutual=mutual, version=version) as address,
    ):
        with dialled(address, certificates) as channel:
            prepare(tmp_path, channel, STORM_OTHERWISE)
        command = [*program, address, str(tmp_path), "all", *map(str, client_files(certificates))]
        assert_all_right(command, language, base.port)


@contextmanager
def own_process(root: Path, transport: str, certificates: Path) -> Iterator[Server]:
    """A server that can be ended by signal, with mutual TLS."""
    models.affine(root / "m.onnx")
    tls = "{certificate: D/server.pem, private_key: D/server.key, client_ca: D/ca.pem}".replace("D", str(certificates))
    (root / "config.yaml").write_text(
        f"apiVersion: tidegate/v1\nserver:\n  tls: {tls}\nmodels:\n  m: {{source: {root}/m.onnx}}\n"
    )
    options = ("--state-dir", str(root / "state"), "--transport", transport)
    with serving(str(root / "config.yaml"), *options) as server:
        yield server


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_sigterm_loses_no_call(program: list[str], transport: str, certificates: Path, tmp_path: Path) -> None:
    """What was taken is answered; what was not, the client tries elsewhere by itself, and then finds nobody."""
    with own_process(tmp_path, transport, certificates) as server:
        with dialled(server.grpc, certificates) as channel:
            write_pair(tmp_path, channel, "small", message("m", 1, 2, 3, 4), np.array([3, 5, 7, 9], "<f4"))
        command = [*program, server.grpc, str(tmp_path), "drain", *map(str, client_files(certificates))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            try:
                assert client.stdout is not None
                assert client.stdout.readline() == "warm\n"
                server.terminate()
                assert server.wait() == 0
                out, _ = client.communicate(timeout=RUN_S)
            finally:
                client.kill()
    tally = {what: int(count) for count, _, what in (line.partition(" ") for line in out.splitlines())}
    assert set(tally) == {"ok", "refused"}, tally
    assert tally["refused"] == 8
    assert tally["ok"] >= 200
