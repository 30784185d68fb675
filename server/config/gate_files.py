"""Gate policies from files, for commands that run without a server: a policy by itself, or those of a configuration.

Of a configuration only ``gates`` and ``models.NAME.gate`` are looked at, so that a pipeline needs none of its secrets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from server.config.gates import GatePolicy
from server.config.kinds import Context
from server.config.load import MAX_BYTES, show_path
from server.config.problems import InvalidConfig, Problem
from server.config.tree import KeyPath, Node, YamlSyntaxError, read_tree
from server.config.units import show
from server.errors import ConfigError

_VALUE_ERROR: Final = "value_error"
#: pydantic's kinds of mistakes whose own words speak of Python.
_WANTED: Final = {"model_type": "a mapping", "dict_type": "a mapping", "tuple_type": "a list", "string_type": "text"}


def load_policy(path: Path) -> GatePolicy:
    """A file that is one policy. Relative paths in it start at its folder. Raises InvalidConfig with every mistake."""
    return _policy(_read(path), (), path)


def policy_of(path: Path, model: str) -> GatePolicy:
    """The policy that a configuration names for a model; its only one when the model names none.

    Raises InvalidConfig, or ConfigError when there is none for the model.
    """
    root = _read(path)
    gates = root.child("gates")
    known = dict(gates.value) if gates is not None and isinstance(gates.value, dict) else {}
    node = _at(root, ("models", model, "gate"))
    name = str(node.value) if node is not None else next(iter(known)) if len(known) == 1 else None
    if name is None:
        raise ConfigError(f"{path.name}: models.{model}.gate names no policy, and gates has {len(known)}, not one")
    if name not in known:
        raise ConfigError(f"{path.name}: gates has no policy {name!r}; it has {', '.join(known) or 'none'}")
    return _policy(root, ("gates", name), path)


def _read(path: Path) -> Node:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: wanted UTF-8 text, got other bytes") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path} is over {MAX_BYTES} bytes, the most a configuration may have")
    try:
        root, complaints = read_tree(text)
    except YamlSyntaxError as error:
        mark = error.complaint.mark
        raise InvalidConfig([Problem(str(path), *mark, "", error.complaint.message)]) from error
    if complaints:
        raise InvalidConfig(
            Problem(str(path), *found.mark, show_path(found.path), found.message) for found in complaints
        )
    return root


def _at(root: Node, path: KeyPath) -> Node | None:
    chain = root.chain(path)
    return chain[-1] if len(chain) == len(path) + 1 else None


def _policy(root: Node, place: KeyPath, path: Path) -> GatePolicy:
    node = _at(root, place) or root
    try:
        return GatePolicy.model_validate(node.plain(), context=Context(path.parent))
    except ValidationError as invalid:
        raise InvalidConfig(_problems(invalid, node, place, path)) from invalid


def _problems(invalid: ValidationError, node: Node, place: KeyPath, path: Path) -> Iterator[Problem]:
    for error in invalid.errors(include_url=False):
        below: KeyPath = tuple([key for key in error["loc"] if isinstance(key, str | int)])
        nodes = node.chain(below)
        existing = below[: len(nodes) - 1]
        mark = nodes[-1].mark
        if error["type"] == "extra_forbidden" and len(nodes) > 1:
            mark = nodes[-2].keys[str(below[-1])]
        shown = show_path((*place, *(below if error["type"] == "missing" else existing)))
        yield Problem(str(path), *mark, shown, _message(dict(error)))


def _message(error: dict[str, Any]) -> str:
    if error["type"] == _VALUE_ERROR:
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        return "unknown key"
    if error["type"] == "missing":
        return "required key is missing"
    if (wanted := _WANTED.get(error["type"])) is not None:
        return f"wanted {wanted}, got {show(error['input'])}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, got {show(error['input'])}"
