"""What a version of a registry says of itself: its options, the files beside its graph, its signature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from router.registry.base import Version
from router.registry.manifest import CONFIG, DATA, MODEL, FileEntry, Manifest
from server.config.pbtxt import read_pbtxt
from server.errors import ModelLoadError
from server.runtime.base import ModelOptions
from server.types import ModelSpec, TensorSpec


def options_of(model: str, manifest: Manifest, folder: Path, base: ModelOptions) -> ModelOptions:
    """Its own config.pbtxt on top of ``base``. ``folder``: where its files lie. Raises ModelLoadError."""
    config = manifest.file(CONFIG)
    if config is None:
        return base
    try:
        text = (folder / config.path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{config.path} cannot be read: {error}") from error
    return read_pbtxt(text, model=model, base=base).options


def files_beside(graph: FileEntry, manifest: Manifest) -> Mapping[str, FileEntry]:
    """The files that external data may refer to, by their path from the graph's folder."""
    folder = graph.path.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""
    files = [entry for entry in manifest.files if entry.role in (MODEL, DATA) and entry.path.startswith(prefix)]
    return {entry.path.removeprefix(prefix): entry for entry in files}


def signature_of(found: Version, model: str, number: str) -> ModelSpec | None:
    """The signature of the manifest, when its publisher gave one, as that of ``model`` version ``number``."""
    signature = None if found.manifest is None else found.manifest.description.signature
    if signature is None:
        return None
    inputs, outputs = (
        tuple([TensorSpec(tensor.name, tensor.datatype, tensor.shape) for tensor in side])
        for side in (signature.inputs, signature.outputs)
    )
    return ModelSpec(model, number, inputs, outputs)
