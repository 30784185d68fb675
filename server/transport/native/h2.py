"""One HTTP/2 connection: a session on a socket, its streams, its bounds and its end.

What a stream is, is decided by its head: gRPC calls go to ``unary`` and ``streams``, everything else to the ASGI app.
Trouble of one stream never reaches its neighbours: whatever is raised while a stream is handled ends that stream.

**Memory.** What a connection may send before it is read is bounded by windows (see ``windows``). Answers that the peer
does not take count too: over ``max_unsent_bytes`` new calls are refused here, over ``types.Unsent`` on all connections,
and after a while without progress the connection is cut.

**Ends.** Over the last word the socket is only half closed, and what still comes is thrown away for a while: closing at
once, with bytes unread, would reset the connection and take the last answers from under the peer's hands.
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
from server.transport.native.windows import ReceiveWindows

if TYPE_CHECKING:
    from server.transport.native.server import NativeServer

#: Frames that carry nothing for a stream: so many at once, so many per second, and some more for each answer: clients
#: ask for round-trip times (PING) and give windows back as fast as they are answered.
_IDLE_FRAMES: Final = (2000, 200.0)
_EARNED_BY_ANSWER: Final = 4
_EARNED_PER_BYTE: Final = 1 / 1024
#: A call that its caller gave up may have had a window of its own; how many resets there may be is bounded for itself.
_EARNED_BY_RESET: Final = 2
#: Answers earn up to here, time up to the burst: a large answer is given back in many pieces, and at once.
_EARNED_MOST: Final = 32_768
#: Bytes in a row that bring no event at all: PRIORITY, unknown frames; and what was on its way to streams that were
#: refused, which is the longest honest run.
_SILENT_BYTES: Final = 32 * 1024 * 1024
#: Handed to the socket at once.
_PIECE_BYTES: Final = 256 * 1024
#: Answers over this size count from the moment when they are made; smaller ones when the connection is swept.
_LARGE_BYTES: Final = 64 * 1024
#: After the last answer: how long the peer may take to close.
_LINGER_S: Final = 1.0
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

    def unread(self) -> bool:
        """Some of the body waits for a reader of its own, who goes on without more of it."""
        ...

    def overdue(self, now: float) -> bool:
        """More of the body is waited for, and it did not come in time. ``now`` is the server's clock."""
        ...

    def give_up(self) -> None:
        """It is overdue: answer so."""
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
        self._silent = 0  # bytes since the last event
        #: Answered in full while the peer still sends: see ``end_early``. With it, whether windows hold nothing back.
        self._early: dict[int, bool] = {}
        self.windows = ReceiveWindows(self.session.consumed, self._full, self._unread, server.http2.max_gathered_bytes)
        #: Tasks of the ASGI app that still run, whether their streams are gone or not.
        self.tasks: set[asyncio.Task[None]] = set()
        self._answered_bytes = 0  # handed to the session
        self._taken_bytes = 0  # so many of them at least: see ``overfull``
        self._large = False  # answers wait, or did when they were last counted
        self._owed = 0  # bytes of answers that are being written down
        self._unsent = 0  # so many bytes of either
        self._stalled_at = 0
        self._opened = self._seen = self._stalled_since = server.now
        self._pinged = 0.0
        self._idle_frames: float = float(_IDLE_FRAMES[0])
        self._idle_counted = server.now
        self._greeted = False  # its first SETTINGS has come
        self._announced = False  # the first GOAWAY is out
        self._ending = False  # the last one is: no new streams
        self._linger: float | None = None  # nothing more is said; until then the peer may close
        self._discarded = 0
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
            self.server.refused += 1
            self.end(ENHANCE_YOUR_CALM)
        elif self.server.draining:
            self.drain()
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.live.discard(self)
        self._drop_streams()
        self._owed = 0
        self._count_unsent(0)
        if self.session.queued():
            self.session.drop()  # what is held of this connection by others lives until the next round of the collector
        self.server.connection_lost()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self.flush()

    def data_received(self, data: bytes) -> None:
        if self._over():
            self._discard(len(data))
            return
        self._seen = self.server.now
        self._pinged = 0.0
        self._reading = True
        try:
            events = self.session.feed(data)
            for event in events:
                self._take(event)
                if self._over():
                    return
        except SessionOver:
            self._finish(self.server.settings.discard_s)
            return
        finally:
            self._reading = False
        if events:
            self._silent = 0
        else:
            self._count_silent(len(data))
        self.flush()

    def _over(self) -> bool:
        """Nothing more is said. Asked by a call where an event may change it: compiled code relies on what mypy infers,
        and mypy takes an attribute that was None to be None until it is assigned in the same function.
        """
        return self._linger is not None

    def _count_silent(self, size: int) -> None:
        self._silent += size
        if self._silent > _SILENT_BYTES:
            self.end(ENHANCE_YOUR_CALM)

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
            self._idle_frame()
        elif kind is ConnectionClosed:
            self._ending = True
        else:
            self._greeted = self._greeted or kind is SettingsReceived
            self._idle_frame()

    def _open(self, event: Any) -> None:
        stream_id, ended = event.stream_id, event.end_stream
        try:
            stream = self.server.open_stream(self, stream_id, event.headers, ended)
        except Exception as error:  # noqa: BLE001 - the boundary of one stream
            self._log.error("stream_failed", exc_info=error)
            self.session.reset(stream_id, INTERNAL_ERROR)
            return
        if stream is not None:
            self.streams[stream_id] = stream
            if ended:
                self._feed(stream, b"", True)

    def _body(self, event: Any) -> None:
        stream_id, data, ended = event.stream_id, event.data, event.end_stream
        stream = self.streams.get(stream_id)
        if stream is None:
            self.session.consumed(stream_id, len(data))
            return
        if data:
            if ended:
                self.session.consumed(stream_id, len(data))  # at most a frame: nothing more comes that could add to it
            else:
                self.windows.came(stream_id, len(data))
        elif not ended:
            self._idle_frame()
        try:
            stream.data(data, ended)
        except Exception as error:  # noqa: BLE001 - the boundary of one stream: its neighbours go on
            self._guard(stream, partial(stream.fail, error))

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
        self.windows.forget(stream_id)
        if self._early:
            self._early.pop(stream_id, None)
        if stream_id in self.streams:  # not answered yet
            stream = self.streams.pop(stream_id)
            self._idle_frames += _EARNED_BY_RESET
            self._guard(stream, stream.gone)
            self.taken.set()

    def _idle_frame(self) -> None:
        """Frames that move nothing are cheap, not free."""
        now = self.server.now
        burst, rate = _IDLE_FRAMES
        left = min(self._idle_frames, _EARNED_MOST)
        self._idle_frames = max(left, min(burst, left + (now - self._idle_counted) * rate)) - 1
        self._idle_counted = now
        if self._idle_frames < 0:
            self.end(ENHANCE_YOUR_CALM)

    def _full(self, stream_id: int) -> bool:
        stream = self.streams.get(stream_id)
        return stream is not None and stream.full()

    def _unread(self, stream_id: int) -> bool:
        stream = self.streams.get(stream_id)
        return stream is not None and stream.unread()

    def used(self, stream_id: int, size: int) -> None:
        """A stream has used so much of its body."""
        self.windows.used(stream_id, size)
        self.flush_soon()

    def kept(self, stream_id: int, size: int) -> None:
        """A stream has thrown its body away, but for so much that it will use."""
        self.windows.keep(stream_id, size)
        self.flush_soon()

    # --- answers ---------------------------------------------------------------------------------------------

    def done(self, stream_id: int, size: int = 0) -> None:
        """A stream has said everything, the last ``size`` bytes of it with this."""
        self.windows.forget(stream_id)
        self.streams.pop(stream_id, None)
        self._answered_bytes += size
        if size > _LARGE_BYTES:
            self._count_large(size)
        self._idle_frames += _EARNED_BY_ANSWER
        if size:
            self._idle_frames += _EARNED_BY_ANSWER + size * _EARNED_PER_BYTE
        if not self._flush_due:
            self.flush_soon()

    def end_early(self, stream_id: int, *, bare: bool = False) -> None:
        """The answer is complete and the peer still sends: say that the rest is not wanted, once the answer is out.

        A reset that overtakes an answer takes it away, so one that the peer's windows hold back is waited for. They do
        not hold one that is ``bare``: a head and nothing else.
        """
        self._early[stream_id] = bare

    def sent(self, size: int) -> None:
        """So many bytes of answers were handed to the session."""
        self._answered_bytes += size
        if size > _LARGE_BYTES:
            self._count_large(size)
        self._idle_frames += _EARNED_BY_ANSWER + size * _EARNED_PER_BYTE
        if not self._flush_due:
            self.flush_soon()

    def overfull(self) -> bool:
        """The peer leaves too much of its answers untaken."""
        limit = self.server.http2.max_unsent_bytes
        if self._answered_bytes - self._taken_bytes <= limit:
            return False  # even if it has taken nothing since it was counted: to count costs as much as to admit a call
        untaken = self._untaken()
        self._taken_bytes = self._answered_bytes - untaken
        return untaken > limit

    def _untaken(self) -> int:
        """Bytes of answers in the session and in the socket's buffer."""
        return self.session.queued() + int(self.transport.get_write_buffer_size())

    def _count_unsent(self, untaken: int) -> None:
        self._large = untaken > 0
        self._unsent = self.server.unsent.moved(self._unsent, self._owed + untaken)

    def _count_large(self, size: int) -> None:
        """An answer that no one has tried to write yet: whoever is answered before that sees it, too."""
        if not self.transport.is_closing():  # nobody would count again
            self._count_unsent(self._unsent - self._owed + size)

    def owe(self, size: int) -> None:
        """So many more bytes of answers are being written down, or fewer: see ``bridge.Owed``."""
        if self in self.server.live:  # one that is lost counts no more
            self._owed += size
            self._unsent = self.server.unsent.moved(self._unsent, self._unsent + size)

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
        if self._linger is not None or self.transport.is_closing():
            return
        written = self._write() and (not self._early or not self._stop_early() or self._write())
        if self._large:
            self._count_unsent(self._untaken())
        if not written:
            return
        if self.session.over():
            self._finish(min(_LINGER_S, self.server.settings.discard_s))

    def _write(self) -> bool:
        """True when everything is written that may be; False when the socket takes no more now."""
        while not self._write_paused:
            data = self.session.out(_PIECE_BYTES)
            if not data:
                return True
            self.transport.write(data)
            self.taken.set()
        return False

    def _stop_early(self) -> bool:
        """Reset streams whose answers are out and whose peer still sends."""
        out = [stream_id for stream_id, bare in self._early.items() if bare or self.session.said(stream_id)]
        for stream_id in out:
            del self._early[stream_id]
            self.session.reset(stream_id, NO_ERROR)
        return bool(out)

    async def until_taken(self, stream_id: int) -> None:
        """Wait while the peer leaves more than its share of this stream's answer."""
        while stream_id in self.streams and self.session.queued(stream_id) > self.server.http2.stream_unsent_bytes:
            self.taken.clear()
            await self.taken.wait()

    # --- time, bounds and the end ----------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Once in a while: what has come too late, and who has gone silent."""
        if self._linger is not None:
            self._check_linger(now, self._linger)
            return
        if not self._greeted and now - self._opened > self.server.settings.head_s:
            self.end(NO_ERROR)
            return
        for stream in [s for s in self.streams.values() if s.overdue(now)]:
            self._guard(stream, stream.give_up)
        self.windows.let_go()
        self._check_progress(now)
        self._check_alive(now)
        age = self.server.http2.max_age_s
        if age and now - self._opened > age and not self._announced:
            self.drain()
        self.flush()

    def _check_alive(self, now: float) -> None:
        if self._pinged:
            if now - self._pinged > self.server.http2.keepalive_timeout_s:
                self.transport.abort()
        elif now - self._seen > self.server.http2.keepalive_s:
            self._pinged = now
            self.session.ping()

    def _check_progress(self, now: float) -> None:
        """A peer that takes nothing of what waits for it is cut off."""
        queued = self._untaken()
        self._count_unsent(queued)
        taken = self._answered_bytes - queued
        waited_for = queued or (self._ending and not self.streams)  # for the windows that the ends of answers need
        if not waited_for or taken != self._stalled_at:
            self._stalled_at, self._stalled_since = taken, now
            if queued:
                self.taken.set()
        elif now - self._stalled_since > self.server.settings.write_stall_s:
            self.transport.abort()

    def end(self, code: int) -> None:
        """Say why and close, whatever is in flight."""
        self.session.goaway(code)
        self._finish(self.server.settings.discard_s)

    def _finish(self, linger_s: float) -> None:
        """Write the last word, drop what is in flight, and wait a moment for the peer to have read it."""
        if self._linger is not None or self.transport.is_closing():
            return
        data = self.session.out(_PIECE_BYTES)
        if data:
            self.transport.write(data)
        self._linger = self.server.now + linger_s
        self._drop_streams()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def _drop_streams(self) -> None:
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            self._guard(stream, stream.gone)
        self.taken.set()

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > self.server.settings.discard_bytes:
            self.transport.abort()

    def _check_linger(self, now: float, until: float) -> None:
        if self.transport.get_write_buffer_size():
            self._check_progress(now)
        elif now > until:
            self.transport.abort()

    def drain(self) -> None:
        """No new streams after a moment; close when the last one is answered."""
        if not self._announced:
            self._announced = True
            self.session.announce_end()
            self.flush_soon()
        self.loop.call_later(_GOAWAY_PAUSE_S, self._last_call)

    def _last_call(self) -> None:
        if self._linger is not None or self.transport.is_closing():
            return
        if not self._ending:
            self._ending = True
            self.session.goaway()
        if self.server.draining:
            for stream in tuple(self.streams.values()):
                self._guard(stream, stream.drain)
        self.flush()

    # What the listener says to its connections of either protocol when it ends:

    def announce_close(self) -> None:
        """Begin to end: see ``drain``."""
        self.drain()

    def shutdown(self) -> None:
        """Nothing more to do: the connection closes after its last stream."""
