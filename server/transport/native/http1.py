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

import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from server.codec import binary, pieces
from server.codec import json as json_codec
from server.errors import DeadlineExceeded, InvalidArgument, TidegateError, Unimplemented
from server.transport.answers import (
    Answer,
    decision_headers,
    declared_length,
    error_answer,
    header_value,
    metadata_of,
    too_large,
)
from server.transport.bridge import telling
from server.transport.faults import Internal, RequestTimeout, check_version, new_id
from server.transport.http_infer import (
    DECODED_LATE,
    LENGTH_HEADER,
    by_deadline,
    deadline_of,
    match_infer,
)
from server.transport.native.heads import KNOWN_HEAD_BYTES, Head, lines_to_id, sizes_after_id, target_of
from server.transport.reference.asgi import HttpProtocol
from server.types import (
    WRITING,
    Buffer,
    Decision,
    InferenceRequest,
    InferenceResponse,
    Permit,
    Reply,
    RequestHead,
    RequestLimits,
    Ticket,
)

if TYPE_CHECKING:
    from server.transport.native.server import NativeServer

#: Pieces of an answer up to this size are joined before they are written; larger ones are not copied.
_JOINED_BYTES: Final = 64 * 1024
#: Names of this module's own are found faster than those of another module.
_SMALL_BODY_BYTES: Final[int] = pieces.SMALL_BODY_BYTES
_monotonic_ns: Final = time.monotonic_ns


class InferCycle(Reply):
    """One inference request on a connection. It is its own ``Reply``, and stands where uvicorn keeps its cycles."""

    __slots__ = (
        "_answers",
        "_decision",
        "_handed",
        "_head",
        "_parts",
        "_permit",
        "_protocol",
        "_request",
        "_response",
        "_size",
        "_ticket",
        "_working",
        "disconnected",
        "keep_alive",
        "message_event",
        "more_body",
        "response_complete",
        "response_started",
    )

    def __init__(self, protocol: NativeHttp1, keep_alive: bool) -> None:
        self._protocol = protocol
        self._head: RequestHead | None = None
        self._permit: Permit | None = None
        self._ticket: Ticket | None = None
        self._working: asyncio.Task[None] | None = None  # on its body or its answer
        self._request: InferenceRequest | None = None
        self._response: InferenceResponse | None = None
        self._decision: Decision | None = None
        self._answers = 0
        self._handed = False  # to the port, which counts it from then on
        self._parts: list[bytes] = []
        self._size = 0
        # What the connection's own code reads and sets on whatever stands here:
        self.keep_alive = keep_alive
        self.more_body = True
        self.response_started = self.response_complete = self.disconnected = False
        self.message_event = protocol.server_side.no_event

    # --- the request -----------------------------------------------------------------------------------------

    def begin(self, head: RequestHead) -> None:
        """Admit. Raises nothing: a refusal is answered."""
        self._head = head
        try:
            limit, length = self._protocol.limits.max_body_bytes, head.content_length
            if length is not None and length > limit:
                raise too_large(length, limit)
            if head.version:
                check_version(head.version)
            self._permit = self._protocol.server_side.port.admit(head)
        except TidegateError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the boundary of one request: logged here, no text to the client
            self._crash(error)

    def body(self, data: bytes) -> None:
        """A piece of the body."""
        self._size += len(data)
        limit = self._protocol.limits.max_body_bytes
        if self._size > limit:
            self._fail(too_large(self._size, limit))
            return
        self._parts.append(data)
        permit, head = self._permit, self._head
        if permit is not None and head is not None and head.content_length is None:
            try:
                permit.hold(self._size)
            except TidegateError as error:
                self._fail(error)

    def complete(self) -> None:
        """The body is there: decode, and hand over to the port."""
        self.more_body = False
        try:
            self._start()
        except TidegateError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the boundary of one request: logged here, no text to the client
            self._crash(error)

    def repeat(self, head: RequestHead, body: bytes, json_size: int | None) -> None:
        """A whole request at once, of whose JSON part the size is known."""
        self.more_body = False
        self.begin(head)
        if self.response_complete:
            return
        try:
            self._take(body, json_size)
        except TidegateError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the boundary of one request: logged here, no text to the client
            self._crash(error)

    def _start(self) -> None:
        parts, self._parts = self._parts, []
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        head = self._head
        if head is not None:
            self._take(body, binary.parse_header_length(head.metadata.get(LENGTH_HEADER), len(body)))

    def _take(self, body: bytes, json_size: int | None) -> None:
        head, permit = self._head, self._permit
        if head is None or permit is None:
            return
        large = len(body) > _SMALL_BODY_BYTES
        request = self._request = _decode(head, body, json_size, self._protocol, whole=not large)
        if large and pieces.unfinished(request):
            self._working = self._protocol.later(self._finish_later(head, permit, request))
        else:
            self._submit(permit, request)

    def _submit(self, permit: Permit, request: InferenceRequest) -> None:
        self._handed = True
        ticket = self._protocol.server_side.port.handle(permit, request, self)
        if not self.response_complete:
            self._ticket = ticket

    async def _finish_later(self, head: RequestHead, permit: Permit, request: InferenceRequest) -> None:
        """Contents that take long to read are read by turns with other requests."""
        work = self._protocol.server_side.infer.turns.take(pieces.finish(request))
        try:
            await by_deadline(work, head.deadline_ns, DECODED_LATE)
            self._submit(permit, request)
        except TidegateError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the boundary of one request: logged here, no text to the client
            self._crash(error)

    def seconds_left(self) -> float:
        """Until the deadline."""
        until_ns = 0 if self._head is None else self._head.deadline_ns
        return (until_ns - time.monotonic_ns()) / 1e9 if until_ns else math.inf

    def too_late(self) -> None:
        """The body did not come in time."""
        settings = self._protocol.server_side.settings
        self._fail(
            RequestTimeout(
                f"the request body did not arrive in time: no data for {settings.body_idle_s:g} s, "
                f"or over {settings.body_total_s:g} s"
            )
        )

    def deadline_passed(self) -> None:
        """The deadline came before the body was complete."""
        self._fail(DeadlineExceeded("the deadline passed before the request body was complete"))

    @property
    def answering(self) -> bool:
        """It has been run, and what was found is being written down, without a wait for others' turns."""
        response = self._response
        return response is not None and not pieces.has_many(response)

    # --- Reply -----------------------------------------------------------------------------------------------

    def message(self, response: InferenceResponse, decision: Decision) -> None:
        self._answers += 1
        self._response, self._decision = response, decision

    def finish(self, error: TidegateError | None) -> str | None:
        if error is not None:
            self._fail(error)  # raised, it would be held by its own traceback, and with it what the callers hold
            return None
        try:
            return self._answer()
        except TidegateError as refusal:
            self._fail(refusal)
            return refusal.code
        except Exception as failure:  # noqa: BLE001 - the boundary of one request: logged here, no text to the client
            self._crash(failure)
            return Internal.code

    def _answer(self) -> str | None:
        head, request, response = self._head, self._request, self._response
        if self._answers > 1:
            raise Unimplemented("this model gave several answers to one request: call it with ModelStreamInfer")
        if response is None or request is None or head is None:
            raise Internal(self._tidegate_id())
        protocol = self._protocol
        size = pieces.wire_bytes(response.outputs)
        if size > protocol.settled_bytes and (
            size > protocol.server_side.settings.offload_bytes
            or "accept-encoding" in head.metadata
            or pieces.has_many(response)
        ):
            return self._write_later(head, request, response, size)
        chunks, json_size = json_codec.encode_infer(
            response,
            outputs=request.outputs,
            binary_default=request.binary_output,
            strict_json=protocol.strict_json,
        )
        length = 0
        for chunk in chunks:
            length += len(chunk)
        if length > protocol.settled_bytes and "accept-encoding" in head.metadata:
            return self._write_later(head, request, response, length)  # as JSON it is longer than its tensors
        self._write(-1 if json_size is None else json_size, chunks, length)
        return None

    def _write_later(self, head: RequestHead, request: InferenceRequest, response: InferenceResponse, size: int) -> str:
        """In a task, which may leave the loop."""
        self._protocol.owe(size)
        self._working = self._protocol.later(self._answer_later(head, request, response))
        return WRITING

    async def _answer_later(self, head: RequestHead, request: InferenceRequest, response: InferenceResponse) -> None:
        """Large answers are encoded, and compressed, off the loop."""
        try:
            with telling(self._ticket):
                answer = await self._protocol.server_side.infer.encode(head, request, response)
            self._send(answer)
        except TidegateError as error:
            self._send(error_answer(error, self._protocol.server_side.statuses))
        except Exception as error:  # noqa: BLE001 - the boundary of one request
            self._crash(error)
        finally:
            self._protocol.owe(0)

    def _crash(self, error: Exception) -> None:
        tidegate_id = self._tidegate_id()
        structlog.get_logger("tidegate.http").error("request_failed", id=tidegate_id, protocol="http", exc_info=error)
        self._fail(Internal(tidegate_id))

    def _fail(self, error: TidegateError) -> None:
        self._parts.clear()  # the cycle stays with its connection until the next one, and its permit is given back
        if not self.response_complete:
            if not self._handed:
                self._protocol.server_side.port.refuse(error)
            self._send(error_answer(error, self._protocol.server_side.statuses))

    def _tidegate_id(self) -> str:
        return new_id() if self._permit is None else self._permit.tidegate_id

    # --- the answer ------------------------------------------------------------------------------------------

    def _write(self, json_size: int, chunks: list[Buffer], length: int) -> None:
        """The usual answer: one join of what is known already. ``json_size`` -1: all is JSON."""
        if self.disconnected:
            self._over()
            return
        decision, permit = self._decision, self._permit
        if decision is None or permit is None:
            raise Internal(self._tidegate_id())
        sizes = sizes_after_id(json_size, length, self.keep_alive)
        trace = permit.traceresponse
        if trace:
            sizes = b"\r\ntraceresponse: " + header_value(trace) + sizes
        status = self._protocol.server_side.status_ok
        self._out([status, lines_to_id(decision), permit.tidegate_id.encode(), sizes, *chunks], length)

    def _send(self, answer: Answer) -> None:
        """Any other answer."""
        if self.disconnected or self.response_complete:
            self._over()
            return
        permit, protocol = self._permit, self._protocol
        headers = [
            *protocol.server_side.default_headers,
            *answer.headers,
            *decision_headers(self._tidegate_id(), self._decision, None if permit is None else permit.traceresponse),
        ]
        if any(name == b"connection" for name, _ in answer.headers):
            self.keep_alive = False
        elif not self.keep_alive:
            headers.append((b"connection", b"close"))
        length = sum(map(len, answer.chunks))
        lines = [b"%b: %b\r\n" % header for header in headers]
        head = b"".join([STATUS_LINE[answer.status], *lines, b"content-length: %d\r\n\r\n" % length])
        self._out([head, *answer.chunks], length)

    def _out(self, parts: list[Buffer], length: int) -> None:
        self.response_started = self.response_complete = True
        self._over()
        protocol = self._protocol
        if length > _JOINED_BYTES:
            protocol.client_side.writelines(parts)
        else:
            protocol.client_side.write(b"".join(parts))
        protocol.answered(self)

    def abandon(self) -> None:
        """The client is gone."""
        self.disconnected = True
        if self._working is not None:
            self._working.cancel()
        if not self.response_complete:
            self._over()

    def _over(self) -> None:
        ticket, permit = self._ticket, self._permit
        self._ticket = self._permit = self._request = self._response = None
        if ticket is not None:
            ticket.cancel()
        if permit is not None:
            permit.release()


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


def _decode(
    head: RequestHead, body: bytes, json_size: int | None, protocol: NativeHttp1, *, whole: bool
) -> InferenceRequest:
    if json_size == 0:
        spec, _ = protocol.server_side.catalog.metadata(head.model, head.version)
        return binary.decode_raw(body, model=head.model, version=head.version, spec=spec, whole=whole)
    return json_codec.decode_infer(
        body, model=head.model, version=head.version, limits=protocol.limits, json_size=json_size, whole=whole
    )
