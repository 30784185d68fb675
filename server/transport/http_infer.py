"""``POST /v2/models/{m}[/versions/{v}]/infer`` as a bare ASGI callable, standing in front of every other route.

The path is matched by string operations, since a router costs more than the rest of the transport. Admission comes
before the body: what is refused there is never read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypedDict, TypeVar
from urllib.parse import unquote_to_bytes

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from server.codec import binary, compression, pieces
from server.codec import json as json_codec
from server.codec.process.client import CodecProcess
from server.codec.process.link import Unavailable
from server.codec.process.steps import Turns
from server.errors import Cancelled, DeadlineExceeded, InvalidArgument, TidegateError
from server.transport.answers import (
    JSON,
    Answer,
    BodyReader,
    HttpSettings,
    decision_headers,
    declared_length,
    error_answer,
    metadata_of,
    too_large,
)
from server.transport.bridge import OWED, SingleReply, telling
from server.transport.faults import Internal, MethodNotAllowed, check_version, new_id
from server.transport.offload import Offload
from server.transport.port import Catalog
from server.transport.status import StatusTable
from server.types import (
    Buffer,
    Decision,
    InferenceRequest,
    InferenceResponse,
    Permit,
    Port,
    RequestedOutput,
    RequestHead,
    Ticket,
)

TIMEOUT_HEADER: Final = "x-tidegate-timeout-ms"
MAX_TIMEOUT_MS: Final = 10**12 - 1
LENGTH_HEADER: Final = "inference-header-content-length"
_LENGTH_HEADER_BYTES: Final = LENGTH_HEADER.encode()
_OCTETS: Final = (b"content-type", b"application/octet-stream")
_PREFIX: Final = b"/v2/models/"
_SUFFIX: Final = b"/infer"
_T = TypeVar("_T")
DECODED_LATE: Final = "the deadline passed before the request body was decoded"
ANSWERED_LATE: Final = "the deadline passed before the answer was written"


class _Options(TypedDict):
    """How an answer is to be written."""

    outputs: list[RequestedOutput]
    binary_default: bool
    strict_json: bool


def match_infer(raw_path: bytes) -> tuple[bytes, bytes] | None:
    """(model, version) as they stand in the path, still percent-encoded, or None when it is another route."""
    if not (raw_path.startswith(_PREFIX) and raw_path.endswith(_SUFFIX)):
        return None
    match raw_path[len(_PREFIX) : -len(_SUFFIX)].split(b"/"):
        case [model] if model:
            return model, b""
        case [model, b"versions", version] if model and version:
            return model, version
    return None


def decoded(raw: bytes) -> str:
    """A name as it stands in a path. Raises InvalidArgument."""
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise InvalidArgument("the model name or version in the path is not UTF-8") from None


def deadline_of(metadata: dict[str, str], received_ns: int) -> int:
    """Monotonic deadline from ``x-tidegate-timeout-ms``; 0 when the header is absent."""
    text = metadata.get(TIMEOUT_HEADER)
    if text is None:
        return 0
    # Twenty digits are far more than the largest needs: int takes no time over them.
    if not (text.isascii() and text.isdecimal() and len(text) <= 20 and 0 < int(text) <= MAX_TIMEOUT_MS):
        raise InvalidArgument(
            f"header {TIMEOUT_HEADER} must be a whole number of milliseconds from 1 to {MAX_TIMEOUT_MS}, "
            f"got {text[:64]!r}"
        )
    return received_ns + int(text) * 1_000_000


class _Call:
    """What is known of one request so far, for its answer's headers."""

    __slots__ = ("_own_id", "decision", "handed", "permit")

    def __init__(self) -> None:
        self._own_id = ""
        self.permit: Permit | None = None
        self.decision: Decision | None = None
        self.handed = False  # to the port, which counts it from then on

    @property
    def id(self) -> str:
        """The gateway's, or one of our own for what was refused before the gateway gave one."""
        if self.permit is not None:
            return self.permit.tidegate_id
        self._own_id = self._own_id or new_id()
        return self._own_id


class InferApp:
    """ASGI: takes inference calls to the port and hands every other request to ``fallback``.

    ``codec``: who parses and writes large JSON; None, and whenever it cannot: threads of this process.
    """

    def __init__(
        self,
        port: Port,
        catalog: Catalog,
        fallback: ASGIApp,
        *,
        statuses: StatusTable,
        settings: HttpSettings,
        codec: CodecProcess | None = None,
    ) -> None:
        self._port = port
        self._catalog = catalog
        self._fallback = fallback
        self._statuses = statuses
        self._settings = settings
        self._codec = codec
        self._reader = BodyReader(settings)
        self._offload = Offload(settings.offload_threads)
        #: Of whatever is read or written in ``pieces``, by all listeners.
        self.turns = Turns()
        self._log = structlog.get_logger("tidegate.http")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        target = match_infer(scope["raw_path"]) if scope["type"] == "http" else None
        if target is None:
            await self._fallback(scope, receive, send)
            return
        call = _Call()
        try:
            answer = await self._answer(call, target, scope, receive)
            await self._finish(answer, call).send(send)
        finally:
            if call.permit is not None:
                call.permit.release()

    async def _answer(self, call: _Call, target: tuple[bytes, bytes], scope: Scope, receive: Receive) -> Answer:
        try:
            return await self._infer(call, target, scope, receive)
        except TidegateError as error:
            return self._refusal(call, error)
        except Exception as error:  # noqa: BLE001 - the boundary of one request: logged here, no text to the client
            self._log.error("request_failed", id=call.id, protocol="http", exc_info=error)
            return self._refusal(call, Internal(call.id))

    def _refusal(self, call: _Call, error: TidegateError) -> Answer:
        if not call.handed:
            self._port.refuse(error)
        return error_answer(error, self._statuses)

    def _finish(self, answer: Answer, call: _Call) -> Answer:
        answer.headers += decision_headers(
            call.id, call.decision, None if call.permit is None else call.permit.traceresponse
        )
        return answer

    async def _infer(self, call: _Call, target: tuple[bytes, bytes], scope: Scope, receive: Receive) -> Answer:
        if scope["method"] != "POST":
            raise MethodNotAllowed(scope["method"], "POST")
        head = self._head(target, scope)
        limit = self._port.limits.max_body_bytes
        if head.content_length is not None and head.content_length > limit:
            raise too_large(head.content_length, limit)
        permit = call.permit = self._port.admit(head)
        body = await self._reader.read(receive, limit, head.deadline_ns, permit.hold)
        request = await self._decode(head, permit, body, receive)
        reply = SingleReply(asyncio.get_running_loop(), scope.get("extensions", {}).get(OWED))
        call.handed = True
        ticket = await self._run(permit, request, reply, receive)
        call.decision = reply.decision
        with telling(ticket):
            response = reply.result(permit)
            answer = self.encode(head, request, response)
            if not pieces.has_many(response) and pieces.wire_bytes(response.outputs) <= self._settings.offload_bytes:
                return await answer  # it is encoded at once
            return await _while_wanted(answer, receive, 0)  # encoding goes by the deadline itself

    def _head(self, target: tuple[bytes, bytes], scope: Scope) -> RequestHead:
        received_ns = time.monotonic_ns()
        metadata = metadata_of(scope["headers"])
        model, version = decoded(target[0]), decoded(target[1])
        check_version(version)
        client = scope.get("client")
        return RequestHead(
            "http",
            model,
            version,
            metadata,
            received_ns,
            deadline_of(metadata, received_ns),
            declared_length(metadata),
            f"{client[0]}:{client[1]}" if client else "",
        )

    async def _run(self, permit: Permit, request: InferenceRequest, reply: SingleReply, receive: Receive) -> Ticket:
        """Until the port has replied or the client is gone."""
        ticket = self._port.handle(permit, request, reply)
        if reply.done.done():
            return ticket
        watcher = asyncio.ensure_future(_until_gone(receive, reply))
        try:
            await reply.done
        except BaseException:
            ticket.cancel()
            raise
        finally:
            watcher.cancel()
        if reply.error is not None:
            ticket.cancel()  # the client may have left before the port replied
        return ticket

    async def _decode(self, head: RequestHead, permit: Permit, body: Buffer, receive: Receive) -> InferenceRequest:
        metadata, limits, offload = head.metadata, self._port.limits, self._settings.offload_bytes
        encoding = metadata.get("content-encoding")
        if encoding:
            # A small body may inflate a thousandfold, so even those leave the loop.
            packed = body
            body = await self._offload.run(lambda: compression.decompress(packed, encoding, limits.max_body_bytes))
            permit.hold(len(body))
        json_size = binary.parse_header_length(metadata.get(LENGTH_HEADER), len(body))
        whole = len(body) <= pieces.SMALL_BODY_BYTES
        if json_size == 0:
            spec, _ = self._catalog.metadata(head.model, head.version)
            request = binary.decode_raw(body, model=head.model, version=head.version, spec=spec, whole=whole)
            return await self._finished(request, receive, head.deadline_ns)
        decode = partial(
            json_codec.decode_infer, body, model=head.model, version=head.version, limits=limits, json_size=json_size
        )
        if (len(body) if json_size is None else json_size) <= offload:
            return await self._finished(decode(whole=whole), receive, head.deadline_ns)
        if self._codec is not None:
            work = self._codec.decode(body, model=head.model, version=head.version, limits=limits, json_size=json_size)
            with suppress(Unavailable):
                return await _while_wanted(work, receive, head.deadline_ns)
        return await self._offload.run(decode)

    async def _finished(self, request: InferenceRequest, receive: Receive, deadline_ns: int) -> InferenceRequest:
        if pieces.unfinished(request):
            await _while_wanted(self.turns.take(pieces.finish(request)), receive, deadline_ns)
        return request

    async def encode(self, head: RequestHead, request: InferenceRequest, response: InferenceResponse) -> Answer:
        """The answer, compressed as the head asks for; made off the loop when it is large."""
        accept, offload = head.metadata.get("accept-encoding"), self._settings.offload_bytes
        options = _Options(
            outputs=request.outputs, binary_default=request.binary_output, strict_json=self._settings.strict_json
        )
        if pieces.has_many(response):
            wired = pieces.wired(response, json_codec.binary_outputs(response, request.outputs, request.binary_output))
            response = await by_deadline(self.turns.take(wired), head.deadline_ns, ANSWERED_LATE)
        encode = partial(json_codec.encode_infer, response, **options)
        if pieces.wire_bytes(response.outputs) <= offload:
            return self._packed(encode(), accept)
        if self._codec is not None and _json_bytes(request, response) > offload:
            with suppress(Unavailable):
                work = self._codec.encode(response, **options)
                encoded = await by_deadline(work, head.deadline_ns, ANSWERED_LATE)
                return await self._offload.run(partial(self._packed, encoded, accept))
        return await self._offload.run(lambda: self._packed(encode(), accept))

    def _packed(self, encoded: tuple[list[Buffer], int | None], accept: str | None) -> Answer:
        chunks, json_size = encoded
        answer = Answer(200, [JSON] if json_size is None else [_OCTETS], chunks)
        if json_size is not None:
            answer.headers.append((_LENGTH_HEADER_BYTES, b"%d" % json_size))
        if accept and sum(map(len, chunks)) > self._settings.compress_over_bytes:
            body, encoding = compression.compress(b"".join(chunks), accept)
            if encoding is not None:
                answer.chunks = [body]
                answer.headers += [(b"content-encoding", encoding.encode()), (b"vary", b"accept-encoding")]
        return answer


def _json_bytes(request: InferenceRequest, response: InferenceResponse) -> int:
    """How much of the outputs is to be written as JSON, in bytes of the tensors."""
    binary = json_codec.binary_outputs(response, request.outputs, request.binary_output)
    return pieces.wire_bytes([tensor for tensor in response.outputs if tensor.name not in binary])


async def _while_wanted(work: Coroutine[Any, Any, _T], receive: Receive, deadline_ns: int) -> _T:
    """The result of ``work``, which is ended early: by the deadline, DeadlineExceeded, or by the client, Cancelled.

    ``deadline_ns`` 0: it has none, or looks after that itself.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), timeout=_seconds_left(deadline_ns), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise Cancelled("the client closed the connection")
        raise DeadlineExceeded(DECODED_LATE)
    finally:
        leaving.cancel()
        working.cancel()
        del leaving, working  # what they raised would be held by its own traceback, and with it what the callers hold


async def by_deadline(work: Coroutine[Any, Any, _T], deadline_ns: int, late: str) -> _T:
    """The result of ``work``, which is ended when it comes too late: DeadlineExceeded, saying ``late``."""
    try:
        async with asyncio.timeout(_seconds_left(deadline_ns)):
            return await work
    except TimeoutError:
        raise DeadlineExceeded(late) from None


def _seconds_left(deadline_ns: int) -> float | None:
    """Until the deadline; None without one."""
    return (deadline_ns - time.monotonic_ns()) / 1e9 if deadline_ns else None


async def _disconnected(receive: Receive) -> None:
    """The body is complete, so the next thing to be received is that the client left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _until_gone(receive: Receive, reply: SingleReply) -> None:
    await _disconnected(receive)
    reply.abandon(Cancelled("the client closed the connection"))
