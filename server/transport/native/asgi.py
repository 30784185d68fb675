"""HTTP requests over HTTP/2 that are no gRPC calls: each is a task of the ASGI app."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import structlog
from starlette.types import ASGIApp, Message

from server.transport.answers import Answer
from server.transport.bridge import OWED, Owed
from server.transport.native.session import INTERNAL_ERROR, Header

if TYPE_CHECKING:
    from server.transport.native.h2 import Http2Connection

#: Headers of HTTP/1.1 connections, which HTTP/2 forbids (RFC 9113 section 8.2.2).
_HOP: Final = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})
#: Answers without a body, whatever their headers say (RFC 9110 section 6.4.1).
_NO_BODY: Final = frozenset({204, 304})
#: Bytes of a body that were received and not read, over which the stream's window is held.
_UNREAD_BYTES: Final = 256 * 1024


class AsgiStream:
    """One request."""

    def __init__(self, connection: Http2Connection, stream_id: int, headers: Iterable[Header]) -> None:
        self._connection = connection
        self._id = stream_id
        self._parts: deque[bytes] = deque()
        self._unread = 0
        self._ended = self._gone = False
        self._told = False  # the app knows that the body has ended
        self._started = self._complete = False  # the answer
        self._bodiless = False  # whatever the app says, the answer has no body
        self._owed = Owed(connection.owe)
        self._came = asyncio.Event()
        self._log: Any = structlog.get_logger("tidegate.http2")
        scope = self._scope(headers)
        self._task = connection.loop.create_task(self._run(connection.server.app, scope))
        connection.tasks.add(self._task)
        self._task.add_done_callback(connection.tasks.discard)

    def _scope(self, headers: Iterable[Header]) -> dict[str, Any]:
        pseudo: dict[bytes, bytes] = {}
        plain: list[Header] = []
        for name, value in headers:
            if name[:1] == b":":
                pseudo[name] = value
            else:
                plain.append((name, value))
        authority = pseudo.get(b":authority")
        if authority is not None and not any(name == b"host" for name, _ in plain):
            plain.insert(0, (b"host", authority))
        raw_path, _, query = pseudo.get(b":path", b"/").partition(b"?")
        self._bodiless = pseudo.get(b":method") == b"HEAD"
        host, _, port = self._connection.peer.rpartition(":")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "2",
            "method": pseudo.get(b":method", b"GET").decode("latin-1"),
            "scheme": self._connection.scheme,
            "path": unquote(raw_path.decode("latin-1")),
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": plain,
            "client": (host, int(port)) if host else None,
            "server": None,
            "state": {},
            "extensions": {OWED: self._owed.owe},
        }

    # --- for the connection ----------------------------------------------------------------------------------

    def data(self, data: bytes, end: bool) -> None:
        if data:
            self._parts.append(data)
            self._unread += len(data)
        self._ended = self._ended or end
        self._came.set()

    def gone(self) -> None:
        self._gone = True
        self._came.set()

    def fail(self, error: Exception) -> None:
        self._log.error("request_failed", exc_info=error)
        self._task.cancel()
        self._connection.session.reset(self._id, INTERNAL_ERROR)
        self._connection.done(self._id)

    def full(self) -> bool:
        return self._unread > _UNREAD_BYTES

    def unread(self) -> bool:
        return self._unread > 0

    def overdue(self, now: float) -> bool:
        """The app has limits of its own for bodies."""
        return False

    def give_up(self) -> None:
        """Never called: see ``overdue``."""

    def drain(self) -> None:
        """A request ends by itself."""

    # --- ASGI ------------------------------------------------------------------------------------------------

    async def _run(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        connection, session = self._connection, self._connection.session
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001 - the boundary of one request
            self._log.error("request_failed", path=scope["path"], exc_info=error)
        finally:
            self._owed.settle()
        if self._gone:
            return
        if not self._started:
            session.head(self._id, ((b":status", b"500"),), end=True)
        elif not self._complete:
            session.reset(self._id, INTERNAL_ERROR)
        if not self._ended:
            connection.end_early(self._id, bare=self._bodiless or not self._started)
        connection.done(self._id)

    async def _receive(self) -> Message:
        while not (self._gone or self._complete) and (self._told or not (self._parts or self._ended)):
            self._came.clear()
            await self._came.wait()
        if self._gone or self._complete:
            return {"type": "http.disconnect"}
        body = b"".join(self._parts)
        self._parts.clear()
        self._unread = 0
        self._told = self._ended
        if body:
            self._connection.used(self._id, len(body))
        return {"type": "http.request", "body": body, "more_body": not self._ended}

    async def _send(self, message: Message) -> None:
        connection, session = self._connection, self._connection.session
        if self._gone:
            return
        if message["type"] == "http.response.start":
            self._started = True
            self._bodiless = self._bodiless or message["status"] in _NO_BODY
            headers = [(name.lower(), value) for name, value in message["headers"]]
            kept = [(name, value) for name, value in headers if name not in _HOP]
            head = [(b":status", b"%d" % message["status"]), *connection.server.default_headers, *kept]
            session.head(self._id, head, end=self._bodiless)
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            more = message.get("more_body", False)
            if not more:
                self._complete = True
                self._came.set()
            if not self._bodiless and session.body(self._id, body, end=not more):
                self._owed.handed(len(body))
                connection.sent(len(body))
            if more:
                await connection.until_taken(self._id)
        connection.flush_soon()


def refuse(connection: Http2Connection, stream_id: int, answer: Answer, *, ended: bool) -> None:
    """Answer a request without its app."""
    session = connection.session
    body = b"".join(answer.chunks)
    kept = [(name, value) for name, value in answer.headers if name not in _HOP]
    head = [(b":status", b"%d" % answer.status), *connection.server.default_headers, *kept]
    if session.head(stream_id, [*head, (b"content-length", b"%d" % len(body))]):
        session.body(stream_id, body, end=True)
        connection.sent(len(body))
    if not ended:
        connection.end_early(stream_id)
    connection.done(stream_id)
