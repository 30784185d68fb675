"""Where the gates get versions from: the embedded registry, or files. Reading the files blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from router.registry.base import NotInRegistry, RegistryBackend, RegistryError, Version
from router.registry.manifest import MODEL
from server.config.published import files_beside, options_of, signature_of
from server.errors import ModelLoadError, VersionNotFound
from server.gates.holdout import digest_files
from server.gates.keeper import Found
from server.runtime.base import LoadRequest, ModelOptions


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
        number, options = str(found.version), options_of(found.model, found.manifest, fetched.folder, self.base)
        request = LoadRequest(
            found.model,
            number,
            fetched.folder / graph.path,
            options,
            fetched.folder,
            listed=files_beside(graph, found.manifest),
        )
        return Found(number, found.digest, request, signature_of(found, found.model, number))


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
