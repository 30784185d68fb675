"""One HTTP/2 connection: a session on a socket, its streams, its bounds and its end.

What a stream is, is decided by its head: gRPC calls go to ``unary`` and ``streams``, everything else to the ASGI app.
Trouble of one stream never reaches its neighbours: whatever is raised while a stream is handled ends that stream.

**Memory.** What a connection may send before it is read is bounded by windows; bodies that are being gathered count,
and over ``max_gathered_bytes`` only the oldest of them goes on. Answers that the peer does not take count too: over
``max_unsent_bytes`` new calls are refused, and after a while without progress the connection is cut.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog

from server.transport.native.session import (
    ENHANCE_YOUR_CALM,
    INTERNAL_ERROR,
    NO_ERROR,
    ConnectionClosed,
    DataReceived,
    Event,
    PingReceived,
    RequestReceived,
    Session,
    SessionLimits,
    SessionOver,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)

if TYPE_CHECKING:
    from server.transport.native.server import NativeServer

#: Frames that carry nothing for a stream: so many at once, so many per second.
_IDLE_FRAMES: Final = (2000, 200.0)
#: Between the two GOAWAYs: streams opened before the first was read are still taken.
_GOAWAY_PAUSE_S: Final = 0.1


@dataclass(slots=True, frozen=True)
class Http2Settings:
    """Bounds of one HTTP/2 connection. Times in seconds."""

    max_streams: int = 1000
    #: Bodies of one connection that are gathered or wait to be read by a stream.
    max_gathered_bytes: int = 128 * 1024 * 1024
    #: Answers that the peer has not taken: over it new calls are refused.
    max_unsent_bytes: int = 64 * 1024 * 1024
    #: A stream's answer waits for the peer while it has more than this queued.
    stream_unsent_bytes: int = 1024 * 1024
    #: Silence after which the peer is asked for a sign of life, and how long it may take to give one.
    keepalive_s: float = 60.0
    keepalive_timeout_s: float = 20.0
    #: Age at which a connection is asked to end, so that load balancers can spread clients anew; 0: never.
    max_age_s: float = 0.0
    #: Messages of one bidirectional stream that are being worked on.
    max_in_flight_per_stream: int = 64


class Stream(Protocol):
    """One stream of a connection. Its bytes come in ``data``; after ``gone`` nothing is called any more."""

    def data(self, data: bytes, end: bool) -> None:
        """More of the body; ``end``: nothing follows."""
        ...

    def gone(self) -> None:
        """The peer reset the stream, or the connection is lost."""
        ...

    def fail(self, error: Exception) -> None:
        """Something unexpected was raised: log it, and answer so if there is still a way."""
        ...

    def full(self) -> bool:
        """Nothing more of the body is wanted until what came was read."""
        ...

    def waiting_since(self) -> float:
        """When more of the body was last seen, by the server's clock; infinity when none is waited for."""
        ...

    def give_up(self) -> None:
        """The body did not come in time."""
        ...

    def drain(self) -> None:
        """The server ends: a stream without an end of its own finishes what it has and ends."""
        ...


class Http2Connection(asyncio.Protocol):
    """The protocol of one connection, once it is known to speak HTTP/2."""

    def __init__(self, server: NativeServer) -> None:
        self.server = server
        self.loop = asyncio.get_running_loop()
        self.session = Session(SessionLimits(server.http2.max_streams, server.limits.max_header_bytes))
        self.streams: dict[int, Stream] = {}
        self.peer = ""
        self.scheme = "http"
        #: Set whenever the peer has taken something, for streams that wait for it.
        self.taken = asyncio.Event()
        self.transport: Any = None
        self._reading = False
        self._flush_due = False
        self._write_paused = False
        self._gathered: dict[int, int] = {}  # stream -> bytes of its body that are not used yet, oldest first
        self._gathered_bytes = 0
        self._held: dict[int, int] = {}  # stream -> those of them that were not given back to its window
        self._answered_bytes = 0  # handed to the session
        self._stalled_at = 0
        self._stalled_since = 0.0
        self._opened = self._seen = server.now
        self._pinged = 0.0
        self._idle_frames: float = _IDLE_FRAMES[0]
        self._idle_counted = server.now
        self._greeted = False  # its first SETTINGS has come
        self._ending = False
        self._log: Any = structlog.get_logger("tidegate.http2")

    # --- asyncio ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.server.live.add(self)
        peer = transport.get_extra_info("peername")
        self.peer = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else ""
        if transport.get_extra_info("sslcontext") is not None:
            self.scheme = "https"
        if len(self.server.live) > self.server.settings.max_connections:
            self.end(ENHANCE_YOUR_CALM)
        elif self.server.draining:
            self.drain()
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.live.discard(self)
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            self._guard(stream, stream.gone)
        self.taken.set()
        self.server.connection_lost()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self.flush()

    def data_received(self, data: bytes) -> None:
        self._seen = self.server.now
        self._pinged = 0.0
        self._reading = True
        try:
            for event in self.session.feed(data):
                self._take(event)
        except SessionOver:
            self._ending = True
            self.flush()
            self.transport.close()
            return
        finally:
            self._reading = False
        self.flush()

    # --- events ----------------------------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        kind = type(event)
        if kind is DataReceived:
            self._body(event)
        elif kind is RequestReceived:
            self._open(event)
        elif kind is StreamClosed or kind is StreamReset:
            self._closed(event.stream_id)  # type: ignore[attr-defined]
        elif kind is TrailersReceived:
            stream = self.streams.get(event.stream_id)  # type: ignore[attr-defined]
            if stream is not None:
                self._feed(stream, b"", True)
        elif kind is WindowUpdated:
            self.taken.set()
        elif kind is PingReceived or kind is SettingsReceived:
            self._greeted = True
            self._idle_frame()
        elif kind is ConnectionClosed:
            self._ending = True

    def _open(self, event: Any) -> None:
        try:
            stream = self.server.open_stream(self, event.stream_id, event.headers, event.end_stream)
        except Exception as error:  # noqa: BLE001 - the boundary of one stream
            self._log.error("stream_failed", exc_info=error)
            self.session.reset(event.stream_id, INTERNAL_ERROR)
            return
        if stream is not None:
            self.streams[event.stream_id] = stream
            if event.end_stream:
                self._feed(stream, b"", True)

    def _body(self, event: Any) -> None:
        stream_id, data = event.stream_id, event.data
        stream = self.streams.get(stream_id)
        if stream is None:
            self.session.consumed(stream_id, len(data))
            return
        if event.end_stream and stream_id not in self._gathered:
            self.session.consumed(stream_id, len(data))  # the usual request: one frame
        elif data:
            self._gather(stream_id, len(data))
        else:
            self._idle_frame()
        self._feed(stream, data, event.end_stream)

    def _feed(self, stream: Stream, data: bytes, end: bool) -> None:
        try:
            stream.data(data, end)
        except Exception as error:  # noqa: BLE001 - the boundary of one stream: its neighbours go on
            self._guard(stream, partial(stream.fail, error))

    def _guard(self, stream: Stream, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - likewise
            self._log.error("stream_failed", stream=type(stream).__name__, exc_info=error)

    def _closed(self, stream_id: int) -> None:
        self.release(stream_id)
        stream = self.streams.pop(stream_id, None)
        if stream is not None:
            self._guard(stream, stream.gone)

    def _idle_frame(self) -> None:
        """Frames that move nothing are cheap, not free."""
        now = self.server.now
        burst, rate = _IDLE_FRAMES
        self._idle_frames = min(burst, self._idle_frames + (now - self._idle_counted) * rate) - 1
        self._idle_counted = now
        if self._idle_frames < 0:
            self.end(ENHANCE_YOUR_CALM)

    # --- receive windows -------------------------------------------------------------------------------------

    def _gather(self, stream_id: int, size: int) -> None:
        """Give the window back at once while there is room, else when there is again."""
        self._gathered[stream_id] = self._gathered.get(stream_id, 0) + size
        self._gathered_bytes += size
        if self._may_go_on(stream_id):
            self.session.consumed(stream_id, size)
        else:
            self._held[stream_id] = self._held.get(stream_id, 0) + size

    def _may_go_on(self, stream_id: int) -> bool:
        """The oldest body goes on whatever it takes: otherwise all could wait for each other."""
        stream = self.streams.get(stream_id)
        if stream is not None and stream.full():
            return False
        return self._gathered_bytes <= self.server.http2.max_gathered_bytes or stream_id == next(iter(self._gathered))

    def release(self, stream_id: int) -> None:
        """What a stream has gathered was used or thrown away."""
        self._gathered_bytes -= self._gathered.pop(stream_id, 0)
        held = self._held.pop(stream_id, 0)
        if held:
            self.session.consumed(stream_id, held)
        if self._held:
            self.let_go()

    def let_go(self) -> None:
        """Give held windows back as far as there is room."""
        for stream_id in [held for held in self._held if self._may_go_on(held)]:
            self.session.consumed(stream_id, self._held.pop(stream_id))
        self.flush_soon()

    # --- answers ---------------------------------------------------------------------------------------------

    def done(self, stream_id: int) -> None:
        """A stream has said everything."""
        self.release(stream_id)
        self.streams.pop(stream_id, None)
        self.flush_soon()

    def end_early(self, stream_id: int) -> None:
        """The answer is complete and the peer still sends: write it, then say that the rest is not wanted.

        An answer that the peer's window holds back would be lost by that: then the rest is only thrown away.
        """
        self.flush()
        if not self.session.queued(stream_id):
            self.session.reset(stream_id, NO_ERROR)

    def sent(self, size: int) -> None:
        """So many bytes of answers were handed to the session."""
        self._answered_bytes += size
        self.flush_soon()

    def overfull(self) -> bool:
        """The peer leaves too much of its answers untaken."""
        return self.session.queued() > self.server.http2.max_unsent_bytes

    def flush_soon(self) -> None:
        """Write once per turn of the loop, and not while a read is being handled: its end writes."""
        if not self._reading and not self._flush_due:
            self._flush_due = True
            self.loop.call_soon(self._flush_later)

    def _flush_later(self) -> None:
        self._flush_due = False
        self.flush()

    def flush(self) -> None:
        """Write what the session has to say, while the socket takes it."""
        transport = self.transport
        if transport.is_closing():
            return
        while not self._write_paused:
            data = self.session.out()
            if not data:
                break
            transport.write(data)
        if (self._ending and not self.streams and not self.session.queued()) or self.session.over():
            transport.close()

    async def until_taken(self, stream_id: int) -> None:
        """Wait while the peer leaves more than its share of this stream's answer."""
        while stream_id in self.streams and self.session.queued(stream_id) > self.server.http2.stream_unsent_bytes:
            self.taken.clear()
            await self.taken.wait()

    # --- time, bounds and the end ----------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Once a second: what has come too late, and who has gone silent."""
        settings = self.server.settings
        if not self._greeted and now - self._opened > settings.head_s:
            self.end(NO_ERROR)
            return
        for stream in [s for s in self.streams.values() if now - s.waiting_since() > settings.body_idle_s]:
            self._guard(stream, stream.give_up)
        self._check_progress(now)
        if self._pinged:
            if now - self._pinged > self.server.http2.keepalive_timeout_s:
                self.transport.abort()
        elif now - self._seen > self.server.http2.keepalive_s:
            self._pinged = now
            self.session.ping()
        age = self.server.http2.max_age_s
        if age and now - self._opened > age and not self._ending:
            self.drain()
        self.flush()

    def _check_progress(self, now: float) -> None:
        """A peer that takes nothing of what waits for it is cut off."""
        queued = self.session.queued() + self.transport.get_write_buffer_size()
        taken = self._answered_bytes - queued
        if not queued or taken != self._stalled_at:
            self._stalled_at, self._stalled_since = taken, now
            if queued:
                self.taken.set()
        elif now - self._stalled_since > self.server.settings.write_stall_s:
            self.transport.abort()

    def end(self, code: int) -> None:
        """Say why and close, whatever is in flight."""
        self._ending = True
        self.session.goaway(code)
        if not self._reading:
            self.flush()
        self.transport.close()

    def drain(self) -> None:
        """No new streams after a moment; close when the last one is answered."""
        self.session.announce_end()
        self.flush_soon()
        self.loop.call_later(_GOAWAY_PAUSE_S, self._last_call)

    def _last_call(self) -> None:
        if self.transport.is_closing():
            return
        self._ending = True
        self.session.goaway()
        for stream in tuple(self.streams.values()):
            self._guard(stream, stream.drain)
        self.flush()

    # What the listener says to its connections of either protocol when it ends:

    def announce_close(self) -> None:
        """Begin to end: see ``drain``."""
        self.drain()

    def shutdown(self) -> None:
        """Nothing more to do: the connection closes after its last stream."""
