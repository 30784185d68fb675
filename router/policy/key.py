"""The key of a request: who it belongs to, so that the same user stays on the same arm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

from router.decision import RouteQuery
from router.errors import Problem
from router.types import KeySpec, ParameterValue

_HEADER: Final = 0
_PARAMETER: Final = 1
_REQUEST_ID: Final = 2
_KINDS: Final = {"header": _HEADER, "parameter": _PARAMETER}
_REQUEST_ID_SOURCE: Final = "request:id"

#: (kind, name): where one compiled source looks.
Source: TypeAlias = tuple[int, str]


def compile_sources(spec: KeySpec) -> tuple[Source, ...]:
    """Sources in the order in which they are tried. ``problems`` must have found nothing."""
    return tuple(_compile(source) for source in spec.sources)


def _compile(source: str) -> Source:
    if source == _REQUEST_ID_SOURCE:
        return (_REQUEST_ID, "")
    kind, _, name = source.partition(":")
    return (_KINDS[kind], name.lower() if kind == "header" else name)


def problems(spec: KeySpec) -> Iterator[Problem]:
    """Every mistake in a key's specification."""
    for index, source in enumerate(spec.sources):
        kind, _, name = source.partition(":")
        if source != _REQUEST_ID_SOURCE and (kind not in _KINDS or not name):
            wanted = "header:NAME, parameter:NAME or request:id"
            yield Problem(("key", "from", index), f"wanted {wanted}, got {source[:64]!r}")
    if spec.missing not in ("random", "stable", "reject"):
        yield Problem(("key", "missing"), f"wanted random, stable or reject, got {spec.missing!r}")
    elif spec.missing == "reject" and not spec.sources:
        yield Problem(("key", "missing"), "reject wants a place to find the key in; 'from' names none")


def extract(sources: tuple[Source, ...], query: RouteQuery) -> str:
    """The first value that is there and not empty; "" when there is none."""
    for kind, name in sources:
        if kind == _HEADER:
            value = query.metadata.get(name)
        elif kind == _PARAMETER:
            value = as_text(query.parameters.get(name, ""))
        else:
            value = query.request_id
        if value:
            return value
    return ""


def as_text(value: ParameterValue) -> str:
    """A request parameter as a key or a rule sees it, so that both protocols and both kinds of quotes agree."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
