"""Connections from accept on, until it is known what they speak.

**TLS.** asyncio's own server makes a connection known when its handshake is complete: too late to bound those that
never complete theirs. ``SecureListener`` accepts by itself and hands each connection to the loop, so that it counts
against ``max_connections`` while it has nothing but a descriptor.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import structlog

from server.transport.native.h2 import Http2Connection

if TYPE_CHECKING:
    from server.transport.native.server import NativeServer

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#: Connections over their maximum that are told so; more are closed without a word.
_TOLD: Final = 64
#: Accepted in one turn of the loop, and the pause when the system has no descriptor or memory for one more.
_AT_ONCE: Final = 64
_PAUSE_S: Final = 1.0
#: What accept says of a connection that failed while it waited, not of the system (accept(2), "Error handling"): it has
#: left the kernel's queue, so the next one is not made to wait.
_LOST: Final = frozenset(
    {errno.EPROTO, errno.ENOPROTOOPT, errno.EOPNOTSUPP}
    | {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
)


class _Bare:
    """Stands where a connection has its transport later. What ends it here, ends its handshake."""

    __slots__ = ("_socket",)

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def close(self) -> None:
        with suppress(OSError):  # the peer may be gone
            self._socket.shutdown(socket.SHUT_RDWR)

    abort = close


class Undecided(asyncio.Protocol):
    """A connection until it is known what it speaks: by ALPN, or else by its first bytes."""

    def __init__(self, server: NativeServer, bare: _Bare | None = None) -> None:
        self._server = server
        self._transport: Any = bare
        self._seen = b""
        self._until = server.now + server.settings.head_s
        #: Whether there was a connection to speak on: over TLS, a handshake that was completed.
        self.made = False

    def connection_made(self, transport: Any) -> None:
        self.made = True
        self._transport = transport
        server = self._server
        server.live.add(self)
        tls = transport.get_extra_info("ssl_object")
        alpn = None if tls is None else tls.selected_alpn_protocol()
        if len(server.live) > server.settings.max_connections + _TOLD:
            server.refused += 1
            transport.abort()
        elif alpn is not None:
            self._become(alpn == "h2", b"")

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.live.discard(self)
        self._server.connection_lost()

    def data_received(self, data: bytes) -> None:
        seen = self._seen = self._seen + data
        if len(seen) >= len(PREFACE) or not PREFACE.startswith(seen):
            self._become(seen.startswith(PREFACE), seen)

    def _become(self, http2: bool, data: bytes) -> None:
        self._server.live.discard(self)
        protocol: Any = Http2Connection(self._server) if http2 else self._server.http1()
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        if data:
            protocol.data_received(data)

    # What the listener says to its connections:

    @property
    def transport(self) -> Any:
        return self._transport

    def sweep(self, now: float) -> None:
        """A connection that says nothing is not kept."""
        if now > self._until:
            self._transport.close()

    def announce_close(self) -> None:
        """Nothing was said yet."""

    def shutdown(self) -> None:
        self._transport.close()


class SecureListener:
    """One address where connections begin with a handshake: ``start``, then ``close``, which leaves connections alone.

    Where ``max_connections`` of the server are open, handshakes included, few more are taken, to be told so; all others
    are closed at once, unheard.
    """

    def __init__(self, server: NativeServer, context: ssl.SSLContext) -> None:
        self._server = server
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self._handshakes: set[asyncio.Task[None]] = set()
        self._log: Any = structlog.get_logger("tidegate.native")

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; port 0 picks a free one. Returns the address really bound; raises OSError when that fails."""
        found = await self._loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
                self._bind(family, address)
        except OSError:
            self.close()
            raise
        if not self._sockets:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        for listening in self._sockets:
            self._listen(listening)
        bound = self._sockets[0].getsockname()
        return bound[0], bound[1]

    def _bind(self, family: int, address: Any) -> None:
        try:
            listening = socket.create_server(address, family=family, backlog=self._server.settings.backlog)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:  # a name may have addresses of a family that the system lacks
                raise
        else:
            self._sockets.append(listening)
            listening.setblocking(False)
            # Connections have it from here: asyncio sets it only on sockets that it has made itself.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        """Listen no more."""
        for listening in self._sockets:
            self._loop.remove_reader(listening)
            listening.close()
        self._sockets.clear()

    # --- one connection after the other ----------------------------------------------------------------------

    def _listen(self, listening: socket.socket) -> None:
        if listening.fileno() >= 0:  # it may have been closed in a pause
            self._loop.add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _LOST:
                    self._pause(listening, error)
                return
            self._take(connection)

    def _pause(self, listening: socket.socket, error: OSError) -> None:
        """What cannot be accepted keeps its place in the kernel's queue, and would be reported in every turn."""
        self._log.warning("accept_failed", error=error.strerror or str(error), seconds=_PAUSE_S)
        self._loop.remove_reader(listening)
        self._loop.call_later(_PAUSE_S, self._listen, listening)

    def _take(self, connection: socket.socket) -> None:
        server = self._server
        if len(server.live) >= server.settings.max_connections + _TOLD:
            server.refused += 1
            connection.close()
            return
        connection.setblocking(False)
        protocol = Undecided(server, _Bare(connection))
        server.live.add(protocol)
        task = self._loop.create_task(self._secure(protocol, connection))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _secure(self, protocol: Undecided, connection: socket.socket) -> None:
        """Until the handshake ends. Completed, it has called ``connection_made``, and all else goes from there."""
        settings = self._server.settings
        try:
            await self._loop.connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=settings.head_s,
                ssl_shutdown_timeout=settings.discard_s,
            )
        except OSError:
            pass  # the client spoke no TLS, or none that is accepted here, took too long, or left
        except Exception as error:  # noqa: BLE001 - the boundary of one connection
            self._log.error("connection_failed", exc_info=error)
        if not protocol.made:
            connection.close()
            protocol.connection_lost(None)
