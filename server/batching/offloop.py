"""A batcher for engines that may hang or wait on a network: none of their runs is on the loop, and closing is bounded.

A plain ``Batcher`` runs short batches on the loop, where a run that never ends would end the whole server.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from server.batching.batcher import Batcher, BatchRecord, CallLater, CallLaterNs, CallSoon
from server.runtime.base import BatchingOptions, Engine
from server.types import Clock

#: How long ``close`` waits for runs that are going on.
CLOSE_SECONDS: Final = 5.0


class OffLoopBatcher(Batcher):
    """As ``Batcher``, with every run on a thread of the engine's instance."""

    def __init__(
        self,
        engine: Engine,
        options: BatchingOptions,
        *,
        clock: Clock,
        call_soon: CallSoon,
        call_soon_threadsafe: CallSoon,
        call_later: CallLater,
        call_later_ns: CallLaterNs | None = None,
        on_batch: Callable[[BatchRecord], None] | None = None,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        super().__init__(
            engine,
            options,
            clock=clock,
            call_soon=call_soon,
            call_soon_threadsafe=call_soon_threadsafe,
            call_later=call_later,
            call_later_ns=call_later_ns,
            on_batch=on_batch,
        )
        self._close_seconds = close_seconds
        self._runs_inline = False
        self._planner.ahead = 0  # a call may be cancelled or expire until the moment it is sent
        self._start_workers()

    def close(self) -> None:
        """End the threads, waiting ``close_seconds`` at most for what they run: see ``hung``. Blocks that long."""
        if self._planner.waiting():
            raise RuntimeError(f"{self._planner.waiting()} requests still wait: drain before closing")
        self._closed = True
        for _ in self._workers:
            self._executions.put(None)
        end = time.monotonic() + self._close_seconds
        for thread in self._workers:
            thread.join(max(0.0, end - time.monotonic()))
        with suppress(RuntimeError):  # the loop may be closed already, and its timers with it
            self._call_soon_threadsafe(self._drop_timer)

    def hung(self) -> bool:
        """After ``close``: a run has not come back. The engine must then be left as it is, not closed under the run.

        The threads are daemons: they keep no process from ending.
        """
        return any(thread.is_alive() for thread in self._workers)

    def _learn(self, rows: int, compute_ns: int, failed: bool) -> None:
        """However short its runs are, this engine stays off the loop."""
