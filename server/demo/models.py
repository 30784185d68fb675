"""Writes the model repository: ``<model>/<version>/model.onnx`` and ``config.pbtxt`` where one is wanted."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model's ONNX files by version. An empty ``config`` leaves everything to be found out from the graph."""

    name: str
    versions: Mapping[str, bytes]
    config: str = ""


def batched_config(name: str, max_batch_size: int) -> str:
    """A ``config.pbtxt`` that serves every version present and gathers what waits, up to ``max_batch_size`` rows."""
    return (
        f'name: "{name}"\n'
        'platform: "onnxruntime_onnx"\n'
        f"max_batch_size: {max_batch_size}\n"
        "version_policy { all { } }\n"
        "dynamic_batching { }\n"
    )


def write_repository(root: Path, models: Sequence[ServedModel]) -> None:
    """Replace the folder ``root`` by a repository of exactly these models."""
    if root.exists():
        shutil.rmtree(root)
    for model in models:
        for version, content in model.versions.items():
            folder = root / model.name / version
            folder.mkdir(parents=True)
            (folder / "model.onnx").write_bytes(content)
        if model.config:
            (root / model.name / "config.pbtxt").write_text(model.config, encoding="utf-8")
