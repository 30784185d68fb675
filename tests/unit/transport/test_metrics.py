"""The metrics app over a real listener."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from server.transport.answers import HttpSettings
from server.transport.metrics import metrics_app
from server.transport.reference.asgi import HttpServer


def render(openmetrics: bool) -> bytes:
    return b"# EOF\n" if openmetrics else b"x 1\n"


@contextmanager
def listening() -> Iterator[tuple[str, int]]:
    ready = threading.Event()
    addresses: list[tuple[str, int]] = []
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        listener = HttpServer(metrics_app(render), settings=HttpSettings(drain_idle_s=0.05))
        addresses.append(await listener.start("127.0.0.1", 0))
        ready.set()
        await over.wait()
        await listener.drain(1)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    yield addresses[0]
    loop.call_soon_threadsafe(over.set)
    thread.join(10)
    loop.close()


@pytest.mark.parametrize(
    ("accept", "content_type", "body"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8", b"x 1\n"),
        ("application/openmetrics-text", "application/openmetrics-text; version=1.0.0; charset=utf-8", b"# EOF\n"),
    ],
)
def test_page_in_the_format_asked_for(accept: str, content_type: str, body: bytes) -> None:
    with listening() as address:
        connection = http.client.HTTPConnection(*address, timeout=30)
        connection.request("GET", "/metrics", headers={"Accept": accept})
        response = connection.getresponse()
        assert (response.status, response.headers["content-type"], response.read()) == (200, content_type, body)
        for method, path, status in (("POST", "/metrics", 405), ("GET", "/", 404)):
            connection.request(method, path)
            response = connection.getresponse()
            assert (response.status, response.headers["content-type"]) == (status, "application/json")
            response.read()
        connection.close()
