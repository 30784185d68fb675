"""Connections that have not said yet what they speak: over TLS they count, and end, from accept on."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import uvloop

from server.config.settings import TlsSettings
from server.transport.answers import HttpSettings
from server.transport.native.accepting import SecureListener
from server.transport.native.server import GrpcMethods, NativeServer, Served
from server.transport.tls import tls_context
from tests.support import http2, pki
from tests.support.echo import Running, running
from tests.support.wire import post

#: Nothing ends by itself while a test runs.
PATIENT = HttpSettings(head_s=60, keep_alive_s=60, discard_s=60, drain_idle_s=0.05, max_connections=4)
#: What the server takes: those that are told that it is full come on top.
PLACES = PATIENT.max_connections + 64
REQUEST = post(
    "/v2/models/affine/infer", b'{"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}]}'
)
ENHANCE_YOUR_CALM = 11


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pki.usual(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def base() -> Iterator[Running]:
    with running(transport="native") as started:
        yield started


@dataclass(slots=True)
class Listener:
    """A server with TLS on the loop of ``base``."""

    base: Running
    server: NativeServer
    address: tuple[str, int]
    root: Path

    def connect(self) -> socket.socket:
        """No handshake yet."""
        return socket.create_connection(self.address, timeout=20)

    def secured(self, *alpn: str) -> ssl.SSLSocket:
        trusting = ssl.create_default_context(cafile=str(self.root / "ca.pem"))
        trusting.set_alpn_protocols(list(alpn))
        return trusting.wrap_socket(self.connect(), server_hostname="localhost")

    def counted(self) -> tuple[int, int]:
        """Connections, and those that were refused."""
        return self.base.call(lambda: (self.server.connections, self.server.refused))

    def until(self, connections: int) -> None:
        """Each look is a turn of the server's loop."""
        end = time.monotonic() + 20
        while self.counted()[0] != connections:
            assert time.monotonic() < end, self.counted()

    def assert_served(self) -> None:
        with self.secured("http/1.1") as connection:
            connection.sendall(REQUEST)
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")


@contextmanager
def listening(base: Running, root: Path) -> Iterator[Listener]:
    files = TlsSettings(certificate=root / "server.pem", private_key=root / "server.key")
    infer = cast("NativeServer", base.http_server).infer
    served = Served(base.port, base.catalog, infer, GrpcMethods(base.services))
    server = base.call(lambda: NativeServer(served, settings=PATIENT, tls=tls_context(files)))
    address = base.run(server.start("127.0.0.1", 0))
    try:
        yield Listener(base, server, address, root)
    finally:
        base.run(server.drain(0.5))


@pytest.fixture
def listener(base: Running, root: Path) -> Iterator[Listener]:
    with listening(base, root) as started:
        yield started


def ended(connection: socket.socket) -> bool:
    """The server closes: waits for it."""
    try:
        while connection.recv(65_536):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def codes_of_goaways(frames: bytes) -> list[int]:
    codes = []
    while frames:
        size = int.from_bytes(frames[:3])
        if frames[3] == http2.GOAWAY:
            codes.append(int.from_bytes(frames[13:17]))
        frames = frames[9 + size :]
    return codes


def test_handshakes_that_are_never_begun_hold_no_more_than_the_places(listener: Listener) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(listener.connect()) for _ in range(PLACES)]
        for _ in range(20):
            with listener.connect() as surplus:
                assert ended(surplus)
        assert listener.counted() == (PLACES, 20)
        held.pop().close()
        listener.until(PLACES - 1)
        held.append(stack.enter_context(listener.connect()))
        listener.until(PLACES)
    listener.until(0)
    listener.assert_served()
    assert listener.counted()[1] == 20


def test_what_is_over_the_limit_is_told_so(listener: Listener) -> None:
    with ExitStack() as stack:
        for _ in range(PATIENT.max_connections):
            stack.enter_context(listener.connect())
        with listener.secured("http/1.1") as connection:
            connection.sendall(REQUEST)
            answer = connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"over 4 connections are open" in answer
        listener.until(PATIENT.max_connections)
        with listener.secured("h2") as connection:
            connection.sendall(http2.PREFACE + http2.settings())
            told = b""
            while data := connection.recv(65_536):
                told += data
            assert codes_of_goaways(told) == [ENHANCE_YOUR_CALM]
        assert listener.counted()[1] == 2


@pytest.mark.parametrize(
    "last_word", [b"", b"\x16", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"]
)
def test_a_handshake_that_fails_gives_its_place_back(listener: Listener, last_word: bytes) -> None:
    with listener.connect() as connection:
        listener.until(1)
        connection.sendall(last_word)
        connection.shutdown(socket.SHUT_WR)
        assert ended(connection)
    listener.until(0)
    assert listener.counted() == (0, 0)


def test_a_connection_counts_once_before_and_after_its_handshake(listener: Listener) -> None:
    with listener.secured("http/1.1"), listener.secured("h2"), listener.connect():
        listener.until(3)
    listener.until(0)


def test_the_end_of_the_server_is_the_end_of_handshakes(base: Running, root: Path) -> None:
    with listening(base, root) as listener, listener.connect() as silent, listener.connect() as begun:
        begun.sendall(b"\x16\x03\x01")
        listener.until(2)
        assert base.run(listener.server.drain(20))
        assert ended(silent)
        assert ended(begun)
        assert listener.counted()[0] == 0
        with pytest.raises(ConnectionRefusedError):
            listener.connect()


def test_cut_when_there_is_no_time_to_drain(base: Running, root: Path) -> None:
    with listening(base, root) as listener, listener.connect() as silent:
        listener.until(1)
        base.run(listener.server.drain(0))
        assert ended(silent)
        listener.until(0)


def test_every_address_of_a_name_is_listened_on(base: Running, root: Path) -> None:
    with listening(base, root) as listener:
        opened = base.call(lambda: SecureListener(listener.server, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
        host, port = base.run(opened.start("", 0))
        assert host in {"0.0.0.0", "::"}
        assert port > 0
        base.call(opened.close)


def test_an_address_that_is_taken(base: Running, root: Path, listener: Listener) -> None:
    second = base.call(lambda: SecureListener(listener.server, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    with pytest.raises(OSError, match="in use") as caught:
        base.run(second.start(*listener.address))
    assert caught.value.errno == errno.EADDRINUSE
    listener.assert_served()


class Failing(socket.socket):
    """A listening socket whose ``accept`` fails."""

    number = 0

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        raise OSError(self.number, "accept")


@pytest.mark.parametrize(
    ("number", "paused"),
    [
        (errno.EPROTO, False),
        (errno.ENETDOWN, False),
        (errno.EHOSTUNREACH, False),
        (errno.EMFILE, True),
        (errno.ENFILE, True),
        (errno.ENOBUFS, True),
        (errno.ENOMEM, True),
    ],
)
def test_one_connection_that_fails_makes_no_other_wait(listener: Listener, number: int, paused: bool) -> None:
    """Where the system has no room for more, connections wait for a while; where one of them was lost, none does."""
    base = listener.base
    opened = base.call(lambda: SecureListener(listener.server, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    with Failing() as failing:
        failing.number = number
        failing.bind(("127.0.0.1", 0))
        failing.listen()
        base.call(lambda: opened._listen(failing))
        base.call(lambda: opened._accept(failing))
        listened_on = base.call(lambda: base.loop.remove_reader(failing))
    assert listened_on is not paused


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_small_answers_are_not_held_back(root: Path, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with (
        running(transport="native", loop=loop) as base,
        listening(base, root) as listener,
        listener.secured("http/1.1") as connection,
    ):
        connection.sendall(REQUEST)
        assert connection.recv(65_536)
        (live,) = base.call(lambda: tuple(listener.server.live))
        held = live.transport.get_extra_info("socket")
        assert held.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
