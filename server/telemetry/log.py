"""Structured logs: structlog in front, one line per event on standard error, JSON (orjson) or readable text.

``configure`` is called once by the process that owns standard error; importing this module does nothing. Records of
the stdlib's logging (uvicorn, grpc, warnings) take the same road and look alike; start uvicorn with
``log_config=None`` so that its loggers propagate to the root.

Logging never stops the server: a line that standard error does not take at once (a pipe nobody reads) is dropped
and counted, and the count is told with the next line that gets through.
"""

from __future__ import annotations

import json
import logging
import os
import select
import threading
from collections.abc import Callable, MutableMapping
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
#: How long a full standard error may hold up the first line; while it stays full the next ones are dropped at once.
_PATIENCE_MS: Final = 50


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose events carry ``logger=name``. Cheap enough for module level: nothing happens before first use."""
    return cast("FilteringBoundLogger", structlog.get_logger(name))


def configure(format: str = "json", level: str = "info", fd: int = 2) -> None:
    """Send all logs from ``level`` up to file descriptor ``fd``. May be called again to change any of the three.

    Raises ConfigError for an unknown format or level.
    """
    _check(format, level)
    render = _render_json if format == "json" else _render_text
    sink, lost_line = LineSink(fd), _lost_line(render)
    structlog.configure(
        processors=[*_shared_processors(), render],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda name="": _LineLogger(name, sink, lost_line),
        cache_logger_on_first_use=False,  # a later configure() must reach loggers bound at module level
    )
    _bridge_stdlib(_LineLogger("", sink, lost_line), render, LEVELS[level])


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
    """Whole lines onto one file descriptor; safe from any thread; never raises and never waits long."""

    def __init__(self, fd: int) -> None:
        #: Lines lost and not yet told about.
        self.dropped = 0
        self._fd = fd
        self._lock = threading.Lock()
        self._stalled = False
        self._torn = False
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def write(self, line: str, lost_line: Callable[[int], str]) -> None:
        """Write ``line``, then ``lost_line(n)`` when n lines before it were dropped; or count this one as dropped."""
        with self._lock:
            if not self._send(line):
                self.dropped += 1
            elif self.dropped and self._send(lost_line(self.dropped)):
                self.dropped = 0

    def _send(self, line: str) -> bool:
        data = b"\n" * self._torn + line.encode("utf-8", "backslashreplace") + b"\n"
        sent = 0
        try:
            while sent < len(data) and self._writable():
                sent += os.write(self._fd, data[sent : sent + _PIPE_BUF])
        except OSError:
            pass  # a closed or broken standard error leaves nobody to tell
        self._torn = 0 < sent < len(data)
        return sent == len(data)

    def _writable(self) -> bool:
        events = self._poll.poll(0 if self._stalled else _PATIENCE_MS)
        self._stalled = not events
        return bool(events)


class _LineLogger:
    """What structlog calls once an event is rendered: every level writes."""

    def __init__(self, name: str, sink: LineSink, lost_line: Callable[[int], str]) -> None:
        self.name = name
        self._sink = sink
        self._lost_line = lost_line

    def msg(self, line: str) -> None:
        self._sink.write(line, self._lost_line)

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

    def __init__(self, logger: _LineLogger) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._logger.msg(self.format(record))
        except Exception:  # noqa: BLE001 - a record that cannot be formatted must not reach the code that logged it
            self._logger.msg(json.dumps({"event": "log_record_unreadable", "logger": record.name}))


def _bridge_stdlib(logger: _LineLogger, render: Callable[..., str], level: int) -> None:
    bridge = _Bridge(logger)
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
