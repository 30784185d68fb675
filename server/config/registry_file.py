"""Which registry a configuration is served from, for commands that read a registry without a server.

The whole file is compiled, secrets and all, only when it follows an MLflow server; of another one nothing is looked at
but where its state is, so that a pipeline needs none of its secrets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from server.config.compile import compile_settings
from server.config.load import MAX_BYTES, load_config
from server.config.tree import Node, YamlSyntaxError, read_tree
from server.errors import ConfigError
from server.mlflow.options import MlflowOptions


@dataclass(slots=True, frozen=True)
class RegistryFile:
    """``mlflow`` None: the registry in the state folder. ``state_dir`` None: the file does not say where that is."""

    mlflow: MlflowOptions | None = None
    state_dir: Path | None = None


def registry_of(path: Path) -> RegistryFile:
    """What a configuration says of its registry. Raises ConfigError, or InvalidConfig with every mistake."""
    root = _tree(path)
    if _at(root, "registry", "mlflow") is not None:
        config = load_config(path)
        return RegistryFile(compile_settings(config).mlflow, config.state.dir)
    place = _at(root, "state", "dir")
    return RegistryFile(None, None if place is None else path.parent / str(place.value))


def _tree(path: Path) -> Node:
    try:
        with path.open("rb") as file:
            root, _ = read_tree(file.read(MAX_BYTES).decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except YamlSyntaxError as error:
        raise ConfigError(f"{path}: {error.complaint.message}") from error
    return root


def _at(root: Node, section: str, key: str) -> Node | None:
    chain = root.chain((section, key))
    return chain[2] if len(chain) == 3 and chain[2].value is not None else None
