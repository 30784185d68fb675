"""Running models over rows within a time limit: outputs in bounded batches, and run times taken in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Final, TypeAlias

import numpy as np

from server.runtime.base import Batch, Engine
from server.tabular import batches, run_rows

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Different batches that run times are taken on, over and over.
_TIMED_BATCHES: Final = 32
_WARM_RUNS: Final = 10
#: So often the time is looked at while run times are taken.
_LOOK_EVERY: Final = 64


class OutOfTime(Exception):
    """The policy's time limit passed, or the evaluation was called off; the text says which."""


@dataclass(slots=True)
class Pace:
    """How long an evaluation may go on. ``now``: monotonic ns; ``until``: when it is over, or 0 for never."""

    until: int = 0
    now: Callable[[], int] = time.monotonic_ns
    stopped: Callable[[], bool] = field(default=lambda: False)

    def check(self) -> None:
        """Raises OutOfTime."""
        if self.stopped():
            raise OutOfTime("it was called off")
        if self.until and self.now() >= self.until:
            raise OutOfTime("the time limit passed")


def outputs(engine: Engine, tensors: Sequence[Array], wanted: Collection[str], pace: Pace) -> dict[str, Array]:
    """(rows, ...) of the wanted outputs; others are dropped batch by batch.

    Raises OutOfTime, InvalidArgument, or what a run raises.
    """
    names = [tensor.name for tensor in engine.spec.outputs]
    parts: dict[str, list[Array]] = {name: [] for name in names if name in wanted}
    pace.check()
    for answers in run_rows(engine, tensors):
        for name, answer in zip(names, answers, strict=True):
            if name in parts:
                parts[name].append(answer)
        pace.check()
    return {name: np.concatenate(found) for name, found in parts.items()}


def run_times(
    candidate: Engine,
    champion: Engine,
    tensors: tuple[Sequence[Array], Sequence[Array]],
    rows: int,
    runs: int,
    budget_ns: int,
    pace: Pace,
) -> tuple[Array, Array]:
    """(pairs,) run times in ns of both on the same ``rows`` rows, candidate and champion first by turns.

    ``tensors``: inputs of the candidate and of the champion. Raises OutOfTime, or what a run raises.
    """
    ours, theirs = (_batches(engine, part, rows) for engine, part in zip((candidate, champion), tensors, strict=True))
    for ready, other in islice(cycle(zip(ours, theirs, strict=True)), _WARM_RUNS):
        candidate.run(0, ready)
        champion.run(0, other)
    found, end = np.zeros((runs, 2)), pace.now() + budget_ns
    for turn, (ready, other) in enumerate(islice(cycle(zip(ours, theirs, strict=True)), runs)):
        if turn % _LOOK_EVERY == 0:
            pace.check()
            if pace.now() >= end:
                return found[:turn, 0], found[:turn, 1]
        if turn % 2:
            found[turn, 1] = _timed(champion, other)
            found[turn, 0] = _timed(candidate, ready)
        else:
            found[turn, 0] = _timed(candidate, ready)
            found[turn, 1] = _timed(champion, other)
    return found[:, 0], found[:, 1]


def _batches(engine: Engine, tensors: Sequence[Array], rows: int) -> list[Batch]:
    """The first rows, again from the start where they do not suffice."""
    wanted = np.arange(rows * _TIMED_BATCHES) % len(tensors[0])
    return list(batches(engine.spec, [tensor[wanted] for tensor in tensors], rows))


def _timed(engine: Engine, batch: Batch) -> int:
    start = time.perf_counter_ns()
    engine.run(0, batch)
    return time.perf_counter_ns() - start
