"""``POST /v2/models/{m}/feedback``: what became of answered requests, singly or as a list.

Joined by the request's id: the gateway's ``x-tidegate-id`` or the client's own. What cannot be joined (too old, too
late, or of a model without an experiment) is accepted and said to be so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeAlias

from server.errors import InvalidArgument

MAX_ITEMS: Final = 10_000
_KEYS: Final = frozenset({"id", "outcome", "row", "name", "key", "time"})
_WORDS: Final = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}


@dataclass(slots=True, frozen=True)
class Feedback:
    """One outcome. ``id`` or ``key`` says whose it is; ``name`` which outcome, "" the only one."""

    id: str
    key: str
    name: str
    value: float


#: ``hear(model, feedback)``: True when it was joined. Raises ModelNotFound or InvalidArgument.
Hear: TypeAlias = Callable[[str, Feedback], bool]


def parse(document: object) -> list[Feedback]:
    """One item or a list of them. Raises InvalidArgument naming the item and the key; then nothing is taken."""
    items = document if isinstance(document, list) else [document]
    if len(items) > MAX_ITEMS:
        raise InvalidArgument(f"at most {MAX_ITEMS} outcomes are taken at once, got {len(items)}")
    return [_item(item, f"item {n}: " if isinstance(document, list) else "") for n, item in enumerate(items)]


def _item(item: object, where: str) -> Feedback:
    if not isinstance(item, dict):
        raise InvalidArgument(f"{where}feedback must be an object, got {type(item).__name__}")
    unknown = sorted(set(item) - _KEYS)
    if unknown:
        raise InvalidArgument(f"{where}unknown key '{unknown[0][:64]}'; known: {', '.join(sorted(_KEYS))}")
    found = Feedback(
        _text(item, "id", where), _text(item, "key", where), _text(item, "name", where), _value(item, where)
    )
    if not found.id and not found.key:
        raise InvalidArgument(f"{where}'id' or 'key' must say whose outcome it is")
    _check_rest(item, where)
    return found


def _text(item: dict[str, Any], key: str, where: str) -> str:
    value = item.get(key, "")
    if not isinstance(value, str) or len(value) > 4096:
        raise InvalidArgument(f"{where}'{key}' must be text of at most 4096 characters")
    return value


def _value(item: dict[str, Any], where: str) -> float:
    outcome = item.get("outcome")
    if isinstance(outcome, str):
        try:
            return _WORDS[outcome.lower()] if outcome.lower() in _WORDS else float(outcome)
        except ValueError:
            raise InvalidArgument(
                f"{where}'outcome' as text must be a number, true, false, yes or no, got '{outcome[:64]}'"
            ) from None
    if not isinstance(outcome, bool | int | float):
        raise InvalidArgument(f"{where}'outcome' must be a number or text, got {type(outcome).__name__}")
    try:
        return float(outcome)
    except OverflowError:
        raise InvalidArgument(f"{where}'outcome' is out of range") from None


def _check_rest(item: dict[str, Any], where: str) -> None:
    row = item.get("row", 0)
    if isinstance(row, bool) or not isinstance(row, int) or row < 0:
        raise InvalidArgument(f"{where}'row' must be a whole number of 0 or more")
    if "time" in item:
        try:
            datetime.fromisoformat(item["time"])
        except (TypeError, ValueError):
            raise InvalidArgument(f"{where}'time' must be RFC 3339, got {str(item['time'])[:64]!r}") from None
