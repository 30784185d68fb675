"""The rollouts of the configuration: compiled to what the machine takes, and every rule that they break.

A file names candidate and stable by number or alias, and nobody knows yet which digests those are: a template keeps
the references, and ``spec`` puts what they mean in their place when a rollout begins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from monitor.compare import CompareSpec
from router.errors import BadRollout
from router.errors import Problem as Mistake
from router.rollout.plan import check
from router.rollout.spec import (
    EVENTS,
    GateSpec,
    LevelGate,
    MeanGate,
    MismatchGate,
    RateGate,
    RatioGate,
    Reaction,
    RolloutSpec,
    ShadowPhase,
    StepSpec,
)
from router.shadow import ShadowBudget
from router.types import Destination, RolloutSplit, ShadowRoute
from server.config.model import Config
from server.config.problems import Contradiction
from server.config.rollout_section import Rollout, RolloutGate, RolloutShadow
from server.config.routing import (
    CANDIDATE_ARM,
    CHAMPION,
    Reference,
    RoutingSpec,
    ShadowSpec,
    parse_reference,
    real_model,
    stable_of,
)
from server.config.tree import KeyPath

#: What stands for versions and digests that are not known yet.
_UNKNOWN: Final = "?"
_KINDS: Final = ("event", "paired", "monitor", "feedback")
_LOOKS: Final = 3
_MISMATCH_ALPHA: Final = 0.001

#: Keys that each kind of gate takes beside ``action`` and the one that names what it looks at.
_TAKES: Final[Mapping[str, frozenset[str]]] = {
    "event": frozenset({"worse_than", "max_rate"}),
    "paired": frozenset({"max_rate"}),
    "monitor": frozenset({"over", "for_"}),
    "feedback": frozenset({"worse_than", "max_rate", "worse_by", "better"}),
    "alpha": frozenset(),
}
#: Of those, which one it must have one of.
_WANTS: Final[Mapping[str, tuple[str, ...]]] = {
    "event": ("worse_than", "max_rate"),
    "paired": ("max_rate",),
    "monitor": ("over",),
    "feedback": ("worse_than", "max_rate", "worse_by"),
    "alpha": (),
}
#: Keys of the section that mean something only where a machine climbs steps.
_OF_STEPS: Final = (
    "approvals", "cooldown", "gates", "hold", "inconclusive", "keep_warm", "load_timeout", "on_crash", "shadow",
    "start", "two_person",
)  # fmt: skip
#: Where the machine's fields stand in the file, for its mistakes.
_PLACES: Final[Mapping[str, KeyPath]] = {
    "alpha": ("defaults", "gates", "alpha"),
    "inconclusive_after_ns": ("inconclusive", "after"),
    "inconclusive_then": ("inconclusive", "then"),
    "hold_weight": ("hold",),
    "cooldown_ns": ("cooldown",),
    "keep_warm_ns": ("keep_warm",),
    "load_timeout_ns": ("load_timeout",),
    "ignore_first_ns": ("start", "ignore_first"),
}


@dataclass(slots=True, frozen=True)
class ShadowPlan:
    """How copies are sent while a candidate is shadowed."""

    sample: int
    rps: float

    def apply(self, rollout: str, to: Reference) -> tuple[ShadowRoute[Reference], ShadowSpec]:
        """The shadow of one rollout, with an id of its own."""
        shadow_id = f"rollout:{rollout}"
        budget = ShadowBudget(rps=self.rps)
        route = ShadowRoute(shadow_id, Destination(to.model, to.version, to), self.sample)
        return route, ShadowSpec(shadow_id, to, budget, CompareSpec())


@dataclass(slots=True, frozen=True)
class RolloutTemplate:
    """A rollout as the file asks for it. ``base`` has everything but the versions and the digest.

    ``entry`` is the models entry, ``model`` whose versions it serves. ``follows``: the candidate is an alias, and each
    version that it comes to name gets a rollout of its own.
    """

    entry: str
    model: str
    stable: Reference
    candidate: Reference
    base: RolloutSpec
    matched: bool = True
    warm: tuple[int, ...] = ()
    golden: Path | None = None
    shadow: ShadowPlan | None = None
    every_ns: int = 1_000_000_000
    #: What the registry calls the model, where it is the registry's.
    registered: str = ""

    @property
    def id(self) -> str:
        return self.base.id

    @property
    def follows(self) -> bool:
        return self.candidate.is_alias

    def run_id(self, candidate: str, times: int = 0) -> str:
        """The id of the rollout of one candidate; ``times``: how often this one was tried before."""
        if not self.follows:
            return self.id
        return f"{self.id}-{candidate}" if not times else f"{self.id}-{candidate}.{times + 1}"

    def spec(self, run_id: str, stable: str, candidate: str, digest: str) -> RolloutSpec:
        """What the machine is asked to do, with everything known."""
        return replace(self.base, id=run_id, stable=stable, candidate=candidate, digest=digest)

    def fingerprint(self) -> str:
        """Changes with the section, and with what the file calls stable."""
        shadow = None if self.shadow is None else [self.shadow.sample, self.shadow.rps]
        rest = [str(self.stable), str(self.candidate), self.matched, list(self.warm), str(self.golden or ""), shadow]
        return hashlib.sha256(json.dumps([self.base.to_dict(), rest], sort_keys=True).encode()).hexdigest()


@dataclass(slots=True, frozen=True)
class Steering:
    """What a rollout makes of an entry's routing: which version is stable ("": the file's), and the candidate's share.

    Without a share there is no split: rules that lead to its arms lead to stable.
    """

    candidate: str
    stable: str = ""
    weight: int = 0
    salt: str = ""
    shadow: tuple[ShadowRoute[Reference], ShadowSpec] | None = field(default=None)


def steered(spec: RoutingSpec, steering: Steering) -> RoutingSpec:
    """The routing of an entry under a rollout."""
    routes = spec.routes
    if steering.stable:
        stable = Reference(spec.model, steering.stable)
        routes = replace(routes, versions={**routes.versions, stable.version: stable}, stable=stable.version)
    split = routes.split
    if isinstance(split, RolloutSplit):
        to = Reference(spec.model, steering.candidate)
        arms = tuple(
            replace(arm, to=Destination(to.model, to.version, to), weight=steering.weight)
            if arm.name == CANDIDATE_ARM
            else arm
            for arm in split.arms
        )
        split = replace(split, id=steering.salt or split.id, arms=arms) if steering.weight else None
    shadows, shadow_specs = routes.shadows, spec.shadows
    if steering.shadow is not None:
        shadows, shadow_specs = (*shadows, steering.shadow[0]), (*shadow_specs, steering.shadow[1])
    return replace(spec, routes=replace(routes, split=split, shadows=shadows), shadows=shadow_specs)


# --- compiling --------------------------------------------------------------------------------------------------------


def compile_rollouts(config: Config, *, repository_given: bool = False) -> dict[str, RolloutTemplate]:
    """The rollouts with steps, by models entry."""
    return {
        name: _template(config, name, model.rollout, repository_given)
        for name, model in config.models.items()
        if model.rollout is not None and model.rollout.steps
    }


def evaluate_every(config: Config) -> int:
    """Nanoseconds between two looks at the gates."""
    return config.defaults.gates.evaluate_every


def _template(config: Config, name: str, section: Rollout, repository_given: bool) -> RolloutTemplate:
    model = real_model(config, name)
    candidate = parse_reference(section.candidate, model) or Reference(model, section.candidate)
    return RolloutTemplate(
        name,
        model,
        stable_of(config, name, repository_given=repository_given),
        candidate,
        _base(config, name, section),
        section.control == "matched",
        section.start.warm,
        section.start.golden,
        None if section.shadow is None else ShadowPlan(section.shadow.sample, section.shadow.rps),
        evaluate_every(config),
        _registered(config, model),
    )


def _registered(config: Config, model: str) -> str:
    """The registry's entry behind a model that is served by alias."""
    found = config.models.get(model)
    return model if found is None or found.source is None or found.source.path is not None else found.source.entry


def _base(config: Config, name: str, section: Rollout) -> RolloutSpec:
    return RolloutSpec(
        id=section.id,
        model=name,
        stable=f"{_UNKNOWN}s",
        candidate=f"{_UNKNOWN}c",
        digest=_UNKNOWN,
        steps=tuple(
            StepSpec(step.weight, step.min, tuple(step.certify.items()), step.approve) for step in section.steps
        ),
        gates=tuple((gate_name, _gate(gate)) for gate_name, gate in section.gates.items()),
        shadow=_phase(section.shadow),
        alpha=config.defaults.gates.alpha,
        inconclusive_after_ns=section.inconclusive.after,
        inconclusive_then=section.inconclusive.then,
        on_crash=section.on_crash,
        hold_weight=section.hold,
        cooldown_ns=section.cooldown,
        keep_warm_ns=section.keep_warm,
        load_timeout_ns=section.load_timeout,
        ignore_first_ns=section.start.ignore_first,
        approvals=section.approvals,
        two_person=section.two_person,
    )


def _phase(shadow: RolloutShadow | None) -> ShadowPhase | None:
    return None if shadow is None else ShadowPhase(shadow.pairs, shadow.min)


def _gate(gate: RolloutGate) -> GateSpec:
    """What ``_gate_mistakes`` found nothing wrong with."""
    reaction = Reaction(gate.action)
    source = gate.event or gate.paired or gate.feedback or ""
    if gate.monitor is not None:
        return LevelGate(gate.monitor, gate.over or 0.0, gate.for_ or _LOOKS, reaction)
    if gate.worse_than is not None:
        return RatioGate(source, gate.worse_than, reaction)
    if gate.max_rate is not None:
        return RateGate(source, gate.max_rate, reaction, gate.paired is not None)
    if gate.worse_by is not None:
        return MeanGate(source, gate.worse_by, gate.better != "lower", reaction)
    return MismatchGate(_MISMATCH_ALPHA if gate.alpha is None else gate.alpha, reaction)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def rollout_contradictions(config: Config) -> Iterator[Contradiction]:
    """Every rule that a rollout section breaks by itself."""
    for name, model in config.models.items():
        section = model.rollout
        if section is None:
            continue
        path: KeyPath = ("models", name, "rollout")
        yield from _kind_mistakes(section, path)
        wrong = tuple(_gate_mistakes(section, path))
        yield from wrong
        if section.steps and not wrong:
            yield from _own_versions(config, name, section, path)
            yield from _machine_mistakes(config, name, section, path)


def _kind_mistakes(section: Rollout, path: KeyPath) -> Iterator[Contradiction]:
    if section.steps and section.weight is not None:
        text = "give either weight, a share by hand, or steps, which change it"
        yield Contradiction((*path, "weight"), text, ((*path, "steps"),))
    if not section.steps and section.weight is None:
        yield Contradiction(path, "the rollout has neither a weight nor steps", ((*path, "weight"), (*path, "steps")))
    if not section.steps:
        for key in _OF_STEPS:
            if key in section.model_fields_set:
                yield Contradiction((*path, key), f"{key} needs steps, which are not given", ((*path, "steps"),))


def _gate_mistakes(section: Rollout, path: KeyPath) -> Iterator[Contradiction]:
    for name, gate in section.gates.items():
        where = (*path, "gates", name)
        kinds = [kind for kind in _KINDS if getattr(gate, kind) is not None]
        if len(kinds) > 1 or not (kinds or gate.alpha is not None):
            found = " and ".join(kinds) or "none of them"
            text = f"wanted one of {', '.join(_KINDS)}, or alpha alone for the spread of keys; got {found}"
            yield Contradiction(where, text)
            continue
        kind = kinds[0] if kinds else "alpha"
        given = {key for takes in _TAKES.values() for key in takes if getattr(gate, key) is not None}
        given |= {"alpha"} if gate.alpha is not None and kind != "alpha" else set()
        for key in sorted(given - _TAKES[kind]):
            yield Contradiction((*where, key.rstrip("_")), f"{key.rstrip('_')} means nothing in a gate on {kind}")
        wanted = _WANTS[kind]
        if wanted and len(given & set(wanted)) != 1:
            yield Contradiction(where, f"a gate on {kind} wants exactly one of {', '.join(wanted)}")
        if gate.feedback in EVENTS:
            yield Contradiction((*where, "feedback"), f"{gate.feedback} names an event: give the outcome another name")
        if gate.better is not None and gate.worse_by is None:
            yield Contradiction((*where, "better"), "better needs worse_by, which is not given")


def _own_versions(config: Config, name: str, section: Rollout, path: KeyPath) -> Iterator[Contradiction]:
    model = real_model(config, name)
    candidate = parse_reference(section.candidate, model)
    where = (*path, "candidate")
    if candidate is not None and candidate.model != model:
        text = f"a rollout with steps ends with its candidate as stable, so it must be a version of '{model}'"
        yield Contradiction(where, text)
    if candidate is not None and candidate.version == CHAMPION:
        yield Contradiction(where, f"{CHAMPION} is what answers already; name the one that challenges it")


def _machine_mistakes(config: Config, name: str, section: Rollout, path: KeyPath) -> Iterator[Contradiction]:
    try:
        check(_base(config, name, section))
    except BadRollout as error:
        for problem in error.problems:
            yield Contradiction(_place(problem, path), problem.message, tuple(_rests_on(problem, path)))


def _place(problem: Mistake, path: KeyPath) -> KeyPath:
    first, *rest = problem.where
    known = _PLACES.get(str(first))
    if known is not None:
        return known if known[0] == "defaults" else (*path, *known)
    return (*path, first, *(key for key in rest if key != "source"))


def _rests_on(problem: Mistake, path: KeyPath) -> Iterator[KeyPath]:
    if problem.where[0] in {"steps", "shadow"}:
        yield (*path, "gates")
    if problem.where[0] == "steps":
        yield (*path, "inconclusive")
