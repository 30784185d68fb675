"""HTTP/1.1 at the level of bytes, for tests that send what no client library would."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any, Self

#: Longest wait for anything the server owes; past it the server hangs.
PATIENCE_S = 20.0


@dataclass(slots=True)
class Answer:
    """One answer as it came; ``body`` is decoded when it is JSON."""

    status: int
    headers: dict[str, str]
    body: Any


class Wire:
    """One connection. Reads time out after ``PATIENCE_S``, so a hang is an error and not a stuck test."""

    def __init__(self, address: str, *, receive_buffer: int = 0) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._held = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send everything. A server that has already answered and closed is no error here."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def answer(self) -> Answer | None:
        """The next answer; None when the server closed the connection instead."""
        head = self._until(b"\r\n\r\n")
        if head is None:
            return None
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        status = int(status_line.split(" ")[1])
        raw = self._take(int(headers.get("content-length", "0"))) if status >= 200 else b""
        if status >= 200 and headers.get("content-type", "").startswith("application/json") and raw:
            return Answer(status, headers, json.loads(raw))
        return Answer(status, headers, raw)

    def closed(self) -> bool:
        """Did the server end the connection? Waits for it."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionResetError:
            return True
        return True

    def _until(self, mark: bytes) -> bytes | None:
        while mark not in self._held:
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._held += data
        found, _, self._held = self._held.partition(mark)
        return found

    def _take(self, size: int) -> bytes:
        parts, have = [self._held], len(self._held)
        while have < size:
            data = self.socket.recv(1 << 20)
            if not data:
                raise AssertionError(f"the answer ended after {have} of {size} bytes")
            parts.append(data)
            have += len(data)
        whole = b"".join(parts)
        self._held = whole[size:]
        return whole[:size]


def post(path: str, body: bytes, headers: dict[str, str] | None = None, *, version: str = "1.1") -> bytes:
    """A well-formed POST."""
    lines = {"Host": "test", "Content-Length": str(len(body)), **(headers or {})}
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/{version}\r\n{text}\r\n".encode() + body


class Steady:
    """Exchanges over a kept-alive connection, opened anew whenever the server closed it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._wire = Wire(address)

    def exchange(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> Answer:
        """The answer to one POST; a connection without an answer is an error."""
        self._wire.send(post(path, body, headers))
        answer = self._wire.answer()
        if answer is None:
            raise AssertionError(f"no answer to {body[:200]!r}")
        if answer.headers.get("connection", "").lower() == "close":
            self.close()
            self._wire = Wire(self._address)
        return answer

    def close(self) -> None:
        self._wire.socket.close()
