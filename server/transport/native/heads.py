"""Heads of HTTP/1.1: what those of requests say, by the bytes they had, and the lines that answers repeat.

Clients repeat themselves. Whatever is remembered here is bounded, and forgotten as a whole where it becomes too much.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import httptools

from server.transport.answers import decision_headers
from server.transport.http_infer import TIMEOUT_HEADER, decoded, match_infer
from server.types import Decision

#: Longer heads are not kept, so that what is kept is bounded in bytes too; targets likewise.
KNOWN_HEAD_BYTES: Final = 4096
_KNOWN_URL_BYTES: Final = 1024
_KNOWN_HEADS: Final = 512
_KNOWN_LINES: Final = 1024


class Head:
    """A request's head as it came, and what it says. ``target``: (model, version) of what is taken here, else None."""

    __slots__ = ("headers", "json_size", "length", "limited", "metadata", "raw", "target", "traceparent", "url")

    def __init__(
        self,
        url: bytes,
        headers: list[tuple[bytes, bytes]],
        target: tuple[str, str] | None,
        metadata: dict[str, str],
        length: int | None,
    ) -> None:
        self.url = url
        self.headers = headers
        self.target = target
        self.metadata = metadata
        self.length = length
        self.limited = TIMEOUT_HEADER in metadata
        self.traceparent = metadata.get("traceparent", "").encode("latin-1")
        #: Of the JSON part, once a body of this length has been read.
        self.json_size: int | None = None
        #: All its bytes, once it is one of the ``KnownHeads``.
        self.raw = b""


class KnownHeads:
    """What heads said, by the bytes they had: for all connections, and bounded. Only those that came twice are kept,
    so that heads which are never repeated, as with a trace in each, do not drive out the others.
    """

    __slots__ = ("_known", "_seen", "get")

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}
        self._seen: set[int] = set()
        self.get = self._known.get

    def learn(self, raw: bytes, head: Head) -> None:
        mark = hash(raw)
        if mark not in self._seen:
            if len(self._seen) >= 2 * _KNOWN_HEADS:
                self._seen.clear()
            self._seen.add(mark)
        elif len(raw) <= KNOWN_HEAD_BYTES:
            if len(self._known) >= _KNOWN_HEADS:
                self._known.clear()
            head.raw = raw
            self._known[raw] = head


def target_of(url: bytes) -> tuple[str, str] | None:
    """(model, version) that a request's target names, None when it is no inference. Raises TidegateError."""
    return _known_target(url) if len(url) <= _KNOWN_URL_BYTES else _target(url)


def _target(url: bytes) -> tuple[str, str] | None:
    target = match_infer(httptools.parse_url(url).path)
    return None if target is None else (decoded(target[0]), decoded(target[1]))


#: By the whole target, as clients repeat it: what is found there is neither cut up nor decoded twice.
_known_target: Final = lru_cache(maxsize=512)(_target)


#: Header lines that say what follows, by what they say: forgotten as a whole when there are many.
_lines: Final[dict[tuple[int, int], bytes]] = {}


def sizes_after_id(json_size: int, length: int, keep_alive: bool) -> bytes:
    """The header lines from behind the id's value on."""
    if not keep_alive:
        return _written(json_size, length, b"connection: close\r\n")
    lines = _lines.get((json_size, length))
    if lines is None:
        if len(_lines) >= _KNOWN_LINES:
            _lines.clear()
        lines = _lines[json_size, length] = _written(json_size, length, b"")
    return lines


def _written(json_size: int, length: int, end: bytes) -> bytes:
    kind = b"application/json"
    if json_size >= 0:
        kind = b"application/octet-stream\r\ninference-header-content-length: %d" % json_size
    return b"\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b\r\n" % (kind, length, end)


def lines_to_id(decision: Decision) -> bytes:
    """The header lines that repeat from answer to answer, up to the value of the id."""
    if not decision.lines:
        headers = decision_headers("", decision, None)
        decision.lines = b"".join([b"%b: %b\r\n" % header for header in headers[1:]]) + b"x-tidegate-id: "
    return decision.lines
