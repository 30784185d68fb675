"""Request metadata that is decoded when somebody asks for it: most of a head is never looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from server.transport.native.session import Header

_BINARY: Final = b"-bin"
#: So many names are looked for among the headers before an index of names is made: rules may ask for hundreds.
_FEW: Final = 4


class Metadata(Mapping[str, str]):
    """The headers of one call by their lower-case names, without pseudo headers and ``-bin`` metadata.

    Values of a name that comes again are joined by ", ". Few names are ever asked for, and to look through the
    headers for them costs less than to hash every one.

    What every call is asked for is found on the way: ``path`` and ``content_type`` (the last one; b"" without),
    ``timeout`` (``grpc-timeout``; None without) and ``traceparent`` (b"" without), several joined by ", ", whether it
    is ``encoded`` (there is a ``grpc-encoding``) and ``size``, the bytes of all names and values.
    """

    __slots__ = ("_asked", "_headers", "_names", "content_type", "encoded", "path", "size", "timeout", "traceparent")

    def __init__(self, headers: tuple[Header, ...]) -> None:
        self._headers = headers
        self._names: set[bytes] | None = None
        self._asked = 0
        self.path = self.content_type = b""
        traceparent: bytes | None = None
        timeout: bytes | None = None
        self.encoded = False
        size = 0
        for name, value in headers:
            length = len(name)
            size += length + len(value)
            if length == 5:  # to compare numbers costs next to nothing
                if name == b":path":
                    self.path = value
            elif length == 11:
                if name == b"traceparent":
                    traceparent = value if traceparent is None else traceparent + b", " + value
            elif length == 12:
                if name == b"content-type":
                    self.content_type = value
                elif name == b"grpc-timeout":
                    timeout = value if timeout is None else timeout + b", " + value
            elif length == 13 and name == b"grpc-encoding":
                self.encoded = True
        self.traceparent = traceparent or b""
        self.timeout = timeout
        self.size = size

    def _values(self, key: str) -> list[bytes]:
        wanted = key.encode()
        if not _is_text(wanted):
            return []
        self._asked += 1
        if self._asked > _FEW:
            if self._names is None:
                self._names = {name for name, _ in self._headers}
            if wanted not in self._names:
                return []
        return [value for name, value in self._headers if name == wanted]

    def __getitem__(self, key: str) -> str:
        values = self._values(key)
        if not values:
            raise KeyError(key)
        return b", ".join(values).decode("latin-1")

    def get(self, key: str, default: Any = None) -> Any:
        """As of any mapping; absent names, the usual case, are told without an exception."""
        values = self._values(key)
        return b", ".join(values).decode("latin-1") if values else default

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bool(self._values(key))

    def __iter__(self) -> Iterator[str]:
        return (name.decode("latin-1") for name in dict(self._headers) if _is_text(name))

    def __len__(self) -> int:
        return sum(map(_is_text, dict(self._headers)))


def _is_text(name: bytes) -> bool:
    return not name.startswith(b":") and not name.endswith(_BINARY)
