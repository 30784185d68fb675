"""Request metadata that is decoded when somebody asks for it: most of a head is never looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from server.transport.native.session import Header

_BINARY: Final = b"-bin"


class Metadata(Mapping[str, str]):
    """The headers of one call by their lower-case names, without pseudo headers and ``-bin`` metadata.

    Values of a name that comes again are joined by ", ". ``raw`` has every header undecoded, the last one of a name;
    ``size`` is the bytes of all names and values.
    """

    __slots__ = ("_headers", "raw", "size")

    def __init__(self, headers: tuple[Header, ...]) -> None:
        self._headers = headers
        raw: dict[bytes, bytes] = {}
        size = 0
        for name, value in headers:
            raw[name] = value
            size += len(name) + len(value)
        self.raw = raw
        self.size = size

    def __getitem__(self, key: str) -> str:
        wanted = key.encode()
        if wanted not in self.raw or not _is_text(wanted):
            raise KeyError(key)
        return b", ".join([value for name, value in self._headers if name == wanted]).decode("latin-1")

    def get(self, key: str, default: Any = None) -> Any:
        """As of any mapping; absent names, the usual case, are told without an exception."""
        if key not in self:
            return default
        return self[key]

    def __contains__(self, key: object) -> bool:
        wanted = key.encode() if isinstance(key, str) else b""
        return wanted in self.raw and _is_text(wanted)

    def __iter__(self) -> Iterator[str]:
        return (name.decode("latin-1") for name in self.raw if _is_text(name))

    def __len__(self) -> int:
        return sum(map(_is_text, self.raw))


def _is_text(name: bytes) -> bool:
    return not name.startswith(b":") and not name.endswith(_BINARY)
