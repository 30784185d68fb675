"""One HTTP/1.1 connection: the reference protocol with inference taken in front of the ASGI app, without a task.

Taken are requests whose answer needs nothing but the loop. What is unusual (a content coding, a JSON body that is to
be parsed off the loop, ``Expect``, a request that waits behind another on its connection) goes the reference way, which
answers the same.

A client's requests are alike: a head that was read before, byte for byte, is not parsed again when its whole body came
with it. What was learned from it is kept (``KnownHeads``), for all connections.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from server.codec import binary
from server.errors import InvalidArgument, TidegateError
from server.transport.answers import declared_length, metadata_of
from server.transport.http_infer import LENGTH_HEADER, deadline_of, match_infer
from server.transport.native.cycle import InferCycle
from server.transport.native.heads import KNOWN_HEAD_BYTES, Head, target_of
from server.transport.reference.asgi import HttpProtocol
from server.types import RequestHead, RequestLimits

if TYPE_CHECKING:
    from server.transport.native.server import NativeServer

#: Names of this module's own are found faster than those of another module.
_monotonic_ns: Final = time.monotonic_ns


class NativeHttp1(HttpProtocol):
    """One connection that speaks HTTP/1.1."""

    def __init__(self, server: NativeServer, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(server, config, state)
        self.server_side = server
        self.limits: RequestLimits = server.limits
        self.strict_json: bool = server.settings.strict_json
        #: Answers up to this size are never worked on off the loop.
        self.settled_bytes: int = server.settings.compress_over_bytes
        self._keep_alive_s: float = server.settings.keep_alive_s
        #: What answers are written to.
        self.client_side: Any = None
        self._due = 0.0
        self._on_due: Callable[[], None] | None = None
        self._body_from = 0.0
        self._started: Any = None
        self._peer = ""
        #: The newest request, where it came whole, known by its head, and nothing has happened since.
        self._repeated: InferCycle | None = None
        #: The last head that could be an inference: clients repeat themselves, and to compare costs less than to read.
        self._known: Head | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.client_side = self.transport
        if self.app is not self.config.loaded_app:  # over the limit
            self.server_side.refused += 1
        if self.client:
            self._peer = f"{self.client[0]}:{self.client[1]}"

    def connection_lost(self, exc: Exception | None) -> None:
        self._abandon()
        running = self._started
        if running is not None and not running.response_complete:  # others may wait behind it, of which it is not told
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. True: what is owed is written first; else the connection is closed now.

        Nothing is owed for a request that never came whole, nor for inference that runs or waits, be it for its turn to
        be written: callers who leave say no more than this either, and what they have queued would run in front of what
        others wait for. So nothing is owed behind one of these. Over TLS a connection ends as a whole.
        """
        if self._closing or self._refusal is not None or self._paced is not None or self.transport.is_closing():
            return False
        owed = list(takewhile(_is_owed, self._unanswered()))
        if not owed:
            return False
        last = self.cycle = owed[-1]
        while self.pipeline and self.pipeline[0][0] is not last:
            self.pipeline.popleft()
        last.keep_alive = False
        self._repeated = None
        self._disarm()
        return True

    def _unanswered(self) -> list[Any]:
        """Requests whose answers are not complete, in their order."""
        running = self._started
        waiting = [cycle for cycle, _ in reversed(self.pipeline)]
        return waiting if running is None or running.response_complete else [running, *waiting]

    def _abandon(self) -> None:
        """The newest request may wait in the pipeline behind the one that runs."""
        for cycle in (self.cycle, self._started):
            if isinstance(cycle, InferCycle):
                cycle.abandon()

    # --- parser callbacks ------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """As uvicorn's, but for the scope: most requests need none."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._begin_head()

    def _start_request(self) -> None:
        target = self._inference()
        if target is None:
            url, headers, expected = self.url, self.headers, self.expect_100_continue
            HttpToolsProtocol.on_message_begin(self)
            self.url, self.headers, self.expect_100_continue = url, headers, expected
            self.scope["headers"] = headers
            super()._start_request()
            return
        cycle = InferCycle(self, self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive())
        if self.server_side.draining:
            cycle.keep_alive = False
        self.cycle = self._started = cycle  # type: ignore[assignment]
        cycle.begin(target)

    def _inference(self) -> RequestHead | None:
        """The head, when this is an inference request that is to be taken here."""
        if (
            (self.cycle is not None and not self.cycle.response_complete)
            or self.expect_100_continue
            or self.flow.write_paused  # the reference way waits until the client has taken more
            or self.app is not self.config.loaded_app
            or self.parser.get_method() != b"POST"
        ):
            return None
        try:
            known = self._known
            if known is None or known.headers != self.headers or known.url != self.url:
                known = self._read_head()
                self._known = known if self._head_bytes <= KNOWN_HEAD_BYTES else None
            return self._request_head(known)
        except TidegateError:
            return None  # refused the reference way

    def _request_head(self, known: Head) -> RequestHead | None:
        """Raises TidegateError when the deadline cannot be read."""
        if known.target is None:
            return None
        received_ns = _monotonic_ns()
        deadline_ns = deadline_of(known.metadata, received_ns) if known.limited else 0
        model, version = known.target
        return RequestHead(
            "http", model, version, known.metadata, received_ns, deadline_ns, known.length, self._peer,
            known.traceparent,
        )  # fmt: skip

    def _read_head(self) -> Head:
        """What target and headers say. Raises TidegateError."""
        metadata = metadata_of(self.headers)
        length = declared_length(metadata)
        target = target_of(self.url)
        if "content-encoding" in metadata or _leaves_loop(metadata, length, self.server_side):
            target = None
        return Head(self.url, self.headers, target, metadata, length)

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if isinstance(cycle, InferCycle) and not cycle.response_complete:
            cycle.body(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        cycle = self.cycle
        if self._upgrading:
            return  # the head alone, which is parsed again: what runs is the request before it
        if not isinstance(cycle, InferCycle):
            super().on_message_complete()
        elif cycle.response_complete:
            cycle.more_body = False
            self._disarm()
        else:
            self._disarm()
            cycle.complete()

    def data_received(self, data: bytes) -> None:
        raw, known = b"", self._known
        if self._between_requests():
            if known is not None and known.raw and data.startswith(known.raw):
                raw = known.raw  # to be told from the newest costs less than to find where a head ends
            else:
                raw = data[: data.find(b"\r\n\r\n") + 4]
                known = self.server_side.heads.get(raw)
        if raw and known is not None and known.length == len(data) - len(raw):
            head = self._request_head(known)
            if head is not None:
                self._due = math.inf  # what was due, if anything, is the end of idleness: it is so again when answered
                if self._repeated is None:
                    self._unset_keepalive_if_required()
                self._known = known  # as everywhere, that of the newest request taken here: ``_learn`` goes by it
                repeated = self._repeated = InferCycle(self, not self.server_side.draining)
                self.cycle = self._started = repeated  # type: ignore[assignment]
                repeated.repeat(head, data[len(raw) :], known.json_size)
                return
        self._repeated = None
        before: Any = self.cycle
        super().data_received(data)
        cycle = self.cycle
        if self._closing or self._refusal is not None or not isinstance(cycle, InferCycle):
            return
        if cycle.more_body and not cycle.response_complete:
            self._bound_body(cycle)
        elif raw and cycle is not before:
            self._learn(raw, len(data) - len(raw), cycle)

    def _between_requests(self) -> bool:
        """Whether the next byte begins a request that may be answered at once."""
        repeated = self._repeated
        if repeated is not None and repeated.response_complete and repeated.keep_alive:
            return True  # it was so before that request
        cycle = self.cycle
        return (
            (cycle is None or (cycle.response_complete and not cycle.more_body and cycle.keep_alive))
            and not (self._head_open or self._closing or self._upgrading or self.flow.write_paused)
            and self._refusal is None
            and self.app is self.config.loaded_app
        )

    def _learn(self, raw: bytes, size: int, cycle: InferCycle) -> None:
        """Keep the head of the one request that came, when it alone says how the connection goes on."""
        known = self._known
        if known is None or known.length != size or not cycle.keep_alive or cycle.more_body or self._head_open:
            return
        # A parser may take a line feed alone for the end of a line, and then the head has ended before ``raw`` does.
        if raw.endswith(b"\r\n\r\n") and raw.count(b"\n") == raw.count(b"\r\n"):
            with suppress(InvalidArgument):  # one that says it wrongly is read, and refused, each time
                known.json_size = binary.parse_header_length(known.metadata.get(LENGTH_HEADER), size)
                self.server_side.heads.learn(raw, known)

    def _send_refusal(self, error: TidegateError) -> None:
        super()._send_refusal(error)
        self._abandon()

    def _close_gently(self) -> None:
        self._repeated = None
        super()._close_gently()

    def pause_writing(self) -> None:
        self._repeated = None
        super().pause_writing()

    def _bound_idleness(self) -> None:
        if self._on_due is None:
            super()._bound_idleness()

    def _bound_body(self, cycle: InferCycle) -> None:
        """The rest of the body may take so long."""
        settings, now = self.server_side.settings, self.server_side.now
        if self._on_due is None:
            self._body_from = now
        left = min(settings.body_idle_s, self._body_from + settings.body_total_s - now)
        deadline = cycle.seconds_left()
        self._arm(min(left, deadline), cycle.too_late if left < deadline else cycle.deadline_passed)

    # --- answers ---------------------------------------------------------------------------------------------

    def answered(self, cycle: InferCycle) -> None:
        """The answer of ``cycle`` is out: go on, or end."""
        if cycle is self._repeated and cycle.keep_alive:
            self._due = self.server_side.now + self._keep_alive_s
            if self._on_due is None:
                self._on_due = self._idle_expired
        elif self.transport.is_closing():
            return
        elif not cycle.keep_alive:
            if cycle.more_body or self.pipeline:
                self._close_gently()
            else:
                self.transport.close()
        elif self.pipeline or self._refusal is not None or cycle.more_body:
            self.on_response_complete()
        elif not self._head_open:
            self._arm(self._keep_alive_s, self._idle_expired)

    def later(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A request or an answer that takes long to read or write."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    # --- timers: none of their own, the server looks at them once in a while ---------------------------------

    def _arm(self, seconds: float, expired: Callable[[], None]) -> None:
        self._due = self.server_side.now + seconds
        self._on_due = expired

    def _disarm(self) -> None:
        self._on_due = None

    def sweep(self, now: float) -> None:
        """Once in a while: whatever is overdue, and how far a slow reader has come."""
        if self._unsent:
            self._count_unsent(self.transport.get_write_buffer_size())
        expired = self._on_due
        if expired is not None and now >= self._due:
            self._on_due = None
            expired()


def _is_owed(cycle: Any) -> bool:
    """Whether a request is answered although its client sends no more."""
    if isinstance(cycle, InferCycle):
        return cycle.answering
    return not cycle.more_body and (cycle.response_started or match_infer(cycle.scope["raw_path"]) is None)


def _leaves_loop(metadata: dict[str, str], length: int | None, server: NativeServer) -> bool:
    """Whether the body is JSON that may be too large to be parsed on the loop."""
    if length is not None and length <= server.settings.offload_bytes:
        return False
    header = metadata.get(LENGTH_HEADER)
    # More digits than any limit has are too many for ``int``, too.
    return header is None or not header.isdecimal() or len(header) > 20 or int(header) > server.settings.offload_bytes
