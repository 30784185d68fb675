"""Building blocks of HTTP answers: JSON bodies, error bodies, headers of inference answers, bounded body reading."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import orjson
from starlette.types import Receive, Send

from server.codec.checks import kind_of
from server.errors import Cancelled, DeadlineExceeded, InvalidArgument, PayloadTooLarge, TidegateError
from server.transport.faults import MethodNotAllowed, RequestTimeout
from server.transport.status import StatusTable, safe_text
from server.types import Buffer, Decision

Headers: TypeAlias = list[tuple[bytes, bytes]]

JSON: Final = (b"content-type", b"application/json")
#: Errors that leave a body unread which is too large or too slow to be skipped.
_BODY_LEFT: Final = frozenset({"payload_too_large", "request_timeout"})


@dataclass(slots=True, frozen=True)
class HttpSettings:
    """Bounds of the HTTP listener. Times in seconds."""

    #: Longest wait for more of a request body, and for all of it.
    body_idle_s: float = 30.0
    body_total_s: float = 300.0
    #: From the first byte of a request, or from accept, to the end of its headers.
    head_s: float = 10.0
    keep_alive_s: float = 75.0
    #: Longest time in which a client takes nothing of an answer that waits for it.
    write_stall_s: float = 30.0
    #: After an answer that did not wait for the whole body: how long and how much of the rest is thrown away.
    discard_s: float = 5.0
    discard_bytes: int = 64 * 1024 * 1024
    #: While draining: how long idle connections stay open for a request that is already on its way.
    drain_idle_s: float = 1.0
    max_connections: int = 10_000
    backlog: int = 2048
    #: Answers up to this size are not compressed.
    compress_over_bytes: int = 1024
    #: JSON and compressed bodies over this size leave the event loop.
    offload_bytes: int = 64 * 1024
    offload_threads: int = 2
    #: Refuse NaN and infinities in JSON answers instead of writing their usual literals.
    strict_json: bool = False


@dataclass(slots=True)
class Answer:
    """One complete HTTP answer; ``chunks`` are sent one after the other under a single content-length."""

    status: int
    headers: Headers
    chunks: list[Buffer]

    async def send(self, send: Send) -> None:
        length = sum(len(chunk) for chunk in self.chunks)
        headers = [*self.headers, (b"content-length", b"%d" % length)]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        last = len(self.chunks) - 1
        for i, chunk in enumerate(self.chunks):
            await send({"type": "http.response.body", "body": chunk, "more_body": i < last})


def json_answer(value: Any, status: int = 200) -> Answer:
    return Answer(status, [JSON], [orjson.dumps(value)])


def error_answer(error: TidegateError, statuses: StatusTable) -> Answer:
    """``{"error": text}`` under the table's status, with Retry-After where the table has one."""
    answer = json_answer({"error": safe_text(error.message)}, statuses.of(error).http)
    seconds = statuses.retry_after(error)
    if seconds is not None:
        answer.headers.append((b"retry-after", b"%d" % seconds))
    if isinstance(error, MethodNotAllowed):
        answer.headers.append((b"allow", error.allowed.encode()))
    if error.code in _BODY_LEFT:
        answer.headers.append((b"connection", b"close"))
    return answer


def header_value(text: str) -> bytes:
    """``text`` as a header value: what is not printable ASCII becomes ``?``."""
    if text.isascii() and text.isprintable():
        return text.encode()
    return bytes(b if 32 <= b < 127 else 63 for b in text.encode("ascii", "replace"))


def decision_headers(tidegate_id: str, decision: Decision | None, traceresponse: str | None) -> Headers:
    """The ``x-tidegate-*`` headers of one inference answer, errors included; gRPC sends the same as metadata."""
    headers = [(b"x-tidegate-id", header_value(tidegate_id))]
    if decision is not None:
        headers.append((b"x-tidegate-version", header_value(decision.version)))
        headers.append((b"x-tidegate-arm", header_value(decision.arm)))
        headers.append((b"x-tidegate-generation", b"%d" % decision.generation))
        if decision.reason:
            headers.append((b"x-tidegate-reason", header_value(decision.reason)))
    if traceresponse:
        headers.append((b"traceresponse", header_value(traceresponse)))
    return headers


def metadata_of(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Header names are lower-case already; repeated ones are joined as RFC 9110 section 5.3 says."""
    metadata: dict[str, str] = {}
    for name, value in headers:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        metadata[key] = f"{metadata[key]}, {text}" if key in metadata else text
    return metadata


def declared_length(metadata: Mapping[str, str]) -> int | None:
    """Content-Length, or None when the body is chunked or absent."""
    text = metadata.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 20):
        raise InvalidArgument(f"content-length must be a decimal number, got {text[:64]!r}")
    return int(text)


def too_large(got: int, limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"request body of {got} bytes is over the limit of {limit} bytes")


class BodyReader:
    """Reads request bodies within a size and a time. One per listener."""

    def __init__(self, settings: HttpSettings) -> None:
        self._idle_s = settings.body_idle_s
        self._total_s = settings.body_total_s

    async def read(
        self, receive: Receive, limit: int, deadline_ns: int = 0, hold: Callable[[int], None] | None = None
    ) -> bytes | bytearray:
        """The whole body. Raises PayloadTooLarge, RequestTimeout, DeadlineExceeded; Cancelled when the client left.

        ``hold`` is told how much has come, before more is read, and may refuse it.
        """
        until = time.monotonic() + self._total_s
        body = await self._next(receive, until, deadline_ns)
        if len(body[0]) > limit:
            raise too_large(len(body[0]), limit)
        if not body[1]:
            return body[0]
        return await self._rest(receive, bytearray(body[0]), limit, until, deadline_ns, hold)

    async def _rest(
        self,
        receive: Receive,
        whole: bytearray,
        limit: int,
        until: float,
        deadline_ns: int,
        hold: Callable[[int], None] | None,
    ) -> bytearray:
        more = True
        while more:
            if hold is not None:
                hold(len(whole))
            part, more = await self._next(receive, until, deadline_ns)
            if len(whole) + len(part) > limit:
                raise too_large(len(whole) + len(part), limit)
            whole += part
        return whole

    async def _next(self, receive: Receive, until: float, deadline_ns: int) -> tuple[bytes, bool]:
        now = time.monotonic()
        wait = min(self._idle_s, until - now)
        left = deadline_ns / 1e9 - now if deadline_ns else wait
        try:
            async with asyncio.timeout(min(wait, left)):
                message = await receive()
        except TimeoutError:
            # Timers of the loop may be early: which it was is not asked of the clock alone.
            if deadline_ns and (left <= wait or time.monotonic_ns() >= deadline_ns):
                raise DeadlineExceeded("the deadline passed before the request body was complete") from None
            raise RequestTimeout(
                f"the request body did not arrive in time: no data for {self._idle_s:g} s, or over {self._total_s:g} s"
            ) from None
        if message["type"] == "http.disconnect":
            raise Cancelled("the client closed the connection before the request body was complete")
        return message.get("body", b""), message.get("more_body", False)


def parse_json_object(body: Buffer) -> dict[str, Any]:
    """The JSON object in ``body``; an empty body is an empty object."""
    value = parse_json(body) if body else {}
    if not isinstance(value, dict):
        raise InvalidArgument(f"the request body must be a JSON object, got {kind_of(value)}")
    return value


def parse_json(body: Buffer) -> object:
    """The JSON value in ``body``."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"the request body is not valid JSON: {error.msg} at byte {error.pos}") from None
