"""Kinds of values in the configuration file: what each accepts, what it becomes, and its place in the JSON Schema.

Durations become nanoseconds, sizes bytes, shares whole hundredths of a percent, addresses (host, port); paths are
resolved against the file's folder, secrets are looked up. Each refuses with a text that says what was wanted and got.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema

from router.registry.directory import MODEL_NAME_PATTERN, is_model_name, is_version
from server.config import units
from server.config.settings import Address
from server.errors import ConfigError
from server.runtime.upstream_options import UpstreamOptions
from server.types import ALL_DATATYPES

MAX_SECRET_BYTES: Final = 64 * 1024

_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", re.ASCII)
_REGISTRY_PREFIX: Final = "registry:"
_VERSION_PATTERN: Final = "[1-9][0-9]{0,17}"
_ALIAS_PATTERN: Final = "[a-z][a-z0-9_-]{0,62}"
_ARM_PATTERN: Final = "[A-Za-z_][A-Za-z0-9_.-]{0,62}"
#: "8", "@alias", "model:8" or "model@alias".
_TARGET_PATTERN: Final = f"(({MODEL_NAME_PATTERN}):)?{_VERSION_PATTERN}|({MODEL_NAME_PATTERN})?@{_ALIAS_PATTERN}"
_TARGET: Final = re.compile(_TARGET_PATTERN, re.ASCII)
_OWN_TARGET: Final = re.compile(f"{_VERSION_PATTERN}|@{_ALIAS_PATTERN}", re.ASCII)
_ARM: Final = re.compile(_ARM_PATTERN, re.ASCII)
_UPSTREAM_PATTERN: Final = r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[^\s?#]*)?"
_UPSTREAM: Final = re.compile(_UPSTREAM_PATTERN, re.ASCII)
_HEADER_PATTERN: Final = "[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}"
_HEADER: Final = re.compile(_HEADER_PATTERN, re.ASCII)
#: What a client of an upstream says itself.
_OWN_HEADERS: Final = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "host",
        "inference-header-content-length",
        "transfer-encoding",
    }
)
_NAME_WANTED: Final = "letters, digits, '.', '_' or '-', at most 255, with no leading dot"

T = TypeVar("T")


@dataclass(slots=True, frozen=True)
class Context:
    """What values are looked up in while a file is read: the folder of relative paths, and the environment."""

    folder: Path
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)


def _context(info: ValidationInfo) -> Context:
    return info.context if isinstance(info.context, Context) else Context(Path())


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"wanted text, got {units.show(value)}; put it in quotes if text is meant")
    if "${" in value:
        raise ValueError("${...} is only replaced in keys that hold secrets; this one does not")
    return value


@dataclass(slots=True, frozen=True)
class Source:
    """Where a model or a version lies: a path, or (``path`` None) an entry of the registry.

    A version's entry says which one it is, by ``version`` or by ``alias`` (without its "@").
    """

    path: Path | None = None
    entry: str = ""
    version: str = ""
    alias: str = ""

    @property
    def text(self) -> str:
        """The entry as the file names it, without ``registry:``."""
        mark = "@" if self.alias else "/" if self.version else ""
        return f"{self.entry}{mark}{self.alias or self.version}"


def _source(value: object, info: ValidationInfo) -> Source:
    text = _text(value)
    if not text.startswith(_REGISTRY_PREFIX):
        return Source(_path(text, info))
    return Source(entry=_model_name(text.removeprefix(_REGISTRY_PREFIX)))


def _version_source(value: object, info: ValidationInfo) -> Source:
    text = _text(value)
    if not text.startswith(_REGISTRY_PREFIX):
        return Source(_path(text, info))
    entry, mark, which = _partition(text.removeprefix(_REGISTRY_PREFIX))
    if not _OWN_TARGET.fullmatch(f"@{which}" if mark == "@" else which):
        raise ValueError(f"wanted a path, registry:NAME/VERSION or registry:NAME@ALIAS, got {units.show(value)}")
    name = _model_name(entry)
    return Source(entry=name, alias=which) if mark == "@" else Source(entry=name, version=which)


def _partition(text: str) -> tuple[str, str, str]:
    """The name, the mark behind it ("/" or "@") and the rest."""
    return text.partition("@") if "@" in text else text.partition("/")


def _path(value: object, info: ValidationInfo) -> Path:
    text = _text(value)
    if not text or "\0" in text:
        raise ValueError(f"wanted a path, got {units.show(value)}")
    return _context(info).folder / text


def _secret(value: object, info: ValidationInfo) -> str:
    """The secret behind ``${VAR}`` or ``file:/path``. No text of an error ever shows the value."""
    if isinstance(value, str) and (found := _VARIABLE.fullmatch(value)):
        secret = _context(info).environ.get(found[1])
        if not secret:
            raise ValueError(f"environment variable {found[1]} is {'empty' if secret == '' else 'not set'}")
        return secret
    if isinstance(value, str) and value.startswith("file:"):
        return _secret_file(_context(info).folder / value.removeprefix("file:"))
    raise ValueError("a secret is given as ${VARIABLE} or file:/path, never as the value itself (not shown here)")


def _secret_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            secret = file.read(MAX_SECRET_BYTES + 1).decode()
    except OSError as error:
        raise ValueError(f"secret file {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise ValueError(f"secret file {path} is not UTF-8 text") from None
    secret = secret.rstrip("\r\n")
    if not 0 < len(secret) <= MAX_SECRET_BYTES:
        raise ValueError(f"secret file {path} is {'too long' if secret else 'empty'}")
    return secret


def _model_name(value: object) -> str:
    if not isinstance(value, str) or not is_model_name(value):
        raise ValueError(f"wanted a model name ({_NAME_WANTED}), got {units.show(value)}")
    return value


def _load_name(value: object) -> str:
    return "*" if value == "*" else _model_name(value)


def _version(value: object) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not is_version(text):
        raise ValueError(f"wanted a version (a positive integer), got {units.show(value)}")
    return text


def _word(value: object) -> object:
    """Version numbers may stand without quotes."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _target(value: object) -> str:
    text = _word(value)
    if not isinstance(text, str) or not _TARGET.fullmatch(text):
        raise ValueError(
            f"wanted a version, such as 8, @challenger, other:8 or other@champion, got {units.show(value)}"
        )
    return text


def _own_target(value: object) -> str:
    text = _word(value)
    if not isinstance(text, str) or not _OWN_TARGET.fullmatch(text):
        raise ValueError(
            f"wanted one of the model's versions or aliases, such as 8 or @champion, got {units.show(value)}"
        )
    return text


def _rule_target(value: object) -> str:
    text = _word(value)
    if isinstance(text, str) and _ARM.fullmatch(text):
        return text
    if not isinstance(text, str) or not _TARGET.fullmatch(text):
        wanted = "wanted requested, stable, an arm's name or a version, such as 8, @challenger or other:8"
        raise ValueError(f"{wanted}; got {units.show(value)}")
    return text


def _arm_name(value: object) -> str:
    if not isinstance(value, str) or not _ARM.fullmatch(value):
        raise ValueError(
            f"wanted an arm's name (letters, digits, '.', '_' or '-', not a number), got {units.show(value)}"
        )
    return value


def parse_share(value: object) -> int:
    """Whole hundredths of a percent of "5%" or "0.25%"."""
    units.parse_percent(value)
    hundredths = Fraction(str(value).removesuffix("%")) * 100
    if hundredths.denominator != 1:
        raise ValueError(f"wanted a percentage in steps of 0.01%, got {units.show(value)}")
    return int(hundredths)


def scalar_text(value: object) -> str:
    """A value as requests carry it: numbers and booleans as the text that they are compared as."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else _text(value)


def _upstream_url(value: object) -> str:
    """An address that ``UpstreamOptions`` takes. It is not shown, as one that is refused may hold a password."""
    text = _text(value)
    if not _UPSTREAM.fullmatch(text):
        raise ValueError(
            "wanted http://HOST:PORT or https://HOST:PORT, perhaps with a path, without a user, a query or a fragment; "
            "the value is not shown"
        )
    try:
        return UpstreamOptions(text).url
    except ConfigError as error:
        raise ValueError(error.message) from None


def _header_name(value: object) -> str:
    text = _text(value)
    if not _HEADER.fullmatch(text):
        raise ValueError(f"wanted a header's name, got {units.show(value)}")
    if text.lower() in _OWN_HEADERS:
        raise ValueError(f"header {text} is set for every request and cannot be another")
    return text


def _header_secret(value: str) -> str:
    if not (value.isascii() and value.isprintable()):
        raise ValueError("wanted a secret of printable ASCII characters, as it is sent in a header (not shown here)")
    return value


def _option(value: object) -> str:
    """Options are passed on as text; true and false become the "1" and "0" that ONNX Runtime reads."""
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value) if isinstance(value, int | float) else _text(value)


def _datatype(value: object) -> str:
    if not isinstance(value, str) or value not in ALL_DATATYPES:
        raise ValueError(f"wanted one of {', '.join(sorted(ALL_DATATYPES))}, got {units.show(value)}")
    return value


def _bounded(parse: Callable[[object], int], low: str, high: str) -> BeforeValidator:
    """A validator that parses a value with a unit and holds it to a range given in the same notation."""
    lowest, highest = parse(low), parse(high)

    def check(value: object) -> int:
        amount = parse(value)
        if not lowest <= amount <= highest:
            raise ValueError(f"wanted {low} to {high}, got {value}")
        return amount

    return BeforeValidator(check)


def bounded_duration(low: str, high: str) -> BeforeValidator:
    """A duration from ``low`` to ``high`` as nanoseconds; goes with ``DURATION_SCHEMA``."""
    return _bounded(units.parse_duration, low, high)


def bounded_size(low: str, high: str) -> BeforeValidator:
    """A size from ``low`` to ``high`` as bytes; goes with ``SIZE_SCHEMA``."""
    return _bounded(units.parse_size, low, high)


def _pattern(pattern: str, **more: Any) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, **more})


def default(text: str, parse: Callable[[object], Any]) -> Any:
    """A field whose default is written, and published in the schema, with its unit."""
    return Field(default=parse(text), json_schema_extra={"default": text})


def _target_schema(pattern: str) -> dict[str, Any]:
    return {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": f"^({pattern})$"}]}


Text = Annotated[str, BeforeValidator(_text)]
FilePath = Annotated[Path, BeforeValidator(_path), WithJsonSchema({"type": "string", "minLength": 1})]
ModelSource = Annotated[Source, PlainValidator(_source), WithJsonSchema({"type": "string", "minLength": 1})]
Secret = Annotated[str, BeforeValidator(_secret), _pattern(r"^(\$\{[A-Za-z_][A-Za-z0-9_]*\}|file:.+)$")]
#: A secret that can be sent as the value of a header.
HeaderSecret = Annotated[Secret, AfterValidator(_header_secret)]
HeaderName = Annotated[str, BeforeValidator(_header_name), _pattern(f"^{_HEADER_PATTERN}$")]
UpstreamUrl = Annotated[str, BeforeValidator(_upstream_url), _pattern(f"^{_UPSTREAM_PATTERN}$")]
ModelName = Annotated[str, BeforeValidator(_model_name), _pattern(f"^{MODEL_NAME_PATTERN}$")]
LoadName = Annotated[str, BeforeValidator(_load_name), _pattern(rf"^(\*|{MODEL_NAME_PATTERN})$")]
VERSION_SCHEMA: Final = {
    "anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[1-9][0-9]{0,18}$"}]
}
Version = Annotated[str, BeforeValidator(_version), WithJsonSchema(VERSION_SCHEMA)]
VersionKey = Annotated[str, BeforeValidator(_version), _pattern(f"^{_VERSION_PATTERN}$")]
VersionSource = Annotated[Source, PlainValidator(_version_source), WithJsonSchema({"type": "string", "minLength": 1})]
#: A model or version as an upstream calls it; numbers may stand without quotes.
UpstreamName = Annotated[
    Text,
    BeforeValidator(_word),
    Field(min_length=1, max_length=255),
    WithJsonSchema({"type": ["string", "integer"], "minLength": 1, "maxLength": 255}),
]
Target = Annotated[str, BeforeValidator(_target), WithJsonSchema(_target_schema(_TARGET_PATTERN))]
OwnTarget = Annotated[
    str, BeforeValidator(_own_target), WithJsonSchema(_target_schema(f"{_VERSION_PATTERN}|@{_ALIAS_PATTERN}"))
]
RuleTarget = Annotated[
    str, BeforeValidator(_rule_target), WithJsonSchema(_target_schema(f"{_TARGET_PATTERN}|{_ARM_PATTERN}"))
]
ArmName = Annotated[str, BeforeValidator(_arm_name), _pattern(f"^{_ARM_PATTERN}$")]
#: Hundredths of a percent.
Share = Annotated[int, BeforeValidator(parse_share), _pattern(r"^[0-9]{1,3}(\.[0-9]{1,2}0*)?%$")]
KeySource = Annotated[Text, _pattern("^(header:.+|parameter:.+|request:id)$")]
RouteId = Annotated[Text, Field(min_length=1, max_length=255)]
ValueText = Annotated[str, BeforeValidator(scalar_text), WithJsonSchema({"type": ["string", "number", "boolean"]})]
OPTION_SCHEMA: Final = {"type": ["string", "number", "boolean"]}
Option = Annotated[str, BeforeValidator(_option), WithJsonSchema(OPTION_SCHEMA)]
Datatype = Annotated[str, BeforeValidator(_datatype), WithJsonSchema({"enum": sorted(ALL_DATATYPES)})]
ListenAddress = Annotated[Address, BeforeValidator(units.parse_address), _pattern(units.ADDRESS_PATTERN)]
Percent = Annotated[float, BeforeValidator(units.parse_percent), _pattern(units.PERCENT_PATTERN)]
#: A list in the file, a tuple here.
Many = Annotated[tuple[T, ...], Field(strict=False)]
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]

DURATION_SCHEMA: Final = _pattern(units.DURATION_PATTERN)
SIZE_SCHEMA: Final = _pattern(units.SIZE_PATTERN)
Delay = Annotated[int, bounded_duration("0s", "60s"), DURATION_SCHEMA]
PollTime = Annotated[int, bounded_duration("0s", "1ms"), DURATION_SCHEMA]
Timeout = Annotated[int, bounded_duration("0s", "1h"), DURATION_SCHEMA]
Span = Annotated[int, bounded_duration("1s", "1d"), DURATION_SCHEMA]
ConnectionAge = Annotated[int, bounded_duration("0s", "7d"), DURATION_SCHEMA]
Interval = Annotated[int, bounded_duration("100ms", "1d"), DURATION_SCHEMA]
AttemptTime = Annotated[int, bounded_duration("1ms", "1h"), DURATION_SCHEMA]
Window = Annotated[int, bounded_duration("100ms", "1h"), DURATION_SCHEMA]
WarmTime = Annotated[int, bounded_duration("0s", "7d"), DURATION_SCHEMA]
StepTime = Annotated[int, bounded_duration("100ms", "30d"), DURATION_SCHEMA]
OutcomeWindow = Annotated[int, bounded_duration("1s", "90d"), DURATION_SCHEMA]
CopySize = Annotated[int, bounded_size("1B", "2GiB"), SIZE_SCHEMA]
BodySize = Annotated[int, bounded_size("1KiB", "2GiB"), SIZE_SCHEMA]
HeaderSize = Annotated[int, bounded_size("1KiB", "1MiB"), SIZE_SCHEMA]
IdSize = Annotated[int, bounded_size("1B", "64KiB"), SIZE_SCHEMA]
