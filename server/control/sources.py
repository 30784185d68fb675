"""Where models come from: a directory in Triton/KServe layout, or models named in the configuration file.

A source turns what is on disk now into plans. Scanning blocks and opens no model; one bad entry is that entry's reason
and spoils nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import structlog

from router.registry.directory import FoundModel, FoundVersion, Scan, ScanProblem, is_model_name, scan, select_versions
from server.config.pbtxt import default_filename, read_pbtxt
from server.errors import ConfigError, TidegateError
from server.runtime.base import LoadRequest, ModelOptions
from server.types import ModelSpec

log = structlog.get_logger("control")

#: ``audit(action, subject, detail)``: record what was done; never waits.
Audit = Callable[[str, str, Mapping[str, object]], None]

#: Beside the model file of a version: its golden requests.
GOLDEN_FILENAME = "golden.json"


@dataclass(slots=True, frozen=True)
class VersionPlan:
    """One version to have loaded. ``fingerprint`` changes whenever anything that it is made of does."""

    version: str
    path: Path
    fingerprint: object
    #: Where it comes from, for whoever made the plan.
    origin: object = field(default=None, compare=False)
    #: Golden requests of its own; a relative path starts at the folder of its load request.
    golden: Path | None = None


@dataclass(slots=True, frozen=True)
class ModelPlan:
    """What one model should be: its options and versions, or ``error`` when its folder makes no sense."""

    name: str
    options: ModelOptions = field(default_factory=ModelOptions)
    versions: tuple[VersionPlan, ...] = ()
    folder: Path | None = None
    error: str = ""
    #: Versions that are there and cannot be used: number -> why.
    refused: Mapping[str, str] = field(default_factory=dict)
    state_dir: Path | None = None
    #: Fields of its config.pbtxt that have no effect here.
    ignored: tuple[str, ...] = ()
    #: The version that answers requests which name none ("": nobody does); None: the highest that is loaded.
    stable: str | None = None
    #: What the registry calls versions: alias -> number.
    aliases: Mapping[str, str] = field(default_factory=dict)
    #: How a version becomes a load request, when files have to be fetched first.
    request: Callable[[VersionPlan], LoadRequest] | None = None
    #: What a version was published as; None: nobody promised anything, and admission only advises.
    declared: Callable[[VersionPlan], ModelSpec | None] | None = None
    #: Files of golden requests that every version has to answer rightly.
    golden: tuple[Path, ...] = ()

    def load_request(self, version: VersionPlan) -> LoadRequest:
        """What the runtime is asked for. May block on fetching files; raises ModelLoadError."""
        if self.request is not None:
            return self.request(version)
        return LoadRequest(self.name, version.version, version.path, self.options, self.folder, self.state_dir)

    def golden_files(self, version: VersionPlan, folder: Path | None) -> tuple[Path, ...]:
        """Every file of golden requests for a version that was asked for with ``folder``; its own comes last."""
        return self.golden if version.golden is None else (*self.golden, (folder or Path()) / version.golden)


class ModelSource(Protocol):
    """Gives the plans of all models as they stand now. Blocking; raises OSError when the root cannot be read."""

    def scan(self) -> dict[str, ModelPlan]: ...


@dataclass(slots=True, frozen=True)
class NamedModel:
    """One model of the configuration file: where it lies, what it starts from, and what its section puts on top."""

    name: str
    path: Path
    base: ModelOptions = field(default_factory=ModelOptions)
    over: Callable[[ModelOptions], ModelOptions] = field(default=lambda options: options)
    golden: tuple[Path, ...] = ()


class DirectorySource:
    """Every model below one root. ``base``: the options that a model's config.pbtxt goes on top of."""

    def __init__(self, root: Path, state_dir: Path, base: ModelOptions | None = None) -> None:
        self._root = root
        self._state_dir = state_dir
        self._base = NamedModel("", root, base or ModelOptions())
        self._ignored: set[tuple[str, str]] = set()  # entries that were left out at the last look, and why

    def scan(self) -> dict[str, ModelPlan]:
        """Plans by name; entries that have no usable name are left out, and logged when that is news."""
        found = _scan(self._root)
        plans = {
            name: _plan(model, self._base, found.problems, self._state_dir) for name, model in found.models.items()
        }
        ignored = set()
        for problem in found.problems:
            if problem.model in plans:
                continue
            if is_model_name(problem.model):
                plans[problem.model] = ModelPlan(problem.model, error=problem.message)
                continue
            left_out = problem.model, problem.message
            ignored.add(left_out)
            if left_out not in self._ignored:
                log.warning("entry_ignored", entry=problem.model[:128], reason=problem.message)
        self._ignored = ignored
        return plans


class NamedSource:
    """The models that a configuration file names, each with its own path."""

    def __init__(self, models: tuple[NamedModel, ...], state_dir: Path) -> None:
        self._models = models
        self._state_dir = state_dir

    def scan(self) -> dict[str, ModelPlan]:
        """One plan per named model, whatever is found."""
        return {model.name: self._one(model) for model in self._models}

    def _one(self, model: NamedModel) -> ModelPlan:
        try:
            found = _scan(model.path)
        except OSError as error:
            return ModelPlan(model.name, error=unreadable(model.path, error))
        if len(found.models) != 1:
            reasons = "; ".join(problem.message for problem in found.problems)
            return ModelPlan(model.name, error=reasons or f"its source holds {len(found.models)} models, wanted one")
        (only,) = found.models.values()
        return replace(_plan(only, model, found.problems, self._state_dir), name=model.name)


class JoinedSource:
    """Several sources as one; a name that comes twice is taken from the first."""

    def __init__(self, *sources: ModelSource) -> None:
        self._sources = sources

    def scan(self) -> dict[str, ModelPlan]:
        """The union of all plans."""
        plans: dict[str, ModelPlan] = {}
        for source in self._sources:
            plans = source.scan() | plans
        return plans


def unreadable(source: Path, error: OSError) -> str:
    """Why nothing comes of a source. Callers of the model are told so too: not in which folder it is."""
    return f"its source '{source.name or source}' cannot be read: {error.strerror or error}"


def _scan(root: Path) -> Scan:
    return scan(root, filename_of=_filename)


def _filename(config: Path) -> str:
    """The model file's name that a config.pbtxt asks for."""
    try:
        return default_filename(_read(config), model=config.parent.name)
    except TidegateError as error:
        raise ValueError(error.message) from None


def _read(config: Path) -> str:
    try:
        return config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config.name} cannot be read: {error}") from None


def _plan(model: FoundModel, named: NamedModel, problems: list[ScanProblem], state_dir: Path) -> ModelPlan:
    refused = {p.version: p.message for p in problems if p.model == model.name and p.version}
    try:
        declared, ignored = _declared(model, named.base)
        options = named.over(declared)
        selected = select_versions(options.version_policy, [*model.versions, *refused])
    except (TidegateError, ValueError) as error:
        return ModelPlan(model.name, error=str(error), folder=model.folder)
    golden = golden_state(named.golden)
    versions = tuple(
        VersionPlan(
            number,
            found.path,
            (model.fingerprint, found.fingerprint, options, golden),
            golden=golden_beside(model, found),
        )
        for number, found in model.versions.items()
        if number in selected
    )
    return ModelPlan(
        model.name,
        options,
        versions,
        model.folder,
        refused={number: reason for number, reason in refused.items() if number in selected},
        state_dir=state_dir,
        ignored=ignored,
        golden=named.golden,
    )


def golden_beside(model: FoundModel, version: FoundVersion) -> Path | None:
    """Golden requests in the version's folder. What lies beside a model that is a bare file belongs to nobody."""
    path = version.path.with_name(GOLDEN_FILENAME)
    return path if model.folder is not None and os.path.lexists(path) else None


def golden_state(paths: tuple[Path, ...]) -> object:
    """Changes whenever one of the files does, or comes or goes."""
    return tuple((path, _stamp(path)) for path in paths)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_mtime_ns, info.st_size, info.st_ino


def _declared(model: FoundModel, base: ModelOptions) -> tuple[ModelOptions, tuple[str, ...]]:
    """What config.pbtxt asks for over ``base``, and the names of its fields that have no effect here."""
    if model.config is None:
        return base, ()
    parsed = read_pbtxt(_read(model.config), model=model.name, base=base)
    return parsed.options, parsed.ignored
