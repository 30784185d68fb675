"""Where the gates get versions from: the embedded registry, or files. Reading the files blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from router.registry.base import NotInRegistry, RegistryBackend, RegistryError, Version
from router.registry.manifest import CONFIG, DATA, MODEL, FileEntry, Manifest
from server.config.pbtxt import read_pbtxt
from server.errors import ModelLoadError, VersionNotFound
from server.gates.holdout import digest_files
from server.gates.keeper import Found
from server.runtime.base import LoadRequest, ModelOptions
from server.types import ModelSpec, TensorSpec


@dataclass(slots=True, frozen=True)
class RegistryVersions:
    """Versions of a registry, loaded as a server does: with their own config.pbtxt on top of ``base``."""

    registry: RegistryBackend
    base: ModelOptions = field(default_factory=ModelOptions)

    def find(self, model: str, reference: str) -> Found:
        try:
            found = self.registry.resolve(model, reference)
            return self._found(found)
        except NotInRegistry as error:
            raise VersionNotFound(str(error)) from error
        except RegistryError as error:
            raise ModelLoadError(str(error)) from error

    def _found(self, found: Version) -> Found:
        fetched = self.registry.fetch(found.model, found.version)
        graph = None if found.manifest is None else found.manifest.file(MODEL)
        if found.manifest is None or graph is None:
            raise ModelLoadError(f"{found.model}:{found.version} has no file of role 'model'")
        number, options = str(found.version), _options(found, found.manifest, fetched.folder, self.base)
        request = LoadRequest(
            found.model,
            number,
            fetched.folder / graph.path,
            options,
            fetched.folder,
            listed=_beside(graph.path, found.manifest),
        )
        return Found(number, found.digest, request, _declared(found))


def _options(found: Version, manifest: Manifest, folder: Path, base: ModelOptions) -> ModelOptions:
    config = manifest.file(CONFIG)
    if config is None:
        return base
    try:
        text = (folder / config.path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{config.path} cannot be read: {error}") from error
    return read_pbtxt(text, model=found.model, base=base).options


def _beside(graph: str, manifest: Manifest) -> Mapping[str, FileEntry]:
    """The files that external data may refer to, by their path from the graph's folder."""
    folder = graph.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""
    files = [entry for entry in manifest.files if entry.role in (MODEL, DATA) and entry.path.startswith(prefix)]
    return {entry.path.removeprefix(prefix): entry for entry in files}


def _declared(found: Version) -> ModelSpec | None:
    """The signature of the manifest, when its publisher gave one."""
    signature = None if found.manifest is None else found.manifest.description.signature
    if signature is None:
        return None
    inputs, outputs = (
        tuple([TensorSpec(tensor.name, tensor.datatype, tensor.shape) for tensor in side])
        for side in (signature.inputs, signature.outputs)
    )
    return ModelSpec(found.model, str(found.version), inputs, outputs)


@dataclass(slots=True, frozen=True)
class FileVersions:
    """Model files by reference, such as a candidate from a training run and the model that it is to follow."""

    files: Mapping[str, Path]

    def find(self, model: str, reference: str) -> Found:
        path = self.files.get(reference)
        if path is None:
            raise VersionNotFound(f"there is no file for {reference}")
        if not path.is_file():
            raise ModelLoadError(f"{path} is no file")
        return Found(path.name, digest_files([path]), LoadRequest(model, "1", path, ModelOptions()))
