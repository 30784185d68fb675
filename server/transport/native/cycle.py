"""One inference request on an HTTP/1.1 connection: admitted by its head, handed over with its body, answered once.

What is parsed, how requests follow each other and when one is overdue is the connection's business (``http1``).
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Final

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from server.codec import binary, pieces
from server.codec import json as json_codec
from server.errors import DeadlineExceeded, TidegateError, Unimplemented
from server.transport.answers import Answer, decision_headers, error_answer, header_value, too_large
from server.transport.bridge import telling
from server.transport.faults import Internal, RequestTimeout, check_version, new_id
from server.transport.http_infer import DECODED_LATE, LENGTH_HEADER, by_deadline
from server.transport.native.heads import lines_to_id, sizes_after_id
from server.types import (
    WRITING,
    Buffer,
    Decision,
    InferenceRequest,
    InferenceResponse,
    Permit,
    Reply,
    RequestHead,
    Ticket,
)

if TYPE_CHECKING:
    from server.transport.native.http1 import NativeHttp1

#: Pieces of an answer up to this size are joined before they are written; larger ones are not copied.
_JOINED_BYTES: Final = 64 * 1024
#: Names of this module's own are found faster than those of another module.
_SMALL_BODY_BYTES: Final[int] = pieces.SMALL_BODY_BYTES


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


def _decode(
    head: RequestHead, body: bytes, json_size: int | None, protocol: NativeHttp1, *, whole: bool
) -> InferenceRequest:
    if json_size == 0:
        spec, _ = protocol.server_side.catalog.metadata(head.model, head.version)
        return binary.decode_raw(body, model=head.model, version=head.version, spec=spec, whole=whole)
    return json_codec.decode_infer(
        body, model=head.model, version=head.version, limits=protocol.limits, json_size=json_size, whole=whole
    )
