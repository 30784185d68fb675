"""One serving process: logs, event loop, object graph, exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
import threading
from collections.abc import Callable

from server.config.settings import ServerSettings
from server.errors import ConfigError
from server.telemetry import log
from server.wiring import ConfigFile, build

_OPEN_FILES = 65_536
#: What a thread that is about to end is given to do so, at the end of the process.
_PARTING_S = 0.5


def serve(file: ConfigFile | None, settings: ServerSettings) -> int:
    """Serve until a signal; the exit code."""
    _check(settings)
    _raise_open_files()
    log.configure(settings.telemetry.log_format, settings.telemetry.log_level)

    async def run() -> int:
        return await build(settings, file).run()

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        code = runner.run(run())
    _leave_hanging_work(code)
    return code


def _leave_hanging_work(code: int) -> None:
    """End here where a run or a load hangs.

    Native code that is still running when the interpreter is torn down aborts it, and a load would be waited for.
    """
    working = [thread for thread in threading.enumerate() if thread.name.startswith("tidegate-")]
    for thread in working:
        thread.join(_PARTING_S)
    if any(thread.is_alive() for thread in working):
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(code)


def _check(settings: ServerSettings) -> None:
    if settings.single_port and settings.transport != "native":
        raise ConfigError(f"--single-port needs --transport native, got {settings.transport}")
    if settings.workers != 1:
        raise ConfigError(f"--workers {settings.workers}: this version serves from one process, use 1")


def _raise_open_files() -> None:
    """A connection is an open file and the soft limit is often 1024: take what the hard one allows, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop
