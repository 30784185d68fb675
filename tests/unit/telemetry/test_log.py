"""Log lines as they reach the descriptor: both formats, foreign records, hostile values, readers late or gone."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
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


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Where to read and where to write."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        with suppress(OSError):  # the test has closed it
            os.close(fd)


def read_until(fd: int, end: str) -> list[str]:
    """The lines up to the first that is ``end``; fails when nothing comes any more before it has."""
    text = b""
    while not text.endswith(f"{end}\n".encode()):
        assert select.select([fd], [], [], 20)[0], text[-200:]
        text += os.read(fd, 65536)
    return text.decode().splitlines()


def test_a_reader_that_is_late_finds_every_line(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    sink = LineSink(writer, lost)
    written = [f"{number:0500}" for number in range(1000)]
    for line in written:  # far over what a pipe holds; a blocking write would never return
        sink.write(line)
    assert read_until(reader, written[-1]) == written  # and nothing is written that could bring the last one
    sink.flush(20)
    sink.write("again")
    assert read_until(reader, "again") == ["again"]


def test_over_the_limit_the_oldest_that_wait_are_dropped_and_told_in_their_place(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    sink = LineSink(writer, lost, limit=100_000)
    written = [f"{number:0999}" for number in range(1000)]
    for line in written:
        sink.write(line)
    dropped = sink.dropped
    assert dropped > 500
    found = read_until(reader, written[-1])
    assert sink.dropped == 0
    before = found.index(f"lost {dropped}")
    assert found[:before] == written[:before]
    assert found[before + 1 :] == written[before + dropped :] == written[-100:]


def test_a_line_that_has_begun_is_ended_whatever_its_length(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    sink = LineSink(writer, lost, limit=10_000)
    sink.write("y" * 1_000_000)
    sink.write("z" * 20_000)  # alone over the limit
    sink.write("next")
    assert read_until(reader, "next") == ["y" * 1_000_000, "lost 1", "next"]


def test_lines_of_several_threads_stay_whole(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    sink = LineSink(writer, lost)

    def log(name: str) -> None:
        for number in range(300):
            sink.write(f"{name}{number:0900}")

    threads = [threading.Thread(target=log, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.write("end")
    found = read_until(reader, "end")
    for name in "ab":
        assert [line for line in found if line[0] == name] == [f"{name}{number:0900}" for number in range(300)]


def test_what_is_logged_while_a_line_is_being_written_follows_it(pipe: tuple[int, int]) -> None:
    """As by a finalizer, which the garbage collector runs wherever it begins."""
    reader, writer = pipe

    def lost_line(count: int) -> str:
        sink.write("meanwhile")
        return lost(count)

    sink = LineSink(writer, lost_line, limit=10)
    for line in ("y" * 1_000_000, "over the limit", "next"):
        sink.write(line)
    assert read_until(reader, "meanwhile") == ["y" * 1_000_000, "lost 1", "next", "meanwhile"]


def test_what_is_logged_as_the_interpreter_ends_does_not_keep_it(pipe: tuple[int, int]) -> None:
    program = (
        "import os, sys; from server.telemetry.log import LineSink\n"
        "class Last:\n"
        "    def __del__(self, sink=LineSink(int(sys.argv[1]), str), ended=sys.is_finalizing, write=os.write):\n"
        "        sink.write('y' * 1_000_000); write(1, b'%d' % ended())\n"
        "last = Last()"
    )
    _, writer = pipe
    done = subprocess.run(
        [sys.executable, "-c", program, str(writer)],
        capture_output=True, check=True, cwd=ROOT, pass_fds=[writer], timeout=20,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (b"1", b"")


def test_what_waits_for_a_reader_that_goes_is_counted_and_a_torn_line_is_ended(
    pipe: tuple[int, int], tmp_path: Path
) -> None:
    reader, writer = pipe
    sink = LineSink(writer, lost)
    for line in ("y" * 1_000_000, "second", "third"):
        sink.write(line)
    os.close(reader)
    sink.flush(20)
    assert sink.dropped == 3
    file = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(file, writer)
    os.close(file)
    sink.write("fourth")
    sink.write("fifth")
    assert (tmp_path / "log").read_text() == "\nlost 3\nfourth\nfifth\n"


@pytest.mark.parametrize("kind", ["closed", "broken"])
def test_a_closed_or_broken_standard_error_is_survived(kind: str, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    sink = LineSink(writer, lost)
    os.close(reader)
    if kind == "closed":
        os.close(writer)
    sink.write("nobody")
    assert sink.dropped == 1


def test_a_process_that_ends_lets_a_late_reader_have_what_waits() -> None:
    program = (
        "from server.telemetry.log import *; configure(); log = get_logger('x')\n"
        "for number in range(2000): log.info('line', number=number, filling='x' * 200)\n"
        "print('done', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "done\n"
        found = [json.loads(line) for line in process.stderr]
    assert [entry.get("number") for entry in found] == list(range(2000))
    assert process.returncode == 0


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
