"""What transports see of the server besides ``server.types.Port``: models, their control, and protocol settings.

Everything synchronous here is called on the event loop and answers from memory. Errors are ``server.errors`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from server.transport.feedback import Hear
from server.types import ModelSpec, ParameterValue

if TYPE_CHECKING:
    from server._pb.model_config_pb2 import ModelConfig

#: ``subscribe(callback)`` calls ``callback`` (from any thread) after each change of readiness; returns the way out.
Subscribe: TypeAlias = Callable[[Callable[[], object]], Callable[[], None]]


@dataclass(slots=True, frozen=True)
class IndexEntry:
    """One version in the repository index; ``state`` is READY, LOADING, UNLOADING or UNAVAILABLE."""

    name: str
    version: str
    state: str
    reason: str = ""


class Catalog(Protocol):
    """Read side. ``version`` "" means the version that answers requests which name none."""

    def server_name(self) -> str: ...

    def server_version(self) -> str: ...

    def extensions(self) -> tuple[str, ...]: ...

    def live(self) -> bool: ...

    def ready(self) -> bool: ...

    def model_ready(self, model: str, version: str) -> bool:
        """Raises ModelNotFound or VersionNotFound."""
        ...

    def metadata(self, model: str, version: str) -> tuple[ModelSpec, tuple[str, ...]]:
        """The signature and the versions to choose from. Raises ModelNotFound, VersionNotFound, ModelNotReady."""
        ...

    def config(self, model: str, version: str) -> ModelConfig: ...

    def config_json(self, model: str, version: str) -> bytes: ...

    def statistics(self, model: str, version: str) -> list[dict[str, Any]]:
        """Entries in the shape of the statistics extension; "" stands for all models or all versions."""
        ...

    def repository_index(self, ready_only: bool) -> list[IndexEntry]: ...


class ModelControl(Protocol):
    """Explicit load and unload. May take long; raises FailedPrecondition when model control is off."""

    async def load(self, model: str, parameters: Mapping[str, ParameterValue]) -> None:
        """Refuses overrides of configuration or files by a caller: InvalidArgument."""
        ...

    async def unload(self, model: str, unload_dependents: bool) -> None: ...


SettingValue: TypeAlias = bool | int | str | list[str]


class ProtocolSettings(Protocol):
    """The trace and logging settings of the protocol. Updates validate everything before anything changes."""

    def trace(self, model: str) -> dict[str, SettingValue]:
        """Settings in force for ``model``; "" for the global ones."""
        ...

    def update_trace(self, model: str, changes: Mapping[str, object]) -> None:
        """None as a value clears a setting back to the global (for a model) or initial one."""
        ...

    def logging(self) -> dict[str, SettingValue]: ...

    def update_logging(self, changes: Mapping[str, object]) -> None: ...


@dataclass(slots=True, frozen=True)
class Services:
    """What one transport is built from besides the port."""

    catalog: Catalog
    control: ModelControl
    settings: ProtocolSettings
    subscribe: Subscribe
    #: Takes outcomes of answered requests; None: feedback is not offered.
    hear: Hear | None = None
