"""What a registry is: which versions of a model exist, what they are called, and where their files can be had.

The registry owns intent (versions, aliases, files). It knows nothing of servers: it is handed a database to keep its
rows in and a journal that records each change in the transaction of that change.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from router.registry.directory import is_model_name
from router.registry.manifest import FileEntry, Manifest

CHAMPION: Final = "champion"
CHALLENGER: Final = "challenger"
PREVIOUS: Final = "previous"
SHADOW: Final = "shadow"

MAX_VERSION: Final = 2**63 - 1
#: So many versions of a model are looked at for the request for retraining that they answer: the newest.
TRIGGERED: Final = 100
_ALIAS: Final = re.compile(r"[a-z][a-z0-9_-]{0,62}", re.ASCII)
_REFERENCE: Final = re.compile(r"[1-9][0-9]{0,18}", re.ASCII)


class Database(Protocol):
    """Where an embedded registry keeps its rows: write transactions and consistent views."""

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]: ...

    def reading(self) -> AbstractContextManager[sqlite3.Connection]: ...


#: ``journal(connection, action, subject, detail, actor)``: record a change in the transaction that makes it.
Journal: TypeAlias = Callable[[sqlite3.Connection, str, str, Mapping[str, object], str], None]


class RegistryError(Exception):
    """Base of what a registry refuses or cannot do; the text is one sentence for the caller. ``code`` is stable."""

    code = "registry_error"


class InvalidName(RegistryError):
    """A model, alias or version that cannot be one."""

    code = "registry_invalid_name"


class NotInRegistry(RegistryError):
    """No such model, version or alias."""

    code = "registry_not_found"


class PublishRefused(RegistryError):
    """The files or the description of a version cannot be taken. Nothing was published."""

    code = "registry_publish_refused"


class AliasConflict(RegistryError):
    """The alias is not where the caller thought it was: somebody else moved it."""

    code = "registry_alias_conflict"


class VersionRetired(RegistryError):
    """The version was retired: its files may be gone."""

    code = "registry_version_retired"


class Damaged(RegistryError):
    """Rows or files are not what was published."""

    code = "registry_damaged"


class StorageFailed(RegistryError):
    """Files could not be written or read: disk full, read-only, permission."""

    code = "registry_storage_failed"


@dataclass(slots=True, frozen=True)
class Version:
    """One version. ``digest``, ``created`` and ``manifest`` are empty for a backend that keeps no such record."""

    model: str
    version: int
    digest: str = ""
    created: str = ""
    retired: bool = False
    manifest: Manifest | None = None


@dataclass(slots=True, frozen=True)
class Alias:
    """Where an alias points (None: nowhere), after how many moves (0: it was never set)."""

    alias: str
    version: int | None
    generation: int


@dataclass(slots=True, frozen=True)
class Fetched:
    """A version on local disk. ``digest`` pins its bytes: the same digest, the same files.

    ``healed`` names files whose local copy had been changed or lost and was written anew from the registry.
    """

    model: str
    version: int
    digest: str
    folder: Path
    files: tuple[FileEntry, ...]
    healed: tuple[str, ...] = ()


@dataclass(slots=True, frozen=True)
class Changes:
    """The models that changed since a cursor; ``generation`` is the next cursor."""

    generation: int
    models: frozenset[str]


class RegistryBackend(Protocol):
    """Reading side of a registry. Blocking; callable from any thread. Raises RegistryError."""

    def models(self) -> tuple[str, ...]:
        """Names of all models, sorted."""
        ...

    def versions(self, model: str) -> tuple[Version, ...]:
        """All versions of a model by number, ascending, without their manifests."""
        ...

    def version(self, model: str, version: int) -> Version:
        """One version with its manifest, checked against its digest."""
        ...

    def aliases(self, model: str) -> Mapping[str, int]:
        """Alias -> version, of the aliases that point somewhere."""
        ...

    def resolve(self, model: str, reference: str) -> Version:
        """The version meant by ``@champion`` or ``7``."""
        ...

    def fetch(self, model: str, version: int) -> Fetched:
        """The version's files in a local folder, each with the bytes that were published."""
        ...

    def triggered(self, model: str) -> Mapping[str, int]:
        """trigger_id -> the highest version whose lineage names it, of the ``TRIGGERED`` newest versions."""
        ...

    def generation(self) -> int:
        """A number that grows with every change, whoever made it. Cheap: this is what a server polls."""
        ...

    def changes(self, since: int) -> Changes:
        """The models that changed after generation ``since`` (0: all models)."""
        ...

    def close(self) -> None:
        """Let go of resources. Idempotent."""
        ...


def check_model(name: str) -> None:
    """InvalidName unless ``name`` may be a model's."""
    if not is_model_name(name):
        raise InvalidName(
            f"model name {shown(name)} must be letters, digits, '.', '_' or '-', at most 255, with no leading dot"
        )


def check_alias(alias: str) -> None:
    """InvalidName unless ``alias`` may be one."""
    if _ALIAS.fullmatch(alias) is None:
        raise InvalidName(
            f"alias {shown(alias)} must be a lower-case letter, then lower-case letters, digits, '_' or '-', at most 63"
        )


def check_version(version: int) -> None:
    """InvalidName unless ``version`` is a positive integer of at most 63 bits."""
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= MAX_VERSION:
        raise InvalidName(f"version {shown(version)} must be a positive integer of at most 63 bits")


def parse_reference(reference: str) -> tuple[str, int]:
    """``@champion`` -> ("champion", 0); ``7`` -> ("", 7). Raises InvalidName."""
    if reference.startswith("@"):
        check_alias(reference[1:])
        return reference[1:], 0
    if _REFERENCE.fullmatch(reference) is None or int(reference) > MAX_VERSION:
        raise InvalidName(f"{shown(reference)} is neither a version number nor an alias with a leading '@'")
    return "", int(reference)


def shown(value: object) -> str:
    """A value as an error text shows it: quoted, escaped and short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
