"""The sink that starts a local command, such as a training: an argument list, never a shell.

The command runs under ``jobrunner``, apart from this process: a gateway that restarts finds it running, or its outcome,
and does not start it twice. It has the event on standard input, an environment of its own, and limits of time, memory
and processor. Exit code 0: delivered. 75 (EX_TEMPFAIL), the end of its time, or a signal by which somebody stopped it:
tried again. Anything else: refused, until a person asks for another try.

**One per model at a time.** A lock file per model is held by whoever runs its command, and freed by the kernel when
that process is gone. Another event of the same model waits for it for ``queue_s`` and is then tried later.

**On disk**, under ``folder``: ``MODEL/lock``, and per event ``MODEL/KEY/`` with the event, the outcome and the last of
what the command printed. The newest ``keep`` of a model's are kept. A command that was successful once is not run again
for the same key as long as its folder is kept.

The lease of a delivery lasts as long as the command may. After the death of the gateway the outcome is taken note of by
the next one on its host, or by another when that lease ends. The command itself goes on meanwhile.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM
from typing import Any, Final

import structlog

from server.delivery import jobrunner
from server.delivery.base import Delivered, Failed, Outcome, Refused
from server.errors import ConfigError
from server.outbox import HORIZON_S, Message

log = structlog.get_logger("tidegate.delivery")

#: The exit code of a command that may do better later: EX_TEMPFAIL of sysexits.h.
TEMPORARY: Final = 75
#: What a command finds in its environment, beside what the configuration gives it.
INHERITED: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR")
#: The longest time, as a lease ends within a day.
MAX_TIMEOUT_S: Final = HORIZON_S - 3600.0

#: Between looks at a lock that another process may hold: the system offers no wait for one that has an end.
_LOOK_S: Final = 0.02
#: The runner needs this long to begin and to clear up.
_MARGIN_S: Final = 10.0
#: When to ask again for a place behind another event of the same model.
_BUSY_S: Final = 60.0
_OVERDUE: Final = "the command should have ended by now"
_SAFE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", re.ASCII)
#: Signals by which people and systems stop a process that did nothing wrong.
_STOPPED: Final = frozenset({SIGTERM, SIGINT, SIGHUP})


@dataclass(slots=True, frozen=True)
class CommandOptions:
    """A command. Raises ConfigError for one that could never run.

    ``memory_bytes`` (of address space) and ``cpu_s`` are per process; 0: no limit.
    ``environment`` is all it gets beside ``INHERITED``. ``grace_s``: between SIGTERM and SIGKILL.
    """

    argv: tuple[str, ...]
    cwd: str = ""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_s: float = 3600.0
    grace_s: float = 5.0
    queue_s: float = 30.0
    memory_bytes: int = 0
    cpu_s: int = 0
    log_bytes: int = 1024 * 1024
    keep: int = 20

    def __post_init__(self) -> None:
        if not self.argv or not self.argv[0] or any("\0" in word for word in self.argv):
            raise ConfigError("a command is a list of texts, the program first")
        if not 0 < self.timeout_s <= MAX_TIMEOUT_S or min(self.grace_s, self.queue_s) < 0:
            raise ConfigError(
                f"a command's time must be over 0 and at most {MAX_TIMEOUT_S:g} s, got {self.timeout_s:g}"
            )
        if min(self.memory_bytes, self.cpu_s) < 0 or self.log_bytes < 2 or self.keep < 1:
            raise ConfigError("a command's limits must not be negative, its log at least 2 bytes, one job kept")


class CommandSink:
    """One command. Called from several threads, of any number of processes that share ``folder``."""

    def __init__(self, name: str, options: CommandOptions, folder: Path) -> None:
        self.name = name
        self.timeout_s = options.queue_s + options.timeout_s + options.grace_s + _MARGIN_S
        self._options = options
        self._folder = folder.absolute()

    def send(self, message: Message) -> Outcome:
        """Run the command with the event, or take up what an earlier try has left."""
        try:
            return self._send(message)
        except OSError as error:
            return Failed(f"the job's folder cannot be used: {error.strerror or error}")

    def _send(self, message: Message) -> Outcome:
        home = self._folder / _slug(_model(message))
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = home / hashlib.sha256(message.key.encode()).hexdigest()[:32]
        began = time.monotonic()
        while True:
            with _locked(home / "lock") as lock:
                if lock is not None:
                    known = _taken(folder)
                    return known if known is not None else self._run(message, home, folder, lock)
            waited_s = time.monotonic() - began
            if (home / "lock").read_text() != folder.name:
                if waited_s >= self._options.queue_s:
                    return Failed("another job of the model is running", _BUSY_S)
            elif waited_s >= self.timeout_s:
                return Failed(_OVERDUE)
            time.sleep(_LOOK_S)

    def _run(self, message: Message, home: Path, folder: Path, lock: int) -> Outcome:
        self._prepare(message, home, folder)
        os.ftruncate(lock, 0)
        os.pwrite(lock, folder.name.encode(), 0)
        # The runner holds the lock with us, and goes on holding it when we are gone.
        runner = subprocess.Popen(
            [sys.executable, "-I", "-S", jobrunner.__file__, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(lock,),
            cwd="/",
        )
        log.info("command_started", sink=self.name, id=message.id, subject=message.subject, log=str(folder / "log"))
        try:
            runner.wait(self._options.timeout_s + self._options.grace_s + _MARGIN_S)
        except subprocess.TimeoutExpired:
            # Stopped, by its command perhaps, it would hold the lock for ever. Its death is the command's too.
            runner.kill()
            runner.wait()
            return Failed(_OVERDUE)
        return _taken(folder) or Failed("the command's runner was killed")

    def _prepare(self, message: Message, home: Path, folder: Path) -> None:
        options = self._options
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        environment |= {"TIDEGATE_EVENT_ID": message.id, "TIDEGATE_IDEMPOTENCY_KEY": message.key}
        spec = {
            "argv": list(options.argv),
            "cwd": options.cwd,
            "env": {**environment, **options.environment},
            "timeout_s": options.timeout_s,
            "grace_s": options.grace_s,
            "memory_bytes": options.memory_bytes,
            "cpu_s": options.cpu_s,
            "log_bytes": options.log_bytes,
        }
        folder.mkdir(mode=0o700, exist_ok=True)
        for old in ("log", "log.1", "result.tmp"):
            (folder / old).unlink(missing_ok=True)
        (folder / "event.json").write_bytes(message.body)
        _write_private(folder / "spec.json", json.dumps(spec))
        _prune(home, folder, options.keep)


def _model(message: Message) -> str:
    """What the event is about: the last part of its source."""
    source = json.loads(message.body)["source"]
    return str(source).rpartition("/")[2]


def _slug(model: str) -> str:
    """A folder's name: the model's own where that can be one."""
    return model if _SAFE.fullmatch(model) else hashlib.sha256(model.encode()).hexdigest()[:32]


@contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """The descriptor of a lock that is ours (and of everybody who inherits it), or None when it is another's.

    The file says which job holds it, or held it last.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock
    finally:
        os.close(lock)


def _taken(folder: Path) -> Outcome | None:
    """The outcome of the last run, None when there is none. It is said once, but for success, which stays."""
    path = folder / "result.json"
    try:
        outcome = _outcome(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # not what a runner writes: as if there were none
        path.unlink()
        return None
    if not isinstance(outcome, Delivered):
        path.unlink()
    return outcome


def _outcome(result: Mapping[str, Any]) -> Outcome:
    if "error" in result:
        return Refused(str(result["error"]))
    code = int(result["exit"])
    if result["timed_out"]:
        return Failed(f"the command was ended after {result['seconds']:g} s: its time was over")
    if code == 0:
        return Delivered()
    if code == TEMPORARY:
        return Failed(f"the command asked to be tried again (exit code {TEMPORARY})")
    if code > 0:
        return Refused(f"the command failed with exit code {code}")
    return (Failed if -code in _STOPPED else Refused)(f"the command was ended by signal {-code}")


def _prune(home: Path, current: Path, keep: int) -> None:
    """Let the oldest jobs of a model go."""
    jobs = [path for path in home.iterdir() if path.is_dir() and path != current]
    jobs.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in jobs[keep - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


def _write_private(path: Path, text: str) -> None:
    """A file for our own eyes: the environment may hold secrets."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
