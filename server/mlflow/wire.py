"""HTTP to one MLflow server, and to no other: no redirects, no proxies of the environment, bounded in time and size.

One connection per exchange. What goes wrong is Unreachable when it may go better later, and the status and MLflow's own
code of an answer that refuses are handed on as ``Refusal``. No text of an error holds the token.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import quote, urlencode

from router.registry.origin import Unreachable, Unusable
from server import __version__
from server.errors import ConfigError
from server.mlflow.options import MlflowOptions

#: The largest JSON answer that is read.
MAX_ANSWER_BYTES: Final = 32 * 2**20
_CHUNK_BYTES: Final = 1 << 20
#: Statuses that say nothing about what was asked for. 401 and 403: tokens are renewed, rights given.
_PASSING: Final = frozenset({401, 403, 408, 425, 429, *range(500, 600)})
#: Tries of one download. A part of a file is never gone on with: MLflow gives bytes no tag, and they may have changed.
_DOWNLOAD_TRIES: Final = 3

Query = Sequence[tuple[str, str]]


class Refusal(Exception):
    """MLflow answered with an error: the status, and its own code ("" when the answer is not MLflow's)."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(f"MLflow answered {status}{f' {code}' if code else ''}{f': {text}' if text else ''}")
        self.status = status
        self.code = code


class Wire:
    """Requests to the server of ``options``. Thread-safe. Raises ConfigError for a file of authorities without use."""

    def __init__(self, options: MlflowOptions) -> None:
        parts = options.parts
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._base = parts.path.rstrip("/")
        self._timeout_s = options.timeout_s
        self._download_s = options.download_s
        self._tls = _tls_context(options.ca_file) if parts.scheme == "https" else None
        self._headers = {
            "Host": parts.netloc,
            "User-Agent": f"tidegate/{__version__}",
            "Connection": "close",
            "Accept-Encoding": "identity",
            **_login(options),
        }

    def get(self, path: str, query: Query = ()) -> Mapping[str, Any]:
        """The JSON object at a path. Raises Unreachable, Unusable or Refusal."""
        return self._json("GET", _target(path, query), None)

    def send(self, method: str, path: str, body: Mapping[str, object]) -> Mapping[str, Any]:
        """Send a JSON object. Raises Unreachable (then nobody knows whether it was done), Unusable or Refusal."""
        return self._json(method, _target(path, ()), json.dumps(body).encode())

    def text(self, path: str, query: Query, limit: int) -> bytes:
        """The bytes at a path. Raises Unreachable, Refusal, or Unusable when there are more than ``limit``."""
        deadline = time.monotonic() + self._timeout_s
        with self._exchange("GET", _target(path, query), None, deadline) as answer:
            return _bounded(answer, limit, path)

    def download(self, path: str, query: Query, target: int, limit: int) -> None:
        """Write the bytes at a path to an open file. A transfer that breaks off is begun again, a few times."""
        for attempt in range(_DOWNLOAD_TRIES):
            os.lseek(target, 0, os.SEEK_SET)
            os.truncate(target, 0)
            try:
                self._download(_target(path, query), target, limit, path)
                return
            except Unreachable:
                if attempt + 1 == _DOWNLOAD_TRIES:
                    raise

    def _download(self, address: str, target: int, limit: int, path: str) -> None:
        deadline = time.monotonic() + self._download_s
        with self._exchange("GET", address, None, deadline) as answer:
            _check_length(answer, limit, path)
            size = 0
            while chunk := answer.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > limit:
                    raise _too_much(path, limit)
                _write(target, chunk)
            # http.client ends a read that is short of its length without a word when it was given an amount.
            if answer.length:
                raise Unreachable(f"MLflow broke off after {size} bytes of {path[-120:]}")

    def _json(self, method: str, address: str, body: bytes | None) -> Mapping[str, Any]:
        deadline = time.monotonic() + self._timeout_s
        with self._exchange(method, address, body, deadline) as answer:
            text = _bounded(answer, MAX_ANSWER_BYTES, address)
        found = parse_json(text)
        if not isinstance(found, dict):
            raise Unusable("MLflow's answer is no JSON object")
        return found

    @contextmanager
    def _exchange(
        self, method: str, address: str, body: bytes | None, deadline: float
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer with status 200, to be read inside the block."""
        try:
            wire = self._connected(deadline)
            try:
                client = http.client.HTTPConnection(self._host, self._port)
                client.sock = wire  # it uses sendall, makefile and close
                kind = {} if body is None else {"Content-Type": "application/json"}
                client.request(method, self._base + address, body, {**self._headers, **kind})
                answer = client.getresponse()
                if answer.status != 200:
                    raise _refusal(answer)
                yield answer
            finally:
                wire.end()
        except TimeoutError:
            raise Unreachable(f"MLflow gave no answer within {self._timeout_s:g} s") from None
        except ssl.SSLError as error:
            raise Unreachable(f"TLS with MLflow failed: {error.reason or 'no reason given'}") from None
        except _WriteFailed as error:
            raise error.reason from None
        except OSError as error:
            raise Unreachable(f"MLflow cannot be reached: {error.strerror or error}") from None
        except (http.client.HTTPException, ValueError) as error:
            raise Unreachable(f"MLflow's answer is no HTTP: {type(error).__name__}") from None

    def _connected(self, deadline: float) -> _DeadlineSocket:
        raw = socket.create_connection((self._host, self._port), min(self._timeout_s, _left(deadline)))
        try:
            sock = raw if self._tls is None else self._tls.wrap_socket(raw, server_hostname=self._host)
        except BaseException:
            raw.close()
            raise
        return _DeadlineSocket(sock, deadline, self._timeout_s)


class _WriteFailed(Exception):
    """The disk refused, which is no fault of the wire's."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _DeadlineSocket(io.RawIOBase):
    """A socket whose reads and writes share one deadline, and of which none is silent for longer than a while."""

    def __init__(self, sock: socket.socket, deadline: float, silence_s: float) -> None:
        self._sock = sock
        self._deadline = deadline
        self._silence_s = silence_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(min(self._silence_s, _left(self._deadline)))
        return self._sock.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        """What http.client calls."""
        self._sock.settimeout(min(self._silence_s, _left(self._deadline)))
        self._sock.sendall(data)

    def makefile(self, _mode: str, *_: Any) -> io.BufferedReader:
        """What http.client reads the answer from."""
        return io.BufferedReader(self, _CHUNK_BYTES)

    def close(self) -> None:
        """What http.client calls once it has the headers of a last answer, whose body is yet to be read."""

    def end(self) -> None:
        """Close the connection."""
        self._sock.close()


def parse_json(text: bytes) -> Any:
    """JSON of MLflow. Raises Unusable."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable("MLflow's answer is no JSON") from error


def _refusal(answer: http.client.HTTPResponse) -> Exception:
    """What an answer other than 200 means."""
    if 300 <= answer.status < 400:
        return Unreachable(f"MLflow answered {answer.status}: redirects are not followed")
    body = answer.read(65_536)
    code, text = _error_of(body)
    found = Refusal(answer.status, code, text)
    return Unreachable(str(found)) if answer.status in _PASSING else found


def _error_of(body: bytes) -> tuple[str, str]:
    """MLflow's error code and message; empty when the answer is somebody else's."""
    try:
        found = json.loads(body)
        code, text = found["error_code"], found.get("message", "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", ""
    printable = "".join(c for c in str(text)[:200] if c.isprintable())
    return (code if isinstance(code, str) and code.replace("_", "").isalnum() else ""), printable


def _bounded(answer: http.client.HTTPResponse, limit: int, what: str) -> bytes:
    _check_length(answer, limit, what)
    found = answer.read(limit + 1)
    if len(found) > limit:
        raise _too_much(what, limit)
    if answer.length and len(found) < limit:
        raise Unreachable(f"MLflow broke off after {len(found)} bytes of {what[-120:]}")
    return found


def _check_length(answer: http.client.HTTPResponse, limit: int, what: str) -> None:
    if answer.length is not None and answer.length > limit:
        raise _too_much(what, limit)


def _too_much(what: str, limit: int) -> Unusable:
    return Unusable(f"{what[-120:]} has more than the {limit} bytes that are taken")


def _write(target: int, chunk: bytes) -> None:
    try:
        view = memoryview(chunk)
        while view:
            view = view[os.write(target, view) :]
    except OSError as error:
        raise _WriteFailed(error) from error


def _target(path: str, query: Query) -> str:
    """A path of known segments, each escaped, and a query."""
    target = quote(path, safe="/")
    return f"{target}?{urlencode(list(query))}" if query else target


def _login(options: MlflowOptions) -> dict[str, str]:
    if options.token:
        return {"Authorization": f"Bearer {options.token}"}
    if options.user:
        pair = base64.b64encode(f"{options.user}:{options.password}".encode()).decode()
        return {"Authorization": f"Basic {pair}"}
    return {}


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _tls_context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the file of trusted authorities cannot be used: {error}") from None
