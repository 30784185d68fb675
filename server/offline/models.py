"""Which model a command means: ``fraud``, ``fraud@challenger`` or ``fraud:7`` of the registry, or an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from router.registry.base import CHAMPION, Version
from router.registry.references import split_reference
from server.config.compile import compile_defaults, compile_versions
from server.config.load import load_config
from server.control.registry import Over, RegistryPlans
from server.errors import ConfigError, InvalidArgument
from server.offline.registries import opened
from server.runtime.base import LoadRequest, ModelOptions


@dataclass(slots=True, frozen=True)
class Found:
    """A version and how it is loaded. ``entry`` None: a file that is in no registry."""

    name: str
    version: str
    request: LoadRequest
    entry: Version | None = None


def find_model(reference: str, state_dir: Path | None, config: Path | None = None) -> Found:
    """The version that is meant; a model alone means its champion. Its files are fetched and checked.

    ``config``: a server's configuration file, whose registry is read and whose options for the model hold here too:
    threads, providers, buckets. ``state_dir`` as for ``opened``. Raises InvalidArgument or TidegateError.
    """
    if reference.endswith(".onnx"):
        return _file(Path(reference), config)
    model, which = split_reference(reference)
    base, over = _options(model, config)
    with opened(state_dir, config) as found:
        version = found.registry.resolve(model, which or f"@{CHAMPION}")
        plans = RegistryPlans(found.registry, found.state_dir, _unheard)
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
    file = load_config(config)
    found = compile_versions(file)
    if model not in found and file.registry.mlflow is not None and model not in file.models:
        return compile_defaults(file), lambda options: options  # served as MLflow has it, without a section
    if model not in found:
        raise ConfigError(f"{config.name} has no model '{model}' that the registry serves")
    return found[model].defaults, found[model].overlay.over


def _unheard(action: str, subject: str, detail: object) -> None:
    """A file of the cache that was mended is worth an audit row of a server, not of a reading command."""
