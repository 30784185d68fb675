"""Where the models of one process come from: the state folder and its registry, or MLflow, a directory, the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from server.audit import AuditEvent, DeferredAudit
from server.config.compile import CompiledModel, VersionedModel, compile_defaults, compile_models, compile_versions
from server.config.model import Config
from server.config.monitoring import Monitoring, compile_monitoring
from server.config.settings import ServerSettings
from server.control.monitored import MonitoredSource
from server.control.registry import RegistryPlans, RegistrySource, VersionedSource
from server.control.sources import Audit, DirectorySource, JoinedSource, ModelSource, NamedModel, NamedSource
from server.errors import ConfigError
from server.mlflow.build import MlflowPart, open_mlflow
from server.runtime.base import ModelOptions
from server.runtime.ends import graph_ends
from server.state import State, open_state
from server.store.base import StoreError

log = structlog.get_logger("tidegate")


@dataclass(slots=True, frozen=True)
class Models:
    """The models of the configuration file, and what every other model starts from."""

    named: Mapping[str, CompiledModel] = field(default_factory=dict)
    versioned: Mapping[str, VersionedModel] = field(default_factory=dict)
    defaults: ModelOptions = field(default_factory=ModelOptions)
    monitoring: Monitoring = field(default_factory=Monitoring)


def models_of(config: Config | None, repository: Path | None) -> Models:
    """What a configuration says of models, compiled."""
    if config is None:
        return Models()
    return Models(
        compile_models(config, repository=repository),
        compile_versions(config, repository=repository),
        compile_defaults(config),
        compile_monitoring(config),
    )


def uses_registry(settings: ServerSettings, models: Models) -> bool:
    """The embedded registry is served when the settings say so, or when they name nothing else; MLflow's always."""
    return (
        settings.embedded_registry
        or settings.mlflow is not None
        or (settings.model_repository is None and not models.named and not models.versioned)
    )


def take_state(settings: ServerSettings, models: Models) -> tuple[State | None, DeferredAudit | None, Audit]:
    """The state folder and its audit. A folder that cannot be written is refused only when the registry is served."""
    try:
        state = open_state(settings.state_dir)
    except StoreError as error:
        if uses_registry(settings, models):
            raise ConfigError(f"the registry in {settings.state_dir} cannot be served: {error.message}") from error
        log.warning("no_state", error=error.message, consequence="nothing is audited")
        return None, None, lambda *_: None
    state.registry.sweep()
    deferred = state.deferred()

    def audit(action: str, subject: str, detail: Mapping[str, object]) -> None:
        deferred.record(AuditEvent("tidegate", action, subject, detail))

    return state, deferred, audit


def take_mlflow(settings: ServerSettings, state: State | None) -> MlflowPart | None:
    """The registry of an MLflow server; nothing is asked yet."""
    if settings.mlflow is None or state is None:
        return None
    return open_mlflow(settings.mlflow, settings.state_dir, state.store, state.audit.journal, graph_ends)


def source_of(
    settings: ServerSettings, models: Models, state: State | None, audit: Audit, mlflow: MlflowPart | None
) -> ModelSource:
    """Models of the file, then of the directory, then of the registry; the first to have a name keeps it."""
    named = tuple(NamedModel(m.name, m.source, m.defaults, m.overlay.over, m.golden) for m in models.named.values())
    plans = None if state is None else _plans(settings, state, audit, mlflow)
    sources: list[ModelSource] = [
        NamedSource(named, settings.state_dir),
        VersionedSource(tuple(models.versioned.values()), plans, settings.state_dir),
    ]
    if settings.model_repository is not None:
        if not settings.model_repository.exists():
            raise ConfigError(f"model repository {settings.model_repository} does not exist")
        sources.append(DirectorySource(settings.model_repository, settings.state_dir, models.defaults))
    if state is not None and plans is not None and uses_registry(settings, models):
        if not settings.embedded_registry and mlflow is None and not state.registry.models():
            raise ConfigError(
                "nothing to serve: give a model file, --model-repository or a configuration with models, "
                f"or publish to the registry in {settings.state_dir} (tidegate registry publish)"
            )
        sources.append(RegistrySource(plans, models.defaults))
    return MonitoredSource(JoinedSource(*sources), models.monitoring)


def _plans(settings: ServerSettings, state: State, audit: Audit, mlflow: MlflowPart | None) -> RegistryPlans:
    if mlflow is None:
        return RegistryPlans(state.registry, settings.state_dir, audit)
    return RegistryPlans(mlflow.registry, settings.state_dir, audit, mlflow.registry.refused)
