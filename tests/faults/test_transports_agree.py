"""One corpus of broken and odd requests to both transports: status, body and the headers that mean something agree.

Everything is drawn from seeds. Where the transports may differ, the difference and its reason stand beside the test.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import grpc
import numpy as np
import pytest

from server._pb import inference_pb2 as pb
from server.transport.answers import HttpSettings
from server.types import RequestLimits
from tests.faults.test_malformed_http import VIOLATIONS
from tests.support import hostile
from tests.support.echo import Running, running
from tests.support.http2 import (
    DATA,
    END_STREAM,
    INFER,
    PATIENCE_S,
    STREAM_INFER,
    Http2Wire,
    frame,
    grpc_message,
    opened,
)
from tests.support.wire import Answer, Wire, post

LIMITS = RequestLimits(max_body_bytes=256 * 1024, max_chunks=200)
PATH = "/v2/models/affine/infer"
GOOD = {
    "id": "a",
    "inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2.5]}],
    "outputs": [{"name": "y", "parameters": {"binary_data": False}}],
}
WHOLE = json.dumps(GOOD).encode()
RAW = np.array([1, 2.5], "<f4").tobytes()
#: Headers of an answer that clients act on. Not the others: dates and ids.
COMPARED = (
    "content-type", "connection", "content-encoding", "inference-header-content-length", "retry-after", "allow",
    "x-tidegate-version", "x-tidegate-arm", "x-tidegate-generation",
)  # fmt: skip
#: A body or head that is not complete is waited for so long.
PATIENT = HttpSettings(head_s=1.0, body_idle_s=1.0, discard_s=1.0)

Essence: TypeAlias = tuple[int, object, tuple[str | None, ...]] | None


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Running, Running]]:
    with (
        running(transport="native", limits=LIMITS, http=PATIENT) as native,
        running(transport="reference", limits=LIMITS, http=PATIENT) as reference,
    ):
        yield native, reference


def essence(answer: Answer | None) -> Essence:
    if answer is None:
        return None
    return answer.status, answer.body, tuple(answer.headers.get(name) for name in COMPARED)


def told(server: Running, raw: bytes) -> Essence:
    """What matters of the answer to ``raw`` on a connection of its own."""
    with Wire("{}:{}".format(*server.http)) as wire:
        wire.send(raw)
        return essence(wire.answer())


def agree(both: tuple[Running, Running], requests: Iterator[bytes]) -> Counter[int]:
    """The same answers to all of these on one connection; how often each status was told."""
    wires = [Wire("{}:{}".format(*server.http)) for server in both]
    statuses: Counter[int] = Counter()
    for raw in requests:
        for wire in wires:
            wire.send(raw)
        native, reference = (essence(wire.answer()) for wire in wires)
        assert native == reference, raw
        assert native is not None, raw
        statuses[native[0]] += 1
        if "close" in native[2]:
            for wire in wires:
                wire.socket.close()
            wires = [Wire("{}:{}".format(*server.http)) for server in both]
    for wire in wires:
        wire.socket.close()
    return statuses


# --- bodies -------------------------------------------------------------------------------------------------------


def test_json(both: tuple[Running, Running]) -> None:
    rng = random.Random(8)
    documents = (json.dumps(document).encode() for document in hostile.variants(GOOD))
    bodies = itertools.chain(documents, (hostile.scrambled(rng, WHOLE) for _ in range(1200)))
    statuses = agree(both, (post(PATH, body) for body in bodies))
    assert set(statuses) == {200, 400}
    assert min(statuses.values()) > 100


def binary(head: Any, raw: bytes, length: object = None) -> bytes:
    """A request of the binary extension; its header says ``length`` where given."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return post(PATH, text + raw, {"Inference-Header-Content-Length": str(len(text) if length is None else length)})


def test_binary_extension(both: tuple[Running, Running]) -> None:
    """Heads of every wrong kind, tails too short and too long, lengths that lie, and all of it scrambled."""
    x = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    base = {"inputs": [x], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}
    text, rng = json.dumps(base).encode(), random.Random(10)

    def requests() -> Iterator[bytes]:
        for document in hostile.variants(base):
            yield binary(document, RAW)
        for size in range(12):
            yield binary(text, (RAW + RAW)[:size])
        for length in (0, 1, len(text) - 1, len(text) + 1, len(text) + 8, len(text) + 9, -1, "x", "", 2**70, "1 1"):
            yield binary(text, RAW, length)
        for _ in range(600):
            yield binary(hostile.scrambled(rng, text), hostile.scrambled(rng, RAW) if rng.random() < 0.3 else RAW)
            yield binary(text, RAW, rng.randrange(len(text) + 12))

    statuses = agree(both, requests())
    assert set(statuses) == {200, 400}
    assert min(statuses.values()) > 50


# --- heads --------------------------------------------------------------------------------------------------------

#: Each alone or with others, with a value from the second list or one of its own.
NAMES = (
    "Host", "Content-Length", "Transfer-Encoding", "Connection", "Expect", "Content-Encoding", "Accept-Encoding",
    "Inference-Header-Content-Length", "x-tidegate-timeout-ms", "traceparent", "tracestate", "Upgrade", "Cookie",
    "Content-Type", "Trailer", "TE", "X-A", "x-tidegate-id", "Proxy-Connection", "Keep-Alive", "content-length",
)  # fmt: skip
VALUES = (
    "", "0", "1", "-1", "+1", " 1", "1 ", "1, 1", "0x10", "9" * 30, "chunked", "Chunked", "chunked, chunked",
    "identity", "gzip", "gzip, chunked", "close", "keep-alive", "close, x", "upgrade", "h2c", "100-continue",
    "a\tb", "é", "\x7f", "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "x" * 3000, ";", ",", "*",
    str(len(WHOLE)), str(len(WHOLE) - 1),
)  # fmt: skip
FOLLOWING = b"GET /v2/health/live HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n"


def heads() -> Iterator[bytes]:
    """Requests whose heads are odd, with another behind them: is it taken for what it is?"""
    right = [("Host", "t"), ("Content-Length", str(len(WHOLE)))]
    for name, value in itertools.product(NAMES, VALUES):
        yield head([*right, (name, value)])
    rng = random.Random(12)
    for _ in range(250):
        lines = list(right)
        for _ in range(rng.choice((1, 2, 3))):
            line = (rng.choice(NAMES), rng.choice(VALUES))
            if rng.random() < 0.3:
                lines[rng.randrange(len(lines))] = line
            else:
                lines.insert(rng.randrange(len(lines) + 1), line)
        yield head(lines)
    whole = head(right)
    for _ in range(250):
        yield hostile.scrambled(rng, whole[: -len(WHOLE)]) + WHOLE


def head(lines: list[tuple[str, str]]) -> bytes:
    text = "".join(f"{name}: {value}\r\n" for name, value in lines)
    return f"POST {PATH} HTTP/1.1\r\n{text}\r\n".encode("latin-1") + WHOLE


def all_told(server: Running, raw: bytes) -> list[Essence]:
    """Every answer until the connection ends. A HEAD has no body: none is sent here."""
    with Wire("{}:{}".format(*server.http)) as wire:
        wire.send(raw)
        answers: list[Essence] = []
        while (answer := wire.answer()) is not None and len(answers) < 5:
            answers.append(essence(answer))
        return answers


def test_heads(both: tuple[Running, Running]) -> None:
    """Whole sequences of answers: a request in a request, seen by one of them only, would be one answer more."""
    corpus = [raw + FOLLOWING for raw in heads()]
    with ThreadPoolExecutor(24) as pool:  # most of the time is waiting for what does not come
        native = list(pool.map(lambda raw: all_told(both[0], raw), corpus))
        reference = list(pool.map(lambda raw: all_told(both[1], raw), corpus))
    for raw, one, other in zip(corpus, native, reference, strict=True):
        assert one == other, raw
    counts = Counter(answers[0][0] for answers in native if answers and answers[0])
    assert counts[200] > 200
    assert counts[400] > 200


@pytest.mark.parametrize("case", sorted(VIOLATIONS))
def test_violations(both: tuple[Running, Running], case: str) -> None:
    native, reference = (told(server, VIOLATIONS[case]) for server in both)
    assert native == reference


ODD = {
    "no such model": post("/v2/models/nobody/infer", b"{}"),
    "no such version": post("/v2/models/affine/versions/9/infer", b"{}"),
    "bad version": post("/v2/models/affine/versions/x/infer", b"{}"),
    "name not UTF-8": post("/v2/models/%ff/infer", b"{}"),
    "full": post("/v2/models/full/infer", WHOLE),
    "many": post("/v2/models/many/infer", WHOLE),
    "over the limit": post(PATH, b" " * 300_000),
    "declared over the limit": post(PATH, b"", {"Content-Length": "300000"}),
    "bad timeout": post(PATH, b"{}", {"x-tidegate-timeout-ms": "-1"}),
    "bad binary length": post(PATH, b"{}", {"inference-header-content-length": "9"}),
    "raw binary": post(PATH, RAW, {"inference-header-content-length": "0"}),
    "unknown coding": post(PATH, b"{}", {"Content-Encoding": "br"}),
    "not gzip": post(PATH, b"{}", {"Content-Encoding": "gzip"}),
    "wrong method": b"GET /v2/models/affine/infer HTTP/1.1\r\nHost: t\r\n\r\n",
    "1.0": post(PATH, WHOLE, version="1.0"),
    "close": post(PATH, WHOLE, {"Connection": "close"}),
    "query": post(PATH + "?a=b", WHOLE),
    "empty": post(PATH, b""),
}


@pytest.mark.parametrize("case", sorted(ODD))
def test_odd_requests(both: tuple[Running, Running], case: str) -> None:
    native, reference = (told(server, ODD[case]) for server in both)
    assert native == reference
    assert native is not None


# --- gRPC ---------------------------------------------------------------------------------------------------------


def requests() -> list[bytes]:
    """Good ones of several forms: raw and typed contents, several inputs, outputs, parameters of each kind."""
    plain = pb.ModelInferRequest(model_name="affine", id="a")
    plain.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    plain.raw_input_contents.append(RAW)
    rich = pb.ModelInferRequest(model_name="echo", model_version="1", id="é")
    rich.parameters["priority"].int64_param = 0
    rich.parameters["note"].string_param = "n"
    rich.parameters["flag"].bool_param = True
    for name in ("x", "y"):
        tensor = rich.inputs.add(name=name, datatype="FP32", shape=[1, 2])
        tensor.parameters["p"].double_param = 1.5
        rich.raw_input_contents.append(RAW)
    rich.outputs.add(name="x").parameters["q"].bool_param = False
    typed = pb.ModelInferRequest(model_name="affine")
    typed.inputs.add(name="x", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1, 2.5])
    texts = pb.ModelInferRequest(model_name="echo")
    texts.inputs.add(name="t", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"a", b"\xff"])
    return [request.SerializeToString() for request in (plain, rich, typed, texts)]


def mutants(seed: int, count: int) -> Iterator[bytes]:
    """Every prefix of the first; the others scrambled and with their fields rearranged."""
    goods, rng = requests(), random.Random(seed)
    yield from (goods[0][:length] for length in range(len(goods[0]) + 1))
    for _ in range(count):
        yield hostile.scrambled(rng, rng.choice(goods))
        mutant = rng.choice(goods)
        for _ in range(rng.choice((1, 1, 2, 3))):
            mutant = hostile.rearranged(rng, mutant)
        yield mutant


@pytest.fixture(scope="module")
def channels(both: tuple[Running, Running]) -> Iterator[tuple[grpc.Channel, grpc.Channel]]:
    native, reference = (grpc.insecure_channel("{}:{}".format(*server.grpc)) for server in both)
    with native, reference:
        yield native, reference


def result(channel: grpc.Channel, path: str, raw: bytes, **options: Any) -> Any:
    try:
        return channel.unary_unary(path)(raw, timeout=10, **options)
    except grpc.RpcError as error:
        return error.code(), error.details(), dict(error.trailing_metadata()).get("retry-after")


@pytest.mark.parametrize(
    ("path", "count"), [(INFER, 1200), ("/inference.GRPCInferenceService/ModelMetadata", 100), ("/a/B", 5)]
)
def test_messages(channels: tuple[grpc.Channel, grpc.Channel], path: str, count: int) -> None:
    answered = 0
    for raw in mutants(9, count):
        native, reference = (result(channel, path, raw) for channel in channels)
        if path == "/a/B":  # the texts are of two libraries
            native, reference = native[0], reference[0]
        assert native == reference, raw
        answered += isinstance(native, bytes)
    assert path != INFER or answered > 200


def test_streams(channels: tuple[grpc.Channel, grpc.Channel]) -> None:
    """Forty at a time: what is wrong with one is told in its place, and the next is answered."""
    corpus = list(mutants(11, 900))
    for at in range(0, len(corpus), 40):
        part = corpus[at : at + 40]
        native, reference = (list(to.stream_stream(STREAM_INFER)(iter(part), timeout=20)) for to in channels)
        assert len(native) >= len(part) - 1
        for raw, one, other in zip(part, native, reference, strict=False):
            assert one == other, raw
        assert len(native) == len(reference)


#: Headers and bodies of gRPC calls that no client library would send.
CALLS: dict[str, tuple[list[tuple[str, str]], bytes]] = {
    "good": ([], grpc_message(requests()[0])),
    "no message": ([], b""),
    "half a prefix": ([], b"\0\0\0"),
    "half a message": ([], grpc_message(requests()[0])[:-3]),
    "two messages": ([], grpc_message(requests()[0]) * 2),
    "a flag of 2": ([], grpc_message(requests()[0], 2)),
    "a length of 4 GB": ([], b"\0\xff\xff\xff\xff"),
    "over the limit": ([], b"\0" + (300_000).to_bytes(4) + bytes(300_000)),
    "compressed without coding": ([], grpc_message(requests()[0], 1)),
    "identity": ([("grpc-encoding", "identity")], grpc_message(requests()[0])),
    "compressed as identity": ([("grpc-encoding", "identity")], grpc_message(requests()[0], 1)),
    "not gzip": ([("grpc-encoding", "gzip")], grpc_message(requests()[0], 1)),
    "unknown coding": ([("grpc-encoding", "br")], grpc_message(requests()[0])),
    "unknown coding in use": ([("grpc-encoding", "br")], grpc_message(requests()[0], 1)),
    "timeout": ([("grpc-timeout", "5S")], grpc_message(requests()[0])),
    "longest timeout": ([("grpc-timeout", "99999999H")], grpc_message(requests()[0])),
    "timeout of 0": ([("grpc-timeout", "0n")], grpc_message(requests()[0])),
    "timeout in words": ([("grpc-timeout", "soon")], grpc_message(requests()[0])),
    "timeout without unit": ([("grpc-timeout", "5")], grpc_message(requests()[0])),
    "negative timeout": ([("grpc-timeout", "-5S")], grpc_message(requests()[0])),
    "nine digits": ([("grpc-timeout", "123456789S")], grpc_message(requests()[0])),
    "metadata": ([("x-a", "b"), ("x-a", "c"), ("x-b-bin", "AAEC/w")], grpc_message(requests()[0])),
    "binary that is none": ([("x-b-bin", "*")], grpc_message(requests()[0])),
    "right length": ([("content-length", str(len(requests()[0]) + 5))], grpc_message(requests()[0])),
    "wrong length": ([("content-length", "3")], grpc_message(requests()[0])),
    "a connection header": ([("connection", "close")], grpc_message(requests()[0])),
    "upper case": ([("X-A", "b")], grpc_message(requests()[0])),
    "a field of no name": ([("", "b")], grpc_message(requests()[0])),
    "a late pseudo field": ([(":path", "/x")], grpc_message(requests()[0])),
    "an unknown pseudo field": ([(":x", "y")], grpc_message(requests()[0])),
    "te of another kind": ([("te", "gzip")], grpc_message(requests()[0])),
    "a line feed in a value": ([("x-a", "b\nc")], grpc_message(requests()[0])),
}


#: case: what native says, what the reference may say, why. The reference's framing and heads are those of gRPC's core.
ALLOWED: dict[str, tuple[str, set[str], str]] = {
    **dict.fromkeys(
        ("no message", "half a prefix", "half a message", "a flag of 2"),
        ("3", {"no answer", "5"}, "its Python layer takes a broken message for a cancelled call or an empty message"),
    ),
    "two messages": ("3", {"0"}, "it reads the first only"),
    **dict.fromkeys(
        ("compressed without coding", "compressed as identity", "not gzip"), ("3", {"13"}, "it blames the server")
    ),
    **dict.fromkeys(("unknown coding", "unknown coding in use"), ("12", {"13"}, "the protocol says UNIMPLEMENTED")),
    **dict.fromkeys(
        ("timeout in words", "timeout without unit", "negative timeout"), ("3", {"13"}, "it blames the server")
    ),
    "nine digits": ("3", {"0"}, "the protocol allows eight"),
    "binary that is none": ("0", {"13"}, "nothing of ours reads binary metadata: it is not decoded"),
    "wrong length": ("reset 1", {"0"}, "RFC 9113 section 8.1.1"),
    "a connection header": ("reset 1", {"0"}, "RFC 9113 section 8.2.2"),
    "a line feed in a value": ("reset 1", {"0"}, "RFC 9113 section 8.2.1"),
    "a late pseudo field": ("reset 1", {"12"}, "RFC 9113 section 8.3: no answer to a malformed head is wanted"),
    **dict.fromkeys(
        ("upper case", "a field of no name", "an unknown pseudo field", "te of another kind"),
        ("reset 1", {"13"}, "RFC 9113 sections 8.2 and 8.3, likewise"),
    ),
}
#: The wait for an answer that does not come.
_SOON_S = 1.5


def wired(server: Running, case: str, patience_s: float = PATIENCE_S) -> str:
    """grpc-status, or how else the call ended; after it the connection is as good as before."""
    more, body = CALLS[case]
    with Http2Wire(server.grpc) as wire:
        wire.send(opened(1, *more))
        parts = [body[i : i + 16_384] for i in range(0, len(body), 16_384)] or [b""]
        for i, part in enumerate(parts):
            wire.send(frame(DATA, END_STREAM * (i == len(parts) - 1), 1, part))
        wire.socket.settimeout(patience_s)
        try:
            answer = wire.answer(1)
            outcome = answer.status or f"reset {answer.reset}"
        except TimeoutError:
            outcome = "no answer"
        wire.socket.settimeout(PATIENCE_S)
        assert wire.call(3, requests()[0]).status == "0"
        return outcome


@pytest.mark.parametrize("case", CALLS)
def test_calls(both: tuple[Running, Running], case: str) -> None:
    native = wired(both[0], case)
    wanted, others, _ = ALLOWED.get(case, (native, {native}, ""))
    reference = wired(both[1], case, _SOON_S if "no answer" in others else PATIENCE_S)
    assert native == wanted
    assert reference in others
