"""What hostile callers send: mutations of valid JSON bodies, and values of every wrong kind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

#: One of each kind that JSON has, and the borders of those that number types have.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e308, -0.0, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**400,
    "", "x", "é\u0000\U0001f600", "9" * 5000, [], [[]], [1], [None], {}, {"a": 1}, [{"a": []}], [[1], [2]],
    float("nan"), float("inf"),
]  # fmt: skip

Path = tuple[str | int, ...]


def paths(document: Any, at: Path = ()) -> Iterator[Path]:
    """Every position of a JSON document, the root first."""
    yield at
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from paths(value, (*at, key))


def replaced(document: Any, path: Path, value: Any) -> Any:
    """A copy with ``value`` at ``path``."""
    if not path:
        return copy.deepcopy(value)
    changed = copy.deepcopy(document)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = copy.deepcopy(value)
    return changed


def without(document: Any, path: Path) -> Any:
    """A copy without the key or element at ``path``."""
    changed = copy.deepcopy(document)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return changed


def variants(document: Any) -> Iterator[Any]:
    """Every value at every position; every part left out; an unknown key in every object."""
    for path in paths(document):
        for value in VALUES:
            yield replaced(document, path, value)
        if path:
            yield without(document, path)
    for path in paths(document):
        part = document
        for key in path:
            part = part[key]
        if isinstance(part, dict):
            yield replaced(document, path, {**part, "unknown": 1})
