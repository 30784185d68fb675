"""Requests that no honest client sends: each is refused with 4xx and a JSON text, and the next good one is right."""

from __future__ import annotations

import gzip
import json
import math
import random
import socket
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.support import hostile, models
from tests.support.metrics import wait_total
from tests.support.server import Server, serving
from tests.support.wire import Answer, Steady, Wire, post

AFFINE = "/v2/models/affine/infer"
GOOD: dict[str, Any] = {
    "id": "a",
    "parameters": {"priority": 0},
    "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}],
    "outputs": [{"name": "y", "parameters": {"binary_data": False}}],
}
TEXTS: dict[str, Any] = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "BYTES", "data": ["a", "", "é", "dd"]}]}
#: Words of our own insides that no caller should read.
INTERNALS = ("Traceback", ".py", "/work", "/home", "/tmp", ".cc", "onnxruntime::", "0x7", "site-packages", "TypeError")


@pytest.fixture(scope="module", params=["native", "reference"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("repository")
    models.affine(root / "affine" / "1" / "model.onnx")
    models.two_inputs(root / "simple" / "1" / "model.onnx")
    models.lookup(root / "lookup" / "1" / "model.onnx")
    for datatype in models.ELEMENT_TYPES:
        models.identity(root / f"identity_{datatype.lower()}" / "1" / "model.onnx", datatype)
    state = str(tmp_path_factory.mktemp("state"))
    options = ("--model-repository", str(root), "--state-dir", state, "--transport", request.param)
    with serving(*options) as running:
        yield running


@pytest.fixture
def steady(server: Server) -> Iterator[Steady]:
    connection = Steady(server.http)
    yield connection
    connection.close()
    assert_sane(server)


def assert_sane(server: Server) -> None:
    """A good request is answered right, and nothing is left behind."""
    with Wire(server.http) as wire:
        wire.send(post(AFFINE, json.dumps(GOOD).encode()))
        answer = wire.answer()
        assert answer is not None
        assert (answer.status, answer.body["outputs"][0]["data"]) == (200, [3.0, 5.0, 7.0, 9.0])
    wait_total(server, "tidegate_pending_requests", 0)
    assert not [line for line in server.lines if line.get("event") == "request_failed"]


def assert_refused(answer: Answer | None, *statuses: int, of: object = "") -> None:
    """A 4xx (one of ``statuses`` when given) with a text that shows nothing of our insides."""
    assert answer is not None, of
    assert 400 <= answer.status < 500, (answer.status, answer.body, of)
    assert not statuses or answer.status in statuses, (answer.status, answer.body, of)
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.body) == ["error"], of
    assert answer.body["error"], of
    assert not [word for word in INTERNALS if word in answer.body["error"]], (answer.body, of)


def flat(data: Any) -> list[Any]:
    return [leaf for part in data for leaf in flat(part)] if isinstance(data, list) else [data]


def same(got: Iterable[Any], wanted: Iterable[Any]) -> bool:
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(got, wanted, strict=True))


def accepted_rightly(body: Any, answer: Answer) -> bool:
    """Is a 200 to a mutated GOOD what its document asks for? Judged by the standard library's own reading of it."""
    x = body["inputs"][0]
    with np.errstate(over="ignore"):
        values = np.float32(flat(x["data"]))
    if isinstance(answer.body, bytes):  # binary output was asked for
        size = int(answer.headers["inference-header-content-length"])
        head, got = json.loads(answer.body[:size]), np.frombuffer(answer.body[size:], "<f4").tolist()
    else:
        head, got = answer.body, answer.body["outputs"][0]["data"]
    assert head.get("id", "") == (body.get("id") or "")
    assert (x["name"], x["datatype"], x["shape"][1]) == ("x", "FP32", 4)
    with np.errstate(over="ignore"):
        return same(np.float32(got), values * np.float32(2) + np.float32(1))


def test_wrong_kinds_at_every_position(steady: Steady) -> None:
    accepted = 0
    for document in hostile.variants(GOOD):
        answer = steady.exchange(AFFINE, json.dumps(document).encode())
        if answer.status == 200:
            assert accepted_rightly(document, answer), document
            accepted += 1
        else:
            assert_refused(answer, 400, of=document)
    assert accepted < 150


def test_wrong_kinds_at_every_position_of_texts(steady: Steady) -> None:
    for document in hostile.variants(TEXTS):
        answer = steady.exchange("/v2/models/identity_bytes/infer", json.dumps(document).encode())
        if answer.status == 200:
            assert answer.body["outputs"][0]["data"] == flat(document["inputs"][0]["data"]), document
        else:
            assert_refused(answer, 400, of=document)


@pytest.mark.parametrize("datatype", sorted(set(models.ELEMENT_TYPES) - {"BYTES", "BF16"}))
def test_values_out_of_their_type(steady: Steady, datatype: str) -> None:
    """What is accepted comes back as the same number; nothing wraps, is cut or rounded to another integer."""
    for value in hostile.VALUES:
        body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": datatype, "data": [value, 0, 0, 0]}]}
        if datatype == "BOOL":
            body["inputs"][0]["data"] = [value, False, True, False]
        answer = steady.exchange(f"/v2/models/identity_{datatype.lower()}/infer", json.dumps(body).encode())
        if answer.status != 200:
            assert_refused(answer, 400, of=body)
            continue
        got = answer.body["outputs"][0]["data"][0]
        if datatype.startswith("FP"):
            size = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}[datatype]
            with np.errstate(over="ignore"):
                assert same([size(got)], [size(flat(value)[0])]), (value, got)
        else:
            assert got == flat(value)[0], value
            assert isinstance(got, bool) == (datatype == "BOOL")


def test_truncated_at_every_byte(steady: Steady) -> None:
    whole = json.dumps(GOOD).encode()
    for length in range(len(whole)):
        assert_refused(steady.exchange(AFFINE, whole[:length]), 400, of=whole[:length])


def test_bytes_changed_at_random(steady: Steady) -> None:
    rng = random.Random(1)
    whole = json.dumps(GOOD).encode()
    for _ in range(600):
        body = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            body[rng.randrange(len(body))] = rng.randrange(256)
        answer = steady.exchange(AFFINE, bytes(body))
        if answer.status == 200:
            assert accepted_rightly(json.loads(body), answer), bytes(body)
        else:
            assert_refused(answer, 400, of=bytes(body))


ODD_DOCUMENTS = {
    "deep arrays": b"[" * 200_000,
    "deep closed arrays": b'{"inputs":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "deep data": json.dumps(GOOD).encode().replace(b"[1, 2, 3, 4]", b"[" * 150 + b"1" + b"]" * 150),
    "deep objects": b'{"a":' * 50_000,
    "deep unknown key": b'{"inputs":[],"z":' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    "not UTF-8": b'{"inputs":[{"name":"\xff\xfe","shape":[1],"datatype":"FP32","data":[1]}]}',
    "lone surrogate": b'{"inputs":[{"name":"\\ud800","shape":[1],"datatype":"FP32","data":[1]}]}',
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"}",
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "two documents": json.dumps(GOOD).encode() * 2,
    "null bytes": b"\0" * 64,
    "form": b"inputs=1&x=2",
    "long number": b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[' + b"9" * 100_000 + b",1,1,1]}]}",
    "long shape": json.dumps(GOOD).encode().replace(b"[1, 4]", b"[" + b"1," * 5000 + b"1]"),
    "many inputs": json.dumps({"inputs": [{**GOOD["inputs"][0], "name": f"x{i}"} for i in range(5000)]}).encode(),
    "many outputs": json.dumps({**GOOD, "outputs": [{"name": "y"}] * 5000}).encode(),
    "many parameters": json.dumps({**GOOD, "parameters": {str(i): i for i in range(5000)}}).encode(),
    "long id": json.dumps({**GOOD, "id": "i" * 100_000}).encode(),
    "long name": json.dumps({"inputs": [{**GOOD["inputs"][0], "name": "n" * 1_000_000}]}).encode(),
    "duplicate key": json.dumps(GOOD).encode()[:-1] + b',"inputs":[]}',
}


@pytest.mark.parametrize("case", sorted(ODD_DOCUMENTS))
def test_odd_documents(steady: Steady, case: str) -> None:
    answer = steady.exchange(AFFINE, ODD_DOCUMENTS[case])
    assert_refused(answer, 400)
    assert len(answer.body["error"]) < 4096


def binary_body(size: object, raw: bytes, datatype: str = "FP32", shape: object = (1, 4)) -> tuple[bytes, bytes]:
    x = {"name": "x", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}
    return json.dumps({"inputs": [x]}).encode(), raw


RAW = struct.pack("<4f", 1, 2, 3, 4)


@pytest.mark.parametrize(
    "length",
    ["-1", "+5", " ", "x", "1.0", "1e1", "0x10", "99999", "9" * 30, "0", "1", "{last}", "{beyond}", "٣", "1,1", "5, 5"],
)
def test_wrong_header_lengths(steady: Steady, length: str) -> None:
    head, raw = binary_body(16, RAW)
    text = length.format(last=len(head) - 1, beyond=len(head) + len(raw) + 1)
    path = "/v2/models/simple/infer" if length == "0" else AFFINE  # 0: one input alone may come without JSON
    assert_refused(steady.exchange(path, head + raw, {"Inference-Header-Content-Length": text}), 400, of=text)


@pytest.mark.parametrize("size", [15, 17, 0, -16, 16.5, "16", None, True, [16], {"n": 16}, 2**31, 2**63, 2**70, 1e400])
def test_wrong_binary_sizes(steady: Steady, size: object) -> None:
    head, raw = binary_body(size, RAW)
    answer = steady.exchange(AFFINE, head + raw, {"Inference-Header-Content-Length": str(len(head))})
    assert_refused(answer, 400, of=size)


def test_binary_bodies_cut_or_extended(steady: Steady) -> None:
    head, raw = binary_body(16, RAW)
    for cut in range(len(RAW)):
        answer = steady.exchange(AFFINE, head + raw[:cut], {"Inference-Header-Content-Length": str(len(head))})
        assert_refused(answer, 400, of=cut)
    answer = steady.exchange(AFFINE, head + raw + b"x", {"Inference-Header-Content-Length": str(len(head))})
    assert_refused(answer, 400)
    for body in (raw[:15], raw + b"x", b""):
        assert_refused(steady.exchange(AFFINE, body, {"Inference-Header-Content-Length": "0"}), 400, of=body)


def test_binary_and_data_together(steady: Steady) -> None:
    x = {**GOOD["inputs"][0], "parameters": {"binary_data_size": 16}}
    head = json.dumps({"inputs": [x]}).encode()
    answer = steady.exchange(AFFINE, head + RAW, {"Inference-Header-Content-Length": str(len(head))})
    assert_refused(answer, 400)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x01",
        b"\x05\0\0\0ab",
        b"\xff\xff\xff\xffab",
        b"\x01\0\0\0a" * 3,
        b"\x01\0\0\0a" * 5,
        b"\x01\0\0\0a" * 4 + b"\0",
        b"\xff\xff\xff\x7f" + b"a" * 16,
    ],
)
def test_wrong_binary_texts(steady: Steady, raw: bytes) -> None:
    head, raw = binary_body(len(raw), raw, "BYTES")
    headers = {"Inference-Header-Content-Length": str(len(head))}
    assert_refused(steady.exchange("/v2/models/identity_bytes/infer", head + raw, headers), 400, of=raw)


def test_binary_booleans_are_zero_or_one(steady: Steady) -> None:
    """A byte that is neither would be undefined behaviour inside the runtime."""
    head, raw = binary_body(4, b"\0\x01\x02\xff", "BOOL")
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = steady.exchange("/v2/models/identity_bool/infer", head + raw, headers)
    if answer.status == 200:
        assert answer.body["outputs"][0]["data"] == [False, True, True, True]
    else:
        assert_refused(answer, 400)


def test_damaged_compression(steady: Steady) -> None:
    body = json.dumps(GOOD).encode()
    for encoding, packed in (("gzip", gzip.compress(body, mtime=0)), ("deflate", zlib.compress(body))):
        for length in range(len(packed)):
            assert_refused(steady.exchange(AFFINE, packed[:length], {"Content-Encoding": encoding}), 400, of=length)
        rng = random.Random(2)
        for _ in range(60):
            changed = bytearray(packed)
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            answer = steady.exchange(AFFINE, bytes(changed), {"Content-Encoding": encoding})
            if answer.status == 200:  # a bit in the part of gzip's header that says nothing about the contents
                assert answer.body["outputs"][0]["data"] == [3.0, 5.0, 7.0, 9.0]
            else:
                assert_refused(answer, 400, 413)
        assert_refused(steady.exchange(AFFINE, body, {"Content-Encoding": encoding}), 400)


def test_compression_bombs(steady: Steady) -> None:
    for encoding, bomb in (
        ("gzip", gzip.compress(b" " * (80 << 20), 1)),
        ("deflate", zlib.compress(b"[" * (80 << 20), 1)),
    ):
        answer = steady.exchange(AFFINE, bomb, {"Content-Encoding": encoding})
        assert_refused(answer, 413)
    double = gzip.compress(gzip.compress(b" " * (8 << 20)))
    assert_refused(steady.exchange(AFFINE, double, {"Content-Encoding": "gzip"}), 400)


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "x", "gzip, gzip", "gzip;q=1", "identity, br", "\x7f"])
def test_encodings_that_are_not_spoken(steady: Steady, encoding: str) -> None:
    answer = steady.exchange(AFFINE, json.dumps(GOOD).encode(), {"Content-Encoding": encoding})
    assert_refused(answer, 400, 415)


def test_a_body_over_the_limit(steady: Steady, server: Server) -> None:
    with Wire(server.http) as wire:
        wire.send(b"POST %b HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % (AFFINE.encode(), 65 << 20))
        assert_refused(wire.answer(), 413)
    with Wire(server.http) as wire:
        wire.send(b"POST %b HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % (AFFINE.encode(), 2**64 + 5))
        assert_refused(wire.answer(), 400, 413)
    with Wire(server.http) as wire:
        wire.send(b"POST %b HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n" % AFFINE.encode())
        for _ in range(65):
            wire.send(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        assert_refused(wire.answer(), 413)


METHODS = ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "LOCK", "PURGE", "QUERY", "post", "", "A" * 300]


@pytest.mark.parametrize("method", METHODS)
def test_wrong_methods(server: Server, method: str) -> None:
    with Wire(server.http) as wire:
        wire.send(f"{method} {AFFINE} HTTP/1.1\r\nHost: t\r\n\r\n".encode())
        if method == "HEAD":
            head = wire._until(b"\r\n\r\n")
            assert head is not None
            assert head.split(b" ")[1] == b"405"
        else:
            assert_refused(wire.answer(), 400, 405)
    assert_sane(server)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/models//infer", 404),
        ("/v2/models/infer", 405),
        ("/v2/models/%2e%2e/infer", 404),
        ("/v2/models/../affine/infer", 404),
        ("/v2/models/..%2f..%2fetc%2fpasswd/infer", 404),
        ("/v2/models/%2e%2e%2f%2e%2e%2faffine/infer", 404),
        ("/v2/models/affine/versions/%2e%2e/infer", 400),
        ("/v2/models/" + "m" * 5000 + "/infer", 404),
        ("/v2/models/%ff%fe/infer", 400),
        ("/v2/models/%00/infer", 404),
        ("/v2/models/a%0d%0aSet-Cookie:x/infer", 404),
        ("/v2/models/%/infer", 404),
        ("/v2/models/%zz/infer", 404),
        ("/v2/models/affine/versions//infer", 404),
        ("/v2/models/affine/versions/2/infer", 404),
        ("/v2/models/affine/versions/0/infer", 400),
        ("/v2/models/affine/versions/01/infer", 404),
        ("/v2/models/affine/versions/-1/infer", 400),
        ("/v2/models/affine/versions/1.0/infer", 400),
        ("/v2/models/affine/versions/x/infer", 400),
        ("/v2/models/affine/versions/" + "9" * 4000 + "/infer", 404),
        ("/v2/models/affine/versions/%D9%A1/infer", 400),
        ("/v2/models/affine/versions/1/infer/", 404),
        ("/v2/models/affine/infer/x", 404),
        ("//v2/models/affine/infer", 404),
        ("/V2/models/affine/infer", 404),
        ("/v3/models/affine/infer", 404),
        ("/v2/models/affine/generate", 404),
        ("/v2/models/affine", 405),
        ("/", 404),
        ("/v2/repository/models/%2e%2e/load", 400),
        ("/v2/repository/models/.hidden/load", 400),
        ("/v2/repository/models/a%5cb/load", 400),
        ("/v2/repository/models/" + "m" * 5000 + "/load", 400),
        ("/v2/repository/models/%00/unload", 400),
        ("/v2/systemsharedmemory/region/x/register", 404),
    ],
)
def test_odd_paths(server: Server, path: str, status: int) -> None:
    with Wire(server.http) as wire:
        wire.send(post(path, json.dumps(GOOD).encode()))
        allowed = (status, 400) if status == 404 else (status,)
        assert_refused(wire.answer(), *allowed, of=path)
    assert_sane(server)


CONTROL = ["/v2/repository/index", "/v2/trace/setting", "/v2/logging", "/v2/models/affine/trace/setting",
           "/v2/repository/models/affine/load", "/v2/repository/models/affine/unload"]  # fmt: skip


@pytest.mark.parametrize("path", CONTROL)
def test_control_bodies(steady: Steady, path: str) -> None:
    base = {
        "ready": True, "parameters": {"config": "{}", "file:1/model.onnx": "aa"},
        "trace_level": ["OFF"], "trace_rate": "1", "trace_count": "1", "log_frequency": "1",
        "trace_file": "/etc/passwd", "log_file": "/etc/passwd", "log_info": True,
        "log_verbose_level": 1, "log_format": "default",
    }  # fmt: skip
    documents = [*({key: value} for key in base for value in hostile.VALUES), *hostile.VALUES]
    for document in documents:
        answer = steady.exchange(path, json.dumps(document).encode())
        if answer.status != 200:
            assert_refused(answer, 400, of=document)
    for raw in (b"{", b"\xff", b"[" * 100_000, b'{"ready":' + b"[" * 5000 + b"]" * 5000 + b"}", b" " * (2 << 20)):
        assert_refused(steady.exchange(path, raw), 400, 413, of=raw[:20])
    reset = {"trace_rate": None, "trace_count": None, "log_frequency": None, "trace_level": None}
    assert steady.exchange("/v2/trace/setting", json.dumps(reset).encode()).status == 200


# --- the level of bytes ---------------------------------------------------------------------------------------------

_BODY = json.dumps(GOOD).encode()
_HEAD = f"POST {AFFINE} HTTP/1.1\r\nHost: t\r\n".encode()
_SIZE = b"Content-Length: %d\r\n" % len(_BODY)
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

VIOLATIONS = {
    "two lengths": _HEAD + _SIZE + b"Content-Length: 5\r\n\r\n" + _BODY,
    "length and chunks": _HEAD + _SIZE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "negative length": _HEAD + b"Content-Length: -1\r\n\r\n" + _BODY,
    "signed length": _HEAD + b"Content-Length: +5\r\n\r\n" + _BODY,
    "length in words": _HEAD + b"Content-Length: five\r\n\r\n" + _BODY,
    "length list": _HEAD + b"Content-Length: 5, 5\r\n\r\n" + _BODY,
    "huge length": _HEAD + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n" + _BODY,
    "unknown transfer encoding": _HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + _BODY,
    "chunked is not last": _HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunk size in words": _CHUNKED + b"zz\r\nab\r\n0\r\n\r\n",
    "negative chunk size": _CHUNKED + b"-1\r\nab\r\n0\r\n\r\n",
    "chunk size over 64 bits": _CHUNKED + b"f" * 20 + b"\r\nab\r\n0\r\n\r\n",
    "chunk data too long": _CHUNKED + b"2\r\nabcd\r\n0\r\n\r\n",
    "no host": f"POST {AFFINE} HTTP/1.1\r\n".encode() + _SIZE + b"\r\n" + _BODY,
    "two hosts": _HEAD + b"Host: u\r\n" + _SIZE + b"\r\n" + _BODY,
    "space before colon": _HEAD + b"Content-Length : 5\r\n\r\n" + _BODY,
    "folded header": _HEAD + b"X-A: b\r\n c\r\n" + _SIZE + b"\r\n" + _BODY + b"\0",
    "no colon": _HEAD + b"nonsense\r\n" + _SIZE + b"\r\n" + _BODY,
    "null in a header": _HEAD + b"X-A: a\0b\r\n" + _SIZE + b"\r\n" + _BODY,
    "line feed in a name": _HEAD + b"X\x01A: b\r\n" + _SIZE + b"\r\n" + _BODY,
    "long header": _HEAD + b"X-A: " + b"a" * 100_000 + b"\r\n" + _SIZE + b"\r\n" + _BODY,
    "long target": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: t\r\n\r\n",
    "many headers": _HEAD + b"".join(b"X-%d: a\r\n" % i for i in range(5000)) + b"\r\n",
    # The whole preface is HTTP/2, which the native transport speaks on this address too.
    "HTTP/2 preface, misspelt": b"PRI * HTTP/2.0\r\n\r\nSN\r\n\r\n",
    "HTTP/3.0": b"GET /v2 HTTP/3.0\r\nHost: t\r\n\r\n",
    "HTTP/1.2": b"GET /v2 HTTP/1.2\r\nHost: t\r\n\r\n",
    "HTTP/0.9": b"GET /v2\r\n\r\n",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64,
    "noise": bytes(range(256)),
    "target without slash": b"GET v2 HTTP/1.1\r\nHost: t\r\n\r\n",
    "raw bytes in target": b"GET /v2/models/\xff\xfe HTTP/1.1\r\nHost: t\r\n\r\n",
    "connect": b"CONNECT a:80 HTTP/1.1\r\nHost: t\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: t\r\n\r\n",
    "body without a length": _HEAD + b"\r\n" + _BODY,
}


@pytest.mark.parametrize("case", sorted(VIOLATIONS))
def test_violations(server: Server, case: str) -> None:
    with Wire(server.http) as wire:
        wire.send(VIOLATIONS[case])
        answer = wire.answer()
        if case == "folded header" and answer is not None and answer.status == 200:
            answer = wire.answer()  # folding may be taken as a space; the NUL after the body may not
        assert_refused(answer)
    assert_sane(server)


def test_forms_that_are_rare_but_right(server: Server) -> None:
    """HTTP/1.0, absolute-form targets, Expect, lower-case names, chunks with extensions and trailers, empty lines."""
    absolute = f"POST http://elsewhere:1{AFFINE} HTTP/1.1\r\nHost: t\r\n".encode() + _SIZE + b"\r\n" + _BODY
    chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (1, _BODY[i : i + 1]) for i in range(len(_BODY)))
    right = {
        "HTTP/1.0": post(AFFINE, _BODY, version="1.0"),
        "absolute": absolute,
        "lower case": post(AFFINE, _BODY).lower().replace(b"post /v2", b"POST /v2").replace(b"http/1.1", b"HTTP/1.1"),
        "one-byte chunks": _CHUNKED + chunks + b"0\r\nHost: u\r\nX-Trailer: y\r\n\r\n",
        "empty lines first": b"\r\n\r\n" + post(AFFINE, _BODY),
        "query": post(AFFINE + "?a=b&c", _BODY),
        "h2c offer": post(AFFINE, _BODY, {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}),
    }
    for case, data in right.items():
        with Wire(server.http) as wire:
            wire.send(data)
            answer = wire.answer()
            if case == "lower case":
                assert_refused(answer, 400)  # "fp32" is no datatype; the headers were read all the same
                continue
            assert answer is not None, case
            assert answer.status == 200, (case, answer.body)
            assert answer.body["outputs"][0]["data"] == [3.0, 5.0, 7.0, 9.0], case
    with Wire(server.http) as wire:
        wire.send(_HEAD + _SIZE + b"Expect: 100-continue\r\n\r\n")
        first = wire.answer()
        assert first is not None
        assert first.status == 100
        wire.send(_BODY)
        answer = wire.answer()
        assert answer is not None
        assert answer.status == 200
    with Wire(server.http) as wire:
        wire.send(b"POST /v2/models/nobody/infer HTTP/1.1\r\nHost: t\r\n" + _SIZE + b"Expect: 100-continue\r\n\r\n")
        assert_refused(wire.answer(), 404)
    with Wire(server.http) as wire:
        wire.send(_HEAD + _SIZE + b"Expect: the unexpected\r\n\r\n" + _BODY)
        answer = wire.answer()
        assert answer is not None
        assert answer.status in (200, 417)


def test_pipelined_good_and_bad(server: Server) -> None:
    """Answers come in order; what follows a broken request on its connection is not read as a request."""
    good, bad = post(AFFINE, _BODY), post(AFFINE, b"{}")
    with Wire(server.http) as wire:
        wire.send((good + bad) * 20)
        for _ in range(20):
            answer = wire.answer()
            assert answer is not None
            assert answer.status == 200
            assert_refused(wire.answer(), 400)
    with Wire(server.http) as wire:
        wire.send(good * 3 + b"BROKEN\r\n\r\n" + good)
        answers = [wire.answer() for _ in range(4)]
        assert [a and a.status for a in answers] == [200, 200, 200, 400]
        assert wire.answer() is None
    assert_sane(server)


_OFFER = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}


def test_an_offer_of_another_protocol_spares_the_requests_before_it(server: Server) -> None:
    good, offer = post(AFFINE, _BODY), post(AFFINE, _BODY, _OFFER)
    with Wire(server.http) as wire:
        wire.send((good + offer) * 3)
        for _ in range(6):
            answer = wire.answer()
            assert answer is not None
            assert (answer.status, answer.body["outputs"][0]["data"]) == (200, [3.0, 5.0, 7.0, 9.0])
    assert_sane(server)


def test_many_offers_of_another_protocol(server: Server) -> None:
    """They are as many requests, and what is wrong behind them is told as it is."""
    offer = b"GET /v2/health/live HTTP/1.1\r\nHost: t\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"
    with Wire(server.http) as wire:
        wire.send(offer * 1000 + b"GET / HTTP/1.1\r\nHost: t\r\nX: " + b"a" * 70_000 + b"\r\n\r\n")
        for _ in range(1000):
            answer = wire.answer()
            assert answer is not None
            assert answer.status == 200
        assert_refused(wire.answer(), 431)
    assert_sane(server)


def test_early_closes(server: Server) -> None:
    """A client that leaves at any byte of a request takes nothing with it."""
    whole = post(AFFINE, _BODY)
    for length in range(0, len(whole) + 1, 3):
        with Wire(server.http) as wire:
            wire.send(whole[:length])
    assert_sane(server)


def test_half_closed_clients_are_answered(server: Server) -> None:
    with Wire(server.http) as wire:
        wire.send(post(AFFINE, _BODY))
        wire.socket.shutdown(socket.SHUT_WR)
        answer = wire.answer()
        assert answer is None or answer.status == 200
    with Wire(server.http) as wire:
        wire.send(post(AFFINE, _BODY)[:-5])
        wire.socket.shutdown(socket.SHUT_WR)
        answer = wire.answer()
        if answer is not None:
            assert_refused(answer)
    assert_sane(server)


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "9" * 13, "", "1e3"])
def test_bad_timeouts(steady: Steady, value: str) -> None:
    assert_refused(steady.exchange(AFFINE, _BODY, {"x-tidegate-timeout-ms": value}), 400)


def test_odd_headers_change_nothing(steady: Steady) -> None:
    odd = {
        "traceparent": "00-zz-xx-99", "tracestate": "=" * 600, "Accept-Encoding": "gzip;q=x, *;q=-1,,;",
        "Accept": "text/html", "Content-Type": "multipart/form-data; boundary=;", "X-A": "\xe9\xff",
        "Cookie": "a=" + "b" * 4000, "Range": "bytes=5-1", "If-Match": "x", "Forwarded": "for=evil",
        "X-Forwarded-For": "'; drop", "Connection": "keep-alive, x", "TE": "trailers", "Priority": "u=9",
    }  # fmt: skip
    for name, value in odd.items():
        answer = steady.exchange(AFFINE, _BODY, {name: value})
        assert answer.status == 200, name
        assert answer.body["outputs"][0]["data"] == [3.0, 5.0, 7.0, 9.0]


def test_a_bad_row_is_the_callers_fault(steady: Steady) -> None:
    for value in (8, -9, 2**62):
        body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "INT64", "data": [value]}]}
        assert_refused(steady.exchange("/v2/models/lookup/infer", json.dumps(body).encode()), 400)
