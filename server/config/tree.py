"""YAML text -> a tree of plain values in which every value and every key knows its line and column.

A strict reading of YAML, made for configuration: plain words that YAML 1.1 turns into something unexpected (``yes``,
``off``, ``010``, ``1:30``) are mistakes with a text that says what to write; so are duplicate keys, and tags other
than the core ones. Anchors, aliases and merge keys (``<<``) work, with a bound on what they expand to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeAlias

import yaml

from server.config.units import show

Scalar: TypeAlias = str | int | float | bool | None
Key: TypeAlias = str | int
KeyPath: TypeAlias = tuple[Key, ...]

MAX_VALUES: Final = 100_000
MAX_DEPTH: Final = 64

# libyaml is some 20 times faster; both report the same events and marks.
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_TAG: Final = "tag:yaml.org,2002:"
_NULL: Final = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE: Final = frozenset({"true", "True", "TRUE"})
_FALSE: Final = frozenset({"false", "False", "FALSE"})
_BOOLEAN_WORDS: Final = {
    word: value
    for value, words in ((True, ("yes", "on")), (False, ("no", "off")))
    for stem in words
    for word in (stem, stem.capitalize(), stem.upper())
}
_INTEGER: Final = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})", re.ASCII)
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_NOT_FINITE: Final = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII)
#: What YAML 1.1 or 1.2 reads as a number and people do not: octal, hexadecimal, binary, 1_000, base 60.
_SURPRISING: Final = re.compile(
    r"[-+]?(0[0-9_]+|0o[0-7]+|0x[0-9A-Fa-f_]+|0b[01_]+|[0-9][0-9]*_[0-9_]*|[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?)", re.ASCII
)


_FORBIDDEN: Final = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Mark(NamedTuple):
    """A place in the text; both count from 1."""

    line: int
    column: int


@dataclass(slots=True)
class Node:
    """One value. ``keys`` are the places of a mapping's keys; ``size`` the values below, aliases counted each time."""

    mark: Mark
    value: Scalar | list[Node] | dict[str, Node]
    keys: dict[str, Mark] = field(default_factory=dict)
    size: int = 1

    def plain(self) -> Any:
        """The same as plain dicts, lists and scalars."""
        match self.value:
            case dict():
                return {key: child.plain() for key, child in self.value.items()}
            case list():
                return [child.plain() for child in self.value]
            case _:
                return self.value

    def child(self, key: Key) -> Node | None:
        """The value under a mapping's key or a list's index; None when there is none."""
        match self.value, key:
            case dict(), str():
                return self.value.get(key)
            case list(), int():
                return self.value[key] if 0 <= key < len(self.value) else None
            case _:
                return None

    def entries(self) -> dict[str, tuple[Node, Mark]]:
        """A mapping's values with the places of their keys; nothing for other nodes."""
        children = self.value if isinstance(self.value, dict) else {}
        return {key: (child, self.keys[key]) for key, child in children.items()}

    def chain(self, path: KeyPath) -> list[Node]:
        """This node and those along ``path``, as far as it exists: ``len(path) + 1`` nodes when all of it does."""
        nodes = [self]
        for key in path:
            below = nodes[-1].child(key)
            if below is None:
                break
            nodes.append(below)
        return nodes


@dataclass(slots=True, frozen=True)
class Complaint:
    """A mistake: where, at which key path, and what is wrong. ``spoils``: the value there is not what was meant."""

    mark: Mark
    path: KeyPath
    message: str
    spoils: bool = True


class YamlSyntaxError(Exception):
    """The text cannot be read any further. ``complaint`` says where and why."""

    def __init__(self, mark: Mark, message: str, path: KeyPath = ()) -> None:
        super().__init__(message)
        self.complaint = Complaint(mark, path, message)


def read_tree(text: str) -> tuple[Node, list[Complaint]]:
    """The tree of the one document in ``text`` and what was wrong but could be read past.

    Raises YamlSyntaxError for what stops the reading: syntax, a second document, too deep, too large, a dangling or
    recursive alias, and for an empty document.
    """
    return _Reader(text).read()


class _Reader:
    """Builds nodes from the parser's events, depth first."""

    def __init__(self, text: str) -> None:
        _check_characters(text)
        self.events = self._parse(text)
        self.anchors: dict[str, Node | None] = {}
        self.complaints: list[Complaint] = []

    def read(self) -> tuple[Node, list[Complaint]]:
        event = next(self.events)
        while isinstance(event, yaml.StreamStartEvent | yaml.DocumentStartEvent):
            event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent) or _is_nothing(event):
            raise YamlSyntaxError(Mark(1, 1), "the file is empty")
        root = self._node(event, ())
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                raise YamlSyntaxError(_mark(event), "a second document starts here; one file holds one document")
        return root, self.complaints

    @staticmethod
    def _parse(text: str) -> Iterator[Any]:
        """The parser's events, its errors turned into ours."""
        try:
            yield from yaml.parse(text, Loader=_LOADER)
        except yaml.MarkedYAMLError as error:
            place = error.problem_mark or error.context_mark
            reasons = [part for part in (error.context, error.problem) if part]
            raise YamlSyntaxError(
                Mark(place.line + 1, place.column + 1) if place else Mark(1, 1), f"YAML syntax: {', '.join(reasons)}"
            ) from error
        except yaml.YAMLError as error:
            raise YamlSyntaxError(Mark(1, 1), f"YAML syntax: {error}") from error

    def _complain(self, mark: Mark, path: KeyPath, message: str) -> None:
        self.complaints.append(Complaint(mark, path, message))

    def _node(self, event: Any, path: KeyPath) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, path)
        if len(path) > MAX_DEPTH:
            raise YamlSyntaxError(_mark(event), f"nested more than {MAX_DEPTH} levels deep", path)
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        node = self._build(event, path)
        if node.size > MAX_VALUES:
            raise YamlSyntaxError(node.mark, f"more than {MAX_VALUES} values, aliases expanded", path)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _build(self, event: Any, path: KeyPath) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            return Node(_mark(event), self._scalar(event, path))
        if isinstance(event, yaml.SequenceStartEvent):
            self._check_tag(event, "seq", path)
            return self._sequence(event, path)
        self._check_tag(event, "map", path)
        return self._mapping(event, path)

    def _alias(self, event: Any, path: KeyPath) -> Node:
        if event.anchor not in self.anchors:
            raise YamlSyntaxError(_mark(event), f"alias *{event.anchor} has no anchor &{event.anchor} before it", path)
        node = self.anchors[event.anchor]
        if node is None:
            raise YamlSyntaxError(_mark(event), f"alias *{event.anchor} contains itself", path)
        return node

    def _sequence(self, start: Any, path: KeyPath) -> Node:
        items: list[Node] = []
        node = Node(_mark(start), items)
        for event in self.events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            child = self._node(event, (*path, len(items)))
            items.append(child)
            node.size += child.size
        return node

    def _mapping(self, start: Any, path: KeyPath) -> Node:
        entries: dict[str, Node] = {}
        node = Node(_mark(start), entries)
        merged: list[dict[str, tuple[Node, Mark]]] = []
        for event in self.events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self._key(event, path)
            child = self._node(next(self.events), (*path, key))
            node.size += child.size
            if key == "<<" and event.implicit[0]:
                merged += self._mergeable(child, _mark(event), path)
            elif key in entries:
                first = node.keys[key]
                text = f"duplicate key, first given in line {first.line}"
                self.complaints.append(Complaint(_mark(event), (*path, key), text, spoils=False))
            else:
                entries[key], node.keys[key] = child, _mark(event)
        for source in merged:  # what is given explicitly wins, then what an earlier source gives
            for key, (child, mark) in source.items():
                if key not in entries:
                    entries[key], node.keys[key] = child, mark
        return node

    def _key(self, event: Any, path: KeyPath) -> str:
        """Keys are taken as written: ``on:`` and ``1:`` are the texts "on" and "1"."""
        if isinstance(event, yaml.ScalarEvent):
            return str(event.value)
        raise YamlSyntaxError(_mark(event), "a key must be plain or quoted text", path)

    def _mergeable(self, node: Node, mark: Mark, path: KeyPath) -> list[dict[str, tuple[Node, Mark]]]:
        """The entries of the mapping or mappings that a merge key names."""
        sources = node.value if isinstance(node.value, list) else [node]
        if not all(isinstance(source.value, dict) for source in sources):
            self._complain(mark, (*path, "<<"), "wanted an alias of a mapping (or a list of them) to merge")
            return []
        return [source.entries() for source in sources]

    def _check_tag(self, event: Any, wanted: str, path: KeyPath) -> None:
        if event.tag not in {None, "!", _TAG + wanted}:
            self._complain(_mark(event), path, f"tag {_tag(event)} is not supported")

    def _scalar(self, event: Any, path: KeyPath) -> Scalar:
        tag = event.tag
        if tag in {"!", _TAG + "str"} or (tag is None and not event.implicit[0]):
            return str(event.value)
        if tag is not None and tag.removeprefix(_TAG) not in {"int", "float", "bool", "null"}:
            self._complain(_mark(event), path, f"tag {_tag(event)} is not supported")
            return str(event.value)
        value, complaint = resolve_plain(event.value)
        if complaint:
            self._complain(_mark(event), path, complaint)
        return value


def _check_characters(text: str) -> None:
    """Refuse what YAML does not allow anywhere; the two parsers disagree on where they saw it."""
    found = _FORBIDDEN.search(text)
    if found:
        line_start = text.rfind("\n", 0, found.start()) + 1
        mark = Mark(text.count("\n", 0, found.start()) + 1, found.start() - line_start + 1)
        raise YamlSyntaxError(mark, f"YAML syntax: the character U+{ord(found[0]):04X} is not allowed")


def resolve_plain(text: str) -> tuple[Scalar, str]:
    """What an unquoted word means, and a complaint when YAML's reading would surprise ("" when all is well)."""
    if text in _NULL:
        return None, ""
    if text in _TRUE or text in _FALSE:
        return text in _TRUE, ""
    if text in _BOOLEAN_WORDS:
        value = _BOOLEAN_WORDS[text]
        right = str(value).lower()
        return (
            value,
            f"plain {text} is a boolean in some YAML versions: write {right}, or '{text}' in quotes for the text",
        )
    if _INTEGER.fullmatch(text):
        return int(text), ""
    if _SURPRISING.fullmatch(text):
        return (
            text,
            f"plain {show(text)[5:]} is a number in some YAML versions: write a decimal number, or quote the text",
        )
    if _FLOAT.fullmatch(text):
        number = float(text)
        return (number, "") if math.isfinite(number) else (text, f"{show(text)[5:]} is too large a number")
    if _NOT_FINITE.fullmatch(text):
        return text, f"{text} is not a finite number"
    return text, ""


def _is_nothing(event: Any) -> bool:
    return isinstance(event, yaml.ScalarEvent) and event.implicit[0] and event.value in _NULL


def _mark(event: Any) -> Mark:
    return Mark(event.start_mark.line + 1, event.start_mark.column + 1)


def _tag(event: Any) -> str:
    return str(event.tag).replace(_TAG, "!!")
