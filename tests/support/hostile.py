"""What hostile callers send: valid bodies changed (JSON, protobuf, any bytes), and values of every wrong kind."""

from __future__ import annotations

import copy
import random
import struct
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

#: One of each kind that JSON has, and the borders of those that number types have.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e308, -0.0, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**400,
    "", "x", "é\u0000\U0001f600", "9" * 5000, [], [[]], [1], [None], {}, {"a": 1}, [{"a": []}], [[1], [2]],
    float("nan"), float("inf"),
]  # fmt: skip

Path = tuple[str | int, ...]


def paths(document: Any, at: Path = ()) -> Iterator[Path]:
    """Every position of a JSON document, the root first."""
    yield at
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from paths(value, (*at, key))


def replaced(document: Any, path: Path, value: Any) -> Any:
    """A copy with ``value`` at ``path``."""
    if not path:
        return copy.deepcopy(value)
    changed = copy.deepcopy(document)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = copy.deepcopy(value)
    return changed


def without(document: Any, path: Path) -> Any:
    """A copy without the key or element at ``path``."""
    changed = copy.deepcopy(document)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return changed


def variants(document: Any) -> Iterator[Any]:
    """Every value at every position; every part left out; an unknown key in every object."""
    for path in paths(document):
        for value in VALUES:
            yield replaced(document, path, value)
        if path:
            yield without(document, path)
    for path in paths(document):
        part = document
        for key in path:
            part = part[key]
        if isinstance(part, dict):
            yield replaced(document, path, {**part, "unknown": 1})


# --- bytes --------------------------------------------------------------------------------------------------------


def scrambled(rng: random.Random, raw: bytes) -> bytes:
    """A copy with one to four changes: bytes set, taken out, put in, said twice, or the end cut off."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 | 1 if at < len(changed):
                changed[at] = rng.randrange(256)
            case 2:
                del changed[at : at + rng.choice((1, 1, 4, 16))]
            case 3:
                changed[at:at] = rng.randbytes(rng.choice((1, 1, 4)))
            case 4:
                changed[at:at] = changed[at : at + rng.choice((1, 8, 64))]
            case 5 if rng.random() < 0.3:
                del changed[at:]
    return bytes(changed)


# --- protobuf -------------------------------------------------------------------------------------------------------

#: (number, wire type, payload): a varint's value, or bytes.
Field: TypeAlias = tuple[int, int, int | bytes]
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
NUMBERS: Final = (0, 1, 2, 127, 128, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)


def varint(value: int) -> bytes:
    coded = b""
    while value >= 128:
        coded, value = coded + bytes([value % 128 + 128]), value // 128
    return coded + bytes([value])


def fields(raw: bytes) -> list[Field] | None:
    """The fields of a message; None for what is none."""
    found: list[Field] = []
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        number, kind = key >> 3, key & 7
        payload: int | bytes
        if kind == VARINT:
            payload, at = _varint(raw, at)
        else:
            size, at = _varint(raw, at) if kind == BYTES else ({FIXED64: 8, FIXED32: 4}.get(kind, 1 << 40), at)
            payload, at = raw[at : at + size], at + size
        if number == 0 or at > len(raw):
            return None
        found.append((number, kind, payload))
    return found


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The value at ``at`` and where it ends, which is past the end of ``raw`` when that cuts it."""
    value = shift = 0
    while at < len(raw):
        byte = raw[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
    return value, len(raw) + 1


def packed(parts: list[Field]) -> bytes:
    """The message of these fields, whether they make sense or not."""
    out = []
    for number, kind, payload in parts:
        raw = payload if isinstance(payload, bytes) else varint(payload)
        size = varint(len(raw)) if kind == BYTES else b""
        out.append(varint(number << 3 | kind) + size + raw)
    return b"".join(out)


def rearranged(rng: random.Random, raw: bytes) -> bytes:
    """A message with one change at the level of fields, at any depth: what parsers disagree about."""
    parts = fields(raw)
    if not parts:
        return packed([(rng.randrange(1, 8), VARINT, rng.choice(NUMBERS))])
    at = rng.randrange(len(parts))
    number, kind, payload = parts[at]
    if isinstance(payload, bytes) and kind == BYTES and fields(payload) and rng.random() < 0.6:
        parts[at] = (number, kind, rearranged(rng, payload))
        return packed(parts)
    match rng.randrange(9):
        case 0:
            del parts[at]
        case 1:
            parts.insert(rng.randrange(len(parts) + 1), parts[at])
        case 2:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        case 3:
            parts[at] = (rng.choice((number + 1, max(1, number - 1), 15, 16, 1000, 2**29 - 1)), kind, payload)
        case 4:
            parts[at] = (number, VARINT, rng.choice(NUMBERS))
        case 5:
            parts[at] = (number, BYTES, rng.choice((b"", b"\xff", b"x", "é".encode(), rng.randbytes(9))))
        case 6:
            parts[at] = (number, rng.choice((FIXED64, FIXED32, 3, 4, 6, 7)), struct.pack("<q", rng.choice((0, -1, 5))))
        case 7:
            parts.insert(at, (rng.choice((100, 20_000)), VARINT, rng.choice(NUMBERS)))
        case 8 if kind == VARINT and isinstance(payload, int):
            parts[at] = (number, 3 if rng.random() < 0.2 else VARINT, rng.choice((payload + 1, -payload % 2**64)))
    return packed(parts)
