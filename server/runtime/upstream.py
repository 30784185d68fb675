"""Another V2 server as the engine of a version: Triton, MLServer, or another Tidegate, over HTTP/1.1.

The signature comes from the upstream's metadata, its batch limit from its configuration endpoint, where it has one;
without one nothing is combined, as batching cannot be proven over a network. A batch is one request, with every tensor
in binary form where the upstream offers that extension and in JSON where not (``upstream_messages``), on one kept
connection per instance; ``run`` blocks, so it belongs on a thread (``run_ns`` is large, and ``server.batching.offloop``
keeps it there).

**Nothing is sent twice.** A connection that the upstream has closed while it was idle is found out before it is used.
A batch that failed is not run again in parts, unless the upstream says that the request is to blame. After an upstream
could not be reached or was too slow, its engine refuses for ``hold_off_s`` without trying: those who waited meanwhile
do not wait for one timeout each.

**What an upstream says is checked** before it is believed: sizes, names, datatypes, shapes, rows. It is the operator's
choice (the address comes from the configuration alone, redirects are not followed), yet it may be broken.
"""

from __future__ import annotations

import http.client
import io
import select
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import quote, urlsplit

import structlog

from server.errors import (
    ConfigError,
    InputRejected,
    ModelLoadError,
    RuntimeFailure,
    TidegateError,
    UpstreamFailure,
    UpstreamUnavailable,
)
from server.runtime.base import Batch, LoadRequest
from server.runtime.messages import clean
from server.runtime.upstream_messages import (
    BINARY_EXTENSION,
    HEADER_LENGTH,
    BadAnswer,
    Dialect,
    dimensions,
    error_text,
    json_object,
)
from server.runtime.upstream_options import UpstreamOptions
from server.types import ALL_DATATYPES, Buffer, ModelSpec, Tensor, TensorSpec

_log = structlog.get_logger("tidegate.runtime")

#: Long enough to keep it off an event loop.
_RUN_NS: Final = 10_000_000
_MAX_METADATA_BYTES: Final = 4 * 1024 * 1024
_CHUNK_BYTES: Final = 1 << 20
_TOO_LARGE: Final = 413
#: The answers that blame the request, if they say why as the protocol has it: without that, it was not understood.
#: 404 is not among them, as the request's model was there when it was loaded.
_REJECTED: Final = frozenset({400, _TOO_LARGE, 422})
#: The answers of a server that is not ready, overloaded, or has lost the model since it was loaded.
_UNAVAILABLE: Final = frozenset({404, 408, 429, 502, 503, 504})


# --- the connection --------------------------------------------------------------------------------------------------


class _DeadlineSocket(io.RawIOBase):
    """A socket whose reads share one deadline, so that a trickle of bytes cannot outlast it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline = 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._arm()
        return self.sock.recv_into(buffer)

    def sendall(self, data: Buffer) -> None:
        """What http.client calls; the timeout of a socket's ``sendall`` is one for all of it."""
        self._arm()
        self.sock.sendall(data)

    def makefile(self, _mode: str, *_: Any) -> io.BufferedReader:
        """What http.client reads an answer from. Closing it leaves the socket open."""
        return io.BufferedReader(_Unclosed(self))

    def close(self) -> None:
        super().close()
        self.sock.close()

    def _arm(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the exchange took too long")
        self.sock.settimeout(left)


class _Unclosed(io.RawIOBase):
    """One answer's view of the kept socket."""

    def __init__(self, source: _DeadlineSocket) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._source.readinto(buffer)


class _Connection:
    """One kept HTTP/1.1 connection, used by one thread at a time. Raises OSError or HTTPException."""

    def __init__(self, options: UpstreamOptions) -> None:
        parts = urlsplit(options.url)
        self._options = options
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = _tls_context(options.ca_file) if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/")
        self._client: http.client.HTTPConnection | None = None
        self._wire: _DeadlineSocket | None = None

    def exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], limit: int
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One request and its whole answer, of at most ``limit`` bytes, within ``timeout_s``."""
        client, wire = self._open()
        wire.deadline = time.monotonic() + self._options.timeout_s
        try:
            client.request(method, self._prefix + path, body, {**dict(self._options.headers), **headers})
            answer = client.getresponse()
            content = _read_bounded(answer, limit)
        except BaseException:
            self.close()  # what is left on the wire belongs to no later request
            raise
        if answer.will_close:
            self.close()
        return answer.status, answer.headers, content

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        if self._wire is not None:
            self._wire.close()
        self._client = self._wire = None

    def _open(self) -> tuple[http.client.HTTPConnection, _DeadlineSocket]:
        if self._client is not None and self._wire is not None:
            if not _has_spoken(self._wire.sock):
                return self._client, self._wire
            self.close()
        sock = socket.create_connection((self._host, self._port), self._options.connect_timeout_s)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_hostname=self._host)
        except BaseException:
            sock.close()
            raise
        self._wire = _DeadlineSocket(sock)
        self._client = http.client.HTTPConnection(self._host, self._port)
        self._client.sock = self._wire
        self._client.auto_open = 0
        return self._client, self._wire


def _tls_context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:
        raise ConfigError(f"the file of trusted authorities of an upstream cannot be used: {error.strerror}") from None


def _has_spoken(sock: socket.socket) -> bool:
    """Whether an idle connection has something to read: its end, or bytes that nobody asked for."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _read_bounded(answer: http.client.HTTPResponse, limit: int) -> bytes:
    announced = answer.length
    if announced is not None and announced > limit:
        raise http.client.HTTPException(f"the answer has {announced} bytes, over the limit of {limit}")
    chunks: list[bytes] = []
    size = 0
    while chunk := answer.read(_CHUNK_BYTES):
        size += len(chunk)
        if size > limit:
            raise http.client.HTTPException(f"the answer goes over the limit of {limit} bytes")
        chunks.append(chunk)
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


# --- the engine ------------------------------------------------------------------------------------------------------


class UpstreamEngine:
    """Implements ``Engine``. An upstream that is gone fails its batches and serves again once it is back."""

    #: Its runs wait on a network: none may be on the loop, however short they turn out.
    remote: Final = True

    def __init__(self, spec: ModelSpec, instances: int, options: UpstreamOptions, path: str, *, binary: bool) -> None:
        self.spec = spec
        self.instances = instances
        self.run_ns = _RUN_NS
        self.memory_bytes = 0
        self._options = options
        self._path = path
        self._connections = [_Connection(options) for _ in range(instances)]
        self._dialect = Dialect(spec, binary=binary)
        self._held_off_until = 0.0

    def run(self, instance: int, batch: Batch) -> list[Tensor]:
        if not self._connections:
            raise RuntimeFailure("The model has been unloaded.")
        body, headers = self._dialect.request(batch)
        status, received, content = self._exchange(self._connections[instance], body, headers)
        if status != 200:
            raise self._failure(status, content)
        return self._dialect.answer(batch, received.get(HEADER_LENGTH), content)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._connections = []

    def _exchange(
        self, connection: _Connection, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        if time.monotonic() < self._held_off_until:
            raise UpstreamUnavailable(_UNREACHABLE, retry_after_s=1.0)
        try:
            return connection.exchange("POST", self._path, body, headers, self._options.max_response_bytes)
        except (OSError, http.client.HTTPException) as error:
            self._held_off_until = time.monotonic() + self._options.hold_off_s
            _log.warning("upstream_failed", model=self.spec.name, version=self.spec.version, error=_named(error))
            raise UpstreamUnavailable(_UNREACHABLE, retry_after_s=1.0) from None

    def _failure(self, status: int, content: bytes) -> TidegateError:
        reason = error_text(content) if status in _REJECTED else ""
        if reason or status == _TOO_LARGE:
            return InputRejected(f"The model refused this input: {clean(reason or 'it is too large')}")
        if status in _UNAVAILABLE:
            return UpstreamUnavailable(
                f"The server of this version is not available: it answered {status}.", retry_after_s=1.0
            )
        return UpstreamFailure(f"The server of this version failed: it answered {status}.")


_UNREACHABLE: Final = "The server of this version cannot be reached, or did not answer in time."


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


# --- loading ---------------------------------------------------------------------------------------------------------


class UpstreamRuntime:
    """Implements ``Runtime`` over one upstream: what is loaded there becomes a version here."""

    def __init__(self, options: UpstreamOptions) -> None:
        self.options = options

    def load(self, request: LoadRequest) -> UpstreamEngine:
        """An engine whose connection works, or ModelLoadError."""
        try:
            connection = _Connection(self.options)
        except ConfigError as error:
            raise ModelLoadError(f"The upstream of {_label(request)}: {error.message}.") from None
        try:
            return self._load(request, connection)
        except (OSError, http.client.HTTPException) as error:
            _log.warning("upstream_failed", model=request.name, version=request.version, error=_named(error))
            raise ModelLoadError(f"The upstream of {_label(request)} cannot be reached.") from error
        except BadAnswer as error:
            raise ModelLoadError(f"The upstream of {_label(request)} answered wrongly: {error}.") from None
        finally:
            connection.close()

    def describe(self) -> Mapping[str, object]:
        """The work is done elsewhere; here it takes a processor only."""
        return {
            "library": "upstream",
            "providers_compiled": ["cpu"],
            "providers_working": ["cpu"],
            "providers_failing": {},
        }

    def _load(self, request: LoadRequest, connection: _Connection) -> UpstreamEngine:
        base = f"/v2/models/{quote(self.options.model or request.name, safe='')}"
        if self.options.version:
            base += f"/versions/{quote(self.options.version, safe='')}"

        def get(path: str) -> dict[str, Any] | None:
            status, _, content = connection.exchange("GET", path, None, {}, _MAX_METADATA_BYTES)
            return json_object(content) if status == 200 else None

        metadata = get(base)
        if metadata is None:
            raise ModelLoadError(f"The upstream of {_label(request)} does not serve it.")
        spec = self._spec(request, metadata, _optional(lambda: get(f"{base}/config")))
        extensions = (_optional(lambda: get("/v2")) or {}).get("extensions")
        binary = isinstance(extensions, list) and BINARY_EXTENSION in extensions
        instances = max(1, request.options.instances)
        return UpstreamEngine(spec, instances, self.options, f"{base}/infer", binary=binary)

    def _spec(self, request: LoadRequest, metadata: dict[str, Any], config: dict[str, Any] | None) -> ModelSpec:
        inputs, outputs = _signature(metadata, "inputs"), _signature(metadata, "outputs")
        rows, note = self._max_rows(request, config, inputs + outputs)
        gathered = request.options.batching.max_rows or rows
        return ModelSpec(
            name=request.name,
            version=request.version,
            inputs=inputs,
            outputs=outputs,
            platform="tidegate_upstream",
            backend="upstream",
            max_batch_size=rows,
            learned_batch_size=min(rows, gathered),
            batching_note=note,
        )

    def _max_rows(
        self, request: LoadRequest, config: dict[str, Any] | None, tensors: tuple[TensorSpec, ...]
    ) -> tuple[int, str]:
        """Rows that one request may have (0: nothing is combined), and why there are none."""
        declared = None if config is None else config.get("max_batch_size")
        if type(declared) is not int:
            return 0, "the upstream does not say how many rows it takes"
        if declared < 1:
            return 0, ""
        if any(tensor.shape[:1] != (-1,) for tensor in tensors):
            return 0, "the upstream batches, but the first dimension of a tensor is not free"
        bounds = [declared, self.options.max_batch_rows, request.options.max_batch_size]
        return (0 if request.options.max_batch_size == 0 else min(bound for bound in bounds if bound)), ""


def _optional(ask: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """What an upstream need not have, or may keep from us: whoever has it not may answer anything there."""
    try:
        return ask()
    except BadAnswer:
        return None


def _label(request: LoadRequest) -> str:
    return f"model '{request.name}' version '{request.version}'"


def _signature(metadata: dict[str, Any], key: str) -> tuple[TensorSpec, ...]:
    entries = metadata.get(key)
    if not isinstance(entries, list) or not entries:
        raise BadAnswer(f"its metadata has no {key}")
    specs = tuple(_tensor_spec(entry) for entry in entries)
    if len({spec.name for spec in specs}) != len(specs):
        raise BadAnswer(f"its metadata names one of its {key} twice")
    return specs


def _tensor_spec(entry: Any) -> TensorSpec:
    if not isinstance(entry, dict):
        raise BadAnswer("its metadata has a tensor that is no object")
    name, datatype, shape = entry.get("name"), entry.get("datatype"), dimensions(entry.get("shape"), least=-1)
    if not isinstance(name, str) or not name or datatype not in ALL_DATATYPES or shape is None:
        raise BadAnswer(f"its metadata has a tensor without name, datatype or shape: {str(entry)[:120]}")
    return TensorSpec(name, datatype, shape)
