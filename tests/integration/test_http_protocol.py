"""The HTTP side of the reference transport over real sockets: routes, limits, and what no client should send."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import logging
import random
import re
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from server.errors import TidegateError
from server.transport.answers import HttpSettings
from server.transport.reference.asgi import HttpServer
from server.transport.status import StatusTable
from server.types import RequestLimits
from tests.support.echo import MODELS, Running, floats, running
from tests.support.garbage import cycles

LIMITS = RequestLimits(max_body_bytes=256 * 1024, max_chunks=200, max_header_bytes=8 * 1024)
INPUT = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.5]}
GOOD = json.dumps({"id": "7", "inputs": [INPUT]}).encode()


TRANSPORTS = ["native", "reference"]


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(limits=LIMITS, transport=request.param) as started:
        yield started


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    @property
    def error(self) -> str:
        value = self.json
        assert list(value) == ["error"]
        text: str = value["error"]
        assert text
        return text


def ask(
    server: Running, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> Answer:
    connection = http.client.HTTPConnection(*server.http, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def infer(server: Running, model: str = "affine", body: bytes = GOOD, **headers: str) -> Answer:
    return ask(server, "POST", f"/v2/models/{model}/infer", body, {k.replace("_", "-"): v for k, v in headers.items()})


def settled(server: Running) -> bool:
    """Every permit given was released exactly once."""
    port = server.port
    return port.wait(lambda: len(port.admitted) == len(port.released)) and len(set(port.released)) == len(port.released)


# --- routes ---


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/affine/ready", {"name": "affine", "ready": True}),
        ("/v2/models/affine/versions/1/ready", {"name": "affine", "ready": True}),
        ("/v2/models/affine/config", {"name": "affine", "max_batch_size": 64}),
        ("/v2/models/affine/versions/1/config", {"name": "affine", "max_batch_size": 64}),
        ("/v2", {"name": "echo-server", "version": "1.2.3", "extensions": ["binary_tensor_data", "statistics"]}),
        ("/v2/", {"name": "echo-server", "version": "1.2.3", "extensions": ["binary_tensor_data", "statistics"]}),
    ],
)
def test_simple_reads(server: Running, path: str, expected: object) -> None:
    answer = ask(server, "GET", path)
    assert (answer.status, answer.json) == (200, expected)


@pytest.mark.parametrize("path", ["/v2/models/affine", "/v2/models/affine/versions/1", "/v2/models/%61ffine"])
def test_metadata(server: Running, path: str) -> None:
    assert ask(server, "GET", path).json == {
        "name": "affine",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}],
    }


def test_statistics_of_all_of_one_and_of_a_version(server: Running) -> None:
    every = ask(server, "GET", "/v2/models/stats").json["model_stats"]
    assert [entry["name"] for entry in every] == list(MODELS)
    for path in ("/v2/models/affine/stats", "/v2/models/affine/versions/1/stats"):
        (one,) = ask(server, "GET", path).json["model_stats"]
        assert one["name"] == "affine"
        assert one["inference_stats"]["success"]["ns"] == 2**60


def test_not_ready_is_503_with_the_same_body(server: Running) -> None:
    server.call(lambda: server.catalog.set_ready(False))
    try:
        answer = ask(server, "GET", "/v2/health/ready")
        assert (answer.status, answer.json) == (503, {"ready": False})
        assert ask(server, "GET", "/v2/health/live").status == 200
    finally:
        server.call(lambda: server.catalog.set_ready(True))
    answer = ask(server, "GET", "/v2/models/none/ready")
    assert (answer.status, answer.json) == (503, {"name": "none", "ready": False})


def test_repository_index(server: Running) -> None:
    every = ask(server, "POST", "/v2/repository/index").json
    assert {"name": "none", "version": "1", "state": "UNAVAILABLE", "reason": ""} in every
    ready = ask(server, "POST", "/v2/repository/index", b'{"ready": true}').json
    assert len(ready) == len(every) - 1
    assert "true or false" in ask(server, "POST", "/v2/repository/index", b'{"ready": 1}').error


def test_load_and_unload_reach_the_control(server: Running) -> None:
    server.control.calls.clear()
    assert ask(server, "POST", "/v2/repository/models/affine/load").json == {}
    body = gzip.compress(b'{"parameters": {"unload_dependents": true}}')
    assert ask(server, "POST", "/v2/repository/models/affine/unload", body, {"Content-Encoding": "gzip"}).json == {}
    assert server.control.calls == [("load", "affine", {}), ("unload", "affine", True)]


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("affine/load", b'{"parameters": {"config": "{}"}}', 400, "config"),
        ("affine/load", b'{"parameters": {"a": []}}', 400, "boolean, number or string"),
        ("affine/load", b'{"parameters": []}', 400, "must be an object"),
        ("affine/load", b"[]", 400, "JSON object"),
        ("affine/load", b"{", 400, "not valid JSON"),
        ("affine/unload", b'{"parameters": {"x": 1}}', 400, "unknown unload parameter 'x'"),
        ("affine/unload", b'{"parameters": {"unload_dependents": 1}}', 400, "true or false"),
        ("nothing/load", b"", 404, "no such model"),
        ("locked/load", b"", 400, "model control is off"),
        ("..%5C..%5Cetc/load", b"", 400, "backslash"),
        ("%2e%2e/load", b"", 400, "dot"),
        ("a%00b/load", b"", 400, "control character"),
        ("%2e%2e%2fetc/load", b"", 404, "no such path"),
        ("x" * 300 + "/load", b"", 400, "255 characters"),
        ("affine/load", b" " * (1024 * 1024 + 1), 413, "over the limit"),
    ],
)
def test_wrong_control_requests(server: Running, path: str, body: bytes, status: int, text: str) -> None:
    answer = ask(server, "POST", f"/v2/repository/models/{path}", body)
    assert answer.status == status
    assert text in answer.error


def test_trace_and_log_settings(server: Running) -> None:
    path = "/v2/models/echo/trace/setting"
    assert ask(server, "POST", path, b'{"trace_rate": "5", "trace_level": ["TIMESTAMPS"]}').json["trace_rate"] == "5"
    assert ask(server, "GET", "/v2/models/affine/trace/setting").json["trace_rate"] == "1000"
    assert ask(server, "GET", path).json["trace_level"] == ["TIMESTAMPS"]
    assert ask(server, "POST", path, b'{"trace_rate": null}').json["trace_rate"] == "1000"
    assert ask(server, "POST", "/v2/logging", b'{"log_verbose_level": 2}').json["log_verbose_level"] == 2
    assert ask(server, "POST", "/v2/logging", b'{"log_verbose_level": null}').json["log_verbose_level"] == 0
    for target, body in (("/v2/logging", b'{"log_file": "/tmp/x"}'), ("/v2/trace/setting", b'{"trace_file": "x"}')):
        answer = ask(server, "POST", target, body)
        assert answer.status == 400
        assert "cannot be changed by a client" in answer.error
    assert ask(server, "GET", "/v2/models/nothing/trace/setting").status == 404


def test_every_documented_path_is_served_and_every_other_is_not(server: Running) -> None:
    document = ask(server, "GET", "/openapi.json").json
    for path, operations in document["paths"].items():
        real = path.replace("{model}", "affine").replace("{version}", "1")
        for method in operations:
            body = {"infer": GOOD, "feedback": b'{"id": "a", "outcome": 1}'}.get(real.rpartition("/")[2], b"")
            assert ask(server, method.upper(), real, body).status == 200, (method, real)
        allowed = {method.upper() for method in operations}
        wrong = next(method for method in ("DELETE", "PUT", "PATCH") if method not in allowed)
        answer = ask(server, wrong, real)
        assert answer.status == 405
        assert set(answer.headers["allow"].split(", ")) == allowed
        assert "not allowed" in answer.error


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404),
        ("/v1/models/affine", 404),
        ("/v2/health", 404),
        ("/v2/health/live/", 404),
        ("/v2/models", 404),
        ("/v2/models/", 404),
        ("/v2/models/affine/", 404),
        ("/v2/models/affine/versions/", 404),
        ("/v2/models/nothing", 404),
        ("/v2/models/nothing/ready", 404),
        ("/v2/models/nothing/stats", 404),
        ("/v2/models/affine/versions/2", 404),
        ("/v2/models/affine/versions/99999999999999999999999", 404),
        ("/v2/models/affine/versions/one", 400),
        ("/v2/models/affine/versions/-1/ready", 400),
        ("/v2/models/affine/versions/%D9%A1/config", 400),
        ("/v2/models/../../etc/passwd", 404),
        ("/v2/models/..%2f..%2fetc%2fpasswd", 404),
        ("/v2/models/affine%2Fversions%2F1", 404),
        ("/v2/models/%ff%fe", 404),
        ("/v2/models/a%00b", 404),
    ],
)
def test_wrong_paths(server: Running, path: str, status: int) -> None:
    answer = ask(server, "GET", path)
    assert answer.status == status
    assert answer.error


FP64 = GOOD.replace(b"FP32", b"FP64")
STRINGS = b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[20000],"parameters":{"binary_data_size":80001}}]}'
#: Bodies that are refused off the loop, by turns, or by the port: (body, headers).
REFUSED = {
    "no JSON": (b" " * 100_000, {}),
    "no JSON, packed": (gzip.compress(b" " * 100_000), {"Content-Encoding": "gzip"}),
    "not packed": (b"x" * 100_000, {"Content-Encoding": "gzip"}),
    "by the port": (FP64 + b" " * 100_000, {}),
    "by the port, packed": (gzip.compress(FP64), {"Content-Encoding": "gzip"}),
    "by turns": (
        gzip.compress(STRINGS + bytes(80_001)),
        {"Content-Encoding": "gzip", "Inference-Header-Content-Length": str(len(STRINGS))},
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_refusal_lets_go_of_its_request(transport: str, case: str) -> None:
    """An error in a cycle with its own traceback keeps the frames that it came through, and the body in them."""
    body, headers = REFUSED[case]
    with running(limits=LIMITS, http=HttpSettings(offload_bytes=16 * 1024), transport=transport) as server:
        assert ask(server, "GET", "/v2").status == 200
        with cycles() as found:
            assert ask(server, "POST", "/v2/models/affine/infer", body, headers).status == 400
            assert settled(server)
            server.run(asyncio.sleep(0))  # the task has ended in which the answer was given
            assert found(TidegateError) == []


def test_head_has_no_body(server: Running) -> None:
    answer = ask(server, "HEAD", "/v2/health/live")
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "13")


def test_unexpected_exception_tells_only_an_id(server: Running, capfd: pytest.CaptureFixture[str]) -> None:
    answer = ask(server, "GET", "/v2/models/broken")
    assert answer.status == 500
    assert "secret" not in answer.error
    id_ = answer.error.removeprefix("internal error, id ")
    out, err = capfd.readouterr()
    assert id_ in out + err
    assert "secret" in out + err


# --- inference ---


@pytest.mark.parametrize("model", ["affine", "later"])
@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_infer_answers_with_decision_headers(server: Running, model: str, version: str) -> None:
    answer = infer(server, f"{model}{version}", traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    assert answer.status == 200
    assert answer.json["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [3.0, 6.0]}]
    assert answer.json["id"] == "7"
    assert answer.json["model_version"] == "1"
    assert answer.headers["x-tidegate-version"] == "1"
    assert answer.headers["x-tidegate-arm"] == "stable"
    assert answer.headers["x-tidegate-generation"] == "7"
    assert settled(server)
    assert answer.headers["x-tidegate-id"] in server.port.released
    assert answer.headers["traceresponse"].startswith("00-aaaa")
    assert "server" not in answer.headers


def binary_request(binary_output: bool) -> tuple[bytes, bytes]:
    data = floats(1, 2.5).tobytes()
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": binary_output}}).encode()
    return head, data


@pytest.mark.parametrize("content_type", ["application/octet-stream", "application/json", "text/plain", "x"])
def test_binary_both_ways_whatever_the_content_type(server: Running, content_type: str) -> None:
    head, data = binary_request(True)
    answer = infer(server, body=head + data, Inference_Header_Content_Length=str(len(head)), Content_Type=content_type)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    size = int(answer.headers["inference-header-content-length"])
    assert json.loads(answer.body[:size])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert answer.body[size:] == floats(3, 6).tobytes()


def test_binary_in_json_out(server: Running) -> None:
    head, data = binary_request(False)
    answer = infer(server, body=head + data, Inference_Header_Content_Length=str(len(head)))
    assert answer.json["outputs"][0]["data"] == [3.0, 6.0]


def test_raw_body_is_the_one_input(server: Running) -> None:
    answer = infer(server, body=floats(1, 2.5, 4).tobytes(), Inference_Header_Content_Length="0")
    size = int(answer.headers["inference-header-content-length"])
    assert answer.body[size:] == floats(3, 6, 9).tobytes()


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compression_both_ways(server: Running, coding: str) -> None:
    values = [float(i) for i in range(2000)]
    body = json.dumps({"inputs": [{**INPUT, "shape": [1, 2000], "data": values}]}).encode()
    packed = gzip.compress(body) if coding == "gzip" else zlib.compress(body)
    answer = infer(server, body=packed, Content_Encoding=coding, Accept_Encoding=coding)
    assert answer.headers["content-encoding"] == coding
    assert answer.headers["vary"] == "accept-encoding"
    plain = gzip.decompress(answer.body) if coding == "gzip" else zlib.decompress(answer.body)
    assert json.loads(plain)["outputs"][0]["data"] == [2 * value + 1 for value in values]


@pytest.mark.parametrize("count", [60, 150])
def test_what_counts_for_compression_is_what_is_written(server: Running, count: int) -> None:
    """As JSON these are several times as long as their tensors, which are under the threshold of 1 KiB."""
    values = [float(i) + 0.123 for i in range(count)]
    body = json.dumps({"inputs": [{**INPUT, "shape": [1, count], "data": values}]}).encode()
    plain = infer(server, body=body)
    assert (len(plain.body) > 1024) == (count == 150)
    packed = infer(server, body=body, Accept_Encoding="gzip")
    assert packed.headers.get("content-encoding") == ("gzip" if count == 150 else None)
    assert (gzip.decompress(packed.body) if count == 150 else packed.body) == plain.body


def test_small_answers_are_not_compressed(server: Running) -> None:
    assert "content-encoding" not in infer(server, Accept_Encoding="gzip").headers


def test_large_json_leaves_the_loop_and_comes_back(server: Running) -> None:
    values = list(range(30_000))
    body = json.dumps({"inputs": [{**INPUT, "shape": [1, 30_000], "data": values}]}).encode()
    assert 64 * 1024 < len(body) < LIMITS.max_body_bytes
    assert infer(server, body=body).json["outputs"][0]["data"] == [2.0 * value + 1 for value in values]


@pytest.mark.parametrize(
    ("model", "status", "text"),
    [
        ("nothing", 404, "Request for unknown model"),
        ("affine/versions/2", 404, "Request for unknown model"),
        ("affine/versions/two", 400, "decimal number"),
        ("%ff", 400, "not UTF-8"),
        ("..%2f..", 404, "Request for unknown model"),
        ("full", 503, "Exceeds maximum queue size"),
        ("broken", 500, "internal error, id echo-"),
        ("none", 500, "internal error, id echo-"),
        ("many", 501, "several answers"),
    ],
)
def test_errors_of_infer_carry_an_id(server: Running, model: str, status: int, text: str) -> None:
    answer = infer(server, model)
    assert answer.status == status
    assert text in answer.error
    assert answer.headers["x-tidegate-id"]
    assert settled(server)


def test_shedding_says_when_to_retry(server: Running) -> None:
    assert infer(server, "full").headers["retry-after"] == "1"
    server.call(lambda: setattr(server.port, "max_in_flight", 0))
    try:
        answer = infer(server)
        assert (answer.status, answer.headers["retry-after"]) == (503, "3")
    finally:
        server.call(lambda: setattr(server.port, "max_in_flight", 10_000))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_shedding_is_429_where_the_operator_wants_it(transport: str) -> None:
    with running(statuses=StatusTable(shed_as_429=True), transport=transport) as server:
        assert infer(server, "full").status == 429
        assert infer(server, "nothing").status == 404


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "abc", "", "9" * 40, "\u0663"])
def test_timeout_header_must_be_positive(server: Running, value: str) -> None:
    raw = b"POST /v2/models/affine/infer HTTP/1.1\r\nHost: a\r\nx-tidegate-timeout-ms: %b\r\nContent-Length: 0\r\n\r\n"
    answer = exchange(server, raw % value.encode())
    assert status_of(answer) == 400
    assert b"x-tidegate-timeout-ms" in answer


def test_timeout_header_becomes_the_deadline(server: Running) -> None:
    assert infer(server, x_tidegate_timeout_ms="5000").status == 200
    head = server.port.admitted[-1]
    assert head.deadline_ns - head.received_ns == 5_000_000_000
    assert infer(server).status == 200
    assert server.port.admitted[-1].deadline_ns == 0


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"", {}, 400),
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"null", {}, 400),
        (b'{"inputs": []}', {}, 400),
        (b'{"inputs": 1}', {}, 400),
        (b"\xff\xfe\x00", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"inputs":' + b"[" * 100_000, {}, 400),
        (GOOD[:-1], {}, 400),
        (GOOD + b"x", {}, 400),
        (GOOD, {"Inference-Header-Content-Length": "100000"}, 400),
        (GOOD, {"Inference-Header-Content-Length": "-1"}, 400),
        (GOOD, {"Inference-Header-Content-Length": "x"}, 400),
        (GOOD, {"Inference-Header-Content-Length": "5"}, 400),
        (b"abc", {"Inference-Header-Content-Length": "0"}, 400),
        (GOOD, {"Content-Encoding": "gzip"}, 400),
        (gzip.compress(GOOD, mtime=0)[:-9], {"Content-Encoding": "gzip"}, 400),
        (GOOD, {"Content-Encoding": "br"}, 415),
        (GOOD, {"Content-Encoding": "gzip, gzip"}, 415),
        (gzip.compress(b" " * 10_000_000, mtime=0), {"Content-Encoding": "gzip"}, 413),
        (b" " * (LIMITS.max_body_bytes + 1), {}, 413),
    ],
)
def test_bad_bodies(server: Running, body: bytes, headers: dict[str, str], status: int) -> None:
    answer = ask(server, "POST", "/v2/models/affine/infer", body, headers)
    assert answer.status == status
    assert answer.error
    assert settled(server)
    assert infer(server).status == 200


def test_client_that_leaves_cancels_its_request(server: Running) -> None:
    connection = http.client.HTTPConnection(*server.http, timeout=30)
    connection.request("POST", "/v2/models/held/infer", json.dumps({"id": "gone", "inputs": [INPUT]}))
    assert server.port.wait(lambda: bool(server.port.held))
    connection.close()
    assert server.port.wait(lambda: "gone" in server.port.cancelled)
    assert settled(server)
    server.call(server.port.answer_held)


def test_held_answers_arrive_when_given(server: Running) -> None:
    answers: list[Answer] = []
    callers = [threading.Thread(target=lambda: answers.append(infer(server, "held"))) for _ in range(5)]
    for caller in callers:
        caller.start()
    assert server.port.wait(lambda: len(server.port.held) == 5)
    server.call(server.port.answer_held)
    for caller in callers:
        caller.join(10)
    assert [answer.status for answer in answers] == [200] * 5


# --- raw sockets ---


def connect(server: Running) -> socket.socket:
    return socket.create_connection(server.http, timeout=30)


def read_all(sock: socket.socket) -> bytes:
    """Until the server closes; fails by timeout when it does not."""
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def exchange(server: Running, raw: bytes, *, half_close: bool = False) -> bytes:
    """Send ``raw`` and read one answer, or all that comes until the server closes."""
    with connect(server) as sock:
        try:
            sock.sendall(raw)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return read_answer(sock)


def read_answer(sock: socket.socket) -> bytes:
    data = b""
    try:
        while b"\r\n\r\n" not in data:
            part = sock.recv(65536)
            if not part:
                return data
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])[b"content-length"])
        while len(body) < length and (part := sock.recv(65536)):
            body += part
            data += part
    except ConnectionResetError:
        pass
    return data


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:100]
    return int(answer[9:12])


def statuses_of(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d\d\d) ", answers)]


def post(body: bytes = GOOD, *headers: str, path: str = "/v2/models/affine/infer", length: str | None = "") -> bytes:
    """A raw request; ``length`` None leaves Content-Length out."""
    lines = [f"POST {path} HTTP/1.1", "Host: a", *headers]
    if length is not None:
        lines.append(f"Content-Length: {length or len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def chunked(*chunks: bytes, tail: bytes = b"0\r\n\r\n", headers: tuple[str, ...] = ()) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + tail
    return post(body, "Transfer-Encoding: chunked", *headers, length=None)


def test_chunked_body(server: Running) -> None:
    assert status_of(exchange(server, chunked(GOOD[:10], GOOD[10:]))) == 200
    too_many = chunked(*[GOOD[:1]] * (LIMITS.max_chunks + 1))
    answer = exchange(server, too_many)
    assert status_of(answer) == 400
    assert b"over 200 chunks" in answer
    assert status_of(exchange(server, chunked(*[b" " * 4096] * 65))) == 413
    assert settled(server)


def test_trailers_do_not_become_headers(server: Running) -> None:
    tail = b"0\r\nContent-Encoding: gzip\r\nx-tidegate-timeout-ms: nonsense\r\n\r\n"
    assert status_of(exchange(server, chunked(GOOD, tail=tail))) == 200


def test_body_over_the_limit_is_refused_unread(server: Running) -> None:
    admitted = len(server.port.admitted)
    with connect(server) as sock:
        sock.sendall(post(b"", length="99999999999"))
        assert status_of(read_answer(sock)) == 413
        assert sock.recv(10) == b""
    with connect(server) as sock:
        sock.sendall(post(b"", "Expect: 100-continue", length=str(LIMITS.max_body_bytes + 1)))
        assert status_of(read_answer(sock)) == 413
        assert sock.recv(10) == b""
    assert len(server.port.admitted) == admitted


def test_refusal_reaches_a_client_that_sends_everything_first(server: Running) -> None:
    with connect(server) as sock:
        sock.sendall(post(b"x" * 4_000_000))
        assert status_of(read_answer(sock)) == 413


def test_expect_100_continue(server: Running) -> None:
    with connect(server) as sock:
        sock.sendall(post(b"", "Expect: 100-continue", length=str(len(GOOD))))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(GOOD)
        assert status_of(read_answer(sock)) == 200


EXPECT = "Expect: 100-continue"
#: Requests that are refused before their body: a header, the path, the length that they give, and the status.
REFUSED_BY_HEAD = {
    "bad deadline": ("x-tidegate-timeout-ms: soon", "/v2/models/affine/infer", 10, 400),
    "unknown model": ("A: b", "/v2/models/nothing/infer", 10, 404),
    "unknown path": ("A: b", "/nothing", 10, 404),
    "body over the limit": ("A: b", "/v2/models/affine/infer", LIMITS.max_body_bytes + 1, 413),
    "over the requests in flight": ("A: b", "/v2/models/affine/infer", 10, 503),
}


@pytest.mark.parametrize("case", REFUSED_BY_HEAD)
def test_refused_expect_closes_as_the_body_may_never_come_and_says_so(server: Running, case: str) -> None:
    header, path, length, status = REFUSED_BY_HEAD[case]
    bound = 0 if status == 503 else 10_000
    server.call(lambda: setattr(server.port, "max_in_flight", bound))
    try:
        with connect(server) as sock:
            sock.sendall(post(b"", EXPECT, header, path=path, length=str(length)))
            answer = read_answer(sock)
            assert status_of(answer) == status
            assert answer.lower().count(b"\r\nconnection: close\r\n") == 1
            assert sock.recv(10) == b""
    finally:
        server.call(lambda: setattr(server.port, "max_in_flight", 10_000))
    assert settled(server)


def test_refused_expect_whose_body_came_along_keeps_the_connection(server: Running) -> None:
    with connect(server) as sock:
        sock.sendall(post(GOOD, EXPECT, path="/v2/models/nothing/infer"))
        answer = read_answer(sock)
        assert status_of(answer) == 404
        assert b"connection: close" not in answer.lower()
        sock.sendall(post())
        assert status_of(read_answer(sock)) == 200


def test_expect_refused_after_the_100_is_as_any_refusal(server: Running) -> None:
    """The client has been asked for its body, so the rest of it comes, is thrown away, and the connection goes on."""
    server.call(lambda: setattr(server.port, "room", 5))
    try:
        with connect(server) as sock:
            sock.sendall(post(b"", EXPECT, "Transfer-Encoding: chunked", length=None))
            assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(b"a\r\n" + GOOD[:10] + b"\r\n")
            answer = read_answer(sock)
            assert status_of(answer) == 503
            assert b"connection: close" not in answer.lower()
            server.call(lambda: setattr(server.port, "room", 1 << 40))
            sock.sendall(b"a\r\n" + GOOD[10:20] + b"\r\n0\r\n\r\n" + post())
            assert status_of(read_answer(sock)) == 200
    finally:
        server.call(lambda: setattr(server.port, "room", 1 << 40))


def test_expect_over_http_1_0_is_ignored(server: Running) -> None:
    with connect(server) as sock:
        sock.sendall(post(GOOD, EXPECT).replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert statuses_of(read_all(sock)) == [200]


def test_connection_is_kept_over_errors_whose_body_is_read(server: Running) -> None:
    with connect(server) as sock:
        for path, status in (("/v2/models/nothing/infer", 404), ("/no", 404), ("/v2/models/affine/infer", 200)):
            sock.sendall(post(path=path))
            assert status_of(read_answer(sock)) == status


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    bodies = [json.dumps({"id": str(i), "inputs": [INPUT]}).encode() for i in range(20)]
    with connect(server) as sock:
        sock.sendall(b"".join(post(body) for body in bodies[:-1]) + post(bodies[-1], "Connection: close"))
        answers = read_all(sock)
    ids = [part.split(b'"id":"')[1].split(b'"')[0] for part in answers.split(b"HTTP/1.1 200")[1:]]
    assert ids == [str(i).encode() for i in range(20)]


@pytest.mark.parametrize("bad", [b"garbage\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", chunked(tail=b"zz\r\n")])
def test_good_requests_before_a_bad_one_are_answered(server: Running, bad: bytes) -> None:
    with connect(server) as sock:
        sock.sendall(post(path="/v2/models/later/infer") * 2 + bad)
        answers = read_all(sock)
    assert statuses_of(answers) == [200, 200, 400]
    assert answers.count(b"connection: close") == 1


def test_upgrade_is_ignored_and_the_body_kept(server: Running) -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
    raw = post(GOOD, *offer)
    assert status_of(exchange(server, raw)) == 200
    with connect(server) as sock:
        for piece in (raw[:50], raw[50:-20], raw[-20:]):
            sock.sendall(piece)
        assert status_of(read_answer(sock)) == 200
        sock.sendall(post())
        assert status_of(read_answer(sock)) == 200
    websocket = b"GET /v2 HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert status_of(exchange(server, websocket)) == 200


def test_http_1_0_is_answered_and_closed(server: Running) -> None:
    with connect(server) as sock:
        sock.sendall(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
        assert status_of(read_all(sock)) == 200


#: Answers that say that the connection ends, to clients who go on as if it did not.
LAST = {
    "app": (b"GET /v2 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200),
    "inference": (post(GOOD, "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0"), 200),
    "refusal": (post(GOOD, "Connection: keep-alive", path="/v2/models/no/infer").replace(b"/1.1", b"/1.0"), 404),
}


@pytest.mark.parametrize("rest", [b"", post()[:-5]], ids=["whole", "cut"])
@pytest.mark.parametrize("last", sorted(LAST))
def test_nothing_behind_the_last_answer_is_run(
    server: Running,
    last: str,
    rest: bytes,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    raw, status = LAST[last]
    server.control.calls.clear()
    behind = post(b"", path="/v2/repository/models/affine/load")
    with connect(server) as sock:
        sock.sendall(raw + behind + post(GOOD.replace(b'"7"', b'"behind"')) + rest)
        assert statuses_of(read_all(sock)) == [status]
    admitted = len(server.port.admitted)
    with connect(server) as sock:
        sock.sendall(raw + post() + behind + rest)
        assert statuses_of(read_all(sock)) == [status]
    assert status_of(exchange(server, post())) == 200  # by now what was begun has been run
    assert server.control.calls == []
    assert len(server.port.admitted) == admitted + 1 + (last == "inference")
    assert settled(server)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []  # so the loop tells of some


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 9000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 300 + b"\r\n", 431),
        (chunked(GOOD, tail=b"0\r\n" + b"a: b\r\n" * 300 + b"\r\n"), 431),
    ],
)
def test_header_limits(server: Running, raw: bytes, status: int) -> None:
    answer = exchange(server, raw)
    assert status_of(answer) == status
    assert b"over the limit of 8192 bytes" in answer


def test_header_that_never_ends(server: Running) -> None:
    with connect(server) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nx: ")
        for _ in range(500):
            sock.sendall(b"y" * 1000)
        assert status_of(read_answer(sock)) == 431


def malformed() -> list[bytes]:
    """Requests that are wrong in one way each, and many that are wrong in ways drawn by chance."""
    good = post()
    cases = [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
        b"GET / HTTP/0.9\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTQ/1.1\r\nHost: a\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"BREW /v2 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET \xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET / HTTP/1.1\r\nHost: a\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n: empty\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nx : y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nx: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n folded: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\nx: y\n\n",
        post(length="-1"),
        post(length="+5"),
        post(length="0x10"),
        post(length="abc"),
        post(length="5, 5"),
        post(length="18446744073709551616"),
        post(length="99999999999999999999999999"),
        post(GOOD, "Content-Length: 3"),
        post(GOOD, "Transfer-Encoding: chunked"),
        post(GOOD, "Transfer-Encoding: gzip", length=None),
        post(GOOD, "Transfer-Encoding: chunked, identity", length=None),
        post(GOOD, "Transfer-Encoding: xchunked", length=None),
        post(b"", length=None),
        chunked(tail=b"zz\r\n"),
        chunked(tail=b"-1\r\n"),
        chunked(tail=b"ffffffffffffffffff\r\n"),
        chunked(GOOD, tail=b"5\r\nabc"),
        chunked(GOOD, tail=b"1\r\nabc\r\n"),
        chunked(GOOD, tail=b"0\r\nbad trailer\r\n\r\n"),
        good.replace(b"POST", b"PATCH"),
        good.replace(b"/infer", b"/infe"),
        good.replace(b"\r\n", b"\n", 1),
        good[:-5],
        b"\r\n" * 100 + b"x",
    ]
    rng = random.Random(7)
    for _ in range(300):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(raw))
            match rng.randrange(4):
                case 0:
                    raw[place] = rng.randrange(256)
                case 1:
                    del raw[place : place + rng.randint(1, 9)]
                case 2:
                    raw[place:place] = rng.randbytes(rng.randint(1, 9))
                case _:
                    raw[place:place] = raw[place : place + rng.randint(1, 40)]
        cases.append(bytes(raw))
    return cases


def test_hundreds_of_malformed_requests(server: Running) -> None:
    """Each is answered with 2xx (chance may leave it valid) or 4xx, or closed; never 5xx, never a hang."""
    seen: dict[int, int] = {}
    for raw in malformed():
        with connect(server) as sock:
            try:
                sock.sendall(raw)
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            answers = read_all(sock)
        statuses = statuses_of(answers)
        assert all(200 <= status < 500 for status in statuses), (raw, answers)
        for status in statuses or [0]:
            seen[status] = seen.get(status, 0) + 1
        if statuses and statuses[-1] != 100 and b"{" in answers:
            assert b"content-type: application/json" in answers
    assert seen[400] > 100, seen
    assert infer(server).status == 200
    assert settled(server)
    until = time.monotonic() + 30
    while server.call(lambda: server.http_server.connections) >= 5:
        assert time.monotonic() < until, "connections are left"


@pytest.mark.parametrize("cut", range(0, 200, 13))
def test_early_close_and_reset(server: Running, cut: int) -> None:
    for reset in (False, True):
        with connect(server) as sock:
            sock.sendall(post(path="/v2/models/later/infer")[:cut])
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert infer(server).status == 200
    assert settled(server)


# --- time and connection limits ---


IMPATIENT = HttpSettings(
    body_idle_s=0.2,
    body_total_s=0.6,
    head_s=2.0,
    keep_alive_s=0.5,
    write_stall_s=0.3,
    discard_s=0.3,
    discard_bytes=100_000,
    drain_idle_s=0.1,
)


@pytest.fixture(scope="module", params=TRANSPORTS)
def impatient(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(http=IMPATIENT, transport=request.param) as started:
        yield started


@contextmanager
def begun(impatient: Running, first: bytes) -> Iterator[socket.socket]:
    """A connection whose first bytes were there long before it could be taken for one that says nothing.

    Where the machine was late with them, another one is tried.
    """
    for _ in range(20):
        before = time.monotonic()
        with connect(impatient) as sock:
            with suppress(OSError):  # it was late, or is answered before all is sent
                sock.sendall(first)
            if time.monotonic() - before < IMPATIENT.head_s / 2:
                yield sock
                return
    raise AssertionError("the machine stands still too often")


def test_malformed_requests_whose_sender_waits(impatient: Running) -> None:
    for raw in malformed()[:80]:
        with connect(impatient) as sock:
            sock.sendall(raw)
            answers = read_all(sock)
        assert all(200 <= status < 500 for status in statuses_of(answers)), (raw, answers)
    with begun(impatient, post()) as sock:
        assert status_of(read_answer(sock)) == 200  # in one piece: no body is waited for
    assert settled(impatient)


def test_slow_body_is_answered_408(impatient: Running) -> None:
    with begun(impatient, post()[:-5]) as sock:
        answer = read_all(sock)
    assert status_of(answer) == 408
    assert b"did not arrive in time" in answer
    assert b"x-tidegate-id" in answer
    assert settled(impatient)


def test_trickled_body_is_bounded_in_all(impatient: Running) -> None:
    waiter = threading.Event()
    with connect(impatient) as sock:
        sock.sendall(post(b"", length="1000"))
        for _ in range(400):
            try:
                sock.sendall(b"x")
            except OSError:
                break
            waiter.wait(0.05)
        else:
            pytest.fail("a trickle was taken for 20 s")
    assert settled(impatient)


def test_deadline_while_the_body_is_awaited(impatient: Running) -> None:
    with begun(impatient, post(b"", "x-tidegate-timeout-ms: 50", length="10")) as sock:
        assert status_of(read_answer(sock)) == 504


def test_slow_head_is_answered_408(impatient: Running) -> None:
    with begun(impatient, b"GET /v2 HTTP/1.1\r\nHo") as sock:
        answer = read_all(sock)
    assert status_of(answer) == 408
    assert b"headers did not arrive" in answer
    assert answer.count(b"connection: close") == 1


@pytest.mark.parametrize("start", [b"", b"\r\n", b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_idle_connections_are_closed(impatient: Running, start: bytes) -> None:
    with connect(impatient) as sock:
        sock.sendall(start)
        assert read_all(sock)[:12] in (b"", b"HTTP/1.1 200")


def test_empty_lines_do_not_keep_a_connection(impatient: Running) -> None:
    waiter = threading.Event()
    with begun(impatient, b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n") as sock:
        assert status_of(read_answer(sock)) == 200
        for _ in range(400):
            try:
                sock.sendall(b"\r\n")
                waiter.wait(0.05)
            except OSError:
                break
        else:
            pytest.fail("empty lines kept the connection for 20 s")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_reader_that_does_not_read_is_cut_off(transport: str) -> None:
    """For nothing else: its bodies may take their time."""
    body = json.dumps({"inputs": [{**INPUT, "shape": [1, 500_000], "data": [0.5] * 500_000}]}).encode()
    with running(http=HttpSettings(write_stall_s=0.3), transport=transport) as server:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before the window is agreed on
            sock.settimeout(20)
            sock.connect(server.http)
            with suppress(OSError):  # the cut may come before all is sent
                for _ in range(4):
                    sock.sendall(post(body))
            poll = select.poll()
            poll.register(sock, 0)
            assert poll.poll(10_000), "still connected"
        assert settled(server)


def test_unwanted_body_is_discarded_within_bounds(impatient: Running) -> None:
    with connect(impatient) as sock:
        try:
            sock.sendall(post(b"x" * 5_000_000, path="/nothing"))
        except OSError:
            pass
        else:
            read_all(sock)
    with begun(impatient, post(b"x", path="/nothing", length="100")) as sock:
        assert status_of(read_all(sock)) == 404


@pytest.mark.parametrize("path", ["/v2/models/no/infer", "/v2/models/affine/infer", "/nothing"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_who_was_given_the_last_answer_and_stays_is_cut(transport: str, path: str) -> None:
    """Also where the body came with the head: then all has been read when the answer is out."""
    times = HttpSettings(discard_s=0.2, keep_alive_s=600)
    with running(http=times, transport=transport) as server, connect(server) as sock:
        sock.sendall(post(GOOD, "Connection: close", path=path))
        assert len(statuses_of(read_all(sock))) == 1
        until = time.monotonic() + 20
        while server.http_server.connections and time.monotonic() < until:
            time.sleep(0.01)
        assert server.http_server.connections == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_connections_over_the_limit_are_told_so(transport: str) -> None:
    with running(http=HttpSettings(max_connections=3), transport=transport) as server:
        socks = [connect(server) for _ in range(3)]
        for sock in socks:
            sock.sendall(b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n")
            assert status_of(read_answer(sock)) == 200
        with connect(server) as sock:
            sock.sendall(post())
            answer = read_all(sock)
        assert status_of(answer) == 503
        assert b"retry-after: 1" in answer
        for sock in socks:
            sock.close()


# --- drain ---


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("factory", [None, asyncio.new_event_loop])
def test_drain_answers_what_is_in_flight_and_closes(factory: Any, transport: str) -> None:
    options = {"transport": transport, **({"loop": factory} if factory else {})}
    with running(http=HttpSettings(drain_idle_s=5.0), **options) as server:
        answers: list[Answer] = []
        caller = threading.Thread(target=lambda: answers.append(infer(server, "held")))
        caller.start()
        assert server.port.wait(lambda: bool(server.port.held))
        with connect(server) as idle:
            idle.sendall(post())
            assert status_of(read_answer(idle)) == 200
            drained = asyncio.run_coroutine_threadsafe(server.http_server.drain(10), server.loop)
            assert server.call(lambda: server.http_server.draining)
            idle.sendall(post())  # on its way when the drain began
            last = read_all(idle)
            assert status_of(last) == 200
            assert b"connection: close" in last
        with pytest.raises(ConnectionRefusedError):
            connect(server)
        server.call(server.port.answer_held)
        assert drained.result(10) is True
        caller.join(10)
        assert answers[0].status == 200
        assert answers[0].headers["connection"] == "close"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_drain_cuts_what_does_not_end(transport: str) -> None:
    with running(http=HttpSettings(drain_idle_s=0.1), transport=transport) as server:
        with connect(server) as sock:
            sock.sendall(post(path="/v2/models/held/infer"))
            assert server.port.wait(lambda: bool(server.port.held))
            assert server.run(server.http_server.drain(0.3)) is False
            assert read_all(sock) == b""
        assert server.port.wait(lambda: server.port.cancelled == ["7"])
        assert settled(server)


def test_two_servers_cannot_share_an_address(server: Running) -> None:
    second = HttpServer(server.http_server.overloaded)
    with pytest.raises(OSError, match="in use"):
        server.run(second.start(*server.http))
    assert server.run(second.drain(0.1)) is True
