"""What the control knows of versions: their states, why they are in them, what is loaded; the index tells of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from server.control.loading import Admitted
from server.control.retiring import LoadedVersion, Retired
from server.control.sources import ModelPlan, ModelSource, VersionPlan
from server.gateway import Served

UNAVAILABLE, LOADING, READY = "UNAVAILABLE", "LOADING", "READY"


@dataclass(slots=True, frozen=True)
class IndexEntry:
    """One row of the repository index."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(slots=True, eq=False)
class KnownVersion:
    """One version of one model as the control knows it. ``tried`` is the fingerprint of the last load, good or bad.

    ``unreached``: it lies on another server, and the last load failed.
    """

    number: str
    state: str
    reason: str = ""
    tried: object = None
    loaded: LoadedVersion | None = None
    unreached: bool = False

    @property
    def served(self) -> Served | None:
        return None if self.loaded is None else self.loaded.served


@dataclass(slots=True)
class Prepared:
    """A configuration to be: its source and plans, and the versions that were loaded, or found warm, for it."""

    source: ModelSource
    plans: dict[str, ModelPlan]
    fresh: dict[str, dict[str, KnownVersion]] = field(default_factory=dict)
    taken_back: list[Retired] = field(default_factory=list)


def loaded_version(wanted: VersionPlan, admitted: Admitted, served: Served) -> LoadedVersion:
    """What was loaded of a plan."""
    return LoadedVersion(served, admitted.engine, wanted.fingerprint, admitted.file)


def serving(version: LoadedVersion) -> KnownVersion:
    """A version that is ready."""
    return KnownVersion(version.number, READY, tried=version.fingerprint, loaded=version)


def is_unchanged(version: KnownVersion) -> bool:
    """Whether it could be loaded again as it is. Blocks."""
    return version.loaded is None or version.loaded.file is None or version.loaded.file.still()


def is_lacking(plan: ModelPlan, known: Mapping[str, KnownVersion]) -> bool:
    """Whether a version that is wanted cannot serve, or the one that is to answer is refused and does not."""
    wanted = {version.version for version in plan.versions} | ({plan.stable or ""} & plan.refused.keys())
    return any(number not in known or known[number].served is None for number in wanted)


def stable_version(plan: ModelPlan | None, current: str, ready: Collection[str]) -> str:
    """The version that the plan names, and while that is not ready the ``current`` one if that is; "": none.

    A plan that makes no sense names none: the ``current`` one stays.
    """
    if plan is not None and plan.error and current in ready:
        return current
    if plan is None or plan.stable is None:
        return max(ready, key=int, default="")
    if plan.stable in ready:
        return plan.stable
    return current if plan.stable and current in ready else ""


def index_rows(plans: Mapping[str, ModelPlan], known: Mapping[str, Mapping[str, KnownVersion]]) -> list[IndexEntry]:
    """Every version of the models of ``plans``, by name and number; a model with no version has one row."""
    rows: list[IndexEntry] = []
    for name in sorted(plans):
        versions = known.get(name, {})
        # What serves although the source makes no sense any more says so.
        error = plans[name].error
        rows += [IndexEntry(name, number, v.state, v.reason or error) for number, v in _by_number(versions)]
        if not versions:
            rows.append(IndexEntry(name, "", UNAVAILABLE, error or "not loaded"))
    return rows


def warm_rows(warm: Iterable[tuple[LoadedVersion, datetime]]) -> list[IndexEntry]:
    """Versions that are loaded and not served, with the time up to which they stay so."""
    rows = []
    for version, until in warm:
        why = f"replaced, kept warm until {until.isoformat(timespec='seconds')}"
        rows.append(IndexEntry(version.model, version.number, UNAVAILABLE, why))
    return rows


def _by_number(versions: Mapping[str, KnownVersion]) -> list[tuple[str, KnownVersion]]:
    """Versions, lowest number first."""
    return sorted(versions.items(), key=lambda item: int(item[0]))
