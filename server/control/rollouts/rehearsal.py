"""What a candidate does before it gets a request: batches of the sizes asked for, and golden requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from server.batching.batcher import Work
from server.config.rollouts import RolloutTemplate
from server.errors import InvalidArgument, ModelLoadError, TidegateError
from server.gateway import Served
from server.golden import load_golden, run_golden
from server.runtime.base import Engine
from server.types import DATATYPES, ModelSpec, Tensor, element_count

#: How long one batch may take.
_WARM_S = 60.0

#: Loads a version once more, for a use of its own. Raises TidegateError.
LoadAgain = Callable[[Served], Awaitable[Engine]]


async def rehearse(served: Served, template: RolloutTemplate, load_again: LoadAgain) -> None:
    """Raises ModelLoadError that says what the candidate did wrong."""
    try:
        for rows in template.warm:
            async with asyncio.timeout(_WARM_S):
                await _warm(served, rows)
        if template.golden is not None:
            await _golden(served, template.golden, load_again)
    except TimeoutError:
        raise ModelLoadError(f"a batch of warm-up did not end within {_WARM_S:g} s") from None


async def _warm(served: Served, rows: int) -> None:
    """One batch of zeros. An input that the graph itself refuses says nothing of the version."""
    done: asyncio.Future[TidegateError | None] = asyncio.get_running_loop().create_future()

    def answered(ended: Work) -> None:
        if not done.done():
            done.set_result(ended.error)

    most = served.spec.max_batch_size
    rows = min(rows, most) if most else 0
    work = Work(_zeros(served.spec, max(rows, 1)), rows, answered)
    error: TidegateError | None
    try:
        served.batcher.submit(work)
        error = await done
    except InvalidArgument:
        return
    except TidegateError as refused:
        error = refused
    finally:
        served.batcher.cancel(work)
    if error is not None and not isinstance(error, InvalidArgument):
        raise ModelLoadError(f"warm-up with {rows} rows: {error.message}")


def _zeros(spec: ModelSpec, rows: int) -> list[Tensor | None]:
    """Inputs of zeros (strings: empty ones); free dimensions are 1."""
    tensors: list[Tensor | None] = []
    for tensor in spec.inputs:
        shape = tuple(1 if dim == -1 else dim for dim in tensor.shape)
        if spec.max_batch_size:
            shape = (rows, *shape[1:])
        count = element_count(shape)
        known = DATATYPES.get(tensor.datatype)
        data = [b""] * count if known is None else bytes(count * known[1])
        tensors.append(Tensor(tensor.name, tensor.datatype, shape, data))
    return tensors


async def _golden(served: Served, path: Path, load_again: LoadAgain) -> None:
    """On an engine of its own: nothing else may use one while golden requests run."""
    cases = await asyncio.to_thread(load_golden, path)
    engine = await load_again(served)
    try:
        wrong = await asyncio.to_thread(run_golden, engine, cases, served.options.batching)
    finally:
        await asyncio.to_thread(engine.close)
    if wrong:
        raise ModelLoadError(f"{path.name}: {wrong}")
