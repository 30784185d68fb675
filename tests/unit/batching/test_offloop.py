"""server.batching.offloop: no run is on the loop however short, and closing does not wait for a run that hangs."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from server.batching.batcher import Work
from server.batching.offloop import OffLoopBatcher
from server.runtime.base import BatchingOptions, LoadRequest, ModelOptions
from server.runtime.fake import FakeRuntime, Script
from server.types import Tensor


def batcher(script: Script, **more: Any) -> OffLoopBatcher:
    loop = asyncio.get_running_loop()
    engine = FakeRuntime(script).load(LoadRequest("m", "1", Path("none"), ModelOptions()))
    return OffLoopBatcher(
        engine,
        BatchingOptions(),
        clock=time.monotonic_ns,
        call_soon=loop.call_soon,
        call_soon_threadsafe=loop.call_soon_threadsafe,
        call_later=loop.call_later,
        **more,
    )


def submit(subject: OffLoopBatcher) -> asyncio.Future[Work]:
    ended: asyncio.Future[Work] = asyncio.get_running_loop().create_future()
    x = Tensor("x", "FP32", (1, 4), np.ones((1, 4), "<f4").tobytes())
    subject.submit(Work([x], 1, ended.set_result))
    return ended


def test_short_runs_stay_off_the_loop() -> None:
    async def body() -> None:
        threads: set[int] = set()
        subject = batcher(Script(run_ns=1, before_run=lambda _: threads.add(threading.get_ident())))
        for _ in range(50):  # a plain batcher has learned by then how short they are
            work = await submit(subject)
            assert work.outputs is not None
        assert len(threads) == 1
        assert threading.get_ident() not in threads
        assert not subject.inline()
        await asyncio.to_thread(subject.close)
        assert not subject.hung()

    asyncio.run(asyncio.wait_for(body(), 20))


def test_closing_waits_for_a_hanging_run_for_its_time_only() -> None:
    async def body() -> None:
        started, go = threading.Event(), threading.Event()

        def hang(_: int) -> None:
            started.set()
            assert go.wait(30)

        subject = batcher(Script(before_run=hang), close_seconds=0.1)
        ended = submit(subject)
        await asyncio.to_thread(started.wait, 10)
        began = time.monotonic()
        await asyncio.to_thread(subject.close)
        assert time.monotonic() - began < 20  # its run would take 30
        assert subject.hung()
        go.set()
        assert (await ended).outputs is not None  # what comes late is still answered
        await asyncio.to_thread(subject.close)
        assert not subject.hung()

    asyncio.run(asyncio.wait_for(body(), 20))
