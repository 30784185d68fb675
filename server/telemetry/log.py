"""Structured logs: structlog in front, one line per event on standard error, JSON (orjson) or readable text.

``configure`` is called once by the process that owns standard error; importing this module does nothing. Records of
the stdlib's logging (uvicorn, grpc, warnings) take the same road and look alike; start uvicorn with
``log_config=None`` so that its loggers propagate to the root.

Logging never stops the server: what standard error does not take at once (a pipe that is read slowly, or not at all)
waits in memory up to a limit. Beyond it the lines that have waited longest are dropped and counted, and the count is
told in their place.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any, Final, cast

import orjson
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from server.errors import ConfigError

FORMATS: Final = ("json", "text")
LEVELS: Final[dict[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
#: POSIX promises that a pipe reported writable takes this many bytes without blocking.
_PIPE_BUF: Final = getattr(select, "PIPE_BUF", 512)
_END: Final = b"\n"
#: How many bytes of lines may wait for a standard error that is full.
_WAITING_BYTES: Final = 1 << 20
#: What a standard error that is full is given to take what waits, at the end of the process.
_FLUSH_S: Final = 2.0


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose events carry ``logger=name``. Cheap enough for module level: nothing happens before first use."""
    return cast("FilteringBoundLogger", structlog.get_logger(name))


def configure(format: str = "json", level: str = "info", fd: int = 2) -> None:
    """Send all logs from ``level`` up to file descriptor ``fd``. May be called again to change any of the three.

    What still waits to be written when the process ends is flushed by ``logging.shutdown``. Raises ConfigError for an
    unknown format or level.
    """
    _check(format, level)
    render = _render_json if format == "json" else _render_text
    sink = LineSink(fd, _lost_line(render))
    structlog.configure(
        processors=[*_shared_processors(), render],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda name="": _LineLogger(name, sink),
        cache_logger_on_first_use=False,  # a later configure() must reach loggers bound at module level
    )
    _bridge_stdlib(sink, render, LEVELS[level])


def _check(format_name: str, level: str) -> None:
    if format_name not in FORMATS:
        raise ConfigError(f"log format must be one of {', '.join(FORMATS)}, got {format_name!r}")
    if level not in LEVELS:
        raise ConfigError(f"log level must be one of {', '.join(LEVELS)}, got {level!r}")


def _shared_processors() -> list[Processor]:
    return [
        structlog.processors.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]


# --- Writing -----------------------------------------------------------------------------------------------------


class LineSink:
    """Whole lines onto one file descriptor, in order; safe from any thread and finalizer; never raises, never waits.

    What the descriptor has no room for waits for a thread that writes when there is some again. Over ``limit`` bytes
    the lines that have waited longest are dropped; what ``lost_line(n)`` gives is written where n of them were.
    """

    def __init__(self, fd: int, lost_line: Callable[[int], str], limit: int = _WAITING_BYTES) -> None:
        #: Lines lost and not yet told about.
        self.dropped = 0
        self._fd = fd
        self._lost_line = lost_line
        self._limit = limit
        #: Whoever has it writes for all.
        self._lock = threading.Lock()
        self._coming: deque[bytes] = deque()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        #: What is left of a line that has been written in part.
        self._rest = memoryview(b"")
        self._writer: threading.Thread | None = None
        self._room = _room_in(fd)

    def write(self, line: str) -> None:
        """Write ``line``, or have it wait."""
        self._coming.append(_encoded(line))
        self._write_coming()

    def flush(self, timeout_s: float = _FLUSH_S) -> None:
        """Wait until nothing waits any more, but not for long: nobody may be reading."""
        if self._lock.acquire(timeout=timeout_s):
            try:
                self._take_in()
            finally:
                self._lock.release()
        self._write_coming()
        writer = self._writer
        if writer is not None:
            writer.join(timeout_s)

    def _write_coming(self) -> None:
        """Write what comes, or have it wait, unless somebody is at it: who lets go of the lock looks again.

        To wait for the lock could be for ever: a finalizer that logs may have been run where this very thread has it,
        and a thread that ends with the process may have had it.
        """
        while self._coming and self._lock.acquire(blocking=False):
            try:
                self._take_in()
            finally:
                self._lock.release()

    def _take_in(self) -> None:
        while self._coming:
            data = self._coming.popleft()
            self._waiting.append(data)
            self._waiting_bytes += len(data)
        if self._waiting and self._writer is None and not self._write_all():
            self._start_writer()
        self._shorten()

    def _write_all(self) -> bool:
        """Write while there is room; False when something is left."""
        while self._room.poll(0):
            if self._write_some():
                return True
        return False

    def _write_some(self) -> bool:
        """Write what there is room for; True when nothing is left to be written."""
        try:
            if self._rest:
                self._rest = self._unsent(self._rest)
            elif self.dropped:
                self._rest = self._unsent(memoryview(_encoded(self._lost_line(self.dropped))))
                self.dropped = 0
            else:
                self._rest = self._unsent(memoryview(self._waiting[0]))
                self._waiting_bytes -= len(self._waiting.popleft())
        except OSError:
            self._give_up()
            return True
        return not (self._rest or self._waiting)

    def _unsent(self, data: memoryview) -> memoryview:
        """What is left of it once the descriptor has taken what it takes without blocking."""
        with suppress(BlockingIOError):  # another process that writes there took the room
            return data[os.write(self._fd, data[:_PIPE_BUF]) :]
        return data

    def _give_up(self) -> None:
        """Standard error is closed or broken: nobody is left to tell. Should it recover, a torn line is ended first."""
        self.dropped += len(self._waiting) + (len(self._rest) > len(_END))
        self._waiting.clear()
        self._waiting_bytes = 0
        self._rest = memoryview(_END if self._rest else b"")

    def _shorten(self) -> None:
        while self._waiting_bytes > self._limit:
            self._waiting_bytes -= len(self._waiting.popleft())
            self.dropped += 1

    def _start_writer(self) -> None:
        """What waits is written even if no line follows."""
        if sys.is_finalizing():
            return  # a thread would not begin any more, and be waited for
        writer = threading.Thread(target=self._write_later, name="log-writer", daemon=True)
        with suppress(RuntimeError):  # no thread to spare: the next line tries again
            writer.start()
            self._writer = writer

    def _write_later(self) -> None:
        room = _room_in(self._fd)
        while True:
            room.poll()
            with self._lock:
                if self._write_some():
                    self._writer = None
                    break
        self._write_coming()


def _room_in(fd: int) -> select.poll:
    """Tells when the descriptor takes something, or is broken. Not for several threads at once."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return poll


def _encoded(line: str) -> bytes:
    return line.encode("utf-8", "backslashreplace") + _END


class _LineLogger:
    """What structlog calls once an event is rendered: every level writes."""

    def __init__(self, name: str, sink: LineSink) -> None:
        self.name = name
        self._sink = sink

    def msg(self, line: str) -> None:
        self._sink.write(line)

    debug = info = warning = error = critical = msg


# --- Rendering ---------------------------------------------------------------------------------------------------


def _ordered(event: EventDict) -> dict[str, Any]:
    head = {key: event.pop(key) for key in ("timestamp", "level", "event", "logger") if key in event}
    return head | dict(event)


def _lost_line(render: Callable[..., str]) -> Callable[[int], str]:
    return lambda lines: render(None, "", {"level": "warning", "event": "log_lines_dropped", "lines": lines})


def _render_json(_: WrappedLogger, __: str, event: EventDict) -> str:
    fields = _ordered(event)
    try:
        return orjson.dumps(fields, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:
        # Lone surrogates and integers over 64 bits: orjson has no form for them, the stdlib does.
        return json.dumps(fields, default=repr, skipkeys=True)


def _render_text(_: WrappedLogger, __: str, event: EventDict) -> str:
    fields = _ordered(event)
    head = f"{fields.pop('timestamp', '')} {fields.pop('level', ''):<8} {_event(fields.pop('event', ''))}"
    trailers = [str(fields.pop(key)) for key in ("exception", "stack") if key in fields]
    pairs = "".join(f" {key}={_plain(value)}" for key, value in fields.items())
    return "\n".join([head + pairs, *trailers])


def _event(value: object) -> str:
    text = str(value)
    return text if text.isprintable() else json.dumps(text)


def _plain(value: object) -> str:
    """The value bare when that is unambiguous, else quoted; one line either way, whatever a client put in."""
    if not isinstance(value, str):
        return repr(value)
    if value and value.isprintable() and not any(mark in value for mark in ' "='):
        return value
    return json.dumps(value)


# --- The stdlib's records ----------------------------------------------------------------------------------------


class _Bridge(logging.Handler):
    """The root handler: renders a stdlib record as structlog renders its own events."""

    def __init__(self, sink: LineSink) -> None:
        super().__init__()
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._sink.write(self.format(record))
        except Exception:  # noqa: BLE001 - a record that cannot be formatted must not reach the code that logged it
            self._sink.write(json.dumps({"event": "log_record_unreadable", "logger": record.name}))

    def flush(self) -> None:
        self._sink.flush()


def _bridge_stdlib(sink: LineSink, render: Callable[..., str], level: int) -> None:
    bridge = _Bridge(sink)
    bridge.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_shared_processors(),
            processors=[_drop_internals, render],
        )
    )
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _Bridge)]:
        root.removeHandler(handler)
    root.addHandler(bridge)
    root.setLevel(level)
    logging.captureWarnings(capture=True)


def _drop_internals(_: WrappedLogger, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key in ("_record", "_from_structlog"):
        event.pop(key, None)
    return event
