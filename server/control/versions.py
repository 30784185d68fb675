"""What the control knows of one version: its state, why it is in it, and what is loaded of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.control.loading import Admitted
from server.control.retiring import LoadedVersion
from server.control.sources import VersionPlan
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


def loaded_version(wanted: VersionPlan, admitted: Admitted, served: Served) -> LoadedVersion:
    """What was loaded of a plan."""
    return LoadedVersion(served, admitted.engine, wanted.fingerprint, admitted.file)


def serving(version: LoadedVersion) -> KnownVersion:
    """A version that is ready."""
    return KnownVersion(version.number, READY, tried=version.fingerprint, loaded=version)


def is_unchanged(version: KnownVersion) -> bool:
    """Whether it could be loaded again as it is. Blocks."""
    return version.loaded is None or version.loaded.file is None or version.loaded.file.still()


def by_number(versions: Mapping[str, KnownVersion]) -> list[tuple[str, KnownVersion]]:
    """Versions, lowest number first."""
    return sorted(versions.items(), key=lambda item: int(item[0]))
