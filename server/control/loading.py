"""From the plan of a version to an engine that may serve: loaded, warm, admitted, and tried with its golden requests.

Loading blocks, so it happens on one thread of its own, one version after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from server.admission import AdmissionReport, admit
from server.control.sources import ModelPlan, VersionPlan
from server.errors import ModelLoadError, OutOfMemory, TidegateError
from server.gateway import Served
from server.golden import load_golden, run_golden
from server.runtime.base import Engine, LoadRequest, ModelOptions, Runtime
from server.types import ModelSpec

log = structlog.get_logger("control")

T = TypeVar("T")


@dataclass(slots=True, frozen=True)
class FileState:
    """A file as it was when it was looked at; ``seen`` changes whenever its content is replaced or written over."""

    path: Path
    seen: tuple[int, ...] | None

    @classmethod
    def of(cls, path: Path) -> FileState:
        """How it is now. Blocks."""
        try:
            info = path.stat()
        except OSError:
            return cls(path, None)
        return cls(path, (info.st_mtime_ns, info.st_size, info.st_ino))

    def still(self) -> bool:
        """Whether it is there, and as it was. Blocks."""
        return self.seen is not None and FileState.of(self.path) == self


@dataclass(slots=True, frozen=True)
class Admitted:
    """A warm engine that may serve, and how. ``golden``: requests that it answered rightly.

    ``file``: what it was made of; None when that can neither change nor go, as in a registry.
    """

    engine: Engine
    options: ModelOptions
    report: AdmissionReport | None
    golden: int
    file: FileState | None

    def facts(self) -> dict[str, object]:
        """What is worth telling of it."""
        engine, spec = self.engine, self.engine.spec
        facts: dict[str, object] = {
            "max_batch_size": spec.max_batch_size,
            "batch_rows": spec.learned_batch_size,
            "run_us": round(engine.run_ns / 1000, 1),
            "memory_mib": round(engine.memory_bytes / 2**20, 1),
            "digest": spec.digest,
        }
        if spec.batching_note:
            facts["note"] = spec.batching_note
        if self.golden:
            facts["golden"] = self.golden
        return facts


class Loader:
    """The loader thread. ``make_room`` gives memory back that can be spared, and says whether there was any."""

    def __init__(
        self,
        runtime: Runtime,
        serve: Callable[[Engine, ModelOptions], Served],
        make_room: Callable[[], Awaitable[bool]],
    ) -> None:
        self._runtime = runtime
        self._serve = serve
        self._make_room = make_room
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tidegate-loader")

    async def run(self, work: Callable[[], T]) -> T:
        """Anything else that blocks and concerns models."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def load(self, plan: ModelPlan, version: VersionPlan, champion: ModelSpec | None) -> Admitted:
        """One version; when memory is short, once more after room was made. Raises ModelLoadError or OutOfMemory.

        ``champion``: what callers of the model are used to.
        """
        work = partial(self._load, plan, version, champion)
        try:
            return await self.run(work)
        except OutOfMemory:
            if not await self._make_room():
                raise
        log.warning("memory_short", model=plan.name, version=version.version, consequence="nothing is kept warm")
        return await self.run(work)

    async def serve(self, admitted: Admitted) -> Served:
        """The engine behind its batcher; an engine whose options do not fit it is closed again."""
        try:
            return self._serve(admitted.engine, admitted.options)
        except TidegateError:
            await self.run(admitted.engine.close)
            raise

    def close(self) -> None:
        """Take no more work; what is being loaded is not waited for."""
        self._thread.shutdown(wait=False)

    def _load(self, plan: ModelPlan, version: VersionPlan, champion: ModelSpec | None) -> Admitted:
        request = plan.load_request(version)
        file = FileState.of(version.path) if plan.request is None or version.origin is None else None
        try:
            engine = self._runtime.load(request)
        except MemoryError:
            raise OutOfMemory("there is not enough memory to load it") from None
        try:
            report = _inspected(engine, plan, version, request, champion)
            golden = _tried(engine, plan, version, request)
        except Exception:
            engine.close()
            raise
        return Admitted(engine, request.options, report, golden, file)


def _inspected(
    engine: Engine, plan: ModelPlan, version: VersionPlan, request: LoadRequest, champion: ModelSpec | None
) -> AdmissionReport | None:
    """What was found of a version that may serve; None for a backend without files of ours, such as an upstream."""
    inspection = getattr(engine, "inspection", None)
    if inspection is None:
        return None
    verdict = admit(
        engine,
        inspection,
        declared_signature=plan.declared(version) if plan.declared else None,
        champion=champion,
        warmup=request.options.warmup,
        folder=request.folder,
        advisory=plan.declared is None,
    )
    if not verdict.admitted:
        raise ModelLoadError(verdict.refusal)
    return verdict.report


def _tried(engine: Engine, plan: ModelPlan, version: VersionPlan, request: LoadRequest) -> int:
    """How many golden requests there were, all answered rightly. Raises ModelLoadError for the first that was not."""
    count = 0
    for path in plan.golden_files(version, request.folder):
        cases = load_golden(path)
        if disagreement := run_golden(engine, cases, request.options.batching):
            raise ModelLoadError(f"{path.name}: {disagreement}")
        count += len(cases)
    return count
