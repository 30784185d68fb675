"""Runs one command under limits, apart from the gateway that asked for it, and writes down how it ended.

A program of its own, started by its path (``python -I -S jobrunner.py FOLDER``), with nothing but the standard library:
it outlives the gateway, so a restart does not end a training. FOLDER holds ``spec.json`` and ``event.json``; the
outcome becomes ``result.json``, which appears whole or not at all. The last of what the command prints is kept in
``log`` and ``log.1``, at most ``log_bytes`` together.

The command gets a session of its own, limits that its children inherit, and the event on its standard input. It is
ended by SIGTERM, and ``grace_s`` later by SIGKILL, when its time is over; when it has ended, whatever it left behind is
killed, wherever that has gone: orphans are handed to this process (PR_SET_CHILD_SUBREAPER). When this process is killed
itself, so is the command (PR_SET_PDEATHSIG). Linux only, as is the rest of the gateway.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Final

_SET_PDEATHSIG: Final = 1
_SET_CHILD_SUBREAPER: Final = 36
_READ_BYTES: Final = 65_536
#: Of these are the most that a pipe holds (fs.pipe-max-size).
_DRAIN_READS: Final = 16
#: Rounds of killing what was left behind: what forks faster than it dies is given up.
_REAP_ROUNDS: Final = 200
_REAP_PAUSE_S: Final = 0.01


def main(folder: Path) -> int:
    """Run what ``folder`` asks for. 0 when the outcome is on disk."""
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").unlink()  # the environment in it may hold secrets
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    began = time.monotonic()
    try:
        result = _run(folder, spec, libc)
    except OSError as error:
        result = {"error": f"the command cannot be started: {error}"}
    except subprocess.SubprocessError:
        result = {"error": "the command cannot be started under its limits"}
    result["seconds"] = round(time.monotonic() - began, 3)
    _write(folder / "result.json", result)
    return 0


def _run(folder: Path, spec: dict[str, Any], libc: ctypes.CDLL) -> dict[str, Any]:
    def limit() -> None:
        libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for which, amount in ((resource.RLIMIT_AS, spec["memory_bytes"]), (resource.RLIMIT_CPU, spec["cpu_s"])):
            if amount:
                resource.setrlimit(which, (amount, amount))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    with (folder / "event.json").open("rb") as event, _Log(folder / "log", spec["log_bytes"]) as log:
        process = subprocess.Popen(
            spec["argv"],
            cwd=spec["cwd"] or None,
            env=spec["env"],
            stdin=event,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=limit,  # noqa: PLW1509 - this process has one thread
        )
        try:
            timed_out = _watch(process, log, spec["timeout_s"], spec["grace_s"])
        finally:
            _kill(process)
        return {"exit": process.returncode, "timed_out": timed_out}


def _watch(process: subprocess.Popen[bytes], log: _Log, timeout_s: float, grace_s: float) -> bool:
    """Keep what the command prints until it has ended, or its time has. True when it was its time."""
    deadline, timed_out = time.monotonic() + timeout_s, False
    pidfd = os.pidfd_open(process.pid)
    assert process.stdout is not None  # noqa: S101 - it was asked for
    stream = process.stdout.fileno()
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(stream, select.POLLIN)
    try:
        while True:
            ready = {fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)}
            if stream in ready and not log.take(stream):
                poll.unregister(stream)
            if pidfd in ready:
                log.drain(stream)
                return timed_out
            if time.monotonic() < deadline:
                continue
            if timed_out:
                return True
            timed_out, deadline = True, time.monotonic() + grace_s
            _signal_group(process.pid, signal.SIGTERM)
    finally:
        os.close(pidfd)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the command's process group, then everything else that came of it."""
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(_REAP_ROUNDS):
        left = _children()
        if not left:
            return
        for pid in left:
            _signal(pid, signal.SIGKILL)
        _reap()
        time.sleep(_REAP_PAUSE_S)


def _children() -> list[int]:
    """This process's children: the command was waited for, so they are orphans of it.

    By a look at all processes, as not every kernel lists the children of one.
    """
    own = os.getpid()
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _parent(name) == own]


def _parent(pid: str) -> int:
    """The parent of a process; 0 when it has ended meanwhile."""
    try:
        # The name in parentheses may hold anything; state and parent follow it.
        return int(Path("/proc", pid, "stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        return


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


class _Log:
    """The last of a stream: two files of half the room each, the older one replaced when the newer one is full."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._half = max(1, limit // 2)
        self._file: BinaryIO = path.open("wb")
        self._size = 0

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self, stream: int) -> bool:
        """Read what is there and keep it; False at the end."""
        data = os.read(stream, _READ_BYTES)
        left = memoryview(data)
        while left:
            if self._size >= self._half:
                self._turn()
            room = left[: self._half - self._size]
            self._file.write(room)
            self._size += len(room)
            left = left[len(room) :]
        self._file.flush()
        return bool(data)

    def drain(self, stream: int) -> None:
        """Keep what is still in a pipe whose writer has ended; children of it may go on writing for ever."""
        os.set_blocking(stream, False)
        try:
            for _ in range(_DRAIN_READS):
                if not self.take(stream):
                    return
        except BlockingIOError:
            return

    def _turn(self) -> None:
        self._file.close()
        self._path.replace(self._path.with_name("log.1"))
        self._file = self._path.open("wb")
        self._size = 0


def _write(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(result, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
