"""loadtests.servers: peers by address."""

from __future__ import annotations

import os
import socket

import pytest

from loadtests.servers import Target, check_reachable, parse_target
from server.errors import InvalidArgument
from tests.support.ports import reserved_port


def test_a_peer() -> None:
    text = f"http=10.0.0.1:8000,grpc=[::1]:8001,model=m,pid={os.getpid()},label=other"
    assert parse_target(text) == Target("other", "10.0.0.1:8000", "[::1]:8001", "m", os.getpid())
    assert parse_target("grpc=host:1") == Target("peer", "", "host:1")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http",
        "http=",
        "http=host",
        "http=host:0",
        "http=host:70000",
        "model=m",
        "http=a:1,http=b:2",
        "http=a:1,colour=blue",
        "http=a:1,pid=x",
        "http=a:1,pid=999999999",
    ],
)
def test_what_is_no_peer(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_target(text)


def test_a_server_that_does_not_listen_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        up = f"127.0.0.1:{there.getsockname()[1]}"
        check_reachable(Target("one", up, up))
        gone = f"127.0.0.1:{reserved_port()}"
        with pytest.raises(ConnectionError, match=f"one: nobody answers at {gone}: .*refused"):
            check_reachable(Target("one", up, gone))
