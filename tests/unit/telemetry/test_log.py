"""Log lines as they reach the descriptor: both formats, foreign records, hostile values, a reader that is gone."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog

from server.errors import ConfigError
from server.telemetry.log import LineSink, configure, get_logger

ROOT = Path(__file__).parents[3]


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """Configure JSON to a file; call the fixture's value for the lines so far."""
    path = tmp_path / "log"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    configure("json", "debug", fd)
    yield lambda: path.read_text().split("\n")[:-1]
    forget_logging()
    os.close(fd)


def forget_logging() -> None:
    structlog.reset_defaults()
    logging.captureWarnings(capture=False)
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h).__module__ == "server.telemetry.log"]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)


def test_an_event_is_one_json_line(lines: Callable[[], list[str]]) -> None:
    get_logger("server.lifecycle").info("ready", http="127.0.0.1:8000", models=["a"], took_ms=1.5)
    (line,) = lines()
    entry = json.loads(line)
    assert list(entry)[:4] == ["timestamp", "level", "event", "logger"]
    stamp = datetime.fromisoformat(entry.pop("timestamp"))
    assert stamp.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - stamp) < timedelta(minutes=1)
    assert entry == {
        "level": "info",
        "event": "ready",
        "logger": "server.lifecycle",
        "http": "127.0.0.1:8000",
        "models": ["a"],
        "took_ms": 1.5,
    }


def test_foreign_records_look_alike(lines: Callable[[], list[str]]) -> None:
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 42)
    entry = json.loads(lines()[0])
    assert datetime.fromisoformat(entry.pop("timestamp")).utcoffset() == timedelta(0)
    assert entry == {"level": "info", "event": "Started server process [42]", "logger": "uvicorn.error"}


def test_warnings_are_logged(lines: Callable[[], list[str]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("old option", DeprecationWarning, stacklevel=1)
    entry = json.loads(lines()[0])
    assert entry["level"] == "warning"
    assert "old option" in entry["event"]


def fail(logger: logging.Logger | structlog.typing.FilteringBoundLogger) -> None:
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        logger.exception("batch_failed")


@pytest.mark.parametrize("make", [get_logger, logging.getLogger])
def test_exceptions_carry_their_traceback(
    lines: Callable[[], list[str]], make: Callable[[str], logging.Logger]
) -> None:
    fail(make("x"))
    (line,) = lines()
    entry = json.loads(line)
    assert (entry["event"], entry["level"]) == ("batch_failed", "error")
    assert entry["exception"].splitlines()[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("two\nlines\u2028and\x00more", "two\nlines\u2028and\x00more"),
        ("caf\udce9", "caf\udce9"),
        (2**70, 2**70),
        ({1: "a"}, {"1": "a"}),
        (Path("model.onnx"), repr(Path("model.onnx"))),
        (float("nan"), None),
    ],
)
def test_any_value_stays_one_readable_line(lines: Callable[[], list[str]], value: object, read: object) -> None:
    get_logger("x").warning("odd", value=value)
    (line,) = lines()
    assert json.loads(line)["value"] == read


def test_a_malformed_foreign_record_does_not_reach_its_caller(lines: Callable[[], list[str]]) -> None:
    (bridge,) = [h for h in logging.getLogger().handlers if type(h).__module__ == "server.telemetry.log"]
    bridge.handle(logging.LogRecord("grpc", logging.ERROR, "", 0, "needs %d", ("a number",), None))
    assert json.loads(lines()[0]) == {"event": "log_record_unreadable", "logger": "grpc"}


def test_levels_filter_both_roads_and_can_change(lines: Callable[[], list[str]], tmp_path: Path) -> None:
    ours, theirs = get_logger("ours"), logging.getLogger("theirs")
    fd = os.open(tmp_path / "second", os.O_CREAT | os.O_WRONLY)
    try:
        configure("json", "warning", fd)
        for logger in (ours, theirs):
            logger.info("quiet")
            logger.warning("loud")
        configure("json", "info", fd)
        ours.info("heard")
    finally:
        os.close(fd)
    events = [json.loads(line) for line in (tmp_path / "second").read_text().splitlines()]
    assert [(entry["logger"], entry["event"]) for entry in events] == [
        ("ours", "loud"),
        ("theirs", "loud"),
        ("ours", "heard"),
    ]
    assert lines() == []


def test_text_is_readable_and_one_line_per_event(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        configure("text", "info", fd)
        get_logger("x").info("ready", http="127.0.0.1:8000", note="has spaces", forged='a\nb="c"', rows=3, empty="")
        logging.getLogger("uvicorn").info("two\nlines")
        fail(get_logger("x"))
    finally:
        forget_logging()
        os.close(fd)
    first, second, third, *traceback = path.read_text().splitlines()
    stamp, _, rest = first.partition(" ")
    assert datetime.fromisoformat(stamp).utcoffset() == timedelta(0)
    assert rest == (
        'info     ready logger=x http=127.0.0.1:8000 note="has spaces" forged="a\\nb=\\"c\\"" rows=3 empty=""'
    )
    assert second.endswith('info     "two\\nlines" logger=uvicorn')
    assert third.endswith("error    batch_failed logger=x")
    assert traceback[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(("fmt", "level", "wrong"), [("xml", "info", "'xml'"), ("json", "loud", "'loud'")])
def test_unknown_settings_are_refused(fmt: str, level: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        configure(fmt, level)


def lost(count: int) -> str:
    return f"lost {count}"


def test_a_reader_that_stalls_costs_lines_not_time() -> None:
    reader, writer = os.pipe()
    try:
        sink = LineSink(writer)
        line = "x" * 1000
        for _ in range(1000):  # far over what a pipe holds; a blocking write would never return
            sink.write(line, lost)
        assert sink.dropped > 500
        dropped = sink.dropped
        assert drain(reader) == (1000 - dropped) * (line + "\n")
        sink.write("again", lost)
        assert drain(reader) == f"again\nlost {dropped}\n"
        assert sink.dropped == 0
    finally:
        os.close(reader)
        os.close(writer)


def test_a_torn_line_is_ended_before_the_next() -> None:
    reader, writer = os.pipe()
    try:
        sink = LineSink(writer)
        sink.write("y" * 1_000_000, lost)
        assert sink.dropped == 1
        assert set(drain(reader)) == {"y"}
        sink.write("next", lost)
        assert drain(reader) == "\nnext\nlost 1\n"
    finally:
        os.close(reader)
        os.close(writer)


def drain(fd: int) -> str:
    os.set_blocking(fd, False)
    parts = []
    try:
        while part := os.read(fd, 65536):
            parts.append(part)
    except BlockingIOError:
        pass
    return b"".join(parts).decode()


@pytest.mark.parametrize("kind", ["closed", "broken"])
def test_a_closed_or_broken_standard_error_is_survived(kind: str) -> None:
    reader, writer = os.pipe()
    sink = LineSink(writer)
    os.close(reader)
    if kind == "closed":
        os.close(writer)
    sink.write("nobody", lost)
    assert sink.dropped == 1
    if kind == "broken":
        os.close(writer)


def test_a_process_logs_to_standard_error_only() -> None:
    program = (
        "from server.telemetry.log import *; configure(); get_logger('x').info('ready'); get_logger('x').debug('no')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == ""
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["ready"]


def test_importing_configures_nothing() -> None:
    program = "import logging, server.telemetry.log, structlog; print(structlog.is_configured(), logging.root.handlers)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False []\n"
