"""What the protocols may ask about models, answered from the gateway's table and the control's index."""

from __future__ import annotations

from typing import Any

from server import __version__
from server._pb.model_config_pb2 import ModelConfig
from server.config.model_config import config_to_json, options_to_model_config
from server.control.models import ModelControl
from server.errors import ModelNotReady
from server.gateway import Gateway, Served
from server.lifecycle import Readiness
from server.transport.port import IndexEntry
from server.types import ModelSpec

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "logging",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
    "trace",
)


class ServedCatalog:
    """Implements ``server.transport.port.Catalog`` over what is served now."""

    def __init__(self, *, name: str, gateway: Gateway, control: ModelControl, readiness: Readiness) -> None:
        self._name = name
        self._gateway = gateway
        self._control = control
        self._readiness = readiness

    def server_name(self) -> str:
        return self._name

    def server_version(self) -> str:
        return __version__

    def extensions(self) -> tuple[str, ...]:
        return EXTENSIONS

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return bool(self._readiness)

    def model_ready(self, model: str, version: str) -> bool:
        """Raises ModelNotFound or VersionNotFound for what the repository does not have."""
        try:
            self._gateway.served(model, version)
        except ModelNotReady:
            return False
        return True

    def metadata(self, model: str, version: str) -> tuple[ModelSpec, tuple[str, ...]]:
        """The signature of one version ("": the stable one) and every version that can be asked for."""
        served = self._gateway.served(model, version)
        return served.spec, self._gateway.routes(model).ordered()

    def config(self, model: str, version: str) -> ModelConfig:
        served = self._gateway.served(model, version)
        return options_to_model_config(served.spec, served.options)

    def config_json(self, model: str, version: str) -> bytes:
        return config_to_json(self.config(model, version))

    def statistics(self, model: str, version: str) -> list[dict[str, Any]]:
        """Entries of the statistics extension; "" stands for all models, or all versions of one."""
        return [served.telemetry.stats.as_dict() for served in self._asked(model, version)]

    def _asked(self, model: str, version: str) -> list[Served]:
        if not model:
            routes = self._gateway.table.models
            return [routes[name].versions[number] for name in sorted(routes) for number in routes[name].ordered()]
        if version:
            return [self._gateway.served(model, version)]
        chosen = self._gateway.routes(model)
        return [chosen.versions[number] for number in chosen.ordered()]

    def repository_index(self, ready_only: bool) -> list[IndexEntry]:
        return [IndexEntry(e.name, e.version, e.state, e.reason) for e in self._control.index(ready_only)]
