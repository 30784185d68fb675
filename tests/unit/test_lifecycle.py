"""server.lifecycle: what runs beside the requests, and what its end does to the rest."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

from structlog.testing import capture_logs

from server.lifecycle import Lifecycle, Readiness


async def nothing() -> None: ...


def lifecycle(reload: Callable[[], Awaitable[None]], *background: Callable[[], Awaitable[None]]) -> Lifecycle:
    return Lifecycle(
        readiness=Readiness(),
        listeners=[],
        start_models=nothing,
        close_models=nothing,
        reload=reload,
        background=list(background),
        close=nothing,
        drain_seconds=1,
    )


def test_what_ends_in_the_background_is_logged_and_the_rest_goes_on() -> None:
    ended = asyncio.Event()

    async def crashing() -> None:
        ended.set()
        raise ZeroDivisionError

    async def stopping() -> None:
        await ended.wait()
        server.stop()

    server = lifecycle(nothing, crashing, stopping)
    with capture_logs() as logs:
        assert asyncio.run(server.run()) == 0
    found = [line for line in logs if line["log_level"] == "error"]
    assert [line["event"] for line in found] == ["background_ended"]
    assert "crashing" in found[0]["work"]


def test_a_reload_that_crashes_is_not_the_last() -> None:
    reloads: list[int] = []

    async def reload() -> None:
        reloads.append(1)
        if len(reloads) == 2:
            server.stop()
            return
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGHUP)
        raise ZeroDivisionError

    async def first() -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    server = lifecycle(reload, first)
    with capture_logs() as logs:
        assert asyncio.run(asyncio.wait_for(server.run(), 30)) == 0
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["reload_failed"]
