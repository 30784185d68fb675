"""Models of a registry, served by alias: @champion answers, @challenger, @previous and @shadow stand ready.

Intent comes from the registry; files are fetched when a version is loaded, on the loader thread. A registry that cannot
be reached changes nothing: the last plans stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

import structlog

from router.registry.base import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    SHADOW,
    RegistryBackend,
    RegistryError,
    Version,
)
from router.registry.directory import scan
from router.registry.manifest import MODEL, Manifest
from server.config.compile import RegistryVersion, VersionedModel, VersionOrigin
from server.config.published import files_beside, options_of, signature_of
from server.control.sources import (
    GOLDEN_FILENAME,
    Audit,
    ModelPlan,
    VersionPlan,
    golden_beside,
    golden_state,
    unreadable,
)
from server.errors import ModelLoadError
from server.runtime.base import LoadRequest, ModelOptions
from server.runtime.upstream_options import UpstreamOptions
from server.store.base import StoreError
from server.types import ModelSpec

log = structlog.get_logger("control")

Over: TypeAlias = Callable[[ModelOptions], ModelOptions]
#: Where a version of the registry comes from: entry, version, options below its config.pbtxt, section on top.
_Origin: TypeAlias = tuple[str, Version, ModelOptions, Over]

#: Versions with one of these aliases are kept loaded.
SERVED_ALIASES = (CHAMPION, CHALLENGER, PREVIOUS, SHADOW)


class RegistryPlans:
    """Plans of models whose files are the registry's. ``over`` puts a model's own section on top of its options."""

    def __init__(
        self,
        registry: RegistryBackend,
        state_dir: Path,
        audit: Audit,
        refused: Callable[[str], Mapping[int, str]] = lambda _: {},
    ) -> None:
        self.registry = registry
        #: Versions of an entry that the registry itself holds back, and why.
        self._refused = refused
        self._state_dir = state_dir
        self._audit = audit

    def by_alias(
        self,
        name: str,
        entry: str,
        base: ModelOptions,
        over: Over = lambda options: options,
        golden: tuple[Path, ...] = (),
    ) -> ModelPlan:
        """The entry's versions that have a served alias, under ``name``; its champion answers."""
        aliases = self.registry.aliases(entry)
        numbers = sorted({aliases[alias] for alias in SERVED_ALIASES if alias in aliases})
        versions: list[VersionPlan] = []
        refused = {str(n): reason for n, reason in self._refused(entry).items() if n not in numbers}
        for number in numbers:
            try:
                versions.append(self.version(str(number), entry, number, base, over, golden))
            except RegistryError as error:
                refused[str(number)] = str(error)
        champion = aliases.get(CHAMPION)
        return ModelPlan(
            name,
            base,
            tuple(versions),
            refused=refused,
            aliases={alias: str(number) for alias, number in aliases.items()},
            stable="" if champion is None else str(champion),
            request=self.request(name),
            declared=_declared,
            golden=golden,
        )

    def version(
        self, number: str, entry: str, version: int, base: ModelOptions, over: Over, golden: tuple[Path, ...] = ()
    ) -> VersionPlan:
        """One version of an entry, to be served as ``number``. Raises RegistryError."""
        found = self.registry.version(entry, version)
        made_of = (found.digest, over(base), golden_state(golden))
        return VersionPlan(
            number, Path(), made_of, origin=(entry, found, base, over), golden=_golden_of(found.manifest)
        )

    def request(self, name: str) -> Callable[[VersionPlan], LoadRequest]:
        """How a version becomes a load request of the model ``name``: fetch it first. Blocking."""

        def request(plan: VersionPlan) -> LoadRequest:
            entry, found, base, over = cast("_Origin", plan.origin)
            return self._request(name, plan.version, entry, found, base, over)

        return request

    def _request(
        self, name: str, number: str, entry: str, found: Version, base: ModelOptions, over: Over
    ) -> LoadRequest:
        try:
            fetched = self.registry.fetch(entry, found.version)
        except RegistryError as error:
            raise ModelLoadError(str(error)) from error
        if fetched.healed:
            healed = sorted(fetched.healed)
            log.warning("files_mended", model=name, version=number, files=healed)
            self._audit("model.files_mended", f"{name}:{number}", {"files": healed})
        manifest = found.manifest
        graph = None if manifest is None else manifest.file(MODEL)
        if manifest is None or graph is None:
            raise ModelLoadError(f"{entry}:{found.version} has no file of role 'model'")
        return LoadRequest(
            name,
            number,
            fetched.folder / graph.path,
            over(options_of(name, manifest, fetched.folder, base)),
            fetched.folder,
            self._state_dir,
            listed=files_beside(graph, manifest),
        )


def _golden_of(manifest: Manifest | None) -> Path | None:
    """Golden requests among a version's files, from its folder."""
    listed = manifest is not None and any(entry.path == GOLDEN_FILENAME for entry in manifest.files)
    return Path(GOLDEN_FILENAME) if listed else None


def published_as(plan: VersionPlan) -> Version | None:
    """The registry's own record of a version; None for a version from elsewhere."""
    if not isinstance(plan.origin, tuple):
        return None
    _, found, *_ = cast("_Origin", plan.origin)
    return found


def manifest_of(plan: VersionPlan) -> Manifest | None:
    """What a version of the registry was published with; None for a version from elsewhere."""
    found = published_as(plan)
    return None if found is None else found.manifest


def _declared(plan: VersionPlan) -> ModelSpec | None:
    """The signature of the manifest, when its publisher gave one."""
    entry, found, *_ = cast("_Origin", plan.origin)
    return signature_of(found, entry, plan.version)


class RegistrySource:
    """Plans of every model of the registry, by alias."""

    def __init__(self, plans: RegistryPlans, base: ModelOptions) -> None:
        self._make = plans
        self._base = base
        self._generation = -1
        self._plans: dict[str, ModelPlan] = {}
        #: Why it could not be read at the last look; "" when it could.
        self._unread = ""

    def scan(self) -> dict[str, ModelPlan]:
        """The plans as the registry stands now; the last ones while it cannot be read."""
        registry = self._make.registry
        try:
            generation = registry.generation()
            if generation != self._generation:
                self._plans = {name: self._make.by_alias(name, name, self._base) for name in registry.models()}
                self._generation = generation
        except (RegistryError, StoreError) as error:
            if self._unread != str(error):
                log.error("registry_unreadable", error=str(error), models=len(self._plans))
            self._unread = str(error)
        else:
            if self._unread:
                log.info("registry_readable_again", failed=self._unread)
            self._unread = ""
        return self._plans


class VersionedSource:
    """Models whose versions the configuration names one by one, or that it takes from an entry of the registry."""

    def __init__(self, models: tuple[VersionedModel, ...], plans: RegistryPlans | None, state_dir: Path) -> None:
        self._models = models
        self._make = plans
        self._state_dir = state_dir

    def scan(self) -> dict[str, ModelPlan]:
        """One plan per model, whatever is found."""
        return {model.name: self._plan(model) for model in self._models}

    def _plan(self, model: VersionedModel) -> ModelPlan:
        try:
            if model.entry:
                return self._registry().by_alias(
                    model.name, model.entry, model.defaults, model.overlay.over, model.golden
                )
            return self._by_number(model)
        except (RegistryError, StoreError, ModelLoadError) as error:
            return ModelPlan(model.name, error=str(error))

    def _by_number(self, model: VersionedModel) -> ModelPlan:
        versions, refused = [], {}
        for number, source in model.versions.items():
            try:
                versions.append(self._version(model, number, source))
            except (RegistryError, ModelLoadError) as error:
                refused[number] = str(error)
        return ModelPlan(
            model.name,
            model.options,
            tuple(versions),
            refused=refused,
            request=partial(self._request, model),
            golden=model.golden,
        )

    def _version(self, model: VersionedModel, number: str, source: VersionOrigin) -> VersionPlan:
        if isinstance(source, RegistryVersion):
            found = self._registry().registry.resolve(source.model, source.version)
            return self._registry().version(
                number, source.model, found.version, model.defaults, model.overlay.over, model.golden
            )
        if isinstance(source, UpstreamOptions):
            return VersionPlan(number, Path(), (source, model.options, golden_state(model.golden)), origin=source)
        try:
            found_on_disk = scan(source)
        except OSError as error:
            raise ModelLoadError(unreadable(source, error)) from error
        versions = [(entry, version) for entry in found_on_disk.models.values() for version in entry.versions.values()]
        if len(versions) != 1:
            reasons = "; ".join(problem.message for problem in found_on_disk.problems)
            raise ModelLoadError(reasons or f"its source holds {len(versions)} versions, wanted one")
        entry, only = versions[0]
        own = golden_beside(entry, only)
        made_of = (only.fingerprint, model.options, golden_state(model.golden + (() if own is None else (own,))))
        return VersionPlan(number, only.path, made_of, golden=own)

    def _request(self, model: VersionedModel, plan: VersionPlan) -> LoadRequest:
        if isinstance(plan.origin, UpstreamOptions):
            return LoadRequest(model.name, plan.version, plan.path, model.options, upstream=plan.origin)
        if plan.origin is not None:
            return self._registry().request(model.name)(plan)
        folder = plan.path.parent
        return LoadRequest(model.name, plan.version, plan.path, model.options, folder, self._state_dir)

    def _registry(self) -> RegistryPlans:
        if self._make is None:
            raise ModelLoadError("its source is the registry, and the state folder cannot be read")
        return self._make
