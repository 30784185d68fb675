"""Generate ``docs/configuration.md`` from the models of the configuration file, or check that it is fresh.

``python -m scripts.config_reference`` writes; ``--check`` compares and exits 1 when the document is stale. Forms and
defaults come from the JSON Schema that ``tidegate check-config --schema`` prints, meanings from the docstrings and the
``#:`` comments of ``server/config``.

In a section's docstring a sentence that begins with keys (``key``: ..., or ``key`` and ``other`` are ...) is what they
mean, up to the next such sentence or one that names another key; the rest introduces the section. A key without a
sentence of its own is explained by those that name it.
A key that nothing is said of stops the script.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from server.config import (
    capture,
    gates,
    kinds,
    model,
    monitor_kinds,
    retrain,
    rollout_section,
    routing_sections,
    sinks,
)
from server.config.model import Config
from server.config.schema import config_schema
from server.config.section import Section

TARGET: Final = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

_HEAD: Final = """# Configuration

Every key of the configuration file: what it takes, what it is when the file does not say, and what it means. This page
is made from the models that read the file (by `scripts/config_reference.py`). `tidegate check-config --schema` prints
the same as JSON Schema, for editors; `tidegate check-config FILE` checks a file. An unknown key is a mistake, and so is
a key given as `null`: leave it out for its default.

| form | is written |
| --- | --- |
| duration | a number with a unit: `ns`, `us`, `ms`, `s`, `m`, `h` or `d`, such as `200ms` or `1.5h` |
| size | a number with a unit: `B`, `kB`, `MB`, `GB`, `TB` (powers of 1000), `KiB`, `MiB`, `GiB`, `TiB` (of 1024), \
such as `64MiB` |
| percentage | `0%` to `100%`, such as `2.5%` |
| share | a percentage in steps of 0.01% |
| address | `HOST:PORT`, such as `127.0.0.1:8000` or `[::1]:0`; port 0 picks a free one |
| path | absolute, or from the folder of the configuration file |
| secret | `${VARIABLE}` of the environment, or `file:PATH` of a file that holds it; never the value itself |
| version | a positive whole number, with or without quotes |
| test | a value, which must be the same, or one of `{exact: VALUE}`, `{in: [VALUE, ...]}`, `{prefix: TEXT}` and \
`{present: true}` |

`NAME` and `VERSION` in a heading stand for names and versions of your own, `[]` for each entry of a list. The default
*none* means that there is nothing until the file gives it, *its own* that a section is there, with the defaults of its
keys.
"""
_VALUE: Final = "text, number or boolean"
_URL: Final = "`http://` or `https://` address"
#: Kinds of values and the words for them. Those with a range get it from ``_range``.
_KINDS: Final[tuple[tuple[Any, str], ...]] = (
    (kinds.Delay, "duration"),
    (kinds.BodySize, "size"),
    (kinds.Percent, "percentage"),
    (kinds.Share, "share"),
    (kinds.ListenAddress, "address"),
    (kinds.Secret, "secret"),
    (kinds.ModelName, "model name"),
    (kinds.LoadName, "model name or `*`"),
    (kinds.Version, "version"),
    (kinds.VersionKey, "version"),
    (kinds.Target, "version or alias, such as `8`, `@challenger`, `other:8` or `other@champion`"),
    (kinds.OwnTarget, "version or alias of the model, such as `8` or `@champion`"),
    (kinds.RuleTarget, "`requested`, `stable`, name of an arm, or version, such as `8`, `@challenger` or `other:8`"),
    (kinds.ArmName, "name of an arm"),
    (kinds.KeySource, "`header:NAME`, `parameter:NAME` or `request:id`"),
    (kinds.HeaderName, "name of a header"),
    (kinds.UpstreamUrl, _URL),
    (kinds.UpstreamName, "text or whole number"),
    (kinds.ValueText, _VALUE),
    (kinds.Datatype, "datatype, such as `FP32`"),
    (capture.EventsUrl, _URL),
    (capture.ColumnChoice, "`keep`, `drop`, `hmac` or `{bucket: [EDGE, ...]}`"),
    (gates.PolicyName, "name of a policy"),
    (model.Provider, "`cpu`, `cuda`, `tensorrt`, or `{name: NAME, options: {KEY: VALUE}}`"),
    (model.PolicyChoice, "`all`, `{latest: NUMBER}` or `{specific: [VERSION, ...]}`"),
    (routing_sections.ValueChoice, "test"),
    (monitor_kinds.WatchedWindow, "number of rows or duration"),
    (monitor_kinds.ExpectedRun, "number of rows, such as `250k`, `10M` or `1G`, or duration"),
    (monitor_kinds.Persistence, "`K of M`"),
    (retrain.Budget, "`N per day`"),
    (retrain.ScheduleTime, "duration, or a time such as `03:30 UTC`"),
    (rollout_section.Level, "number or percentage"),
    (sinks.SinkName, "name of a sink"),
    (sinks.VariableName, "name of a variable"),
    (sinks.WebhookUrl, _URL),
)


@dataclass(slots=True)
class Place:
    """A section of the document: the class, its schema, and every key path that it stands at."""

    section: type[Section]
    schema: Mapping[str, Any]
    paths: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Where a reader looks for it: below ``models``, if it is there."""
        return next((path for path in self.paths if path.startswith("models.")), self.paths[0])

    @property
    def anchor(self) -> str:
        """What the heading's address becomes: lower case, without dots and brackets."""
        return "#" + re.sub(r"[^a-z0-9_ -]", "", self.path.lower()).replace(" ", "-")


# --- what is said of a section ----------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.?!])\s+(?=[A-Z`\"])", " ".join(text.split()))


def introduction(section: type[Section]) -> tuple[list[str], dict[str, str]]:
    """The sentences that introduce a section, and what its docstring says of single keys."""
    known = set(names(section))
    general: list[str] = []
    meanings: dict[str, str] = {}
    for paragraph in (inspect.getdoc(section) or "").split("\n\n"):
        latest = ""
        for sentence in sentences(paragraph):
            keys, text = _lead(sentence)
            if keys and known.issuperset(keys):
                latest = keys[-1]
                meanings |= dict.fromkeys(keys, text)
            elif latest and known.isdisjoint(re.findall(r"``(\w+)``", sentence)):
                meanings[latest] += f" {sentence}"
            else:
                general.append(sentence)
    return general, meanings


def _lead(sentence: str) -> tuple[list[str], str]:
    """The keys that a sentence begins with, and what it says of them: all of it, or what follows a colon."""
    lead = re.match(r"((?:``\w+``(?:,? and |, |(?=:| )))+)(:?) ?(.*)", sentence)
    if lead is None:
        return [], sentence
    return re.findall(r"``(\w+)``", lead[1]), _upper(lead[3]) if lead[2] else sentence


def mentions(section: type[Section], key: str) -> str:
    """The sentences of a docstring that name a key."""
    return " ".join(text for text in sentences(inspect.getdoc(section) or "") if f"``{key}``" in text)


def comments(section: type[Section]) -> dict[str, str]:
    """The ``#:`` comments above the keys of a section, those of the classes it is made from included."""
    found: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if not issubclass(owner, Section) or owner is Section:
            continue
        text = ""
        for line in inspect.getsource(owner).splitlines():
            if comment := re.match(r"    #: (.*)", line):
                text = f"{text} {comment[1]}".strip()
            elif key := re.match(r"    (\w+):", line):
                if text:
                    found[key[1]] = text
                text = ""
    aliases = {attribute: name for name, attribute in names(section).items()}
    return {aliases[attribute]: text for attribute, text in found.items()}


def names(section: type[Section]) -> dict[str, str]:
    """Keys as the file has them -> attributes."""
    return {given.alias or attribute: attribute for attribute, given in section.model_fields.items()}


# --- what a key takes -------------------------------------------------------------------------------------------------


def _canonical(schema: Mapping[str, Any]) -> str:
    """A schema as text, without what does not change what kind of value it is."""
    rest = {key: value for key, value in schema.items() if key not in {"default", "title", "description"}}
    return json.dumps(rest, sort_keys=True)


_WORDS: Final = {_canonical(TypeAdapter(kind).json_schema()): words for kind, words in _KINDS}


class Reference:
    """The document, from the schema of the whole file."""

    def __init__(self) -> None:
        schema = config_schema()
        self._definitions: Mapping[str, Mapping[str, Any]] = schema["$defs"]
        self._classes = {found.__name__: found for found in _sections(Config, set())}
        self.places: dict[str, Place] = {}
        self._visit(Place(Config, schema), "")

    def _visit(self, place: Place, path: str) -> None:
        """Find the sections below one, depth first."""
        place.paths.append(path)
        self.places.setdefault(place.section.__name__, place)
        for key, schema in place.schema["properties"].items():
            for name, suffix in _nested(schema):
                below = self.places.get(name) or Place(self._classes[name], self._definitions[name])
                self._visit(below, f"{path}.{key}{suffix}".lstrip("."))

    def render(self) -> str:
        """The whole document."""
        top, *others = self._ordered()
        parts = [_HEAD, *self._section(top, "## The file")]
        for place in others:
            mark = "###" if re.search(r"[.\[]", place.path) else "##"
            parts += self._section(place, f"{mark} {place.path}")
        return "\n".join(parts)

    def _ordered(self) -> list[Place]:
        """As the file has them, each after the section that it is part of."""
        order: list[str] = []

        def visit(name: str, path: str) -> None:
            place = self.places[name]
            if place.path != path:
                return
            order.append(name)
            for key, schema in place.schema["properties"].items():
                for below, suffix in _nested(schema):
                    visit(below, f"{path}.{key}{suffix}".lstrip("."))

        visit(Config.__name__, "")
        return [self.places[name] for name in order]

    def _section(self, place: Place, heading: str) -> Iterator[str]:
        general, meanings = introduction(place.section)
        notes = comments(place.section)
        yield f"{heading}\n"
        yield f"{_code(' '.join(general))}{self._elsewhere(place)}\n"
        yield "| key | form | default | meaning |\n| --- | --- | --- | --- |"
        required, attributes = place.schema.get("required", ()), names(place.section)
        for key, schema in place.schema["properties"].items():
            own = " ".join(filter(None, [notes.get(key), meanings.get(key)]))
            meaning = own or mentions(place.section, key) or self._of_nested(schema)
            if not meaning:
                raise SystemExit(f"{place.section.__name__}.{key}: nothing says what it means; give it a #: comment")
            default = "required" if key in required else _default(place.section.model_fields[attributes[key]], schema)
            cells = (f"`{key}`", self._form(place.section, key, schema), default, _code(meaning))
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        yield ""

    def _elsewhere(self, place: Place) -> str:
        """Where else the section stands, by itself and not as part of one that does."""
        copies = [path for other in self.places.values() for path in other.paths if path != other.path]
        own = [
            path
            for path in place.paths
            if path in copies and not any(re.match(rf"{re.escape(copy)}[.\[]", path) for copy in copies)
        ]
        return f" The same keys stand at {' and '.join(f'`{path}`' for path in own)}." if own else ""

    def _of_nested(self, schema: Mapping[str, Any]) -> str:
        """What the section below a key says of itself first."""
        return " ".join(introduction(self._classes[name])[0][0] for name, _ in _nested(schema))

    def _form(self, section: type[Section], key: str, schema: Mapping[str, Any]) -> str:
        words = self._words(schema, _leaves(section.model_fields[names(section)[key]].annotation))
        probe = {"duration": "99999999d", "size": "99999999TiB"}.get(words)
        return words if probe is None else f"{words}, {_range(section, key, probe)}"

    def _words(self, schema: Mapping[str, Any], leaves: set[Any]) -> str:
        """The form of a value in words. ``leaves``: the types that its annotation is made of."""
        if "$ref" in schema:
            place = self.places[schema["$ref"].rpartition("/")[2]]
            return f"[section]({place.anchor})"
        if known := _WORDS.get(_canonical(schema)):
            return known
        if "anyOf" in schema:
            return " or ".join(self._words(choice, leaves) for choice in schema["anyOf"])
        if "enum" in schema or "const" in schema:
            return _one_of(schema.get("enum", [schema.get("const")]))
        match schema["type"]:
            case "array":
                return f"list: {self._words(schema['items'], leaves)}{_counted(schema)}"
            case "object":
                return self._mapping(schema, leaves)
            case "string":
                return _text(schema, leaves)
            case kind:
                return _number(kind, schema)

    def _mapping(self, schema: Mapping[str, Any], leaves: set[Any]) -> str:
        pattern, values = _entries(schema)
        keys = _WORDS.get(_canonical({"type": "string", "pattern": pattern}), "name")
        return f"mapping of {keys}: {self._words(values, leaves)}"


def _sections(section: type[Section], known: set[type[Section]]) -> set[type[Section]]:
    """A section class and those that its keys hold."""
    known.add(section)
    for given in section.model_fields.values():
        for leaf in _leaves(given.annotation):
            if isinstance(leaf, type) and issubclass(leaf, Section) and leaf not in known:
                _sections(leaf, known)
    return known


def _leaves(annotation: Any) -> set[Any]:
    """The types that an annotation is made of, and the values of its literals."""
    parts = get_args(annotation)
    if parts:
        return {leaf for part in parts for leaf in _leaves(part)}
    return {annotation} if isinstance(annotation, type | str) else set()


def _nested(schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The section that a key holds, with what the path to it has behind the key; sections lie in no deeper nests."""
    suffix, inner = "", schema
    if "items" in schema:
        suffix, inner = "[]", schema["items"]
    elif schema.get("type") == "object":
        pattern, inner = _entries(schema)
        words = _WORDS.get(_canonical({"type": "string", "pattern": pattern}))
        suffix = f".{'VERSION' if words == 'version' else 'NAME'}"
    if "$ref" in inner:
        yield inner["$ref"].rpartition("/")[2], suffix


def _entries(schema: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The pattern that the keys of a mapping fit ("": any text), and the schema of its values."""
    ((pattern, values),) = schema.get("patternProperties", {"": schema.get("additionalProperties")}).items()
    return pattern, values


def _range(section: type[Section], key: str, absurd: str) -> str:
    """The range of a key, from what is said to a value far beyond it."""
    try:
        section.model_validate({key: absurd})
    except ValidationError as invalid:
        for error in invalid.errors():
            if error["loc"][0] == key and (found := re.search(r"wanted (\S+ to \S+), got", error["msg"])):
                return f"`{found[1].replace(' to ', '` to `')}`"
    raise SystemExit(f"{section.__name__}.{key}: {absurd} is not refused with the range that is wanted")


def _text(schema: Mapping[str, Any], leaves: set[Any]) -> str:
    if kinds.Source in leaves:
        return "path or `registry:` entry"
    if Path in leaves:
        return " or ".join(["path", *(f"`{leaf}`" for leaf in sorted(filter(_is_text, leaves)))])
    return f"text, at most {schema['maxLength']} characters" if "maxLength" in schema else "text"


def _is_text(leaf: object) -> bool:
    return isinstance(leaf, str)


def _number(kind: str, schema: Mapping[str, Any]) -> str:
    if kind == "boolean":
        return "true or false"
    noun = "whole number" if kind == "integer" else "number"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    above = "over " if "exclusiveMinimum" in schema else ""
    below = "under " if "exclusiveMaximum" in schema else ""
    if low is None:
        return noun
    if high is None or high >= 2**31 - 1:
        return f"{noun}, {above}{low}" if above else f"{noun}, {low} or more"
    return f"{noun}, {above}{low} to {below}{high}"


def _one_of(values: list[Any]) -> str:
    shown = [f"`{_yaml(value)}`" for value in values]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _counted(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minItems"), schema.get("maxItems")
    if low and high:
        return f" ({low} to {high})"
    return f" (at least {low})" if low else f" (at most {high})" if high else ""


def _default(given: FieldInfo, schema: Mapping[str, Any]) -> str:
    if "$ref" in schema and given.default is not None:
        return "*its own*"
    value = schema.get("default")
    return "*none*" if value in (None, "", [], {}) else f"`{_yaml(value)}`"


def _yaml(value: object) -> str:
    """A value as the file would say it, on one line."""
    if isinstance(value, str):
        return value
    return re.sub(r'"(\w+)"', r"\1", json.dumps(value))


def _code(text: str) -> str:
    return text.replace("``", "`")


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate docs/configuration.md from the configuration's models.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when stale")
    check: bool = parser.parse_args().check
    wanted = Reference().render()
    stale = not TARGET.is_file() or TARGET.read_text() != wanted
    if stale and not check:
        TARGET.write_text(wanted)
    if stale:
        sys.stdout.write(f"{'stale' if check else 'wrote'}: docs/{TARGET.name}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
