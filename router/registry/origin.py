"""What a registry of somebody else's is to ours: asked for its intent, for what a version consists of, and for bytes.

An origin keeps no promise about its bytes: what it hands out under a version today may be other bytes tomorrow. Whoever
takes a version from one pins it (``router.registry.pinned``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from router.registry.base import Damaged, RegistryError
from router.registry.manifest import OTHER, Description


class Unreachable(RegistryError):
    """The origin gave no answer that says anything. It may do so later."""

    code = "registry_unreachable"


class Unusable(RegistryError):
    """The origin answered, and what it has cannot be served: no ONNX model, too large, an answer without sense."""

    code = "registry_unusable"


class BytesChanged(Damaged):
    """The origin hands out other bytes under a version than when that was first taken."""

    code = "registry_bytes_changed"


@dataclass(slots=True, frozen=True)
class Intent:
    """What the origin wants of one model: where its aliases point. ``latest``: its newest version, 0 for none."""

    aliases: Mapping[str, int] = field(default_factory=dict)
    latest: int = 0


@dataclass(slots=True, frozen=True)
class OfferedFile:
    """One file of a version: its path there, where the origin keeps it, its size as the origin says (None: unsaid)."""

    path: str
    location: str
    size: int | None = None
    role: str = OTHER


@dataclass(slots=True, frozen=True)
class Offer:
    """What the origin would hand out for a version now. ``identity``: a digest of what it says of the model's files.

    A tensor of the signature may be named "": it is the only one of the graph on its side.
    """

    files: tuple[OfferedFile, ...]
    description: Description = field(default_factory=Description)
    identity: str = ""
    created: str = ""


class Origin(Protocol):
    """Blocking; callable from any thread. Every method raises Unreachable, and Unusable for answers without sense."""

    @property
    def name(self) -> str:
        """Which registry this is. Pins are kept under it."""
        ...

    def intents(self) -> Mapping[str, Intent]:
        """Every model, in one look."""
        ...

    def versions(self, model: str) -> tuple[int, ...]:
        """The numbers of a model's versions, ascending. Raises NotInRegistry."""
        ...

    def triggered(self, model: str) -> Mapping[str, int]:
        """trigger_id -> the highest version that names it, of the newest versions. Raises NotInRegistry."""
        ...

    def offer(self, model: str, version: int) -> Offer:
        """What a version consists of now. Raises NotInRegistry or Unusable."""
        ...

    def read(self, file: OfferedFile, target: int, limit: int) -> None:
        """Write a file's bytes, at most ``limit``, to the open and empty file ``target``. Raises Unusable when more."""
        ...
