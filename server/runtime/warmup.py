"""From a loaded graph to a warm one: what is found out and run before a version may serve.

Decides how rows are gathered (proof, then measurement or memory), runs the operator's warm-up samples and made-up
ones, and takes the time of one row. Knows nothing of sessions: it is given a function that runs a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from server.errors import ModelLoadError, TidegateError
from server.runtime.base import Batch, LoadRequest, WarmupSample
from server.runtime.learned import Learned, LearnedStore, choose, measure, median_run_ns
from server.runtime.proof import RunBatch, prove
from server.runtime.sampling import Domain, domains, operator_batch, random_batch
from server.types import ModelSpec, Tensor

#: The made-up data is the same at every load.
_SEED: Final = 20130101
_MAX_WARMUP_COUNT: Final = 1000


@dataclass(slots=True, frozen=True)
class Gathering:
    """How many rows the batcher may gather, and why no more. ``refusal``: rows were shown to influence each other."""

    rows: int
    refusal: str = ""


def decide_gathering(
    run: RunBatch,
    spec: ModelSpec,
    request: LoadRequest,
    setting: Mapping[str, object],
    budget_s: float,
    timer: Callable[[], int] = time.perf_counter_ns,
) -> Gathering:
    """Prove that rows are independent, then learn how many are worth gathering; or recall both from an earlier load.

    ``setting`` is everything but the file that the answer depends on. ``budget_s`` bounds the measurement; with 0
    nothing is measured and the maximum is the declared one.
    """
    if spec.max_batch_size <= 1:
        return Gathering(spec.max_batch_size)
    batching = request.options.batching
    budget_ns = int(budget_s * 1e9) if batching.enabled and not batching.max_rows else 0
    store = LearnedStore(request.state_dir)
    keyed = {**setting, "max_batch_size": spec.max_batch_size, "measured": budget_ns > 0}
    learned = store.get(spec.digest, keyed)
    if learned is None:
        learned = _learn(run, spec, request, budget_ns, timer)
        store.put(spec.digest, keyed, learned)
    if learned.refusal:
        return Gathering(1, learned.refusal)
    if not batching.enabled:
        return Gathering(1)
    return Gathering(min(batching.max_rows or learned.rows, spec.max_batch_size))


def _learn(run: RunBatch, spec: ModelSpec, request: LoadRequest, budget_ns: int, timer: Callable[[], int]) -> Learned:
    end = timer() + budget_ns
    rng = np.random.default_rng(_SEED)
    candidates = domains(spec, request.options.warmup)
    proof = prove(run, spec, candidates, rng, lambda: budget_ns > 0 and timer() > end)
    if proof.refusal or proof.domain is None:
        return Learned(1, proof.refusal)
    if budget_ns <= 0:
        return Learned(spec.max_batch_size)
    domain = proof.domain
    batches: dict[int, Batch] = {}

    def run_rows(rows: int) -> None:
        if rows not in batches:
            batches[rows] = random_batch(spec, domain, rows, rng)
        run(batches[rows])

    try:
        per_row = measure(run_rows, spec.max_batch_size, budget_ns, timer)
    except TidegateError as error:
        return Learned(1, f"a batch failed while it was measured: {error.message}")
    return Learned(choose(per_row), "", per_row)


def run_operator_samples(run: RunBatch, spec: ModelSpec, request: LoadRequest) -> None:
    """Run the warm-up samples of the configuration. Raises ModelLoadError when one does not fit or fails."""
    rng = np.random.default_rng(_SEED)
    for sample in request.options.warmup:
        batch = operator_batch(spec, sample, request.folder, rng)
        try:
            for _ in range(min(max(1, sample.count), _MAX_WARMUP_COUNT)):
                run(batch)
        except TidegateError as error:
            raise ModelLoadError(f"Warm-up sample '{sample.name}' failed: {error.message}") from error


def run_generated_samples(
    run: RunBatch, spec: ModelSpec, request: LoadRequest, timer: Callable[[], int] = time.perf_counter_ns
) -> int | None:
    """Warm one row and the gathered maximum with made-up data. Median ns of one row, or None if nothing is accepted."""
    rng = np.random.default_rng(_SEED)
    for domain in domains(spec, request.options.warmup):
        try:
            return _warm(run, spec, domain, rng, timer)
        except TidegateError:
            continue
    return None


def sample_outputs(
    run: RunBatch, spec: ModelSpec, warmup: tuple[WarmupSample, ...], folder: Path | None
) -> list[tuple[str, list[Tensor]]]:
    """What the model answers to its warm-up: each of the operator's samples, or without any, made-up data.

    A name for the sample, and its outputs. Empty when no made-up data is accepted; errors of the operator's samples are
    raised.
    """
    rng = np.random.default_rng(_SEED)
    if warmup:
        return [(f"warm-up sample '{s.name}'", run(operator_batch(spec, s, folder, rng))) for s in warmup]
    for domain in domains(spec):
        try:
            return [
                (f"made-up data of {rows} rows", run(random_batch(spec, domain, rows, rng)))
                for rows in sorted({1, max(1, spec.learned_batch_size)})
            ]
        except TidegateError:
            continue
    return []


def _warm(run: RunBatch, spec: ModelSpec, domain: Domain, rng: np.random.Generator, timer: Callable[[], int]) -> int:
    single = random_batch(spec, domain, 1, rng)
    run(single)
    if spec.learned_batch_size > 1:
        run(random_batch(spec, domain, spec.learned_batch_size, rng))
    return median_run_ns(lambda: _discard(run(single)), timer)


def _discard(_: object) -> None:
    """A timed run's answer is of no use."""


def with_gathering(spec: ModelSpec, gathering: Gathering, notes: tuple[str, ...]) -> ModelSpec:
    """The final spec: learned rows, and the notes in one line."""
    refused = (f"rows are never gathered: {gathering.refusal}",) if gathering.refusal else ()
    return replace(spec, learned_batch_size=gathering.rows, batching_note="; ".join((*notes, *refused)))
