"""Servers to be measured: started here, or named by address. All listen on loopback and end with the block."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loadtests import product
from loadtests.machine import pinned
from loadtests.requests import Request
from server.errors import InvalidArgument

ROOT: Final = Path(__file__).resolve().parent.parent
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 60.0
_CONNECT_SECONDS: Final = 5.0


@dataclass(slots=True, frozen=True)
class Target:
    """A V2 server. ``pid`` 0: its processor time is not known. ``model`` "": models go by the names asked for.

    ``requests`` by protocol are for a server that is no V2 server, and is asked in a form of its own.
    """

    label: str
    http: str = ""
    grpc: str = ""
    model: str = ""
    pid: int = 0
    requests: Mapping[str, Request] = field(default_factory=dict, hash=False)


def parse_target(text: str) -> Target:
    """``http=HOST:PORT,grpc=HOST:PORT,model=NAME,pid=PID,label=X``. Raises InvalidArgument naming the part."""
    given: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not (equals and value) or key not in ("http", "grpc", "model", "pid", "label") or key in given:
            raise InvalidArgument(f"a peer is http=HOST:PORT,grpc=HOST:PORT,model=NAME,pid=PID,label=X; got {part!r}")
        given[key] = value
    for key in ("http", "grpc"):
        check_address(given.get(key, "-:1"))
    if not (given.get("http") or given.get("grpc")):
        raise InvalidArgument(f"a peer needs http= or grpc=, got {text!r}")
    pid = given.pop("pid", "0")
    if not (pid.isascii() and pid.isdecimal()) or (pid != "0" and not Path(f"/proc/{pid}").exists()):
        raise InvalidArgument(f"pid must be that of a process of this machine, got {pid!r}")
    label, http, grpc, model = (given.get(key, "") for key in ("label", "http", "grpc", "model"))
    return Target(label or "peer", http, grpc, model, int(pid))


def check_address(text: str) -> None:
    host, _, port = text.rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 65_536):
        raise InvalidArgument(f"an address must be HOST:PORT, got {text!r}")


def check_reachable(target: Target) -> None:
    """Raises ConnectionError naming the address where nobody listens."""
    for address in filter(None, (target.http, target.grpc)):
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            raise ConnectionError(f"{target.label}: nobody answers at {address}: {error}") from None


@contextmanager
def serving(
    source: Path, transport: str = "native", cores: set[int] | None = None, copy: Path | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """A gateway that serves a model file, a folder or a configuration: its process id and its ``ready`` event.

    It listens on free ports; its state and log lie beside ``source``. ``copy``: of the packages, if not the product.
    """
    flags = [part for name in ("--http", "--grpc", "--metrics", "--admin") for part in (name, "127.0.0.1:0")]
    state, log = source.parent / f"state-{transport}", source.parent / f"log-{transport}"
    command = [sys.executable, "-m", "server", "serve", str(source), *flags, "--state-dir", str(state)]
    with log.open("wb") as file:
        command += ["--transport", transport, "--log-format", "json"]
        process = _start(command, cores, product.python_path(copy), stderr=file)
    try:
        yield process.pid, _ready_event(process, log)
    finally:
        _stop(process)


@contextmanager
def floor(name: str, folder: Path, cores: set[int] | None = None) -> Iterator[Target]:
    """One of ``loadtests.floors`` over the models in ``folder``."""
    command = [sys.executable, "-m", "loadtests.floors", name, str(folder)]
    process = _start(command, cores, stdout=subprocess.PIPE)
    try:
        with process.stdout or open(os.devnull, "rb") as said:
            line = said.readline()
        if not line:
            raise RuntimeError(f"the floor {name!r} did not start; see what it wrote above")
        yield Target(name, pid=process.pid, **json.loads(line))
    finally:
        _stop(process)


def _start(
    command: list[str], cores: set[int] | None, path: str = str(ROOT), **streams: Any
) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    with pinned(cores or os.sched_getaffinity(0)):
        return subprocess.Popen(command, env=environment, **streams)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ready_event(process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        for line in log.read_text().splitlines():
            event = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
            if event.get("event") == "ready":
                return dict(event)
        time.sleep(0.1)
    raise RuntimeError(f"the server did not become ready:\n{log.read_text()[-4000:]}")
