"""The routing part of the configuration -> plain values: whose versions a name serves, and how requests are spread.

A file speaks of versions by number or alias, and nobody knows yet what is loaded: ``compile_routing`` keeps such
references as they are, and ``bind`` puts what is loaded in their place, as often as that changes. A plan of a reload
compares references (``plan``), so an alias that moves meanwhile is no movement of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Generic, TypeVar

from monitor.compare import CompareSpec
from router.breaker import BreakerPolicy
from router.compiled import is_version
from router.experiment import ExperimentSpec, OutcomeSpec
from router.retry import RetryPolicy
from router.shadow import ShadowBudget
from router.types import (
    REQUESTED,
    STABLE_ARM,
    Arm,
    Destination,
    ExperimentSplit,
    KeySpec,
    Match,
    ModelRoutes,
    RolloutSplit,
    Rule,
    ShadowRoute,
    ValueTest,
)
from server.config import routing_sections as sections
from server.config.model import Config, Model
from server.config.tree import KeyPath

T = TypeVar("T")

CHAMPION: Final = "@champion"
#: Whatever version of a model is the highest that is loaded.
LATEST: Final = "@latest"

CANDIDATE_ARM: Final = "candidate"
CONTROL_ARM: Final = "control"

#: What ``retry: {on: [unavailable]}`` stands for: errors of a version that is not there or has no room just now.
_UNAVAILABLE: Final = ("draining", "model_not_ready", "queue_full", "upstream_unavailable")
#: Failures of an arm that stable answers for. ``input_rejected``: the arm's graph refused what stable's may take.
_FALLBACK_ON: Final = frozenset(
    {
        *_UNAVAILABLE, "input_rejected", "internal", "model_load_error", "out_of_memory", "queue_timeout",
        "runtime_failure", "version_timeout",
    }
)  # fmt: skip

#: Keys of a model that say something of its routing.
ROUTING_KEYS: Final = frozenset(
    {
        "aliases", "experiment", "key", "model", "resilience", "rollout", "rules", "shadow", "stable", "tenant_header",
    }
)  # fmt: skip


@dataclass(slots=True, frozen=True, order=True)
class Reference:
    """A version of a real model, by number ("8") or by alias ("@challenger")."""

    model: str
    version: str

    @property
    def is_alias(self) -> bool:
        return self.version.startswith("@")

    def __str__(self) -> str:
        return f"{self.model}{self.version}" if self.is_alias else f"{self.model}:{self.version}"


@dataclass(slots=True, frozen=True)
class ShadowSpec:
    """One shadow's bounds and comparison; ``id`` is that of its ``ShadowRoute``."""

    id: str
    to: Reference
    budget: ShadowBudget
    compare: CompareSpec


@dataclass(slots=True, frozen=True)
class ResilienceSpec:
    """What follows a failed attempt. ``timeout_ns`` 0: an attempt is bounded by its request's deadline alone."""

    timeout_ns: int = 0
    breaker: BreakerPolicy | None = None
    retry: RetryPolicy = field(default_factory=lambda: RetryPolicy(fallback_on=_FALLBACK_ON))


@dataclass(slots=True, frozen=True)
class RoutingSpec:
    """One public name. ``model`` is whose versions it serves; ``versions`` are those the file names, if it does.

    ``entry`` is the models entry that gives the name: itself, or what it is an alias of. Names of one entry are one
    thing: what is counted and bounded under any of them is counted and bounded together.
    """

    name: str
    entry: str
    model: str
    versions: tuple[str, ...]
    routes: ModelRoutes[Reference]
    resilience: ResilienceSpec = field(default_factory=ResilienceSpec)
    shadows: tuple[ShadowSpec, ...] = ()
    experiment: ExperimentSpec | None = None
    reshuffle: bool = False

    @property
    def stable(self) -> Reference:
        return self.routes.versions[self.routes.stable]


# --- references -------------------------------------------------------------------------------------------------------


def parse_reference(text: str, model: str) -> Reference | None:
    """``8``, ``@alias``, ``other:8`` or ``other@alias`` as one of ``model`` or of the other; None for a bare name."""
    if "@" in text:
        other, _, alias = text.partition("@")
        return Reference(other or model, f"@{alias}")
    other, mark, version = text.rpartition(":")
    if mark:
        return Reference(other, version)
    return Reference(model, text) if text.isdigit() else None


def _reference(text: str, model: str) -> Reference:
    found = parse_reference(text, model)
    if found is None:
        raise ValueError(f"wanted a version, got {text!r}")
    return found


def real_model(config: Config, name: str) -> str:
    """Whose versions the models entry ``name`` serves: its own, or those of the model that it names."""
    found = config.models.get(name)
    return name if found is None or found.model is None else found.model


def known_versions(config: Config, model: str) -> tuple[str, ...]:
    """The versions that the file names for a real model, lowest first; none when they are found on disk."""
    found = config.models.get(model)
    return () if found is None or found.versions is None else tuple(sorted(found.versions, key=int))


def serves_registry(config: Config, *, repository_given: bool = False) -> bool:
    """Whether ``registry:`` sources, and models without a source, mean the registry with its aliases."""
    return config.registry.has_aliases and config.registry.directory is None and not repository_given


def has_aliases(config: Config, model: str, *, repository_given: bool = False) -> bool:
    """Whether versions of a real model can be named by alias: it, or one of its versions, is the registry's."""
    if not serves_registry(config, repository_given=repository_given):
        return False
    found = config.models.get(model)
    if found is None:
        return True
    if found.versions is not None:
        return any(version.entry is not None for version in found.versions.values())
    return found.source is None or found.source.path is None


def stable_of(config: Config, name: str, *, repository_given: bool = False) -> Reference:
    """What answers by default: as the entry says, or its model's; else the champion, or the highest version."""
    model = real_model(config, name)
    for entry in (name, model):
        found = config.models.get(entry)
        if found is not None and found.stable is not None:
            return _reference(found.stable, model)
    if has_aliases(config, model, repository_given=repository_given):
        return Reference(model, CHAMPION)
    return Reference(model, (known_versions(config, model) or (LATEST,))[-1])


def references(config: Config, name: str) -> Iterator[tuple[KeyPath, Reference]]:
    """Every version that an entry leads to, with the place (below the entry) that names it."""
    entry, model = config.models[name], real_model(config, name)
    places: list[tuple[KeyPath, str]] = [] if entry.stable is None else [(("stable",), entry.stable)]
    places += [(("rules", index, "to"), rule.to) for index, rule in enumerate(entry.rules)]
    if entry.rollout is not None:
        places.append((("rollout", "candidate"), entry.rollout.candidate))
    if entry.experiment is not None:
        places += [(("experiment", "arms", arm, "to"), to.to) for arm, to in entry.experiment.arms.items()]
    places += [(("shadow", index, "to"), shadow.to) for index, shadow in enumerate(entry.shadow)]
    for path, text in places:
        found = parse_reference(text, model)
        if found is not None:
            yield path, found


# --- compiling --------------------------------------------------------------------------------------------------------


def compile_routing(config: Config, *, repository_given: bool = False) -> dict[str, RoutingSpec]:
    """The routing of every public name, further names included, of which the file says anything about routing."""
    specs = _specs(config, config.models, repository_given)
    return {name: spec for name, spec in specs if ROUTING_KEYS & _entry_of(config, name).model_fields_set}


def compile_all(config: Config, *, repository_given: bool = False) -> dict[str, RoutingSpec]:
    """The same for every public name of the file, whether it says anything or not."""
    return dict(_specs(config, config.models, repository_given))


def _specs(config: Config, names: Iterable[str], repository_given: bool) -> Iterator[tuple[str, RoutingSpec]]:
    for name in names:
        spec = compile_entry(config, name, repository_given=repository_given)
        for public in (name, *config.models[name].aliases):
            yield public, replace(spec, name=public)


def _entry_of(config: Config, public: str) -> Model:
    """The models entry that gives a public name."""
    if public in config.models:
        return config.models[public]
    return next(entry for entry in config.models.values() if public in entry.aliases)


def compile_entry(config: Config, name: str, *, repository_given: bool = False) -> RoutingSpec:
    """One models entry under its own name."""
    entry, model = config.models[name], real_model(config, name)
    return RoutingSpec(
        name,
        name,
        model,
        known_versions(config, model),
        compile_routes(config, name, repository_given=repository_given),
        _resilience(entry.resilience),
        tuple(_shadow(shadow, model) for shadow in entry.shadow),
        None if entry.experiment is None else _experiment(entry.experiment),
        entry.reshuffle,
    )


def compile_routes(config: Config, name: str, *, repository_given: bool = False) -> ModelRoutes[Reference]:
    """The routes of one models entry. What the router thinks of them is not checked here."""
    entry, model = config.models[name], real_model(config, name)
    stable = stable_of(config, name, repository_given=repository_given)
    versions = {version: Reference(model, version) for version in known_versions(config, model)}
    return ModelRoutes(
        versions | {stable.version: stable},
        stable.version,
        model,
        entry.tenant_header,
        KeySpec(entry.key.from_, entry.key.missing),
        tuple(_rule(rule, model) for rule in entry.rules),
        _split(entry, model),
        tuple(ShadowRoute(_shadow_id(shadow, model), _to(shadow.to, model), shadow.sample) for shadow in entry.shadow),
    )


def _to(text: str, model: str) -> Destination[Reference]:
    found = _reference(text, model)
    return Destination(found.model, found.version, found)


def _rule(rule: sections.RoutingRule, model: str) -> Rule[Reference]:
    match = rule.match
    conditions = Match(
        {name: _test(test) for name, test in match.header.items()},
        {name: _test(test) for name, test in match.parameter.items()},
        None if match.tenant is None else _test(match.tenant),
        None if match.version is None else _test(match.version),
    )
    named = parse_reference(rule.to, model) is None
    return Rule(rule.name, conditions, rule.to if named else _to(rule.to, model))


def _test(test: sections.ValueTest) -> ValueTest:
    exact = test.in_ or (() if test.exact is None else (test.exact,))
    return ValueTest(frozenset(exact), () if test.prefix is None else (test.prefix,), test.present is True)


def _split(entry: Model, model: str) -> RolloutSplit[Reference] | ExperimentSplit[Reference] | None:
    rollout, experiment = entry.rollout, entry.experiment
    if rollout is not None:
        control = CONTROL_ARM if rollout.control == "matched" else ""
        # Where there are steps, the share is the rollout's to say, and none until it does.
        arm = Arm(CANDIDATE_ARM, _to(rollout.candidate, model), rollout.weight or 0, control)
        return RolloutSplit(rollout.id, (arm,), _salt(rollout.secret))
    if experiment is not None:
        arms = tuple(Arm(name, _to(arm.to, model), arm.share) for name, arm in experiment.arms.items())
        return ExperimentSplit(experiment.id, arms, experiment.coverage, _salt(experiment.secret))
    return None


def _salt(secret: str | None) -> bytes:
    return b"" if secret is None else secret.encode()


def _experiment(experiment: sections.Experiment) -> ExperimentSpec:
    """The books of an experiment: the others are compared with the arm named ``control``, else with the first."""
    arms = sorted(experiment.arms.items(), key=lambda arm: arm[0] != CONTROL_ARM)
    outcome = experiment.outcome
    outcomes = () if outcome is None else (OutcomeSpec(outcome.name, outcome.kind, outcome.window, outcome.silence),)
    return ExperimentSpec(experiment.id, tuple((name, arm.share) for name, arm in arms), outcomes)


def _shadow_id(shadow: sections.Shadow, model: str) -> str:
    return str(_reference(shadow.to, model))


def _shadow(shadow: sections.Shadow, model: str) -> ShadowSpec:
    limits, compare = shadow.budget, shadow.compare
    budget = ShadowBudget(
        rps=limits.rps,
        in_flight=limits.in_flight,
        queue=limits.queue,
        max_body_bytes=limits.max_body,
        timeout_ns=limits.timeout,
        yield_above_load=limits.yield_above_load,
    )
    compared = CompareSpec(
        compare.outputs, compare.abs_tol, compare.rel_tol, compare.argmax, compare.ks, compare.keep_worst
    )
    return ShadowSpec(_shadow_id(shadow, model), _reference(shadow.to, model), budget, compared)


def _resilience(resilience: sections.Resilience) -> ResilienceSpec:
    breaker, retry = resilience.breaker, resilience.retry
    fallback_on = _FALLBACK_ON if resilience.fallback == "stable" else frozenset()
    return ResilienceSpec(
        resilience.timeout or 0,
        None
        if breaker is None
        else BreakerPolicy(breaker.window, breaker.min, breaker.open_at, breaker.half_open, breaker.open_for),
        RetryPolicy(fallback_on=fallback_on)
        if retry is None
        else RetryPolicy(_codes(retry.on), retry.max, fallback_on, retry.budget, retry.min_concurrency),
    )


def _codes(names: Iterable[str]) -> frozenset[str]:
    return frozenset(code for name in names for code in (_UNAVAILABLE if name == "unavailable" else (name,)))


def expecting(spec: RoutingSpec, version: str) -> ModelRoutes[Reference]:
    """The routes with one more version that may be asked for: which ones are loaded is not the file's to say."""
    routes = spec.routes
    if not is_version(version):
        return routes
    return replace(routes, versions={**routes.versions, version: Reference(spec.model, version)})


# --- binding ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Bound(Generic[T]):
    """Routes to what is loaded. ``routes`` is None while stable is not; ``missing``: every reference to nothing."""

    routes: ModelRoutes[T] | None
    missing: tuple[Reference, ...] = field(default=())


def bind(spec: RoutingSpec, served: Mapping[str, T], lookup: Callable[[Reference], tuple[str, T] | None]) -> Bound[T]:
    """Put what is loaded in the place of references.

    ``served``: all loaded versions of ``spec.model``, which may be asked for by number. ``lookup`` gives a reference's
    version number and target, None when it is not loaded. What leads to nothing leads to stable instead: a rule, and a
    split of which an arm is missing (all of it, for the other arms alone would compare unequal things). A shadow that
    is missing gets nothing.
    """
    binder = _Binder(lookup)
    stable = binder.find(spec.stable)
    routes = _bound(spec, binder)
    missing = tuple(sorted(binder.missing))
    if stable is None:
        return Bound(None, missing)
    number, target = stable
    return Bound(replace(routes, versions={**served, number: target}, stable=number), missing)


def _bound(spec: RoutingSpec, binder: _Binder[T]) -> ModelRoutes[T]:
    """Everything but the versions and stable."""
    given = spec.routes
    split = binder.split(given.split)
    arms = frozenset() if split is None else frozenset(name for arm in split.arms for name in (arm.name, arm.control))
    rules = tuple(binder.rule(rule, arms) for rule in given.rules)
    shadows = tuple(shadow for shadow in map(binder.shadow, given.shadows) if shadow is not None)
    return ModelRoutes({}, "", given.model, given.tenant_header, given.key, rules, split, shadows)


class _Binder(Generic[T]):
    """Looks references up and remembers which lead to nothing."""

    def __init__(self, lookup: Callable[[Reference], tuple[str, T] | None]) -> None:
        self._lookup = lookup
        self.missing: set[Reference] = set()

    def find(self, reference: Reference) -> tuple[str, T] | None:
        found = self._lookup(reference)
        if found is None:
            self.missing.add(reference)
        return found

    def destination(self, to: Destination[Reference]) -> Destination[T] | None:
        found = self.find(to.target)
        return None if found is None else Destination(to.model, *found)

    def rule(self, rule: Rule[Reference], arms: frozenset[str]) -> Rule[T]:
        if isinstance(rule.to, Destination):
            return Rule(rule.name, rule.match, self.destination(rule.to) or STABLE_ARM)
        known = rule.to == REQUESTED or rule.to in arms
        return Rule(rule.name, rule.match, rule.to if known else STABLE_ARM)

    def split(
        self, split: RolloutSplit[Reference] | ExperimentSplit[Reference] | None
    ) -> RolloutSplit[T] | ExperimentSplit[T] | None:
        if split is None:
            return None
        ends = [(arm, self.destination(arm.to)) for arm in split.arms]
        arms = tuple(Arm(arm.name, to, arm.weight, arm.control) for arm, to in ends if to is not None)
        if len(arms) < len(split.arms):
            return None
        if isinstance(split, RolloutSplit):
            return RolloutSplit(split.id, arms, split.secret)
        return ExperimentSplit(split.id, arms, split.coverage, split.secret)

    def shadow(self, shadow: ShadowRoute[Reference]) -> ShadowRoute[T] | None:
        to = self.destination(shadow.to)
        return None if to is None else ShadowRoute(shadow.id, to, shadow.sample)
