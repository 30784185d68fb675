"""Models of a registry, served by alias: @champion answers, @challenger, @previous and @shadow stand ready.

Intent comes from the registry; files are fetched when a version is loaded, on the loader thread. A registry that cannot
be reached changes nothing: the last plans stand.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from router.registry.base import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    SHADOW,
    Fetched,
    RegistryBackend,
    RegistryError,
    Version,
)
from router.registry.manifest import CONFIG, DATA, MODEL, FileEntry, Manifest
from server.config.pbtxt import read_pbtxt
from server.control.sources import Audit, ModelPlan, VersionPlan
from server.errors import ModelLoadError
from server.runtime.base import LoadRequest, ModelOptions
from server.store.base import StoreError
from server.types import ModelSpec, TensorSpec

log = structlog.get_logger("control")

#: Versions with one of these aliases are kept loaded.
SERVED_ALIASES = (CHAMPION, CHALLENGER, PREVIOUS, SHADOW)


class RegistrySource:
    """Plans of every model that has a served alias."""

    def __init__(self, registry: RegistryBackend, state_dir: Path, audit: Audit, base: ModelOptions) -> None:
        self._registry = registry
        self._state_dir = state_dir
        self._audit = audit
        self._base = base
        self._generation = -1
        self._plans: dict[str, ModelPlan] = {}

    def scan(self) -> dict[str, ModelPlan]:
        """The plans as the registry stands now; the last ones while it cannot be read."""
        try:
            generation = self._registry.generation()
            if generation != self._generation:
                self._plans = {name: self._plan(name) for name in self._registry.models()}
                self._generation = generation
        except (RegistryError, StoreError) as error:
            log.error("registry_unreadable", error=str(error), models=len(self._plans))
        return self._plans

    def _plan(self, model: str) -> ModelPlan:
        aliases = self._registry.aliases(model)
        numbers = sorted({aliases[alias] for alias in SERVED_ALIASES if alias in aliases})
        versions, refused = [], {}
        for number in numbers:
            try:
                found = self._registry.version(model, number)
                versions.append(VersionPlan(str(number), Path(), found.digest))
            except RegistryError as error:
                refused[str(number)] = str(error)
        champion = aliases.get(CHAMPION)
        return ModelPlan(
            model,
            self._base,
            tuple(versions),
            refused=refused,
            aliases={alias: str(number) for alias, number in aliases.items()},
            stable="" if champion is None else str(champion),
            request=lambda version: self._request(model, version),
            declared=lambda version: self._declared(model, version),
        )

    def _request(self, model: str, plan: VersionPlan) -> LoadRequest:
        """Fetch a version and say how to load it. Blocking; raises ModelLoadError."""
        try:
            fetched = self._registry.fetch(model, int(plan.version))
            found = self._registry.version(model, int(plan.version))
        except RegistryError as error:
            raise ModelLoadError(str(error)) from error
        if fetched.healed:
            healed = sorted(fetched.healed)
            log.warning("files_mended", model=model, version=plan.version, files=healed)
            self._audit("model.files_mended", f"{model}:{plan.version}", {"files": healed})
        return self._load_request(model, plan.version, found, fetched)

    def _declared(self, model: str, plan: VersionPlan) -> ModelSpec | None:
        """The signature of the manifest, when its publisher gave one."""
        manifest = self._registry.version(model, int(plan.version)).manifest
        signature = None if manifest is None else manifest.description.signature
        if signature is None:
            return None
        inputs, outputs = (
            tuple(TensorSpec(tensor.name, tensor.datatype, tensor.shape) for tensor in side)
            for side in (signature.inputs, signature.outputs)
        )
        return ModelSpec(model, plan.version, inputs, outputs)

    def _load_request(self, model: str, version: str, found: Version, fetched: Fetched) -> LoadRequest:
        manifest = found.manifest
        if manifest is None:
            raise ModelLoadError(f"{model}:{version} has no manifest")
        graph = manifest.file(MODEL)
        if graph is None:
            raise ModelLoadError(f"{model}:{version} has no file of role 'model'")
        return LoadRequest(
            model,
            version,
            fetched.folder / graph.path,
            self._options(model, manifest, fetched.folder),
            fetched.folder,
            self._state_dir,
            listed=_beside(graph.path, manifest),
        )

    def _options(self, model: str, manifest: Manifest, folder: Path) -> ModelOptions:
        config = manifest.file(CONFIG)
        if config is None:
            return self._base
        try:
            text = (folder / config.path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"{config.path} cannot be read: {error}") from error
        return read_pbtxt(text, model=model, base=self._base).options


def _beside(graph: str, manifest: Manifest) -> dict[str, FileEntry]:
    """The files that external data may refer to, by their path from the graph's folder."""
    folder = graph.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""
    files = (entry for entry in manifest.files if entry.path.startswith(prefix))
    return {entry.path.removeprefix(prefix): entry for entry in files if entry.role in (MODEL, DATA)}
