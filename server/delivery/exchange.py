"""One HTTP exchange with a host that an allow-list admits, under one deadline for all of it.

One connection per exchange, to an address that was checked; nothing is taken from proxies in the environment, and
redirects are not followed: what they point to was neither configured nor checked.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, cast
from urllib.parse import SplitResult, urlsplit

from server import __version__
from server.delivery.targets import AllowList, literal
from server.errors import ConfigError

#: Read of an answer's body: more than any answer that is looked at, and enough that a short one ends in peace.
MAX_ANSWER_BYTES: Final = 65_536


class ExchangeFailed(Exception):
    """There was no answer. The text says why, without the address's path, and may be shown to operators."""


@dataclass(slots=True, frozen=True)
class Answer:
    """``body``: its first ``MAX_ANSWER_BYTES``, or less when the rest did not come."""

    status: int
    retry_after: str | None
    body: bytes


@dataclass(slots=True, frozen=True)
class Endpoint:
    """Where requests go. Raises ConfigError for an address that could never be called.

    ``url`` is not shown, as its path may hold a token; ``what`` names it in errors. ``ca_file``: PEM file of the
    authorities trusted for https ("": the system's).
    """

    url: str = field(repr=False)
    allow: AllowList = field(default_factory=AllowList)
    timeout_s: float = 10.0
    ca_file: str = ""
    what: str = "webhook"

    def __post_init__(self) -> None:
        host = self.parts.hostname or ""
        if self.parts.scheme not in ("http", "https") or not host or not _has_port_or_default(self.parts):
            raise ConfigError(
                f"the {self.what}'s address must be http://HOST or https://HOST, perhaps with port and path"
            )
        if (
            self.parts.username is not None
            or self.parts.fragment
            or not (self.url.isascii() and self.url.isprintable())
        ):
            raise ConfigError(f"the {self.what}'s address must be ASCII without spaces, a user or a fragment")
        address = literal(host)
        if address is not None and (refusal := self.allow.refusal(host, address)):
            raise ConfigError(f"the {self.what}'s address can never be called: {refusal}")
        if address is None and self.allow.hosts and not self.allow.networks and not self.allow.names(host):
            raise ConfigError(f"the {self.what}'s host {host[:128]} is not among the allowed ones")

    @property
    def parts(self) -> SplitResult:
        """The address in parts."""
        return urlsplit(self.url)


class Exchange:
    """Posts to one endpoint, from any thread. Raises ConfigError when its file of authorities cannot be used."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.timeout_s = endpoint.timeout_s
        self._allow = endpoint.allow
        parts = endpoint.parts
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._authority = parts.netloc
        #: Path and query of the endpoint itself.
        self.target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._tls = _tls_context(endpoint.ca_file) if parts.scheme == "https" else None

    def post(self, target: str, body: bytes, headers: Mapping[str, str], deadline: float) -> Answer:
        """One exchange, until ``deadline`` of the monotonic clock but for the look-up of the name, which the system
        bounds. Raises ExchangeFailed."""
        try:
            with closing(self._connected(deadline)) as wire:
                return self._exchange(wire, target, body, headers)
        except TimeoutError:
            raise ExchangeFailed(f"no answer within {self.timeout_s:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise ExchangeFailed(f"the certificate is not trusted: {error.verify_message}") from None
        except ssl.SSLError as error:
            raise ExchangeFailed(f"TLS failed: {error.reason or 'no reason given'}") from None
        except OSError as error:
            raise ExchangeFailed(f"no connection: {error.strerror or error}") from None
        except (http.client.HTTPException, ValueError) as error:
            raise ExchangeFailed(f"the answer is no HTTP: {type(error).__name__}") from None

    def _exchange(self, wire: _DeadlineSocket, target: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        client = http.client.HTTPConnection(self._host, self._port)
        client.sock = wire  # it uses sendall, and the answer makefile
        own = {"Host": self._authority, "User-Agent": f"tidegate/{__version__}", "Connection": "close"}
        client.request("POST", target, body, {**own, **headers})
        # Not by the client, which would close the connection before the body is read. Closed before its connection: a
        # later end of it would flush what is closed, and Python tells that on standard error.
        with closing(http.client.HTTPResponse(cast("socket.socket", wire), method="POST")) as answer:
            answer.begin()
            wire.head_is_whole = True
            found = b""
            with suppress(OSError, http.client.HTTPException, ValueError):
                found = answer.read(MAX_ANSWER_BYTES)
            return Answer(answer.status, answer.headers.get("Retry-After"), found)

    # -- connecting -----------------------------------------------------------------------------------------------

    def _connected(self, deadline: float) -> _DeadlineSocket:
        """A connection to the first of the host's addresses that is admitted and answers. Raises OSError.

        An address that does not answer has its share of the time and no more: of two families one may lead nowhere.
        """
        error: OSError = OSError("the host has no address")
        addresses = self._addresses()
        for number, (family, kind, protocol, _, address) in enumerate(addresses):
            raw = socket.socket(family, kind, protocol)
            try:
                raw.settimeout(_left(deadline) / (len(addresses) - number))
                raw.connect(address)
                return _DeadlineSocket(self._secured(raw, deadline), deadline)
            except OSError as failure:
                raw.close()
                error = failure
        raise error

    def _addresses(self) -> list[tuple[Any, ...]]:
        """What ``getaddrinfo`` knows, without what may not be called. Raises OSError when nothing is left."""
        refusal = ""
        admitted = []
        for found in socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM):
            address = literal(str(found[4][0]).partition("%")[0])
            reason = "the address is of no known kind" if address is None else self._allow.refusal(self._host, address)
            if reason:
                refusal = reason
            else:
                admitted.append(found)
        if not admitted:
            raise OSError(refusal or "the host has no address")
        return admitted

    def _secured(self, raw: socket.socket, deadline: float) -> socket.socket:
        if self._tls is None:
            return raw
        raw.settimeout(_left(deadline))
        return self._tls.wrap_socket(raw, server_hostname=self._host)


class _DeadlineSocket(io.RawIOBase):
    """A socket whose reads and writes share one deadline, so that a trickle of bytes cannot outlast it.

    Until ``head_is_whole`` the end of the stream is an error: http.client takes a head that was cut off for whole.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline
        self.head_is_whole = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._deadline))
        count = self._sock.recv_into(buffer)
        if not count and not self.head_is_whole:
            raise ConnectionResetError("the receiver closed it before the end of the answer's head")
        return count

    def sendall(self, data: bytes) -> None:
        """What http.client sends by; the timeout of a socket's ``sendall`` is one for all of it."""
        self._sock.settimeout(_left(self._deadline))
        self._sock.sendall(data)

    def makefile(self, _mode: str, *_: Any) -> io.BufferedReader:
        """What http.client reads the answer from."""
        return io.BufferedReader(self)

    def close(self) -> None:
        super().close()
        self._sock.close()


def seconds(retry_after: str | None, now: float) -> float | None:
    """The wait that ``Retry-After`` asks for, in seconds or as a date; None when it says neither."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        when = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    aware = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.fromtimestamp(now, UTC)).total_seconds())


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _has_port_or_default(parts: SplitResult) -> bool:
    try:
        return parts.port != 0
    except ValueError:
        return False


def _tls_context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the file of trusted authorities cannot be used: {error}") from None
