"""The reference HTTP listener: uvicorn's httptools protocol, hardened, on a server whose life we own.

uvicorn's own ``Server`` is left out: it captures signals and polls. What is added to its protocol class here:

* bounds on header bytes (431), on chunks (400), on time to the end of the headers (408) and on connections (503);
* malformed requests are answered in JSON, after the answers of good requests before them on the same connection;
* an answer given before the whole body came is followed by a bounded discard, so that the client can read it: closing
  at once would reset the connection under its hands;
* a client that does not take its answer is cut off;
* what comes behind an answer that says that it is the last is not run (RFC 9112 section 9.6);
* an ``Upgrade`` that we do not speak is ignored, body included, as RFC 9110 section 7.8 wants (some clients offer h2c);
* trailer fields never join the headers;
* blanks around a field's value are no part of it, those behind it neither (RFC 9112 section 5).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, Final, cast

import httptools
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from server.errors import InvalidArgument, TidegateError, TooManyRequests
from server.transport.answers import HttpSettings, error_answer
from server.transport.bridge import OWED
from server.transport.faults import HeadersTooLarge, RequestTimeout
from server.transport.paced import PacedTransport
from server.transport.status import StatusTable
from server.types import RequestLimits, Unsent

#: Counted for each header besides its bytes, as HTTP/2 does: what it costs to hold.
_HEADER_OVERHEAD: Final = 32
#: Pieces of an answer up to this size are joined before they are written; larger ones are not copied.
_HELD_BYTES: Final = 64 * 1024


class _Violation(Exception):
    """Raised inside a parser callback: the request broke a rule of ours; the parser then stops."""

    def __init__(self, error: TidegateError) -> None:
        self.error = error


class _AnswerTransport:
    """What uvicorn writes answers to. Head and body leave in one system call, not two.

    Its ``close`` means that the last answer is out, not that reading may stop.
    """

    __slots__ = ("_close", "_held", "_loop", "_transport", "is_closing")

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, close: Callable[[], None]
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._close = close
        self._held: list[bytes] = []
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held.append(data)
        if len(data) > _HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        held, self._held = self._held, []
        if not held or self._transport.is_closing():
            return
        if len(held[-1]) > _HELD_BYTES:
            self._transport.writelines(held)
        else:
            self._transport.write(b"".join(held))

    def close(self) -> None:
        self.flush()
        self._close()


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, server: HttpServer, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config, state, {})
        self.access_log = False
        self._server = server
        self._settings = server.settings
        self._max_header_bytes = server.limits.max_header_bytes
        self._max_chunks = server.limits.max_chunks
        self._head_open = False  # between the first byte of a request and the end of its headers
        self._head_fresh = False  # that first byte came with the data now being parsed
        self._head_bytes = 0  # parsed, with overhead; trailers count on
        self._head_raw = 0  # received since, parsed or not
        self._hosts = 0
        self._chunks = 0
        self._upgrading = False
        self._refusal: TidegateError | None = None  # why parsing stopped; answered in its turn
        self._closing = False  # everything was answered; what still comes is thrown away
        self._discarded = 0
        self._timer: asyncio.TimerHandle | None = None  # head, discard: never both
        self._end: asyncio.TimerHandle | None = None  # what is thrown away behind the last answer
        self._stall: asyncio.TimerHandle | None = None
        self._stalled_at = 0
        self._paced: PacedTransport | None = None  # over TLS: the transport
        self._owed = 0  # bytes of an answer that is being written down
        self._unsent = 0  # bytes of answers counted as waiting for the client, or as being written down for it

    # --- connection -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if transport.get_extra_info("sslcontext") is not None:
            transport = self._paced = PacedTransport(transport)
        super().connection_made(transport)
        self._answers = _AnswerTransport(transport, self.loop, self._last_answer_sent)
        if len(self.connections) > self._settings.max_connections:
            self.app = self._server.overloaded
        self._arm(self._settings.keep_alive_s, self._idle_expired)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._unset_keepalive_if_required()
        if self._end is not None:
            self._end.cancel()
        if self._stall is not None:
            self._stall.cancel()
        self._owed = 0
        self._count_unsent(0)
        if self._paced is not None:
            self._paced.drop()
        super().connection_lost(exc)
        self._server.connection_lost()

    def data_received(self, data: bytes) -> None:
        while data:  # what follows an ``Upgrade`` is parsed anew, and may offer another
            if self._closing:
                self._discard(len(data))
                return
            if self._refusal is not None:
                return
            self._unset_keepalive_if_required()
            data = self._parse(data)

    def _parse(self, data: bytes) -> bytes:
        """What is still to be parsed: nothing, or a request without the ``Upgrade`` that it offered, and the rest.

        Nothing is parsed while an exception is handled: the parser's next one would then hide what a callback raised.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause.error if isinstance(cause, _Violation) else _malformed(error))
            return b""
        else:
            self._check_open_head(len(data))
            return b""
        return self._without_upgrade(rest)

    def announce_close(self) -> None:
        """The answer in flight, if any, is the last one on this connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Close as soon as nothing is in flight; answers from now on announce it."""
        if self._head_open:
            return  # a request is arriving: it is served, and its answer closes the connection
        super().shutdown()

    # --- parser callbacks -------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begin_head()

    def _begin_head(self) -> None:
        if self._over():
            raise _Violation(InvalidArgument("the last answer on this connection has been given"))
        self._head_open = self._head_fresh = True
        self._head_bytes = self._head_raw = self._hosts = self._chunks = 0
        self._arm(self._settings.head_s, self._head_expired)

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """As uvicorn's, in one call: it runs for each header of each request."""
        self._head_bytes = size = self._head_bytes + len(name) + len(value) + _HEADER_OVERHEAD
        if size > self._max_header_bytes:
            raise _Violation(self._headers_too_large())
        if self._head_open:
            name, value = name.lower(), value.rstrip(b" \t")  # the parser has taken those before it
            if name == b"host":
                self._hosts += 1
            elif name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._head_open = False
        self._disarm()
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise _Violation(InvalidArgument(f"HTTP version {version} is not spoken here; use 1.1"))
        if version == "1.0":
            self.expect_100_continue = False  # such a client would take 100 (Continue) for the answer
        if self._hosts > 1 or (self._hosts == 0 and version == "1.1"):
            raise _Violation(InvalidArgument(f"an HTTP/1.1 request needs exactly one Host header, got {self._hosts}"))
        if self.parser.get_method() == b"CONNECT":
            raise _Violation(InvalidArgument("method CONNECT is not served here"))
        if self.parser.should_upgrade():
            self._upgrading = True
            return
        self._start_request()

    def _start_request(self) -> None:
        """The head is complete and within its bounds."""
        super().on_headers_complete()
        cast("Any", self.scope)["extensions"] = {OWED: self.owe}
        cycle = cast("Any", self.cycle)
        cycle.transport = self._answers
        if self._server.draining:
            cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            self._discard(len(body))
        else:
            super().on_body(body)

    def on_chunk_header(self) -> None:
        self._chunks += 1
        if self._chunks > self._max_chunks:
            raise _Violation(InvalidArgument(f"the request body has over {self._max_chunks} chunks"))

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        if self.cycle.response_complete:
            self.cycle.more_body = False
            self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._answers.flush()
        if self._owed:
            self.owe(0)
        if self._closing:
            self.pipeline.clear()
            return
        super().on_response_complete()
        cycle = self.cycle
        if self.transport.is_closing() or not cycle.response_complete:
            return
        if self._refusal is not None:
            self._send_refusal(self._refusal)
        elif cycle.more_body:
            self._arm(self._settings.discard_s, self.transport.abort)

    # --- refusing and closing ---------------------------------------------------------------------------------

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._max_header_bytes:
            raise _Violation(self._headers_too_large())

    def _check_open_head(self, received: int) -> None:
        """A header that never ends is not seen by the callbacks, so received bytes are counted too."""
        if not self._head_open:
            self._bound_idleness()
            return
        if self._head_fresh:
            self._head_fresh = False
        else:
            self._head_raw += received
        if self._head_raw > self._max_header_bytes:
            self._refuse(self._headers_too_large())

    def _bound_idleness(self) -> None:
        """Bytes between requests (empty lines) stop the keep-alive timer without starting a request."""
        cycle = self.cycle
        if cycle is not None and cycle.response_complete and not cycle.more_body and self._timer is None:
            self._arm(self._settings.keep_alive_s, self._idle_expired)

    def _headers_too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(f"request line and headers are over the limit of {self._max_header_bytes} bytes")

    def _without_upgrade(self, rest: bytes) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self._upgrading = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return b"".join([*lines, b"\r\n", rest])

    def _refuse(self, error: TidegateError) -> None:
        """Stop parsing. Good requests before this one on the connection are answered first."""
        if self._over():
            return
        self._refusal = error
        self._disarm()
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._send_refusal(error)
        elif cycle.more_body and self.pipeline:
            self.pipeline.popleft()  # the request at fault, whose turn has not come
            self.cycle = self._running_cycle()
        elif cycle.more_body:
            self._send_refusal(error)

    def _running_cycle(self) -> Any:
        """The newest request that will be answered, once the one at fault has left the pipeline."""
        return self.pipeline[0][0] if self.pipeline else self._started

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._started = cycle
        if cycle.waiting_for_100_continue:
            app = _announcing(cycle, app)
        super()._start_asgi_task(cycle, app)

    def _send_refusal(self, error: TidegateError) -> None:
        self._answers.flush()
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        answer = error_answer(error, self._server.statuses)
        body = b"".join(answer.chunks)
        headers = dict([*self.server_state.default_headers, *answer.headers, (b"connection", b"close")])
        headers[b"content-length"] = b"%d" % len(body)
        lines = [b"%b: %b\r\n" % header for header in headers.items()]
        self.transport.write(b"".join([STATUS_LINE[answer.status], *lines, b"\r\n", body]))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._close_gently()

    def _last_answer_sent(self) -> None:
        if self.cycle.more_body:
            self._close_gently()
        else:
            self.transport.close()

    def _close_gently(self) -> None:
        """Say that no more answers come, then throw away what the client still sends, within bounds."""
        if self._closing or self.transport.is_closing():
            return
        self._closing = True
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        # A timer of its own: the parser may still be in the data that brought this on, and their end disarms the other.
        self._disarm()
        self._end = self.loop.call_later(self._settings.discard_s, self.transport.abort)

    def _over(self) -> bool:
        """The last answer was given, or the connection is lost: what the client still sends is no request."""
        return self._closing or self.transport.is_closing()

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > self._settings.discard_bytes:
            self.transport.abort()

    # --- timers -----------------------------------------------------------------------------------------------

    def _arm(self, seconds: float, expired: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, expired)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _idle_expired(self) -> None:
        if self.flow.write_paused:  # it is not idle yet: it has an answer to read, which ``_stall`` looks after
            self._arm(self._settings.keep_alive_s, self._idle_expired)
        else:
            self._close_or_abort()

    def _head_expired(self) -> None:
        if self.flow.read_paused:
            self._arm(self._settings.head_s, self._head_expired)
        else:
            self._refuse(RequestTimeout(f"the request headers did not arrive within {self._settings.head_s:g} s"))

    def timeout_keep_alive_handler(self) -> None:
        self._idle_expired()

    def _close_or_abort(self) -> None:
        """``close`` waits for the peer to take what is buffered; a peer that had this long and did not is cut off."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        elif not self.transport.is_closing():
            self.transport.close()

    def pause_writing(self) -> None:
        """The socket takes no more. Answers that it takes whole never come here, so nothing is counted for them."""
        if self._paced is not None:
            self._paced.pause()
        super().pause_writing()
        waiting = self.transport.get_write_buffer_size()
        self._count_unsent(waiting)
        if self._stall is None:
            self._stalled_at = waiting
            self._stall = self.loop.call_later(self._settings.write_stall_s, self._stall_expired)

    def resume_writing(self) -> None:
        if self._paced is not None and not self._paced.resume():
            return
        super().resume_writing()
        self._count_unsent(0)
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def owe(self, size: int) -> None:
        """An answer of so many bytes is being written down; 0: none is any more.

        It counts like one that waits for its reader, as it soon may: else any number would be made before the first of
        them has reached its socket.
        """
        if self in self.connections:  # one that is lost counts no more
            self._owed = size
            # As ever, a rest that the socket is about to take is not counted: nobody would tell when it is gone.
            self._count_unsent(self.transport.get_write_buffer_size() if self.flow.write_paused else 0)

    def _count_unsent(self, waiting: int) -> None:
        self._unsent = self._server.unsent.moved(self._unsent, self._owed + waiting)

    def _stall_expired(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._count_unsent(waiting)
        if waiting >= self._stalled_at:
            self.transport.abort()
            return
        self._stalled_at = waiting
        self._stall = self.loop.call_later(self._settings.write_stall_s, self._stall_expired)


def _announcing(cycle: Any, app: ASGIApp) -> ASGIApp:
    """``app`` for a request that waits for 100 (Continue): a final answer in its place says that the connection closes.

    Whether the body still comes is then the client's choice (RFC 9110 section 10.1.1): nothing can follow it.
    """

    async def announcing(scope: Scope, receive: Receive, send: Send) -> None:
        async def announced(message: Message) -> None:
            if cycle.waiting_for_100_continue and cycle.more_body:
                cycle.keep_alive = False
            await send(message)

        await app(scope, receive, announced)

    return announcing


def _malformed(error: Exception) -> InvalidArgument:
    if isinstance(error, httptools.HttpParserCallbackError):
        return InvalidArgument("malformed HTTP request: the request target is not a valid path")
    return InvalidArgument(f"malformed HTTP request: {error}")


class HttpServer:
    """A listener for one ASGI app: ``start``, then ``drain``. Signals are the caller's business.

    Over TLS, asyncio makes a connection known when its handshake is complete: until then it is bounded by time
    (``head_s``) and not by number. The native transport, which accepts by itself, counts it from accept on.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: RequestLimits | None = None,
        settings: HttpSettings | None = None,
        statuses: StatusTable | None = None,
        tls: ssl.SSLContext | None = None,
        unsent: Unsent | None = None,
    ) -> None:
        self.limits = limits or RequestLimits()
        self.unsent = unsent or Unsent()
        self.settings = settings or HttpSettings()
        self.statuses = statuses or StatusTable()
        self.draining = False
        self._tls = tls
        self._state = ServerState()
        self._config = uvicorn.Config(
            cast("Any", app),
            http=HttpProtocol,
            ws="none",
            loop="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="info",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=cast("int", self.settings.keep_alive_s),
        )
        self._server: asyncio.Server | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()

    @property
    def connections(self) -> int:
        return len(self._state.connections)

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; port 0 picks a free one. Returns the address really bound; raises OSError when that fails."""
        loop = asyncio.get_running_loop()
        self._config.load()
        self._tick(loop)
        self._server = await loop.create_server(
            self._connection,
            host,
            port,
            ssl=self._tls,
            ssl_handshake_timeout=None if self._tls is None else self.settings.head_s,
            ssl_shutdown_timeout=None if self._tls is None else self.settings.discard_s,
            backlog=self.settings.backlog,
        )
        bound = self._server.sockets[0].getsockname()
        return bound[0], bound[1]

    def _connection(self) -> asyncio.Protocol:
        """The protocol of a new connection."""
        return HttpProtocol(self, self._config, self._state)

    async def drain(self, timeout_s: float) -> bool:
        """Stop listening, answer what is in flight, close. False when the time was up and connections were cut.

        Connections that are idle stay open for a moment: a request already on its way is served, and every answer
        from now on says ``connection: close``.
        """
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in self._state.connections:
            cast("HttpProtocol", connection).announce_close()
        until = asyncio.get_running_loop().time() + timeout_s
        await self._wait_empty(min(timeout_s, self.settings.drain_idle_s))
        for connection in list(self._state.connections):
            connection.shutdown()
        clean = await self._wait_empty(until - asyncio.get_running_loop().time())
        for connection in list(self._state.connections):
            cast("HttpProtocol", connection).transport.abort()
        await self._wait_empty(1.0)
        if self._clock is not None:
            self._clock.cancel()
        return clean

    async def _wait_empty(self, seconds: float) -> bool:
        self._empty.clear()
        if not self._state.connections:
            return True
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def connection_lost(self) -> None:
        if not self._state.connections:
            self._empty.set()

    async def overloaded(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """The app of connections over the limit."""
        error = TooManyRequests(f"over {self.settings.max_connections} connections are open; retry later")
        answer = error_answer(error, self.statuses)
        answer.headers.append((b"connection", b"close"))
        await answer.send(send)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """The Date header, once a second."""
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        self._clock = loop.call_later(1.0, self._tick, loop)
