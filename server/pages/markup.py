"""HTML and SVG from calls. Every text is escaped unless it was made here, so that a name can never become markup."""

from __future__ import annotations

import html
import re
from typing import Final

_VOID: Final = frozenset({"meta", "input", "col"})
_CLOSED: Final = frozenset({"path", "rect", "line"})
#: What HTML and UTF-8 cannot hold: control characters, lone surrogates, noncharacters.
_UNPRINTABLE: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_LONG_NAME: Final = 72
_LONGEST_TITLE: Final = 1000


class Html(str):
    """Markup: put into other markup as it is."""

    __slots__ = ()


def text(value: object) -> Html:
    """Anything as the text of an element or an attribute."""
    return value if isinstance(value, Html) else Html(html.escape(_UNPRINTABLE.sub("\ufffd", str(value))))


def el(tag: str, /, *children: object, **attributes: object) -> Html:
    """An element. ``class_`` is class, ``stroke_width`` is stroke-width; None and False leave an attribute out."""
    head = tag + "".join([_attribute(name, value) for name, value in attributes.items()])
    if tag in _VOID:
        return Html(f"<{head}>")
    inner = join(*children)
    return Html(f"<{head}/>" if tag in _CLOSED and not inner else f"<{head}>{inner}</{tag}>")


def join(*children: object) -> Html:
    """Children one after the other; None is nothing."""
    return Html("".join([text(child) for child in children if child is not None]))


def name(value: object) -> Html:
    """A name that somebody else chose: kept apart from the direction of the text around it, and cut when long."""
    whole = str(value)
    if len(whole) <= _LONG_NAME:
        return el("bdi", whole)
    return el("bdi", whole[: _LONG_NAME - 1] + "…", title=whole[:_LONGEST_TITLE])


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    shown = "" if value is True else _coordinate(value) if isinstance(value, float) else text(value)
    return f' {key.rstrip("_").replace("_", "-")}="{shown}"'


def _coordinate(value: float) -> str:
    """A tenth of a pixel is enough."""
    return f"{value:.1f}".removesuffix(".0")
