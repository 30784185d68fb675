"""Writing over TLS in pieces, in front of a transport that says when it has had enough."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from server.transport.paced import PacedTransport

PIECE = 256 * 1024


class Socket(asyncio.Transport):
    """Takes ``room`` bytes, then says ``full``; a write may go over it."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.room = 0
        self.written: list[bytes] = []
        self.full: Callable[[], None] = lambda: None
        self.closed = self.aborted = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.written.append(bytes(data))
        self.room -= len(data)
        if self.room <= 0:
            self.full()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high is not None
        assert high < PIECE

    def get_write_buffer_size(self) -> int:
        return max(0, -self.room)

    def is_closing(self) -> bool:
        return self.closed or self.aborted

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True


def made(room: int) -> tuple[Socket, PacedTransport]:
    socket = Socket()
    paced = PacedTransport(socket)
    socket.room, socket.full = room, paced.pause
    return socket, paced


DATA = bytes(range(256)) * 4096  # four pieces


def test_what_the_socket_takes_is_written_at_once() -> None:
    socket, paced = made(1 << 30)
    paced.write(b"head")
    paced.writelines([DATA, memoryview(DATA)[:10]])
    assert b"".join(socket.written) == b"head" + DATA + DATA[:10]
    assert max(map(len, socket.written)) == PIECE
    assert paced.get_write_buffer_size() == 0


def test_the_rest_waits_in_order_and_is_counted() -> None:
    socket, paced = made(100)
    paced.writelines([b"head", DATA])
    assert sum(map(len, socket.written)) == 4 + PIECE
    assert paced.get_write_buffer_size() == 4 + len(DATA) - 100
    paced.write(b"tail")  # small, and not to overtake
    socket.room = PIECE + 1
    assert not paced.resume()  # filled again
    assert len(socket.written) == 4
    socket.room = 1 << 30
    assert paced.resume()
    assert b"".join(socket.written) == b"head" + DATA + b"tail"
    assert paced.get_write_buffer_size() == 0


def test_it_closes_behind_what_waits() -> None:
    socket, paced = made(100)
    paced.writelines([DATA])
    paced.close()
    assert paced.is_closing()
    assert not socket.closed
    paced.write(b"too late")
    paced.writelines([b"too late"])
    socket.room = 1 << 30
    paced.resume()
    assert b"".join(socket.written) == DATA
    assert socket.closed


def test_nothing_waits_for_a_socket_that_is_cut() -> None:
    for cut in (PacedTransport.abort, lambda paced: paced.resume()):
        socket, paced = made(100)
        paced.writelines([DATA])
        socket.aborted = cut is not PacedTransport.abort  # from below
        cut(paced)
        assert socket.aborted
        assert paced.is_closing()
        assert paced.get_write_buffer_size() == PIECE - 100  # the socket's own
        assert len(socket.written) == 1


def test_what_is_lost_is_let_go() -> None:
    socket, paced = made(100)
    paced.writelines([DATA])
    paced.drop()
    assert paced.get_write_buffer_size() == socket.get_write_buffer_size()
    paced.write(DATA)
    assert len(socket.written) == 1


def test_the_rest_is_the_socket_s_own() -> None:
    _, paced = made(1)
    assert paced.get_extra_info("peername") == ("127.0.0.1", 1)
    assert paced.get_extra_info("sslcontext", "none") == "none"
    assert not paced.can_write_eof()
