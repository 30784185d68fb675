"""The sink that posts signed webhooks in the layout of https://www.standardwebhooks.com.

One connection per event, to an address that the allow-list admits; nothing is taken from proxies in the environment.
Redirects are failures: what they point to was neither configured nor checked. Of the answer only the status and
``Retry-After`` count. 2xx: delivered. 410: the receiver wants no more, dead at once. Anything else is tried again.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

from server import __version__
from server.delivery.base import Delivered, Failed, Outcome, Refused
from server.delivery.options import WebhookOptions
from server.delivery.signature import signature
from server.delivery.targets import literal
from server.errors import ConfigError
from server.outbox import Message

#: Read of an answer's body, so that a short one ends in peace; the rest is left.
_MAX_ANSWER_BYTES: Final = 4096
_GONE: Final = 410


class WebhookSink:
    """One receiver. Raises ConfigError when its file of authorities cannot be used."""

    def __init__(self, name: str, options: WebhookOptions, *, clock: Callable[[], float] = time.time) -> None:
        self.name = name
        self.timeout_s = options.timeout_s
        self._options = options
        self._clock = clock
        parts = options.parts
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._authority = parts.netloc
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._tls = _tls_context(options.ca_file) if parts.scheme == "https" else None

    def send(self, message: Message) -> Outcome:
        """One exchange, within ``timeout_s`` but for the look-up of the name, which the system bounds."""
        try:
            with closing(self._connected(time.monotonic() + self.timeout_s)) as wire:
                return self._exchange(wire, message)
        except TimeoutError:
            return Failed(f"no answer within {self.timeout_s:g} s")
        except ssl.SSLError as error:
            return Failed(f"TLS failed: {error.reason or 'no reason given'}")
        except OSError as error:
            return Failed(f"no connection: {error.strerror or error}")
        except (http.client.HTTPException, ValueError) as error:
            return Failed(f"the answer is no HTTP: {type(error).__name__}")

    def _exchange(self, wire: _DeadlineSocket, message: Message) -> Outcome:
        client = http.client.HTTPConnection(self._host, self._port)
        client.sock = wire  # it uses sendall, makefile and close
        client.request("POST", self._target, message.body, self._headers(message))
        answer = client.getresponse()
        with suppress(OSError, http.client.HTTPException, ValueError):
            answer.read(_MAX_ANSWER_BYTES)
        return _outcome(answer.status, answer.headers.get("Retry-After"), self._clock())

    def _headers(self, message: Message) -> dict[str, str]:
        timestamp_s = int(self._clock())
        return {
            "Host": self._authority,
            "Content-Type": "application/cloudevents+json; charset=utf-8",
            "User-Agent": f"tidegate/{__version__}",
            "Connection": "close",
            "Idempotency-Key": message.key,
            "webhook-id": message.id,
            "webhook-timestamp": str(timestamp_s),
            "webhook-signature": signature(self._options.secrets, message.id, timestamp_s, message.body),
        }

    # -- connecting -----------------------------------------------------------------------------------------------

    def _connected(self, deadline: float) -> _DeadlineSocket:
        """A connection to the first of the host's addresses that is admitted and answers. Raises OSError."""
        error: OSError = OSError("the host has no address")
        for family, kind, protocol, _, address in self._addresses():
            raw = socket.socket(family, kind, protocol)
            try:
                raw.settimeout(_left(deadline))
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
            reason = (
                "the address is of no known kind"
                if address is None
                else self._options.allow.refusal(self._host, address)
            )
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
    """A socket whose reads and writes share one deadline, so that a trickle of bytes cannot outlast it."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._deadline))
        return self._sock.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        """What http.client calls; the timeout of a socket's ``sendall`` is one for all of it."""
        self._sock.settimeout(_left(self._deadline))
        self._sock.sendall(data)

    def makefile(self, _mode: str, *_: Any) -> io.BufferedReader:
        """What http.client reads the answer from."""
        return io.BufferedReader(self)

    def close(self) -> None:
        super().close()
        self._sock.close()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _outcome(status: int, retry_after: str | None, now: float) -> Outcome:
    if 200 <= status < 300:
        return Delivered()
    if status == _GONE:
        return Refused("answered 410: the receiver wants no more events")
    if 300 <= status < 400:
        return Failed(f"answered {status}: redirects are not followed")
    return Failed(f"answered {status}", None if retry_after is None else _seconds(retry_after, now))


def _seconds(retry_after: str, now: float) -> float | None:
    """The wait that ``Retry-After`` asks for, in seconds or as a date; None when it says neither."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        when = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    aware = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.fromtimestamp(now, UTC)).total_seconds())


def _tls_context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the file of trusted authorities cannot be used: {error}") from None
