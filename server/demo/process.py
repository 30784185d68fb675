"""The demo's server: a real ``serve`` process with free ports, its log in a file, stopped with SIGTERM."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

_READY_TIMEOUT_S: Final = 120.0
#: The server's own default drain time, and a little for its exit.
_STOP_TIMEOUT_S: Final = 40.0
_LOG_TAIL_LINES: Final = 15
_FREE_PORT: Final = "127.0.0.1:0"


class ServerFailed(Exception):
    """The server did not start, or did not stop well. The message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """HOST:PORT of each listener, as the server's ``ready`` line says."""

    http: str
    grpc: str
    metrics: str
    admin: str


class ServerProcess:
    """One ``serve`` process. Its log is a file, so that it can outlive the demo (``--keep``)."""

    def __init__(self, target: Path, state_dir: Path, log: Path) -> None:
        """``target``: a folder of models, or a configuration file."""
        listeners = [part for name in ("http", "grpc", "metrics", "admin") for part in (f"--{name}", _FREE_PORT)]
        what = [str(target), "--state-dir", str(state_dir)]
        command = [sys.executable, "-m", "server", "serve", *what, *listeners, "--log-format", "json"]
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as sink:
            # Its own session: Ctrl-C goes to the demo alone, which then stops the server in its own order.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment(), start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> Addresses:
        """The addresses, once all models are loaded and warm. Raises ServerFailed."""
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while time.monotonic() < deadline:
            addresses = _ready_line(self.log)
            if addresses is not None:
                return addresses
            if self._process.poll() is not None:
                raise ServerFailed(
                    f"the server ended with {self._process.returncode} before it was ready{self._tail()}"
                )
            time.sleep(0.05)  # the log is a file, which cannot be awaited
        raise ServerFailed(f"the server was not ready after {_READY_TIMEOUT_S:.0f} s{self._tail()}")

    def stop(self) -> None:
        """SIGTERM, then wait for the drain. Raises ServerFailed when it does not end, or not with exit code 0."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            code = self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise ServerFailed(f"the server did not end {_STOP_TIMEOUT_S:.0f} s after SIGTERM{self._tail()}") from None
        if code:
            raise ServerFailed(f"the server ended with exit code {code}{self._tail()}")

    def kill(self) -> None:
        """End it at once, whatever it does. Harmless when it has ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def leave_up(self) -> None:
        """Let it run on after this process; nothing can be asked of it any more."""
        self._process.returncode = 0  # Popen warns of a child that is neither waited for nor known to have ended

    def _tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return "".join(f"\n  {line}" for line in [f"log ({self.log}):", *lines])


def _ready_line(log: Path) -> Addresses | None:
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if '"ready"' not in line:
            continue
        try:
            record = json.loads(line)
        except ValueError:  # another process's line, or one still being written
            continue
        if isinstance(record, dict) and record.get("event") == "ready":
            return Addresses(*(str(record[name]) for name in ("http", "grpc", "metrics", "admin")))
    return None


def environment() -> dict[str, str]:
    """``python -m server`` must find this package, not a ``server.py`` of the working directory."""
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    try:
        importlib.metadata.distribution("tidegate")
    except importlib.metadata.PackageNotFoundError:
        env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    return env


# --- A server left up by --keep -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeptServer:
    pid: int
    http: str


def remember(path: Path, server: ServerProcess, addresses: Addresses) -> None:
    """Write down a server that stays up."""
    path.write_text(json.dumps({"pid": server.pid, **asdict(addresses)}) + "\n", encoding="utf-8")


def kept_server(path: Path) -> KeptServer | None:
    """The server that an earlier demo left up, when it still answers."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kept = KeptServer(int(record["pid"]), str(record["http"]))
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{kept.http}/v2/health/live", timeout=2):
            return kept
    except (OSError, ValueError, KeyError, TypeError):
        return None
