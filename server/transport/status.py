"""The single table from an error's code to its HTTP status and gRPC status. No other module knows these numbers.

Choices that the codes alone do not settle:

* ``payload_too_large`` is RESOURCE_EXHAUSTED on gRPC, because gRPC's own receive limit answers that: a caller sees one
  code whether the framing layer or the decoder found the message too large.
* Shedding (``queue_full``, ``queue_timeout``, ``too_many_requests``) is 503 / UNAVAILABLE with ``Retry-After``. Some
  gRPC clients retry UNAVAILABLE at once, so ``StatusTable(shed_as_429=True)`` answers 429 / RESOURCE_EXHAUSTED instead.
* ``cancelled`` is 499 on HTTP, the number proxies log for a caller that went away; nobody is left to read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from server.errors import TidegateError


@dataclass(slots=True, frozen=True)
class Status:
    """What one code becomes on the wire. ``retry_after_s``: the default when the error names none; None: no advice."""

    http: int
    grpc: int
    grpc_name: str
    retry_after_s: float | None = None


def _invalid(http: int = 400) -> Status:
    return Status(http, 3, "INVALID_ARGUMENT")


def _unavailable() -> Status:
    return Status(503, 14, "UNAVAILABLE", retry_after_s=1.0)


INTERNAL: Final = Status(500, 13, "INTERNAL")

TABLE: Final[Mapping[str, Status]] = {
    "capture_storage": _unavailable(),
    "cancelled": Status(499, 1, "CANCELLED"),
    "config_error": _invalid(),
    "deadline_exceeded": Status(504, 4, "DEADLINE_EXCEEDED"),
    "draining": _unavailable(),
    "failed_precondition": Status(400, 9, "FAILED_PRECONDITION"),
    "headers_too_large": Status(431, 8, "RESOURCE_EXHAUSTED"),
    "input_rejected": _invalid(),
    "internal": INTERNAL,
    "invalid_argument": _invalid(),
    "method_not_allowed": Status(405, 12, "UNIMPLEMENTED"),
    "model_load_error": Status(400, 9, "FAILED_PRECONDITION"),
    "model_not_found": Status(404, 5, "NOT_FOUND"),
    "model_not_ready": _unavailable(),
    "not_found": Status(404, 5, "NOT_FOUND"),
    "out_of_memory": Status(503, 8, "RESOURCE_EXHAUSTED", retry_after_s=1.0),
    "payload_too_large": Status(413, 8, "RESOURCE_EXHAUSTED"),
    "queue_full": _unavailable(),
    "queue_timeout": _unavailable(),
    "request_timeout": Status(408, 4, "DEADLINE_EXCEEDED"),
    "runtime_failure": INTERNAL,
    "store_error": _unavailable(),
    "too_many_requests": _unavailable(),
    "unimplemented": Status(501, 12, "UNIMPLEMENTED"),
    "unsupported_encoding": Status(415, 12, "UNIMPLEMENTED"),
    "upstream_unavailable": _unavailable(),
    "version_timeout": Status(504, 4, "DEADLINE_EXCEEDED"),
    "version_not_found": Status(404, 5, "NOT_FOUND"),
}

#: Codes by which the server sheds load; the setting moves them together.
SHEDDING: Final = frozenset({"queue_full", "queue_timeout", "too_many_requests"})
_SHED_AS_429: Final = Status(429, 8, "RESOURCE_EXHAUSTED", retry_after_s=1.0)


class StatusTable:
    """``TABLE`` with the operator's choice for shedding applied."""

    def __init__(self, *, shed_as_429: bool = False) -> None:
        self._table = dict(TABLE)
        if shed_as_429:
            self._table.update(dict.fromkeys(SHEDDING, _SHED_AS_429))

    def of(self, error: TidegateError) -> Status:
        """The row of ``error.code``; a code that the table does not know is answered as internal."""
        return self._table.get(error.code, INTERNAL)

    def retry_after(self, error: TidegateError) -> int | None:
        """Whole seconds for ``Retry-After``, at least 1; None when retrying is no advice to give."""
        seconds = error.retry_after_s if error.retry_after_s is not None else self.of(error).retry_after_s
        return None if seconds is None else max(1, math.ceil(seconds))


#: Longest error text sent, in UTF-8 bytes. gRPC percent-encodes it into a trailer (up to three times as long), and
#: clients refuse trailers over 8 KiB.
_TEXT_BYTES: Final = 2048


def safe_text(message: str) -> str:
    """``message`` as it may go on any wire: valid UTF-8 of bounded length."""
    raw = message.encode("utf-8", "replace")
    if len(raw) <= _TEXT_BYTES:
        return raw.decode()
    return raw[: _TEXT_BYTES - 3].decode("utf-8", "ignore") + "..."
