"""Files of golden requests that a configuration names, checked without a model: there, readable, well formed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from server.config.load import show_path
from server.config.model import Config
from server.config.problems import Problem
from server.config.tree import KeyPath, read_tree
from server.errors import ModelLoadError
from server.golden import load_golden


def golden_problems(file: Path, config: Config) -> list[Problem]:
    """What is wrong with them, at the places in ``file`` that name them. ``config`` is what the file says."""
    root, _ = read_tree(file.read_text(encoding="utf-8-sig"))
    found = []
    for path, golden in _named(config):
        try:
            load_golden(golden)
        except ModelLoadError as error:
            chain = root.chain(path)  # a path by itself is no list with places
            found.append(Problem(str(file), *chain[-1].mark, show_path(path[: len(chain) - 1]), error.message))
    return found


def _named(config: Config) -> Iterator[tuple[KeyPath, Path]]:
    for name, model in config.models.items():
        for index, path in enumerate(model.golden):
            yield ("models", name, "golden", index), path
