"""Which versions are loaded: scan, load beside what serves, swap the table, retire what nobody holds any more.

A new version is loaded and warm before the old one goes, and a failed load leaves the old one serving. Loading
blocks, so it happens on one loader thread; everything else runs on the loop thread.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

import structlog

from server.config.routing import RoutingSpec
from server.config.settings import ReloadSettings
from server.control.aliases import AliasTargets
from server.control.loading import Loader
from server.control.mending import Mending
from server.control.publishing import Loaded, Publisher
from server.control.readying import Readying
from server.control.retiring import CLOSE_SECONDS, Retirement
from server.control.sources import Audit, ModelPlan, ModelSource, VersionPlan
from server.control.versions import (
    LOADING,
    READY,
    UNAVAILABLE,
    IndexEntry,
    KnownVersion,
    Prepared,
    index_rows,
    is_lacking,
    is_unchanged,
    stable_version,
    warm_rows,
)
from server.errors import (
    FailedPrecondition,
    InvalidArgument,
    ModelLoadError,
    ModelNotFound,
    TidegateError,
    VersionNotFound,
)
from server.gateway import Gateway, Served
from server.runtime.base import Engine, ModelOptions, Runtime
from server.types import ParameterValue

log = structlog.get_logger("control")


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
        reload: ReloadSettings | None = None,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        self._source = source
        self._gateway = gateway
        self._publisher = publisher
        self._forget_counts = forget
        self._audit = audit
        self._mode = mode
        self._plans: dict[str, ModelPlan] = {}
        self._aliases = AliasTargets()
        self._versions: dict[str, dict[str, KnownVersion]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        #: Held by whoever changes what is wanted: the start, or one poll, load, unload or reconfiguration at a time.
        self.turn = asyncio.Lock()
        self._retirement = Retirement(reload or ReloadSettings(), self._gone, close_seconds=close_seconds)
        self._loader = Loader(runtime, serve, self._retirement.make_room)
        self._mending = Mending(self._unreached_models, self._try_again)
        self._readying = Readying(self._loader, self._retirement, self._mending, gateway, audit)
        #: Versions that stay loaded although no plan wants them any more, by model, and how many want that.
        self._held: dict[str, Counter[str]] = {}
        #: Models that were to be loaded at start.
        self._wanted: set[str] = set()
        #: Why plans are refused, as it was logged: once, not at each look.
        self._refused: dict[str, str] = {}
        #: Why the last look of ``poll`` failed, as it was logged; "" when it did not.
        self.failing = ""

    # -- what others ask ----------------------------------------------------------------------------------------

    async def load_again(self, served: Served) -> Engine:
        """Load the version of ``served`` once more, for a use of its own. Raises TidegateError."""
        spec = served.spec
        plan = self.plan(spec.name)
        for wanted in plan.versions:
            if wanted.version == spec.version:
                return (await self._loader.load(plan, wanted, None)).engine
        raise VersionNotFound(f"Request for unknown model: '{spec.name}' version {spec.version} is not found")

    def plan(self, model: str) -> ModelPlan:
        """The newest plan of a known model."""
        plan = self._plans.get(model)
        if plan is None:
            raise ModelNotFound(f"Request for unknown model: '{model[:128]}' is not found")
        return plan

    def index(self, ready_only: bool) -> list[IndexEntry]:
        """Every known version with its state, sorted by name and number; models with no version have one row.

        Versions that are kept warm come last, as unavailable: nobody can ask for them.
        """
        rows = index_rows(self._plans, self._versions)
        return [row for row in rows if row.state == READY] if ready_only else rows + warm_rows(self._retirement.warm())

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
        rows = index_rows(self._plans, self._versions)
        return [row for row in rows if row.state == UNAVAILABLE and row.name in self._wanted]

    def hold(self, model: str, version: str) -> None:
        """Keep a loaded version loaded, whether a plan wants it or not, as long as its model is there.

        Who asks twice has to let go twice.
        """
        self._held.setdefault(model, Counter())[version] += 1

    def let_go(self, model: str, version: str) -> None:
        """It may go when no plan wants it; the next look at the source sees to it."""
        self._held[model] = self._held.get(model, Counter()) - Counter([version])

    # -- start, poll, load, unload ------------------------------------------------------------------------------

    async def start(self, names: tuple[str, ...] = ()) -> None:
        """Scan, and load what the mode says: everything, or in explicit mode ``names`` (``*`` for everything)."""
        async with self.turn:
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
        """Follow the source until cancelled. A look that fails is tried again; what is new of it is logged."""
        while True:
            await asyncio.sleep(interval_s)
            await self._follow()

    async def _follow(self) -> None:
        try:
            await self.refresh()
        except (TidegateError, OSError) as error:
            if self._fails(error):
                log.warning("poll_failed", error=str(error))
        except Exception as error:  # the boundary of one look: whatever it met, what comes later is followed
            if self._fails(error):
                log.exception("poll_failed")
        else:
            if self.failing:
                log.info("poll_works_again", failed=self.failing)
            self.failing = ""

    def _fails(self, error: Exception) -> bool:
        """Whether the look before did not fail of the same."""
        before, self.failing = self.failing, f"{type(error).__name__}: {error}"
        return self.failing != before

    async def mend(self) -> None:
        """Try upstreams that could not be reached again until they can be. Until cancelled."""
        await self._mending.run()

    def _unreached_models(self) -> list[str]:
        return [name for name in self._plans if self._unreached_versions(name)]

    def _unreached_versions(self, model: str) -> list[str]:
        return [number for number, version in self._versions.get(model, {}).items() if version.unreached]

    async def _try_again(self, models: list[str]) -> float:
        """Load what could not be reached of some models; the seconds that it took."""
        clock = asyncio.get_running_loop().time
        async with self.turn:
            began = clock()
            for name in models:
                if again := self._unreached_versions(name):
                    await self._apply(name, again=again)
            return clock() - began

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
                await self._apply(name, again=self._failed(name) if retry_failed else ())

    def _failed(self, model: str) -> set[str]:
        """The versions that could not be loaded as they are now, whether what they were before serves or not."""
        known = self._versions.get(model, {})
        return {number for number, version in known.items() if version.served is None or version.reason}

    async def load(self, model: str, parameters: Mapping[str, ParameterValue]) -> None:
        """Load or reload one model of the repository.

        Raises ModelLoadError with the first version that failed, also when what it was before goes on serving.
        """
        if parameters:
            raise InvalidArgument(
                f"load takes no parameters, got {', '.join(sorted(parameters))}: a client may not override "
                f"a model's configuration or files"
            )
        self._require_explicit("load", model)
        async with self.turn:
            await self._scan()
            error = self.plan(model).error
            await self._apply(model, again=self._failed(model))
            known = self._versions[model].values()
        failed = error or next((version.reason for version in known if version.reason), "")
        if failed or not known:
            raise ModelLoadError(f"failed to load '{model}': {failed or 'it has no version to load'}")

    async def unload(self, model: str, unload_dependents: bool = False) -> None:
        """Stop serving one model. Requests that hold it finish; memory is given back after the last, none is warm.

        Of a model of the repository that is not loaded nothing is left to do. Raises ModelNotFound for any other.
        """
        self._require_explicit("unload", model)
        async with self.turn:
            if model not in self._versions and model not in self._plans:
                await self._scan()  # it may have come since the last look
                self.plan(model)
            async with self._lock(model):
                self._unload(model)

    def _unload(self, model: str) -> None:
        self._retirement.cool(model)
        for version in self._versions.get(model, {}).values():
            version.unreached = False  # nobody waits for it any more
        gone = self._forget(model, "unloaded")
        if gone:
            self._audit("model.unloaded", model, {"versions": [version.number for version in gone]})
            self._publish(model)
            self._retire(gone)
            log.info("model_unloaded", model=model)

    def _require_explicit(self, what: str, model: str) -> None:
        """Refuse at once what no turn would make possible; ModelNotFound when the model is not even known."""
        if self._mode != "explicit":
            self.plan(model)
            raise FailedPrecondition(
                f"{what} of '{model}' is refused: model control mode is '{self._mode}', it must be 'explicit'"
            )

    # -- reconfiguration: hold ``turn`` from prepare to commit or discard ------------------------------------------

    async def prepare(self, source: ModelSource) -> Prepared:
        """Load, beside what serves, whatever a new source wants that is not loaded yet.

        Raises ModelLoadError for the first version that cannot be had; then nothing has changed. A version that
        failed before and did not change since is passed over: it is no worse than it was.
        """
        prepared = Prepared(source, await self._loader.run(source.scan))
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
            raise ModelLoadError(f"model '{plan.name}': {plan.error}", model=plan.name)
        for number, reason in plan.refused.items():
            if number not in known or known[number].served is not None:
                why = f"model '{plan.name}' version {number}: {reason}"
                raise ModelLoadError(why, model=plan.name, version=number)
        for wanted in () if self._mode == "explicit" and not self._ready(plan.name) else plan.versions:
            current = known.get(wanted.version)
            if current is None or current.tried != wanted.fingerprint:
                version = await self._readying.prepared_version(prepared, plan, wanted)
                prepared.fresh.setdefault(plan.name, {})[wanted.version] = version

    async def discard(self, prepared: Prepared) -> None:
        """Close what was loaded for a configuration that will not be; what was warm is so again."""
        warm = [retired.version for retired in prepared.taken_back]
        fresh = [version for versions in prepared.fresh.values() for version in versions.values()]
        self._retire([version for version in fresh if version.loaded not in warm])
        for retired in prepared.taken_back:
            self._retirement.give_back(retired)
        prepared.fresh.clear()
        prepared.taken_back.clear()

    def commit(self, prepared: Prepared, specs: Mapping[str, RoutingSpec], generation: int) -> None:
        """Swap everything in at once; what no longer serves answers its requests and is kept warm. Cannot fail."""
        gone: list[KnownVersion] = []
        self._source, self._plans = prepared.source, prepared.plans
        for name in {*self._versions, *self._plans}:
            plan, known = self._plans.get(name), self._versions.setdefault(name, {})
            fresh = prepared.fresh.get(name, {})
            kept = set() if plan is None else self._kept(plan, known, fresh)
            gone += [version for number, version in known.items() if number in fresh or number not in kept]
            self._versions[name] = {n: v for n, v in {**known, **fresh}.items() if n in kept}
            self._aliases.follow(name, plan)
            if plan is None:
                del self._versions[name]
        loaded = {name: self.loaded(name) for name in self._versions if self._ready(name)}
        self._publisher.replace(specs, loaded, generation)
        for name in {*self._plans, *self._gateway.unready}:
            self._explain_absence(name)
        for retired in prepared.taken_back:
            self._readying.serves_again(retired)
        self._retire(gone, warm=True)

    def _kept(self, plan: ModelPlan, known: Mapping[str, KnownVersion], fresh: Mapping[str, KnownVersion]) -> set[str]:
        """The versions that stay under a plan. As at a look: what it lacks takes nothing away from what serves."""
        if plan.error:
            return set(known)
        kept = {version.version for version in plan.versions} | set(plan.refused) | self._needed(plan.name)
        lacking = is_lacking(plan, {**known, **fresh})
        return kept | {number for number, version in known.items() if lacking and version.served is not None}

    def obey(self, reload: ReloadSettings) -> None:
        """New rules for versions that are replaced; what is warm stays so for as long as was said then."""
        self._retirement.rules = reload
        if not reload.keep_warm_s:
            self._retirement.cool()

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
        """Retire everything and wait until the engines are closed; not for runs that hang."""
        gone = [version for name in self._versions for version in self._forget(name, "shut down")]
        # All at once and with no routes left: one by one, each would leave routes of others that lead nowhere.
        self._publisher.replace({}, {}, self._gateway.table.generation)
        for name in self._plans:
            self._explain_absence(name)
        self._retire(gone)
        await self._retirement.close()
        self._loader.close()

    # -- inside -------------------------------------------------------------------------------------------------

    def _lock(self, model: str) -> asyncio.Lock:
        return self._locks.setdefault(model, asyncio.Lock())

    async def _scan(self) -> None:
        self._plans = await self._loader.run(self._source.scan)
        self._refused = {name: error for name, error in self._refused.items() if name in self._plans}
        for name in self._plans:
            if name not in self._versions:
                self._gateway.unready.setdefault(name, "not loaded")

    async def _apply(self, model: str, *, again: Collection[str] = ()) -> None:
        """Make what is loaded equal the plan: new versions first, then the table, then the old ones go.

        While a version that is wanted cannot be loaded, those that served before go on serving. ``again``: versions
        to be tried again that could not be loaded and have not changed.
        """
        async with self._lock(model):
            plan = self._plans.get(model)
            self._versions.setdefault(model, {})
            self._aliases.follow(model, plan)
            if plan is not None and plan.error:
                self._refuse_plan(plan)
                return
            self._refused.pop(model, None)
            gone: list[KnownVersion] = []
            try:
                if plan is not None:
                    for wanted in sorted(plan.versions, key=lambda version: int(version.version)):
                        await self._ensure(plan, wanted, wanted.version in again, gone)
                gone += self._follow_plan(model, plan)
            finally:
                await self._let_go(gone)
            if plan is None:
                self._retirement.cool(model)

    def _follow_plan(self, model: str, plan: ModelPlan | None) -> list[KnownVersion]:
        """Publish what is wanted and loaded of a model; the versions that are not wanted any more."""
        known = self._versions[model]
        wanted = set() if plan is None else {version.version for version in plan.versions}
        refused = {} if plan is None else plan.refused
        needed = set() if plan is None else self._needed(model)
        surplus = sorted(set(known) - wanted - set(refused) - needed)
        if plan is not None and is_lacking(plan, known):
            surplus = [number for number in surplus if known[number].served is None]
        gone = [known.pop(number) for number in surplus]
        for number, reason in refused.items():
            known.setdefault(number, KnownVersion(number, UNAVAILABLE)).reason = reason
        if plan is None:
            del self._versions[model]
        self._publish(model)
        return gone

    async def _let_go(self, gone: list[KnownVersion]) -> None:
        """Keep warm what may be wanted again as it is; what was removed or written over is closed."""
        unchanged = await self._loader.run(lambda: [is_unchanged(version) for version in gone]) if gone else []
        kept = [version for version, same in zip(gone, unchanged, strict=True) if same]
        self._retire([version for version in gone if version not in kept])
        self._retire(kept, warm=True)

    def _refuse_plan(self, plan: ModelPlan) -> None:
        """A model folder that makes no sense: what serves goes on, the reason is kept."""
        if self._refused.get(plan.name) != plan.error:
            self._refused[plan.name] = plan.error
            log.error("model_refused", model=plan.name, error=plan.error, still_serving=bool(self._ready(plan.name)))
        self._publish(plan.name)

    async def _ensure(self, plan: ModelPlan, wanted: VersionPlan, again: bool, gone: list[KnownVersion]) -> None:
        """Have one version loaded as planned, and what it replaces in ``gone``; on failure keep what was there."""
        known = self._versions[plan.name]
        current = known.get(wanted.version)
        if current is not None and current.tried == wanted.fingerprint and not again:
            return
        before = "" if current is None else current.reason
        ready = self._readying.ready_again(plan, wanted)
        if ready is None:
            if current is None or current.served is None:
                current = known[wanted.version] = KnownVersion(wanted.version, LOADING)
            current.tried = wanted.fingerprint
            log.info("model_loading", model=plan.name, version=wanted.version)
            if plan.ignored:
                log.warning("config_fields_ignored", model=plan.name, fields=list(plan.ignored))
            try:
                ready = await self._readying.loaded_anew(plan, wanted)
            except TidegateError as error:
                self._readying.load_failed(plan, wanted, current, error.message, before)
                return
            except Exception:
                log.exception("model_load_crashed", model=plan.name, version=wanted.version)
                why = "internal error while loading, see the server's log"
                self._readying.load_failed(plan, wanted, current, why, before)
                return
        known[wanted.version] = ready
        if current is not None and current.served is not None:
            gone.append(current)
        self._publish(plan.name)

    def _forget(self, model: str, reason: str) -> list[KnownVersion]:
        """Replace every loaded version of a model by a row that says why it is gone; gives what was loaded."""
        known = self._versions.get(model, {})
        loaded = [version for version in known.values() if version.served is not None]
        for version in loaded:
            known[version.number] = KnownVersion(version.number, UNAVAILABLE, reason, version.tried)
        return loaded

    def _ready(self, model: str) -> dict[str, Served]:
        return {n: v.served for n, v in self._versions.get(model, {}).items() if v.served is not None}

    def _publish(self, model: str) -> None:
        """Bring the gateway's table and its list of models that are not ready up to date for one model."""
        self._publisher.update(model, self.loaded(model) if self._ready(model) else None)
        self._explain_absence(model)

    def _needed(self, model: str) -> set[str]:
        """Versions that stay loaded whatever the plan says: somebody holds them, or a rollout lets them answer."""
        return {*self._held.get(model, ()), *self._publisher.led_to(model)}

    def _explain_absence(self, model: str) -> None:
        """Why a known model is not served, for who asks for it."""
        if model in self._plans and model not in self._gateway.table.models:
            self._gateway.unready[model] = self._why_not(model)
        elif model in self._gateway.table.models or model not in self._publisher.specs:
            self._gateway.unready.pop(model, None)

    def loaded(self, model: str) -> Loaded:
        """What of one model is ready now."""
        ready, plan, current = self._ready(model), self._plans.get(model), self._gateway.table.models.get(model)
        stable = stable_version(plan, "" if current is None else current.stable, ready)
        aliases, moving = self._aliases.of(model, plan, ready)
        return Loaded(ready, stable, aliases, moving)

    def _why_not(self, model: str) -> str:
        reasons = [v.reason or v.state.lower() for v in self._versions.get(model, {}).values()]
        return self._plans[model].error or (reasons[-1] if reasons else "it has no version to load")

    def _retire(self, versions: Iterable[KnownVersion], *, warm: bool = False) -> None:
        """No table names these any more."""
        loaded = [version.loaded for version in versions]
        self._retirement.retire([version for version in loaded if version is not None], warm=warm)

    def _gone(self, model: str, number: str) -> None:
        """A version was closed. Its counts go, unless another of its number serves, or may again."""
        if number not in self._ready(model) and not self._retirement.is_warm(model, number):
            self._forget_counts(model, number)
