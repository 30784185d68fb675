"""A V2 server of the tests' own, for versions that another server has: it answers as a test says, and remembers.

One model ``m``: FP32 [n, width] ``x`` in, ``y`` of the same shape out. Threads and sockets, nothing of the product.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tests.support.ports import reserved_port

Rows: TypeAlias = npt.NDArray[np.float32]
#: The bytes of an answer to these rows; b"" ends the connection without one.
Behave: TypeAlias = Callable[[Rows], bytes]

TENSORS = {"inputs": "x", "outputs": "y"}


def http(status: int, body: bytes, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


def tensor_answer(values: npt.NDArray[Any], datatype: str = "FP32", name: str = "y") -> bytes:
    """A right answer in form, whatever is in it."""
    data = values.tobytes()
    entry = {"name": name, "datatype": datatype, "shape": values.shape, "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"model_name": "m", "outputs": [entry]}).encode()
    return http(200, head + data, f"Inference-Header-Content-Length: {len(head)}")


def scaled(scale: float) -> Behave:
    return lambda x: tensor_answer(x * np.float32(scale))


def refusing(status: int) -> Behave:
    return lambda _: http(status, b'{"error": "scripted"}')


class Upstream:
    """``asked``: (monotonic seconds, rows) of every inference. ``max_batch_size`` 0: its model does not batch."""

    def __init__(self, behave: Behave, max_batch_size: int = 0, width: int = 4) -> None:
        self.behave = behave
        self._width = width
        self.asked: list[tuple[float, Rows]] = []
        self._config = {"name": "m", "max_batch_size": max_batch_size}
        # Nobody else is given the port while tests find it closed.
        self._listener = socket.create_server(("127.0.0.1", reserved_port()), backlog=64)
        self._open: set[socket.socket] = set()
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Refuse and end everything, as a machine that is gone. Idempotent."""
        _end(self._listener)
        self._accepting.join(20)  # an accept that went on would be one on whatever socket has the number next
        self._listener.close()
        for connection in tuple(self._open):
            _end(connection)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with connection, connection.makefile("rb") as received:
                while (line := received.readline()).endswith(b"\n") and (
                    answer := self._answer(line.decode().split()[1], received)
                ):
                    connection.sendall(answer)
        except OSError:
            return
        finally:
            self._open.discard(connection)

    def _answer(self, path: str, received: Any) -> bytes:
        headers = {}
        while (line := received.readline().decode()).strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        # A sender that went away in the middle, or was killed, has sent no request.
        if not line:
            return b""
        length = int(headers.get("content-length", "0"))
        body = received.read(length)
        if len(body) < length:
            return b""
        if path.endswith("/infer"):
            x = np.frombuffer(body[int(headers["inference-header-content-length"]) :], "<f4").reshape(-1, self._width)
            self.asked.append((time.monotonic(), x))
            return self.behave(x)
        if path == "/v2":
            return http(200, json.dumps({"name": "tests", "extensions": ["binary_tensor_data"]}).encode())
        if path.endswith("/config"):
            return http(200, json.dumps(self._config).encode())
        shape = {"datatype": "FP32", "shape": [-1, self._width]}
        signature = {side: [{"name": name, **shape}] for side, name in TENSORS.items()}
        return http(200, json.dumps({"name": "m", "versions": ["1"], **signature}).encode())


def _end(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


@contextmanager
def upstream(behave: Behave, max_batch_size: int = 0, width: int = 4) -> Iterator[Upstream]:
    """One that is gone at the end."""
    serving = Upstream(behave, max_batch_size, width)
    try:
        yield serving
    finally:
        serving.close()
