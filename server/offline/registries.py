"""The registry that a command reads: the one in the state folder, or the one a server of a configuration follows.

What is read of MLflow is what a gateway on this state folder serves: where it has followed the aliases to, and the
bytes that it pinned. A model that no gateway has followed yet is read as MLflow has it; a version that is needed and
was never taken is taken and pinned now, as a gateway would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from router.registry.base import RegistryError
from router.registry.embedded import EmbeddedRegistry
from router.registry.manifest import ManifestError
from router.registry.origin import Unreachable
from router.registry.pinned import PinnedRegistry
from server.config.registry_file import RegistryFile, registry_of
from server.errors import FailedPrecondition, TidegateError
from server.mlflow.build import open_mlflow
from server.mlflow.options import MlflowOptions
from server.runtime.ends import graph_ends
from server.state import State, open_existing, open_state

DEFAULT_STATE_DIR: Final = Path("tidegate-state")

Registry: TypeAlias = EmbeddedRegistry | PinnedRegistry


@dataclass(slots=True, frozen=True)
class Opened:
    """``registry`` is that of ``state``, or MLflow's with its pins there. ``state_dir``: where that is."""

    state: State
    registry: Registry
    state_dir: Path

    def writable(self) -> EmbeddedRegistry:
        """The registry, to change it. Raises FailedPrecondition for MLflow's, which is changed in MLflow."""
        if isinstance(self.registry, PinnedRegistry):
            raise FailedPrecondition(
                f"versions and aliases are those of MLflow at {self.registry.origin.name}: register models, set "
                "aliases and delete versions there (mlflow.register_model, MlflowClient.set_registered_model_alias). "
                "This command changes the registry in the state folder only; leave --config out for that"
            )
        return self.registry


@contextmanager
def opened(
    state_dir: Path | None = None, config: Path | None = None, *, make: bool = False, reads: bool = True
) -> Iterator[Opened]:
    """The registry of a state folder, or of a server's ``config``; what it refuses becomes one error.

    ``state_dir`` None: where ``config`` says, else ``tidegate-state``. ``make``: a state that is not there is made; so
    is one for MLflow's pins, in any case. ``reads`` False: MLflow is not asked anything, as nothing is going to be
    read. Raises NotFound for a folder without a state, ConfigError or TidegateError.
    """
    said = RegistryFile() if config is None else registry_of(config)
    folder = state_dir or said.state_dir or DEFAULT_STATE_DIR
    state = open_state(folder) if make or said.mlflow is not None else open_existing(folder)
    try:
        registry: Registry = state.registry if said.mlflow is None else _mlflow(said.mlflow, state, folder, reads)
        yield Opened(state, registry, folder)
    except (RegistryError, ManifestError) as error:
        raise TidegateError(str(error)) from error
    finally:
        state.close()


def _mlflow(options: MlflowOptions, state: State, folder: Path, reads: bool) -> PinnedRegistry:
    registry = open_mlflow(options, folder, state.store, state.audit.journal, graph_ends).registry
    if reads:
        try:
            registry.ask()
        except Unreachable:
            if not registry.models():  # else what was followed last can be read
                raise
    return registry
