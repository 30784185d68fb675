"""Signed webhooks over real sockets: what is sent, and what every kind of answer becomes."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from server.delivery.base import Delivered, Failed, Refused
from server.delivery.options import WebhookOptions
from server.delivery.signature import SigningSecret
from server.delivery.targets import AllowList
from server.delivery.webhook import WebhookSink
from server.errors import ConfigError
from tests.contracts.sink_contract import Case, SinkContract, message
from tests.support.receiver import KEY, SECRET, Answer, receiving, scripted

LOOPBACK = AllowList.parse(["127.0.0.0/8"])
NOBODY = "http://127.0.0.1:1"
NOW = 1_800_000_000.0


def sink(
    url: str, *, timeout_s: float = 5.0, allow: AllowList = LOOPBACK, secrets: int = 1, ca: str = ""
) -> WebhookSink:
    keys = (SigningSecret.parse(SECRET), SigningSecret(bytes(range(30))))[:secrets]
    return WebhookSink("ops", WebhookOptions(url, keys, allow, timeout_s, ca), clock=lambda: NOW)


def silent(peer: socket.socket) -> None:
    while peer.recv(65_536):
        pass


def some(peer: socket.socket, limit: int) -> bytes:
    got = peer.recv(limit)
    if not got:
        raise ConnectionError("the sender went away")
    return got


def saying(answer: bytes) -> Callable[[socket.socket], None]:
    """Reads a whole request, says ``answer``, and hangs up."""

    def talk(peer: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += some(peer, 1)
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
        while length:  # what is left unread when the socket closes would take the answer with it
            length -= len(some(peer, length))
        peer.sendall(answer)

    return talk


class TestWebhookSink(SinkContract):
    @contextmanager
    def case(self) -> Iterator[Case]:
        with receiving() as receiver, scripted(silent) as deaf, scripted(saying(b"GARBAGE\r\n\r\n")) as rude:
            broken = (sink(deaf, timeout_s=0.2), sink(rude), sink(f"{NOBODY}/"), sink("http://no-such-host.invalid/"))
            yield Case(sink(receiver.url), lambda: [got.id for got in receiver.got], broken)


def test_what_is_sent() -> None:
    sent = message("drift:m:7", psi=0.25)
    with receiving() as receiver:
        assert sink(receiver.url, secrets=2).send(sent) == Delivered()
        (got,) = receiver.got
    assert got.path == "/hooks/a?b=c"
    assert got.body == sent.body
    assert got.headers["host"] in receiver.url
    assert got.headers["content-type"] == "application/cloudevents+json; charset=utf-8"
    assert got.headers["webhook-id"] == sent.id
    assert got.headers["webhook-timestamp"] == str(int(NOW))
    assert got.headers["idempotency-key"] == "drift:m:7"
    assert got.signed_by(KEY)
    assert got.signed_by(bytes(range(30)))
    assert not got.signed_by(b"another key, which is none")
    assert got.event["idempotencykey"] == "drift:m:7"
    assert got.event["data"] == {"psi": 0.25}


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_any_success_is_delivered(status: int) -> None:
    with receiving() as receiver:
        receiver.answer = lambda _: Answer(status)
        assert sink(receiver.url).send(message()) == Delivered()


def test_gone_is_the_end() -> None:
    with receiving() as receiver:
        receiver.answer = lambda _: Answer(410, {"Retry-After": "5"})
        assert isinstance(sink(receiver.url).send(message()), Refused)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 500, 502])
def test_other_answers_are_tried_again(status: int) -> None:
    with receiving() as receiver:
        receiver.answer = lambda _: Answer(status)
        assert sink(receiver.url).send(message()) == Failed(f"answered {status}")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        ("9" * 200, 999_999_999.0),
        (formatdate(NOW + 90, usegmt=True), 90.0),
        (formatdate(NOW - 90, usegmt=True), 0.0),
        ("soon", None),
        ("-3", None),
        ("1.5", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_wait_a_receiver_asks_for(status: int, text: str, seconds: float | None) -> None:
    with receiving() as receiver:
        receiver.answer = lambda _: Answer(status, {"Retry-After": text})
        assert sink(receiver.url).send(message()) == Failed(f"answered {status}", seconds)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    with receiving() as receiver, receiving() as elsewhere:
        receiver.answer = lambda _: Answer(status, {"Location": elsewhere.url})
        outcome = sink(receiver.url).send(message())
        assert outcome == Failed(f"answered {status}: redirects are not followed")
        assert elsewhere.got == []


def test_a_huge_answer_is_not_read() -> None:
    sent = threading.Event()

    def talk(peer: socket.socket) -> None:
        saying(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n\r\n")(peer)
        try:
            while True:
                peer.sendall(bytes(1 << 20))
        finally:
            sent.set()

    with scripted(talk) as url:
        assert sink(url).send(message()) == Delivered()
        assert sent.wait(10)


def test_endless_headers_end_the_exchange() -> None:
    def talk(peer: socket.socket) -> None:
        saying(b"HTTP/1.1 200 OK\r\n")(peer)
        while True:
            peer.sendall(b"x-more: " + bytes(1000) + b"\r\n")

    with scripted(talk) as url:
        assert isinstance(sink(url).send(message()), Failed)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n"])
def test_a_trickle_does_not_outlast_the_timeout(head: bytes) -> None:
    gone = threading.Event()

    def talk(peer: socket.socket) -> None:
        saying(head)(peer)
        try:
            while not gone.wait(0.02):
                peer.sendall(b"a")
        finally:
            gone.set()

    with scripted(talk) as url:
        began = time.monotonic()
        assert sink(url, timeout_s=0.3).send(message()) == Failed("no answer within 0.3 s")
        assert time.monotonic() - began < 15
        gone.set()


def test_a_success_whose_body_never_comes_is_one() -> None:
    def talk(peer: socket.socket) -> None:
        saying(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nab")(peer)
        silent(peer)

    with scripted(talk) as url:
        assert sink(url).send(message()) == Delivered()


@pytest.mark.parametrize(
    "head",
    [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n"],
)
def test_an_answer_that_is_cut_off_in_its_head_is_none(head: bytes) -> None:
    with scripted(saying(head)) as url:
        outcome = sink(url).send(message())
    assert isinstance(outcome, Failed)
    assert outcome.reason == "no connection: the receiver closed it before the end of the answer's head"


def test_an_endless_answer_in_chunks_is_not_read() -> None:
    def talk(peer: socket.socket) -> None:
        saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")(peer)
        while True:
            peer.sendall(b"fff\r\n" + bytes(0xFFF) + b"\r\n")

    with scripted(talk) as url:
        began = time.monotonic()
        assert sink(url, timeout_s=30.0).send(message()) == Delivered()
        assert time.monotonic() - began < 20


def test_interim_answers_without_end_are_no_answer() -> None:
    def talk(peer: socket.socket) -> None:
        saying(b"")(peer)
        while True:
            peer.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)

    with scripted(talk) as url:
        # Newer Pythons count interim answers, and give up before the time is over.
        assert sink(url, timeout_s=0.3).send(message()) in (
            Failed("no answer within 0.3 s"),
            Failed("the answer is no HTTP: HTTPException"),
        )


def test_a_receiver_changes_its_secret_without_losing_an_event() -> None:
    old, new = SigningSecret(KEY), SigningSecret(bytes(range(30)))
    with receiving() as receiver:

        def outcome(known: bytes, *secrets: SigningSecret) -> object:
            receiver.answer = lambda got: Answer(204 if got.signed_by(known) else 401)
            return WebhookSink("ops", WebhookOptions(receiver.url, secrets, LOOPBACK)).send(message())

        steps = [(old.key, old), (old.key, old, new), (new.key, old, new), (new.key, new)]
        assert [outcome(*step) for step in steps] == [Delivered()] * 4
        assert outcome(new.key, old) == Failed("answered 401")


def test_a_connection_that_is_closed_instead_of_an_answer() -> None:
    with receiving() as receiver:
        receiver.answer = lambda _: Answer(hang_up=True)
        assert isinstance(sink(receiver.url).send(message()), Failed)


def test_an_address_that_is_not_allowed_is_never_called() -> None:
    with receiving() as receiver:
        url = receiver.url.replace("127.0.0.1", "localhost")
        outcome = sink(url, allow=AllowList()).send(message())
        assert isinstance(outcome, Failed)
        assert "is not a public address" in outcome.reason
        assert receiver.got == []
        assert sink(url, allow=AllowList.parse(["127.0.0.1"])).send(message()) == Delivered()


def test_a_reason_does_not_show_the_path() -> None:
    outcome = sink(f"{NOBODY}/token-in-the-path?k=token-in-the-query").send(message())
    assert isinstance(outcome, Failed)
    assert "token" not in outcome.reason


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of localhost's own, with its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=30)
    return folder


def test_https_is_checked_against_the_name_and_the_authorities(certificate: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")

    def talk(peer: socket.socket) -> None:
        with context.wrap_socket(peer, server_side=True) as secured:
            saying(b"HTTP/1.1 204 No Content\r\n\r\n")(secured)

    ca = str(certificate / "cert.pem")
    with scripted(talk) as plain:
        by_address = plain.replace("http:", "https:")
        by_name = by_address.replace("127.0.0.1", "localhost")
        assert sink(by_name, ca=ca).send(message()) == Delivered()
        for wrong, why in ((sink(by_name), "signed certificate"), (sink(by_address, ca=ca), "mismatch")):
            outcome = wrong.send(message())
            assert isinstance(outcome, Failed)
            assert outcome.reason.startswith("the certificate is not trusted: ")
            assert why in outcome.reason


def test_https_where_none_is_spoken() -> None:
    with receiving() as receiver, scripted(silent) as deaf:
        outcome = sink(receiver.url.replace("http:", "https:")).send(message())
        assert isinstance(outcome, Failed)
        assert outcome.reason.startswith("TLS failed: ")
        outcome = sink(deaf.replace("http:", "https:"), timeout_s=0.3).send(message())
        assert outcome == Failed("no answer within 0.3 s")


def test_authorities_that_cannot_be_read_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trusted authorities"):
        sink("https://hooks.example.com/", allow=AllowList(), ca=str(tmp_path / "none.pem"))
