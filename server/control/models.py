"""Which versions are loaded: scan, load beside what serves, swap the table, retire what nobody holds any more.

A new version is loaded and warm before the old one goes, and a failed load leaves the old one serving. Loading
blocks, so it happens on one loader thread; everything else runs on the loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import structlog

from server.admission import AdmissionReport, admit
from server.batching.offloop import OffLoopBatcher
from server.config.routing import RoutingSpec
from server.control.publishing import Loaded, Publisher
from server.control.sources import Audit, ModelPlan, ModelSource, VersionPlan
from server.errors import (
    FailedPrecondition,
    InvalidArgument,
    ModelLoadError,
    ModelNotFound,
    TidegateError,
    VersionNotFound,
)
from server.gateway import Gateway, Served
from server.golden import load_golden, run_golden
from server.runtime.base import Engine, LoadRequest, ModelOptions, Runtime
from server.types import ModelSpec, ParameterValue

log = structlog.get_logger("control")

T = TypeVar("T")

UNAVAILABLE, LOADING, READY, UNLOADING = "UNAVAILABLE", "LOADING", "READY", "UNLOADING"


@dataclass(slots=True, frozen=True)
class IndexEntry:
    """One row of the repository index."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(slots=True, eq=False)
class _Version:
    """One version of one model as the control knows it. ``tried`` is the fingerprint of the last load, good or bad."""

    number: str
    state: str
    reason: str = ""
    tried: object = None
    engine: Engine | None = None
    served: Served | None = None


@dataclass(slots=True)
class _Loaded:
    """A warm engine that was admitted, and how it is to be served."""

    engine: Engine
    options: ModelOptions
    report: AdmissionReport | None


@dataclass(slots=True)
class Prepared:
    """A configuration to be: its source and plans, and the versions that were loaded for it."""

    source: ModelSource
    plans: dict[str, ModelPlan]
    fresh: dict[str, dict[str, _Version]] = field(default_factory=dict)


class ModelControl:
    """Loads and unloads versions and keeps the gateway's table true. One instance per process."""

    def __init__(
        self,
        *,
        source: ModelSource,
        runtime: Runtime,
        gateway: Gateway,
        serve: Callable[[Engine, ModelOptions], Served],
        publisher: Publisher,
        forget: Callable[[str, str], None],
        audit: Audit,
        mode: str = "none",
    ) -> None:
        self._source = source
        self._runtime = runtime
        self._gateway = gateway
        self._serve = serve
        self._publisher = publisher
        self._forget_counts = forget
        self._audit = audit
        self._mode = mode
        self._plans: dict[str, ModelPlan] = {}
        self._versions: dict[str, dict[str, _Version]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        #: Held by whoever changes what is wanted: one poll, load, unload or reconfiguration at a time.
        self.turn = asyncio.Lock()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._retiring: set[asyncio.Task[None]] = set()
        #: Models that were to be loaded at start.
        self._wanted: set[str] = set()

    # -- what others ask ----------------------------------------------------------------------------------------

    async def load_again(self, served: Served) -> Engine:
        """Load the version of ``served`` once more, for a use of its own. Raises TidegateError."""
        spec = served.spec
        plan = self.plan(spec.name)
        for wanted in plan.versions:
            if wanted.version == spec.version:
                return (await self._off_loop(partial(self._load, plan, wanted, None))).engine
        raise VersionNotFound(f"Request for unknown model: '{spec.name}' version {spec.version} is not found")

    def plan(self, model: str) -> ModelPlan:
        """The newest plan of a known model."""
        plan = self._plans.get(model)
        if plan is None:
            raise ModelNotFound(f"Request for unknown model: '{model[:128]}' is not found")
        return plan

    def index(self, ready_only: bool) -> list[IndexEntry]:
        """Every known version with its state, sorted by name and number; models with no version have one row."""
        rows: list[IndexEntry] = []
        for name in sorted(self._plans):
            versions = self._versions.get(name, {})
            rows += [IndexEntry(name, number, v.state, v.reason) for number, v in _by_number(versions)]
            if not versions:
                rows.append(IndexEntry(name, "", UNAVAILABLE, self._plans[name].error or "not loaded"))
        return [row for row in rows if row.state == READY] if ready_only else rows

    def ready(self, model: str, version: str) -> bool:
        """Is this version (or, for "", the model) ready? Raises ModelNotFound or VersionNotFound for unknown ones."""
        if model in self._gateway.table.models and not version:
            return True
        versions = self._versions.get(model, {})
        if model not in self._plans and not versions:
            self.plan(model)
        if not version:
            return False
        if version not in versions:
            raise VersionNotFound(f"Request for unknown model: '{model}' version {version[:32]} is not found")
        return versions[version].state == READY

    def failures(self) -> list[IndexEntry]:
        """Versions of wanted models that could not be loaded."""
        rows = self.index(ready_only=False)
        return [row for row in rows if row.state == UNAVAILABLE and row.name in self._wanted]

    # -- start, poll, load, unload ------------------------------------------------------------------------------

    async def start(self, names: tuple[str, ...] = ()) -> None:
        """Scan, and load what the mode says: everything, or in explicit mode ``names`` (``*`` for everything)."""
        await self._scan()
        wanted = set(names)
        if self._mode == "explicit" and "*" not in wanted:
            for name in sorted(wanted - set(self._plans)):
                raise ModelNotFound(f"model '{name}' asked for at start-up is not in the repository")
        else:
            wanted = set(self._plans)
        self._wanted = wanted
        for name in sorted(wanted):
            self._gateway.unready[name] = "loading"
        for name in sorted(wanted):
            await self._apply(name)

    async def poll(self, interval_s: float) -> None:
        """Follow the source until cancelled. A scan that fails is logged and tried again."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.refresh()
            except (TidegateError, OSError) as error:
                log.warning("poll_failed", error=str(error))

    async def refresh(self, *, retry_failed: bool = False) -> None:
        """One look at the source: load what is new or changed, unload what is gone.

        In explicit mode only models that are loaded are followed. ``retry_failed``: what could not be loaded is tried
        again though it has not changed: an upstream may be up by now.
        """
        async with self.turn:
            before = set(self._plans)
            await self._scan()
            known = before | set(self._plans)
            if self._mode == "explicit":
                known = {name for name in known if self._ready(name)}
            for name in sorted(known):
                await self._apply(name, retry_failed=retry_failed)

    async def load(self, model: str, parameters: Mapping[str, ParameterValue]) -> None:
        """Load or reload one model of the repository. Raises ModelLoadError with the first version that failed."""
        if parameters:
            raise InvalidArgument(
                f"load takes no parameters, got {', '.join(sorted(parameters))}: a client may not override "
                f"a model's configuration or files"
            )
        async with self.turn:
            await self._scan()
            self.plan(model)
            self._require_explicit("load", model)
            await self._apply(model, retry_failed=True)
        failed = [v for v in self._versions.get(model, {}).values() if v.state == UNAVAILABLE and v.reason]
        if failed:
            raise ModelLoadError(f"failed to load '{model}': {failed[0].reason}")
        if not self._versions.get(model):
            raise ModelLoadError(f"failed to load '{model}': {self._plans[model].error or 'it has no version to load'}")

    async def unload(self, model: str, unload_dependents: bool = False) -> None:
        """Stop serving one model. Requests that hold it finish; memory is given back after the last."""
        if model not in self._versions:
            self.plan(model)
        self._require_explicit("unload", model)
        async with self.turn, self._lock(model):
            gone = self._forget(model, "unloaded")
            self._audit("model.unloaded", model, {"versions": [version.number for version in gone]})
            self._publish(model)
            self._retire(gone)
        log.info("model_unloaded", model=model)

    def _require_explicit(self, what: str, model: str) -> None:
        if self._mode != "explicit":
            raise FailedPrecondition(
                f"{what} of '{model}' is refused: model control mode is '{self._mode}', it must be 'explicit'"
            )

    # -- reconfiguration: hold ``turn`` from prepare to commit or discard ------------------------------------------

    async def prepare(self, source: ModelSource) -> Prepared:
        """Load, beside what serves, whatever a new source wants that is not loaded yet.

        Raises ModelLoadError for the first version that cannot be had; then nothing has changed. A version that
        failed before and did not change since is passed over: it is no worse than it was.
        """
        prepared = Prepared(source, await self._off_loop(source.scan))
        try:
            for name in sorted(prepared.plans):
                await self._prepare_model(prepared, prepared.plans[name])
        except BaseException:
            await self.discard(prepared)
            raise
        return prepared

    async def _prepare_model(self, prepared: Prepared, plan: ModelPlan) -> None:
        known, before = self._versions.get(plan.name, {}), self._plans.get(plan.name)
        if plan.error and (before is None or before.error != plan.error):
            raise ModelLoadError(f"model '{plan.name}': {plan.error}")
        for number, reason in plan.refused.items():
            if number not in known or known[number].served is not None:
                raise ModelLoadError(f"model '{plan.name}' version {number}: {reason}")
        for wanted in () if self._mode == "explicit" and not self._ready(plan.name) else plan.versions:
            current = known.get(wanted.version)
            if current is None or current.tried != wanted.fingerprint:
                prepared.fresh.setdefault(plan.name, {})[wanted.version] = await self._load_fresh(plan, wanted)

    async def _load_fresh(self, plan: ModelPlan, wanted: VersionPlan) -> _Version:
        log.info("model_loading", model=plan.name, version=wanted.version)
        try:
            loaded = await self._off_loop(partial(self._load, plan, wanted, None))
            served = await self._served(loaded.engine, loaded.options)
        except TidegateError as error:
            self._audit("model.refused", f"{plan.name}:{wanted.version}", {"reason": error.message})
            raise ModelLoadError(f"model '{plan.name}' version {wanted.version}: {error.message}") from error
        self._audit("model.ready", f"{plan.name}:{wanted.version}", _facts(loaded.engine))
        return _Version(wanted.version, READY, tried=wanted.fingerprint, engine=loaded.engine, served=served)

    async def discard(self, prepared: Prepared) -> None:
        """Close what was loaded for a configuration that will not be."""
        self._retire([version for versions in prepared.fresh.values() for version in versions.values()])
        prepared.fresh.clear()

    def commit(self, prepared: Prepared, specs: Mapping[str, RoutingSpec], generation: int) -> None:
        """Swap everything in at once; what no longer serves is closed after its last request. Cannot fail."""
        gone: list[_Version] = []
        self._source, self._plans = prepared.source, prepared.plans
        for name in {*self._versions, *self._plans}:
            plan, known = self._plans.get(name), self._versions.setdefault(name, {})
            fresh = prepared.fresh.get(name, {})
            kept = set() if plan is None else {v.version for v in plan.versions} | set(plan.refused)
            gone += [version for number, version in known.items() if number in fresh or number not in kept]
            self._versions[name] = {n: v for n, v in {**known, **fresh}.items() if n in kept}
            if plan is None:
                del self._versions[name]
        loaded = {name: self.loaded(name) for name in self._versions if self._ready(name)}
        self._publisher.replace(specs, loaded, generation)
        for name in {*self._plans, *self._gateway.unready}:
            self._explain_absence(name)
        self._retire([version for version in gone if version.served is not None])

    def as_it_is(self) -> Prepared:
        """What is wanted and loaded now, to be swapped in under other routing."""
        return Prepared(self._source, self._plans)

    def digests_now(self) -> dict[str, str]:
        """``model:version`` -> digest of everything that serves."""
        return self.digests(self.as_it_is())

    def digests(self, prepared: Prepared) -> dict[str, str]:
        """``model:version`` -> digest of everything that will serve."""
        found: dict[str, str] = {}
        for name, plan in prepared.plans.items():
            for wanted in plan.versions:
                version = prepared.fresh.get(name, {}).get(wanted.version) or self._versions.get(name, {}).get(
                    wanted.version
                )
                if version is not None and version.served is not None:
                    found[f"{name}:{wanted.version}"] = version.served.spec.digest
        return found

    async def close(self) -> None:
        """Retire everything and wait until the engines are closed."""
        gone = [version for name in self._versions for version in self._forget(name, "shut down")]
        for name in self._versions:
            self._publish(name)
        self._retire(gone)
        if self._retiring:
            await asyncio.wait(self._retiring)
        self._loader.shutdown(wait=False)

    # -- inside -------------------------------------------------------------------------------------------------

    def _lock(self, model: str) -> asyncio.Lock:
        return self._locks.setdefault(model, asyncio.Lock())

    async def _scan(self) -> None:
        self._plans = await self._off_loop(self._source.scan)
        for name in self._plans:
            if name not in self._versions:
                self._gateway.unready.setdefault(name, "not loaded")

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._loader, work)

    async def _apply(self, model: str, *, retry_failed: bool = False) -> None:
        """Make what is loaded equal the plan: new versions first, then the table, then the old ones go.

        While a version that is wanted cannot be loaded, those that served before go on serving.
        """
        async with self._lock(model):
            plan = self._plans.get(model)
            known = self._versions.setdefault(model, {})
            if plan is not None and plan.error:
                self._refuse_plan(plan)
                return
            wanted = {} if plan is None else {version.version: version for version in plan.versions}
            if plan is not None:
                for number in sorted(wanted, key=int):
                    await self._ensure(plan, wanted[number], retry_failed)
            refused = {} if plan is None else plan.refused
            surplus = sorted(set(known) - set(wanted) - set(refused))
            if any(known[number].served is None for number in wanted):
                surplus = [number for number in surplus if known[number].served is None]
            gone = [known.pop(number) for number in surplus]
            for number, reason in refused.items():
                known.setdefault(number, _Version(number, UNAVAILABLE)).reason = reason
            if plan is None:
                del self._versions[model]
            self._publish(model)
            self._retire([version for version in gone if version.served is not None])

    def _refuse_plan(self, plan: ModelPlan) -> None:
        """A model folder that makes no sense: what serves goes on, the reason is kept."""
        log.error("model_refused", model=plan.name, error=plan.error, still_serving=bool(self._ready(plan.name)))
        self._publish(plan.name)

    async def _ensure(self, plan: ModelPlan, wanted: VersionPlan, retry_failed: bool) -> None:
        """Have one version loaded as planned; on failure keep what was there and its reason."""
        known = self._versions[plan.name]
        current = known.get(wanted.version)
        if (
            current is not None
            and current.tried == wanted.fingerprint
            and not (retry_failed and current.served is None)
        ):
            return
        if current is None or current.served is None:
            current = known[wanted.version] = _Version(wanted.version, LOADING)
        current.tried = wanted.fingerprint
        log.info("model_loading", model=plan.name, version=wanted.version)
        if plan.ignored:
            log.warning("config_fields_ignored", model=plan.name, fields=list(plan.ignored))
        try:
            loaded = await self._off_loop(partial(self._load, plan, wanted, self._champion(plan.name)))
            engine, served = loaded.engine, await self._served(loaded.engine, loaded.options)
        except TidegateError as error:
            self._load_failed(plan.name, current, error.message)
            return
        except Exception:
            log.exception("model_load_crashed", model=plan.name, version=wanted.version)
            self._load_failed(plan.name, current, "internal error while loading, see the server's log")
            return
        known[wanted.version] = _Version(wanted.version, READY, tried=wanted.fingerprint, engine=engine, served=served)
        self._publish(plan.name)
        facts = _facts(engine)
        log.info("model_ready", model=plan.name, version=wanted.version, **facts)
        report = {} if loaded.report is None else {"admission": loaded.report.to_json()["checks"]}
        self._audit("model.ready", f"{plan.name}:{wanted.version}", facts | report)
        if current.served is not None:
            self._retire([current])

    def _champion(self, model: str) -> ModelSpec | None:
        """What callers of this model are used to now."""
        routes = self._gateway.table.models.get(model)
        return None if routes is None else routes.versions[routes.stable].spec

    def _load(self, plan: ModelPlan, version: VersionPlan, champion: ModelSpec | None) -> _Loaded:
        """Load, warm, admit and try one version, on the loader thread. Raises ModelLoadError with one sentence."""
        request = plan.load_request(version)
        engine = self._runtime.load(request)
        try:
            report = _admitted(engine, plan, version, request, champion)
            for path in plan.golden_files(version, request.folder):
                if disagreement := run_golden(engine, load_golden(path), request.options.batching):
                    raise ModelLoadError(f"{path.name}: {disagreement}")
        except Exception:
            engine.close()
            raise
        return _Loaded(engine, request.options, report)

    async def _served(self, engine: Engine, options: ModelOptions) -> Served:
        """The engine behind its batcher; an engine whose options do not fit it is closed again."""
        try:
            return self._serve(engine, options)
        except TidegateError:
            await self._off_loop(engine.close)
            raise

    def _load_failed(self, model: str, version: _Version, reason: str) -> None:
        version.reason = reason
        self._audit("model.refused", f"{model}:{version.number}", {"reason": reason})
        if version.served is None:
            version.state = UNAVAILABLE
        log.error(
            "model_load_failed",
            model=model,
            version=version.number,
            error=reason,
            still_serving=version.served is not None,
        )

    def _forget(self, model: str, reason: str) -> list[_Version]:
        """Replace every loaded version of a model by a row that says why it is gone; gives what was loaded."""
        known = self._versions.get(model, {})
        loaded = [version for version in known.values() if version.served is not None]
        for version in loaded:
            known[version.number] = _Version(version.number, UNAVAILABLE, reason, version.tried)
        return loaded

    def _ready(self, model: str) -> dict[str, Served]:
        return {n: v.served for n, v in self._versions.get(model, {}).items() if v.served is not None}

    def _publish(self, model: str) -> None:
        """Bring the gateway's table and its list of models that are not ready up to date for one model."""
        self._publisher.update(model, self.loaded(model) if self._ready(model) else None)
        self._explain_absence(model)

    def _explain_absence(self, model: str) -> None:
        """Why a known model is not served, for who asks for it."""
        if model in self._gateway.table.models or model not in self._plans:
            self._gateway.unready.pop(model, None)
        else:
            self._gateway.unready[model] = self._why_not(model)

    def loaded(self, model: str) -> Loaded:
        """What of one model is ready now."""
        ready, plan = self._ready(model), self._plans.get(model)
        return Loaded(ready, self._stable(model, ready), {} if plan is None else plan.aliases)

    def _stable(self, model: str, ready: Mapping[str, Served]) -> str:
        """The version that the plan names, and while that is not ready the one that answered before; "": nobody."""
        plan, current = self._plans.get(model), self._gateway.table.models.get(model)
        if plan is None or plan.stable is None:
            return max(ready, key=int, default="")
        if plan.stable in ready:
            return plan.stable
        return current.stable if plan.stable and current is not None and current.stable in ready else ""

    def _why_not(self, model: str) -> str:
        reasons = [v.reason or v.state.lower() for v in self._versions.get(model, {}).values()]
        return self._plans[model].error or (reasons[-1] if reasons else "it has no version to load")

    def _retire(self, versions: list[_Version]) -> None:
        """Close engines that no table names any more, each after its last request; nobody waits for that."""
        for version in versions:
            task = asyncio.get_running_loop().create_task(self._close(version))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _close(self, version: _Version) -> None:
        served, engine = version.served, version.engine
        version.state, version.served, version.engine = UNLOADING, None, None
        if served is not None and engine is not None:
            await _last_call(served)
            await self._off_loop(partial(_shut, served, engine))
            name, number = served.spec.name, served.spec.version
            if number not in self._ready(name):
                self._forget_counts(name, number)


def _admitted(
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


async def _last_call(served: Served) -> None:
    """Wait until no request holds this version. The table no longer names it, so none can come."""
    if served.calls:
        idle = asyncio.Event()
        served.on_idle = idle.set
        await idle.wait()


def _shut(served: Served, engine: Engine) -> None:
    """Blocks. An engine whose run has not come back is left as it is: closing it under the run is not safe."""
    batcher = served.batcher
    batcher.close()
    if isinstance(batcher, OffLoopBatcher) and batcher.hung():
        log.warning("engine_left_open", model=served.spec.name, version=served.spec.version)
    else:
        engine.close()
    give_memory_back()


def _by_number(versions: Mapping[str, _Version]) -> list[tuple[str, _Version]]:
    return sorted(versions.items(), key=lambda item: int(item[0]))


def give_memory_back() -> None:
    """Collect cycles and hand freed heap pages to the system: an unloaded model's memory should show as free."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _facts(engine: Engine) -> dict[str, object]:
    spec = engine.spec
    facts: dict[str, object] = {
        "max_batch_size": spec.max_batch_size,
        "batch_rows": spec.learned_batch_size,
        "run_us": round(engine.run_ns / 1000, 1),
        "memory_mib": round(engine.memory_bytes / 2**20, 1),
        "digest": spec.digest,
    }
    if spec.batching_note:
        facts["note"] = spec.batching_note
    return facts
