"""The micro-batcher of the usual stacks: an ``asyncio.Queue``, a task that empties it, a thread that runs the model."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from loadtests.session import session

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_MOST_ROWS: Final = 64
_MOST_WAITING: Final = 10_000


class Batcher:
    """Rows of all callers that wait are one batch. Greedy: nothing waits for a batch to fill."""

    def __init__(self, model: Path) -> None:
        self._session = session(model)
        self._queue: asyncio.Queue[tuple[Array, asyncio.Future[Array]]] = asyncio.Queue(_MOST_WAITING)
        self._pool = ThreadPoolExecutor(1)
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def infer(self, rows: Array) -> Array:
        future: asyncio.Future[Array] = asyncio.get_running_loop().create_future()
        await self._queue.put((rows, future))
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            rows = len(batch[0][0])
            while rows < _MOST_ROWS and not self._queue.empty():
                batch.append(self._queue.get_nowait())
                rows += len(batch[-1][0])
            try:
                answer = await loop.run_in_executor(self._pool, self._run, [part for part, _ in batch])
            except Exception as error:  # noqa: BLE001 - the boundary of a batch: its callers are told
                for _, future in batch:
                    future.set_exception(error)
                continue
            start = 0
            for part, future in batch:
                if not future.done():
                    future.set_result(answer[start : start + len(part)])
                start += len(part)

    def _run(self, parts: list[Array]) -> Array:
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return np.asarray(self._session.run(None, {"x": rows})[0])


def batchers(folder: Path) -> dict[str, Batcher]:
    """One for each model file, by its name."""
    return {path.stem: Batcher(path) for path in sorted(folder.glob("*.onnx"))}
