"""A real HTTP receiver of webhooks on loopback, which answers as it is told and keeps what it got."""

from __future__ import annotations

import base64
import hmac
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

KEY = b"0123456789abcdef0123456789abcdef"
SECRET = "whsec_" + base64.b64encode(KEY).decode()


@dataclass(frozen=True)
class Received:
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> Any:
        return json.loads(self.body)

    def signed_by(self, key: bytes) -> bool:
        """The check as a receiver writes it from the specification."""
        content = f"{self.id}.{self.headers['webhook-timestamp']}.{self.body.decode()}"
        wanted = base64.b64encode(hmac.new(key, content.encode(), "sha256").digest()).decode()
        signatures = [text.split(",", 1) for text in self.headers["webhook-signature"].split(" ")]
        return any(version == "v1" and hmac.compare_digest(value, wanted) for version, value in signatures)


@dataclass(frozen=True)
class Answer:
    """``hang_up``: close the connection instead."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    hang_up: bool = False


class Receiver:
    """``answer`` says what the next request is told; every request is kept."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/hooks/a?b=c"
        self.answer: Callable[[Received], Answer] = lambda _: Answer()
        self._got: list[Received] = []
        self._changed = threading.Condition()

    @property
    def got(self) -> list[Received]:
        with self._changed:
            return list(self._got)

    def take(self, received: Received) -> Answer:
        with self._changed:
            self._got.append(received)
            self._changed.notify_all()
        return self.answer(received)

    def wait(self, condition: Callable[[list[Received]], bool], timeout_s: float = 30.0) -> list[Received]:
        """Everything received, once ``condition`` holds of it."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self._got), timeout_s), f"got {len(self._got)}"
            return list(self._got)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:  # the sender was killed between head and body: no request was received
            return
        receiver = cast("_Server", self.server).receiver
        answer = receiver.take(Received(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        if answer.hang_up:
            return
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def do_GET(self) -> None:
        raise AssertionError("nobody asks for anything")

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.receiver = Receiver(self.server_address[1])

    def handle_error(self, *_: object) -> None:
        """A sender that went away early is no matter of the receiver's."""


@contextmanager
def receiving() -> Iterator[Receiver]:
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def scripted(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A socket whose connections are each handed to ``talk``; the address for it."""
    listener = socket.create_server(("127.0.0.1", 0))
    talks: list[threading.Thread] = []

    def converse(peer: socket.socket) -> None:
        with peer:
            try:
                talk(peer)
            except OSError:
                return  # the sender went away

    def accept() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            talks.append(threading.Thread(target=converse, args=(peer,)))
            talks[-1].start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        for running in (thread, *talks):
            running.join(10)
        listener.close()
