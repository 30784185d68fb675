"""What a reload would do: pure, from two valid configurations, before anything is loaded.

Aliases are names here: where they point is the registry's business, and moving them is no change of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from router.compiled import CompiledRoutes
from router.movement import Movement, plan_movement
from router.types import ExperimentSplit, RolloutSplit
from server.config.compile import compile_models, compile_versions
from server.config.model import Config
from server.config.routing import ROUTING_KEYS, Reference, RoutingSpec, compile_entry

_ORIGIN_KEYS: Final = ("source", "versions", "model")
_OPTION_KEYS: Final = ("runtime", "batching", "version_policy", "warmup")
#: Sections that are read when a process starts.
_AT_START: Final = ("server", "telemetry", "state", "registry")


@dataclass(slots=True, frozen=True)
class Change:
    """What is different about a model that stays: some of ``source``, ``options`` and ``routing``."""

    model: str
    parts: tuple[str, ...]


@dataclass(slots=True, frozen=True)
class Refusal:
    """Why a reload may not happen, and of which model the reason speaks."""

    model: str
    reason: str

    def __str__(self) -> str:
        return f"{self.model}: {self.reason}"


@dataclass(slots=True, frozen=True)
class ReloadPlan:
    """Models that come, go and change; what is loaded and unloaded; keys that move; and what forbids it.

    ``loads`` and ``unloads`` name versions ("fraud:8"), or models ("fraud") whose versions are found when they are
    looked for. A version whose source or options change is in both. ``at_start``: sections that differ and take
    effect only when the server starts anew.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[Change, ...] = ()
    loads: tuple[str, ...] = ()
    unloads: tuple[str, ...] = ()
    movements: Mapping[str, Movement] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    at_start: tuple[str, ...] = ()

    @property
    def allowed(self) -> bool:
        return not self.refusals

    @property
    def empty(self) -> bool:
        """Whether the reload changes nothing at all."""
        return not (self.added or self.removed or self.changed or self.at_start)

    def lines(self) -> Iterator[str]:
        """The plan for people."""
        if self.empty:
            yield "nothing changes"
        yield from (f"add model {name}" for name in self.added)
        yield from (f"remove model {name}" for name in self.removed)
        yield from (f"change model {change.model}: {', '.join(change.parts)}" for change in self.changed)
        yield from (f"load {name}" for name in self.loads)
        yield from (f"unload {name}" for name in self.unloads)
        for name, movement in self.movements.items():
            yield f"{name}: {float(movement.share):.2%} of keys move"
            yield from (f"  {move}" for move in movement.moves)
        yield from (f"after a restart: {section}" for section in self.at_start)
        yield from (f"refused: {refusal}" for refusal in self.refusals)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values; shares of keys are fractions of 1."""
        return {
            "allowed": self.allowed,
            "added": list(self.added),
            "removed": list(self.removed),
            "changed": {change.model: list(change.parts) for change in self.changed},
            "loads": list(self.loads),
            "unloads": list(self.unloads),
            "movements": {name: _movement(movement) for name, movement in self.movements.items()},
            "refusals": [{"model": refusal.model, "reason": refusal.reason} for refusal in self.refusals],
            "at_start": list(self.at_start),
        }


def _movement(movement: Movement) -> dict[str, Any]:
    moves = [
        {
            "from": move.old._asdict(),
            "to": move.new._asdict(),
            "share": float(move.share),
            "reshuffle": move in movement.reshuffled,
        }
        for move in movement.moves
    ]
    return {"share": float(movement.share), "moves": moves}


def plan_reload(old: Config | None, new: Config, *, repository_given: bool = False) -> ReloadPlan:
    """What happens when ``new`` takes the place of ``old`` (None: nothing was served). Both are valid files.

    ``repository_given``: a flag names the model repository.
    """
    before = {} if old is None else old.models
    shared = [name for name in new.models if name in before]
    came, went = ({} if old is None else _loaded(old)), _loaded(new)
    if old is None:
        return ReloadPlan(added=tuple(new.models), loads=tuple(went))
    pairs = {name: _pair(old, new, name, repository_given) for name in shared}
    movements = {name: plan_movement(*map(_compiled, pair)) for name, pair in pairs.items()}
    return ReloadPlan(
        tuple(name for name in new.models if name not in before),
        tuple(name for name in before if name not in new.models),
        tuple(change for name in shared if (change := _change(old, new, name, pairs[name])).parts),
        tuple(name for name, made_of in went.items() if came.get(name) != made_of),
        tuple(name for name, made_of in came.items() if went.get(name) != made_of),
        {name: movement for name, movement in movements.items() if movement.moves},
        tuple(Refusal(name, why) for name, pair in pairs.items() for why in _refusals(*pair, movements[name])),
        tuple(section for section in _AT_START if getattr(old, section) != getattr(new, section)),
    )


_Pair = tuple[RoutingSpec, RoutingSpec]


def _pair(old: Config, new: Config, name: str, repository_given: bool) -> _Pair:
    first = compile_entry(old, name, repository_given=repository_given)
    return first, compile_entry(new, name, repository_given=repository_given)


def _compiled(spec: RoutingSpec) -> CompiledRoutes[Reference]:
    return CompiledRoutes(spec.name, spec.routes)


def _change(old: Config, new: Config, name: str, pair: _Pair) -> Change:
    """Options are compared with the defaults that they go on top of; routing without what only permits a reload."""
    one, other = old.models[name], new.models[name]
    parts = {
        "source": any(getattr(one, key) != getattr(other, key) for key in _ORIGIN_KEYS),
        "options": any(_option(old, name, key) != _option(new, name, key) for key in _OPTION_KEYS),
        "routing": any(getattr(one, key) != getattr(other, key) for key in ROUTING_KEYS) or _moved(pair),
    }
    return Change(name, tuple(part for part, differs in parts.items() if differs))


def _moved(pair: _Pair) -> bool:
    """Whether another version is stable, though nobody said so in the entry itself."""
    return pair[0].stable != pair[1].stable


def _option(config: Config, name: str, key: str) -> object:
    given = getattr(config.models[name], key)
    return given if key == "warmup" else (getattr(config.defaults, key), given, _given(config, name, key))


def _given(config: Config, name: str, key: str) -> object:
    """Which keys the entry sets: one set to its default stands over ``defaults`` nevertheless."""
    entry = config.models[name]
    return key in entry.model_fields_set and entry.model_dump(include={key}, exclude_unset=True)


def _loaded(config: Config) -> dict[str, object]:
    """Versions and models that the file has loaded, with everything that they are made of."""
    single = {} if config is None else _single(config)
    return single | {
        f"{model.name}:{number}": (source, model.options)
        for model in compile_versions(config, repository=config.registry.directory).values()
        for number, source in model.versions.items()
    }


def _single(config: Config) -> dict[str, object]:
    return {}


# --- refusals ---------------------------------------------------------------------------------------------------------


def _refusals(old: RoutingSpec, new: RoutingSpec, movement: Movement) -> Iterator[str]:
    before, after = old.routes.split, new.routes.split
    same_id = before is not None and after is not None and before.id == after.id
    if same_id and _arms(before) != _arms(after):
        yield f"the arms of '{after.id}' cannot change while it lives: give the new ones a new id"
        return
    if same_id and isinstance(before, ExperimentSplit) and isinstance(after, ExperimentSplit):
        yield from _coverage(before, after)
    if movement.reshuffles and not new.reshuffle:
        moved = "; ".join(map(str, movement.reshuffled))
        yield f"keys would leave an arm that goes on ({moved}): say reshuffle: true if that is meant"


def _coverage(before: ExperimentSplit[Any], after: ExperimentSplit[Any]) -> Iterator[str]:
    if after.coverage < before.coverage:
        was, now = before.coverage / 100, after.coverage / 100
        yield f"the coverage of '{after.id}' may only grow, but would go from {was:g}% to {now:g}%"


def _arms(split: RolloutSplit[Any] | ExperimentSplit[Any] | None) -> object:
    """What may not change under one id: kind, names, order and ends of arms, and in an experiment their shares."""
    if split is None:
        return None
    if isinstance(split, RolloutSplit):
        return "rollout", [(arm.name, arm.to) for arm in split.arms]
    return "experiment", [(arm.name, arm.to, arm.weight) for arm in split.arms]
