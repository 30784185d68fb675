"""What hostile or mistaken clients do on addresses with TLS: each is cut off in bounded time, and others are served.

Times are bounds, not measurements: the server's own limit on a handshake is a second here.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest

from server._pb import inference_pb2 as pb
from server.config.settings import TlsSettings
from server.transport.answers import HttpSettings
from server.transport.native.server import GrpcMethods, NativeServer, Served
from server.transport.reference.asgi import HttpServer
from server.transport.reference.grpcio import GrpcServer, GrpcSettings
from server.transport.tls import grpc_credentials, tls_context
from tests.support import http2, models, pki
from tests.support.echo import Running, running
from tests.support.metrics import samples
from tests.support.server import Server, serving
from tests.support.wire import post

HANDSHAKE_S = 1.0
#: The server's limit, its sweep, and a machine that is busy.
CLOSED_WITHIN_S = 20.0
SILENT = 300
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}).encode()
REQUEST = post("/v2/models/affine/infer", BODY)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pki.usual(tmp_path_factory.mktemp("pki"))
    pki.authority(folder, "other")
    pki.certificate(folder, "stranger", "other")
    pki.certificate(folder, "expired", expired=True)
    return folder


@dataclass(slots=True)
class Listener:
    """One address with TLS. ``grpc``: it speaks gRPC (HTTP/2); ``http``: HTTP/1.1."""

    address: tuple[str, int]
    root: Path
    http: bool
    grpc: bool
    kind: str

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self.address, timeout=CLOSED_WITHIN_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def secured(self, *alpn: str, certificate: str = "client", **options: Any) -> ssl.SSLSocket:
        return context(self.root, *alpn, certificate=certificate, **options).wrap_socket(
            self.connect(), server_hostname="localhost"
        )

    def assert_served(self) -> None:
        if self.http:
            self.assert_answered(exchange)
        if self.grpc:
            ca, key, own = ((self.root / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem"))
            with grpc.secure_channel("{}:{}".format(*self.address), grpc.ssl_channel_credentials(ca, key, own)) as to:
                answer = to.unary_unary(http2.INFER)(message(), timeout=30, wait_for_ready=True)
            raw = pb.ModelInferResponse.FromString(answer).raw_output_contents[0]
            assert np.frombuffer(raw, "<f4").tolist() == [3.0, 5.0]

    def assert_answered(self, ask: Callable[[ssl.SSLSocket], bytes]) -> None:
        """Over HTTP/1.1; who was too slow for these bounds, as the machine had it, comes again."""
        until, answer = time.monotonic() + CLOSED_WITHIN_S, b""
        while not answer.startswith(b"HTTP/1.1 200 "):
            assert time.monotonic() < until, answer
            with suppress(OSError), self.secured("http/1.1") as connection:
                answer = ask(connection)


def message() -> bytes:
    request = pb.ModelInferRequest(model_name="affine")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(np.array([1, 2], "<f4").tobytes())
    return request.SerializeToString()


def context(root: Path, *alpn: str, certificate: str = "client", newest: Any = None) -> ssl.SSLContext:
    trusting = ssl.create_default_context(cafile=str(root / "ca.pem"))
    if certificate:
        trusting.load_cert_chain(root / f"{certificate}.pem", root / f"{certificate}.key")
    if alpn:
        trusting.set_alpn_protocols(list(alpn))
    if newest is not None:
        trusting.maximum_version = newest
    return trusting


def exchange(connection: ssl.SSLSocket, data: bytes = REQUEST) -> bytes:
    connection.sendall(data)
    return connection.recv(65_536)


def hello(root: Path, *alpn: str) -> bytes:
    """The first flight of a handshake."""
    out = ssl.MemoryBIO()
    side = context(root, *alpn).wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        side.do_handshake()
    return out.read()


@contextmanager
def listening(base: Running, kind: str, root: Path, *, mutual: bool = False) -> Iterator[Listener]:
    """A listener of its own beside ``base``, with the same models behind it."""
    files = TlsSettings(
        certificate=root / "server.pem",
        private_key=root / "server.key",
        client_ca=root / "ca.pem" if mutual else None,
    )
    settings = HttpSettings(head_s=HANDSHAKE_S, keep_alive_s=HANDSHAKE_S, discard_s=HANDSHAKE_S, max_connections=1000)
    infer = cast("NativeServer", base.http_server).infer
    server: NativeServer | HttpServer | GrpcServer
    if kind == "native":
        served = Served(base.port, base.catalog, infer, GrpcMethods(base.services))
        server = base.call(lambda: NativeServer(served, settings=settings, tls=tls_context(files)))
    elif kind == "reference HTTP":
        server = base.call(lambda: HttpServer(infer, settings=settings, tls=tls_context(files)))
    else:
        bounds = GrpcSettings(handshake_s=HANDSHAKE_S)
        server = GrpcServer(base.port, base.services, settings=bounds, credentials=grpc_credentials(files))
    address = base.run(server.start("127.0.0.1", 0))
    try:
        yield Listener(address, root, kind != "reference gRPC", kind != "reference HTTP", kind)
    finally:
        base.run(server.drain(0.5))


@pytest.fixture(scope="module")
def base() -> Iterator[Running]:
    with running(transport="native") as started:
        yield started


KINDS = ["native", "reference HTTP", "reference gRPC"]


@pytest.fixture(scope="module", params=KINDS)
def listener(base: Running, root: Path, request: pytest.FixtureRequest) -> Iterator[Listener]:
    with listening(base, request.param, root) as started:
        yield started


@pytest.fixture(scope="module", params=KINDS[:2])
def http_listener(base: Running, root: Path, request: pytest.FixtureRequest) -> Iterator[Listener]:
    with listening(base, request.param, root) as started:
        yield started


@pytest.fixture(autouse=True)
def served(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a client did, the next one is served."""
    yield
    for name in {"listener", "http_listener"}.intersection(request.fixturenames):
        request.getfixturevalue(name).assert_served()


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


# --- handshakes that are not completed --------------------------------------------------------------------------

#: What comes before silence.
BEGUN: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "one byte": lambda first: first[:1],
    "half a hello": lambda first: first[: len(first) // 2],
    "a hello": lambda first: first,
}


@pytest.mark.parametrize("case", sorted(BEGUN))
def test_handshakes_left_hanging(listener: Listener, case: str) -> None:
    """Hundreds at once: each has a bounded time, and meanwhile others are served."""
    first = BEGUN[case](hello(listener.root, "h2"))
    with ExitStack() as stack:
        hanging = [stack.enter_context(listener.connect()) for _ in range(SILENT)]
        for connection in hanging:
            connection.sendall(first)
        listener.assert_served()
        until = time.monotonic() + CLOSED_WITHIN_S
        for connection in hanging:
            connection.settimeout(max(0.1, until - time.monotonic()))
            assert ended(connection)


def test_a_handshake_byte_by_byte(listener: Listener) -> None:
    """Each byte is progress, and none of them buys more time."""
    first = hello(listener.root, "h2")
    with listener.connect() as connection:
        over = threading.Event()

        def trickle() -> None:
            for i in range(len(first)):
                if over.wait(0.1):
                    return
                with suppress(OSError):
                    connection.sendall(first[i : i + 1])

        sender = threading.Thread(target=trickle, daemon=True)
        sender.start()
        assert ended(connection)
        over.set()
        sender.join(20)


@pytest.mark.parametrize("alpn", ["h2", "http/1.1"])
def test_silence_after_the_handshake(http_listener: Listener, alpn: str) -> None:
    """Not asked of the reference's gRPC: an idle channel is an honest one there, and is pinged."""
    with http_listener.secured(alpn) as connection:
        assert ended(connection)


PLACES = 20


@pytest.fixture(scope="module")
def process(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With few places and much patience: no handshake ends by itself while a test runs."""
    folder = tmp_path_factory.mktemp("served")
    models.affine(folder / "affine.onnx", width=2)
    path = folder / "tidegate.yaml"
    path.write_text(
        "apiVersion: tidegate/v1\nmodels: {affine: {source: affine.onnx}}\nstate: {dir: state}\nserver:\n"
        f"  limits: {{max_connections: {PLACES}}}\n"
        f"  tls: {{certificate: {root}/server.pem, private_key: {root}/server.key}}\n"
    )
    with serving(str(path), "--transport", "native") as server:
        yield server


def flooding(server: Server, stack: ExitStack, count: int) -> list[socket.socket]:
    """Connections whose handshake is never begun."""
    address = server.http.rpartition(":")
    return [
        stack.enter_context(socket.create_connection((address[0], int(address[2])), timeout=CLOSED_WITHIN_S))
        for _ in range(count)
    ]


def descriptors(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def served_again(root: Path, process: Server) -> None:
    """Those who left are noticed within moments, and a caller who is turned away comes again."""
    until, host = time.monotonic() + CLOSED_WITHIN_S, process.http.rpartition(":")
    trusting = context(root, certificate="")
    answer = b""
    while not answer.startswith(b"HTTP/1.1 200 "):
        assert time.monotonic() < until, answer
        with (
            suppress(OSError),
            socket.create_connection((host[0], int(host[2])), timeout=CLOSED_WITHIN_S) as plain,
            trusting.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            answer = exchange(connection)


def test_a_flood_of_connections_holds_few_descriptors(root: Path, process: Server) -> None:
    """Those over the limit are closed at once, but for 64 that would be told so."""
    before = descriptors(process)
    with ExitStack() as stack:
        flood = flooding(process, stack, 300)
        assert ended(flood[-1])
        assert descriptors(process) <= before + PLACES + 64
        assert samples(process, "tidegate_connections")['{listener="http"}'] == PLACES + 64
        refused = samples(process, "tidegate_connections_refused_total")
        assert refused == {'{listener="http"}': 300 - PLACES - 64, '{listener="grpc"}': 0}
    served_again(root, process)


def test_without_descriptors_connections_wait(root: Path, process: Server) -> None:
    """They keep their place in the kernel's queue, and are taken when there is room."""
    pid = process.process.pid
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.callback(resource.prlimit, pid, resource.RLIMIT_NOFILE, usual)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors(process) + 8, usual[1]))
        flooding(process, stack, 40)
        process.wait_for("accept_failed", error="Too many open files")
    served_again(root, process)


# --- protocols ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpn", [(), ("spdy/3",), ("http/1.1",), ("h2", "http/1.1"), ("h2",)])
def test_offers_of_protocols(http_listener: Listener, alpn: tuple[str, ...]) -> None:
    """What is offered and spoken decides; an offer of nothing we speak is as good as none.

    The reference's HTTP agrees on nothing, and speaks HTTP/1.1; its gRPC, another library, ends what does not offer h2.
    """
    spoken = [name for name in ("h2", "http/1.1") if name in alpn] if http_listener.kind == "native" else []
    with http_listener.secured(*alpn) as connection:
        assert connection.selected_alpn_protocol() == (spoken[0] if spoken else None)
        if "h2" in spoken:
            connection.sendall(http2.PREFACE + http2.settings())
            assert connection.recv(9)[3] == http2.SETTINGS
        else:
            assert exchange(connection).startswith(b"HTTP/1.1 200 ")


def test_another_protocol_than_agreed_on(base: Running, root: Path) -> None:
    with listening(base, "native", root) as listener:
        with listener.secured("h2") as connection:
            told = exchange(connection)
            assert not told.startswith(b"HTTP/1.1 200 ")
            assert ended(connection)
        with listener.secured("http/1.1") as connection:
            assert exchange(connection, http2.PREFACE + http2.settings()).startswith(b"HTTP/1.1 400 ")
            assert ended(connection)
        listener.assert_served()


#: The head of a record of 16 kB that carries a handshake.
RECORD = b"\x16\x03\x01\x40\x00"
CLEAR = {
    "HTTP/1.1": REQUEST,
    "HTTP/2": http2.PREFACE + http2.settings() + http2.opened(1, end=True),
    "noise": bytes(range(256)) * 10,
    "SSL 2 hello": b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + bytes(37),
    "a record of 64 kB": b"\x16\x03\x01\xff\xff" + bytes(70_000),
    "a hello of 16 MB": RECORD + b"\x01\xff\xff\xff" + bytes(16_380) + (RECORD + bytes(16_384)) * 20,
    "empty records": b"\x16\x03\x01\x00\x00" * 5000,
    "alerts": b"\x15\x03\x01\x00\x02\x01\x5a" * 5000,
    "application data first": b"\x17\x03\x03\x00\x20" + bytes(32),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(CLEAR))
def test_what_is_no_handshake(listener: Listener, case: str) -> None:
    with listener.connect() as connection:
        with suppress(ConnectionError):
            connection.sendall(CLEAR[case])
        assert ended(connection)


@pytest.mark.parametrize("address", ["http", "grpc"])
@pytest.mark.parametrize("transport", ["native", "reference"])
def test_a_handshake_where_there_is_no_tls(root: Path, transport: str, address: str) -> None:
    with running(transport=transport) as plain:
        with (
            socket.create_connection(getattr(plain, address), timeout=CLOSED_WITHIN_S) as connection,
            pytest.raises((ssl.SSLError, ConnectionError)),
        ):
            context(root, "h2").wrap_socket(connection, server_hostname="localhost")
        with grpc.insecure_channel("{}:{}".format(*plain.grpc)) as channel:
            assert channel.unary_unary(http2.INFER)(message(), timeout=30)


# --- certificates -------------------------------------------------------------------------------------------------


def told_nothing(listener: Listener, certificate: str, newest: ssl.TLSVersion) -> bool:
    """A call right behind the handshake: with TLS 1.3 the client learns only then that it is refused."""
    try:
        with listener.secured("h2", certificate=certificate, newest=newest) as connection:
            connection.sendall(http2.PREFACE + http2.settings() + http2.opened(1, end=True))
            return not connection.recv(1)
    except (ssl.SSLError, ConnectionError):
        return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("certificate", ["", "stranger", "expired"])
def test_clients_that_are_not_known(base: Running, root: Path, kind: str, certificate: str) -> None:
    """None, of another authority, of yesterday: nothing is answered, whatever the client sends with its handshake."""
    before = len(base.port.admitted)
    with listening(base, kind, root, mutual=True) as listener:
        for newest in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
            for _ in range(20):
                assert told_nothing(listener, certificate, newest)
        assert len(base.port.admitted) == before
        listener.assert_served()


# --- after the handshake --------------------------------------------------------------------------------------------

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def s_client(listener: Listener, *flags: str, commands: bytes) -> str:
    """What openssl's client says when it was told ``commands``: R asks for a new handshake, k for new keys."""
    files = ("-cert", f"{listener.root}/client.pem", "-key", f"{listener.root}/client.key")
    address = ("-connect", "{}:{}".format(*listener.address), "-alpn", "h2", *files)
    with subprocess.Popen(
        ("openssl", "s_client", *address, *flags),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as client:
        out, _ = client.communicate(commands, timeout=30)
    return out.decode("latin-1")


@needs_openssl
def test_renegotiation_is_refused(listener: Listener) -> None:
    """A new handshake costs the server many times what it costs the client: not on a connection that has one."""
    told = s_client(listener, "-tls1_2", commands=b"R\n")
    assert "error:" in told.partition("RENEGOTIATING")[2], told[-2000:]


def test_renegotiation_is_refused_by_older_libraries_too(root: Path) -> None:
    """OpenSSL 3 allows it only on demand, those before it unless told otherwise."""
    made = tls_context(TlsSettings(certificate=root / "server.pem", private_key=root / "server.key"))
    assert made.options & ssl.OP_NO_RENEGOTIATION


@needs_openssl
def test_keys_are_not_changed_without_end(listener: Listener) -> None:
    told = s_client(listener, "-tls1_3", commands=b"K\n" * 2000)
    assert "KEYUPDATE" in told


def test_records_of_one_byte(http_listener: Listener) -> None:
    """The dearest way to send a request: it is answered all the same."""

    def by_bytes(connection: ssl.SSLSocket) -> bytes:
        for i in range(len(REQUEST)):
            connection.sendall(REQUEST[i : i + 1])
        return connection.recv(65_536)

    http_listener.assert_answered(by_bytes)


def test_connections_dropped_at_any_byte(listener: Listener) -> None:
    first = hello(listener.root, "h2")
    for length in range(0, len(first) + 1, 7):
        with listener.connect() as connection:
            connection.sendall(first[:length])
            if length % 2:  # with a reset in place of an end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
