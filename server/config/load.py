"""A YAML file -> ``Config``, or every mistake in it at once, each with its line, column and key path.

Three passes: reading (``tree``), shape (pydantic), and rules across keys (``consistency``). So that a mistake of one
kind never hides those of the next, what a pass refuses is cut out before the next one looks.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from server.config.consistency import contradictions
from server.config.kinds import Context
from server.config.model import API_VERSION, Config
from server.config.problems import InvalidConfig, Problem, UnloadableConfig
from server.config.tree import Complaint, Key, KeyPath, Mark, Node, YamlSyntaxError, read_tree
from server.config.units import show
from server.errors import ModelLoadError

MAX_BYTES: Final = 4 * 1024 * 1024

#: How often the shape is checked again after cutting out what was refused; each round cuts at least one value.
_ROUNDS: Final = 20

_PLAIN_KEY: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*", re.ASCII)

_WANTED: Final = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_type": "a whole number",
    "model_type": "a mapping",
    "string_type": "text",
    "tuple_type": "a list",
    "finite_number": "a finite number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le}",
    "string_pattern_mismatch": "text that matches {pattern}",
    "too_short": "a length of at least {min_length}",
    "too_long": "a length of at most {max_length}",
    "literal_error": "{expected}",
}


def load_config(path: Path, *, environ: Mapping[str, str] | None = None, repository_given: bool = False) -> Config:
    """Read a file. Relative paths in it start at its folder. Raises InvalidConfig with every mistake.

    ``repository_given``: a flag names the model repository, so models need no source in the file.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidConfig([_about_file(path, f"cannot be read: {error.strerror or error}")]) from error
    if len(raw) > MAX_BYTES:
        raise InvalidConfig([_about_file(path, f"is over {MAX_BYTES} bytes, the most a configuration may have")])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, start = raw.count(b"\n", 0, error.start) + 1, raw.rfind(b"\n", 0, error.start) + 1
        problem = Problem(str(path), line, error.start - start + 1, "", "wanted UTF-8 text, got other bytes")
        raise InvalidConfig([problem]) from error
    return parse_config(text, path=str(path), folder=path.parent, environ=environ, repository_given=repository_given)


def parse_config(
    text: str,
    *,
    path: str = "<text>",
    folder: Path | None = None,
    environ: Mapping[str, str] | None = None,
    repository_given: bool = False,
) -> Config:
    """The same for text at hand; ``path`` is how problems name it."""
    try:
        root, complaints = read_tree(text)
    except YamlSyntaxError as error:
        raise InvalidConfig([_problem(path, error.complaint)]) from error
    context = Context(folder or Path(), os.environ if environ is None else environ)
    config, complaints = _Check(root, complaints, context, repository_given).run()
    if complaints or config is None:
        raise InvalidConfig(_problem(path, complaint) for complaint in complaints)
    return config


def unloadable(error: ModelLoadError, text: str, *, path: str = "<text>") -> UnloadableConfig:
    """``error`` with the place in ``text``, a valid configuration, that asked for the version which it speaks of.

    That is the nearest there is to its source; a model that the text does not name has no place in it.
    """
    root, _ = read_tree(text)
    model: KeyPath = ("models", error.model)
    version = (*model, "versions", error.version)
    for wanted in ((*version, "source"), version, (*model, "source"), model):
        nodes = root.chain(wanted)
        if len(nodes) > len(wanted):
            mark = nodes[-2].keys[str(wanted[-1])] if isinstance(nodes[-1].value, dict) else nodes[-1].mark
            return UnloadableConfig(error, Problem(path, *mark, show_path(wanted), error.message))
    return UnloadableConfig(error, Problem(path, 0, 0, "", error.message))


def _about_file(path: Path, message: str) -> Problem:
    return Problem(str(path), 0, 0, "", message)


def _problem(path: str, complaint: Complaint) -> Problem:
    return Problem(path, *complaint.mark, show_path(complaint.path), complaint.message)


def show_path(path: KeyPath) -> str:
    """``models.fraud.buckets.ids[2]``; keys that are no plain words stand in quotes."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += f".{key}" if _PLAIN_KEY.fullmatch(key) else f'."{key}"'
    return text.removeprefix(".")


class _Check:
    """One file on its way through the shape and the rules."""

    def __init__(self, root: Node, complaints: list[Complaint], context: Context, repository_given: bool) -> None:
        self.root = root
        self.context = context
        self.repository_given = repository_given
        self.complaints = complaints + list(_empty_values(root))
        self.cut: list[KeyPath] = []

    def run(self) -> tuple[Config | None, list[Complaint]]:
        """The configuration, and what is wrong with the file; the former only counts when the latter is empty."""
        if not isinstance(self.root.value, dict):
            text = f"wanted a mapping with apiVersion and sections, got {show(self.root.plain())}"
            return None, [Complaint(self.root.mark, (), text)]
        config = self._shape(self.root.plain())
        if config is not None:
            self.complaints += self._rules(config)
        return config, self.complaints

    def _shape(self, data: dict[str, Any]) -> Config | None:
        """Validate; report what the first round refuses, cut it out, and go on until the rest is a Config."""
        spoiled = {complaint.path for complaint in self.complaints if complaint.spoils}
        for number in range(_ROUNDS):
            try:
                return Config.model_validate(data, context=self.context)
            except ValidationError as invalid:
                errors = list(_worth_telling(invalid))
            finally:
                if number == 0:
                    self.cut += [_cut(data, path) for path in spoiled]
            if number == 0:
                found = map(self._explain, errors)
                self.complaints += [complaint for complaint in found if complaint.path not in spoiled]
            self.cut += [_cut(data, self._refused(error)) for error in errors]
            data["apiVersion"] = API_VERSION
        return None

    def _refused(self, error: Mapping[str, Any]) -> KeyPath:
        """What has to go for this error to go: the value, or the section that lacks a key."""
        path = _key_path(error["loc"])
        return (path[:-1] or path) if error["type"] == "missing" else self._existing(path)

    def _existing(self, path: KeyPath) -> KeyPath:
        return path[: len(self.root.chain(path)) - 1]

    def _explain(self, error: Mapping[str, Any]) -> Complaint:
        """One of pydantic's errors in our words and with its place."""
        path = _key_path(error["loc"])
        existing = self._existing(path)
        if error["type"] == "missing":
            return Complaint(self._key_mark(existing), path, "required key is missing")
        if error["type"] == "extra_forbidden":
            return Complaint(self._key_mark(path), path, _unknown_key(path))
        mark = self._key_mark(path) if error["loc"][-1] == "[key]" else self.root.chain(path)[-1].mark
        return Complaint(mark, existing, _message(error, hidden=_Place(path).hidden))

    def _key_mark(self, path: KeyPath) -> Mark:
        """Where the key at the end of ``path`` stands; for a list's entry (and the root) where its value does."""
        chain = self.root.chain(path)
        key = path[len(chain) - 2] if len(chain) > 1 else None
        return chain[-2].keys[key] if isinstance(key, str) else chain[-1].mark

    def _rules(self, config: Config) -> Iterator[Complaint]:
        """The broken rules, but for those that rest on something that was cut out."""
        cut = set(self.cut)
        above_cut = {path[:depth] for path in cut for depth in range(len(path) + 1)}
        for found in contradictions(config, repository_given=self.repository_given):
            if _at_or_below(found.path, cut) or any(
                path in above_cut or _at_or_below(path, cut) for path in found.rests_on
            ):
                continue
            node = self.root.chain(found.path)[-1]
            mark = self._key_mark(found.path) if isinstance(node.value, dict) else node.mark
            yield Complaint(mark, found.path, found.message)


def _empty_values(root: Node) -> Iterator[Complaint]:
    """Every key and entry with nothing behind it: no key of the configuration takes that."""
    stack: list[tuple[KeyPath, Node]] = [((), root)]
    while stack:
        path, node = stack.pop()
        children: Iterable[tuple[Key, Node]] = ()
        if isinstance(node.value, dict):
            children = node.value.items()
        elif isinstance(node.value, list):
            children = enumerate(node.value)
        elif node.value is None:
            yield Complaint(node.mark, path, "wanted a value, got nothing; leave the key out for its default")
        stack += [((*path, key), child) for key, child in children]


def _worth_telling(invalid: ValidationError) -> Iterator[Mapping[str, Any]]:
    """The errors, without "too short" for a list that is short because its entries were refused."""
    errors = invalid.errors(include_url=False)
    parents = {error["loc"][:depth] for error in errors for depth in range(len(error["loc"]))}
    return (error for error in errors if error["type"] != "too_short" or error["loc"] not in parents)


def _key_path(location: tuple[Key, ...]) -> KeyPath:
    """pydantic's location without its marker for "the key itself is wrong"."""
    return location[:-1] if location and location[-1] == "[key]" else location


def _message(error: Mapping[str, Any], *, hidden: bool) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    got = "a value that is not shown" if hidden else show(error["input"])
    if kind not in _WANTED:
        return f"{error['msg']}, got {got}"
    wanted = _WANTED[kind].format_map(context)
    hint = _did_you_mean(error["input"], re.findall(r"'([^']*)'", wanted)) if kind == "literal_error" else ""
    return f"wanted {wanted}, got {got}{hint}"


def _did_you_mean(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word)[:64], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown_key(path: KeyPath) -> str:
    section = _Place(path[:-1]).kind
    known = sorted(field.alias or name for name, field in section.model_fields.items())
    return f"unknown key{_did_you_mean(path[-1], known) or '; known here: ' + ', '.join(known)}"


class _Place:
    """What the models say of a key path: ``kind`` is the type there, ``hidden`` whether it may not be shown."""

    def __init__(self, path: KeyPath) -> None:
        self.kind: Any = Config
        self.hidden = False
        for key in path:
            self._step(key)

    def _step(self, key: Key) -> None:
        if isinstance(self.kind, type) and issubclass(self.kind, BaseModel):
            fields = self.kind.model_fields
            found = fields.get(str(key)) or next((field for field in fields.values() if field.alias == key), None)
            self.hidden |= found is not None and not found.repr
            self.kind = _bare(found.annotation) if found else None
        else:
            inside = get_args(self.kind)[:2]
            self.kind = _bare(inside[0 if isinstance(key, int) else -1]) if inside else None


def _bare(annotation: Any) -> Any:
    """The type without ``Annotated`` and ``| None``."""
    while get_origin(annotation) in {Annotated, UnionType, Union}:
        annotation = get_args(annotation)[0]
    return annotation


def _at_or_below(path: KeyPath, places: Set[KeyPath]) -> bool:
    return any(path[:depth] in places for depth in range(len(path) + 1))


def _cut(data: dict[str, Any], path: KeyPath) -> KeyPath:
    """Take the value at ``path`` out of ``data``; for an entry of a list the whole list. Gives what was taken out."""
    until = next((index for index, key in enumerate(path) if isinstance(key, int)), len(path))
    path = path[:until]
    target: Any = data
    for key in path[:-1]:
        target = target.get(key) if isinstance(target, dict) else None
    if path and isinstance(target, dict):
        target.pop(path[-1], None)
    return path
