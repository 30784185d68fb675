"""One HTTP/1.1 connection: inference taken in front of the app, mixed with what goes to the app, byte by byte."""

from __future__ import annotations

import asyncio
import gc
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from server.transport.answers import HttpSettings
from server.transport.native.cycle import InferCycle
from server.transport.native.server import NativeServer
from server.transport.reference.asgi import HttpServer
from server.types import RequestHead, RequestLimits
from tests.support.echo import EchoPermit, EchoPort, Running, running
from tests.support.wire import PATIENCE_S, Wire, post

LIMITS = RequestLimits(max_body_bytes=1024 * 1024, max_chunks=200, max_header_bytes=8 * 1024)
QUICK = HttpSettings(head_s=0.6, body_idle_s=0.6, body_total_s=2.0, write_stall_s=1.0, discard_s=0.6, keep_alive_s=1.0)
KEEPING = HttpSettings(keep_alive_s=1.0)
#: The server looks at its clock so often: times begin up to that much before what they are counted from.
TICK_S = 0.5


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(transport="native", limits=LIMITS) as started:
        yield started


@pytest.fixture(scope="module")
def quick() -> Iterator[Running]:
    with running(transport="native", limits=LIMITS, http=QUICK) as started:
        yield started


@pytest.fixture(scope="module")
def keeping() -> Iterator[Running]:
    """Impatient with idle connections only."""
    with running(transport="native", limits=LIMITS, http=KEEPING) as started:
        yield started


def at(server: Running) -> str:
    return f"{server.http[0]}:{server.http[1]}"


def settled(server: Running) -> bool:
    port = server.port
    return port.wait(lambda: len(port.admitted) == len(port.released)) and len(set(port.released)) == len(port.released)


def infer(model: str = "affine", *values: float, id: str = "", headers: dict[str, str] | None = None) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, len(values) or 1], "data": list(values) or [1.0]}
    return post(f"/v2/models/{model}/infer", json.dumps({"id": id, "inputs": [tensor]}).encode(), headers)


GET = b"GET /v2/models/affine HTTP/1.1\r\nHost: t\r\n\r\n"
EXPECT = {"Expect": "100-continue"}


def kind(answer: object) -> str:
    body = getattr(answer, "body", None)
    if not isinstance(body, dict):
        return "none"
    return f"infer {body['outputs'][0]['data']}" if "model_name" in body else body.get("name", "error")


@contextmanager
def begun(quick: Running, first: bytes) -> Iterator[Wire]:
    """A connection whose first bytes were there before it could be taken for one that says nothing.

    Where the machine was late with them, another one is tried.
    """
    for _ in range(20):
        before = time.monotonic()
        with Wire(at(quick)) as wire:
            wire.send(first)
            # In time for the second look at the clock, which is the first that finds the time over.
            if time.monotonic() - before < 0.8 * TICK_S:
                yield wire
                return
    raise AssertionError("the machine stands still too often")


@contextmanager
def in_use(keeping: Running, requests: list[bytes], pause_s: float) -> Iterator[list[str]]:
    """The answers to requests on one connection with pauses between them; it is closed by the server in the end.

    A connection is tried anew where the machine had it idle for longer than that is allowed, and so was closed.
    """
    for _ in range(20):
        idle_since, answers = time.monotonic(), list[str]()
        with Wire(at(keeping)) as wire:
            for request in requests:
                began = time.monotonic()
                wire.send(request)
                answers.append(kind(wire.answer()))
                if answers[-1] == "none" and time.monotonic() - idle_since > KEEPING.keep_alive_s - TICK_S:
                    break
                idle_since = began
                time.sleep(pause_s)
            else:
                yield answers
                assert wire.closed()
                return
    raise AssertionError("the machine stands still too often")


def test_hot_and_cold_in_every_order(server: Running) -> None:
    """Pipelined whole, and one after the other: answers come in the order of the requests."""
    hot, late, bad = infer("affine", 1.0), infer("later", 2.0), infer("affine", 1.0).replace(b'"FP32"', b'"FP99"')
    wanted = {hot: "infer [3.0]", late: "infer [5.0]", bad: "error", GET: "affine"}
    for order in ([hot, GET] * 4, [GET, hot] * 4, [late, hot, GET, late], [hot, bad, late, bad, GET], [GET, GET, hot]):
        for pieces in ([b"".join(order)], order):
            with Wire(at(server)) as wire:
                got = []
                for piece in pieces:
                    wire.send(piece)
                    if len(pieces) > 1:
                        got.append(kind(wire.answer()))
                if len(pieces) == 1:
                    got = [kind(wire.answer()) for _ in order]
                assert got == [wanted[request] for request in order]
    assert settled(server)


def test_cut_at_every_byte(server: Running) -> None:
    whole = infer("affine", 1.0) + GET + infer("later", 2.0)
    with Wire(at(server)) as wire:
        for cut in range(1, len(whole), 7):
            wire.send(whole[:cut])
            wire.send(whole[cut:])
            assert [kind(wire.answer()) for _ in range(3)] == ["infer [3.0]", "affine", "infer [5.0]"]
    assert settled(server)


@pytest.mark.parametrize("said", ["abc", "-1", "999999"])
def test_a_head_that_says_its_json_part_wrongly_is_refused_each_time(server: Running, said: str) -> None:
    wrong = infer("affine", 1.0, headers={"Inference-Header-Content-Length": said})
    with Wire(at(server)) as wire:
        for _ in range(4):
            wire.send(wrong)
            answer = wire.answer()
            assert answer is not None
            assert answer.status == 400
        wire.send(infer("affine", 1.0))
        assert kind(wire.answer()) == "infer [3.0]"
    assert settled(server)


def test_a_head_is_read_anew_whenever_it_differs(server: Running) -> None:
    """A head like the last one of its connection is not read again; any other is."""
    seen = len(server.port.admitted)
    heads: list[dict[str, str]] = [{}, {}, {"X-User": "ann"}, {"X-User": "bob"}, {"X-User": "bob"}, {"Y-User": "bob"}]
    long = {"X-Long": "x" * 5000}
    with Wire(at(server)) as wire:
        for headers in [*heads, long, long, {}]:
            wire.send(infer("affine", 1.0, headers=headers))
            assert kind(wire.answer()) == "infer [3.0]"
        wire.send(infer("nobody", 1.0))
        assert kind(wire.answer()) == "error"
        wire.send(infer("affine", 1.0, headers={"x-tidegate-timeout-ms": "0"}))
        assert kind(wire.answer()) == "error"
        for _ in range(2):
            wire.send(infer("affine", 1.0, headers={"x-tidegate-timeout-ms": "60000"}))
            assert kind(wire.answer()) == "infer [3.0]"
    admitted = server.port.admitted[seen:]
    users = [(head.metadata.get("x-user"), head.metadata.get("y-user")) for head in admitted[: len(heads)]]
    assert users == [(None, None)] * 2 + [("ann", None)] + [("bob", None)] * 2 + [(None, "bob")]
    assert [len(head.metadata.get("x-long", "")) for head in admitted[len(heads) :][:3]] == [5000, 5000, 0]
    first, second = admitted[-2:]
    assert [head.deadline_ns - head.received_ns for head in (first, second)] == [60_000_000_000] * 2
    assert second.received_ns > first.received_ns
    assert settled(server)


def test_a_known_head_stops_the_timer_of_what_went_to_the_app(keeping: Running) -> None:
    """The app's answer armed one; a connection in use is not closed by it."""
    rounds = int(1.5 * KEEPING.keep_alive_s / 0.05)
    with in_use(keeping, [infer("affine", 1.0), GET] + [infer("affine", 1.0)] * rounds, pause_s=0.05) as answers:
        assert answers == ["infer [3.0]", "affine"] + ["infer [3.0]"] * rounds


def test_a_head_that_offered_an_upgrade_is_kept_as_what_it_says(server: Running) -> None:
    """Without the offer it is a known head; it is not taken for the one that was read before on the connection."""
    offered = {"Connection": "upgrade", "X-Which": "offer"}
    plain = "connection: upgrade\r\nx-which: offer\r\n"
    body = infer("nobody", 1.0).partition(b"\r\n\r\n")[2]
    head = f"POST /v2/models/nobody/infer HTTP/1.1\r\nhost: test\r\ncontent-length: {len(body)}\r\n{plain}\r\n"
    offering = infer("nobody", 1.0, headers={**offered, "Upgrade": "h2c"})
    with Wire(at(server)) as wire:
        for request, wanted in (
            (head.encode() + body, "error"),
            (infer("affine", 1.0), "infer [3.0]"),
            (offering, "error"),
            (offering, "error"),
        ):
            wire.send(request)
            assert kind(wire.answer()) == wanted


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_the_last_answer_says_so(server: Running, version: str) -> None:
    raw = infer() if version == "1.1" else infer().replace(b"HTTP/1.1", b"HTTP/1.0")
    with Wire(at(server)) as wire:
        wire.send(raw.replace(b"\r\nHost", b"\r\nConnection: close\r\nHost") if version == "1.1" else raw)
        answer = wire.answer()
        assert answer is not None
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert wire.closed()


def test_nothing_follows_the_last_answer(server: Running) -> None:
    """A request pipelined behind one that closes the connection is not answered."""
    closing = infer("later").replace(b"\r\nHost", b"\r\nConnection: close\r\nHost")
    with Wire(at(server)) as wire:
        wire.send(closing + GET)
        answer = wire.answer()
        assert answer is not None
        assert answer.headers["connection"] == "close"
        assert wire.answer() is None


def test_expect_chunks_and_upgrade(server: Running) -> None:
    head, _, raw = infer().partition(b"\r\n\r\n")
    with Wire(at(server)) as wire:
        wire.send(infer(headers=EXPECT)[: -len(raw)])
        first = wire.answer()
        assert first is not None
        assert first.status == 100
        wire.send(raw + infer())
        assert [kind(wire.answer()) for _ in range(2)] == ["infer [3.0]"] * 2
        lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
        chunks = b"".join(b"1\r\n%b\r\n" % raw[i : i + 1] for i in range(len(raw)))
        chunked = b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", b""]) + chunks + b"0\r\nX-End: y\r\n\r\n"
        sized = {"inference-header-content-length": str(len(raw))}
        small = b"\r\n".join([*lines, b"Transfer-Encoding: chunked", f"{'Inference-Header-Content-Length'}: ".encode()
                              + str(len(raw)).encode(), b"", b""]) + chunks + b"0\r\n\r\n"  # fmt: skip
        wire.send(chunked + small + infer(headers=sized))
        assert [kind(wire.answer()) for _ in range(3)] == ["infer [3.0]"] * 3
        wire.send(infer(headers={"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}) + infer())
        assert [kind(wire.answer()) for _ in range(2)] == ["infer [3.0]"] * 2
    assert settled(server)


def test_refused_before_its_body(server: Running) -> None:
    """The answer comes at once; the body is thrown away, and the connection goes on."""
    raw = infer("nobody", 1.0)
    with Wire(at(server)) as wire:
        wire.send(raw[:-10])
        answer = wire.answer()
        assert answer is not None
        assert answer.status == 404
        wire.send(raw[-10:] + infer())
        assert kind(wire.answer()) == "infer [3.0]"
    assert settled(server)


def test_a_client_that_leaves(server: Running) -> None:
    """What runs for it is dropped. (Behind a whole second request it is not seen: nothing more is read until then.)"""
    server.port.cancelled.clear()
    for behind in (b"", b"POST /v2"):
        with Wire(at(server)) as wire:
            wire.send(infer("held", id="left") + behind)
            assert server.port.wait(lambda: len(server.port.held) == 1)
        assert server.port.wait(lambda: server.port.cancelled == ["left"])
        server.port.cancelled.clear()
        server.port.held.clear()
        assert settled(server)


def test_a_broken_body_gives_its_permit_back_and_the_connection_ends(server: Running, quick: Running) -> None:
    """The bound on the discarded rest holds, however the client goes on."""
    head = infer().partition(b"\r\n\r\n")[0]
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    lines += [b"Inference-Header-Content-Length: 20", b"Transfer-Encoding: chunked", b"", b""]
    broken = b"\r\n".join(lines) + b"5\r\nabcde\r\nzz\r\n"
    with Wire(at(server)) as wire:
        wire.send(broken)
        answer = wire.answer()
        assert answer is not None
        assert answer.status == 400
        assert server.port.wait(
            lambda: len(server.port.admitted) == len(server.port.released), 0.8 * HttpSettings().discard_s
        )
    with begun(quick, broken) as wire:
        answer = wire.answer()
        assert answer is not None
        assert answer.status == 400
        until, pause, ended = time.monotonic() + 20, threading.Event(), False
        while time.monotonic() < until and not ended:
            pause.wait(0.2)
            try:
                wire.socket.sendall(b"x")
            except OSError:
                ended = True
        assert ended


def test_a_body_that_is_refused_while_it_comes_is_not_kept() -> None:
    gc.collect()  # the cycles of earlier tests: some Pythons get round to them later than others
    with running(transport="native", limits=LIMITS) as server, Wire(at(server)) as wire:
        server.port.room = 50_000
        head = b"Host: t\r\nInference-Header-Content-Length: 20\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
        wire.send(b"POST /v2/models/affine/infer HTTP/1.1\r\n" + head + chunk * 6 + b"0\r\n\r\n")
        answer = wire.answer()
        assert answer is not None
        assert answer.status == 503
        cycles = [one for one in gc.get_objects() if isinstance(one, InferCycle)]
        assert cycles
        assert not [
            part for one in cycles for parts in gc.get_referents(one) if isinstance(parts, list) for part in parts
        ]
        wire.send(infer("affine", 1.0))
        assert kind(wire.answer()) == "infer [3.0]"
        assert settled(server)


class Raising(EchoPort):
    def admit(self, head: RequestHead) -> EchoPermit:
        raise RuntimeError("secret")


def test_an_unexpected_error_at_admission_is_ours() -> None:
    with running(transport="native", port=Raising) as server, Wire(at(server)) as wire:
        wire.send(infer() + infer())
        for _ in range(2):
            answer = wire.answer()
            assert answer is not None
            assert answer.status == 500
            assert "secret" not in str(answer.body)


# --- bounds and timers -------------------------------------------------------------------------------------------


def test_a_reader_that_takes_nothing_is_not_served_on(server: Running) -> None:
    """Pipelined requests whose answers are large: they wait in the client, not as answers in the server."""
    request = infer("echo", *[0.123456789] * 4000)
    before = len(server.port.admitted)
    with Wire(at(server), receive_buffer=4096) as wire:
        wire.socket.settimeout(1.0)
        with suppress(TimeoutError):
            for _ in range(2000):
                wire.socket.sendall(request)
        assert len(server.port.admitted) - before < 400
        wire.socket.settimeout(PATIENCE_S)
        assert kind(wire.answer()).startswith("infer")
    assert settled(server)


@pytest.mark.parametrize("sent", [b"", b"POST /v2", b"\r\n", infer()[:-3], infer() + b"\r\n"])
def test_connections_that_stop(quick: Running, sent: bytes) -> None:
    with Wire(at(quick)) as wire:
        wire.send(sent)
        assert wire.closed()
    assert settled(quick)


@pytest.mark.parametrize("start", [b"", infer()[:-200], infer()[:60], infer()], ids=["none", "body", "head", "idle"])
def test_connections_that_trickle(quick: Running, start: bytes) -> None:
    """A byte now and then keeps nothing open: neither heads, nor bodies, nor the time between requests."""
    piece = b"a" if start == infer()[:60] else b"\r\n" if start in (b"", infer()) else b" "
    with Wire(at(quick)) as wire:
        wire.send(start)
        until, pause, ended = time.monotonic() + 20, threading.Event(), False
        wire.socket.settimeout(0.01)
        while time.monotonic() < until and not ended:
            pause.wait(0.2)
            with suppress(TimeoutError):
                try:
                    wire.socket.sendall(piece)
                    ended = wire.socket.recv(4096) == b"" or ended
                except ConnectionError:
                    ended = True
        assert ended
    assert settled(quick)


def test_idle_connections_are_kept_for_a_while(keeping: Running) -> None:
    with in_use(keeping, [infer(), GET] * 4, pause_s=0.4) as answers:
        assert answers == ["infer [3.0]", "affine"] * 4


def test_a_request_of_a_known_head_may_take_longer_than_idleness() -> None:
    """Whatever a connection did before, the wait for its next request begins with the answer to this one."""
    request, keep_alive_s = infer("held", 1.0, id="slow"), 3.0
    with (
        running(transport="native", limits=LIMITS, http=HttpSettings(keep_alive_s=keep_alive_s)) as server,
        ExitStack() as stack,
    ):
        port, wires = server.port, list[Wire]()

        def held(count: int) -> bool:
            return port.wait(lambda: len(port.held) == count)

        for before in ([], [GET], [infer("affine", 1.0)] * 3):
            wire, waiting = stack.enter_context(Wire(at(server))), len(wires)
            for _ in range(3):
                wire.send(request)
                assert held(waiting + 1)
                server.call(lambda: port.held.pop().answer())
                assert kind(wire.answer()) == "infer [3.0]"
            for other in before:
                wire.send(other)
                assert kind(wire.answer()) != "none"
            wire.send(request)
            assert held(waiting + 1)
            wires.append(wire)
        threading.Event().wait(1.5 * keep_alive_s)
        began = time.monotonic()
        server.call(port.answer_held)
        assert [kind(wire.answer()) for wire in wires] == ["infer [3.0]"] * 3
        assert select.select([wire.socket for wire in wires], [], [], PATIENCE_S)[0]
        assert time.monotonic() - began > keep_alive_s / 2, "one was closed too soon"
        assert all(wire.closed() for wire in wires)
        assert settled(server)


def test_heads_of_which_one_begins_like_another(server: Running) -> None:
    """To begin with the newest head is to have it; to have one that begins alike is not."""
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}).encode()
    heads = [
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}{more}\r\n\r\n".encode()
        for model in ("affine", "echo")
        for more in ("", "\r\nX-A: 1", "\r\nX-A: 1\r\nX-B: 2", "\r\nX-A: 12")
    ]
    wanted = ["infer [3.0]"] * 4 + ["infer [1.0]"] * 4
    with Wire(at(server)) as wire:
        for _ in range(3):
            for head, answer in zip(heads, wanted, strict=True):
                for _ in range(3):
                    wire.send(head + body)
                    assert kind(wire.answer()) == answer
        for head, answer in zip(heads * 2, wanted * 2, strict=True):
            wire.send(head + body)
            assert kind(wire.answer()) == answer
        wire.send(heads[0] + body[:-4])
        wire.send(body[-4:])
        assert kind(wire.answer()) == wanted[0]
        wire.send(heads[0] + body + GET)
        assert [kind(wire.answer()) for _ in range(2)] == [wanted[0], "affine"]
    assert settled(server)


def test_a_head_that_stalls_behind_a_running_request_is_told_so(quick: Running) -> None:
    """The answer of the first does not start the wait between requests: one has begun."""
    with begun(quick, infer("later") + b"POST /v2 HTTP/1.1\r\nHo") as wire:
        assert kind(wire.answer()) == "infer [3.0]"
        answer = wire.answer()
        assert answer is not None
        assert answer.status == 408


async def looked_at(server: HttpServer) -> None:
    """Wait until the server has looked at its clock."""
    assert isinstance(server, NativeServer)
    before = server.now
    while server.now == before:  # noqa: ASYNC110 - a look at the clock rings no bell
        await asyncio.sleep(0.02)


def test_no_peer_is_late_for_what_the_server_itself_stood_still() -> None:
    """As on a machine that slept, or in a process that was stopped: what came meanwhile begins when it is seen."""
    settings = HttpSettings(head_s=5.0, keep_alive_s=5.0)
    with running(transport="native", http=settings) as server, Wire(at(server)) as known, ExitStack() as stack:
        known.send(infer("affine", 1.0))
        assert kind(known.answer()) == "infer [3.0]"
        wires: list[Wire] = []

        def stand_still() -> None:
            wires.append(stack.enter_context(Wire(at(server))))
            known.send(infer("affine", 2.0))
            time.sleep(5.6)

        server.loop.call_soon_threadsafe(stand_still)
        assert kind(known.answer()) == "infer [5.0]"
        server.run(looked_at(server.http_server))
        for wire in (known, *wires):
            wire.send(infer("affine", 3.0))
            assert kind(wire.answer()) == "infer [7.0]"


def binary_infer(size: int) -> bytes:
    """A tensor of ``size`` ones as bytes, to be answered as JSON."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, size], "parameters": {"binary_data_size": 4 * size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    body = head + struct.pack("<f", 1.0) * size
    return post("/v2/models/affine/infer", body, {"Inference-Header-Content-Length": str(len(head))})


CUT = infer("affine", 1.0)[:-3]
HELD = infer("held", 1.0, id="half-closed")
#: Run at once, and then written for a while: its answer is JSON that is made off the loop.
LARGE = binary_infer(100_000)


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [([GET], 1), ([GET] * 4, 4), ([infer(), GET], 2), ([infer("later"), GET, GET], 3), ([LARGE], 1), ([LARGE, GET], 2),
     ([CUT], 0), ([GET, CUT], 1), ([GET, GET, GET[:-2]], 2), ([GET, HELD, GET], 1)],
)  # fmt: skip
def test_a_client_that_sends_no_more_gets_what_is_owed(server: Running, sent: list[bytes], wanted: int) -> None:
    """All before the first request that never came whole, or is inference that waits: that one's caller has left."""
    with Wire(at(server)) as wire:
        wire.send(b"".join(sent))
        wire.socket.shutdown(socket.SHUT_WR)
        for _ in range(wanted):
            answer = wire.answer()
            assert answer is not None
            assert answer.status == 200
        assert wire.answer() is None
    assert settled(server)


def test_a_client_that_sends_no_more_has_nothing_queued(server: Running) -> None:
    """It cannot be told from one that has left: what waits for it is cancelled at once, not when it is written to."""
    cancelled = len(server.port.cancelled)
    with Wire(at(server)) as wire:
        wire.send(HELD)
        assert server.port.wait(lambda: bool(server.port.held))
        wire.socket.shutdown(socket.SHUT_WR)
        assert server.port.wait(lambda: server.port.cancelled[cancelled:] == ["half-closed"])
        assert wire.answer() is None
    server.port.held.clear()
    assert settled(server)


def test_a_client_that_sends_no_more_and_reads_late_gets_it_whole(server: Running) -> None:
    """The answer is larger than what the sockets between them hold."""
    values, before = [1.0] * 100_000, len(server.port.released)
    with Wire(at(server), receive_buffer=4096) as wire:
        wire.send(binary_infer(len(values)))
        assert server.port.wait(lambda: len(server.port.released) > before)
        wire.socket.shutdown(socket.SHUT_WR)
        assert kind(wire.answer()) == f"infer {[3.0] * len(values)}"
        assert wire.answer() is None
