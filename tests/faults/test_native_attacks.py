"""Floods and stalls over HTTP/2 against a real server: cut off or bounded, at little cost, and others are served.

Every flood is bounded here as well, by frames and by bytes. Times are bounds, not measurements.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import grpc
import numpy as np
import pytest

from server._pb import inference_pb2 as pb
from tests.support import http2, models
from tests.support.http2 import DATA, END_HEADERS, END_STREAM, HEADERS, Http2Wire, frame, opened
from tests.support.metrics import wait_total
from tests.support.server import Server, serving
from tests.support.wire import Wire, post

#: What one attack may cost the server.
CPU_SECONDS = 6.0
GROWTH_BYTES = 96 * 1024 * 1024
MAX_HEADER_LIST_SIZE = 6
COMPRESSION_ERROR = 9


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("repository")
    models.affine(root / "affine" / "1" / "model.onnx")
    models.identity(root / "identity" / "1" / "model.onnx", "FP32")
    state = str(tmp_path_factory.mktemp("state"))
    with serving("--model-repository", str(root), "--state-dir", state, "--transport", "native") as running:
        yield running


@pytest.fixture(autouse=True)
def bounded(server: Server) -> Iterator[None]:
    """What is asked of every attack: little CPU, little memory, new clients of both protocols are served."""
    assert_served(server)
    cpu, memory = cpu_seconds(server), resident(server)
    yield
    assert_served(server)
    assert cpu_seconds(server) - cpu < CPU_SECONDS
    assert resident(server) - memory < GROWTH_BYTES
    wait_total(server, "tidegate_pending_requests", 0)
    assert not [line for line in server.lines if line.get("level") in ("error", "critical")]


def cpu_seconds(server: Server) -> float:
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(server: Server) -> int:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def message(value: float = 1.0, model: str = "affine", width: int = 4) -> bytes:
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=[1, width])
    request.raw_input_contents.append(np.full(width, value, "<f4").tobytes())
    return request.SerializeToString()


def values(raw: bytes) -> list[float]:
    return np.frombuffer(pb.ModelInferResponse.FromString(raw).raw_output_contents[0], "<f4").tolist()


def assert_served(server: Server) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        answer = channel.unary_unary(http2.INFER)(message(3.0), timeout=30, wait_for_ready=True)
        assert values(answer) == [7.0] * 4
    body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [3, 3, 3, 3]}]}
    with Wire(server.http) as wire:
        wire.send(post("/v2/models/affine/infer", json.dumps(body).encode()))
        told = wire.answer()
        assert told is not None
        assert told.body["outputs"][0]["data"] == [7.0] * 4


def flood(wire: Http2Wire, frames: Iterator[bytes], *, unread: bool = False, end: bool = True) -> None:
    """Send until all is sent or the server closes. What it answers is read meanwhile, unless ``unread``."""
    reader = threading.Thread(target=read_on, args=(wire,), daemon=True)
    if not unread:
        reader.start()
    while not wire.ended and (batch := b"".join(islice(frames, 50))) and send(wire, batch):
        pass
    if unread:
        return
    if end:
        with suppress(OSError):
            wire.socket.shutdown(socket.SHUT_WR)
    reader.join(2 * http2.PATIENCE_S)


def is_cut(wire: Http2Wire, frames: Iterator[bytes], *, unread: bool = False) -> bool:
    """Whether the server ends the connection over these frames, of itself."""
    flood(wire, frames, unread=unread, end=False)
    read_on(wire)
    return wire.ended


def read_on(wire: Http2Wire) -> None:
    with suppress(OSError):  # reads that time out too
        wire.closed()


def send(wire: Http2Wire, data: bytes) -> bool:
    try:
        return wire.send(data)
    except TimeoutError:  # the server reads no more: as good as closed
        return False


def streams(count: int) -> Iterator[int]:
    return iter(range(1, 2 * count, 2))


def test_rapid_reset(server: Server) -> None:
    """CVE-2023-44487. Ten thousand are within the budget of an honest client and cost little; more are cut off."""
    with Http2Wire(server.grpc) as wire:
        assert is_cut(wire, (opened(i) + http2.reset(i) for i in streams(30_000)))


def test_rapid_reset_beside_an_honest_client(server: Server) -> None:
    """Calls of another connection go on while 10,000 streams are opened and reset."""
    with Http2Wire(server.grpc) as wire, grpc.insecure_channel(server.grpc) as channel:
        infer = channel.unary_unary(http2.INFER)
        attack = threading.Thread(
            target=flood, args=(wire, (opened(i) + http2.reset(i) for i in streams(10_000))), daemon=True
        )
        attack.start()
        for _ in range(50):
            assert values(infer(message(3.0), timeout=30)) == [7.0] * 4
        attack.join(20)


def test_rapid_reset_of_work(server: Server) -> None:
    """Reset after the whole request was sent: what was begun is dropped."""
    whole = http2.grpc_message(message())
    with Http2Wire(server.grpc) as wire:
        flood(wire, (opened(i) + frame(DATA, END_STREAM, i, whole) + http2.reset(i) for i in streams(10_000)))


def test_rapid_reset_of_http_requests(server: Server) -> None:
    """Each is a task of the ASGI app, which goes on after the reset: so many run at once and no more."""
    head = http2.request("/v2/models/affine", method="GET", grpc=False)
    with Http2Wire(server.http) as wire:
        flood(wire, (frame(HEADERS, END_HEADERS | END_STREAM, i, head) + http2.reset(i) for i in streams(10_000)))


#: MadeYouReset (CVE-2025-8671): what makes a server reset its own stream.
MADE = {
    "no increment": lambda i: opened(i) + http2.window(i, 0),
    "window overflow": lambda i: opened(i) + http2.window(i, 2**31 - 1) + http2.window(i, 2**31 - 1),
    "data after the end": lambda i: opened(i, end=True) + frame(DATA, 0, i, b"x"),
    "headers after the end": lambda i: opened(i, end=True) + opened(i),
    "wrong priority size": lambda i: opened(i) + frame(http2.PRIORITY, 0, i, b"xx"),
    "wrong length": lambda i: opened(i, ("content-length", "1")) + frame(DATA, END_STREAM, i, b"abc"),
    "upper-case name": lambda i: frame(HEADERS, END_HEADERS, i, http2.request() + http2.block([("X-A", "b")])),
    "connection header": lambda i: opened(i, ("connection", "close")),
    "trailers without an end": lambda i: opened(i) + frame(HEADERS, END_HEADERS, i, http2.block([("a", "b")])),
}


@pytest.mark.parametrize("case", sorted(MADE))
def test_made_you_reset(server: Server, case: str) -> None:
    made: Callable[[int], bytes] = MADE[case]
    with Http2Wire(server.grpc) as wire:
        assert is_cut(wire, (made(i) for i in streams(30_000)))


def test_continuations_that_never_end(server: Server) -> None:
    piece = http2.block([("x", "y" * 1000)])
    with Http2Wire(server.grpc) as wire:
        wire.send(frame(HEADERS, 0, 1, http2.request()))
        assert is_cut(wire, (frame(http2.CONTINUATION, 0, 1, piece) for _ in range(2000)))


def test_empty_continuations(server: Server) -> None:
    with Http2Wire(server.grpc) as wire:
        wire.send(frame(HEADERS, 0, 1, http2.request()))
        assert is_cut(wire, (frame(http2.CONTINUATION, 0, 1) for _ in range(2000)))


def test_header_bomb(server: Server) -> None:
    """A few kB that name one table entry thousands of times."""
    kept = b"\x40\x01x\x7f\xbd\x1e" + b"a" * 4028  # literal with incremental indexing, 4028 bytes
    with Http2Wire(server.grpc) as wire:
        wire.send(frame(HEADERS, END_HEADERS, 1, http2.request() + kept[:3] + b"\x7f" + coded(4028) + kept[6:]))
        bomb = http2.request() + b"\xbe" * 12_000
        assert is_cut(wire, (frame(HEADERS, END_HEADERS, i, bomb) for i in range(3, 400, 2)))


def coded(size: int) -> bytes:
    """The rest of a string length after its first byte, 127."""
    size -= 127
    return bytes([size % 128 + 128, size // 128])


#: Over the limit of 64 KiB by what they count: bytes of values, or 32 for each field.
OVER = {
    "many values": [(f"x-{i}", "y" * 1000) for i in range(90)],
    "long values": [(f"x-{i}", "y" * 10_000) for i in range(20)],
    "many fields": [("a", "")] * 3000,
}


@pytest.mark.parametrize("case", sorted(OVER))
def test_headers_over_the_limit_are_refused(server: Server, case: str) -> None:
    """That call alone, whatever it is that counts."""
    with Http2Wire(server.grpc) as wire:
        wire.send(in_pieces(1, http2.request(http2.INFER, *OVER[case])))
        assert wire.answer(1).status == "8"
        assert wire.call(3, message()).status == "0"


def test_as_many_fields_as_fit_are_taken(server: Server) -> None:
    with Http2Wire(server.grpc) as wire:
        wire.send(in_pieces(1, http2.request(http2.INFER, *[("a", "")] * 1900)))
        wire.send(frame(DATA, END_STREAM, 1, http2.grpc_message(message())))
        assert wire.answer(1).status == "0"


def test_a_value_too_long_to_be_read_ends_its_connection(server: Server) -> None:
    """Over 64 KiB in one string libnghttp2 stops reading, and with it goes the table that all later heads need.

    It is the one thing in a head that reaches the neighbours on its connection (RFC 9113 section 4.3 wants it so). The
    limit is said in SETTINGS; a client that does not keep to it is told why, and connects anew by itself.
    """
    with Http2Wire(server.grpc) as wire:
        assert wire.own_settings[MAX_HEADER_LIST_SIZE] == 65_536
        wire.send(in_pieces(1, http2.request(http2.INFER, ("x-a", "y" * 66_000))))
        assert wire.closed() == (1, COMPRESSION_ERROR)
    with grpc.insecure_channel(server.grpc) as channel:
        infer = channel.unary_unary(http2.INFER)
        with pytest.raises(grpc.RpcError) as refused:
            infer(message(), metadata=[("x-a", "y" * 66_000)], timeout=30)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert values(infer(message(3.0), timeout=30, wait_for_ready=True)) == [7.0] * 4


def in_pieces(stream_id: int, head: bytes) -> bytes:
    parts = [head[i : i + 16_000] for i in range(0, len(head), 16_000)]
    kinds = [HEADERS] + [http2.CONTINUATION] * (len(parts) - 1)
    ends = [0] * (len(parts) - 1) + [END_HEADERS]
    return b"".join(frame(kind, end, stream_id, part) for kind, end, part in zip(kinds, ends, parts, strict=True))


IDLE = {
    "ping": frame(http2.PING, 0, 0, b"12345678"),
    "settings": http2.settings({http2.INITIAL_WINDOW_SIZE: 65_535}),
    "empty settings": http2.settings(),
    "window of the connection": http2.window(0, 1),
    "ping answers": frame(http2.PING, http2.ACK, 0, b"12345678"),
}


@pytest.mark.parametrize("case", sorted(IDLE))
@pytest.mark.parametrize("unread", [False, True], ids=["read", "unread"])
def test_frames_that_move_nothing(server: Server, case: str, unread: bool) -> None:
    with Http2Wire(server.grpc) as wire:
        assert is_cut(wire, (IDLE[case] for _ in range(20_000)), unread=unread)


def test_windows_of_a_stream(server: Server) -> None:
    with Http2Wire(server.grpc) as wire:
        wire.send(opened(1, path=http2.STREAM_INFER))
        assert is_cut(wire, (http2.window(1, 1) for _ in range(20_000)))


SILENT = {
    "priority": frame(http2.PRIORITY, 0, 1, struct.pack(">IB", 3, 16)),
    "unknown": frame(0x42, 0, 1, b"12345"),
    "empty data": frame(DATA, 0, 1),
    "data of a closed stream": frame(DATA, 0, 3, bytes(100)),
}


@pytest.mark.parametrize("case", sorted(SILENT))
def test_frames_that_say_nothing(server: Server, case: str) -> None:
    """They bring no event: bounded by bytes."""
    piece = SILENT[case] * 1000
    with Http2Wire(server.grpc) as wire:
        wire.send(opened(1, path=http2.STREAM_INFER) + opened(3) + http2.reset(3))
        assert is_cut(wire, (piece for _ in range(40 * 1024 * 1024 // len(piece))))


def test_empty_messages(server: Server) -> None:
    """Five bytes each: what is not read holds the stream's window all the same."""
    piece = http2.grpc_message(b"") * 3000
    with Http2Wire(server.grpc) as wire:
        wire.send(opened(1, path=http2.STREAM_INFER))
        flood(wire, (frame(DATA, 0, 1, piece) for _ in range(60)), unread=True)


def test_answers_that_nobody_takes(server: Server) -> None:
    """Zero windows: answers are held up to a bound, then new calls are refused."""
    whole = http2.grpc_message(message(model="identity", width=4000))
    with Http2Wire(server.grpc, {http2.INITIAL_WINDOW_SIZE: 0}) as wire:
        calls = (opened(i) + in_data(i, whole) for i in streams(900))
        flood(wire, calls)


def in_data(stream_id: int, body: bytes) -> bytes:
    parts = [body[i : i + 16_384] for i in range(0, len(body), 16_384)]
    return b"".join(frame(DATA, END_STREAM * (i == len(parts) - 1), stream_id, part) for i, part in enumerate(parts))


def test_compression_bombs(server: Server) -> None:
    """16 MiB of zeros in 16 kB, several at once, on one stream and on many."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = packer.compress(bytes(16 << 20)) + packer.flush()
    piece = http2.grpc_message(bomb, 1)
    gzip = ("grpc-encoding", "gzip")
    with Http2Wire(server.grpc) as wire:
        for i in range(1, 8, 2):
            wire.send(opened(i, gzip) + in_data(i, piece))
        assert {wire.answer(i).status for i in range(1, 8, 2)} <= {"3", "8"}
        wire.send(opened(101, gzip, path=http2.STREAM_INFER) + in_data(101, piece * 2))
        assert wire.answer(101).ended
