"""Which model a command means: ``fraud``, ``fraud@challenger`` or ``fraud:7`` of the registry, or an ONNX file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from router.registry.base import CHAMPION, RegistryError, Version
from router.registry.manifest import ManifestError
from router.registry.references import split_reference
from server.config.compile import compile_defaults, compile_versions
from server.config.load import load_config
from server.control.registry import Over, RegistryPlans
from server.errors import ConfigError, InvalidArgument, TidegateError
from server.runtime.base import LoadRequest, ModelOptions
from server.state import State, open_state


@dataclass(slots=True, frozen=True)
class Found:
    """A version and how it is loaded. ``entry`` None: a file that is in no registry."""

    name: str
    version: str
    request: LoadRequest
    entry: Version | None = None


@contextmanager
def state_of(folder: Path) -> Iterator[State]:
    """An existing state folder; what the registry refuses becomes one error."""
    if not folder.is_dir():
        raise InvalidArgument(f"there is no state folder {folder}: name it with --state-dir")
    state = open_state(folder)
    try:
        yield state
    except (RegistryError, ManifestError) as error:
        raise TidegateError(str(error)) from error
    finally:
        state.close()


def find_model(reference: str, state_dir: Path, config: Path | None = None) -> Found:
    """The version that is meant; a model alone means its champion. Its files are fetched and checked.

    ``config``: a server's configuration file, whose options for the model hold here too: threads, providers, buckets.
    Raises InvalidArgument or TidegateError.
    """
    if reference.endswith(".onnx"):
        return _file(Path(reference), config)
    model, which = split_reference(reference)
    base, over = _options(model, config)
    with state_of(state_dir) as state:
        version = state.registry.resolve(model, which or f"@{CHAMPION}")
        plans = RegistryPlans(state.registry, state_dir, _unheard)
        number = str(version.version)
        plan = plans.version(number, model, version.version, base, over)
        return Found(model, number, plans.request(model)(plan), version)


def _file(path: Path, config: Path | None) -> Found:
    if not path.is_file():
        raise InvalidArgument(f"there is no model file {path}")
    defaults = ModelOptions() if config is None else compile_defaults(load_config(config))
    return Found(path.stem, "1", LoadRequest(path.stem, "1", path, defaults))


def _options(model: str, config: Path | None) -> tuple[ModelOptions, Over]:
    if config is None:
        return ModelOptions(), lambda options: options
    found = compile_versions(load_config(config))
    if model not in found:
        raise ConfigError(f"{config.name} has no model '{model}' that the registry serves")
    return found[model].defaults, found[model].overlay.over


def _unheard(action: str, subject: str, detail: object) -> None:
    """A file of the cache that was mended is worth an audit row of a server, not of a reading command."""
