"""Rules of the routing part that span several keys: names, versions that exist, and what the router itself refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from router.compiled import check
from router.errors import Problem
from router.types import REQUESTED
from server.config.model import Config, Model
from server.config.problems import Contradiction
from server.config.routing import (
    LATEST,
    Reference,
    compile_routes,
    has_aliases,
    known_versions,
    real_model,
    references,
    serves_registry,
    stable_of,
)
from server.config.tree import KeyPath

_REGISTRY: Final[tuple[KeyPath, ...]] = (("registry",),)
_ORIGINS: Final = ("source", "versions", "model")
#: What belongs to the model that a public name serves, not to the name.
_OF_THE_MODEL: Final = ("runtime", "batching", "version_policy", "warmup", "golden")


def routing_contradictions(config: Config, *, repository_given: bool = False) -> Iterator[Contradiction]:
    """Every broken rule, in no particular order."""
    yield from _public_names(config)
    yield from _ids(config)
    for name, entry in config.models.items():
        path: KeyPath = ("models", name)
        yield from _origin(entry, path)
        yield from _versions(config, entry, path, repository_given)
        if entry.model is not None:
            yield from _named_model(config, entry, path, repository_given)
        yield from _references(config, name, path, repository_given)
        yield from _splits(config, name, path, repository_given)
        yield from _headers(entry, path)
        yield from _router_problems(config, name, path, repository_given)


# --- names ------------------------------------------------------------------------------------------------------------


def _public_names(config: Config) -> Iterator[Contradiction]:
    taken: dict[str, str] = {}
    for name, entry in config.models.items():
        for index, alias in enumerate(entry.aliases):
            where: KeyPath = ("models", name, "aliases", index)
            if alias in config.models:
                yield Contradiction(where, f"'{alias}' is the name of a model")
            elif alias in taken:
                yield Contradiction(where, f"'{alias}' is an alias of '{taken[alias]}' already")
            taken.setdefault(alias, name)


def _ids(config: Config) -> Iterator[Contradiction]:
    """An id is the salt and the name of a rollout or experiment: no two share it."""
    owners: dict[str, KeyPath] = {}
    for name, entry in config.models.items():
        for kind, split in (("rollout", entry.rollout), ("experiment", entry.experiment)):
            if split is None:
                continue
            where: KeyPath = ("models", name, kind, "id")
            first = owners.setdefault(split.id, where)
            if first != where:
                yield Contradiction(
                    where, f"'{split.id}' is the id of the {first[2]} of '{first[1]}' already", (first,)
                )


def _origin(entry: Model, path: KeyPath) -> Iterator[Contradiction]:
    given = [key for key in _ORIGINS if key in entry.model_fields_set]
    for key in given[1:]:
        yield Contradiction((*path, key), f"give either {given[0]} or {key}, not both", ((*path, given[0]),))
    if "versions" in given and "version_policy" in entry.model_fields_set:
        text = "versions names the versions that are served; version_policy picks among those of a folder"
        yield Contradiction((*path, "version_policy"), text, ((*path, "versions"),))


def _versions(config: Config, entry: Model, path: KeyPath, repository_given: bool) -> Iterator[Contradiction]:
    if serves_registry(config, repository_given=repository_given):
        return
    for version, of in (entry.versions or {}).items():
        if of.entry is not None and of.entry.alias:
            where = (*path, "versions", version, "source")
            yield Contradiction(where, _no_aliases(of.entry.entry), _REGISTRY)


def _named_model(config: Config, entry: Model, path: KeyPath, repository_given: bool) -> Iterator[Contradiction]:
    model = entry.model or ""
    for key in _OF_THE_MODEL:
        if key in entry.model_fields_set:
            text = f"{key} belongs to the model, '{model}', not to another name of its versions"
            yield Contradiction((*path, key), text, ((*path, "model"),))
    text = _unknown_model(config, model, repository_given)
    if text:
        yield Contradiction((*path, "model"), text, _origin_of(config, model))


# --- versions ---------------------------------------------------------------------------------------------------------


def _no_aliases(model: str) -> str:
    return f"aliases need a model of the registry (registry.embedded, without a directory), which '{model}' is not"


def _unknown_model(config: Config, model: str, repository_given: bool) -> str:
    """Why a model cannot be led to; "" when it can, or when only its folder or registry knows."""
    found = config.models.get(model)
    if found is not None:
        return "" if found.model is None else f"'{model}' is another name of '{found.model}'; name that"
    if repository_given or config.registry.directory is not None or config.registry.has_aliases:
        return ""
    return f"model '{model}' is not in models, and there is no registry to find it in"


def _references(config: Config, name: str, path: KeyPath, repository_given: bool) -> Iterator[Contradiction]:
    for place, reference in references(config, name):
        text = _unreachable(config, name, reference, repository_given)
        if text:
            yield Contradiction((*path, *place), text, (*_origin_of(config, reference.model), (*path, "model")))


def _origin_of(config: Config, model: str) -> tuple[KeyPath, ...]:
    """The keys that say where a model comes from, and with it which versions it has."""
    if model not in config.models:
        return ("models",), *_REGISTRY
    return *(("models", model, key) for key in _ORIGINS), *_REGISTRY


def _unreachable(config: Config, name: str, reference: Reference, repository_given: bool) -> str:
    model = reference.model
    if model != real_model(config, name):
        unknown = _unknown_model(config, model, repository_given)
        if unknown:
            return unknown
    if reference.is_alias:
        known = reference.version == LATEST or has_aliases(config, model, repository_given=repository_given)
        return "" if known else _no_aliases(model)
    versions = known_versions(config, model)
    if not versions or reference.version in versions:
        return ""
    return f"wanted one of the versions of '{model}' ({', '.join(versions)}), got {reference.version}"


# --- splits -----------------------------------------------------------------------------------------------------------


def _splits(config: Config, name: str, path: KeyPath, repository_given: bool) -> Iterator[Contradiction]:
    entry = config.models[name]
    if entry.rollout is not None and entry.experiment is not None:
        text = "a model has either a rollout or an experiment, not both"
        yield Contradiction((*path, "experiment"), text, ((*path, "rollout"),))
    stable = stable_of(config, name, repository_given=repository_given)
    for place, reference in references(config, name):
        if place == ("rollout", "candidate") and reference == stable:
            text = f"the candidate is stable itself ({stable}); name the version that answers now as stable"
            yield Contradiction((*path, *place), text, ((*path, "stable"), (*path, "versions"), *_REGISTRY))
    yield from _shares(entry, path)


def _shares(entry: Model, path: KeyPath) -> Iterator[Contradiction]:
    """Shares that make no sense although the router could live with them."""
    if entry.experiment is not None:
        for name, arm in entry.experiment.arms.items():
            if name == REQUESTED:
                where = (*path, "experiment", "arms", name)
                yield Contradiction(where, f"an arm cannot be named {REQUESTED}, which means something else in a rule")
            if not arm.share:
                where = (*path, "experiment", "arms", name, "share")
                yield Contradiction(where, "wanted a share over 0%; leave out an arm that gets nothing")
    breaker = entry.resilience.breaker
    if breaker is not None and not breaker.open_at:
        where = (*path, "resilience", "breaker", "open_at")
        yield Contradiction(where, "wanted over 0% to 100%, got 0%")


def _headers(entry: Model, path: KeyPath) -> Iterator[Contradiction]:
    """Headers know no case: two tests of one header would be one, silently."""
    for index, rule in enumerate(entry.rules):
        names = Counter(name.lower() for name in rule.match.header)
        for name in rule.match.header:
            where = (*path, "rules", index, "match", "header", name)
            if not name:
                yield Contradiction(where, "wanted a header's name, got none")
            elif names[name.lower()] > 1:
                yield Contradiction(where, f"header {name.lower()} is named {names[name.lower()]} times")


# --- what the router refuses ------------------------------------------------------------------------------------------


def _router_problems(config: Config, name: str, path: KeyPath, repository_given: bool) -> Iterator[Contradiction]:
    entry = config.models[name]
    if entry.rollout is not None and entry.experiment is not None:
        return
    for problem in check(compile_routes(config, name, repository_given=repository_given)):
        where = (*path, *_place(problem, entry))
        yield Contradiction(where, problem.message, (where, *((*path, key) for key in _rests_on(problem))))


def _place(problem: Problem, entry: Model) -> KeyPath:
    """The router's place of a problem as keys of the file."""
    match problem.where:
        case ("rollout", "arms", int(), "weight"):
            return ("rollout", "weight")
        case ("rollout", "arms", *_):
            return ("rollout",)
        case ("experiment", "arms", int(index), *rest) if entry.experiment is not None:
            arm = list(entry.experiment.arms)[index]
            return ("experiment", "arms", arm, *("share" if key == "weight" else key for key in rest if key != "name"))
        case ("shadow", index, "id"):
            return ("shadow", index, "to")
        case where:
            return where


def _rests_on(problem: Problem) -> tuple[str, ...]:
    """The other keys of the model that a problem speaks of."""
    match problem.where:
        case ("rules", _, "to"):
            return ("rollout", "experiment")
        case ("rules", _, "match", "tenant"):
            return ("tenant_header",)
        case _:
            return ()
