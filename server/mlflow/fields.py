"""Reading MLflow's JSON, whose numbers come as numbers or as texts, and whose empty members are left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from router.registry.base import MAX_VERSION
from router.registry.origin import Unusable

_MAX_TEXT: Final = 4096


def text_of(found: Mapping[str, Any], key: str) -> str:
    """A short text, "" when it is absent or null. Raises Unusable."""
    value = found.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise Unusable(f"{key} in MLflow's answer must be a text of at most {_MAX_TEXT} characters")
    return value


def object_of(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object, empty when it is absent. Raises Unusable."""
    value = {} if found.get(key) is None else found[key]
    if not isinstance(value, dict):
        raise Unusable(f"{key} in MLflow's answer must be an object")
    return value


def objects_of(found: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """A list of objects, empty when it is absent. Raises Unusable."""
    value = [] if found.get(key) is None else found[key]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Unusable(f"{key} in MLflow's answer must be a list of objects")
    return value


def version_of(found: Mapping[str, Any], key: str = "version") -> int:
    """A version number. Raises Unusable."""
    number = integer_of(found, key)
    if number is None or not 1 <= number <= MAX_VERSION:
        raise Unusable(f"{key} in MLflow's answer must be a version number")
    return number


def integer_of(found: Mapping[str, Any], key: str) -> int | None:
    """A whole number, None when it is absent. Raises Unusable."""
    value = found.get(key)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        return int(value)
    if value is not None and type(value) is not int:
        raise Unusable(f"{key} in MLflow's answer must be a whole number")
    return value


def pairs_of(found: Mapping[str, Any], key: str) -> dict[str, str]:
    """Tags or parameters: a list of ``{key, value}``. Raises Unusable."""
    return {text_of(item, "key"): str(item.get("value", ""))[:_MAX_TEXT] for item in objects_of(found, key)}


def finite(value: object) -> float | None:
    """A finite number, also one that is written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def time_of(found: Mapping[str, Any], key: str) -> str:
    """A time in milliseconds since the epoch as RFC 3339; "" when it is absent or no time."""
    milliseconds = integer_of(found, key)
    try:
        when = datetime.fromtimestamp((milliseconds or 0) / 1000, UTC)
    except (OverflowError, OSError, ValueError):
        return ""
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z") if milliseconds else ""
