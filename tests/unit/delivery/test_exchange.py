"""What an endpoint may be, and what an exchange that fails says; sinks test the rest over real sockets."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from server.delivery.exchange import MAX_ANSWER_BYTES, Endpoint, Exchange, ExchangeFailed, seconds
from server.delivery.targets import AllowList
from server.errors import ConfigError
from tests.support.receiver import Answer, receiving

LOOPBACK = AllowList.parse(["127.0.0.0/8"])


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/",
        "http://",
        "http://host:0/",
        "http://host:99999/",
        "http://user:pw@host/",
        "http://host/#part",
        "http://host/\u0436",
        "http://10.0.0.1/",
    ],
)
def test_addresses_that_could_never_be_called(url: str) -> None:
    with pytest.raises(ConfigError, match="the server's") as caught:
        Endpoint(url, what="server")
    assert "pw" not in str(caught.value)


def test_a_host_that_is_not_allowed() -> None:
    with pytest.raises(ConfigError, match="not among the allowed"):
        Endpoint("https://a.example.com/", AllowList.parse(["b.example.com"]))


def test_an_answer_is_read_up_to_a_bound() -> None:
    with receiving() as receiver:
        receiver.answer = lambda _: Answer(201, {"Retry-After": "7"}, b"x" * (MAX_ANSWER_BYTES + 5))
        exchange = Exchange(Endpoint(receiver.url, LOOPBACK))
        answer = exchange.post("/elsewhere", b"{}", {"X-One": "1"}, time.monotonic() + 5)
        (got,) = receiver.got
    assert (answer.status, answer.retry_after, len(answer.body)) == (201, "7", MAX_ANSWER_BYTES)
    assert (got.path, got.body, got.headers["x-one"]) == ("/elsewhere", b"{}", "1")
    assert exchange.target == "/hooks/a?b=c"


def test_a_deadline_that_has_passed() -> None:
    with receiving() as receiver:
        exchange = Exchange(Endpoint(receiver.url, LOOPBACK))
        with pytest.raises(ExchangeFailed, match="no answer within"):
            exchange.post("/", b"", {}, time.monotonic() - 1)
        assert receiver.got == []


def test_an_address_that_does_not_answer_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver, contextlib.ExitStack() as stack:
        port = int(receiver.url.split(":")[2].partition("/")[0])
        deaf = stack.enter_context(socket.create_server(("127.0.0.2", port), backlog=0))
        for _ in range(4):  # its queue is full: who comes now hears nothing at all
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        # What a name server would say of a host with two addresses.
        known = [
            address
            for host in ("127.0.0.2", "127.0.0.1")
            for address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: known)
        exchange = Exchange(Endpoint(f"http://two.test:{port}/", LOOPBACK, timeout_s=6.0))
        began = time.monotonic()
        assert exchange.post("/", b"{}", {}, began + 6.0).status == 200
        assert time.monotonic() - began >= 2.7  # the first was really tried


@pytest.mark.parametrize(("text", "wait"), [(None, None), ("5", 5.0), ("never", None)])
def test_waits(text: str | None, wait: float | None) -> None:
    assert seconds(text, 0.0) == wait
