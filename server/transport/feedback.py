"""``POST /v2/models/{m}/feedback``: what became of answered requests, singly or as a list.

Joined by the request's id: the gateway's ``x-tidegate-id`` or the client's own. An outcome goes to the labels of the
model and to its experiment; what neither takes (too late, unknown, of a model that has none) is accepted and said to
be so. A list with an item that is malformed, with text that is no number and no class, or with a name that the
experiment of its request does not know, is refused whole.

``time``, when the outcome was, says which window of time the labels count the row in. Experiments, expiry and lateness
go by when an outcome arrives, so that no caller's clock can have predictions forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import isfinite
from typing import Any, Final, TypeAlias

from server.codec.checks import kind_of
from server.errors import InvalidArgument

MAX_ITEMS: Final = 10_000
MAX_TEXT: Final = 4096
_KEYS: Final = frozenset({"id", "outcome", "row", "name", "key", "time"})
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_WORDS: Final = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}


@dataclass(slots=True, frozen=True)
class Feedback:
    """One outcome. ``id`` (with ``row``) or ``key`` says whose it is; ``name`` which outcome, "" the only one.

    ``value``: the outcome as a number, None for text that is none. ``text``: the outcome as it was said, if that was
    text: it may be the name of a class. ``time_ns``: when it was, wall time; None: not said.
    """

    id: str
    key: str
    name: str
    value: float | None
    text: str = ""
    row: int = 0
    time_ns: int | None = None


#: ``hear(model, items)``: how many of them somebody took. Raises ModelNotFound or InvalidArgument, for an outcome that
#: nobody can take, before it takes any.
Hear: TypeAlias = Callable[[str, Sequence[Feedback]], int]


def parse(document: object) -> list[Feedback]:
    """One item or a list of them. Raises InvalidArgument naming the item and the key; then nothing is taken."""
    items = document if isinstance(document, list) else [document]
    if len(items) > MAX_ITEMS:
        raise InvalidArgument(f"at most {MAX_ITEMS} outcomes are taken at once, got {len(items)}")
    return [_item(item, f"item {n}: " if isinstance(document, list) else "") for n, item in enumerate(items)]


def _item(item: object, where: str) -> Feedback:
    if not isinstance(item, dict):
        raise InvalidArgument(f"{where}feedback must be an object, got {kind_of(item)}")
    unknown = sorted(set(item) - _KEYS)
    if unknown:
        raise InvalidArgument(f"{where}unknown key '{unknown[0][:64]}'; known: {', '.join(sorted(_KEYS))}")
    text = _said(item.get("outcome"))
    check_size(text, "outcome", where)
    value = number_of(text) if text else _value(item, where)
    found = Feedback(
        _text(item, "id", where),
        _text(item, "key", where),
        _text(item, "name", where),
        value,
        text,
        _row(item, where),
        time_of(item["time"], where) if "time" in item else None,
    )
    if not found.id and not found.key:
        raise InvalidArgument(f"{where}'id' or 'key' must say whose outcome it is")
    return found


def _said(outcome: object) -> str:
    """An outcome that is told in words, which may be the name of a class; "" for any other."""
    if isinstance(outcome, bool):
        return "true" if outcome else "false"
    return outcome if isinstance(outcome, str) else ""


def _text(item: dict[str, Any], key: str, where: str) -> str:
    value = item.get(key, "")
    if not isinstance(value, str):
        raise InvalidArgument(f"{where}'{key}' must be text, got {kind_of(value)}")
    check_size(value, key, where)
    return value


def check_size(text: str, key: str, where: str) -> None:
    """Raises InvalidArgument for text that is too long."""
    if len(text) > MAX_TEXT:
        raise InvalidArgument(f"{where}'{key}' must be text of at most {MAX_TEXT} characters, got {len(text)}")


def number_of(text: str) -> float | None:
    """The finite number that an outcome as text means, or None."""
    word = text.strip().lower()
    if word in _WORDS:
        return _WORDS[word]
    try:
        number = float(word)
    except ValueError:
        return None
    return number if isfinite(number) and "_" not in word else None


def _value(item: dict[str, Any], where: str) -> float:
    outcome = item.get("outcome")
    if not isinstance(outcome, int | float):
        got = "an empty text" if outcome == "" else kind_of(outcome)
        raise InvalidArgument(f"{where}'outcome' must be a number or text, got {got}")
    try:
        value = float(outcome)
    except OverflowError:
        raise InvalidArgument(f"{where}'outcome' is out of range") from None
    if not isfinite(value):
        raise InvalidArgument(f"{where}'outcome' must be a finite number, got {value}")
    return value


def _row(item: dict[str, Any], where: str) -> int:
    row = item.get("row", 0)
    if isinstance(row, bool) or not isinstance(row, int) or row < 0:
        raise InvalidArgument(f"{where}'row' must be a whole number of 0 or more, got {kind_of(row)}")
    return row


def time_of(time: object, where: str) -> int:
    """RFC 3339 as ns since 1970, UTC. Raises InvalidArgument for anything else, a time without its offset included."""
    try:
        since = datetime.fromisoformat(time) - _EPOCH  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        wanted = "RFC 3339 with its offset, as 2026-01-31T12:00:00Z"
        raise InvalidArgument(f"{where}'time' must be {wanted}, got {kind_of(time)}") from None
    return since // _MICROSECOND * 1000
