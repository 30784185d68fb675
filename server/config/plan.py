"""What a reload would do: pure, from two valid configurations, before anything is loaded.

Aliases are names here: where they point is the registry's business, and moving them is no change of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from router.compiled import CompiledRoutes
from router.movement import Movement, plan_movement
from router.types import ExperimentSplit, RolloutSplit
from server.config.compile import (
    CompiledModel,
    Overlay,
    VersionedModel,
    compile_gates,
    compile_models,
    compile_versions,
)
from server.config.model import Config
from server.config.monitoring import compile_monitoring
from server.config.routing import ROUTING_KEYS, Reference, RoutingSpec, compile_entry
from server.runtime.base import ModelOptions

_ORIGIN_KEYS: Final = ("source", "versions", "model")
#: Sections that are read when a process starts.
_AT_START: Final = ("server", "telemetry", "state", "registry", "alerts", "capture")

_Pair: TypeAlias = tuple[RoutingSpec, RoutingSpec]
_Options: TypeAlias = tuple[ModelOptions, Overlay, tuple[Path, ...]]


@dataclass(slots=True, frozen=True)
class Change:
    """What is different about a model that stays.

    Some of ``source``, ``options``, ``monitor``, ``routing``, ``gate`` and ``retrain``.
    """

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
    looked for. A version whose source or options change is in both. ``recounts``: models that are watched otherwise;
    their versions with a profile are loaded again, and their drift is counted from nothing. ``at_start``: sections that
    differ and take effect only when the server starts anew.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[Change, ...] = ()
    loads: tuple[str, ...] = ()
    unloads: tuple[str, ...] = ()
    recounts: tuple[str, ...] = ()
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
        yield from (f"count drift of {name} anew: its watched versions are loaded again" for name in self.recounts)
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
            "recounts": list(self.recounts),
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


def plan_reload(old: Config | None, new: Config, *, repository: Path | None = None) -> ReloadPlan:
    """What happens when ``new`` takes the place of ``old`` (None: nothing was served). Both are valid files.

    ``repository``: the model repository, when a flag names it.
    """
    if old is None:
        return ReloadPlan(added=tuple(new.models), loads=tuple(_made_of(new, repository)))
    shared = [name for name in new.models if name in old.models]
    pairs = {name: _pair(old, new, name, repository) for name in shared}
    changes = tuple(_changes(old, new, pairs, repository))
    movements = {name: plan_movement(*map(_compiled, pair)) for name, pair in pairs.items()}
    before, after = _made_of(old, repository), _made_of(new, repository)
    return ReloadPlan(
        tuple(name for name in new.models if name not in old.models),
        tuple(name for name in old.models if name not in new.models),
        tuple(change for change in changes if change.parts),
        tuple(name for name, made_of in after.items() if before.get(name) != made_of),
        tuple(name for name, made_of in before.items() if after.get(name) != made_of),
        tuple(change.model for change in changes if "monitor" in change.parts),
        {name: movement for name, movement in movements.items() if movement.moves},
        tuple(Refusal(name, why) for name, pair in pairs.items() for why in _refusals(*pair, movements[name])),
        tuple(section for section in _AT_START if getattr(old, section) != getattr(new, section)),
    )


def _pair(old: Config, new: Config, name: str, repository: Path | None) -> _Pair:
    first, second = (compile_entry(config, name, repository_given=repository is not None) for config in (old, new))
    return first, second


def _compiled(spec: RoutingSpec) -> CompiledRoutes[Reference]:
    return CompiledRoutes(spec.name, spec.routes)


def _changes(old: Config, new: Config, pairs: Mapping[str, _Pair], repository: Path | None) -> Iterator[Change]:
    before, after = _options(old, repository), _options(new, repository)
    watched, watching = compile_monitoring(old), compile_monitoring(new)
    asked, asking = compile_gates(old), compile_gates(new)
    for name, (was, becomes) in pairs.items():
        one, other = old.models[name], new.models[name]
        parts = {
            "source": any(getattr(one, key) != getattr(other, key) for key in _ORIGIN_KEYS),
            "options": before.get(name) != after.get(name),
            "monitor": watched.of(name) != watching.of(name),
            # Another version may become stable although nobody says so: the highest of those named, for one.
            "routing": was.stable != becomes.stable
            or any(getattr(one, key) != getattr(other, key) for key in ROUTING_KEYS),
            "gate": asked.get(name) != asking.get(name),
            "retrain": one.retrain != other.retrain,
        }
        yield Change(name, tuple(part for part, differs in parts.items() if differs))


def _on_disk_and_by_version(
    config: Config, repository: Path | None
) -> tuple[dict[str, CompiledModel], dict[str, VersionedModel]]:
    return compile_models(config, repository=repository), compile_versions(config, repository=repository)


def _options(config: Config, repository: Path | None) -> dict[str, _Options]:
    """What every model of its own is run and tried with; config.pbtxt goes between its defaults and its section."""
    on_disk, by_version = _on_disk_and_by_version(config, repository)
    return {name: (model.defaults, model.overlay, model.golden) for name, model in (on_disk | by_version).items()}


def _made_of(config: Config, repository: Path | None) -> dict[str, tuple[object, _Options]]:
    """Everything that the file has loaded, with where it lies and what it is run with."""
    on_disk, by_version = _on_disk_and_by_version(config, repository)
    made: dict[str, tuple[object, _Options]] = {}
    for name, found in on_disk.items():
        made[name] = (found.source, (found.defaults, found.overlay, found.golden))
    for name, model in by_version.items():
        options = (model.defaults, model.overlay, model.golden)
        if model.entry:
            made[name] = (model.entry, options)
        made |= {f"{name}:{number}": (source, options) for number, source in model.versions.items()}
    return made


# --- refusals ---------------------------------------------------------------------------------------------------------


def _refusals(old: RoutingSpec, new: RoutingSpec, movement: Movement) -> Iterator[str]:
    before, after = old.routes.split, new.routes.split
    if before is not None and after is not None and before.id == after.id:
        if _arms(before) != _arms(after):
            yield f"the arms of '{after.id}' cannot change while it lives: give the new ones a new id"
            return
        if isinstance(before, ExperimentSplit) and isinstance(after, ExperimentSplit):
            yield from _coverage(before, after)
    if movement.reshuffles and not new.reshuffle:
        moved = "; ".join(map(str, movement.reshuffled))
        yield f"keys would leave an arm that goes on ({moved}): say reshuffle: true if that is meant"


def _coverage(before: ExperimentSplit[Any], after: ExperimentSplit[Any]) -> Iterator[str]:
    if after.coverage < before.coverage:
        was, now = before.coverage / 100, after.coverage / 100
        yield f"the coverage of '{after.id}' may only grow, but would go from {was:g}% to {now:g}%"


def _arms(split: RolloutSplit[Any] | ExperimentSplit[Any]) -> object:
    """What may not change under one id: kind, names, order and ends of arms, and in an experiment their shares."""
    if isinstance(split, RolloutSplit):
        return "rollout", [(arm.name, arm.to) for arm in split.arms]
    return "experiment", [(arm.name, arm.to, arm.weight) for arm in split.arms]
