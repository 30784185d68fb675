"""A version served by another server: the runtime's contract, every datatype, hostile answers, kill and return."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.errors import (
    ConfigError,
    InputRejected,
    ModelLoadError,
    RuntimeFailure,
    UpstreamFailure,
    UpstreamUnavailable,
)
from server.runtime.base import Batch, BatchingOptions, LoadRequest, ModelOptions
from server.runtime.upstream import UpstreamEngine, UpstreamRuntime
from server.runtime.upstream_options import UpstreamOptions
from server.types import DATATYPES
from tests.contracts.runtime_contract import Case, RuntimeContract, batch_of, expected, some_rows
from tests.support import models
from tests.support.ports import reserved_port
from tests.support.server import Server, serving
from tests.unit.runtime.graphs import affine


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("upstream")
    for datatype in models.ELEMENT_TYPES:
        models.identity(root / f"identity_{datatype.lower()}" / "1" / "model.onnx", datatype, width=3)
    models.two_inputs(root / "simple" / "1" / "model.onnx")
    models.across_rows(root / "across" / "1" / "model.onnx")
    (root / "affine" / "3").mkdir(parents=True)
    affine(root / "affine" / "3" / "model.onnx")
    state = str(tmp_path_factory.mktemp("state"))
    with serving("--model-repository", str(root), "--state-dir", state) as running:
        yield running


def request(name: str, instances: int = 1, **options: Any) -> LoadRequest:
    return LoadRequest(name, "3", Path("none"), ModelOptions(instances=instances, **options))


def load(address: str, name: str = "affine", instances: int = 1, **options: Any) -> UpstreamEngine:
    return UpstreamRuntime(UpstreamOptions(f"http://{address}", **options)).load(request(name, instances))


class Remembering(UpstreamRuntime):
    """Knows what it has loaded, so that a test's connections can be closed."""

    def __init__(self, options: UpstreamOptions) -> None:
        super().__init__(options)
        self.engines: list[UpstreamEngine] = []

    def load(self, request: LoadRequest) -> UpstreamEngine:
        self.engines.append(super().load(request))
        return self.engines[-1]


class TestContract(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _served(self, upstream: Server) -> Iterator[None]:
        self.runtime = Remembering(UpstreamOptions(f"http://{upstream.http}", version="3"))
        yield
        for engine in self.runtime.engines:
            engine.close()

    def case(self, folder: Path) -> Case:
        def broken() -> tuple[UpstreamRuntime, LoadRequest]:
            return self.runtime, request("nobody")

        return Case(self.runtime, lambda instances: request("affine", instances), broken, refused=-7.0)


@pytest.mark.parametrize("datatype", sorted(models.ELEMENT_TYPES))
def test_every_datatype_comes_back_as_it_went(upstream: Server, datatype: str) -> None:
    engine = load(upstream.http, f"identity_{datatype.lower()}")
    assert engine.spec.inputs[0].datatype == datatype
    if datatype == "BYTES":
        parts: list[Any] = [[b"", b"a", b"\0 "], [b"x" * 1000, "ä".encode(), b"1"]]
        (answer,) = engine.run(0, Batch(2, [(2, 3)], [parts]))
        assert answer.data == parts[0] + parts[1]
    else:
        size = DATATYPES[datatype][1] * 3
        raw = bytes([0, 1, 1] * 2) if datatype == "BOOL" else bytes(range(2 * size))
        (answer,) = engine.run(0, Batch(2, [(2, 3)], [[raw[:size], raw[size:]]]))
        assert bytes(answer.data) == raw  # type: ignore[arg-type]
    assert (answer.name, answer.datatype, answer.shape) == ("y", datatype, (2, 3))
    engine.close()


def test_several_tensors_stand_in_the_order_of_the_signature(upstream: Server) -> None:
    engine = load(upstream.http, "simple")
    a, b = np.arange(16, dtype="<i4"), np.full(16, 3, "<i4")
    total, difference = engine.run(0, Batch(1, [(1, 16), (1, 16)], [[a.tobytes()], [b.tobytes()]]))
    assert (total.name, difference.name) == ("OUTPUT0", "OUTPUT1")
    np.testing.assert_array_equal(total.array()[0], a + b)
    np.testing.assert_array_equal(difference.array()[0], a - b)
    engine.close()


def test_the_batch_limit_is_the_upstreams_own(upstream: Server) -> None:
    assert load(upstream.http, "affine").spec.max_batch_size == 64
    assert load(upstream.http, "affine", max_batch_rows=4).spec.max_batch_size == 4
    assert load(upstream.http, "across").spec.max_batch_size == 0
    runtime = UpstreamRuntime(UpstreamOptions(f"http://{upstream.http}"))
    gathered = runtime.load(request("affine", batching=BatchingOptions(max_rows=8)))
    assert (gathered.spec.max_batch_size, gathered.spec.learned_batch_size) == (64, 8)
    assert runtime.load(request("affine", max_batch_size=0)).spec.max_batch_size == 0


def test_an_upstream_killed_in_mid_traffic_serves_again_after_its_return(tmp_path: Path) -> None:
    (tmp_path / "models" / "affine" / "1").mkdir(parents=True)
    affine(tmp_path / "models" / "affine" / "1" / "model.onnx")
    arguments = ("--model-repository", str(tmp_path / "models"), "--state-dir", str(tmp_path / "state"))
    outcomes: list[str] = []
    stop, changed = threading.Event(), threading.Condition()

    def traffic(engine: UpstreamEngine, instance: int) -> None:
        values = some_rows(2, seed=instance)
        while not stop.is_set():
            try:
                same = np.array_equal(engine.run(instance, batch_of(values))[0].array(), expected(values))
                outcome = "right" if same else "wrong"
            except Exception as error:
                outcome = type(error).__name__
            with changed:
                outcomes.append(outcome)
                changed.notify_all()
            stop.wait(0.002)

    def wait_for(outcome: str, count: int) -> None:
        with changed:
            start = len(outcomes)
            assert changed.wait_for(lambda: outcomes[start:].count(outcome) >= count, 30), set(outcomes)

    address = f"127.0.0.1:{reserved_port()}"  # while nobody serves there it is nobody else's
    with serving(*arguments, "--http", address) as first:
        engine = load(address, instances=2, timeout_s=5.0)
        threads = [threading.Thread(target=traffic, args=(engine, i)) for i in range(2)]
        for thread in threads:
            thread.start()
        try:
            wait_for("right", 20)
            first.process.kill()
            first.process.wait(10)
            wait_for("UpstreamUnavailable", 20)
            with serving(*arguments, "--http", address):
                wait_for("right", 20)
                stop.set()
                for thread in threads:
                    thread.join()
        finally:
            stop.set()
    assert set(outcomes) == {"right", "UpstreamUnavailable"}
    engine.close()


# --- upstreams that are wrong, against a socket that says what the test wants ---

METADATA: dict[str, Any] = {
    "name": "m",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
}
BINARY: dict[str, Any] = {"name": "scripted", "extensions": ["binary_tensor_data"]}


def http(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def binary(outputs: Any, *contents: bytes, shift: int = 0) -> bytes:
    head = json.dumps({"outputs": outputs}).encode()
    return http(200, b"".join([head, *contents]), f"Inference-Header-Content-Length: {len(head) + shift}")


def as_json(outputs: Any) -> bytes:
    return http(200, json.dumps({"outputs": outputs}).encode())


def output(size: int = 16, **changed: Any) -> dict[str, Any]:
    entry = {"name": "y", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": size}}
    return entry | changed


class Scripted:
    """Answers metadata rightly and every inference with ``answer``, which may also act on the connection.

    ``asked`` is the body of the last inference. ``about``: what it says of itself.
    """

    def __init__(self, metadata: Any = METADATA, config: Any = None, about: Any = BINARY) -> None:
        self.metadata, self.config = metadata, config if config is not None else {"max_batch_size": 8}
        self.about = about
        self.asked = b""
        self.answer: bytes | Callable[[socket.socket], bool] = b""
        self.connections = 0
        self.requests = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as received:
            while line := received.readline():
                length = 0
                while (header := received.readline()) not in (b"\r\n", b""):
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                self.asked = received.read(length)
                if not self._answer(connection, line):
                    return

    def _answer(self, connection: socket.socket, line: bytes) -> bool:
        try:
            if line.startswith(b"GET"):
                value = self.config if b"/config" in line else self.metadata
                if line.startswith(b"GET /v2 "):
                    value = self.about
                connection.sendall(value if isinstance(value, bytes) else http(200, json.dumps(value).encode()))
                return True
            self.requests += 1
            if callable(self.answer):
                return self.answer(connection)
            connection.sendall(self.answer)
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Nobody accepts any more: a call that went on would be one on whatever socket has the number next."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._listener.close()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.close()


ONE = some_rows(1)
GOOD = binary([output()], ONE.tobytes())


@pytest.mark.parametrize(
    "answer",
    [
        http(200, b'{"outputs": []}'),
        binary([]),
        binary(7),
        binary([7]),
        binary([output(name="z")], bytes(16)),
        binary([output(datatype="FP64")], bytes(16)),
        binary([output(shape=[1, 5])], bytes(16)),
        binary([output(shape=[2, 4], parameters={"binary_data_size": 32})], bytes(32)),
        binary([output(shape=[4])], bytes(16)),
        binary([output(shape=[1, -4])], bytes(16)),
        binary([output(shape="1,4")], bytes(16)),
        binary([output(shape=[1, True])], bytes(16)),
        binary([output(size=12)], bytes(12)),
        binary([output()], bytes(12)),
        binary([output()], bytes(20)),
        binary([output(size=-1)], bytes(16)),
        binary([output(parameters={"binary_data_size": "16"})], bytes(16)),
        binary([output(data=[1, 2, 3, 4])], bytes(16)),
        binary([{"name": "y"}]),
        as_json([output(parameters={}, data=[1, 2, 3])]),
        as_json([output(parameters={}, data=[1, 2, 3, None])]),
        as_json([output(parameters={}, data=[1, 2, 3, "4"])]),
        as_json([output(parameters={}, data=[1, 2, 3, 1e39])]),
        as_json([output(parameters={}, data=[[1, 2], [3, 4]])]),
        as_json([output(parameters={}, data=1)]),
        as_json([output(size=0)]),
        as_json([output()]),
        binary([output(), output()], bytes(32)),
        binary([output()], bytes(16), shift=-1),
        binary([output()], bytes(16), shift=10**6),
        http(200, bytes(16), "Inference-Header-Content-Length: -1"),
        http(200, b"[]", "Inference-Header-Content-Length: 2"),
        http(200, b"{not json", "Inference-Header-Content-Length: 9"),
        http(500, b"secret: /etc/passwd"),
        http(400, b'{"detail": "no such route"}'),
        http(415, b'{"error": "what is this"}'),
        http(422, b'{"detail": [{"msg": "Field required"}]}'),
        http(422, b"<html>"),
        http(302, b"", "Location: http://127.0.0.1:1/"),
        http(401, b""),
    ],
)  # fmt: skip
def test_what_an_upstream_answers_is_checked(scripted: Scripted, answer: bytes) -> None:
    engine = load(scripted.address, timeout_s=5.0, hold_off_s=0.0)
    scripted.answer = answer
    with pytest.raises(RuntimeFailure) as caught:
        engine.run(0, batch_of(ONE))
    assert "/etc" not in caught.value.message
    scripted.answer = GOOD
    np.testing.assert_array_equal(engine.run(0, batch_of(ONE))[0].array(), ONE)
    engine.close()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_input_carries_the_upstreams_words_without_its_paths(scripted: Scripted, status: int) -> None:
    engine = load(scripted.address)
    scripted.answer = http(
        status, json.dumps({"error": "bad row in /srv/secret/model.onnx\nat 0x7fff12345678"}).encode()
    )
    with pytest.raises(InputRejected) as caught:
        engine.run(0, batch_of(ONE))
    assert "bad row in model.onnx" in caught.value.message
    assert "\n" not in caught.value.message
    engine.close()


@pytest.mark.parametrize("body", [b"<html>", b'{"error": 7}', b'{"detail": "x"}', b"[]", b"\xff", b""])
def test_a_refusal_without_a_reason_is_no_verdict_on_the_input(scripted: Scripted, body: bytes) -> None:
    """It is the request's form that was refused, which is between the two servers; of its size anyone may complain."""
    engine = load(scripted.address)
    for status in (400, 422):
        scripted.answer = http(status, body)
        with pytest.raises(UpstreamFailure, match=str(status)) as caught:
            engine.run(0, batch_of(ONE))
        assert (caught.value.code, caught.value.divides) == ("runtime_failure", False)
    scripted.answer = http(413, body)
    with pytest.raises(InputRejected, match="too large"):
        engine.run(0, batch_of(ONE))
    engine.close()


@pytest.mark.parametrize("status", [404, 408, 429, 502, 503, 504])
def test_a_server_that_is_not_ready_is_unavailable_and_not_asked_twice(scripted: Scripted, status: int) -> None:
    engine = load(scripted.address)
    scripted.answer = http(status, b"{}")
    with pytest.raises(UpstreamUnavailable, match=str(status)):
        engine.run(0, batch_of(ONE))
    assert scripted.requests == 1
    scripted.answer = GOOD  # it has answered, so it is asked again at once
    engine.run(0, batch_of(ONE))
    engine.close()


def trickle(connection: socket.socket) -> bool:
    """One byte of a head now and then, for ever."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        connection.sendall(b"x")
        threading.Event().wait(0.02)


def trickle_body(connection: socket.socket) -> bool:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        connection.sendall(b"x")
        threading.Event().wait(0.02)


def silence(_: socket.socket) -> bool:
    threading.Event().wait(30)
    return False


def hang_up(connection: socket.socket) -> bool:
    connection.sendall(GOOD[:-3])
    return False


@pytest.mark.parametrize("act", [trickle, trickle_body, silence, hang_up])
def test_the_whole_exchange_has_one_deadline(scripted: Scripted, act: Callable[[socket.socket], bool]) -> None:
    engine = load(scripted.address, timeout_s=3.0, hold_off_s=0.0)  # nobody who does their part takes so long
    scripted.answer = act
    began = time.monotonic()
    with pytest.raises(UpstreamUnavailable):
        engine.run(0, batch_of(ONE))
    assert time.monotonic() - began < 15
    scripted.answer = GOOD
    np.testing.assert_array_equal(engine.run(0, batch_of(ONE))[0].array(), ONE)
    engine.close()


def test_after_a_timeout_the_other_members_do_not_wait_for_one_each(scripted: Scripted) -> None:
    engine = load(scripted.address, timeout_s=3.0, hold_off_s=30.0)  # nobody who does their part takes so long
    scripted.answer = silence
    began = time.monotonic()
    for _ in range(50):
        with pytest.raises(UpstreamUnavailable):
            engine.run(0, batch_of(ONE))
    assert time.monotonic() - began < 15  # of the 30 that it is held off
    assert scripted.requests == 1
    engine.close()


@pytest.mark.parametrize("announced", [True, False])
def test_an_answer_over_the_limit_is_not_read_to_its_end(scripted: Scripted, announced: bool) -> None:
    engine = load(scripted.address, max_response_bytes=1000, timeout_s=5.0)
    head = "Content-Length: 10000000" if announced else "Connection: close"

    def flood(connection: socket.socket) -> bool:
        connection.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + bytes(5000))
        return announced

    scripted.answer = flood
    with pytest.raises(UpstreamUnavailable):
        engine.run(0, batch_of(ONE))
    engine.close()


def test_a_connection_is_kept_and_one_closed_while_idle_is_replaced(scripted: Scripted) -> None:
    engine = load(scripted.address)
    scripted.answer = GOOD
    opened = scripted.connections
    for _ in range(5):
        engine.run(0, batch_of(ONE))
    assert scripted.connections == opened + 1
    closed = threading.Event()

    def answer_and_leave(connection: socket.socket) -> bool:
        connection.sendall(GOOD)
        connection.shutdown(socket.SHUT_RDWR)
        closed.set()
        return False

    scripted.answer = answer_and_leave
    engine.run(0, batch_of(ONE))
    assert closed.wait(20)
    scripted.answer = GOOD
    np.testing.assert_array_equal(engine.run(0, batch_of(ONE))[0].array(), ONE)
    assert scripted.connections == opened + 2
    engine.close()


def test_outputs_may_come_in_any_order_with_others_among_them() -> None:
    metadata = METADATA | {"outputs": [METADATA["outputs"][0], {"name": "s", "datatype": "BYTES", "shape": [-1, 1]}]}
    server = Scripted(metadata)
    engine = load(server.address)
    text = {"name": "s", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": 6}}
    other = {"name": "more", "datatype": "FP8", "shape": [1], "parameters": {"binary_data_size": 1}}
    server.answer = binary([other, text, output()], b"?", b"\2\0\0\0ab", ONE.tobytes())
    y, s = engine.run(0, batch_of(ONE))
    np.testing.assert_array_equal(y.array(), ONE)
    assert s.data == [b"ab"]
    for wrong in (b"\3\0\0\0ab", b"\1\0\0\0ab", b"\xff\xff\xff\xffab"):
        server.answer = binary([text, output()], wrong, ONE.tobytes())
        with pytest.raises(RuntimeFailure, match="BYTES"):
            engine.run(0, batch_of(ONE))
    engine.close()
    server.close()


# --- upstreams without the binary extension ---

#: MLServer says so, others say nothing at all, or have no such endpoint.
PLAIN = [
    {"name": "mlserver", "extensions": []},
    {"name": "x"},
    http(404, b"{}"),
    http(200, b"<html>"),
    {"extensions": 7},
]


@pytest.mark.parametrize("about", PLAIN)
def test_without_the_binary_extension_json_is_spoken(about: Any) -> None:
    server = Scripted(about=about)
    engine = load(server.address)
    server.answer = as_json([output(parameters=None, data=[1, 2.5, 3, 4])])
    (answer,) = engine.run(0, batch_of(np.array([[0.1, -0.0, 3e38, 4]], "<f4")))
    assert answer.array().tolist() == [[1, 2.5, 3, 4]]
    asked = json.loads(server.asked)
    assert asked.pop("id")
    assert asked == {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.1, -0.0, 3e38, 4.0]}],
        "outputs": [{"name": "y"}],
    }
    engine.close()
    server.close()


def test_every_request_has_an_id_of_its_own(scripted: Scripted) -> None:
    engine = load(scripted.address)
    scripted.answer = GOOD
    ids = set()
    for _ in range(3):
        engine.run(0, batch_of(ONE))
        ids.add(json.loads(scripted.asked[: scripted.asked.rindex(b"}") + 1])["id"])
    assert len(ids) == 3
    engine.close()


def test_values_that_json_cannot_carry_are_refused_without_asking() -> None:
    server = Scripted(about=PLAIN[0])
    engine = load(server.address)
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(InputRejected, match="NaN or infinite values; the server of this version takes JSON only"):
            engine.run(0, batch_of(np.array([[1, 2, value, 4]], "<f4")))
    assert server.requests == 0
    engine.close()
    server.close()


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (http(200, b"<html>"), "not JSON"),
        (http(200, b"[]"), "not a JSON object"),
        ({}, "no inputs"),
        ({"inputs": METADATA["inputs"], "outputs": []}, "no outputs"),
        ({"inputs": [7]}, "no object"),
        ({"inputs": [{"name": "x", "datatype": "FP8", "shape": [1]}]}, "without name, datatype or shape"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [-2]}]}, "without name, datatype or shape"),
        ({"inputs": METADATA["inputs"] * 2, "outputs": METADATA["outputs"]}, "twice"),
        (http(503, b"{}"), "does not serve it"),
        (b"HELO\r\n\r\n", "cannot be reached"),
    ],
)
def test_metadata_that_is_wrong_is_a_load_error(metadata: Any, reason: str) -> None:
    server = Scripted(metadata)
    with pytest.raises(ModelLoadError, match=reason) as caught:
        load(server.address, timeout_s=5.0)
    assert server.address not in caught.value.message
    server.close()


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (http(404, b"{}"), 0),
        (http(501, b"<html>"), 0),
        (http(200, b"<html>"), 0),
        ({"max_batch_size": "8"}, 0),
        ({"max_batch_size": 0}, 0),
        ({"max_batch_size": 8}, 8),
    ],
)
def test_without_a_batch_limit_nothing_is_combined(config: Any, rows: int) -> None:
    server = Scripted(config=config)
    spec = load(server.address).spec
    assert (spec.max_batch_size, spec.learned_batch_size) == (rows, rows)
    server.close()


def test_an_upstream_with_a_fixed_first_dimension_is_not_batched() -> None:
    server = Scripted(METADATA | {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 4]}]})
    spec = load(server.address).spec
    assert spec.max_batch_size == 0
    assert "not free" in spec.batching_note
    server.close()


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8000", "ftp://host:1", "http://", "http://host:0", "http://host:99999", "http://u:p@host:1",
     "http://host:1/?q=1", "http://host:1/#f", "file:///etc/passwd"],
)  # fmt: skip
def test_an_address_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        UpstreamOptions(url)


def test_nobody_at_the_address_is_a_load_error() -> None:
    with pytest.raises(ModelLoadError, match="cannot be reached"):
        load(f"127.0.0.1:{reserved_port()}")


def test_an_upstream_behind_tls_is_trusted_by_its_authority_only(tmp_path: Path) -> None:
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-keyout", f"{tmp_path}/key.pem", "-out", f"{tmp_path}/cert.pem", "-subj", "/CN=127.0.0.1",
        "-addext", "subjectAltName=IP:127.0.0.1",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    affine(tmp_path / "m.onnx")
    path = tmp_path / "config.yaml"
    path.write_text(
        f"apiVersion: tidegate/v1\n"
        f"server:\n  tls: {{certificate: {tmp_path}/cert.pem, private_key: {tmp_path}/key.pem}}\n"
        f"models:\n  affine: {{source: {tmp_path}/m.onnx}}\n"
    )
    with serving(str(path), "--state-dir", str(tmp_path / "state")) as running:
        trusting = UpstreamOptions(f"https://{running.http}", ca_file=f"{tmp_path}/cert.pem")
        engine = UpstreamRuntime(trusting).load(request("affine"))
        values = some_rows(3)
        for _ in range(3):
            np.testing.assert_array_equal(engine.run(0, batch_of(values))[0].array(), expected(values))
        engine.close()
        for options, reason in (
            (UpstreamOptions(f"https://{running.http}"), "cannot be reached"),
            (UpstreamOptions(f"https://{running.http}", ca_file=f"{tmp_path}/none.pem"), "trusted authorities"),
            (UpstreamOptions(f"http://{running.http}"), "cannot be reached"),
        ):
            with pytest.raises(ModelLoadError, match=reason):
                UpstreamRuntime(options).load(request("affine"))


def test_secrets_of_the_operator_are_not_shown() -> None:
    assert "token" not in repr(UpstreamOptions("http://host:1", headers=(("authorization", "Bearer token"),)))
