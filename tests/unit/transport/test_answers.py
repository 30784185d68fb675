"""Bodies, headers and bounded reading."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import orjson
import pytest

from server.errors import Cancelled, DeadlineExceeded, InvalidArgument, PayloadTooLarge, QueueFull, TidegateError
from server.transport.answers import (
    BodyReader,
    HttpSettings,
    decision_headers,
    declared_length,
    error_answer,
    header_value,
    json_answer,
    metadata_of,
    parse_json_object,
)
from server.transport.faults import MethodNotAllowed, RequestTimeout
from server.transport.status import StatusTable
from server.types import Decision


def receiving(*parts: bytes, end: str = "complete") -> Callable[[], Awaitable[dict[str, Any]]]:
    """An ASGI ``receive``: the parts, then what ``end`` says: complete, disconnect, or silence."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if end == "complete":
        messages[-1]["more_body"] = False
    elif end == "disconnect":
        messages.append({"type": "http.disconnect"})

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    return receive


def read(receive: Any, *, limit: int = 10, deadline_ns: int = 0, **times: float) -> bytes | bytearray:
    settings = HttpSettings(**{"body_idle_s": 0.05, "body_total_s": 0.2, **times})
    return asyncio.run(BodyReader(settings).read(receive, limit, deadline_ns))


@pytest.mark.parametrize("parts", [(b"",), (b"0123456789",), (b"01", b"", b"23456789"), (b"0",) * 10])
def test_bodies_up_to_the_limit_are_read_whole(parts: tuple[bytes, ...]) -> None:
    assert read(receiving(*parts)) == b"".join(parts)


@pytest.mark.parametrize(
    ("receive", "deadline_s", "error"),
    [
        (receiving(b"01234567890"), 0, PayloadTooLarge),
        (receiving(b"01234", b"567890"), 0, PayloadTooLarge),
        (receiving(b"01234567890", end="silence"), 0, PayloadTooLarge),
        (receiving(b"0", end="silence"), 0, RequestTimeout),
        (receiving(b"0", end="disconnect"), 0, Cancelled),
        (receiving(end="disconnect"), 0, Cancelled),
        (receiving(b"0", end="silence"), 0.01, DeadlineExceeded),
    ],
)
def test_bodies_that_are_refused(receive: Any, deadline_s: float, error: type[TidegateError]) -> None:
    deadline_ns = time.monotonic_ns() + int(deadline_s * 1e9) if deadline_s else 0
    with pytest.raises(error):
        read(receive, deadline_ns=deadline_ns)


class Stale(asyncio.SelectorEventLoop):
    """Its time is behind until somebody waits, so that timers come early by as much: those of busy loops are alike."""

    behind_s = 0.05

    def time(self) -> float:
        return super().time() - self.behind_s


def test_a_deadline_is_told_as_such_by_a_timer_that_is_early() -> None:
    deadline_ns = time.monotonic_ns() + 100_000_000

    async def silence() -> dict[str, Any]:
        loop.behind_s = 0.0
        return await asyncio.Event().wait() and {}

    with asyncio.Runner(loop_factory=Stale) as runner:
        loop = cast("Stale", runner.get_loop())
        body = BodyReader(HttpSettings()).read(silence, 10, deadline_ns)
        with pytest.raises(DeadlineExceeded):
            runner.run(body)


def test_a_body_that_trickles_is_bounded_in_all() -> None:
    async def trickle() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(RequestTimeout, match=r"over 0\.2 s"):
        read(trickle, limit=10**6)


def test_answers_are_one_length_over_many_chunks() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    answer = json_answer({"a": 1})
    answer.chunks.append(memoryview(b"xy"))
    asyncio.run(answer.send(send))
    assert sent[0]["headers"][-1] == (b"content-length", b"9")
    assert [(message["body"], message["more_body"]) for message in sent[1:]] == [(b'{"a":1}', True), (b"xy", False)]


def test_error_answers() -> None:
    answer = error_answer(QueueFull("full \ud800", retry_after_s=1.2), StatusTable())
    assert answer.status == 503
    assert orjson.loads(answer.chunks[0]) == {"error": "full ?"}
    assert answer.headers == [(b"content-type", b"application/json"), (b"retry-after", b"2")]
    assert (b"allow", b"GET, POST") in error_answer(MethodNotAllowed("PUT", "GET, POST"), StatusTable()).headers
    assert (b"connection", b"close") in error_answer(PayloadTooLarge("x"), StatusTable()).headers


def test_decision_headers() -> None:
    assert decision_headers("i", None, None) == [(b"x-tidegate-id", b"i")]
    assert decision_headers("i", Decision("m", "2", "canary", 5), "00-1") == [
        (b"x-tidegate-id", b"i"),
        (b"x-tidegate-version", b"2"),
        (b"x-tidegate-arm", b"canary"),
        (b"x-tidegate-generation", b"5"),
        (b"traceresponse", b"00-1"),
    ]


@pytest.mark.parametrize(("text", "value"), [("a b", b"a b"), ("a\r\nb: c", b"a??b: c"), ("\u2603x", b"?x"), ("", b"")])
def test_header_values_are_printable_ascii(text: str, value: bytes) -> None:
    assert header_value(text) == value


def test_repeated_headers_are_joined() -> None:
    assert metadata_of([(b"a", b"1"), (b"b", b"\xe9"), (b"a", b"2")]) == {"a": "1, 2", "b": "\xe9"}


def test_declared_length() -> None:
    assert declared_length({}) is None
    assert declared_length({"content-length": "12"}) == 12
    for text in ("", "-1", "1, 1", "9" * 21, "\u0663"):
        with pytest.raises(InvalidArgument, match="decimal number"):
            declared_length({"content-length": text})


def test_json_objects() -> None:
    assert parse_json_object(b"") == {}
    assert parse_json_object(b'{"a": 1}') == {"a": 1}
    for body in (b"[", b"[]", b"1", b"null", b"\xff", b"[" * 10_000):
        with pytest.raises(InvalidArgument):
            parse_json_object(body)
