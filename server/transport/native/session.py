"""One HTTP/2 connection without its socket. The only module that knows the library behind it (``ngh2``, libnghttp2).

Bytes go in by ``feed``, which gives events; what is said goes out by ``out``. Nothing here raises for what a peer does:
``feed`` ends with ``SessionOver``, and whatever concerns a stream that is gone answers False.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import ngh2
from ngh2 import Setting

Header: TypeAlias = tuple[bytes, bytes]

# What ``feed`` gives. Each has ``stream_id``; see the library for the rest. Final: every event is compared with them.
Event: TypeAlias = ngh2.Event
RequestReceived: Final = ngh2.RequestReceived
DataReceived: Final = ngh2.DataReceived
TrailersReceived: Final = ngh2.TrailersReceived
StreamReset: Final = ngh2.StreamReset
StreamClosed: Final = ngh2.StreamClosed
PingReceived: Final = ngh2.PingReceived
SettingsReceived: Final = ngh2.SettingsReceived
WindowUpdated: Final = ngh2.WindowUpdated
ConnectionClosed: Final = ngh2.ConnectionClosed

NO_ERROR: Final = 0
INTERNAL_ERROR: Final = 2
REFUSED_STREAM: Final = 7
CANCEL: Final = 8
ENHANCE_YOUR_CALM: Final = 11

#: Header lists over this many times the limit end the connection; up to it, one request is refused by its own status.
_HEADER_SLACK: Final = 4
#: What a field counts at least (RFC 9113 section 10.5.1), and what clients put into one frame: so the bound on bytes
#: is the first that a head meets, and heads within the advertised limit meet none. Frames may be smaller than that.
_FIELD_BYTES: Final = 32
_FRAME_BYTES: Final = 16 * 1024
_MORE_FRAMES: Final = 8
#: What may come in before it is used: of one stream, and of the connection. Streams whose reader is slow hold their
#: part of the second too: it has room for many of them before their neighbours wait.
_STREAM_WINDOW: Final = 1024 * 1024
_CONNECTION_WINDOW: Final = 64 * 1024 * 1024
#: The table of headers that answers refer to. What repeats from answer to answer takes a quarter of it. What never
#: repeats, like their ids, passes through it as well, and each is compared with all of its name that are still there.
_SENT_TABLE_BYTES: Final = 1024
#: (burst, per second). An honest caller whose thousands of deadlines expire together stays under the first.
_RESETS: Final = (10_000, 1_000)
_GLITCHES: Final = (10_000, 330)


class SessionOver(Exception):
    """The peer broke the protocol or a bound. What is left to say is in ``out``."""


@dataclass(slots=True, frozen=True)
class SessionLimits:
    """Bounds of one connection."""

    max_streams: int = 1000
    max_header_bytes: int = 64 * 1024


class Session:
    """The server's side of one connection."""

    __slots__ = ("_config", "_connection", "_over")

    def __init__(self, limits: SessionLimits) -> None:
        config = ngh2.Configuration(
            auto_window_update=False,
            max_deflate_dynamic_table_size=_SENT_TABLE_BYTES,
            stream_reset_rate_limit=_RESETS,
            glitch_rate_limit=_GLITCHES,
            max_outbound_ack=256,
            max_continuations=_HEADER_SLACK * limits.max_header_bytes // _FRAME_BYTES + _MORE_FRAMES,
            max_inbound_header_list_size=_HEADER_SLACK * limits.max_header_bytes,
            max_inbound_header_count=_HEADER_SLACK * limits.max_header_bytes // _FIELD_BYTES,
        )
        self._connection = ngh2.Connection(ngh2.Role.SERVER, config)
        self._config = config
        self._over = False
        self._connection.initiate_connection(
            {
                Setting.MAX_CONCURRENT_STREAMS: limits.max_streams,
                Setting.INITIAL_WINDOW_SIZE: _STREAM_WINDOW,
                Setting.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
                Setting.NO_RFC7540_PRIORITIES: 1,
            }
        )
        self._connection.set_local_window_size(_CONNECTION_WINDOW)

    def feed(self, data: bytes) -> list[Event]:
        """What ``data`` says. Raises SessionOver; nothing is to be fed after that."""
        try:
            self._connection.receive_data(data)
        except ngh2.NGH2Error as error:
            self._over = True
            raise SessionOver(str(error)) from None
        return self._connection.events()

    def out(self, size: int) -> bytes:
        """What is to be written now, up to ``size`` bytes; b"" when there is nothing, or flow control says wait."""
        connection = self._connection
        try:
            if not connection.want_write:
                return b""  # every read and write ends with this question: asking costs a fifth of building nothing
            return connection.data_to_send(size)
        except ngh2.NGH2Error:  # over some bounds the session fails at once and has no last word
            self._over = True
            return b""

    def over(self) -> bool:
        """Neither side has anything more to say."""
        return self._over or not (self._connection.want_read or self._connection.want_write)

    # --- streams: False when the stream is gone --------------------------------------------------------------

    def consumed(self, stream_id: int, size: int) -> None:
        """So much of what was received was used: the peer may send as much again."""
        try:
            self._connection.acknowledge_received_data(size, stream_id)
        except (ngh2.NGH2Error, ValueError):
            return  # the stream is gone, and its bytes were given back with it

    def unary(self, stream_id: int, head: Iterable[Header], body: bytes, trailers: Iterable[Header]) -> bool:
        """A whole answer with trailers."""
        connection = self._connection
        number: Any = stream_id  # made an object once
        try:
            connection.send_response(number, head)
            connection.send_data(number, body)
            connection.send_trailers(number, trailers)
        except ngh2.NGH2Error:
            return False
        return True

    def head(self, stream_id: int, headers: Iterable[Header], *, end: bool = False) -> bool:
        """The head of an answer, or all of it."""
        try:
            self._connection.send_response(stream_id, headers, end_stream=end)
        except ngh2.NGH2Error:
            return False
        return True

    def body(self, stream_id: int, data: bytes | bytearray | memoryview, *, end: bool = False) -> bool:
        """A piece of an answer's body."""
        try:
            self._connection.send_data(stream_id, data, end_stream=end)
        except ngh2.NGH2Error:
            return False
        return True

    def trailers(self, stream_id: int, headers: Iterable[Header]) -> bool:
        """The end of an answer."""
        try:
            self._connection.send_trailers(stream_id, headers)
        except ngh2.NGH2Error:
            return False
        return True

    def reset(self, stream_id: int, code: int) -> None:
        """No more of this stream."""
        try:
            self._connection.reset_stream(stream_id, code)
        except ngh2.NGH2Error:
            return

    def queued(self, stream_id: int | None = None) -> int:
        """Bytes of answers that the peer has not let out yet."""
        try:
            return self._connection.queued_body_size(stream_id)
        except ngh2.NGH2Error:
            return 0

    def said(self, stream_id: int) -> bool:
        """Whether all of a complete answer with a body is out: its end waits for the peer's windows as its bytes do."""
        connection = self._connection
        try:
            room = min(connection.remote_window_size, connection.stream_remote_window_size(stream_id))
        except ngh2.NGH2Error:
            return True  # the stream is gone
        return room > 0 and not connection.queued_body_size(stream_id)

    def drop(self) -> None:
        """The socket is gone: hold nothing more of what was to be sent. All streams are gone from now on."""
        self._over = True
        self._connection = ngh2.Connection(ngh2.Role.SERVER, self._config)

    # --- connection ------------------------------------------------------------------------------------------

    def ping(self) -> None:
        """Ask for a sign of life."""
        try:
            self._connection.ping()
        except ngh2.NGH2Error:
            return

    def announce_end(self) -> None:
        """The first of two GOAWAYs: new streams are still taken, the peer is to open them elsewhere."""
        try:
            self._connection.send_shutdown_notice()
        except ngh2.NGH2Error:
            return

    def goaway(self, code: int = NO_ERROR) -> None:
        """The last GOAWAY: what was opened until now is answered, unless ``code`` says that this is the end."""
        try:
            if code == NO_ERROR:
                self._connection.send_goaway()
            else:
                self._connection.terminate_connection(code)
        except ngh2.NGH2Error:
            self._over = True
