"""A real ``tidegate serve`` process for tests: on free ports, awaited by its ``ready`` line, ended by signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import router

ROOT = Path(__file__).resolve().parents[2]
#: Where this process has the product from, compiled or not, and then the rest of the repository.
PRODUCT_PATH = os.pathsep.join((str(Path(router.__file__).resolve().parents[1]), str(ROOT)))
START_SECONDS = 120
STOP_SECONDS = 40


class Server:
    """One process. ``http``, ``grpc``, ``metrics`` and ``admin`` are HOST:PORT once it is ready."""

    def __init__(self, *args: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.raw: list[str] = []
        self._grew = threading.Condition()
        self._ended = False
        command = [sys.executable, "-m", "server", "serve", *args]
        for flag in ("--http", "--grpc", "--metrics", "--admin"):
            if flag not in args:
                command += [flag, "127.0.0.1:0"]
        if "--transport" not in args:
            command += ["--transport", os.environ.get("TIDEGATE_TEST_TRANSPORT", "native")]
        if "--log-format" not in args:
            command += ["--log-format", "json"]
        environment = {**os.environ, "PYTHONPATH": PRODUCT_PATH, "PYTHONSAFEPATH": "1", **(env or {})}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._grew:
                self.raw.append(line.rstrip("\n"))
                try:
                    event = json.loads(line)
                except ValueError:
                    event = {"event": "", "text": line}
                self.lines.append(event if isinstance(event, dict) else {"event": ""})
                self._grew.notify_all()
        with self._grew:
            self._ended = True
            self._grew.notify_all()

    def wait_for(self, event: str, timeout: float = START_SECONDS, **fields: Any) -> dict[str, Any]:
        """The first log line with this event and these fields; fails when the process ends or time runs out."""

        def found() -> dict[str, Any] | None:
            for line in self.lines:
                if line.get("event") == event and all(line.get(k) == v for k, v in fields.items()):
                    return line
            return None

        with self._grew:
            self._grew.wait_for(lambda: found() is not None or self._ended, timeout)
            line = found()
        if line is None:
            raise AssertionError(f"no {event!r} from the server; it said:\n" + "\n".join(self.raw[-40:]))
        return line

    def wait_ready(self, timeout: float = START_SECONDS) -> Server:
        ready = self.wait_for("ready", timeout)
        self.http, self.grpc = ready["http"], ready["grpc"]
        self.metrics, self.admin = ready["metrics"], ready["admin"]
        return self

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = STOP_SECONDS) -> int:
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self._reader.join(5)
        if self.process.stderr is not None:
            self.process.stderr.close()


@contextmanager
def serving(*args: str, ready_seconds: float = START_SECONDS, **options: Any) -> Iterator[Server]:
    """A server that is ready, and killed at the end if it still lives."""
    server = Server(*args, **options)
    try:
        yield server.wait_ready(ready_seconds)
    finally:
        server.kill()
